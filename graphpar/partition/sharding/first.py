"""A first answer straight from the file's numbers, before any reduction, for when time is short.

Nodes are given their strategies in order: the cheapest, seen from the neighbours chosen before and from
what the others promise at best. Every node has a domain of strategies that may still be taken. A choice
shrinks the neighbours' domains to what it leaves possible, theirs shrink others' (arc consistency kept up
all the way: Sabin and Freuder, 1994), and everybody undecided counts at the least memory of its domain.
A choice that empties a domain or passes the memory limit is taken back and the next cheapest tried. Only
the node's own choice is ever taken back, so there may be answers where this finds none.
"""

import numpy as np

from graphpar.partition.clock import OutOfTimeError, ShouldStop, never
from graphpar.partition.jit import compiled_exactly
from graphpar.partition.sharding.flat import Int64Array
from graphpar.partition.sharding.graph import BoolArray, FloatArray
from graphpar.partition.sharding.memory import add_up
from graphpar.partition.sharding.moves import ZERO, add_range, excess_tree
from graphpar.partition.sharding.raw import RawProblem


def first_choice(raw: RawProblem, should_stop: ShouldStop = never) -> list[int] | None:
    """An answer that respects every rule, or None where this simple way finds none.

    Raises:
        OutOfTimeError: It was time to stop.
    """
    if not raw.num_nodes:
        return []
    if should_stop():
        raise OutOfTimeError
    chosen = choose(raw, raw.cost)
    return None if chosen is None else chosen.tolist()


def choose(raw: RawProblem, ahead: FloatArray) -> Int64Array | None:
    """The same for arrays, where `ahead` is what strategies promise; see `choose_in_order`."""
    usable = np.where(np.isfinite(raw.cost), raw.usage, np.inf)
    least = np.minimum.reduceat(usable, raw.start[:-1])
    if not np.isfinite(least).all():
        return None
    held = add_up(raw.row_first, raw.row_last, least, len(raw.limit))
    top, lazy = excess_tree(held - raw.limit)
    chosen = np.zeros(raw.num_nodes, dtype=np.int64)
    found = choose_in_order(raw, ahead, np.isfinite(raw.cost), least, top, lazy, chosen)
    return chosen if found else None


@compiled_exactly
def choose_in_order(
    raw: RawProblem,
    ahead: FloatArray,
    alive: BoolArray,
    least: FloatArray,
    top: FloatArray,
    lazy: FloatArray,
    chosen: Int64Array,
) -> bool:
    """Fill `chosen`; returns whether that worked out.

    `ahead` is what each strategy of a node not yet decided counts with its neighbours before it, `alive`
    marks every strategy that may be taken, `least` is the least memory of each node's, and the tree
    counts everybody at that.
    """
    num_nodes = len(raw.start) - 1
    gone = np.empty(len(alive), np.int64)
    cut, queued = np.empty(num_nodes, np.int64), np.zeros(num_nodes, np.bool_)
    queue = np.empty(num_nodes, np.int64)
    is_cut = np.zeros(num_nodes, np.bool_)
    decided = np.zeros(num_nodes, np.bool_)
    counts = np.zeros(2, np.int64)
    for v in range(num_nodes):
        queue[v] = v
        queued[v] = True
    if not spread_cuts(raw, alive, least, top, lazy, queue, queued, num_nodes, gone, cut, is_cut, counts):
        return False
    if top[1] > 0.0:
        return False
    longest = 0
    for v in range(num_nodes):
        longest = max(longest, raw.start[v + 1] - raw.start[v])
    view = np.empty(longest)
    for v in range(num_nodes):
        begin, count = raw.start[v], raw.start[v + 1] - raw.start[v]
        view_promised(raw, ahead, alive, decided, chosen, v, view)
        found = False
        while not found:
            best = -1
            for i in range(count):
                if alive[begin + i] and view[i] < np.inf and (best < 0 or view[i] < view[best]):
                    best = i
            if best < 0:
                return False
            for k in range(counts[1]):
                is_cut[cut[k]] = False
            counts[0] = counts[1] = 0
            for i in range(count):
                if i != best and alive[begin + i]:
                    alive[begin + i] = False
                    gone[counts[0]] = begin + i
                    counts[0] += 1
            note_cut(raw, alive, least, top, lazy, v, cut, is_cut, counts)
            queue[0] = v
            queued[v] = True
            waiting = ZERO + 1  # a literal would have `spread_cuts` compiled a second time
            found = spread_cuts(
                raw, alive, least, top, lazy, queue, queued, waiting, gone, cut, is_cut, counts
            )
            found = found and top[1] <= 0.0
            if not found:
                for k in range(counts[0]):
                    alive[gone[k]] = True
                for k in range(counts[1]):
                    count_least(raw, alive, least, top, lazy, cut[k])
                view[best] = np.inf
            else:
                chosen[v] = best
                decided[v] = True
    return True


@compiled_exactly
def view_promised(
    raw: RawProblem,
    ahead: FloatArray,
    alive: BoolArray,
    decided: BoolArray,
    chosen: Int64Array,
    v: int,
    view: FloatArray,
) -> None:
    """What each strategy of v costs with the neighbours chosen so far, the rest at their best."""
    begin, count = raw.start[v], raw.start[v + 1] - raw.start[v]
    for i in range(count):
        view[i] = raw.cost[begin + i]
    for e in range(raw.end_start[v], raw.end_start[v + 1]):
        u, at, step, other = raw.end_to[e], raw.end_table[e], raw.end_step[e], raw.end_other[e]
        if decided[u]:
            for i in range(count):
                view[i] += raw.pairs[at + i * step + chosen[u] * other]
            continue
        start, width = raw.start[u], raw.start[u + 1] - raw.start[u]
        for i in range(count):
            if not alive[begin + i]:
                continue
            least = np.inf
            for j in range(width):
                if alive[start + j]:
                    least = min(least, raw.pairs[at + i * step + j * other] + ahead[start + j])
            view[i] += least


@compiled_exactly
def spread_cuts(
    raw: RawProblem,
    alive: BoolArray,
    least: FloatArray,
    top: FloatArray,
    lazy: FloatArray,
    queue: Int64Array,
    queued: BoolArray,
    waiting: int,
    gone: Int64Array,
    cut: Int64Array,
    is_cut: BoolArray,
    counts: Int64Array,
) -> bool:
    """Take strategies without a possible partner away; False if that leaves some node with none.

    What went is appended to `gone` and the nodes concerned to `cut`, their numbers in `counts`.
    """
    possible = True
    while waiting > 0:
        waiting -= 1
        v = queue[waiting]
        queued[v] = False
        if not possible:
            continue
        begin, end = raw.start[v], raw.start[v + 1]
        for e in range(raw.end_start[v], raw.end_start[v + 1]):
            if not raw.end_hard[e] or not possible:
                continue
            u, at, step, other = raw.end_to[e], raw.end_table[e], raw.end_step[e], raw.end_other[e]
            changed, left = False, 0
            for j in range(raw.start[u], raw.start[u + 1]):
                if not alive[j]:
                    continue
                there = at + (j - raw.start[u]) * other
                supported = False
                for i in range(begin, end):
                    if alive[i] and raw.pairs[there + (i - begin) * step] < np.inf:
                        supported = True
                        break
                if supported:
                    left += 1
                else:
                    alive[j] = False
                    gone[counts[0]] = j
                    counts[0] += 1
                    changed = True
            if changed:
                note_cut(raw, alive, least, top, lazy, u, cut, is_cut, counts)
                possible = left > 0
                if not queued[u]:
                    queued[u] = True
                    queue[waiting] = u
                    waiting += 1
    return possible


@compiled_exactly
def note_cut(
    raw: RawProblem,
    alive: BoolArray,
    least: FloatArray,
    top: FloatArray,
    lazy: FloatArray,
    v: int,
    cut: Int64Array,
    is_cut: BoolArray,
    counts: Int64Array,
) -> None:
    """Remember that v lost strategies and count it at what is least now."""
    if not is_cut[v]:
        is_cut[v] = True
        cut[counts[1]] = v
        counts[1] += 1
    count_least(raw, alive, least, top, lazy, v)


@compiled_exactly
def count_least(
    raw: RawProblem, alive: BoolArray, least: FloatArray, top: FloatArray, lazy: FloatArray, v: int
) -> None:
    """Count v at the least memory of the strategies that it still has."""
    now = np.inf
    for i in range(raw.start[v], raw.start[v + 1]):
        if alive[i]:
            now = min(now, raw.usage[i])
    if now < np.inf and now != least[v]:
        if raw.row_first[v] < raw.row_last[v]:
            add_range(top, lazy, raw.row_first[v], raw.row_last[v], now - least[v])
        least[v] = now
