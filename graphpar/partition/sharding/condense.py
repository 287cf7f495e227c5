"""Determined neighbours contracted on the file's numbers, before there is a graph.

What `reduce` says of determined neighbours, separable edges and unsupported strategies, done for all
nodes at once by compiled loops: a node whose strategy a neighbour determines hangs below it, every tree
becomes one vertex, and all edges between two vertices one table. The same again until nothing hangs below
anything. Of a graph network's nodes a fifth is left, and the reductions of the graph begin with these.
"""

from itertools import pairwise
from typing import NamedTuple

import numpy as np

from graphpar.partition.clock import OutOfTimeError, ShouldStop, in_time, never
from graphpar.partition.sharding.condense_loops import (
    ROOT,
    add_costs,
    add_tables,
    fill_numbers,
    find_links,
    settle_tables,
    spread_unsupported,
)
from graphpar.partition.sharding.flat import Int64Array
from graphpar.partition.sharding.graph import BoolArray, ShardingGraph
from graphpar.partition.sharding.memory import ranges
from graphpar.partition.sharding.raw import RawProblem, list_ends
from graphpar.partition.sharding.trim import Trimmed, find_unsettled


class Merged(NamedTuple):
    """Which vertex each node is part of, and what the vertex's strategies stand for.

    Attributes:
        vertex: Of each node.
        begin: Where each node's numbers begin in `number`.
        number: For each strategy of the node's vertex the node's own.
    """

    vertex: Int64Array
    begin: Int64Array
    number: Int64Array


def condense(
    raw: RawProblem, trimmed: Trimmed, should_stop: ShouldStop = never
) -> tuple[ShardingGraph, set[int]]:
    """The graph of what is alive, and the vertices that its reductions may change at once.

    Raises:
        OutOfTimeError: It was time to stop.
    """
    whole, alive = raw, trimmed.alive
    counts = np.diff(raw.start)
    merged = Merged(np.arange(raw.num_nodes), raw.start[:-1], ranges(np.zeros_like(counts), counts))
    names, changed, matters = np.arange(raw.num_nodes), trimmed.unsettled, trimmed.matters
    while np.logical_or.reduceat(alive, raw.start[:-1]).all():
        _look_at(should_stop)
        below, link = find_links(raw, alive)
        is_root = below == ROOT
        if is_root.all() and alive.all() and raw is not whole:
            find_unsettled(raw, alive, matters, changed)
            graph = _graph_of(raw, merged, names, should_stop)
            return graph, set(names[changed].tolist())
        step = _step(raw, alive, below, link)
        raw = _contracted(raw, step)
        alive = np.isfinite(raw.cost)
        changed = _any(step, changed) | (np.bincount(step.vertex) > 1)
        matters = _any(step, matters)
        spread_unsupported(raw, alive, changed)
        names, merged = names[is_root], _composed(merged, step, np.diff(raw.start))
    return ShardingGraph({}, {}, {}, infeasible=True), set()


def _look_at(should_stop: ShouldStop) -> None:
    if should_stop():
        raise OutOfTimeError


def _step(raw: RawProblem, alive: BoolArray, below: Int64Array, link: Int64Array) -> Merged:
    """What becomes of each node of a problem if it hangs, by a link, below another one."""
    top = np.where(below == ROOT, np.arange(raw.num_nodes), below)
    while not np.array_equal(top, higher := top[top]):
        top = higher
    counts = np.add.reduceat(alive, raw.start[:-1], dtype=np.int64)[top]
    begin = np.cumsum(counts) - counts
    number = np.zeros(int(counts.sum()), np.int64)
    fill_numbers(raw, alive, below, link, begin, number)
    return Merged((np.cumsum(below == ROOT) - 1)[top], begin, number)


def _any(step: Merged, of_node: BoolArray) -> BoolArray:
    """For each vertex whether that holds of any of its nodes."""
    return np.bincount(step.vertex, of_node) > 0


def _composed(merged: Merged, step: Merged, counts: Int64Array) -> Merged:
    """The same nodes in the vertices that a step makes of their vertices."""
    vertex = step.vertex[merged.vertex]
    sizes = counts[vertex]
    between = step.number[ranges(step.begin[merged.vertex], sizes)]
    number = merged.number[np.repeat(merged.begin, sizes) + between]
    return Merged(vertex, np.cumsum(sizes) - sizes, number)


def _contracted(raw: RawProblem, step: Merged) -> RawProblem:
    """A problem whose nodes are the vertices of a step; of memory it knows nothing."""
    num_vertices = int(step.vertex.max()) + 1
    sizes = np.zeros(num_vertices, np.int64)
    sizes[step.vertex] = np.diff(step.begin, append=len(step.number))
    start = np.concatenate([[0], np.cumsum(sizes)])
    cost = np.zeros(int(start[-1]))
    add_costs(raw, step.vertex, step.begin, step.number, start, cost)
    owner = np.repeat(np.arange(raw.num_nodes), np.diff(raw.end_start))
    ends = np.flatnonzero((owner < raw.end_to) & (step.vertex[owner] != step.vertex[raw.end_to]))
    near, far = step.vertex[owner[ends]], step.vertex[raw.end_to[ends]]
    key, place = np.unique(
        np.minimum(near, far) * num_vertices + np.maximum(near, far), return_inverse=True
    )
    first, second = key // num_vertices, key % num_vertices
    entries = sizes[first] * sizes[second]
    table, pairs = np.cumsum(entries) - entries, np.zeros(int(entries.sum()))
    add_tables(raw, step.vertex, step.begin, step.number, owner, ends, table[place], start, pairs)
    kept, hard = np.zeros(len(key), np.bool_), np.zeros(len(key), np.bool_)
    settle_tables(first, second, table, start, pairs, cost, kept, hard)
    none = np.zeros(num_vertices, np.int64)
    return RawProblem(
        start,
        cost,
        np.zeros(len(cost)),
        *list_ends(first[kept], second[kept], table[kept], hard[kept], sizes),
        pairs,
        none,
        none,
        np.zeros(0),
    )


def _graph_of(
    raw: RawProblem, merged: Merged, names: Int64Array, should_stop: ShouldStop
) -> ShardingGraph:
    """The graph of a problem whose nodes are vertices, each called by the name of one of its nodes."""
    own = names.tolist()
    costs = {u: raw.cost[i:j] for u, (i, j) in zip(own, pairwise(raw.start.tolist()), strict=True)}
    graph = ShardingGraph(costs, {u: {} for u in own}, {u: [] for u in own})
    spans = pairwise([*merged.begin.tolist(), len(merged.number)])
    members = zip(names[merged.vertex].tolist(), spans, strict=True)
    for node, (u, (i, j)) in enumerate(in_time(members, should_stop)):
        graph.members[u].append((node, merged.number[i:j]))
    owner = np.repeat(np.arange(raw.num_nodes), np.diff(raw.end_start))
    once = owner < raw.end_to
    ends = zip(
        names[owner[once]].tolist(),
        names[raw.end_to[once]].tolist(),
        raw.end_table[once].tolist(),
        strict=True,
    )
    for u, v, at in in_time(ends, should_stop):
        shape = len(costs[u]), len(costs[v])
        graph.add_table(u, v, raw.pairs[at : at + shape[0] * shape[1]].reshape(shape))
    return graph
