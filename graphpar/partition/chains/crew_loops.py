"""The cheapest chain of crews, whatever their modes, and which of them a plan may have; compiled.

Index legend as in `loops`; a `crew` are the options of the same devices in all modes, and its
`sort` says which links it may have beside it. Both schedules are bounded: transfers neither wait nor take
longest. What comes before a stage comes over the best link that its devices may have to any others, so
that a run of units is one slot, however many kinds of links there are.
"""

import numpy as np

from graphpar.partition.chains.path_loops import (
    least_after_slots,
    least_at,
    least_before_slots,
    through,
)
from graphpar.partition.flights import MOST_BITS
from graphpar.partition.jit import compiled_exactly
from graphpar.partition.unit_arrays import UNLIMITED, BoolArray, FloatArray, IntArray

_HAIR = 1 - 1e-12
"""A hair below a fluid level, so that rounding never completes too much."""


@compiled_exactly
def crew_loop(
    crews: tuple[IntArray, IntArray, IntArray, IntArray, IntArray, IntArray],
    of_teams: tuple[FloatArray, FloatArray, IntArray],
    post: FloatArray,
    moved: FloatArray,
    nearest: FloatArray,
    beside: FloatArray,
    usable: BoolArray,
    number: int,
    limits: tuple[float, float, float, float],
    prices: tuple[IntArray, FloatArray, FloatArray, FloatArray],
    places: tuple[IntArray, IntArray],
    sizes: tuple[int, int, int],
    priced: FloatArray,
    found: tuple[IntArray, IntArray, FloatArray, FloatArray, FloatArray, FloatArray],
) -> tuple[float, int]:
    """What the cheapest chain costs, and how many columns of `found` a plan below the target may have.

    Args:
        crews: By crew its replicas, [crew, replica] the team, the sort, an earlier crew without the last
            replica or -1, and which of `post` and of `moved` it has.
        of_teams: [run, team] the reciprocal of the fastest mode's seconds, the most microbatches in any
            mode on one replica, and for how many replicas one fits (`rooms_of_teams`).
        post: [run, _]: the least of any mode.
        moved: [run, _]: what ZeRO moves at least.
        nearest: [unit, sort]: the transfer before over the best link there may be; infinite without any.
        beside: [run]: what all other units take at least.
        usable: [run]: whether it may be a stage.
        number: Microbatches.
        limits: (target, most post, how much post counts, what prices take off a chain).
        prices: By crew (replicas counted, of extra, of post, of use).
        places: The units where each run begins and ends.
        sizes: (levels, places, units), see `path_loops`.
        priced: Room for as many numbers as there are pairs of a run and a crew.
        found: Arrays for as many columns; options are numbers of crews, slots those of runs.
    """
    fastest, alone, fits = of_teams
    target, most_post, weight, paid = limits
    counted, of_extra, of_post, of_use = prices
    levels, buckets, end = sizes
    options, at, costs, extras, posts, belows = found
    runs, every, nothing = len(beside), len(crews[0]), np.zeros(nearest.shape[1])
    least = np.full((runs, levels), np.inf)
    known = np.empty(every), np.empty(every), np.empty(every, dtype=np.intp)
    count = int(np.intp(0))  # not a literal: `_crews_of` would be compiled for it as well
    for run in range(runs):
        if not usable[run]:
            continue
        first, begin = places[0][run], count
        whole = first == 0 and places[1][run] == end
        count = _crews_of(
            crews,
            (fastest[run], alone[run], fits[run]),
            (post[run], moved[run], nothing if whole else nearest[first]),
            number,
            (target - beside[run], most_post, weight),
            known,
            (options, costs, extras, posts, belows),
            count,
        )
        for c in range(begin, count):
            crew = options[c]
            own = costs[c] + of_extra[crew] * extras[c] + of_post[crew] * posts[c] + of_use[crew]
            at[c], priced[c] = run, own
            if belows[c] >= levels - 1:
                least[run, counted[crew]] = min(least[run, counted[crew]], own)
    each = _limited(options[:count], at[:count], priced, belows, counted, places, levels)
    rest = least_after_slots(each, places, least, levels, buckets, end)
    chain = rest[0].min()
    if not chain < target + paid:
        return chain, 0
    ahead_of = least_before_slots(each, places, least, levels, buckets, end)
    # Where memory limits every crew of a width chains lead through as well.
    for c in range(count):
        least[at[c], counted[options[c]]] = min(least[at[c], counted[options[c]]], priced[c])
    through(least, ahead_of, rest, places)
    kept = 0
    for c in range(count):
        wide, run = counted[options[c]], at[c]
        # No limit on what may be behind is less than any.
        if not priced[c] + least[run, wide] < target + paid:
            continue
        if belows[c] < levels - 1:
            level = int(max(belows[c], 0.0))
            best = least_at(ahead_of, rest, places[0][run], places[1][run], wide, level)
            if not priced[c] + best < target + paid:
                continue
        options[kept], at[kept], costs[kept] = options[c], run, costs[c]
        extras[kept], posts[kept], belows[kept] = extras[c], posts[c], belows[c]
        kept += 1
    return chain, kept


@compiled_exactly
def _crews_of(
    crews: tuple[IntArray, IntArray, IntArray, IntArray, IntArray, IntArray],
    of_teams: tuple[FloatArray, FloatArray, IntArray],
    seconds: tuple[FloatArray, FloatArray, FloatArray],
    number: int,
    limits: tuple[float, float, float],
    known: tuple[FloatArray, FloatArray, IntArray],
    found: tuple[IntArray, FloatArray, FloatArray, FloatArray, FloatArray],
    count: int,
) -> int:
    """Add the crews of one run that fit and may be in time behind the `count` there are; how many then.

    Each of several replicas keeps one microbatch, and they are dealt as if they could be divided. `known`
    is room for the rate of each crew, that of its slowest replica, and for how many replicas all have
    room, which begin with those of a crew without the last replica. `seconds` are (post, what ZeRO moves,
    the transfer before by sort), `limits` (all in all, post, how much post counts).
    """
    wide_of, team, sort_of, without_last, post_of, moved_of = crews
    fastest, alone, fits = of_teams
    post, moved, ahead = seconds
    most, most_post, weight = limits
    rates, slowest, fitting = known
    options, costs, extras, posts, belows = found
    for crew in range(len(wide_of)):
        wide, rate, least, bits, begin = wide_of[crew], 0.0, np.inf, -1, 0
        if without_last[crew] >= 0:
            before = without_last[crew]
            rate, least, bits, begin = rates[before], slowest[before], fitting[before], wide - 1
        for r in range(begin, wide):
            rate += fastest[team[crew, r]]
            least = min(least, fastest[team[crew, r]])
            bits &= fits[team[crew, r]]
        rates[crew], slowest[crew], fitting[crew] = rate, least, bits
        if wide > number or not (bits >> min(wide, MOST_BITS)) & 1:
            continue
        own_post, more, transfer = post[post_of[crew]], moved[moved_of[crew]], ahead[sort_of[crew]]
        left, longer = most - transfer - weight * own_post, (1 + more * least) * _HAIR
        # The slowest replica, and all microbatches over all replicas: no division is needed to see that.
        if not own_post <= most_post or longer >= left * least or number * longer >= left * rate:
            continue
        longest, below = 1 / least + more, UNLIMITED
        if wide == 1:
            extra = (number - 1) * longest
            if number > alone[team[crew, 0]]:
                below = alone[team[crew, 0]]
        else:
            if more > 0:
                rate = 0.0
                for r in range(wide):
                    rate += 1 / (1 / fastest[team[crew, r]] + more)
            extra = max(number / rate * _HAIR - longest, 0.0)
        cost = longest + transfer
        if cost + extra + weight * own_post < most:
            options[count], costs[count], extras[count] = crew, cost, extra
            posts[count], belows[count] = own_post, below
            count += 1
    return count


@compiled_exactly
def _limited(
    crew: IntArray,
    run: IntArray,
    cost: FloatArray,
    most_below: FloatArray,
    counted: IntArray,
    places: tuple[IntArray, IntArray],
    levels: int,
) -> tuple[IntArray, IntArray, IntArray, IntArray, FloatArray]:
    """Those that may not be behind any number of replicas, as `least_after_slots` wants columns."""
    some = np.empty(len(crew), dtype=np.intp)
    count = 0
    for c in range(len(crew)):
        some[count] = c
        count += most_below[c] < levels - 1
    some = some[:count]
    below = np.empty(count, dtype=np.intp)
    for i in range(count):
        below[i] = int(most_below[some[i]])
    at = run[some]
    return places[0][at], places[1][at], counted[crew[some]], below, cost[some]
