"""Compiled passes of sequential message passing; `dual` says what they compute.

`theta` holds a number per strategy and `to` a message per edge end, `to[to_start[e]:]` from e into the
vertex that lists it. Vertices that are not `active` stand still: their edges are no part of a pass.
`rank` is the order in which a forward pass visits the vertices.
"""

import numpy as np

from graphpar.partition.jit import compiled
from graphpar.partition.sharding.flat import FlatGraph, Int64Array
from graphpar.partition.sharding.graph import FloatArray
from graphpar.partition.sharding.moves import add_range, max_range

_LATER, _EARLIER = np.bool_(True), np.bool_(False)
"""Directions; the compiler makes one function for both, where plain literals would make it two."""


def message_starts(flat: FlatGraph) -> Int64Array:
    """Where the message of each edge end begins, and the length of all together."""
    ends = np.repeat(np.arange(flat.num_vertices), np.diff(flat.edge_start))
    sizes = np.diff(flat.start)[ends]
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


@compiled
def collect(
    flat: FlatGraph,
    theta: FloatArray,
    to: FloatArray,
    to_start: Int64Array,
    rank: Int64Array,
    p: int,
    later: np.bool_,
) -> None:
    """Let p take the min-marginal of every edge to a later (or else earlier) active vertex."""
    begin, count = flat.start[p], flat.start[p + 1] - flat.start[p]
    for e in range(flat.edge_start[p], flat.edge_start[p + 1]):
        v = flat.edge_to[e]
        if rank[v] < 0 or (rank[v] > rank[p]) != later:
            continue
        width = flat.start[v + 1] - flat.start[v]
        mine, others = to_start[e], to_start[flat.edge_back[e]]
        for i in range(count):
            at = flat.edge_table[e] + i * width
            least = flat.pairs[at] - to[others]
            for j in range(1, width):
                least = min(least, flat.pairs[at + j] - to[others + j])
            theta[begin + i] += least - to[mine + i]
            to[mine + i] = least


@compiled
def spread(
    flat: FlatGraph,
    theta: FloatArray,
    to: FloatArray,
    to_start: Int64Array,
    rank: Int64Array,
    p: int,
    later: np.bool_,
) -> None:
    """Let p hand equal shares of its costs to its edges to later (or else earlier) active vertices."""
    begin, count = flat.start[p], flat.start[p + 1] - flat.start[p]
    num_later, num_earlier = 0, 0
    for e in range(flat.edge_start[p], flat.edge_start[p + 1]):
        v = flat.edge_to[e]
        if rank[v] > rank[p]:
            num_later += 1
        elif rank[v] >= 0:
            num_earlier += 1
    targets = num_later if later else num_earlier
    if targets == 0:
        return
    parts = max(num_later, num_earlier)
    for e in range(flat.edge_start[p], flat.edge_start[p + 1]):
        v = flat.edge_to[e]
        if rank[v] >= 0 and (rank[v] > rank[p]) == later:
            mine = to_start[e]
            for i in range(count):
                to[mine + i] -= theta[begin + i] / parts
    for i in range(count):
        theta[begin + i] -= theta[begin + i] / parts * targets


@compiled
def pass_forward(
    flat: FlatGraph,
    theta: FloatArray,
    to: FloatArray,
    to_start: Int64Array,
    rank: Int64Array,
    order: Int64Array,
) -> None:
    """Visit the vertices of `order`, first to last."""
    for p in order:
        collect(flat, theta, to, to_start, rank, p, _EARLIER)
        spread(flat, theta, to, to_start, rank, p, _LATER)


@compiled
def pass_back(
    flat: FlatGraph,
    theta: FloatArray,
    to: FloatArray,
    to_start: Int64Array,
    rank: Int64Array,
    order: Int64Array,
) -> None:
    """Visit the vertices of `order`, last to first."""
    for place in range(len(order) - 1, -1, -1):
        collect(flat, theta, to, to_start, rank, order[place], _LATER)
        spread(flat, theta, to, to_start, rank, order[place], _EARLIER)


@compiled
def pass_backward(
    flat: FlatGraph,
    theta: FloatArray,
    to: FloatArray,
    to_start: Int64Array,
    rank: Int64Array,
    order: Int64Array,
    x: Int64Array,
    excess: FloatArray,
) -> None:
    """Visit the vertices of `order`, last to first, and round them into `x`.

    If `excess` is not empty, it receives each vertex's min-marginals less their minimum.
    """
    for place in range(len(order) - 1, -1, -1):
        p = order[place]
        begin, end = flat.start[p], flat.start[p + 1]
        x[p] = favourite(flat, theta, to, to_start, rank, x, p)
        collect(flat, theta, to, to_start, rank, p, _LATER)
        if len(excess) > 0:
            least = theta[begin]
            for i in range(begin, end):
                least = min(least, theta[i])
            for i in range(begin, end):
                excess[i] = theta[i] - least
        spread(flat, theta, to, to_start, rank, p, _EARLIER)


@compiled
def view_rounded(
    flat: FlatGraph,
    theta: FloatArray,
    to: FloatArray,
    to_start: Int64Array,
    rank: Int64Array,
    x: Int64Array,
    p: int,
    view: FloatArray,
) -> None:
    """What each strategy of p costs given the later vertices' choices and the earlier ones' promises."""
    begin, count = flat.start[p], flat.start[p + 1] - flat.start[p]
    for i in range(count):
        view[i] = theta[begin + i]
    for e in range(flat.edge_start[p], flat.edge_start[p + 1]):
        v = flat.edge_to[e]
        if rank[v] > rank[p]:
            at, mine = flat.edge_table[flat.edge_back[e]] + x[v] * count, to_start[e]
            for i in range(count):
                view[i] += flat.pairs[at + i] - to[mine + i]


@compiled
def favourite(
    flat: FlatGraph,
    theta: FloatArray,
    to: FloatArray,
    to_start: Int64Array,
    rank: Int64Array,
    x: Int64Array,
    p: int,
) -> int:
    """The strategy of p that `view_rounded` finds cheapest."""
    view = np.empty(flat.start[p + 1] - flat.start[p])
    view_rounded(flat, theta, to, to_start, rank, x, p, view)
    best = 0
    for i in range(1, len(view)):
        if view[i] < view[best]:
            best = i
    return best


@compiled
def least_use(flat: FlatGraph, p: int, k: int) -> float:
    """The least memory that p can use in its segment number k."""
    count = flat.start[p + 1] - flat.start[p]
    width = flat.segment_start[p + 1] - flat.segment_start[p]
    at = flat.use_start[p] + k
    least: float = flat.use[at]
    for i in range(1, count):
        least = min(least, flat.use[at + i * width])
    return least


@compiled
def shrink(flat: FlatGraph, x: Int64Array, top: FloatArray, lazy: FloatArray, order: Int64Array) -> None:
    """Count the vertices of `order` at their least memory, instead of at what `x` says."""
    for p in order:
        begin, width = flat.segment_start[p], flat.segment_start[p + 1] - flat.segment_start[p]
        for k in range(width):
            amount = least_use(flat, p, k) - flat.use[flat.use_start[p] + x[p] * width + k]
            if amount != 0.0:
                add_range(top, lazy, flat.segment_first[begin + k], flat.segment_last[begin + k], amount)


@compiled
def pass_within_memory(
    flat: FlatGraph,
    theta: FloatArray,
    to: FloatArray,
    to_start: Int64Array,
    rank: Int64Array,
    order: Int64Array,
    x: Int64Array,
    top: FloatArray,
    lazy: FloatArray,
) -> None:
    """Visit last to first; a strategy that the memory left over cannot hold is not taken if another can.

    `top` and `lazy` count the vertices of `order` at their least memory before, at `x` after.
    """
    longest = 0
    for p in order:
        longest = max(longest, flat.start[p + 1] - flat.start[p])
    view, short = np.empty(longest), np.empty(longest)
    for place in range(len(order) - 1, -1, -1):
        p = order[place]
        count = flat.start[p + 1] - flat.start[p]
        begin, width = flat.segment_start[p], flat.segment_start[p + 1] - flat.segment_start[p]
        base = flat.use_start[p]
        view_rounded(flat, theta, to, to_start, rank, x, p, view)
        for i in range(count):
            short[i] = 0.0
        for k in range(width):
            free = least_use(flat, p, k)
            free -= max_range(top, lazy, flat.segment_first[begin + k], flat.segment_last[begin + k])
            for i in range(count):
                short[i] = max(short[i], flat.use[base + i * width + k] - free)
        best = 0
        for i in range(1, count):
            if short[i] < short[best] or (short[i] == short[best] and view[i] < view[best]):
                best = i
        x[p] = best
        for k in range(width):
            amount = flat.use[base + best * width + k] - least_use(flat, p, k)
            if amount != 0.0:
                add_range(top, lazy, flat.segment_first[begin + k], flat.segment_last[begin + k], amount)
        collect(flat, theta, to, to_start, rank, p, _LATER)
        spread(flat, theta, to, to_start, rank, p, _EARLIER)
