"""Live memory of a sharding problem, reduced to the few moments that can bind.

A limit on live memory at every moment is one row per moment. Between two life boundaries the set of
live nodes is constant; of these sets only the maximal ones matter (uses are not negative), and of
the maximal ones only those at which everybody's largest use together would pass the limit.
"""

import numpy as np

from graphpar.partition.problems import ShardingProblem
from graphpar.partition.shard_graph import FloatArray, IntArray, MemoryRows, ShardingGraph


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
    usages = {node: np.array(usage, dtype=np.float64) for node, usage in enumerate(problem.usages)}
    return MemoryRows(first, last, np.full(len(moments), float(problem.usage_limit or 0)), usages)


def tighten(rows: MemoryRows, graph: ShardingGraph) -> MemoryRows:
    """The same rows for fewer strategies: each node's least use is paid for from the limit.

    Rows that cannot bind any more go. Eliminated vertices count too; they use the same memory
    whatever they choose.
    """
    count, num_rows = len(rows.first), rows.num_rows
    least, spread = np.zeros(count), np.zeros(count)
    usages = dict(rows.usages)
    for node, map_ in _remaining(graph):
        if rows.first[node] < rows.last[node]:
            present = usages[node][map_]
            least[node] = low = present.min(initial=np.inf)
            spread[node] = present.max(initial=low) - low
            if low:
                usages[node] = usages[node] - low
    limit = rows.limit - _profile(rows.first, rows.last, least, num_rows)
    most = _profile(rows.first, rows.last, spread, num_rows)
    # A negative limit stays in sight even where nobody has a choice: it proves infeasibility.
    binding = (most > limit) | (limit < 0)
    position = np.concatenate([[0], np.cumsum(binding)]).astype(np.intp)
    return MemoryRows(position[rows.first], position[rows.last], limit[binding], usages)


def vertex_profile(
    members: list[tuple[int, IntArray]], rows: MemoryRows
) -> tuple[IntArray, FloatArray] | None:
    """Memory of a vertex: `(boundaries, use)` with `use[strategy, segment]`, or None for none.

    Segment k covers the rows `boundaries[k]` to `boundaries[k + 1] - 1`. A vertex whose strategies
    all use the same memory at every row has a profile too; `is_flat` tells.
    """
    holding = [
        (node, map_)
        for node, map_ in members
        if rows.first[node] < rows.last[node] and np.any(rows.usages[node][map_])
    ]
    if not holding:
        return None
    if len(holding) == 1:
        node, map_ = holding[0]
        return np.array([rows.first[node], rows.last[node]]), rows.usages[node][map_][:, None]
    edges = np.unique([(rows.first[node], rows.last[node]) for node, _ in holding])
    change = np.zeros((len(edges), len(holding[0][1])))
    for node, map_ in holding:
        begin, end = np.searchsorted(edges, (rows.first[node], rows.last[node]))
        use = rows.usages[node][map_]
        change[begin] += use
        change[end] -= use
    return edges, np.cumsum(change, axis=0)[:-1].T


def is_flat(profile: tuple[IntArray, FloatArray] | None) -> bool:
    """Whether the choice of strategy makes no difference to memory."""
    return profile is None or not np.any(profile[1] != profile[1][:1])


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


def _profile(first: IntArray, last: IntArray, amount: FloatArray, num_rows: int) -> FloatArray:
    change = np.zeros(num_rows + 1)
    np.add.at(change, first, amount)
    np.add.at(change, last, -amount)
    return np.cumsum(change)[:-1]
