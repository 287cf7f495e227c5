"""The loops of `relaxed`, compiled: cheapest chains of stages, by units, links and replicas.

A place on the way is a pair of a link kind and a unit, numbered kind * (units + 1) + unit; `head` and
`after` are those before and after a stage.
"""

import numpy as np

from graphpar.partition.jit import compiled_exactly
from graphpar.partition.unit_arrays import FloatArray, IntArray

_COLUMNS_PER_SLOT = 8
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
def least_after(
    head: IntArray,
    after: IntArray,
    width: IntArray,
    below: IntArray,
    cost: FloatArray,
    levels: int,
    buckets: int,
    end: int,
) -> FloatArray:
    """[(link, unit), replicas from here on]: what the rest of the chain costs at least."""
    least = np.full((buckets, levels), np.inf)
    least[end, 0] = 0.0
    for c in range(len(cost) - 1, -1, -1):
        wide, own, start, behind = width[c], cost[c], least[head[c]], least[after[c]]
        for level in range(min(levels - 1, below[c]) - wide + 1):
            start[level + wide] = min(start[level + wide], own + behind[level])
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
    + b * post + c` by (replicas counted, a, b, c) of its option. Where there are many, one stands for
    those of its width on its slot that may be behind any number of replicas: the cheapest of them.
    """
    option, slot, cost, extra, post, most_below = columns
    counted, of_extra, of_post, of_use = per_option
    number, slots = len(option), len(per_slot[0])
    priced = np.empty(number)
    for c in range(number):
        row = option[c]
        priced[c] = cost[c] + of_extra[row] * extra[c] + of_post[row] * post[c] + of_use[row]
    many = number > _COLUMNS_PER_SLOT * slots
    least = np.full((slots if many else 0, levels), np.inf)
    if many:
        for c in range(number):
            if most_below[c] >= levels - 1:
                wide = counted[option[c]]
                least[slot[c], wide] = min(least[slot[c], wide], priced[c])
    some = np.empty(number, dtype=np.intp)
    count = 0
    for c in range(number):
        some[count] = c
        count += not (many and most_below[c] >= levels - 1)
    each = _places(some[:count], option, slot, priced, most_below, counted, per_slot, levels)
    if many:
        rest = least_after_slots(each, per_slot, least, levels, buckets, end)
    else:
        rest = least_after(*each, levels, buckets, end)
    level = rest[0].argmin()
    whole = rest[0, level]
    if not np.isfinite(whole):
        return np.inf, priced, option[:0]
    path = _least_path(option, slot, priced, most_below, counted, per_slot, rest, level, end)
    if many:
        before = least_before_slots(each, per_slot, least, levels, buckets, end)
        through(least, before, rest, per_slot)
        for c in range(number):
            if most_below[c] >= levels - 1:
                priced[c] = max(least[slot[c], counted[option[c]]] + priced[c] - whole, 0.0)
    else:
        before = least_before(*each, levels, buckets)
    head, after, width, below, own = each
    for i in range(count):
        wide, best, start, behind = width[i], np.inf, before[head[i]], rest[after[i]]
        for level in range(below[i] - wide + 1):
            best = min(best, start[level + wide] + behind[level])
        priced[some[i]] = max(best + own[i] - whole, 0.0)
    return whole, priced, path


@compiled_exactly
def _places(
    some: IntArray,
    option: IntArray,
    slot: IntArray,
    priced: FloatArray,
    most_below: FloatArray,
    counted: IntArray,
    per_slot: tuple[IntArray, IntArray],
    levels: int,
) -> tuple[IntArray, IntArray, IntArray, IntArray, FloatArray]:
    """Of some columns: where they begin and end, their replicas, how many there may be, and the price."""
    number = len(some)
    head, after = np.empty(number, dtype=np.intp), np.empty(number, dtype=np.intp)
    width, below = np.empty(number, dtype=np.intp), np.empty(number, dtype=np.intp)
    own = np.empty(number)
    for i in range(number):
        c = some[i]
        head[i], after[i] = per_slot[0][slot[c]], per_slot[1][slot[c]]
        width[i], below[i] = counted[option[c]], int(min(max(most_below[c], 0.0), levels - 1.0))
        own[i] = priced[c]
    return head, after, width, below, own


@compiled_exactly
def least_after_slots(
    columns: tuple[IntArray, IntArray, IntArray, IntArray, FloatArray],
    per_slot: tuple[IntArray, IntArray],
    least: FloatArray,
    levels: int,
    buckets: int,
    end: int,
) -> FloatArray:
    """`least_after` where `least[slot, width]` stands for columns that may stand anywhere."""
    head, after, width, below, cost = columns
    heads, afters = per_slot
    found = np.full((buckets, levels), np.inf)
    found[end, 0] = 0.0
    c = len(cost) - 1
    for s in range(len(heads) - 1, -1, -1):
        first = heads[s] % (end + 1)
        while c >= 0 and head[c] % (end + 1) >= first:
            wide, own, start, behind = width[c], cost[c], found[head[c]], found[after[c]]
            for level in range(below[c] - wide + 1):
                start[level + wide] = min(start[level + wide], own + behind[level])
            c -= 1
        start, behind = found[heads[s]], found[afters[s]]
        for wide in range(levels):
            own = least[s, wide]
            if own < np.inf:
                for level in range(levels - wide):
                    start[level + wide] = min(start[level + wide], own + behind[level])
    return found


@compiled_exactly
def least_before_slots(
    columns: tuple[IntArray, IntArray, IntArray, IntArray, FloatArray],
    per_slot: tuple[IntArray, IntArray],
    least: FloatArray,
    levels: int,
    buckets: int,
    end: int,
) -> FloatArray:
    """`least_before` where `least[slot, width]` stands for columns that may stand anywhere."""
    head, after, width, below, cost = columns
    heads, afters = per_slot
    found = np.full((buckets, levels), np.inf)
    found[0] = 0.0
    c = 0
    for s in range(len(heads)):
        first = heads[s] % (end + 1)
        while c < len(cost) and head[c] % (end + 1) <= first:
            wide, own, start, behind = width[c], cost[c], found[head[c]], found[after[c]]
            for level in range(below[c] - wide + 1):
                behind[level] = min(behind[level], own + start[level + wide])
            c += 1
        start, behind = found[heads[s]], found[afters[s]]
        for wide in range(levels):
            own = least[s, wide]
            if own < np.inf:
                for level in range(levels - wide):
                    behind[level] = min(behind[level], own + start[level + wide])
    return found


@compiled_exactly
def through(
    least: FloatArray, before: FloatArray, rest: FloatArray, per_slot: tuple[IntArray, IntArray]
) -> None:
    """Set [slot, width] to what a chain with such a stage there costs at least without the stage."""
    levels = least.shape[1]
    for slot in range(len(least)):
        for wide in range(levels):
            if least[slot, wide] < np.inf:
                least[slot, wide] = least_at(
                    before, rest, per_slot[0][slot], per_slot[1][slot], wide, levels - 1
                )


@compiled_exactly
def least_at(before: FloatArray, rest: FloatArray, head: int, after: int, wide: int, below: int) -> float:
    """The same for a stage that no more than so many replicas may follow, itself counted."""
    best = np.inf
    for level in range(below - wide + 1):
        best = min(best, before[head, level + wide] + rest[after, level])
    return best


@compiled_exactly
def _least_path(
    option: IntArray,
    slot: IntArray,
    priced: FloatArray,
    most_below: FloatArray,
    counted: IntArray,
    per_slot: tuple[IntArray, IntArray],
    least: FloatArray,
    level: int,
    end: int,
) -> IntArray:
    """The columns of a cheapest chain with so many replicas; `least` as `least_after` gives it."""
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
