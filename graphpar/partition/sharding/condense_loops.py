"""Compiled loops of `condense`: who determines whom, and what follows for costs and tables."""

import numpy as np

from graphpar.partition.jit import compiled_exactly
from graphpar.partition.sharding.flat import Int64Array
from graphpar.partition.sharding.graph import BoolArray, FloatArray
from graphpar.partition.sharding.moves import filled
from graphpar.partition.sharding.raw import RawProblem
from graphpar.partition.sharding.trim import drop_unsupported_of, list_alive, mark_around

ROOT = -1
"""What a node hangs below that hangs below nothing."""


@compiled_exactly
def find_links(raw: RawProblem, alive: BoolArray) -> tuple[Int64Array, Int64Array]:
    """For each node what it hangs below, a neighbour that determines it, and the edge end that says so.

    Of two nodes that determine each other the one with fewer edges hangs below the other: these edges
    are what is rewritten.
    """
    num_nodes = len(raw.start) - 1
    below, link = filled(num_nodes, ROOT), filled(num_nodes, ROOT)
    top = np.arange(num_nodes)
    for anyhow in (False, True):
        for v in range(num_nodes):
            own = raw.end_start[v + 1] - raw.end_start[v]
            for e in range(raw.end_start[v], raw.end_start[v + 1]):
                u = raw.end_to[e]
                theirs = raw.end_start[u + 1] - raw.end_start[u]
                if below[v] != ROOT or not raw.end_hard[e] or (own > theirs and not anyhow):
                    continue
                if climb(top, u) != v and is_determined(raw, alive, v, e):
                    below[v], link[v], top[v] = u, e, u
    return below, link


@compiled_exactly
def climb(top: Int64Array, v: int) -> int:
    """What v hangs below at last; halves the way for those who come later."""
    while top[v] != v:
        top[v] = top[top[v]]
        v = top[v]
    return v


@compiled_exactly
def is_determined(raw: RawProblem, alive: BoolArray, v: int, e: int) -> bool:
    """Whether each strategy of the node at the other end of `e` leaves v one possible one."""
    u = raw.end_to[e]
    for j in range(raw.start[u], raw.start[u + 1]):
        if not alive[j]:
            continue
        at, possible = raw.end_table[e] + (j - raw.start[u]) * raw.end_other[e], 0
        for i in range(raw.start[v], raw.start[v + 1]):
            if alive[i] and raw.pairs[at + (i - raw.start[v]) * raw.end_step[e]] < np.inf:
                possible += 1
                if possible > 1:
                    return False
        if possible != 1:
            return False
    return True


@compiled_exactly
def fill_numbers(
    raw: RawProblem,
    alive: BoolArray,
    below: Int64Array,
    link: Int64Array,
    begin: Int64Array,
    number: Int64Array,
) -> None:
    """For each node, and each strategy that is alive of what it hangs below at last, the node's own."""
    num_nodes = len(below)
    path, is_filled = filled(num_nodes, 0), np.zeros(num_nodes, np.bool_)
    for last in range(num_nodes):
        depth, v = 0, last
        while v != ROOT and not is_filled[v]:
            path[depth] = v
            depth += 1
            v = below[v]
        for place in range(depth - 1, -1, -1):
            v = path[place]
            is_filled[v] = True
            if below[v] == ROOT:
                list_alive(raw, alive, v, number[begin[v] :])
            else:
                follow(raw, alive, v, link[v], begin, number)


@compiled_exactly
def follow(
    raw: RawProblem, alive: BoolArray, v: int, e: int, begin: Int64Array, number: Int64Array
) -> None:
    """Fill in what v takes, whom the node at the other end of `e` determines."""
    u = raw.end_to[e]
    count = (begin[v + 1] if v + 1 < len(begin) else len(number)) - begin[v]
    for k in range(count):
        at = raw.end_table[e] + number[begin[u] + k] * raw.end_other[e]
        for i in range(raw.start[v + 1] - raw.start[v]):
            if alive[raw.start[v] + i] and raw.pairs[at + i * raw.end_step[e]] < np.inf:
                number[begin[v] + k] = i
                break


@compiled_exactly
def add_costs(
    raw: RawProblem,
    vertex: Int64Array,
    begin: Int64Array,
    number: Int64Array,
    start: Int64Array,
    cost: FloatArray,
) -> None:
    """Add up the costs of each vertex's nodes and of the edges among them."""
    for v in range(len(vertex)):
        own = start[vertex[v]]
        count = start[vertex[v] + 1] - own
        for k in range(count):
            cost[own + k] += raw.cost[raw.start[v] + number[begin[v] + k]]
        for e in range(raw.end_start[v], raw.end_start[v + 1]):
            u = raw.end_to[e]
            if u < v or vertex[u] != vertex[v]:
                continue
            for k in range(count):
                i, j = number[begin[v] + k], number[begin[u] + k]
                cost[own + k] += raw.pairs[raw.end_table[e] + i * raw.end_step[e] + j * raw.end_other[e]]


@compiled_exactly
def add_tables(
    raw: RawProblem,
    vertex: Int64Array,
    begin: Int64Array,
    number: Int64Array,
    owner: Int64Array,
    ends: Int64Array,
    table: Int64Array,
    start: Int64Array,
    pairs: FloatArray,
) -> None:
    """Add the edges listed at these ends to the tables of their vertices; the smaller one's are rows."""
    for k in range(len(ends)):
        e = ends[k]
        v, u = owner[e], raw.end_to[e]
        step, other = raw.end_step[e], raw.end_other[e]
        if vertex[u] < vertex[v]:
            v, u, step, other = u, v, other, step
        width = start[vertex[u] + 1] - start[vertex[u]]
        for a in range(start[vertex[v] + 1] - start[vertex[v]]):
            at = raw.end_table[e] + number[begin[v] + a] * step
            for b in range(width):
                pairs[table[k] + a * width + b] += raw.pairs[at + number[begin[u] + b] * other]


@compiled_exactly
def settle_tables(
    first: Int64Array,
    second: Int64Array,
    table: Int64Array,
    start: Int64Array,
    pairs: FloatArray,
    cost: FloatArray,
    kept: BoolArray,
    hard: BoolArray,
) -> None:
    """Move separable tables into the costs, and say of each whether it stays and forbids some pair."""
    for t in range(len(table)):
        rows, columns = start[first[t]], start[second[t]]
        count, width = start[first[t] + 1] - rows, start[second[t] + 1] - columns
        at = table[t]
        corner = pairs[at]
        for a in range(count):
            head = pairs[at + a * width]
            for b in range(width):
                here, top = pairs[at + a * width + b], pairs[at + b]
                hard[t] |= here == np.inf
                kept[t] |= here != head + (top - corner)
        kept[t] |= hard[t]
        if kept[t]:
            continue
        for a in range(count):
            cost[rows + a] += pairs[at + a * width]
        for b in range(width):
            cost[columns + b] += pairs[at + b] - corner


@compiled_exactly
def spread_unsupported(raw: RawProblem, alive: BoolArray, changed: BoolArray) -> None:
    """Drop strategies without a possible partner, all the way; marks what changed and its neighbours."""
    num_nodes = len(raw.start) - 1
    waiting = np.ones(num_nodes, np.bool_)
    is_done = False
    while not is_done:
        is_done = True
        for v in range(num_nodes):
            if not waiting[v]:
                continue
            waiting[v] = False
            before = count_alive(raw, alive, v)
            drop_unsupported_of(raw, alive, v)
            if count_alive(raw, alive, v) < before:
                mark_around(raw, changed, v)
                mark_around(raw, waiting, v)
                is_done = False


@compiled_exactly
def count_alive(raw: RawProblem, alive: BoolArray, v: int) -> int:
    """How many strategies a node still has."""
    count = 0
    for i in range(raw.start[v], raw.start[v + 1]):
        count += alive[i]
    return count
