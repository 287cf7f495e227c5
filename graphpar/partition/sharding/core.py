"""What reductions leave of a problem without memory limits, solved exactly where it is small.

Vertices are minimised out one after the other, each into a table over all its neighbours: of any degree,
where `reduce.eliminate_small` stops at two. Blocks of a model leave a handful of vertices.
"""

from functools import reduce

import numpy as np

from graphpar.partition.sharding.graph import FloatArray, IntArray, ShardingGraph

MOST_VERTICES, LARGEST_TABLE = 50, 1_000_000
"""Up to so many vertices, with tables of so many entries, it takes less time than a search."""

_Scope = tuple[int, ...]
_Factor = tuple[_Scope, FloatArray]


def core_choice(graph: ShardingGraph) -> dict[int, int] | None:
    """The best strategy of every remaining vertex; None where that would take long, or there is none.

    >>> costs = {v: np.zeros(2) for v in range(4)}
    >>> graph = ShardingGraph(costs, {v: {} for v in costs}, {v: [(v, np.arange(2))] for v in costs})
    >>> for u, v in [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]:
    ...     graph.add_table(u, v, np.array([[3.0, 1.0], [1.0, 2.0]]))
    >>> choice = core_choice(graph)
    >>> graph.value(choice)
    9.0
    """
    if len(graph.costs) > MOST_VERTICES:
        return None
    factors: list[_Factor] = [((v,), costs) for v, costs in graph.costs.items()]
    factors += [((u, v), t) for u, row in graph.tables.items() for v, t in row.items() if u < v]
    left, steps = set(graph.costs), list[tuple[int, _Scope, IntArray]]()
    while left:
        scopes = {v: _around(v, factors) for v in left}
        vertex = min(left, key=lambda v: (_size(graph, scopes[v]), v))
        scope = (vertex, *scopes[vertex])
        if _size(graph, scope) > LARGEST_TABLE:
            return None
        own = [_spread(factor, scope) for factor in factors if vertex in factor[0]]
        total = reduce(np.add, own)
        steps.append((vertex, scope[1:], total.argmin(axis=0)))
        factors = [factor for factor in factors if vertex not in factor[0]]
        factors.append((scope[1:], total.min(axis=0)))
        left.remove(vertex)
    choice: dict[int, int] = {}
    for vertex, around, best in reversed(steps):
        choice[vertex] = int(best[tuple(choice[v] for v in around)])
    return choice if graph.value(choice) < np.inf else None


def _around(vertex: int, factors: list[_Factor]) -> _Scope:
    """The vertices that some table joins to a vertex."""
    return tuple(sorted({v for scope, _ in factors if vertex in scope for v in scope} - {vertex}))


def _size(graph: ShardingGraph, scope: _Scope) -> int:
    size = 1
    for vertex in scope:
        size *= len(graph.costs[vertex])
    return size


def _spread(factor: _Factor, scope: _Scope) -> FloatArray:
    """A factor's table with one axis for each vertex of a larger scope."""
    own, table = factor
    order = sorted(range(len(own)), key=lambda k: scope.index(own[k]))
    shape = [table.shape[own.index(v)] if v in own else 1 for v in scope]
    return table.transpose(order).reshape(shape)
