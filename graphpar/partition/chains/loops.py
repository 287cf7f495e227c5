"""The loops of `columns.StagePrices` over all stages, compiled.

Index legend: `row` numbers stage options, `run` runs of units, `slot` runs between kinds of links. Arrays
are `seconds[run, mode]`, `fastest[run, team]` (the reciprocal of the fastest mode of a team),
`sample[run, mode]`, `flight[run, mode, width]`, `post[run, post_of[row]]`. `limits` are those of
`StageLimits`: (extra, post, both, fill, all, post weight); `setting` is (microbatches, samples beyond
whole ones, whether transfers stall, whether GPipe keeps all in flight).
"""

import numpy as np

from graphpar.partition.jit import compiled_exactly
from graphpar.partition.types import ROUNDING
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
    post_of: IntArray,
    moved: FloatArray,
    moved_row: IntArray,
    near: BoolArray,
    runs: tuple[IntArray, IntArray, IntArray, IntArray],
    usable: BoolArray,
    before_s: FloatArray,
    transfers: tuple[float, float],
    beside: FloatArray,
    setting: tuple[int, int, bool, bool],
    simple: int,
    spread: bool,
    hopeful: tuple[IntArray, IntArray, IntArray, bool],
    limits: tuple[float, float, float, float, float, float],
    found: tuple[IntArray, IntArray, FloatArray, FloatArray, FloatArray, FloatArray],
) -> int:
    """Fill `found` with the columns that may be within limits, at lower bounds; how many, -1: no room.

    `runs` are (first unit, last, first slot, kinds of links behind), of which the `usable` ones may be
    stages; columns come sorted by slot. `before_s[kind, unit]` is a transfer; no more than the first of
    `transfers` is waited for, and overlapped ones take so many times as long as the second. `crews` are
    sets of devices: (rows by crew, where each begins, its replicas, [crew, replica] whom `fastest` is
    for), narrow ones first. At `simple` 1 several replicas run all units or nothing, at 2 there is one
    stage. With `spread` each of several replicas has only one microbatch to keep. `hopeful` are the crews
    that are looked at: increasing slots, or runs, where their lists begin (and one more entry), numbers
    of crews, increasing, and whether runs were meant; all where no list begins, not even that entry.
    """
    first_of, last_of, begin_of, behind_of = runs
    most_wait, times_cut = transfers
    slots, list_begin, crew_at, by_run = hopeful
    some, units = len(list_begin) > 0, before_s.shape[1] - 1
    rates = np.empty(staff.shape[1]), np.empty(staff.shape[1])
    every = len(crews[2])
    alive = np.empty(every, dtype=np.intp), np.empty(every), np.empty(every)
    # Not a literal: `_add_columns` would be compiled for it as well.
    count, run = int(np.intp(0)), 0
    for entry in range(len(slots) if some else len(first_of)):
        if by_run:
            run = slots[entry] if some else entry
            low, high = begin_of[run], begin_of[run + 1]
        else:
            low, high = slots[entry], slots[entry] + 1
            while begin_of[run + 1] <= low:
                run += 1
        if not usable[run] or (simple == 2 and last_of[run] - first_of[run] < units):
            continue
        first, last = first_of[run], last_of[run]
        part = (list_begin[entry], list_begin[entry + 1]) if some else (0, every)
        whole = first == 0 and last == units
        number = _alive(
            run, simple > 0 and not whole, (crew_at, *part), crews, fastest, setting[0], alive
        )
        most = min(limits[3], limits[4]) - beside[run], limits[4] - beside[run]
        if low < high and by_run:
            nearest_s = before_s[1:, first].min() if first > 0 else 0.0
            longest_s = before_s[1:, last].max() if last < units else 0.0
            if first > 0:
                longest_s += before_s[1:, first].max()
            number = _in_time(nearest_s, min(longest_s / 2, most_wait), most, setting[0], alive, number)
        if number == 0:
            continue
        for slot in range(low, high):
            place = slot - begin_of[run]
            before = place // behind_of[run] + (1 if first > 0 else 0)
            after = place % behind_of[run] + (1 if last < units else 0)
            ahead_s, behind_s = before_s[before, first], before_s[after, last]
            stall_s = (min(ahead_s, most_wait) + min(behind_s, most_wait)) / 2
            count = _add_columns(
                (slot, run, before, after),
                (ahead_s, stall_s, times_cut * ahead_s, beside[run]),
                (alive, number),
                crews,
                staff,
                seconds,
                fastest,
                flight,
                post,
                post_of,
                moved,
                moved_row,
                near,
                setting,
                spread,
                limits,
                rates,
                found,
                count,
            )
            if count < 0:
                return -1
    return count


Alive = tuple[IntArray, FloatArray, FloatArray]
"""Numbers of crews; the sum and the least of the reciprocals of their replicas' fastest seconds."""


@compiled_exactly
def _alive(
    run: int,
    alone: bool,
    listed: tuple[IntArray, int, int],
    crews: tuple[IntArray, IntArray, IntArray, IntArray],
    fastest: FloatArray,
    number: int,
    alive: Alive,
) -> int:
    """Fill in the crews of a part of a list, or of all, that have no more replicas than there may be."""
    crew_at, begin, end = listed
    _, _, wide_of, team = crews
    count = 0
    for place in range(begin, end):
        crew = crew_at[place] if len(crew_at) > 0 else place
        wide = wide_of[crew]
        if wide > number or (alone and wide > 1):
            break
        rate, least = 0.0, np.inf
        for r in range(wide):
            rate += fastest[run, team[crew, r]]
            least = min(least, fastest[run, team[crew, r]])
        alive[0][count], alive[1][count], alive[2][count] = crew, rate, least
        count += 1
    return count


@compiled_exactly
def _in_time(
    ahead_s: float, stall_s: float, most: tuple[float, float], number: int, alive: Alive, count: int
) -> int:
    """Keep the crews whose microbatches may be in time with such transfers; how many there are.

    `most` is what there is for one microbatch, and for all.
    """
    crews, rates, leasts = alive
    kept = 0
    for i in range(count):
        if _is_late(ahead_s, stall_s, most, number, rates[i], leasts[i]):
            continue
        crews[kept], rates[kept], leasts[kept] = crews[i], rates[i], leasts[i]
        kept += 1
    return kept


@compiled_exactly
def _is_late(
    ahead_s: float, stall_s: float, most: tuple[float, float], number: int, rate: float, least: float
) -> bool:
    # All microbatches over all replicas, if they never wait: no division is needed to see that.
    if number * _HAIR >= (most[1] - ahead_s + stall_s) * rate:
        return True
    return (most[0] - ahead_s) * least <= _HAIR


@compiled_exactly
def _add_columns(
    place: tuple[int, int, int, int],
    of_place: tuple[float, float, float, float],
    listed: tuple[Alive, int],
    crews: tuple[IntArray, IntArray, IntArray, IntArray],
    staff: IntArray,
    seconds: FloatArray,
    fastest: FloatArray,
    flight: FloatArray,
    post: FloatArray,
    post_of: IntArray,
    moved: FloatArray,
    moved_row: IntArray,
    near: BoolArray,
    setting: tuple[int, int, bool, bool],
    spread: bool,
    limits: tuple[float, float, float, float, float, float],
    scratch: tuple[FloatArray, FloatArray],
    found: tuple[IntArray, IntArray, FloatArray, FloatArray, FloatArray, FloatArray],
    count: int,
) -> int:
    """Those of one slot behind the `count` that are there, how many then, -1: no room.

    `place` is (slot, run, kind before, kind after), `of_place` the seconds of (the transfer before, what
    is waited, the overlapped transfers, all units beside); so many crews as are `listed`.
    """
    slot, run, before, after = place
    cost_ahead, stall, cut, others = of_place
    (crew_at, rate_of, least_of), listed_crews = listed
    row_of, begin, wide_of, _ = crews
    number, _, stalls, gpipe = setting
    most_extra, most_post, most_both, whole_fill, whole_all, weight = limits
    options, places, costs, extras, posts, belows = found
    times, rates = scratch
    most_fill, most_all = whole_fill - others, whole_all - others
    both = min(most_fill, most_all), most_all
    for i in range(listed_crews):
        crew = crew_at[i]
        wide = wide_of[crew]
        first = row_of[begin[crew]]
        if not (near[first, before] and near[first, after]):
            continue
        if _is_late(cost_ahead, stall, both, number, rate_of[i], least_of[i]):
            continue
        for at in range(begin[crew], begin[crew + 1]):
            row = row_of[at]
            own_post = post[run, post_of[row]]
            if not own_post <= most_post:
                continue
            extra_move = moved[moved_row[row], run] if moved_row[row] >= 0 else 0.0
            longest, room = 0.0, UNLIMITED
            for r in range(wide):
                times[r] = seconds[run, staff[row, r]] + extra_move
                longest = max(longest, times[r])
                room = min(room, flight[run, staff[row, r], wide])
            if room < 1:
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
                extra = max(extra, cut)
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
    setting: tuple[int, int, bool, bool],
    extra: FloatArray,
    below: FloatArray,
) -> None:
    """Deal microbatches one by one; sets extra (infinite where a replica has none) and below."""
    number, larger, stalls, gpipe = setting
    widest = staff.shape[1]
    times, periods, counts = np.empty(widest), np.empty(widest), np.empty(widest)
    for c in range(len(option)):
        row, wide, stall = option[c], width[option[c]], wait[c]
        extra_move = moved[moved_row[row], run[c]] if moved_row[row] >= 0 else 0.0
        longest, shortest, least, slowest = 0.0, np.inf, np.inf, 0.0
        for r in range(wide):
            times[r] = seconds[run[c], staff[row, r]] + extra_move
            periods[r] = times[r] + stall
            longest, slowest = max(longest, times[r]), max(slowest, periods[r])
            shortest, least = min(shortest, times[r]), min(least, periods[r])
        alike = longest - shortest <= ROUNDING * longest
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
            worst = max(worst, cut[c])
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
