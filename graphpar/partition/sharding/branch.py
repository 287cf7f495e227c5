"""A better bound where memory is short: branch on what holds much of it.

Prices take memory for divisible. Where one vertex may hold half of all that there is, two strategies of
it cost the same at the best prices, one that holds much and one that holds little, and the bound is that
of a mixture of both. So the problem is split in two: there the vertex may take what holds much, here what
holds little. In each part

* strategies go that do not fit even with everybody else at the least memory left to them, and those
  whose reduced cost passes the best answer known: one large tensor decides about many others;
* the bound goes on rising from the messages and prices of the whole, the strategies that went having
  become too dear.

Parts that promise nothing better are done; of the others, the one that promises most is split next. The
least bound of a part is one on the whole (branch and bound: Land and Doig, 1960).
"""

import heapq
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from graphpar.partition.clock import ShouldStop, never
from graphpar.partition.jit import compiled
from graphpar.partition.sharding.dual import DualAscent
from graphpar.partition.sharding.flat import FlatGraph
from graphpar.partition.sharding.graph import BoolArray, FloatArray, IntArray
from graphpar.partition.sharding.memory import add_up
from graphpar.partition.sharding.moves import excess_tree, max_range

_STEPS, _STEPS_PER_LOOK, _LEAST_RISE = 20, 10, 0.02
"""Most steps of the prices in a part, and the share of the gap that the bound must rise every so many."""

_NEAR = (2e-4, 2e-3, 2e-2, 1.0)
"""A vertex is split for the strategies whose reduced cost is up to such a share of the bound, the first
at which two of them differ in memory by more than `_DIFFERENT`, in shares of the bound at its prices."""
_DIFFERENT = 1e-3

_BAN = 2.0
"""What a strategy that went costs: so many times the best answer. Any amount leaves the bound true."""

_ROUNDING = 1e-9
"""Share of the largest limit by which sums of memory may be off."""

_MOST_BYTES = 1_000_000_000
"""Messages of all parts; there is no splitting beyond."""


@dataclass(frozen=True, eq=False)
class _Part:
    """What may be taken in a part, and what any answer in it costs: `base + excess[i]` with strategy i.

    `bound` may be more than `base`, but never what some answer in the part costs less than.
    """

    alive: BoolArray
    dual: DualAscent
    bound: float
    base: float
    excess: FloatArray


class Branching:
    """Parts of a problem that together hold every answer better than the best one known.

    Args:
        dual: Bound of the whole, which is left as it is.
    """

    def __init__(self, dual: DualAscent) -> None:
        self._flat = dual.flat
        twin = dual.twin()
        base, excess = twin.excess_costs()
        alive = np.ones(len(dual.theta), dtype=np.bool_)
        self._number = itertools.count()
        root = _Part(alive, twin, max(dual.bound, base), base, np.concatenate(excess))
        self._open = [(root.bound, next(self._number), root)]
        self._most_parts = _MOST_BYTES // max(1, 8 * (4 * len(dual.theta) + len(dual.to)))

    @property
    def bound(self) -> float:
        """What an answer better than the best known costs at least; infinite if there is none."""
        return self._open[0][0] if self._open else np.inf

    @property
    def is_full(self) -> bool:
        """Whether there is no room for more parts."""
        return len(self._open) >= self._most_parts

    def alive(self) -> BoolArray:
        """Which strategies a better answer may take."""
        alive = np.zeros(self._flat.start[-1], dtype=np.bool_)
        for _, _, part in self._open:
            alive |= part.alive
        return alive

    def split(self, target: float, should_stop: ShouldStop = never) -> list[IntArray]:
        """Split the part that promises most, looking for answers up to a cost; returns roundings.

        Cut short, it leaves bounds that are true, only lower.

        Raises:
            OutOfTimeError: The bound's own clock is over; this is of no more use then.
        """
        if not self._open:
            return []
        bound, _, part = heapq.heappop(self._open)
        if bound > target:
            self._open.clear()  # so are the others
            return []
        roundings = []
        for alive in self._halves(part):
            alive &= part.base + part.excess <= target
            if not tighten(self._flat, alive):
                continue
            twin = part.dual.twin()
            twin.theta += np.where(part.alive & ~alive, _BAN * abs(target), 0.0)
            _raise(twin, target, should_stop)
            if twin.bound > target:
                continue
            if np.count_nonzero(alive) == self._flat.num_vertices:
                roundings.append(np.flatnonzero(alive) - self._flat.start[:-1])  # all that is in it
                continue
            base, excess = twin.excess_costs()
            new = _Part(alive, twin, max(bound, twin.bound, base), base, np.concatenate(excess))
            heapq.heappush(self._open, (new.bound, next(self._number), new))
            roundings.append(twin.round_within_memory())
        return roundings

    def _halves(self, part: _Part) -> Iterator[BoolArray]:
        """The strategies of either half: those of one vertex that hold less, and those that hold more."""
        flat, first = self._flat, self._flat.start[:-1]
        priced = part.dual.memory.price(part.dual.multipliers)
        for near in _NEAR:
            wanted = part.alive & (part.excess <= near * abs(part.base))
            most = np.maximum.reduceat(np.where(wanted, priced, -np.inf), first)
            least = np.minimum.reduceat(np.where(wanted, priced, np.inf), first)
            vertex = int((most - least).argmax())
            if most[vertex] - least[vertex] > _DIFFERENT * abs(part.base):
                break
        middle = 0.5 * (most[vertex] + least[vertex])
        if most[vertex] <= least[vertex]:
            # No memory left to tell them apart: by what they cost.
            vertex = int(np.add.reduceat(part.alive, first, dtype=np.int64).argmax())
            priced = part.excess
        begin, end = flat.start[vertex], flat.start[vertex + 1]
        inside = part.alive[begin:end]
        if priced is part.excess:
            middle = float(np.median(priced[begin:end][inside]))
        low = priced[begin:end] <= middle
        if not (inside & ~low).any():
            low = np.arange(end - begin) == inside.argmax()
        for half in (low, ~low):
            alive = part.alive.copy()
            alive[begin:end] &= half
            yield alive


def _raise(dual: DualAscent, target: float, should_stop: ShouldStop) -> None:
    """Raise a part's bound until it passes the target, hardly rises any more, or it is time to stop."""
    last = -np.inf
    for step in range(1, _STEPS + 1):
        dual.ascend(2)
        if dual.bound > target or should_stop():
            break
        if step % _STEPS_PER_LOOK == 0:
            if dual.bound - last < _LEAST_RISE * (target - dual.bound):
                break
            last = dual.bound
    dual.restore_best()
    dual.sweep()


def tighten(flat: FlatGraph, alive: BoolArray) -> bool:
    """Drop strategies that do not fit with everybody else at least memory; False if nothing is left."""
    first, last = flat.segment_first, flat.segment_last
    least = np.zeros(len(first))
    slack = _ROUNDING * float(flat.limit.max(initial=1.0))
    dropped = 1
    while dropped:
        if not np.logical_or.reduceat(alive, flat.start[:-1]).all():
            return False
        count_least(flat, alive, least)
        excess = add_up(first, last, least, len(flat.limit)) - flat.limit - slack
        if excess.max(initial=0.0) > 0.0:
            return False
        top, lazy = excess_tree(excess)
        dropped = drop_oversized(flat, alive, least, top, lazy)
    return True


@compiled
def count_least(flat: FlatGraph, alive: BoolArray, least: FloatArray) -> None:
    """The least memory of the strategies left, for each segment."""
    for p in range(len(flat.start) - 1):
        begin, count = flat.start[p], flat.start[p + 1] - flat.start[p]
        own = flat.segment_start[p]
        width = flat.segment_start[p + 1] - own
        for k in range(width):
            low = 1e300
            for i in range(count):
                if alive[begin + i]:
                    low = min(low, flat.use[flat.use_start[p] + i * width + k])
            least[own + k] = low


@compiled
def drop_oversized(
    flat: FlatGraph, alive: BoolArray, least: FloatArray, top: FloatArray, lazy: FloatArray
) -> int:
    """Drop strategies for which there is no room; returns how many."""
    dropped = 0
    for p in range(len(flat.start) - 1):
        begin, count = flat.start[p], flat.start[p + 1] - flat.start[p]
        own = flat.segment_start[p]
        width = flat.segment_start[p + 1] - own
        for k in range(width):
            room = least[own + k]
            room -= max_range(top, lazy, flat.segment_first[own + k], flat.segment_last[own + k])
            for i in range(count):
                if alive[begin + i] and flat.use[flat.use_start[p] + i * width + k] > room:
                    alive[begin + i] = False
                    dropped += 1
    return dropped
