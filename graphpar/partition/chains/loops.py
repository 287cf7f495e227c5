"""The loops of `columns.StagePrices` over all stages, compiled.

Index legend: `row` numbers stage options, `run` runs of units, `slot` runs between kinds of links. Arrays
are `seconds[run, mode]`, `fastest[run, team]` (the reciprocal of the fastest mode of a team),
`sample[run, mode]`, `flight[run, mode, width]`, `post[run, post_of[row]]`. `limits` are those of
`StageLimits`: (extra, post, both, fill, all, post weight); `setting` is (microbatches, samples beyond
whole ones, whether transfers stall, whether GPipe keeps all in flight).
"""

from typing import TypeVar

import numpy as np

from graphpar.partition.chains.hopeful import Entries, Plain
from graphpar.partition.jit import compiled_exactly
from graphpar.partition.types import ROUNDING
from graphpar.partition.unit_arrays import UNLIMITED, BoolArray, FloatArray, IntArray

_HAIR = 1 - 1e-12
"""A hair below a fluid level, so that rounding never completes too much."""

_FEW_KINDS = 8
"""Between more kinds of links most columns are excluded before pairs of these are looked at."""


Numbers = TypeVar("Numbers", FloatArray, IntArray)

Options = tuple[IntArray, IntArray, IntArray, IntArray, BoolArray]
"""By row: replicas, [row, replica] modes, its `post`, its `moved`, [row, kind] the links there may be."""

Prices = tuple[FloatArray, FloatArray, FloatArray, FloatArray]
"""`seconds`, `flight`, `post`, and [_, run] what ZeRO moves for every microbatch."""

Found = tuple[IntArray, IntArray, FloatArray, FloatArray, FloatArray, FloatArray]
"""Arrays of columns: option, slot, cost, extra, post, most below."""


@compiled_exactly
def relaxed_loop(
    crews: tuple[IntArray, IntArray, IntArray, IntArray],
    options: Options,
    prices: Prices,
    fastest: FloatArray,
    runs: tuple[IntArray, IntArray, IntArray, IntArray],
    usable: BoolArray,
    links: tuple[FloatArray, FloatArray],
    transfers: tuple[float, float],
    beside: FloatArray,
    setting: tuple[int, int, bool, bool],
    simple: int,
    spread: bool,
    whole: bool,
    hopeful: Plain,
    limits: tuple[float, float, float, float, float, float],
    found: Found,
) -> int:
    """Fill `found` with the columns that may be within limits, at lower bounds; how many, -1: no room.

    `runs` are (first unit, last, first slot, kinds of links behind), of which the `usable` ones may be
    stages; columns come sorted by slot. `links` are [kind, unit] a transfer, and how much longer
    it takes than whoever is behind it was taken to wait when `hopeful` was found; no more than the first
    of `transfers` is waited for, and overlapped ones take so many times as long as the second. `crews`
    are sets of devices: (rows by crew, where each begins, its replicas, [crew, replica] whom `fastest`
    is for), narrow ones first. At `simple` 1 several replicas run all units or nothing, at 2 there is
    one stage. With `spread` each of several replicas has only one microbatch to keep. With `whole` a
    slot is a run, nothing is said of what is behind it, and `hopeful` lists crews, otherwise rows; all
    are looked at where no list begins, not even one more.
    """
    first_of, last_of, begin_of, behind_of = runs
    list_runs, list_begin, listed, allowed = hopeful
    before_s, number_of_rows, widest = links[0], len(options[0]), options[1].shape[1]
    some, units = len(list_begin) > 0, before_s.shape[1] - 1
    scratch = np.empty(widest), np.empty(widest)
    rows = np.empty(number_of_rows, dtype=np.intp), np.empty(number_of_rows, dtype=np.intp)
    # Not a literal: `_add_columns` would be compiled for it as well.
    count, of_crews = int(np.intp(0)), whole or not some
    for entry in range(len(list_runs) if some else len(first_of)):
        run = list_runs[entry] if some else entry
        first, last = first_of[run], last_of[run]
        if not usable[run] or (simple == 2 and last - first < units):
            continue
        if begin_of[run] == begin_of[run + 1]:
            continue  # between no links at all
        nearest_s, longest_s = 0.0, 0.0
        if first > 0:
            nearest_s, longest_s = before_s[1:, first].min(), before_s[1:, first].max()
        if last < units and not whole:
            longest_s += before_s[1:, last].max()
        part = (list_begin[entry], list_begin[entry + 1]) if some else (0, len(crews[2]))
        if of_crews:
            number = _rows_of_crews(
                (listed, part[0], part[1]),
                crews,
                fastest[run],
                simple > 0 and last - first < units,
                (nearest_s, min(longest_s / 2, transfers[0])),
                (min(limits[3], limits[4]) - beside[run], limits[4] - beside[run]),
                setting[0],
                rows,
            )
        else:
            number = part[1] - part[0]
            for i in range(number):
                rows[0][i], rows[1][i] = listed[part[0] + i], part[0] + i
        low = count
        count = _add_columns(
            (run, first, last, begin_of[run], behind_of[run]),
            rows,
            number,
            options,
            prices,
            links,
            transfers,
            beside[run],
            setting,
            (spread, whole, some),
            allowed,
            limits,
            scratch,
            found,
            count,
        )
        if count < 0:
            return -1
        if not whole:
            _sort_by_slot(found, low, count, begin_of[run], begin_of[run + 1])
    return count


@compiled_exactly
def _rows_of_crews(
    part: tuple[IntArray, int, int],
    crews: tuple[IntArray, IntArray, IntArray, IntArray],
    fastest: FloatArray,
    alone: bool,
    transfers: tuple[float, float],
    most: tuple[float, float],
    number: int,
    rows: tuple[IntArray, IntArray],
) -> int:
    """Fill in the rows of the crews of a part of a list, or of all, that may be in time; how many.

    With each comes its place in the list. `transfers` are the least before and the most that is waited
    for, `most` what there is for one microbatch, and for all. Nobody has more replicas than microbatches.
    """
    listed, low, high = part
    row_of, begin, wide_of, team = crews
    count = 0
    for place in range(low, high):
        crew = listed[place] if len(listed) > 0 else place
        wide = wide_of[crew]
        if wide > number or (alone and wide > 1):
            break
        rate, least = 0.0, np.inf
        for r in range(wide):
            rate += fastest[team[crew, r]]
            least = min(least, fastest[team[crew, r]])
        # All microbatches over all replicas, if they never wait: no division is needed to see that.
        if number * _HAIR >= (most[1] - transfers[0] + transfers[1]) * rate:
            continue
        if (most[0] - transfers[0]) * least <= _HAIR:
            continue
        for at in range(begin[crew], begin[crew + 1]):
            rows[0][count], rows[1][count] = row_of[at], place
            count += 1
    return count


@compiled_exactly
def _add_columns(
    place: tuple[int, int, int, int, int],
    rows: tuple[IntArray, IntArray],
    number_of_rows: int,
    options: Options,
    prices: Prices,
    links: tuple[FloatArray, FloatArray],
    transfers: tuple[float, float],
    others: float,
    setting: tuple[int, int, bool, bool],
    how: tuple[bool, bool, bool],
    allowed: Entries,
    limits: tuple[float, float, float, float, float, float],
    scratch: tuple[FloatArray, FloatArray],
    found: Found,
    count: int,
) -> int:
    """Those of one run behind the `count` that are there, how many then, -1: no room.

    `place` is (run, first unit, last, first slot, kinds behind); `rows` come with entries in `allowed`;
    all units beside the run take `others`; `how` is (spread, whole, whether `allowed` is asked).
    """
    run, first, last, slot, behind = place
    number, _, stalls, gpipe = setting
    spread, whole, asks = how
    most_extra, most_post, most_both, whole_fill, whole_all, weight = limits
    width, staff, post_of, moved_row, near = options
    seconds, flight, post, moved = prices
    before_s, beyond_s = links
    times, rates = scratch
    chosen, places, costs, extras, posts, belows = found
    most_fill, most_all, most_wait = whole_fill - others, whole_all - others, transfers[0]
    kinds, inside = len(before_s), int(first > 0)
    goes_on = int(last < before_s.shape[1] - 1 and not whole)
    early = kinds > _FEW_KINDS
    for i in range(number_of_rows):
        row, entry = rows[0][i], rows[1][i]
        own_post, wide = post[run, post_of[row]], width[row]
        if not own_post <= most_post:
            continue
        extra_move = moved[moved_row[row], run] if moved_row[row] >= 0 else 0.0
        longest, room, later = 0.0, UNLIMITED, weight * own_post
        for r in range(wide):
            times[r] = seconds[run, staff[row, r]] + extra_move
            longest = max(longest, times[r])
            room = min(room, flight[run, staff[row, r], wide])
        if room < 1 or not (longest < most_fill and longest + later < most_all):
            continue
        least = 0.0
        if early:
            # What it has of extra if it never waits: for most pairs of links that is answer enough.
            least = (number - 1) * longest
            if wide > 1:
                rate = 0.0
                for r in range(wide):
                    rate += 1 / max(times[r], 1e-300)
                least = max(number / rate * _HAIR * _HAIR - longest, 0.0)
        for before in range(inside, kinds if inside else 1):
            if not near[row, before]:
                continue
            ahead_s = before_s[before, first]
            cost = longest + ahead_s
            if not (cost < most_fill and cost + least + later < most_all):
                continue
            if early and asks and not _is_allowed(entry, cost, least, later, allowed):
                continue
            for after in range(goes_on, kinds if goes_on else 1):
                if not near[row, after]:
                    continue
                stall = (min(ahead_s, most_wait) + min(before_s[after, last], most_wait)) / 2
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
                    extra = max(extra, transfers[1] * ahead_s)
                if not (
                    extra <= most_extra
                    and extra + own_post <= most_both
                    and cost + extra + later < most_all
                ):
                    continue
                beyond = cost + beyond_s[after, last]
                if asks and not _is_allowed(entry, beyond, extra, later, allowed):
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
                if count == len(chosen):
                    return -1
                chosen[count], costs[count], extras[count] = row, cost, extra
                places[count] = slot + (before - inside) * behind + after - goes_on
                if whole:
                    places[count] = slot
                posts[count], belows[count] = own_post, below
                count += 1
    return count


@compiled_exactly
def _is_allowed(entry: int, cost: float, extra: float, later: float, allowed: Entries) -> bool:
    """Whether a column is in a chain below the target, as far as those that stand for it say."""
    own_s, begins, least_s, most_s, all_s = allowed
    counted = max(extra, own_s[entry])
    cost += later + extra - counted
    for window in range(begins[entry], begins[entry + 1]):
        if counted <= most_s[window] and cost + max(counted, least_s[window]) < all_s[window]:
            return True
    return False


@compiled_exactly
def _sort_by_slot(found: Found, low: int, high: int, first: int, until: int) -> None:
    """Sort the columns of one run, and leave those of a slot as they come."""
    places = found[1]
    sorted_already = True
    for c in range(low + 1, high):
        sorted_already &= places[c] >= places[c - 1]
    if sorted_already:
        return
    begins = np.zeros(until - first + 1, dtype=np.intp)
    for c in range(low, high):
        begins[places[c] - first + 1] += 1
    for slot in range(until - first):
        begins[slot + 1] += begins[slot]
    order = np.empty(high - low, dtype=np.intp)
    for c in range(low, high):
        slot = places[c] - first
        order[begins[slot]] = c
        begins[slot] += 1
    options, _, costs, extras, posts, belows = found
    _reorder(options, order, low)
    _reorder(places, order, low)
    _reorder(costs, order, low)
    _reorder(extras, order, low)
    _reorder(posts, order, low)
    _reorder(belows, order, low)


@compiled_exactly
def _reorder(values: Numbers, order: IntArray, low: int) -> None:
    """Put the values that `order` numbers in that order, from `low` on."""
    # Assigning to a part of an array at once takes seconds to compile, for the words of its errors.
    before = np.empty(len(order), dtype=values.dtype)
    for i in range(len(order)):
        before[i] = values[order[i]]
    for i in range(len(order)):
        values[low + i] = before[i]


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
