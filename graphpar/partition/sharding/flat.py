"""A reduced sharding problem as flat arrays, the form that compiled loops work on.

Strategies of all vertices are numbered through: vertex at position p owns `start[p]` to
`start[p + 1] - 1`. Every edge is listed at both of its ends, each time with its table lying row by
row as seen from that end, so that a loop over the other end's strategies reads memory in order.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from graphpar.partition.clock import ShouldStop, in_time, never
from graphpar.partition.sharding.graph import FloatArray, IntArray, ShardingGraph
from graphpar.partition.sharding.memory import MemoryMatrix, is_flat

Int64Array = npt.NDArray[np.int64]

IMPOSSIBLE_FACTOR = 16.0
"""An impossible pair costs this many times the sum of the largest possible amounts."""


class FlatGraph(NamedTuple):
    """Costs, edges and memory of a reduced problem.

    Attributes:
        start: First strategy of each vertex, and their number at the end.
        cost: Cost of each strategy.
        edge_start: Edge ends of vertex p are `edge_start[p]` to `edge_start[p + 1] - 1`.
        edge_to: The vertex at the other end.
        edge_back: The same edge as listed at its other end.
        edge_table: Where its table begins in `pairs`; entry (i, j) is at
            `edge_table + i * (number of strategies of edge_to) + j`. Equal tables share a place.
        pairs: The tables, impossible pairs at a finite but prohibitive cost.
        segment_start: Memory segments of vertex p are `segment_start[p]` to `segment_start[p + 1] - 1`.
        segment_first, segment_last: Half-open range of memory rows of a segment.
        use: Memory of strategy i of p in its segment number k is at
            `use_start[p] + i * (number of segments of p) + k`.
        use_start: See `use`.
        limit: Memory limit of each row.
    """

    start: Int64Array
    cost: FloatArray
    edge_start: Int64Array
    edge_to: Int64Array
    edge_back: Int64Array
    edge_table: Int64Array
    pairs: FloatArray
    segment_start: Int64Array
    segment_first: Int64Array
    segment_last: Int64Array
    use: FloatArray
    use_start: Int64Array
    limit: FloatArray

    @property
    def num_vertices(self) -> int:
        """Number of vertices."""
        return len(self.start) - 1


def flatten(graph: ShardingGraph, memory: MemoryMatrix, should_stop: ShouldStop = never) -> FlatGraph:
    """The arrays of a graph, its vertices in the order of `memory.vertices`."""
    vertices = memory.vertices
    position = {u: p for p, u in enumerate(vertices)}
    rows = [graph.tables[u] for u in vertices]
    counts = np.fromiter(map(len, rows), np.int64, len(rows))
    edge_start = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    near = (position[v] for row in in_time(rows, should_stop) for v in row)
    edge_to = np.fromiter(near, np.int64, int(edge_start[-1]))
    ends = np.repeat(np.arange(len(rows)), counts)
    # In order of either end, then of the other, the same edges come at the same places.
    edge_back = np.empty_like(edge_to)
    edge_back[np.lexsort((edge_to, ends))] = np.lexsort((ends, edge_to))
    number, tables = _unlike([t for row in in_time(rows, should_stop) for t in row.values()], should_stop)
    table_start = np.cumsum([0, *map(len, tables)])[:-1].astype(np.int64)
    pairs = np.concatenate([np.zeros(0), *tables])
    cost = np.concatenate([np.zeros(0), *(graph.costs[u] for u in vertices)])
    possible = np.isfinite(pairs)
    if not possible.all():
        largest = np.maximum.reduceat(np.where(possible, np.abs(pairs), 0.0), table_start)[number]
        total = np.maximum.reduceat(np.abs(cost), memory.start[:-1]).sum() + largest[ends < edge_to].sum()
        pairs[~possible] = IMPOSSIBLE_FACTOR * max(float(total), 1.0)
    return FlatGraph(
        memory.start.astype(np.int64),
        cost,
        edge_start,
        edge_to,
        edge_back,
        table_start[number],
        pairs,
        *_segments(memory, should_stop),
        memory.limit.astype(np.float64),
    )


def _unlike(tables: list[FloatArray], should_stop: ShouldStop) -> tuple[Int64Array, list[FloatArray]]:
    """For each table the number of the first that lies like it row by row, and those, unrolled.

    The layers of a model are alike, and what lies there once stays in a processor's cache.
    """
    seen: dict[bytes, int] = {}
    first: list[FloatArray] = []
    number = np.empty(len(tables), np.int64)
    for k, table in enumerate(in_time(tables, should_stop)):
        row_by_row = table.ravel()
        number[k] = seen.setdefault(row_by_row.tobytes(), len(first))
        if number[k] == len(first):
            first.append(row_by_row)
    return number, first


def flat_cost(flat: FlatGraph, x: IntArray) -> float:
    """Cost of a choice, the graph's constant and memory aside."""
    ends = np.repeat(np.arange(flat.num_vertices), np.diff(flat.edge_start))
    widths = np.diff(flat.start)[flat.edge_to]
    once = ends < flat.edge_to
    pairs = flat.pairs[(flat.edge_table + x[ends] * widths + x[flat.edge_to])[once]]
    return float(flat.cost[flat.start[:-1] + x].sum() + pairs.sum())


def _segments(
    memory: MemoryMatrix, should_stop: ShouldStop
) -> tuple[Int64Array, Int64Array, Int64Array, FloatArray, Int64Array]:
    """Segments of the vertices whose choice makes a difference to memory; the rest holds still."""
    counts, first, last, uses, use_start = [0], [], [], [np.zeros(0)], [0]
    for profile in in_time(memory.profiles, should_stop):
        if profile is None or is_flat(profile):
            counts.append(0)
            use_start.append(use_start[-1])
            continue
        boundaries, use = profile
        counts.append(use.shape[1])
        first.extend(boundaries[:-1].tolist())
        last.extend(boundaries[1:].tolist())
        uses.append(np.ascontiguousarray(use).ravel())
        use_start.append(use_start[-1] + use.size)
    return (
        np.cumsum(counts).astype(np.int64),
        np.array(first, dtype=np.int64),
        np.array(last, dtype=np.int64),
        np.concatenate(uses),
        np.array(use_start[:-1], dtype=np.int64),
    )
