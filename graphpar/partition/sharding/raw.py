"""A sharding problem as read, in flat arrays: the form that compiled loops work on before reductions."""

from typing import NamedTuple

import numpy as np

from graphpar.partition.clock import OutOfTimeError, ShouldStop, never
from graphpar.partition.number_rows import flat
from graphpar.partition.problems import ShardingProblem
from graphpar.partition.sharding.flat import Int64Array
from graphpar.partition.sharding.graph import BoolArray, FloatArray
from graphpar.partition.sharding.memory import memory_rows


class RawProblem(NamedTuple):
    """A problem as read, in flat arrays; impossible costs are infinite.

    Attributes:
        start: First strategy of each node, and their number at the end.
        cost, usage: Per strategy.
        end_start: Edge ends of node v are `end_start[v]` to `end_start[v + 1] - 1`.
        end_to: The node at the other end.
        end_table: Where the edge's table begins in `pairs`.
        end_step, end_other: Distance in `pairs` between two strategies of v, and of the other node.
        end_hard: Whether the edge makes some pair impossible.
        pairs: All tables, one after the other.
        row_first, row_last: Half-open range of memory rows in which each node is live.
        limit: Memory limit of each row.
    """

    start: Int64Array
    cost: FloatArray
    usage: FloatArray
    end_start: Int64Array
    end_to: Int64Array
    end_table: Int64Array
    end_step: Int64Array
    end_other: Int64Array
    end_hard: BoolArray
    pairs: FloatArray
    row_first: Int64Array
    row_last: Int64Array
    limit: FloatArray

    @property
    def num_nodes(self) -> int:
        """Number of nodes."""
        return len(self.start) - 1


def raw_problem(problem: ShardingProblem, should_stop: ShouldStop = never) -> RawProblem:
    """The arrays of a problem.

    Raises:
        OutOfTimeError: It was time to stop.
    """
    rows = memory_rows(problem)
    start, node_costs = problem.flat_node_costs
    _look_at(should_stop)
    sizes, cost = np.diff(start), node_costs.copy()
    # An edge with one end costs that end alone; it is listed as one from the node to itself.
    ends = np.array([(nodes[0], nodes[-1]) for nodes in problem.edge_nodes], np.int64).reshape(-1, 2)
    single = np.fromiter((len(nodes) == 1 for nodes in problem.edge_nodes), np.bool_, len(ends))
    table, pairs = problem.flat_edge_costs
    _look_at(should_stop)
    for e in np.flatnonzero(ends[:, 0] == ends[:, 1]):
        v, entries = ends[e, 0], pairs[table[e] : table[e + 1]]
        cost[start[v] : start[v + 1]] += entries if single[e] else entries[:: sizes[v] + 1]
    other = ends[:, 0] != ends[:, 1]
    hard = np.zeros(len(ends), dtype=np.bool_)
    if len(ends):
        hard = np.logical_or.reduceat(pairs == np.inf, table[:-1])
    return RawProblem(
        start,
        cost,
        flat(problem.usages)[1],
        *list_ends(ends[other, 0], ends[other, 1], table[:-1][other], hard[other], sizes),
        pairs,
        rows.first.astype(np.int64),
        rows.last.astype(np.int64),
        rows.limit,
    )


def list_ends(
    first: Int64Array, second: Int64Array, table: Int64Array, hard: BoolArray, sizes: Int64Array
) -> tuple[Int64Array, Int64Array, Int64Array, Int64Array, Int64Array, BoolArray]:
    """From `end_start` to `end_hard`, for edges given once each, between nodes of so many strategies."""
    width, one = sizes[second], np.ones(len(first), dtype=np.int64)
    owner = np.concatenate([first, second])
    order = np.argsort(owner, kind="stable")
    counts = np.bincount(owner, minlength=len(sizes))
    return (
        np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        np.concatenate([second, first])[order],
        np.tile(table, 2)[order],
        np.concatenate([width, one])[order],
        np.concatenate([one, width])[order],
        np.tile(hard, 2)[order],
    )


def _look_at(should_stop: ShouldStop) -> None:
    if should_stop():
        raise OutOfTimeError
