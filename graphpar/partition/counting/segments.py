"""Pipelines in which every kind of device is one stretch, kept whole: where lines and patterns find none.

`lines` keeps memory by position and prices devices, `kinds` keeps devices and prices
memory. Where both bind, what they meet mostly keeps neither. Here all stages of one kind stand next to
each other, from the last stage of the pipeline to the first:

    V[d, l] = least cost of a beginning of the line with l blocks whose present kind has used d devices

with the replicas behind it kept beside each value, so that a stage joins only where its memory holds.
Kinds join one after another in any order (a set of kinds stands for all its orders; the most promising
sets are extended). Stages that share a node come as *runs* that fit into one. A value forgets dearer
beginnings with fewer replicas, so this finds pipelines, not always the cheapest, and proves nothing.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from graphpar.partition.clock import OutOfTimeError
from graphpar.partition.counting.columns import BODY, FIRST, LAST
from graphpar.partition.counting.kinds import Stocks
from graphpar.partition.counting.lines import Line, Lines
from graphpar.partition.jit import compiled_exactly
from graphpar.partition.unit_arrays import FloatArray, IntArray

_RUNS = (2, 4, 8)
"""Stages that share a node as one run."""

_SETS = 10
"""Sets of as many kinds that are extended."""


@dataclass(frozen=True, eq=False)
class Prices:
    """What a block is worth and what a device of each kind is: only to rank beginnings."""

    block: float
    devices: FloatArray


def grow_segments(
    lines: Lines,
    stocks: Stocks,
    node_sizes: Sequence[int],
    prices: Prices,
    spend: float,
    deadline_s: float,
) -> Line | None:
    """The cheapest line found below `spend` in which every kind is one stretch.

    Args:
        lines: The columns and what they cost.
        stocks: Who has how many devices.
        node_sizes: Devices of a node of each kind.
        prices: What beginnings of lines are ranked with.
        spend: Only lines that cost less are of interest.
        deadline_s: `time.monotonic()` at which to stop.

    Raises:
        OutOfTimeError: Time is up.
    """
    return _Segments(lines, stocks, node_sizes, prices, spend).work(deadline_s)


@dataclass(frozen=True, eq=False)
class _Pieces:
    """What may come next: a stage or a run of them, by devices; at most `most` replicas are behind it."""

    devices: IntArray
    blocks: IntArray
    width: IntArray
    most: IntArray
    cost: FloatArray
    columns: list[tuple[int, ...]]

    @property
    def arrays(self) -> tuple[IntArray, IntArray, IntArray, IntArray, FloatArray]:
        return self.devices, self.blocks, self.width, self.most, self.cost


@dataclass(frozen=True, eq=False)
class _Begun:
    """Beginnings that are done with some kinds, by blocks: least cost, replicas, how they came."""

    kinds: frozenset[int]
    cost: FloatArray
    behind: IntArray
    last: "_Step | None"


@dataclass(frozen=True, eq=False)
class _Step:
    """A kind that joined: after what, the devices used of it by blocks, the piece that came last."""

    before: _Begun
    kind: int
    used: IntArray
    pick: IntArray


class _Segments:
    def __init__(
        self, lines: Lines, stocks: Stocks, node_sizes: Sequence[int], prices: Prices, spend: float
    ) -> None:
        self._lines, self._stocks, self._prices, self._spend = lines, stocks, prices, spend
        self._kinds = {
            kind: tuple(_pieces(lines, stocks, kind, role, size) for role in (BODY, FIRST, LAST))
            for kind, size in enumerate(node_sizes)
            if (stocks.kind == kind).any()
        }
        self._best: Line | None = None

    def work(self, deadline_s: float) -> Line | None:
        number = self._lines.blocks + 1
        level = [_Begun(frozenset(), np.full(number, np.inf), np.zeros(number, dtype=np.intp), None)]
        for _ in self._kinds:
            further: dict[frozenset[int], tuple[float, _Begun]] = {}
            for begun in level:
                if time.monotonic() > deadline_s:
                    raise OutOfTimeError
                for kind in self._kinds.keys() - begun.kinds:
                    after = self._extend(begun, kind)
                    rank = self._rank(after)
                    known = further.get(after.kinds)
                    if rank < np.inf and (known is None or rank < known[0]):
                        further[after.kinds] = rank, after
            level = [b for _, b in sorted(further.values(), key=lambda pair: pair[0])[:_SETS]]
        return self._best

    def _rank(self, begun: _Begun) -> float:
        """What blocks cost beyond their worth, with all devices that are gone."""
        worth = self._prices.block * np.arange(len(begun.cost))
        return float((begun.cost - worth).min()) + float(self._prices.devices[list(begun.kinds)].sum())

    def _extend(self, begun: _Begun, kind: int) -> _Begun:
        """All that can be done with one kind more; takes lines that are complete with it."""
        number, most = self._lines.blocks, self._stocks.counts[kind]
        body, first, last = self._kinds[kind]
        cost = np.full((most + 1, number + 1), np.inf)
        behind = np.zeros(cost.shape, dtype=np.intp)
        pick = np.full(cost.shape, -1, dtype=np.intp)
        cost[0], behind[0] = begun.cost, begun.behind
        if begun.last is None:
            for i in range(len(last.cost)):
                at = int(last.devices[i]), int(last.blocks[i])
                if at[0] <= most and last.cost[i] < cost[at]:
                    cost[at], behind[at], pick[at] = last.cost[i], last.width[i], -2 - i
        segment_loop(*body.arrays, cost, behind, pick, self._limit)
        used = cost.argmin(axis=0)
        blocks = np.arange(number + 1)
        step = _Step(begun, kind, used, pick)
        after = _Begun(begun.kinds | {kind}, cost[used, blocks], behind[used, blocks], step)
        self._close(after, first, cost, behind)
        return after

    @property
    def _limit(self) -> float:
        return self._spend if self._best is None else min(self._spend, self._best.cost)

    def _close(self, begun: _Begun, first: _Pieces, cost: FloatArray, behind: IntArray) -> None:
        """Take the cheapest line that ends with a first stage of the kind that just joined."""
        best: tuple[float, tuple[int, int, int]] = self._limit, (0, 0, -1)
        for i in range(len(first.cost)):
            left, blocks = (
                len(cost) - 1 - int(first.devices[i]),
                self._lines.blocks - int(first.blocks[i]),
            )
            if left < 0 or blocks < 0:
                continue
            holds = behind[: left + 1, blocks] <= first.most[i]
            row = np.where(holds, cost[: left + 1, blocks] + first.cost[i], np.inf)
            if row.min() < best[0]:
                best = float(row.min()), (int(row.argmin()), blocks, i)
        if best[1][2] >= 0:
            line = self._follow(begun, *best[1])
            if self._lines.holds(line):
                self._best = line

    def _follow(self, begun: _Begun, devices: int, blocks: int, first: int) -> Line:
        step = begun.last
        assert step is not None
        columns = list(self._kinds[step.kind][1].columns[first])
        while True:
            body, _, last = self._kinds[step.kind]
            i = int(step.pick[devices, blocks])
            if i < -1:
                columns += last.columns[-2 - i]
                return self._lines.line_of(tuple(reversed(columns)))
            if i == -1:
                step = step.before.last
                assert step is not None
                devices = int(step.used[blocks])
                continue
            columns += body.columns[i]
            devices, blocks = devices - int(body.devices[i]), blocks - int(body.blocks[i])


def _pieces(lines: Lines, stocks: Stocks, kind: int, role: int, node_size: int) -> _Pieces:
    """Single stages of a kind, and where it is no end of the line runs of equal ones inside a node."""
    outside, mine = lines.columns.outside, (stocks.kind == kind) & (lines.columns.role == role)
    runs: list[tuple[int, ...]] = [(i,) for i in np.flatnonzero(mine & (outside == 2)).tolist()]
    if role == BODY:
        runs += _shared(lines, stocks, np.flatnonzero(mine & (outside < 2)), node_size)
    rows: dict[tuple[int, int], list[tuple[float, int, int, tuple[int, ...]]]] = {}
    widths, dues = lines.width.tolist(), lines.due.tolist()
    for run in runs:
        behind, most = 0, lines.devices
        for i in run:
            behind += widths[i]
            most = min(most, dues[i] - behind)
        number = len(run)
        key = number * int(stocks.devices[run[0]]), number * int(lines.columns.blocks[run[0]])
        if most >= 0 and key[1] <= lines.blocks:
            rows.setdefault(key, []).append((float(lines.cost[list(run)].sum()), -most, behind, run))
    kept = [(*key, *row) for key in sorted(rows) for row in _undominated(rows[key])]
    cost = np.array([r[2] for r in kept], dtype=np.float64)
    devices, blocks, below, width = (np.array([r[i] for r in kept], dtype=np.intp) for i in (0, 1, 3, 4))
    return _Pieces(devices, blocks, width, -below, cost, [r[5] for r in kept])


_Row = tuple[float, int, int, tuple[int, ...]]


def _undominated(rows: list[_Row]) -> Iterator[_Row]:
    """Only pieces with more room behind them than all that cost less."""
    most = 1
    for row in sorted(rows):
        if row[1] < most:
            most = row[1]
            yield row


def _shared(lines: Lines, stocks: Stocks, index: IntArray, size: int) -> Iterator[tuple[int, ...]]:
    """Runs of stages alike in devices, replicas and blocks; the ends have one boundary outside."""
    alike: dict[tuple[int, int, int], tuple[list[int], list[int]]] = {}
    for i in index.tolist():
        key = int(stocks.devices[i]), int(lines.width[i]), int(lines.columns.blocks[i])
        alike.setdefault(key, ([], []))[int(lines.columns.outside[i])].append(i)
    for (devices, _, _), (inner, ends) in alike.items():
        for end in ends:
            if 2 * devices <= size:
                yield end, end
            for middle in inner:
                for number in _RUNS[1:]:
                    if number * devices <= size:
                        yield (end, *(middle,) * (number - 2), end)


@compiled_exactly
def segment_loop(
    devices: IntArray,
    blocks: IntArray,
    width: IntArray,
    most: IntArray,
    cost: FloatArray,
    total: FloatArray,
    behind: IntArray,
    pick: IntArray,
    limit: float,
) -> None:
    """Fill `total[devices, blocks]` with the least cost, from what stands in it; pieces come by devices.

    `behind` are the replicas of what was cheapest, `pick` its last piece.
    """
    stock, number = total.shape[0] - 1, total.shape[1] - 1
    for d in range(stock + 1):
        for b in range(number + 1):
            own = total[d, b]
            if not own < limit:
                continue
            replicas = behind[d, b]
            for i in range(len(devices)):
                there = d + devices[i]
                if there > stock:
                    break
                after = b + blocks[i]
                if after > number or replicas > most[i]:
                    continue
                new = own + cost[i]
                if new < total[there, after]:
                    total[there, after] = new
                    behind[there, after] = replicas + width[i]
                    pick[there, after] = i
