"""Compiled moves of the sharding search: trees of vertices re-chosen together, under a memory penalty.

One move picks a random induced tree of the graph (a single vertex, most often), freezes everybody else
and lets dynamic programming choose the tree's strategies under

    cost + weight * (largest excess of memory over its limit) + temperature * Gumbel noise.

For a single vertex that is exactly a draw from the Boltzmann distribution (the Gumbel-max trick); for a
larger tree it is a perturb-and-minimise draw (Papandreou and Yuille, 2011) that a Metropolis test accepts
or takes back. Memory is a segment tree over the rows: adding to a range of rows and asking for the
largest excess in a range take logarithmic time.
"""

import numpy as np
import numpy.typing as npt

from graphpar.partition.jit import compiled
from graphpar.partition.sharding.flat import FlatGraph, Int64Array
from graphpar.partition.sharding.graph import FloatArray

UInt64Array = npt.NDArray[np.uint64]

_NOWHERE = -1e300
"""Excess where there is no row."""

_A, _B, _C, _D = np.uint64(13), np.uint64(7), np.uint64(17), np.uint64(11)
_UNIT = 1.0 / 9007199254740992.0

ZERO: int = np.int64(0)  # type: ignore[assignment]
"""A zero that the compiler takes for a number like others; literals get functions of their own."""

COST, BEST, WEIGHT = 0, 1, 2
"""Places in the vector of numbers that a search carries from call to call."""


@compiled
def draw_unit(state: UInt64Array) -> float:
    """A random number in [0, 1) (xorshift: Marsaglia, 2003)."""
    word = state[0]
    word ^= word << _A
    word ^= word >> _B
    word ^= word << _C
    state[0] = word
    return float(word >> _D) * _UNIT


@compiled
def filled(count: int, value: int) -> Int64Array:
    """`count` times a value."""
    result = np.empty(count, np.int64)
    for i in range(count):
        result[i] = value
    return result


@compiled
def copy_into(target: Int64Array, source: Int64Array) -> None:
    """Copy entry by entry; assigning to a slice has the compiler build texts of errors, for seconds."""
    for i in range(len(source)):
        target[i] = source[i]


@compiled
def add_range(top: FloatArray, lazy: FloatArray, first: int, last: int, amount: float) -> None:
    """Add to the excess of rows `first` to `last - 1`."""
    size = len(top) // 2
    i, j = first + size, last + size + 1
    while (i ^ j) != 1:
        if (i & 1) == 0:
            top[i ^ 1] += amount
            lazy[i ^ 1] += amount
        if (j & 1) == 1:
            top[j ^ 1] += amount
            lazy[j ^ 1] += amount
        i >>= 1
        j >>= 1
        top[i] = max(top[2 * i], top[2 * i + 1]) + lazy[i]
        top[j] = max(top[2 * j], top[2 * j + 1]) + lazy[j]
    while i > 1:
        i >>= 1
        top[i] = max(top[2 * i], top[2 * i + 1]) + lazy[i]


@compiled
def max_range(top: FloatArray, lazy: FloatArray, first: int, last: int) -> float:
    """The largest excess in rows `first` to `last - 1`."""
    size = len(top) // 2
    i, j = first + size, last + size + 1
    left, right = _NOWHERE, _NOWHERE
    while (i ^ j) != 1:
        if (i & 1) == 0:
            left = max(left, top[i ^ 1])
        if (j & 1) == 1:
            right = max(right, top[j ^ 1])
        i >>= 1
        j >>= 1
        left += lazy[i]
        right += lazy[j]
    result = max(left, right)
    while i > 1:
        i >>= 1
        result += lazy[i]
    return result


def excess_tree(excess: FloatArray) -> tuple[FloatArray, FloatArray]:
    """The two arrays of a segment tree over rows with the given excess."""
    size = 2
    while size < len(excess) + 2:
        size *= 2
    top = np.full(2 * size, _NOWHERE)
    top[size + 1 : size + 1 + len(excess)] = excess
    while size > 1:
        # the next level up: its nodes are `size // 2` to `size - 1`
        top[size // 2 : size] = np.maximum(top[size : 2 * size : 2], top[size + 1 : 2 * size : 2])
        size //= 2
    return top, np.zeros(len(top))


@compiled
def rises(flat: FlatGraph) -> FloatArray:
    """For each strategy, the most that memory can rise at any row when its vertex leaves it."""
    result = np.zeros(len(flat.cost))
    for p in range(len(flat.start) - 1):
        count = flat.start[p + 1] - flat.start[p]
        width = flat.segment_start[p + 1] - flat.segment_start[p]
        base = flat.use_start[p]
        for k in range(width):
            most = flat.use[base + k]
            for i in range(1, count):
                most = max(most, flat.use[base + i * width + k])
            for i in range(count):
                at = flat.start[p] + i
                result[at] = max(result[at], most - flat.use[base + i * width + k])
    return result


@compiled
def change_strategy(
    flat: FlatGraph, x: Int64Array, top: FloatArray, lazy: FloatArray, p: int, new: int
) -> float:
    """Give vertex p another strategy; returns the change of cost."""
    old = x[p]
    change: float = flat.cost[flat.start[p] + new] - flat.cost[flat.start[p] + old]
    for e in range(flat.edge_start[p], flat.edge_start[p + 1]):
        v = flat.edge_to[e]
        width = flat.start[v + 1] - flat.start[v]
        at = flat.edge_table[e] + x[v]
        change += flat.pairs[at + new * width] - flat.pairs[at + old * width]
    begin, end = flat.segment_start[p], flat.segment_start[p + 1]
    base = flat.use_start[p]
    for k in range(begin, end):
        amount = (
            flat.use[base + new * (end - begin) + k - begin]
            - flat.use[base + old * (end - begin) + k - begin]
        )
        if amount != 0.0:
            add_range(top, lazy, flat.segment_first[k], flat.segment_last[k], amount)
    x[p] = new
    return change


@compiled
def add_penalty(
    flat: FlatGraph,
    rise: FloatArray,
    x: Int64Array,
    top: FloatArray,
    lazy: FloatArray,
    weight: float,
    p: int,
    view: FloatArray,
    over: FloatArray,
) -> None:
    """Add to `view` what each strategy of p would pay for memory, everybody else standing still."""
    begin, end = flat.segment_start[p], flat.segment_start[p + 1]
    if begin == end:
        return
    first, last = flat.segment_first[begin], flat.segment_last[end - 1]
    peak = top[1]
    inside = max_range(top, lazy, first, last)
    if peak <= 0.0 and inside + rise[flat.start[p] + x[p]] <= 0.0:
        return
    floor = 0.0
    if peak > 0.0:
        floor = peak
        if inside >= peak:
            num_rows = len(flat.limit)
            floor = 0.0
            if first > 0:
                floor = max(floor, max_range(top, lazy, ZERO, first))
            if last < num_rows:
                floor = max(floor, max_range(top, lazy, last, num_rows))
    count = flat.start[p + 1] - flat.start[p]
    width = end - begin
    base = flat.use_start[p]
    for i in range(count):
        over[i] = floor
    for k in range(width):
        here = max_range(top, lazy, flat.segment_first[begin + k], flat.segment_last[begin + k])
        here -= flat.use[base + x[p] * width + k]
        for i in range(count):
            over[i] = max(over[i], here + flat.use[base + i * width + k])
    for i in range(count):
        view[i] += weight * over[i]


@compiled
def look(
    flat: FlatGraph, x: Int64Array, p: int, view: FloatArray, inside: Int64Array, stamp: int
) -> None:
    """Cost of each strategy of p with the neighbours that do not carry the stamp."""
    begin, end = flat.start[p], flat.start[p + 1]
    count = end - begin
    for i in range(count):
        view[i] = flat.cost[begin + i]
    for e in range(flat.edge_start[p], flat.edge_start[p + 1]):
        v = flat.edge_to[e]
        if inside[v] != stamp:
            at = flat.edge_table[flat.edge_back[e]] + x[v] * count
            for i in range(count):
                view[i] += flat.pairs[at + i]


@compiled
def add_noise(view: FloatArray, count: int, scale: float, gumbel: FloatArray, state: UInt64Array) -> None:
    """Take a Gumbel variate times `scale` off every entry."""
    at = int(draw_unit(state) * (len(gumbel) - count))
    for i in range(count):
        view[i] -= scale * gumbel[at + i]


@compiled
def grow_tree(
    flat: FlatGraph,
    wanted: int,
    tree: Int64Array,
    parent: Int64Array,
    link: Int64Array,
    inside: Int64Array,
    stamp: int,
    state: UInt64Array,
) -> int:
    """A random induced tree of up to `wanted` vertices; `link[t]` is its edge as seen from the parent."""
    num_vertices = len(flat.start) - 1
    tree[0] = int(draw_unit(state) * num_vertices)
    inside[tree[0]] = stamp
    size, tries = 1, 3 * wanted
    while size < wanted and tries > 0:
        tries -= 1
        t = int(draw_unit(state) * size)
        u = tree[t]
        degree = flat.edge_start[u + 1] - flat.edge_start[u]
        if degree == 0:
            continue
        e = flat.edge_start[u] + int(draw_unit(state) * degree)
        v = flat.edge_to[e]
        if inside[v] == stamp:
            continue
        ties = 0
        for f in range(flat.edge_start[v], flat.edge_start[v + 1]):
            if inside[flat.edge_to[f]] == stamp:
                ties += 1
                if ties > 1:
                    break
        if ties == 1:
            inside[v] = stamp
            tree[size], parent[size], link[size] = v, t, e
            size += 1
    return size


@compiled
def solve_tree(
    flat: FlatGraph,
    tree: Int64Array,
    parent: Int64Array,
    link: Int64Array,
    size: int,
    views: FloatArray,
    wish: Int64Array,
) -> None:
    """Minimise over a tree by dynamic programming; `views` holds each vertex's own costs."""
    for t in range(size - 1, 0, -1):
        v, u = tree[t], tree[parent[t]]
        begin, count = flat.start[v], flat.start[v + 1] - flat.start[v]
        for i in range(flat.start[u + 1] - flat.start[u]):
            at = flat.edge_table[link[t]] + i * count
            least = flat.pairs[at] + views[begin]
            for j in range(1, count):
                least = min(least, flat.pairs[at + j] + views[begin + j])
            views[flat.start[u] + i] += least
    for t in range(size):
        v = tree[t]
        begin, count = flat.start[v], flat.start[v + 1] - flat.start[v]
        best, least = 0, 1e300
        for j in range(count):
            value = views[begin + j]
            if t > 0:
                value += flat.pairs[flat.edge_table[link[t]] + wish[parent[t]] * count + j]
            if value < least:
                best, least = j, value
        wish[t] = best


@compiled
def anneal(
    flat: FlatGraph,
    rise: FloatArray,
    gumbel: FloatArray,
    x: Int64Array,
    best: Int64Array,
    top: FloatArray,
    lazy: FloatArray,
    numbers: FloatArray,
    state: UInt64Array,
    temperature: float,
    num_updates: int,
    largest_tree: int,
    single_share: float,
) -> None:
    """Moves at one temperature until about `num_updates` vertices have been visited."""
    num_vertices = len(flat.start) - 1
    views, over = np.empty(flat.start[num_vertices]), np.empty(flat.start[num_vertices])
    inside = filled(num_vertices, -1)
    tree, parent = np.zeros(largest_tree, np.int64), np.zeros(largest_tree, np.int64)
    link, wish = np.zeros(largest_tree, np.int64), np.zeros(largest_tree, np.int64)
    before = np.zeros(largest_tree, np.int64)
    stamp, visited, next_tune = ZERO, 0, num_vertices
    while visited < num_updates:
        weight = numbers[WEIGHT]
        wanted = 1
        if draw_unit(state) > single_share:
            wanted = 2 + int((largest_tree - 1) * draw_unit(state) ** 3)
        size = grow_tree(flat, wanted, tree, parent, link, inside, stamp, state)
        visited += size
        for t in range(size):
            p = tree[t]
            view = views[flat.start[p] : flat.start[p + 1]]
            look(flat, x, p, view, inside, stamp)
            add_penalty(flat, rise, x, top, lazy, weight, p, view, over)
            add_noise(view, len(view), temperature, gumbel, state)
        solve_tree(flat, tree, parent, link, size, views, wish)
        stamp += 1
        energy = weight * max(0.0, top[1])
        change = 0.0
        for t in range(size):
            p = tree[t]
            before[t] = x[p]
            if wish[t] != x[p]:
                change += change_strategy(flat, x, top, lazy, p, wish[t])
        if size > 1:
            loss = change + weight * max(0.0, top[1]) - energy
            if loss > 0.0 and loss > -temperature * np.log(1.0 - draw_unit(state)):
                for t in range(size):
                    if before[t] != x[tree[t]]:
                        change += change_strategy(flat, x, top, lazy, tree[t], before[t])
        numbers[COST] += change
        if top[1] <= 0.0 and numbers[COST] < numbers[BEST]:
            numbers[BEST] = numbers[COST]
            copy_into(best, x)
        if visited >= next_tune:
            next_tune += num_vertices
            numbers[WEIGHT] *= 1.02 if top[1] > 0.0 else 0.98
