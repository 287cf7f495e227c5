"""Live memory of a sharding problem, reduced to the few moments that can bind.

A limit on live memory at every moment is one row per moment. Between two life boundaries the set of
live nodes is constant; of these sets only the maximal ones matter (uses are not negative), and of
the maximal ones only those at which everybody's largest use together would pass the limit.
"""

from typing import TYPE_CHECKING

import numpy as np

from graphpar.partition.clock import ShouldStop, in_time, never
from graphpar.partition.number_rows import flat
from graphpar.partition.problems import ShardingProblem
from graphpar.partition.sharding.graph import FloatArray, IntArray, MemoryRows, ShardingGraph

if TYPE_CHECKING:
    from scipy import sparse

_EXACT, _ROUNDING = 2.0**53, 1e-12
"""Whole numbers up to this add up exactly, larger ones to within this share."""


def memory_rows(problem: ShardingProblem) -> MemoryRows:
    """One row per maximal live set, with the limit and the uses as the file has them."""
    starts = np.array([low for low, _ in problem.intervals], dtype=np.int64)
    ends = np.maximum(starts, np.array([high for _, high in problem.intervals], dtype=np.int64))
    live = starts < ends
    if problem.usage_limit is None:
        live &= False
    moments = _maximal_moments(starts[live], ends[live])
    first = np.searchsorted(moments, starts).astype(np.intp)
    last = np.where(live, np.searchsorted(moments, ends), first).astype(np.intp)
    start, amounts = flat(problem.usages)
    limit = float(problem.usage_limit or 0)
    if max(amounts.sum(), limit) > _EXACT:
        # Sums round, and nothing that fits may be lost; answers are checked against the file.
        limit *= 1 + _ROUNDING
    return MemoryRows(
        first,
        last,
        np.full(len(moments), limit),
        amounts,
        start.astype(np.intp),
        (first < last).tolist(),
    )


def tighten(rows: MemoryRows, graph: ShardingGraph, out_of_time: ShouldStop = never) -> MemoryRows:
    """The same rows for fewer strategies: each node's least use is paid for from the limit.

    Rows that cannot bind any more go. Eliminated vertices count too; they use the same memory
    whatever they choose.

    Raises:
        OutOfTimeError: It was time to stop.
    """
    count, num_rows = len(rows.first), rows.num_rows
    least, spread = np.zeros(count), np.zeros(count)
    is_live = (rows.first < rows.last).tolist()
    held = [pair for pair in in_time(_remaining(graph), out_of_time) if is_live[pair[0]] and pair[1].size]
    if held:
        nodes = np.fromiter((node for node, _ in held), np.intp, len(held))
        present, begin = rows.use_of(held)
        least[nodes] = np.minimum.reduceat(present, begin)
        spread[nodes] = np.maximum.reduceat(present, begin) - least[nodes]
    usage = rows.usage - np.repeat(least, np.diff(rows.usage_start))
    limit = rows.limit - add_up(rows.first, rows.last, least, num_rows)
    most = add_up(rows.first, rows.last, spread, num_rows)
    # A negative limit stays in sight even where nobody has a choice: it proves infeasibility.
    binding = (most > limit) | (limit < 0)
    position = np.concatenate([[0], np.cumsum(binding)]).astype(np.intp)
    first, last = position[rows.first], position[rows.last]
    matters = ((first < last) & (spread > 0)).tolist()
    return MemoryRows(first, last, limit[binding], usage, rows.usage_start, matters)


def vertex_profile(
    members: list[tuple[int, IntArray]], rows: MemoryRows
) -> tuple[IntArray, FloatArray] | None:
    """Memory of a vertex: `(boundaries, use)` with `use[strategy, segment]`, or None for none.

    Segment k covers the rows `boundaries[k]` to `boundaries[k + 1] - 1`. A vertex whose strategies
    all use the same memory at every row has a profile too; `is_flat` tells.
    """
    holding = [member for member in members if rows.matters[member[0]]]
    return profile_of(holding, rows) if holding else None


def profile_of(holding: list[tuple[int, IntArray]], rows: MemoryRows) -> tuple[IntArray, FloatArray]:
    """The same of those members, one or more, that hold memory."""
    usage, start = rows.usage, rows.usage_start
    if len(holding) == 1:
        node, map_ = holding[0]
        return np.array((rows.first[node], rows.last[node])), usage[start[node] + map_][:, None]
    lives = [(int(rows.first[node]), int(rows.last[node])) for node, _ in holding]
    edges = sorted({edge for life in lives for edge in life})
    place = {edge: k for k, edge in enumerate(edges)}
    change = np.zeros((len(edges), len(holding[0][1])))
    for (node, map_), (begin, end) in zip(holding, lives, strict=True):
        use = usage[start[node] + map_]
        change[place[begin]] += use
        change[place[end]] -= use
    return np.array(edges), change.cumsum(axis=0)[:-1].T


def is_flat(profile: tuple[IntArray, FloatArray] | None) -> bool:
    """Whether the choice of strategy makes no difference to memory."""
    return profile is None or not np.any(profile[1] != profile[1][:1])


class MemoryMatrix:
    """Memory of every (vertex, strategy), as changes along the memory rows.

    `vertices[p]` sits at position p; its strategies are the entries `start[p]` to `start[p + 1] - 1`.
    """

    def __init__(self, graph: ShardingGraph, rows: MemoryRows, should_stop: ShouldStop = never) -> None:
        self.vertices = list(graph.costs)
        sizes = [len(graph.costs[u]) for u in self.vertices]
        self.start: IntArray = np.concatenate([[0], np.cumsum(sizes)]).astype(np.intp)
        self.limit = rows.limit
        self.profiles = [
            vertex_profile(graph.members[u], rows) for u in in_time(self.vertices, should_stop)
        ]
        self._change = self._changes(np.array(sizes, dtype=np.intp))

    def _changes(self, sizes: IntArray) -> "sparse.csr_matrix":
        """By (vertex, strategy) its change at each row: up where a segment begins, down where it ends."""
        # Takes longer to load than a first answer, which does without, may have.
        from scipy import sparse

        shape = (int(self.start[-1]), len(self.limit) + 1)
        held = [(p, *profile) for p, profile in enumerate(self.profiles) if profile is not None]
        if not held:
            return sparse.csr_matrix(shape, dtype=np.float64)
        places, boundaries, uses = zip(*held, strict=True)
        number = np.fromiter(map(len, boundaries), np.intp, len(held))
        own = sizes[list(places)]
        # Entries come by vertex, strategy, segment; of each strategy there are as many as of the others.
        width = np.repeat(number - 1, own)
        strategy = np.repeat(ranges(self.start[list(places)], own), width)
        begin = ranges(np.repeat(np.cumsum(number) - number, own), width)
        moment, use = np.concatenate(boundaries), np.concatenate([part.ravel() for part in uses])
        changes = sparse.csr_matrix(
            (
                np.concatenate([use, -use]),
                (np.tile(strategy, 2), np.concatenate([moment[begin], moment[begin + 1]])),
            ),
            shape=shape,
        )
        changes.eliminate_zeros()
        return changes

    def usage(self, chosen: IntArray) -> FloatArray:
        """Memory at each row when the vertex at position p takes strategy `chosen[p]`."""
        total = np.asarray(self._change[self.start[:-1] + chosen].sum(axis=0)).reshape(-1)
        usage: FloatArray = np.cumsum(total)[:-1]
        return usage

    def mean_usage(self, shares: FloatArray) -> FloatArray:
        """Memory at each row when every (vertex, strategy) is taken to its share."""
        usage: FloatArray = np.cumsum(self._change.T @ shares)[:-1]
        return usage

    def excess(self, chosen: IntArray) -> float:
        """The largest amount by which some row is over its limit; zero where none is."""
        if not self.limit.size:
            return 0.0  # asked for every rounding, most often where nothing is limited
        return float((self.usage(chosen) - self.limit).max(initial=0.0))

    def price(self, multipliers: FloatArray) -> FloatArray:
        """Cost of memory of every (vertex, strategy) at the given price per row."""
        cumulated = np.concatenate([[0.0], np.cumsum(multipliers)])
        priced: FloatArray = -(self._change @ cumulated)
        return priced


def ranges(first: IntArray, count: IntArray) -> IntArray:
    """`count[k]` whole numbers from `first[k]` on, for each k.

    >>> ranges(np.array([5, 0]), np.array([2, 3])).tolist()
    [5, 6, 0, 1, 2]
    """
    before = np.cumsum(count) - count
    found: IntArray = np.repeat(first - before, count) + np.arange(int(count.sum()))
    return found


def _remaining(graph: ShardingGraph) -> list[tuple[int, IntArray]]:
    remaining = [pair for members in graph.members.values() for pair in members]
    for step in graph.eliminated:
        remaining.extend(step.members)
    return remaining


def _maximal_moments(starts: IntArray, ends: IntArray) -> IntArray:
    """Starts whose next life boundary is an end: the live set there is maximal."""
    if starts.size == 0:
        return starts
    unique_starts, unique_ends = np.unique(starts), np.unique(ends)
    next_end = unique_ends[np.searchsorted(unique_ends, unique_starts, side="right")]
    next_start = np.append(unique_starts[1:], np.iinfo(np.int64).max)
    return unique_starts[next_end <= next_start]


def add_up(first: IntArray, last: IntArray, amount: FloatArray, num_rows: int) -> FloatArray:
    """The sum at each row of the amounts that the half-open ranges of rows put on it."""
    change = np.zeros(num_rows + 1)
    np.add.at(change, first, amount)
    np.add.at(change, last, -amount)
    return np.cumsum(change)[:-1]


class RangeMinima:
    """The least of any of some numbers that follow each other (a sparse table).

    >>> RangeMinima(np.array([4.0, 1.0, 3.0])).of(np.array([0, 2]), np.array([2, 3]))
    array([1., 3.])
    """

    def __init__(self, values: FloatArray) -> None:
        levels, reach = [values], 1  # level k holds the least of 2 ** k numbers from each place on
        while 2 * reach <= len(values):
            levels.append(levels[-1].copy())
            np.minimum(levels[-2][:-reach], levels[-2][reach:], out=levels[-1][:-reach])
            reach *= 2
        self._table = np.array(levels)

    def of(self, first: IntArray, last: IntArray) -> FloatArray:
        """The least of the numbers `first` to `last - 1`, of which there is one at least."""
        level = np.frexp(last - first)[1] - 1
        least: FloatArray = np.minimum(
            self._table[level, first], self._table[level, last - (1 << level.astype(np.intp))]
        )
        return least


def spread_peaks(over: FloatArray, count: int) -> set[int]:
    """The highest positive entries of `over`, at most one of each run of positive entries.

    >>> sorted(spread_peaks(np.array([1.0, 3.0, -1.0, 2.0, 2.0, 0.0]), 8))
    [1, 3]
    """
    positive = over > 0
    starts = np.flatnonzero(positive & ~np.concatenate([[False], positive[:-1]]))
    ends = np.flatnonzero(positive & ~np.concatenate([positive[1:], [False]])) + 1
    peaks = [int(begin + over[begin:end].argmax()) for begin, end in zip(starts, ends, strict=True)]
    return set(sorted(peaks, key=lambda row: -over[row])[:count])
