"""Runs of units between kinds of links, numbered without being listed.

A *slot* is a run of units with the kinds of links at its two boundaries (link kind 0 is the end of the
pipeline, where nothing is sent). Where every two nodes have a link of their own there are a million of
them, of which a search looks at some thousand.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from graphpar.partition.unit_arrays import IntArray, Ranges

_FEW = 50_000
"""So many slots are worked out once and for all."""


@dataclass(frozen=True, eq=False)
class SlotArrays:
    """By slot: its run, the first and last unit of that, the kinds of links before and after."""

    run: IntArray
    first: IntArray
    last: IntArray
    before: IntArray
    after: IntArray
    num_units: int

    @property
    def places(self) -> tuple[IntArray, IntArray]:
        """Where each begins and ends, as numbers of link kind and unit (`chains.path_loops`)."""
        units = self.num_units + 1
        return self.before * units + self.first, self.after * units + self.last


class Slots:
    """Every run with every pair of links it may stand between, sorted by run.

    With no kinds of links each run is one slot, which leaves open what is beside it.
    """

    def __init__(self, runs: Ranges, num_units: int, num_kinds: int) -> None:
        self.num_kinds = max(num_kinds, 1)
        """Kind 0 counted."""
        self._runs, self._num_units, self._named = runs, num_units, int(num_kinds > 0)
        # The pipeline starts and ends where nothing is sent, and only there.
        some = num_kinds - 1 if num_kinds else 1
        ahead, behind = (np.where(end, 1, some) for end in (runs.first == 0, runs.last == num_units))
        self.behind: IntArray = behind
        """[run]: kinds of links that may be behind it."""
        self.begins: IntArray = np.concatenate([[0], np.cumsum(ahead * behind)])
        """[run]: its first slot, and one more entry."""

    def __len__(self) -> int:
        return int(self.begins[-1])

    def at(self, slot: IntArray) -> SlotArrays:
        """Some of them."""
        if len(self) > _FEW:
            return self._worked_out(slot)
        every = self.every
        arrays = every.run, every.first, every.last, every.before, every.after
        run, first, last, before, after = (array.take(slot) for array in arrays)
        return SlotArrays(run, first, last, before, after, self._num_units)

    def _worked_out(self, slot: IntArray) -> SlotArrays:
        run: IntArray = np.searchsorted(self.begins, slot, side="right") - 1
        first, last, behind = self._runs.first[run], self._runs.last[run], self.behind[run]
        place = slot - self.begins[run]
        before = place // behind + self._named * (first > 0)
        after = place % behind + self._named * (last < self._num_units)
        return SlotArrays(run, first, last, before, after, self._num_units)

    @cached_property
    def every(self) -> SlotArrays:
        """All of them: where there are few."""
        return self._worked_out(np.arange(len(self)))


@dataclass(frozen=True, eq=False)
class Positions:
    """Which entries of an array have a value, for every value."""

    order: IntArray
    start: IntArray
    number: IntArray

    def spread(self, values: IntArray) -> tuple[IntArray, IntArray]:
        """For every position of every value: which of `values` it belongs to, and the position."""
        number = self.number[values]
        owner = np.repeat(np.arange(len(values)), number)
        offset = np.arange(len(owner)) - np.repeat(np.cumsum(number) - number, number)
        return owner, self.order[self.start[values][owner] + offset]


def positions(array: IntArray, size: int) -> Positions:
    """Of an array of numbers below `size`."""
    number = np.bincount(array, minlength=size)
    return Positions(np.argsort(array, kind="stable"), np.cumsum(number) - number, number)
