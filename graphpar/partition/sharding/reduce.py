"""Exact reductions of a sharding problem; none of them can lose the optimum.

Each is a rewriting of `min sum_u c_u(x_u) + sum_uv C_uv(x_u, x_v)` subject to the memory rows, and is
applied wherever something changed until nothing changes any more:

* `drop_unsupported`: a strategy all of whose partners across one edge are impossible is dropped.
* `split_separable`: `C(i, j) = a(i) + b(j)` moves into the node costs and the edge goes.
* `contract_determined`: if each strategy of u leaves v exactly one possible partner f(i), v becomes a
  member of u; its costs and edges are looked up through f.
* `drop_oversized`: a strategy that would not fit with everybody else at their smallest is dropped.
* `drop_dominated`: strategy a goes if some b uses no more memory at any moment and
  `c(b) - c(a) + sum over edges of max_j (C(b, j) - C(a, j)) <= 0`: replacing a by b in any answer
  gives one no worse, whatever the neighbours do (Goldstein's dead-end elimination).
* `eliminate_small`: a vertex with at most two neighbours whose memory does not depend on its choice is
  minimised out; the minimum over its strategies becomes a cost of its neighbours.
"""

import math
from collections.abc import Iterable, Iterator

import numpy as np

from graphpar.partition.clock import ShouldStop, in_time, never
from graphpar.partition.problems import ShardingProblem
from graphpar.partition.sharding.graph import BoolArray, IntArray, MemoryRows, ShardingGraph
from graphpar.partition.sharding.memory import (
    RangeMinima,
    is_flat,
    memory_rows,
    profile_of,
    tighten,
    vertex_profile,
)
from graphpar.partition.sharding.reduce_loops import (
    COLUMNS_DETERMINE,
    ROWS_DETERMINE,
    add_largest_increase,
    any_impossible,
    determined,
    forbid_more_memory,
    is_separable,
    least_sums,
    replaceable,
)

_LARGEST_NEW_TABLE = 200_000
"""Entries above which eliminating a vertex of degree two would cost more than it saves."""


_LOOK_SHARE = 0.2
"""Share of the vertices that must have changed before memory is looked at again."""

_LEAST_SHARE = 0.02
"""The same once nothing else is left to do."""


def reduce_problem(
    problem: ShardingProblem,
    should_stop: ShouldStop = never,
    out_of_time: ShouldStop = never,
    begun: tuple[ShardingGraph, set[int]] | None = None,
) -> tuple[ShardingGraph, MemoryRows]:
    """The reduced graph and the memory rows that can still bind; stops early when told to.

    Where `condense` has been through the problem, its graph and its hints where to begin are taken over.

    Raises:
        OutOfTimeError: `out_of_time` was true before there was a graph.
    """
    graph, unsettled = begun or (ShardingGraph.of(problem, out_of_time), None)
    return graph, reduce_graph(graph, memory_rows(problem), should_stop, out_of_time, unsettled)


def reduce_graph(
    graph: ShardingGraph,
    rows: MemoryRows,
    should_stop: ShouldStop = never,
    out_of_time: ShouldStop = never,
    unsettled: set[int] | None = None,
) -> MemoryRows:
    """Shrink a graph in place until nothing much changes; returns the rows that can still bind.

    Where some vertices are `unsettled`, nothing can be done at first anywhere else, and every strategy
    has a possible partner.

    Raises:
        OutOfTimeError: `out_of_time` was true, and the graph is of no use. After `should_stop` it is.
    """
    if graph.infeasible:
        return rows
    rows = tighten(rows, graph, out_of_time)
    is_first, num_changed = unsettled is None, 0
    is_supported, is_stale, least_changed = not is_first, False, 1.0
    dirty = set(graph.costs) if unsettled is None else unsettled
    while dirty and graph.is_possible() and not should_stop():
        dirty = _sweep(graph, rows, dirty, is_supported, should_stop, out_of_time)
        is_supported = False
        num_changed += len(dirty)
        is_stale = True
        if not graph.is_possible() or not (
            is_first or not dirty or num_changed > _LOOK_SHARE * len(graph.costs)
        ):
            continue
        # These look at every vertex, so not after every sweep: a change can run along a chain for long.
        is_last = not dirty
        if is_last and num_changed < least_changed:
            break
        rows, num_changed, is_stale = tighten(rows, graph, out_of_time), 0, False
        if (is_first or is_last) and not should_stop():
            dropped = drop_oversized(graph, rows, out_of_time)
            is_stale = bool(dropped)
            dirty |= dropped & graph.costs.keys()
            num_changed, least_changed = len(dirty), _LEAST_SHARE * len(graph.costs)
        is_first = False
    if dirty and graph.is_possible():
        # Cut short: message passing still relies on every strategy having a possible partner.
        drop_unsupported(graph, set(graph.costs), out_of_time)
        is_stale = True
    if is_stale and graph.is_possible():
        # What has no choice left uses what it uses: nobody but the limits knows of it any more.
        rows = tighten(rows, graph, out_of_time)
    if graph.is_possible() and np.any(rows.limit < 0):
        graph.infeasible = True
    return rows


def _until(should_stop: ShouldStop, vertices: Iterable[int]) -> Iterator[int]:
    """The vertices, as long as there is time: every reduction may end after any vertex."""
    for vertex in vertices:
        if should_stop():
            return
        yield vertex


def _sweep(
    graph: ShardingGraph,
    rows: MemoryRows,
    dirty: set[int],
    is_supported: bool,
    should_stop: ShouldStop,
    out_of_time: ShouldStop,
) -> set[int]:
    """Apply every reduction once at the dirty vertices; returns the vertices that changed.

    Where all is supported nothing is looked for that is not.
    """
    changed: set[int] = set()
    if not is_supported:
        changed |= drop_unsupported(graph, dirty, out_of_time)
    if not graph.is_possible():
        return set()
    for reduction in (split_separable, contract_determined):
        changed |= reduction(graph, _until(should_stop, (dirty | changed) & graph.costs.keys()))
    # Where no memory is short nearly every vertex can be minimised out, which takes less time than to
    # compare its strategies with each other.
    order = (drop_dominated, eliminate_small) if rows.num_rows else (eliminate_small, drop_dominated)
    for with_memory in order:
        around = (dirty | changed) & graph.costs.keys()
        changed |= with_memory(graph, rows, _until(should_stop, around))
    return changed & graph.costs.keys()


def _popped(waiting: set[int]) -> Iterator[int]:
    """Members taken out until none is left; more may be put in meanwhile."""
    while waiting:
        yield waiting.pop()


def drop_unsupported(graph: ShardingGraph, dirty: set[int], out_of_time: ShouldStop = never) -> set[int]:
    """Arc consistency: drop strategies that no partner supports; returns the vertices cut."""
    waiting, touched = set(dirty), set()
    for vertex in in_time(_popped(waiting), out_of_time):
        for other, table in list(graph.tables[vertex].items()):
            if not any_impossible(table):
                continue
            possible = np.isfinite(table)
            for end, axis in ((vertex, 1), (other, 0)):
                supported = possible.any(axis=axis)
                if not supported.all():
                    graph.keep(end, np.flatnonzero(supported))
                    touched.add(end)
                    waiting |= {end, *graph.tables[end]}
                    if not graph.is_possible():
                        return touched
                    break
            else:
                continue
            waiting.add(vertex)
            break
    return touched


def split_separable(graph: ShardingGraph, dirty: Iterable[int]) -> set[int]:
    """Move tables of the form row term plus column term into the node costs."""
    touched = set()
    for vertex in dirty:
        for other, table in list(graph.tables[vertex].items()):
            if is_separable(table):
                rows, columns = table[:, 0], table[0] - table[0, 0]
                graph.costs[vertex] = graph.costs[vertex] + rows
                graph.costs[other] = graph.costs[other] + columns
                graph.remove_table(vertex, other)
                touched |= {vertex, other}
    return touched


def contract_determined(graph: ShardingGraph, dirty: Iterable[int]) -> set[int]:
    """Let a vertex swallow a neighbour whose strategy it determines."""
    touched: set[int] = set()
    waiting = [(u, v) for u in dirty for v in graph.tables[u]]
    while waiting:
        u, v = waiting.pop()
        if v not in graph.tables.get(u, ()):
            continue
        found = _determined(graph, u, v)
        if found is None:
            continue
        winner, loser, partner = found
        moved = graph.swallow(winner, loser, partner)
        waiting.extend((winner, other) for other in moved)
        touched |= {winner, *moved}
    return touched & graph.costs.keys()


def _determined(graph: ShardingGraph, u: int, v: int) -> tuple[int, int, IntArray] | None:
    """`(winner, loser, the loser's strategy for each of the winner's)`, if there is one."""
    answer = determined(graph.tables[u][v])
    if not answer:
        return None
    possible = np.isfinite(graph.tables[u][v])
    options: list[tuple[int, int, IntArray]] = []
    if answer & ROWS_DETERMINE:
        options.append((u, v, possible.argmax(axis=1)))
    if answer & COLUMNS_DETERMINE:
        options.append((v, u, possible.argmax(axis=0)))
    # Moving the loser's edges is the work, so the vertex with fewer of them loses.
    return min(options, key=lambda option: len(graph.tables[option[1]]), default=None)


def drop_oversized(graph: ShardingGraph, rows: MemoryRows, out_of_time: ShouldStop = never) -> set[int]:
    """Drop strategies that do not fit even if everybody else uses the least memory possible.

    The rows are those that `tighten` makes of this graph, so that no node's least use is above zero.
    """
    touched: set[int] = set()
    if not rows.num_rows:
        return touched
    alone, profiles = {}, {}
    change = np.zeros(rows.num_rows + 1)
    for vertex, members in in_time(graph.members.items(), out_of_time):
        holding = [member for member in members if rows.matters[member[0]]]
        if len(holding) == 1:
            alone[vertex] = holding[0]
        elif holding:
            profiles[vertex] = boundaries, use = profile_of(holding, rows)
            change[boundaries] += np.diff(use.min(axis=0), prepend=0.0, append=0.0)
    smallest = RangeMinima(rows.limit - np.cumsum(change)[:-1])
    for vertex in _larger_than(smallest, alone, rows):
        profiles[vertex] = profile_of([alone[vertex]], rows)
    for vertex, (boundaries, use) in profiles.items():
        room = smallest.of(boundaries[:-1], boundaries[1:])
        fits = (use - use.min(axis=0) <= room).all(axis=1)
        if not fits.all():
            graph.keep(vertex, np.flatnonzero(fits))
            touched |= {vertex, *graph.tables[vertex]}
            if not graph.is_possible():
                break
    return touched


def _larger_than(
    room: RangeMinima, alone: dict[int, tuple[int, IntArray]], rows: MemoryRows
) -> list[int]:
    """The vertices, each with the one node that holds memory, of which something passes the room."""
    if not alone:
        return []
    nodes = np.fromiter((node for node, _ in alone.values()), np.intp, len(alone))
    most = np.maximum.reduceat(*rows.use_of(list(alone.values())))
    larger = most > room.of(rows.first[nodes], rows.last[nodes])
    return [vertex for vertex, is_larger in zip(alone, larger.tolist(), strict=True) if is_larger]


def drop_dominated(graph: ShardingGraph, rows: MemoryRows, dirty: Iterable[int]) -> set[int]:
    """Drop strategies that another strategy of the same vertex can always replace."""
    touched: set[int] = set()
    for vertex in dirty:
        if len(graph.costs[vertex]) < 2:
            continue
        dominated = _dominated(graph, rows, vertex)
        if dominated.any():
            graph.keep(vertex, np.flatnonzero(~dominated))
            touched |= {vertex, *graph.tables[vertex]}
    return touched


def _dominated(graph: ShardingGraph, rows: MemoryRows, vertex: int) -> BoolArray:
    costs = graph.costs[vertex]
    # worse[a, b]: the most that b in place of a can add to the objective
    worse = costs[None, :] - costs[:, None]
    profile = vertex_profile(graph.members[vertex], rows)
    if profile is not None:
        forbid_more_memory(worse, profile[1])
    np.fill_diagonal(worse, np.inf)
    for table in graph.tables[vertex].values():
        if worse.min() == np.inf:
            break
        add_largest_increase(worse, np.ascontiguousarray(table))
    return replaceable(worse)


def eliminate_small(graph: ShardingGraph, rows: MemoryRows, dirty: Iterable[int]) -> set[int]:
    """Minimise out vertices of degree zero, one and two whose choice does not touch memory."""
    touched: set[int] = set()
    waiting = set(dirty)
    while waiting:
        vertex = waiting.pop()
        if vertex not in graph.costs or len(graph.tables[vertex]) > 2:
            continue
        if not is_flat(vertex_profile(graph.members[vertex], rows)):
            continue
        around = tuple(graph.tables[vertex])
        if len(around) == 2:
            size = len(graph.costs[around[0]]) * len(graph.costs[around[1]])
            if size > _LARGEST_NEW_TABLE:
                continue
        eliminate(graph, vertex)
        touched |= set(around)
        waiting |= set(around)
    return touched & graph.costs.keys()


def eliminate(graph: ShardingGraph, vertex: int) -> None:
    """Minimise out a vertex of degree at most two."""
    around = tuple(graph.tables[vertex])
    costs = graph.costs[vertex]
    if not around:
        best = np.array(costs.argmin())
        graph.constant += float(costs.min())
        graph.infeasible |= math.isinf(graph.constant)
        graph.eliminate(vertex, (), best)
        return
    first = graph.tables[around[0]][vertex] + costs[None, :]
    if len(around) == 1:
        best = first.argmin(axis=1)
        gain = first.min(axis=1)
        graph.eliminate(vertex, around, best)
        graph.costs[around[0]] = graph.costs[around[0]] + gain
        return
    gain, best = least_sums(first, graph.tables[around[1]][vertex])
    graph.eliminate(vertex, around, best)
    graph.add_table(around[0], around[1], gain)
