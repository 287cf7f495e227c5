"""The loops of `chain_columns.StagePrices` over all stages, compiled.

Index legend: `row` numbers stage options, `run` runs of units, `slot` runs between kinds of links. Arrays
are `seconds[run, mode]`, `fastest[run, team]` (the reciprocal of the fastest mode of a team),
`sample[run, mode]`, `flight[run, mode, width]`, `post[run, row]`. `limits` are those of `StageLimits`:
(extra, post, both, fill, all, post weight); `setting` is (microbatches, samples beyond whole ones,
whether transfers stall, whether GPipe keeps all in flight, whether any stage holds a microbatch).
"""

import numpy as np

from graphpar.partition.jit import compiled_exactly
from graphpar.partition.unit_arrays import UNLIMITED, BoolArray, FloatArray, IntArray

_HAIR = 1 - 1e-12
"""A hair below a fluid level, so that rounding never completes too much."""


@compiled_exactly
def relaxed_loop(
    crews: tuple[IntArray, IntArray, IntArray, IntArray],
    staff: IntArray,
    seconds: FloatArray,
    fastest: FloatArray,
    flight: FloatArray,
    post: FloatArray,
    moved: FloatArray,
    moved_row: IntArray,
    near: BoolArray,
    slots: tuple[IntArray, IntArray, IntArray],
    ahead: FloatArray,
    beside: FloatArray,
    wait: FloatArray,
    cut: FloatArray,
    setting: tuple[int, int, bool, bool, bool],
    simple: int,
    spread: bool,
    hopeful: tuple[IntArray, IntArray, IntArray],
    limits: tuple[float, float, float, float, float, float],
    found: tuple[IntArray, IntArray, FloatArray, FloatArray, FloatArray, FloatArray],
) -> int:
    """Fill `found` with the columns that may be within limits, at lower bounds; how many, -1: no room.

    `slots` are (run, kind before, kind after) of each; columns come sorted by slot. `crews` are sets of
    devices: (rows by crew, where each begins, its replicas, [crew, replica] whom `fastest` is for),
    narrow ones first. At `simple` 1 several replicas run all units or nothing, at 2 there is one stage.
    With `spread` each of several replicas has only one microbatch to keep. `hopeful` are the crews that
    are looked at: the list of each slot, where lists begin, numbers of crews, increasing; all if empty.
    """
    run_of, before, after = slots
    row_of, begin, wide_of, team = crews
    number, _, stalls, gpipe, keeps = setting
    most_extra, most_post, most_both, whole_fill, whole_all, weight = limits
    options, places, costs, extras, posts, belows = found
    times, rates = np.empty(staff.shape[1]), np.empty(staff.shape[1])
    list_of, list_begin, crew_at = hopeful
    count, some, every = 0, len(list_begin) > 0, len(wide_of)
    for slot in range(len(run_of)):
        run, cost_ahead, stall = run_of[slot], ahead[slot], wait[slot]
        most_fill, most_all = whole_fill - beside[run], whole_all - beside[run]
        whole = before[slot] == 0 and after[slot] == 0
        if simple == 2 and not whole:
            continue
        first_crew = list_begin[list_of[slot]] if some else 0
        for place_of_crew in range(first_crew, list_begin[list_of[slot] + 1] if some else every):
            crew = crew_at[place_of_crew] if some else place_of_crew
            wide = wide_of[crew]
            if simple and wide > 1 and not whole:
                break
            if wide > number:
                continue
            first = row_of[begin[crew]]
            if not (near[first, before[slot]] and near[first, after[slot]]):
                continue
            rate, least = 0.0, np.inf
            for r in range(wide):
                rate += fastest[run, team[crew, r]]
                least = min(least, fastest[run, team[crew, r]])
            # All microbatches over all replicas, if they never wait: no division is needed to see that.
            if number * _HAIR >= (most_all - cost_ahead + stall) * rate:
                continue
            if (min(most_fill, most_all) - cost_ahead) * least <= _HAIR:
                continue
            for place in range(begin[crew], begin[crew + 1]):
                row = row_of[place]
                own_post = post[run, row]
                if not own_post <= most_post:
                    continue
                extra_move = moved[moved_row[row], run] if moved_row[row] >= 0 else 0.0
                longest, room = 0.0, UNLIMITED
                for r in range(wide):
                    times[r] = seconds[run, staff[row, r]] + extra_move
                    longest = max(longest, times[r])
                    room = min(room, flight[run, staff[row, r], wide])
                if room < 1 and keeps:
                    continue
                cost = longest + cost_ahead
                if not (cost < most_fill and cost + weight * own_post < most_all):
                    continue
                if wide == 1:
                    extra, end = (number - 1) * (longest + stall), 0.0
                else:
                    rate = 0.0
                    for r in range(wide):
                        rates[r] = 1 / max(times[r] + stall, 1e-300)
                        rate += rates[r]
                    offset = 0.0
                    for r in range(wide):
                        offset += 1 - times[r] * rates[r]
                    end = (number - offset) / rate * _HAIR
                    extra = max(end - longest, 0.0)
                if not stalls:
                    extra = max(extra, cut[slot])
                if not (
                    extra <= most_extra
                    and extra + own_post <= most_both
                    and cost + extra + weight * own_post < most_all
                ):
                    continue
                below = UNLIMITED
                for r in range(wide):
                    most = flight[run, staff[row, r], wide]
                    share = float(number)
                    if wide > 1 and spread:
                        share = 1.0
                    elif wide > 1:
                        share = max(np.floor((end - times[r]) * rates[r] * _HAIR + 1), 1.0)
                    if share > most:
                        below = min(below, -1.0 if gpipe else wide * most)
                if below < wide:
                    continue
                if count == len(options):
                    return -1
                options[count], places[count] = row, slot
                costs[count], extras[count] = cost, extra
                posts[count], belows[count] = own_post, below
                count += 1
    return count


@compiled_exactly
def exact_loop(
    option: IntArray,
    slot: IntArray,
    run: IntArray,
    width: IntArray,
    staff: IntArray,
    seconds: FloatArray,
    sample: FloatArray,
    flight: FloatArray,
    moved: FloatArray,
    moved_row: IntArray,
    wait: FloatArray,
    cut: FloatArray,
    setting: tuple[int, int, bool, bool, bool],
    extra: FloatArray,
    below: FloatArray,
) -> None:
    """Deal microbatches one by one; sets extra (infinite where a replica has none) and below."""
    number, larger, stalls, gpipe, _ = setting
    widest = staff.shape[1]
    times, periods, counts = np.empty(widest), np.empty(widest), np.empty(widest)
    for c in range(len(option)):
        row, wide, stall = option[c], width[option[c]], wait[slot[c]]
        extra_move = moved[moved_row[row], run[c]] if moved_row[row] >= 0 else 0.0
        longest, least, slowest, alike = 0.0, np.inf, 0.0, True
        for r in range(wide):
            times[r] = seconds[run[c], staff[row, r]] + extra_move
            periods[r] = times[r] + stall
            longest, slowest = max(longest, times[r]), max(slowest, periods[r])
            least = min(least, periods[r])
            alike = alike and times[r] == times[0]
        if wide == 1:
            counts[0] = number
            worst = (number - 1) * periods[0]
        else:
            _deal(times, periods, counts, wide, number, least > 0)
            worst, fewest = -np.inf, np.inf
            for r in range(wide):
                end = times[r] + (counts[r] - 1) * periods[r]
                if larger:
                    share = larger * counts[r] / number
                    own = float(-((r - larger) // wide)) if alike else np.ceil(share - 1e-9)
                    more = sample[run[c], staff[row, r]]
                    end += (own - share) * (more if alike else max(more, 0.0))
                worst, fewest = max(worst, end), min(fewest, counts[r])
            worst -= longest
            if fewest < 1 or (least <= 0 and slowest > 0):
                worst = np.inf
        if not stalls:
            worst = max(worst, cut[slot[c]])
        limit = UNLIMITED
        for r in range(wide):
            most = flight[run[c], staff[row, r], wide]
            if counts[r] > most:
                limit = min(limit, -1.0 if gpipe else wide * most)
        extra[c], below[c] = worst, limit


@compiled_exactly
def _deal(
    times: FloatArray, periods: FloatArray, counts: FloatArray, wide: int, number: int, usable: bool
) -> None:
    """`stage_costs._deal_arrays` for one stage."""
    rate = offset = 0.0
    for r in range(wide):
        start, each = (times[r], periods[r]) if usable else (1.0, 1.0)
        rate += 1 / each
        offset += 1 - start / each
    level = (number - offset) / rate
    missing = float(number)
    for r in range(wide):
        start, each = (times[r], periods[r]) if usable else (1.0, 1.0)
        counts[r] = max(np.floor((level * _HAIR - start) / each + 1), 0.0)
        missing -= counts[r]
    while missing > 0:
        first, soonest = 0, np.inf
        for r in range(wide):
            start, each = (times[r], periods[r]) if usable else (1.0, 1.0)
            end = start + counts[r] * each
            if end < soonest or (end == soonest and counts[r] < counts[first]):
                first, soonest = r, end
        counts[first] += 1
        missing -= 1
