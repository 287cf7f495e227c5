"""Compiled large-neighbourhood search whose windows are solved by message passing.

A window is a random connected piece of the graph, or a few of them; everybody else stands still. Starting
from the messages of the global bound, a few passes under random noise adapt to the frozen surroundings,
the last one rounds within the memory that is left, and single vertices are then improved one by one. What
is not worse than before is kept, as told by the costs, or by the costs and the bound's price of memory:
then windows that free memory for little are kept as well, and others follow that make much of it, which
no single window could do where memory is full. A window of a hundred vertices takes a millisecond, so
thousands are tried where an exact window would still be solving its first relaxation.
"""

import numpy as np

from graphpar.partition.jit import compiled
from graphpar.partition.sharding.flat import FlatGraph, Int64Array
from graphpar.partition.sharding.graph import FloatArray
from graphpar.partition.sharding.messages import (
    pass_back,
    pass_forward,
    pass_within_memory,
    shrink,
)
from graphpar.partition.sharding.moves import (
    BEST,
    COST,
    ZERO,
    UInt64Array,
    add_noise,
    add_penalty,
    change_strategy,
    copy_into,
    draw_unit,
    filled,
    look,
)

_FROZEN = -1


@compiled
def sort_up(values: Int64Array) -> None:
    """Sort in place (Shell, 1959, with Ciura's gaps); library sorts take the compiler seconds."""
    for gap in (701, 301, 132, 57, 23, 10, 4, 1):
        for i in range(gap, len(values)):
            value, j = values[i], i
            while j >= gap and values[j - gap] > value:
                values[j] = values[j - gap]
                j -= gap
            values[j] = value


@compiled
def draw_window(
    flat: FlatGraph,
    wanted: int,
    num_seeds: int,
    starts: Int64Array,
    rank: Int64Array,
    state: UInt64Array,
) -> Int64Array:
    """Positions of a random window in increasing order; sets their `rank`, which was -1 everywhere.

    It grows around vertices drawn from `starts`.
    """
    window = np.empty(wanted, np.int64)
    size, tries = 0, 6 * wanted
    share = max(1, wanted // num_seeds)
    begin = 0
    while size < wanted and tries > 0:
        tries -= 1
        if size == begin or size - begin >= share:
            v = starts[int(draw_unit(state) * len(starts))]
            begin = size
        else:
            u = window[begin + int(draw_unit(state) * (size - begin))]
            degree = flat.edge_start[u + 1] - flat.edge_start[u]
            if degree == 0:
                begin = size
                continue
            v = flat.edge_to[flat.edge_start[u] + int(draw_unit(state) * degree)]
        if rank[v] == _FROZEN:
            rank[v] = 0
            window[size] = v
            size += 1
    window = window[:size]
    sort_up(window)
    for place in range(size):
        rank[window[place]] = place
    return window


@compiled
def load_window(
    flat: FlatGraph,
    theta: FloatArray,
    to: FloatArray,
    to_start: Int64Array,
    own_theta: FloatArray,
    own_to: FloatArray,
    rank: Int64Array,
    window: Int64Array,
    x: Int64Array,
) -> None:
    """Copy the global messages of a window and charge its vertices for the frozen ends of edges."""
    for p in window:
        begin, count = flat.start[p], flat.start[p + 1] - flat.start[p]
        for i in range(count):
            own_theta[begin + i] = theta[begin + i]
        for e in range(flat.edge_start[p], flat.edge_start[p + 1]):
            v, mine = flat.edge_to[e], to_start[e]
            if rank[v] >= 0:
                for i in range(count):
                    own_to[mine + i] = to[mine + i]
            else:
                at = flat.edge_table[flat.edge_back[e]] + x[v] * count
                for i in range(count):
                    own_theta[begin + i] += flat.pairs[at + i] - to[mine + i]


@compiled
def polish(
    flat: FlatGraph,
    rise: FloatArray,
    x: Int64Array,
    top: FloatArray,
    lazy: FloatArray,
    weight: float,
    window: Int64Array,
    stamps: Int64Array,
    view: FloatArray,
    over: FloatArray,
    priced: FloatArray,
    charge: float,
) -> float:
    """Give each vertex of a window its cheapest strategy, one after the other; returns the change.

    Cheapest is what costs least with `charge` times the price of its memory.
    """
    change = 0.0
    for p in window:
        begin, count = flat.start[p], flat.start[p + 1] - flat.start[p]
        look(flat, x, p, view[:count], stamps, ZERO)
        for i in range(count):
            view[i] += charge * priced[begin + i]
        add_penalty(flat, rise, x, top, lazy, weight, p, view[:count], over)
        best = x[p]
        for i in range(count):
            if view[i] < view[best]:
                best = i
        if best != x[p]:
            change += change_strategy(flat, x, top, lazy, p, best)
    return change


@compiled
def search_windows(
    flat: FlatGraph,
    rise: FloatArray,
    gumbel: FloatArray,
    theta: FloatArray,
    to: FloatArray,
    to_start: Int64Array,
    priced: FloatArray,
    starts: Int64Array,
    x: Int64Array,
    best: Int64Array,
    top: FloatArray,
    lazy: FloatArray,
    numbers: FloatArray,
    state: UInt64Array,
    num_visits: int,
    largest: int,
    noise: float,
    weight: float,
    tolerance: float,
    charge: float,
) -> None:
    """Windows until about `num_visits` vertices have been re-chosen, in `x` and `numbers[COST]`.

    Args:
        priced: What `theta` holds for memory, per strategy.
        starts: Where windows begin, drawn at random.
        largest: Most vertices of a window.
        noise: Scale of the noise on the costs of strategies.
        weight: Cost of a unit of memory over the limit, while polishing.
        tolerance: A window may make the choice worse by so much times an exponential variate.
        charge: What is worse is told by costs and so many times the price of memory.
    """
    num_vertices = len(flat.start) - 1
    rank, stamps = filled(num_vertices, _FROZEN), filled(num_vertices, -1)
    own_theta, own_to = np.empty(len(theta)), np.empty(len(to))
    view, over = np.empty(len(theta)), np.empty(len(theta))
    old = x.copy()
    visits = 0
    while visits < num_visits:
        wanted = 2 + int((largest - 1) * draw_unit(state) ** 2)
        window = draw_window(
            flat, min(wanted, num_vertices), 1 + int(3 * draw_unit(state) ** 2), starts, rank, state
        )
        visits += len(window)
        load_window(flat, theta, to, to_start, own_theta, own_to, rank, window, x)
        price, scale = 1.0 * draw_unit(state) - 0.5, noise * draw_unit(state) ** 2
        for p in window:
            begin, end = flat.start[p], flat.start[p + 1]
            for i in range(begin, end):
                own_theta[i] += price * priced[i]
            add_noise(own_theta[begin:end], end - begin, scale, gumbel, state)
        for p in window:
            old[p] = x[p]
        passes = int(4 * draw_unit(state))
        for _ in range(passes):
            pass_forward(flat, own_theta, own_to, to_start, rank, window)
            pass_back(flat, own_theta, own_to, to_start, rank, window)
        pass_forward(flat, own_theta, own_to, to_start, rank, window)
        shrink(flat, x, top, lazy, window)
        pass_within_memory(flat, own_theta, own_to, to_start, rank, window, x, top, lazy)
        change = exchange_cost(flat, x, old, rank, window)
        for _ in range(2):
            change += polish(flat, rise, x, top, lazy, weight, window, stamps, view, over, priced, charge)
        paid = 0.0
        for p in window:
            rank[p] = _FROZEN
            paid += priced[flat.start[p] + x[p]] - priced[flat.start[p] + old[p]]
        allowed = 0.0
        if tolerance > 0.0:
            allowed = -tolerance * np.log(1.0 - draw_unit(state))
        if top[1] > 0.0 or change + charge * paid > allowed:
            for p in window:
                if x[p] != old[p]:
                    change_strategy(flat, x, top, lazy, p, old[p])
            continue
        numbers[COST] += change
        if numbers[COST] < numbers[BEST]:
            numbers[BEST] = numbers[COST]
            copy_into(best, x)


@compiled
def exchange_cost(
    flat: FlatGraph, x: Int64Array, old: Int64Array, rank: Int64Array, window: Int64Array
) -> float:
    """Cost of `x` less cost of the same choice with the window as in `old`."""
    change = 0.0
    for p in window:
        begin = flat.start[p]
        change += flat.cost[begin + x[p]] - flat.cost[begin + old[p]]
        for e in range(flat.edge_start[p], flat.edge_start[p + 1]):
            v = flat.edge_to[e]
            width = flat.start[v + 1] - flat.start[v]
            at = flat.edge_table[e]
            if rank[v] < 0:
                change += flat.pairs[at + x[p] * width + x[v]] - flat.pairs[at + old[p] * width + x[v]]
            elif p < v:
                change += flat.pairs[at + x[p] * width + x[v]] - flat.pairs[at + old[p] * width + old[v]]
    return change
