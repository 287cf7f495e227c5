"""The cheapest chain of crews, whatever their modes, and which of them a plan may have; compiled.

Index legend as in `chain_loops`; a `crew` are the options of the same devices in all modes, and its
`sort` says which links it may have beside it. Both schedules are bounded: transfers neither wait nor take
longest. What comes before a stage comes over the best link that its devices may have to any others, so
that a run of units is one slot, however many kinds of links there are.
"""

import numpy as np

from graphpar.partition.chain_path_loops import (
    least_after_slots,
    least_at,
    least_before_slots,
    through,
)
from graphpar.partition.jit import compiled_exactly
from graphpar.partition.unit_arrays import UNLIMITED, FloatArray, IntArray

_HAIR = 1 - 1e-12
"""A hair below a fluid level, so that rounding never completes too much."""


@compiled_exactly
def crew_loop(
    crews: tuple[IntArray, IntArray, IntArray, IntArray],
    fastest: FloatArray,
    flight: FloatArray,
    post: FloatArray,
    moved: FloatArray,
    ahead: FloatArray,
    beside: FloatArray,
    number: int,
    limits: tuple[float, float, float, float],
    prices: tuple[IntArray, FloatArray, FloatArray, FloatArray],
    places: tuple[IntArray, IntArray],
    sizes: tuple[int, int, int],
    whole: FloatArray,
    found: tuple[IntArray, IntArray, FloatArray, FloatArray, FloatArray, FloatArray],
) -> tuple[float, int]:
    """What the cheapest chain costs, and how many columns of `found` a plan below the target may have.

    Args:
        crews: Replicas, [crew, replica] the team, sort, an earlier crew without the last replica or -1.
        fastest: [run, team]: the reciprocal of the fastest mode's seconds.
        flight: [run, team, width]: the most microbatches in any mode.
        post: [run, crew]: the least of any mode.
        moved: [run, crew]: what ZeRO moves at least.
        ahead: [run, sort]: the transfer before over the best link there may be; infinite without any.
        beside: [run]: what all other units take at least.
        number: Microbatches.
        limits: (target, most post, how much post counts, what prices take off a chain).
        prices: By crew (replicas counted, of extra, of post, of use).
        places: The units where each run begins and ends.
        sizes: (levels, places, units), see `chain_path_loops`.
        whole: [run, crew]: scratch.
        found: Arrays for the columns; options are numbers of crews, slots those of runs.
    """
    wide_of, _, sort_of, _ = crews
    target, most_post, weight, paid = limits
    counted, of_extra, of_post, of_use = prices
    levels, buckets, end = sizes
    options, at, costs, extras, posts, belows = found
    runs = len(beside)
    least = np.full((runs, levels), np.inf)
    mine = np.empty(len(wide_of)), np.empty(len(wide_of)), np.empty(len(wide_of))
    longests, adds, rooms = mine
    rates = np.empty(len(wide_of)), np.empty(len(wide_of))
    count = 0
    for run in range(runs):
        most = target - beside[run]
        _crews_of(run, fastest, flight, moved, crews, number, most, mine, rates)
        for crew in range(len(wide_of)):
            extra, own_post = adds[crew], post[run, crew]
            cost = longests[crew] + ahead[run, sort_of[crew]]
            whole[run, crew] = np.inf
            if rooms[crew] < wide_of[crew] or not own_post <= most_post:
                continue
            if not cost + extra + weight * own_post < most:
                continue
            own = cost + of_extra[crew] * extra + of_post[crew] * own_post + of_use[crew]
            whole[run, crew] = own
            if rooms[crew] >= levels - 1:
                least[run, counted[crew]] = min(least[run, counted[crew]], own)
            else:
                options[count], at[count], costs[count], belows[count] = crew, run, own, rooms[crew]
                count += 1
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
    count = 0
    for run in range(runs):
        known = False
        for crew in range(len(wide_of)):
            # No limit on what may be behind is less than any.
            best = least[run, counted[crew]]
            if not whole[run, crew] + best < target + paid:
                continue
            if not known:
                _crews_of(run, fastest, flight, moved, crews, number, np.inf, mine, rates)
                known = True
            if rooms[crew] < levels - 1:
                level = int(max(rooms[crew], 0.0))
                best = least_at(ahead_of, rest, places[0][run], places[1][run], counted[crew], level)
            if best + whole[run, crew] < target + paid:
                options[count], at[count] = crew, run
                costs[count] = longests[crew] + ahead[run, sort_of[crew]]
                extras[count], posts[count], belows[count] = adds[crew], post[run, crew], rooms[crew]
                count += 1
    return chain, count


@compiled_exactly
def _crews_of(
    run: int,
    fastest: FloatArray,
    flight: FloatArray,
    moved: FloatArray,
    crews: tuple[IntArray, IntArray, IntArray, IntArray],
    number: int,
    most: float,
    found: tuple[FloatArray, FloatArray, FloatArray],
    known: tuple[FloatArray, FloatArray],
) -> None:
    """By crew: the first microbatch, what the others add, the most replicas from here on (-1: nothing).

    Nothing where all microbatches alone take as long as may be. Each of several replicas keeps one
    microbatch, and they are dealt as if they could be divided. `known` is room for the rate of each crew
    and that of its slowest replica, which begin with those of a crew without the last replica.
    """
    wide_of, team, _, without_last = crews
    longests, extras, belows = found
    rates, slowest = known
    for crew in range(len(wide_of)):
        wide, rate, least, begin = wide_of[crew], 0.0, np.inf, 0
        if without_last[crew] >= 0:
            rate, least = rates[without_last[crew]], slowest[without_last[crew]]
            begin = wide - 1
        for r in range(begin, wide):
            rate += fastest[run, team[crew, r]]
            least = min(least, fastest[run, team[crew, r]])
        rates[crew], slowest[crew] = rate, least
        belows[crew] = -1.0
        # All microbatches over all replicas: no division is needed to see that.
        if wide > number or number * _HAIR >= most * rate:
            continue
        room = UNLIMITED
        for r in range(wide):
            room = min(room, flight[run, team[crew, r], wide])
        if room < 1:
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
