"""The loops of `chain_relaxed`, compiled: cheapest chains of stages, by units, links and replicas.

A place on the way is a pair of a link kind and a unit, numbered kind * (units + 1) + unit; `head` and
`after` are those before and after a stage.
"""

import numpy as np

from graphpar.partition.jit import compiled_exactly
from graphpar.partition.unit_arrays import FloatArray, IntArray

_COLUMNS_PER_SLOT = 4
"""With so many columns they are looked at by slot and width."""


@compiled_exactly
def least_before(
    head: IntArray,
    after: IntArray,
    width: IntArray,
    below: IntArray,
    cost: FloatArray,
    levels: int,
    buckets: int,
) -> FloatArray:
    """[(link, unit), replicas behind]: what the chain before costs at least; columns by first unit."""
    least = np.full((buckets, levels), np.inf)
    least[0] = 0.0
    for c in range(len(cost)):
        wide, own, start, end = width[c], cost[c], least[head[c]], least[after[c]]
        for level in range(min(levels - 1, below[c]) - wide + 1):
            end[level] = min(end[level], own + start[level + wide])
    return least


@compiled_exactly
def chain_paths(
    columns: tuple[IntArray, IntArray, FloatArray, FloatArray, FloatArray, FloatArray],
    per_option: tuple[IntArray, FloatArray, FloatArray, FloatArray],
    per_slot: tuple[IntArray, IntArray],
    levels: int,
    buckets: int,
    end: int,
) -> tuple[float, FloatArray, IntArray]:
    """The cheapest chain, what each column adds to it, and its columns (none where there is no chain).

    Columns (option, slot, cost, extra, post, most below) come by first unit. One costs `cost + a * extra
    + b * post + c` by (replicas counted, a, b, c) of its option. Where there are many, those that may
    stand behind any number of replicas are as good as the cheapest of them on their slot and of their
    width, in paths through none or another one of them.
    """
    option, slot, cost, extra, post, most_below = columns
    counted, of_extra, of_post, of_use = per_option
    number, heads = len(option), per_slot[0]
    priced, limited = np.empty(number), 0
    many = number > _COLUMNS_PER_SLOT * len(heads)
    least = np.full((len(heads) if many else 0, levels), np.inf)
    for c in range(number):
        row = option[c]
        own = cost[c] + of_extra[row] * extra[c] + of_post[row] * post[c] + of_use[row]
        priced[c] = own
        if many and most_below[c] >= levels - 1:
            least[slot[c], counted[row]] = min(least[slot[c], counted[row]], own)
        else:
            limited += 1
    each = option, slot, priced, most_below
    rest = _least_after(each, limited, counted, per_slot, least, levels, buckets, end)
    level = rest[0].argmin()
    whole = rest[0, level]
    if not np.isfinite(whole):
        return np.inf, priced, option[:0]
    before = _least_before(each, limited, counted, per_slot, least, levels, buckets, end)
    path = _least_path(each, counted, per_slot, rest, level, end)
    for s in range(len(least)):
        start, behind = before[heads[s]], rest[per_slot[1][s]]
        for wide in range(levels):
            if least[s, wide] < np.inf:
                best = np.inf
                for level in range(levels - wide):
                    best = min(best, start[level + wide] + behind[level])
                least[s, wide] = best
    for c in range(number):
        s, wide = slot[c], counted[option[c]]
        if many and most_below[c] >= levels - 1:
            best = least[s, wide]
        else:
            best, start, behind = np.inf, before[heads[s]], rest[per_slot[1][s]]
            for level in range(int(min(max(most_below[c], 0.0), levels - 1.0)) - wide + 1):
                best = min(best, start[level + wide] + behind[level])
        priced[c] = max(best + priced[c] - whole, 0.0)
    return whole, priced, path


@compiled_exactly
def _least_after(
    columns: tuple[IntArray, IntArray, FloatArray, FloatArray],
    limited: int,
    counted: IntArray,
    per_slot: tuple[IntArray, IntArray],
    least: FloatArray,
    levels: int,
    buckets: int,
    end: int,
) -> FloatArray:
    """[(link, unit), replicas from here on]: what the rest of the chain costs at least.

    `least[slot, width]` stands for columns that may stand anywhere, if it is not empty.
    """
    option, slot, priced, most_below = columns
    heads, afters = per_slot
    many = len(least) > 0
    found = np.full((buckets, levels), np.inf)
    found[end, 0] = 0.0
    c = len(option) - 1 if limited else -1
    for s in range(len(heads) - 1, -1, -1):
        first = heads[s] % (end + 1)
        while c >= 0 and heads[slot[c]] % (end + 1) >= first:
            if not (many and most_below[c] >= levels - 1):
                wide, own = counted[option[c]], priced[c]
                start, behind = found[heads[slot[c]]], found[afters[slot[c]]]
                for level in range(int(min(max(most_below[c], 0.0), levels - 1.0)) - wide + 1):
                    start[level + wide] = min(start[level + wide], own + behind[level])
            c -= 1
        if many:
            start, behind = found[heads[s]], found[afters[s]]
            for wide in range(levels):
                own = least[s, wide]
                if own < np.inf:
                    for level in range(levels - wide):
                        start[level + wide] = min(start[level + wide], own + behind[level])
    return found


@compiled_exactly
def _least_before(
    columns: tuple[IntArray, IntArray, FloatArray, FloatArray],
    limited: int,
    counted: IntArray,
    per_slot: tuple[IntArray, IntArray],
    least: FloatArray,
    levels: int,
    buckets: int,
    end: int,
) -> FloatArray:
    """[(link, unit), replicas behind]: what the chain before costs at least; see `_least_after`."""
    option, slot, priced, most_below = columns
    heads, afters = per_slot
    many, number = len(least) > 0, len(option) if limited else 0
    found = np.full((buckets, levels), np.inf)
    found[0] = 0.0
    c = 0
    for s in range(len(heads)):
        first = heads[s] % (end + 1)
        while c < number and heads[slot[c]] % (end + 1) <= first:
            if not (many and most_below[c] >= levels - 1):
                wide, own = counted[option[c]], priced[c]
                start, behind = found[heads[slot[c]]], found[afters[slot[c]]]
                for level in range(int(min(max(most_below[c], 0.0), levels - 1.0)) - wide + 1):
                    behind[level] = min(behind[level], own + start[level + wide])
            c += 1
        if many:
            start, behind = found[heads[s]], found[afters[s]]
            for wide in range(levels):
                own = least[s, wide]
                if own < np.inf:
                    for level in range(levels - wide):
                        behind[level] = min(behind[level], own + start[level + wide])
    return found


@compiled_exactly
def _least_path(
    columns: tuple[IntArray, IntArray, FloatArray, FloatArray],
    counted: IntArray,
    per_slot: tuple[IntArray, IntArray],
    least: FloatArray,
    level: int,
    end: int,
) -> IntArray:
    """The columns of a cheapest chain with so many replicas; `least` as `_least_after` gives it."""
    option, slot, priced, most_below = columns
    heads, afters = per_slot
    found = np.empty(least.shape[0], dtype=np.intp)
    place, number = 0, 0
    for c in range(len(option)):
        if place == end:
            break
        if heads[slot[c]] != place or most_below[c] < level or counted[option[c]] > level:
            continue
        wide = counted[option[c]]
        if priced[c] + least[afters[slot[c]], level - wide] == least[place, level]:
            found[number] = c
            number, place, level = number + 1, afters[slot[c]], level - wide
    return found[:number]
