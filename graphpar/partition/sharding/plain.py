"""A first answer and bound from array operations alone, for runs that cannot wait for the compiler.

Vertices are given their strategies one after the other: the cheapest, seen from the neighbours chosen
before and from what the others promise at best, among those that still fit with everybody to come at
their least memory. The bound leaves memory out and lets every edge charge half to each of its ends.
"""

import numpy as np

from graphpar.partition.clock import ShouldStop, in_time, never
from graphpar.partition.sharding.graph import FloatArray, IntArray, ShardingGraph
from graphpar.partition.sharding.memory import MemoryMatrix


def plain_choice(
    graph: ShardingGraph, memory: MemoryMatrix, should_stop: ShouldStop = never
) -> IntArray | None:
    """A choice that fits, by position in `memory`, or None where this simple way finds none.

    Raises:
        OutOfTimeError: It was time to stop.
    """
    room = memory.limit - _least_usage(memory)
    chosen: dict[int, int] = {}
    result = np.zeros(len(memory.vertices), dtype=np.intp)
    for p, vertex in in_time(enumerate(memory.vertices), should_stop):
        view = _view(graph, chosen, vertex)
        profile = memory.profiles[p]
        if profile is None:
            best = int(view.argmin())
        else:
            boundaries, use = profile
            above = use - use.min(axis=0)
            free = np.minimum.reduceat(room[: boundaries[-1]], boundaries[:-1])
            view[(above > free).any(axis=1)] = np.inf
            best = int(view.argmin())
            for begin, end, amount in zip(boundaries[:-1], boundaries[1:], above[best], strict=True):
                room[begin:end] -= amount
        if not np.isfinite(view[best]):
            return None
        chosen[vertex] = result[p] = best
    return result


def plain_bound(graph: ShardingGraph, should_stop: ShouldStop = never) -> float:
    """A lower bound on every choice's cost.

    An edge costs `C(i, j) >= min_j C(i, j) / 2 + min_i C(i, j) / 2`, so the sum over the vertices of the
    least `c(i)` plus half of what each edge charges strategy i at best is no more than any choice costs.

    Raises:
        OutOfTimeError: It was time to stop.
    """
    bound = graph.constant
    for vertex, costs in in_time(graph.costs.items(), should_stop):
        charged = costs.copy()
        for table in graph.tables[vertex].values():
            charged += 0.5 * table.min(axis=1)
        bound += float(charged.min())
    return bound


def _view(graph: ShardingGraph, chosen: dict[int, int], vertex: int) -> FloatArray:
    """What each strategy costs with the neighbours chosen so far, and with the rest at their best."""
    view = graph.costs[vertex].copy()
    for other, table in graph.tables[vertex].items():
        if other in chosen:
            view += table[:, chosen[other]]
        else:
            view += (table + graph.costs[other]).min(axis=1)
    return view


def _least_usage(memory: MemoryMatrix) -> FloatArray:
    change = np.zeros(len(memory.limit) + 1)
    for profile in memory.profiles:
        if profile is not None:
            boundaries, use = profile
            change[boundaries] += np.diff(use.min(axis=0), prepend=0.0, append=0.0)
    usage: FloatArray = np.cumsum(change)[:-1]
    return usage
