"""Every stage that one pipeline over few devices may have, priced in two steps.

A *column* is a stage option on a *slot*: a run of units with the kinds of links at its two boundaries
(link kind 0 is the end of the pipeline, where nothing is sent). There may be millions, of which a proof
leaves some thousands. So all of them get a lower bound first (`StagePrices.relaxed`), in which
microbatches are dealt to unlike replicas as if they could be divided:

    m = sum_r (1 + (E - t_r) / p_r)   at the moment E when all end,   extra >= E - max_r t_r

and only what is left after pruning is dealt one by one (`StagePrices.exact`).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np
import numpy.typing as npt

from graphpar.cost import CostTable
from graphpar.partition.chains.crew_loops import crew_loop
from graphpar.partition.chains.hopeful import ANY, Hopeful
from graphpar.partition.chains.loops import exact_loop, relaxed_loop
from graphpar.partition.flights import flights, rooms_of_teams
from graphpar.partition.option_rows import OptionRows
from graphpar.partition.slots import SlotArrays, Slots, positions
from graphpar.partition.stage_costs import (
    StageLimits,
    boundary_seconds,
    most_below,
    stage_extra,
)
from graphpar.partition.unit_arrays import (
    Cache,
    FloatArray,
    IntArray,
    Ranges,
    Setting,
    UnitArrays,
)

BoolArray = npt.NDArray[np.bool_]


_AT_ONCE = 400_000
"""Pairs of an option and a run that are looked at in one go: what fits into a processor's cache."""


@dataclass(frozen=True, eq=False)
class Columns:
    """One entry per column: option, slot, seconds, and the most replicas from here on for its memory.

    `cost_s` is one microbatch with the transfer before; `extra_s` what the further ones add if this stage
    is the busiest.
    """

    option: IntArray
    slot: IntArray
    cost_s: FloatArray
    extra_s: FloatArray
    post_s: FloatArray
    most_below: FloatArray

    def pick(self, index: "IntArray | BoolArray") -> "Columns":
        """Only some columns."""
        some = np.flatnonzero(index) if index.dtype == np.bool_ else index
        return Columns(
            self.option.take(some),
            self.slot.take(some),
            self.cost_s.take(some),
            self.extra_s.take(some),
            self.post_s.take(some),
            self.most_below.take(some),
        )

    def __len__(self) -> int:
        return len(self.option)


def no_columns() -> Columns:
    """None at all."""
    none, nothing = np.zeros(0, dtype=np.intp), np.zeros(0)
    return Columns(none, none, nothing, nothing, nothing, nothing)


class StagePrices:
    """The stages of a pipeline in one setting."""

    def __init__(
        self,
        table: CostTable,
        rows: OptionRows,
        setting: Setting,
        runs: Ranges,
        cache: Cache,
        *,
        loops: bool = False,
        allowed: BoolArray | None = None,
    ) -> None:
        """With loops only the `allowed` runs may be a stage."""
        self.loops = loops
        self._usable = np.ones(len(runs.first), np.bool_) if allowed is None else allowed
        self.rows = rows
        self.setting = setting
        self._stalls = table.training and setting.schedule == "1f1b"
        self._units = UnitArrays(table, setting, runs, cache)
        if setting.size not in rows.by_size:
            seconds = boundary_seconds(table, setting, rows.kinds, cache)
            merged = rows.merged(seconds) if loops else rows
            if merged is not rows:
                seconds = boundary_seconds(table, setting, merged.kinds, cache)
            rows.by_size[setting.size] = merged, seconds
        rows, self.before_s = rows.by_size[setting.size]
        self.rows = rows
        self._most_wait_s = np.inf if self._stalls else table.handling_s
        if not loops:
            self._slots_of_run = positions(rows.slots.every.run, len(runs.first))
            self._flight = self._flights()
            self._seconds = np.ascontiguousarray(self._seconds_by_run.T)
            self._sample = np.ascontiguousarray(self._sample_by_run.T)
            return
        self._fastest_by_run = self._known("fastest", self._fastest, setting.size)
        self._beside = self._known("beside", self._fastest_beside, setting.size)

    # Most settings are excluded by bounds on teams before any mode is looked at.

    @cached_property
    def _seconds_by_run(self) -> FloatArray:
        """[run, mode]"""
        return self._known("seconds", self._mode_seconds, self.setting.size)

    @cached_property
    def _sample_by_run(self) -> FloatArray:
        """[run, mode]: what one sample more takes."""
        return self._known(
            "sample", self._sample_seconds, self.setting.samples // self.setting.microbatches
        )

    @cached_property
    def _flight_by_run(self) -> FloatArray:
        """[run, mode, width]: the most microbatches."""
        return flights(self._units, self.rows, self._largest)

    @property
    def _rooms(self) -> tuple[FloatArray, IntArray]:
        return rooms_of_teams(self._units, self.rows, self._largest)

    @property
    def _largest(self) -> int:
        """Samples of the largest microbatch."""
        return -(-self.setting.samples // self.setting.microbatches)

    @cached_property
    def _before(self) -> FloatArray:
        """[slot]: the transfer before."""
        return self._before_at(self.rows.slots.every)

    def _before_at(self, slots: SlotArrays) -> FloatArray:
        return self.before_s[slots.before, slots.first]

    @cached_property
    def _waits(self) -> FloatArray:
        """[slot]: what transfers add to the period of a stage."""
        return self._waits_at(self.rows.slots.every)

    def _waits_at(self, slots: SlotArrays) -> FloatArray:
        most_s = self._most_wait_s
        if most_s <= 0:
            return np.zeros(len(slots.run))
        before, behind = self._before_at(slots), self.before_s[slots.after, slots.last]
        found: FloatArray = (np.minimum(before, most_s) + np.minimum(behind, most_s)) / 2
        return found

    @cached_property
    def _wait_some(self) -> bool:
        """Whether any transfer adds to the period of a stage."""
        return bool(self._waits.any())

    def _known(self, name: str, make: Callable[[], FloatArray], size: float) -> FloatArray:
        """What settings with microbatches of one size share."""
        key = (name, self.rows.key, size)
        if key not in self._units.cache:
            self._units.cache[key] = make()
        return self._units.cache[key]

    def _mode_seconds(self) -> FloatArray:
        """[run, mode]"""
        return self._units.seconds_in(self.rows.modes)

    def _sample_seconds(self) -> FloatArray:
        """[run, mode]"""
        return self._units.sample_seconds_in(self.rows.modes)

    def _fastest(self) -> FloatArray:
        """[run, team]: the reciprocal of the fastest mode."""
        team_of = self.rows.team_of_mode
        seconds = self._seconds_by_run
        quickest = [seconds[:, team_of == i].min(axis=1) for i in range(self.rows.num_teams)]
        found: FloatArray = 1 / np.maximum(np.stack(quickest, axis=1), 1e-300)
        return found

    def _flights(self) -> FloatArray:
        """[mode, width, run]: the most microbatches whose saved values fit; -1 where nothing does."""
        rows, widths = self.rows, self.rows.widths
        found = np.full((len(rows.modes), widths[-1] + 1, len(rows.post_by_run)), -1.0)
        for i, mode in enumerate(rows.modes):
            found[i, widths] = self._units.in_flight_by_width(mode, widths)
        return found

    def _fastest_beside(self) -> FloatArray:
        """[run]: what all units beside it take at least, each in its fastest mode.

        A hair less, so that rounding never excludes what is just as good.
        """
        least = self._units.mode_seconds(self.rows.modes).min(axis=1)
        upto, runs = np.concatenate([[0.0], np.cumsum(least)]), self._units.runs
        found: FloatArray = (upto[runs.first] + (upto[-1] - upto[runs.last])) * (1 - 1e-12)
        return found

    @property
    def num_variables(self) -> int:
        """Columns before anything is pruned."""
        usable = int((self.rows.width <= self.setting.microbatches).sum())
        return usable * len(self.rows.slots)

    def ideal(
        self,
        limits: StageLimits,
        prices: tuple[IntArray, FloatArray, FloatArray, FloatArray],
        paid: float,
        places: tuple[IntArray, IntArray],
        sizes: tuple[int, int, int],
    ) -> tuple[float, Columns]:
        """The cheapest chain of crews at some prices, and columns that plans below the target may have.

        A column on a run stands for those of a crew in all its modes between all kinds of links; needs
        loops. Each replica is as fast as in its fastest mode, the link before the best that the crew may
        have, post is the least of any mode, and memory that of the mode with most room, where each of
        several replicas keeps one microbatch. A column of any mode has no less cost, and no less cost and
        extra together, so none is cheaper in the relaxation, under either schedule (`relaxed`). Here
        `option` numbers crews and `slot` is one of `OptionRows.whole_slots`. For the arguments see
        `crew_loop`. Arrays may be used again by the next call.
        """
        rows = self.rows
        (post, post_of), (moved, moved_of) = rows.least_post, rows.least_moved
        chain_s, count = crew_loop(
            (*rows.crews[2:], rows.sorts[1], rows.without_last, post_of, moved_of),
            (self._fastest_by_run, *self._rooms),
            post,
            moved,
            self._nearest,
            self._beside,
            self._usable,
            self.setting.microbatches,
            (limits.all_s, limits.post_s, limits.post_weight, paid),
            prices,
            places,
            sizes,
            rows.scratch,
            rows.room,
        )
        return chain_s, self._filled(count)

    @cached_property
    def _nearest(self) -> FloatArray:
        """[unit, sort]: the transfer before over the best link of a sort; infinite where it has none."""
        sorts = self.rows.sorts[0]
        found = np.full((len(sorts), self.before_s.shape[1]), np.inf)
        for kind, seconds in enumerate(self.before_s[1:], 1):
            np.minimum(found, seconds, out=found, where=sorts[:, kind, None])
        found[sorts[:, 1:].any(axis=1), 0] = 0.0
        return np.ascontiguousarray(found.T)

    def _filled(self, count: int) -> Columns:
        """The first columns of the arrays that loops fill."""
        option, slot, *others = self.rows.room
        return Columns(option[:count], slot[:count], *(array[:count] for array in others))

    def relaxed(
        self,
        limits: StageLimits,
        *,
        simple: int = 0,
        spread: bool = False,
        hopeful: Hopeful | None = None,
    ) -> Columns:
        """All columns that may be within limits, each at most as dear as it is.

        The rest needs loops. At `simple` 1 only those of one replica or of all units, at 2 only the
        latter; with `spread` as if each of several replicas kept one microbatch; of the `hopeful`
        options only. Arrays may be used again by the next call.
        """
        if self.loops:
            transfers = self._most_wait_s, self.setting.microbatches - 1.0
            near = self.rows.near_alone if simple else self.rows.near
            beyond_s = self.before_s if hopeful is None else self._beyond()
            places, setting = (self.rows.slots, near, self.before_s, beyond_s), self._loop_setting
            hopeful = hopeful or ANY
            return self._relaxed_loop(limits, places, transfers, setting, simple, spread, hopeful)
        parts = [part for chunk in self._chunks() for part in self._relaxed_chunk(chunk, limits)]
        if not parts:
            return no_columns()
        return Columns(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(Columns)))

    def exact(self, columns: Columns) -> tuple[Columns, IntArray]:
        """The given columns at their real prices, without those that cannot be, and which are left."""
        if self.loops:
            return self._exact_loop(columns)
        slots, extra, below = self.rows.slots.every, columns.extra_s.copy(), columns.most_below.copy()
        for width in np.unique(self.rows.width[columns.option]).tolist():
            index = np.flatnonzero(self.rows.width[columns.option] == width)
            option, slot = columns.option[index], columns.slot[index]
            run, staff = slots.run[slot], self.rows.staff[option]
            moved = self.rows.moved(option, run)
            times = [self._seconds[staff[:, r], run] + moved for r in range(width)]
            sample = [self._sample[staff[:, r], run] for r in range(width)]
            extra[index], own = stage_extra(times, self._waits[slot], self.setting, sample)
            most = [self._flight[staff[:, r], width, run] for r in range(width)]
            below[index] = most_below(self.setting, own, most, width)
        extra = self._with_cut(extra, columns.slot)
        found = Columns(columns.option, columns.slot, columns.cost_s, extra, columns.post_s, below)
        kept = np.flatnonzero(np.isfinite(extra) & (below >= self.rows.width[columns.option]))
        return found.pick(kept), kept

    @property
    def _loop_setting(self) -> tuple[int, int, bool, bool]:
        setting = self.setting
        larger = setting.samples % setting.microbatches
        gpipe = setting.schedule == "gpipe"
        return setting.microbatches, larger, self._stalls, gpipe

    def on_any_links(self, limits: StageLimits, hopeful: Hopeful | None = None) -> Columns:
        """Columns on runs, which stand for those between all kinds of links under either schedule.

        Each is at most as dear as where it is least: after the best link that it may have, transfers
        neither wait nor take longest, and no more is kept than under 1F1B. How waiting deals
        microbatches is left out, so that each of several replicas keeps one. Of the `hopeful` crews only;
        needs loops. Arrays may be used again by the next call.
        """
        rows = self.rows
        # In rows, or the loops would be compiled for columns as well.
        before_s = np.ascontiguousarray(np.pad(self._nearest, ((0, 0), (1, 0))).T)
        near = np.arange(len(before_s)) == rows.sorts[1][rows.crew_of][:, None] + 1
        near[:, 0] = True
        places = rows.whole_slots, near, before_s, np.zeros((1, before_s.shape[1]))
        setting = (*self._loop_setting[:2], False, False)
        return self._relaxed_loop(limits, places, (0.0, 0.0), setting, 0, True, hopeful or ANY)

    def _beyond(self) -> FloatArray:
        """[kind, unit]: how much longer a transfer takes than the nearest of whoever may be behind it."""
        found = np.zeros(self.before_s.shape)
        for kind in range(1, len(found)):
            best_s = self._nearest[:, self.rows.sorts[0][:, kind]]
            if best_s.size:
                found[kind] = np.maximum(self.before_s[kind] - best_s.max(axis=1), 0.0)
        return found

    def _relaxed_loop(
        self,
        limits: StageLimits,
        places: tuple[Slots, BoolArray, FloatArray, FloatArray],
        transfers: tuple[float, float],
        setting: tuple[int, int, bool, bool],
        simple: int,
        spread: bool,
        hopeful: Hopeful,
    ) -> Columns:
        rows, runs = self.rows, self._units.runs
        slots, near, before_s, beyond_s = places
        asked = limits.extra_s, limits.post_s, limits.both_s
        arguments = (
            rows.crews,
            (rows.width, rows.staff, rows.post_of, rows.moved_row, near),
            (self._seconds_by_run, self._flight_by_run, rows.post_by_run, rows.moved_rows),
            self._fastest_by_run,
            (runs.first, runs.last, slots.begins, slots.behind),
            self._usable,
            (before_s, beyond_s),
            transfers,
            self._beside,
            setting,
            simple,
            spread,
            slots is rows.whole_slots,
            hopeful.plain,
            (*asked, limits.fill_s, limits.all_s, limits.post_weight),
        )
        while (count := relaxed_loop(*arguments, self.rows.room)) < 0:
            self.rows.enlarge()
        return self._filled(count)

    def _exact_loop(self, columns: Columns) -> tuple[Columns, IntArray]:
        extra, below = np.empty(len(columns)), np.empty(len(columns))
        slots = self.rows.slots.at(columns.slot)
        exact_loop(
            columns.option,
            slots.run,
            self.rows.width,
            self.rows.staff,
            self._seconds_by_run,
            self._sample_by_run,
            self._flight_by_run,
            self.rows.moved_rows,
            self.rows.moved_row,
            self._waits_at(slots),
            (self.setting.microbatches - 1) * self._before_at(slots),
            self._loop_setting,
            extra,
            below,
        )
        found = Columns(columns.option, columns.slot, columns.cost_s, extra, columns.post_s, below)
        kept = np.flatnonzero(np.isfinite(extra) & (below >= self.rows.width[columns.option]))
        return found.pick(kept), kept

    def _chunks(self) -> Iterator[IntArray]:
        """Options of one width, so many at once as may be."""
        runs = self._seconds.shape[1]
        for width in np.unique(self.rows.width).tolist():
            if width > self.setting.microbatches:
                continue
            own = np.flatnonzero(self.rows.width == width)
            size = max(1, _AT_ONCE // (runs * width))
            yield from (own[i : i + size] for i in range(0, len(own), size))

    def _relaxed_chunk(self, chunk: IntArray, limits: StageLimits) -> Iterator[Columns]:
        width, staff = int(self.rows.width[chunk[0]]), self.rows.staff[chunk]
        moved = self.rows.moved(chunk)
        times = [self._seconds[staff[:, r]] + moved for r in range(width)]
        most = [self._flight[staff[:, r], width] for r in range(width)]
        post = self.rows.post_s[chunk]
        # With waiting the deal is another one: before it is known each replica has at least one.
        few = [np.ones(times[0].shape)] * width if self._wait_some else None
        longest, extra, below = self._fluid(times, 0.0, most, few)
        usable = (below >= width) & (post <= limits.post_s) & (extra <= limits.extra_s)
        usable &= (extra + post <= limits.both_s) & (longest < limits.fill_s)
        if limits.all_s < np.inf:
            usable &= longest + extra + limits.post_weight * post < limits.all_s
        rows, runs = np.nonzero(usable)
        if len(rows) == 0:
            return
        number, slot = self._slots_of_run.spread(runs)
        rows, runs = rows[number], runs[number]
        option, slots = chunk[rows], self.rows.slots.every
        near = self.rows.near[option, slots.before[slot]] & self.rows.near[option, slots.after[slot]]
        rows, runs, option, slot = rows[near], runs[near], option[near], slot[near]
        if self._wait_some:
            flat = [t[rows, runs] for t in times]
            longest, extra, below = self._fluid(flat, self._waits[slot], [f[rows, runs] for f in most])
        else:
            longest, extra, below = longest[rows, runs], extra[rows, runs], below[rows, runs]
        extra = self._with_cut(extra, slot)
        cost = longest + self._before[slot]
        own = post[rows, runs]
        kept = (extra <= limits.extra_s) & (extra + own <= limits.both_s)
        kept &= (cost < limits.fill_s) & (below >= width)
        if limits.all_s < np.inf:
            kept &= cost + extra + limits.post_weight * own < limits.all_s
        yield Columns(option, slot, cost, extra, own, below).pick(kept)

    def _fluid(
        self,
        times: list[FloatArray],
        wait: FloatArray | float,
        most: list[FloatArray],
        own: list[FloatArray] | None = None,
    ) -> tuple[FloatArray, FloatArray, FloatArray]:
        """The longest first microbatch, at least what further ones add, at most what memory allows."""
        microbatches, width = self.setting.microbatches, len(times)
        if width == 1:
            alone = own or [np.full(times[0].shape, float(microbatches))]
            below = most_below(self.setting, alone, most, 1)
            return times[0], (microbatches - 1) * (times[0] + wait), below
        longest = np.maximum.reduce(times)
        with np.errstate(invalid="ignore", divide="ignore"):
            periods = [np.maximum(t + wait, 1e-300) for t in times]
            rate = np.add.reduce([1 / p for p in periods])
            offset = np.add.reduce([1 - t / p for t, p in zip(times, periods, strict=True)])
            # A hair below, so that rounding leaves a lower bound.
            end = (microbatches - offset) / rate * (1 - 1e-12)
            extra = np.maximum(end - longest, 0.0)
            own = own or [
                np.maximum(np.floor((end - t) / p + 1), 1.0) for t, p in zip(times, periods, strict=True)
            ]
        return longest, extra, most_below(self.setting, own, most, width)

    def _with_cut(self, extra: FloatArray, slot: IntArray) -> FloatArray:
        """Where transfers overlap, the boundary before a stage may be what takes longest."""
        if self._stalls:
            return extra
        found: FloatArray = np.maximum(extra, (self.setting.microbatches - 1) * self._before[slot])
        return found
