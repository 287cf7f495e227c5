"""A part of the devices of a table, where all of them are too many to search."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from graphpar.cost import CostTable, UnitCost
from graphpar.partition.staffings import MOST_STATES

AMONG = ", among the"
"""Begins the words for a part of the devices."""

_BY_CLASS = (
    "forward_s", "backward_s", "optimizer_s", "weight_s", "split_s", "again_s", "weights_by_class",
    "saved_by_class", "working_by_class", "deferred_by_class",
)  # fmt: skip
"""Fields of units that are indexed by device class, or empty."""


class TooManyUnitsError(Exception):
    """A chain has more unlike units than can be searched, were it over one device."""


def is_of_some_devices(words: str) -> bool:
    """Whether a search, as `Partition.family` tells it, was over a part of the devices only."""
    return AMONG in words


def fewer_devices(table: CostTable) -> tuple[CostTable, str]:
    """The same table with fewer devices of each kind; where each has only one, without the slowest.

    A slow one with more memory than the others have on average stays as long as there are others. So many
    are left out at once that a sweep may go through all sets of the others, if links do not tell more of
    them apart. Kinds of which none is left are left out as well.
    """
    numbers, words = [len(c.devices) for c in table.device_classes], ""
    slowest = _slowest_first(table)
    while not words or math.prod(n + 1 for n in numbers) > MOST_STATES:
        most = max(numbers)
        if most > 1:
            kept = most * 3 // 4
            numbers = [min(n, kept) for n in numbers]
            words = f"{AMONG} first {kept} devices of each kind only"
        else:
            numbers[next(slowest)] = 0
            words = f"{AMONG} faster devices only"
    return first_devices(table, numbers), words


def _slowest_first(table: CostTable) -> Iterator[int]:
    """Classes in the order in which they are left out where each has one device."""
    whole = whole_s(table)
    memory = {i: c.memory_bytes for i, c in enumerate(table.device_classes) if c.devices}
    while memory:
        mean = sum(memory.values()) / len(memory)
        slow = max(memory, key=lambda i: (memory[i] <= mean, whole[i]))
        del memory[slow]
        yield slow


def whole_s(table: CostTable) -> list[float]:
    """[class]: seconds of a forward of the whole chain at the largest size."""
    units, size = range(table.num_units), table.sizes[-1]
    return [sum(table.forward_s(u, k, size) for u in units) for k in range(len(table.device_classes))]


def first_devices(table: CostTable, numbers: Sequence[int]) -> CostTable:
    """The same table with the first devices of each class alone, as many as given; without empty classes.

    Modes of groups with a member of these are left out as well.
    """
    kept = [i for i, number in enumerate(numbers) if number]
    place = {k: i for i, k in enumerate(kept)}
    classes = [(table.device_classes[k], numbers[k]) for k in kept]
    modes = [m for m in table.modes if all(k in place for k in m.members)]
    return replace(
        table,
        device_classes=tuple(replace(c, devices=c.devices[:number]) for c, number in classes),
        costs=tuple(_of_classes(cost, kept) for cost in table.costs),
        modes=tuple(replace(m, members=tuple(place[k] for k in m.members)) for m in modes),
    )


def _of_classes(cost: UnitCost, kept: Sequence[int]) -> UnitCost:
    rows = {name: getattr(cost, name) for name in _BY_CLASS}
    fewer: dict[str, Any] = {name: tuple(r[k] for k in kept) for name, r in rows.items() if r}
    return replace(cost, **fewer)
