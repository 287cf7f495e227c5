"""The better parts of two choices in one.

Where two choices differ, the vertices that differ fall into connected pieces. No edge joins two pieces,
so what one choice saves in a piece does not depend on the others, and each piece may be taken over alone,
as far as memory allows (partition crossover: Whitley, Hains and Howe, 2009). A walk that got better here
and worse there, or in another thread, is not lost because its total is no better.
"""

import numpy as np

from graphpar.partition.jit import compiled
from graphpar.partition.sharding.flat import FlatGraph, Int64Array
from graphpar.partition.sharding.graph import FloatArray
from graphpar.partition.sharding.moves import change_strategy, filled

_MOST_ROUNDS = 4
"""Times the pieces that did not fit are tried again, once others made room."""


@compiled
def find_pieces(
    flat: FlatGraph, x: Int64Array, other: Int64Array, member: Int64Array, first: Int64Array
) -> int:
    """The vertices that differ, piece after piece, in `member`; piece k begins at `first[k]`."""
    num_vertices = len(x)
    seen = filled(num_vertices, 0)
    count = size = 0
    for root in range(num_vertices):
        if x[root] == other[root] or seen[root]:
            continue
        first[count] = size
        count += 1
        seen[root] = 1
        member[size] = root
        done, size = size, size + 1
        while done < size:
            p = member[done]
            done += 1
            for e in range(flat.edge_start[p], flat.edge_start[p + 1]):
                v = flat.edge_to[e]
                if x[v] != other[v] and not seen[v]:
                    seen[v] = 1
                    member[size] = v
                    size += 1
    first[count] = size
    return count


@compiled
def saved_by(flat: FlatGraph, x: Int64Array, other: Int64Array, piece: Int64Array) -> float:
    """What `x` costs more than with a piece as in `other`."""
    saved = 0.0
    for p in piece:
        begin = flat.start[p]
        saved += flat.cost[begin + x[p]] - flat.cost[begin + other[p]]
        for e in range(flat.edge_start[p], flat.edge_start[p + 1]):
            v = flat.edge_to[e]
            width = flat.start[v + 1] - flat.start[v]
            at = flat.edge_table[e]
            # An edge inside the piece is seen from both ends; outside both choices are the same.
            if x[v] == other[v] or p < v:
                saved += flat.pairs[at + x[p] * width + x[v]]
                saved -= flat.pairs[at + other[p] * width + other[v]]
    return saved


@compiled
def sort_by_savings(order: Int64Array, savings: FloatArray) -> None:
    """Sort numbers of pieces by what they save, most first (Shell, 1959, with Ciura's gaps)."""
    for gap in (701, 301, 132, 57, 23, 10, 4, 1):
        for i in range(gap, len(order)):
            value, j = order[i], i
            while j >= gap and savings[order[j - gap]] < savings[value]:
                order[j] = order[j - gap]
                j -= gap
            order[j] = value


@compiled
def fuse(flat: FlatGraph, x: Int64Array, other: Int64Array, top: FloatArray, lazy: FloatArray) -> bool:
    """Take over the pieces of `other` that make `x` cheaper and fit; returns whether any did.

    `top` and `lazy` hold the memory of `x`, which fits.
    """
    num_vertices = len(x)
    member, first = filled(num_vertices, 0), filled(num_vertices + 1, 0)
    count = find_pieces(flat, x, other, member, first)
    savings, order = np.empty(count), filled(count, 0)
    for k in range(count):
        savings[k] = saved_by(flat, x, other, member[first[k] : first[k + 1]])
        order[k] = k
    sort_by_savings(order, savings)
    old = x.copy()
    fused = False
    for _ in range(_MOST_ROUNDS):
        taken = False
        for k in order:
            if savings[k] <= 0.0:
                break
            piece = member[first[k] : first[k + 1]]
            if x[piece[0]] == other[piece[0]]:
                continue
            for p in piece:
                change_strategy(flat, x, top, lazy, p, other[p])
            if top[1] > 0.0:
                for p in piece:
                    change_strategy(flat, x, top, lazy, p, old[p])
            else:
                taken = True
        fused |= taken
        if not taken:
            break
    return fused
