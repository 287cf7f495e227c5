"""Boxes of pipelines between limits on extra and post, and how their limits are divided."""

from dataclasses import dataclass, field

import numpy as np

from graphpar.partition.counting.floors import Floors
from graphpar.partition.unit_arrays import FloatArray


@dataclass(frozen=True)
class Box:
    """Extra and post from and to; `looks` counts the beams tried.

    `known` are the columns that a pipeline in the box below some former target may use, None for all.
    """

    task: int
    extra: tuple[float, float]
    post: tuple[float, float]
    looks: int = 0
    known: Floors | None = field(default=None, repr=False)


def within(values: FloatArray, low: float, high: float) -> tuple[float, float] | None:
    """The least and the largest of increasing values between two limits."""
    first = int(np.searchsorted(values, low, side="left"))
    last = int(np.searchsorted(values, high, side="right")) - 1
    return (float(values[first]), float(values[last])) if first <= last else None


def middle_of(values: FloatArray, limits: tuple[float, float]) -> tuple[float, float] | None:
    """Two neighbours among increasing values near the middle of limits, None where there are not two."""
    first = int(np.searchsorted(values, limits[0], side="left"))
    last = int(np.searchsorted(values, limits[1], side="right")) - 1
    if last <= first:
        return None
    middle = int(np.searchsorted(values, (values[first] + values[last]) / 2, side="right"))
    middle = min(max(middle, first + 1), last)
    return float(values[middle - 1]), float(values[middle])


def split_below(
    values: FloatArray, limits: tuple[float, float], value: float
) -> list[tuple[float, float]] | None:
    """Limits in two parts, the upper one from a value between the lower limit and the given one."""
    parts = middle_of(values, (limits[0], value))
    if parts is None:
        return None
    return [(limits[0], parts[0]), (parts[1], limits[1])]
