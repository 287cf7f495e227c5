"""The cheapest chain of crews, whatever their modes, and which of them a plan may have; compiled.

Index legend as in `chain_loops`; a `crew` are the options of the same devices in all modes, and its
`sort` says which links it may have beside it. Both schedules are bounded: transfers neither wait nor take
longest, so that only what comes before a stage depends on its slot, and all else is worked out once for
each run of units.
"""

import numpy as np

from graphpar.partition.chain_path_loops import (
    least_after_slots,
    least_at,
    least_before_slots,
    through,
)
from graphpar.partition.jit import compiled_exactly
from graphpar.partition.unit_arrays import UNLIMITED, BoolArray, FloatArray, IntArray

_HAIR = 1 - 1e-12
"""A hair below a fluid level, so that rounding never completes too much."""


@compiled_exactly
def crew_loop(
    crews: tuple[IntArray, IntArray, IntArray],
    fastest: FloatArray,
    flight: FloatArray,
    post: FloatArray,
    moved: FloatArray,
    sorts: BoolArray,
    slots: tuple[IntArray, IntArray, IntArray],
    ahead: FloatArray,
    beside: FloatArray,
    setting: tuple[int, bool],
    limits: tuple[float, float, float, float],
    prices: tuple[IntArray, FloatArray, FloatArray, FloatArray],
    places: tuple[IntArray, IntArray],
    sizes: tuple[int, int, int],
    whole: FloatArray,
    found: tuple[IntArray, IntArray, FloatArray, FloatArray, FloatArray, FloatArray],
) -> tuple[float, int]:
    """What the cheapest chain costs, and how many columns of `found` a plan below the target may have.

    Args:
        crews: Replicas, [crew, replica] the team, sort.
        fastest: [run, team]: the reciprocal of the fastest mode's seconds.
        flight: [run, team, width]: the most microbatches in any mode.
        post: [run, crew]: the least of any mode.
        moved: [run, crew]: what ZeRO moves at least.
        sorts: [sort, link kind]: whether that may be beside it.
        slots: (run, kind before, kind after) of each; those of a run come together.
        ahead: [slot]: the transfer before.
        beside: [run]: what all other units take at least.
        setting: Microbatches, and whether any stage holds one.
        limits: (target, most post, how much post counts, what prices take off a chain).
        prices: By crew (replicas counted, of extra, of post, of use).
        places: Where each slot begins and ends, as numbers of link kind and unit.
        sizes: (levels, places, units), see `chain_path_loops`.
        whole: [run, crew]: scratch.
        found: Arrays for the columns; options are numbers of crews.
    """
    run_of, before, after = slots
    wide_of, team, sort_of = crews
    number, keeps = setting
    target, most_post, weight, paid = limits
    counted, of_extra, of_post, of_use = prices
    levels, buckets, end = sizes
    options, at, costs, extras, posts, belows = found
    least, local = np.full((len(run_of), levels), np.inf), np.empty((len(sorts), levels))
    mine = np.empty(len(wide_of)), np.empty(len(wide_of)), np.empty(len(wide_of))
    longests, adds, rooms = mine
    count = stop = 0
    while stop < len(run_of):
        start, run, least_ahead = stop, run_of[stop], ahead[stop]
        while stop < len(run_of) and run_of[stop] == run:
            least_ahead = min(least_ahead, ahead[stop])
            stop += 1
        most = target - beside[run] - least_ahead
        _crews_of(run, fastest, flight, moved, wide_of, team, number, keeps, most, mine)
        local[:] = np.inf
        for crew in range(len(wide_of)):
            longest, extra, own_post = longests[crew], adds[crew], post[run, crew]
            whole[run, crew] = np.inf
            if rooms[crew] < wide_of[crew] or not own_post <= most_post:
                continue
            if not longest + extra + weight * own_post < most:
                continue
            own = longest + of_extra[crew] * extra + of_post[crew] * own_post + of_use[crew]
            whole[run, crew] = own
            sort = sort_of[crew]
            if rooms[crew] >= levels - 1:
                local[sort, counted[crew]] = min(local[sort, counted[crew]], own)
                continue
            for slot in range(start, stop):
                if sorts[sort, before[slot]] and sorts[sort, after[slot]]:
                    options[count], at[count] = crew, slot
                    costs[count], belows[count] = own + ahead[slot], rooms[crew]
                    count += 1
        for slot in range(start, stop):
            for sort in range(len(sorts)):
                if sorts[sort, before[slot]] and sorts[sort, after[slot]]:
                    for level in range(levels):
                        least[slot, level] = min(least[slot, level], local[sort, level] + ahead[slot])
    each = _limited(options[:count], at[:count], costs[:count], belows[:count], counted, places)
    rest = least_after_slots(each, places, least, levels, buckets, end)
    chain = rest[0].min()
    if not chain < target + paid:
        return chain, 0
    ahead_of = least_before_slots(each, places, least, levels, buckets, end)
    # Where memory limits every crew of a width chains lead through as well.
    for c in range(count):
        least[at[c], counted[options[c]]] = min(least[at[c], counted[options[c]]], costs[c])
    through(least, ahead_of, rest, places)
    count = stop = 0
    while stop < len(run_of):
        start, run = stop, run_of[stop]
        while stop < len(run_of) and run_of[stop] == run:
            stop += 1
        local[:] = np.inf
        for slot in range(start, stop):
            for sort in range(len(sorts)):
                if sorts[sort, before[slot]] and sorts[sort, after[slot]]:
                    for level in range(levels):
                        local[sort, level] = min(local[sort, level], least[slot, level] + ahead[slot])
        known = False
        for crew in range(len(wide_of)):
            # No limit on what may be behind is less than any.
            if not whole[run, crew] + local[sort_of[crew], counted[crew]] < target + paid:
                continue
            if not known:
                _crews_of(run, fastest, flight, moved, wide_of, team, number, keeps, np.inf, mine)
                known = True
            longest, extra, own_post, sort = longests[crew], adds[crew], post[run, crew], sort_of[crew]
            for slot in range(start, stop):
                cost = longest + ahead[slot]
                if not (sorts[sort, before[slot]] and sorts[sort, after[slot]]):
                    continue
                if not cost + extra + weight * own_post < target - beside[run]:
                    continue
                best = least[slot, counted[crew]]
                if rooms[crew] < levels - 1:
                    level = int(max(rooms[crew], 0.0))
                    best = least_at(
                        ahead_of, rest, places[0][slot], places[1][slot], counted[crew], level
                    )
                if best + whole[run, crew] + ahead[slot] < target + paid:
                    options[count], at[count] = crew, slot
                    costs[count], extras[count] = cost, extra
                    posts[count], belows[count] = own_post, rooms[crew]
                    count += 1
    return chain, count


@compiled_exactly
def _crews_of(
    run: int,
    fastest: FloatArray,
    flight: FloatArray,
    moved: FloatArray,
    wide_of: IntArray,
    team: IntArray,
    number: int,
    keeps: bool,
    most: float,
    found: tuple[FloatArray, FloatArray, FloatArray],
) -> None:
    """By crew: the first microbatch, what the others add, the most replicas from here on (-1: nothing).

    Nothing where all microbatches alone take as long as may be. Each of several replicas keeps one
    microbatch, and they are dealt as if they could be divided.
    """
    longests, extras, belows = found
    for crew in range(len(wide_of)):
        wide, rate, least, room = wide_of[crew], 0.0, np.inf, UNLIMITED
        belows[crew] = -1.0
        if wide > number:
            continue
        for r in range(wide):
            rate += fastest[run, team[crew, r]]
            least = min(least, fastest[run, team[crew, r]])
            room = min(room, flight[run, team[crew, r], wide])
        # All microbatches over all replicas: no division is needed to see that.
        if (room < 1 and keeps) or number * _HAIR >= most * rate:
            continue
        more = moved[run, crew]
        longest = 1 / least + more
        longests[crew], belows[crew] = longest, UNLIMITED
        if wide == 1:
            extras[crew] = (number - 1) * longest
            if number > room:
                belows[crew] = room
            continue
        if more > 0:
            rate = 0.0
            for r in range(wide):
                rate += 1 / (1 / fastest[run, team[crew, r]] + more)
        extras[crew] = max(number / rate * _HAIR - longest, 0.0)


@compiled_exactly
def _limited(
    crew: IntArray,
    slot: IntArray,
    cost: FloatArray,
    most_below: FloatArray,
    counted: IntArray,
    places: tuple[IntArray, IntArray],
) -> tuple[IntArray, IntArray, IntArray, IntArray, FloatArray]:
    """Columns as `least_after_slots` wants those that may not be behind any number of replicas."""
    below = np.empty(len(crew), dtype=np.intp)
    for c in range(len(crew)):
        below[c] = int(most_below[c])
    return places[0][slot], places[1][slot], counted[crew], below, cost
