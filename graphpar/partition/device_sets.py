"""Sets of the devices of a pipeline, numbered as states of a count per cell."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from graphpar.partition.unit_arrays import IntArray


@dataclass(frozen=True, eq=False)
class DeviceSets:
    """Which sets of devices may be behind a stage.

    Arrays over options: `team`, the devices that each takes, and `width`, its replicas. By team: where
    its part of `sources` begins (and one more entry), the sets that leave its devices, with fewer
    replicas first; and by how much it raises the number of a set. By set: its replicas.
    """

    team: IntArray
    width: IntArray
    sources: IntArray
    begins: IntArray
    rises: IntArray
    replicas: IntArray


def device_sets(
    teams: IntArray, team: IntArray, width: IntArray, counts: Sequence[int], *, with_replicas: bool
) -> DeviceSets:
    """The sets within a count per cell, of which teams take so many of each.

    With replicas these are counted, as if of one more cell.
    """
    limits = (*counts, sum(counts)) if with_replicas else tuple(counts)
    states = states_of(limits)
    replicas = states[:, -1] if with_replicas else states.sum(axis=1)
    order = np.argsort(replicas, kind="stable")
    leave = [order[(states[order] + own <= limits).all(axis=1)] for own in teams]
    begins = np.cumsum([0, *map(len, leave)], dtype=np.intp)
    return DeviceSets(team, width, np.concatenate(leave), begins, teams @ strides_of(limits), replicas)


def states_of(limits: Sequence[int]) -> IntArray:
    """All counts within the limits, the last one growing first."""
    return np.ascontiguousarray(np.indices([n + 1 for n in limits]).reshape(len(limits), -1).T)


def strides_of(limits: Sequence[int]) -> IntArray:
    """By how much the number of a state rises with one more of each."""
    strides = [1]
    for number in reversed(limits[1:]):
        strides.append(strides[-1] * (number + 1))
    return np.array(strides[::-1], dtype=np.intp)
