"""Every stage that one pipeline over few devices may have, priced in two steps.

A *column* is a stage option on a *slot*: a run of units with the kinds of links at its two boundaries
(link kind 0 is the end of the pipeline, where nothing is sent). There may be millions, of which a proof
leaves some thousands. So all of them get a lower bound first (`StagePrices.relaxed`), in which
microbatches are dealt to unlike replicas as if they could be divided:

    m = sum_r (1 + (E - t_r) / p_r)   at the moment E when all end,   extra >= E - max_r t_r

and only what is left after pruning is dealt one by one (`StagePrices.exact`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np
import numpy.typing as npt

from graphpar.cost import CostTable
from graphpar.partition.cells import Cells, Links, StageOption, links_between
from graphpar.partition.chain_loops import exact_loop, relaxed_loop
from graphpar.partition.stage_costs import (
    StageLimits,
    boundary_seconds,
    cached_post,
    most_below,
    stage_extra,
    zero_seconds,
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
class Slots:
    """Runs of units between kinds of links, sorted by first unit and link before."""

    run: IntArray
    first: IntArray
    last: IntArray
    before: IntArray
    after: IntArray


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
        return Columns(*(getattr(self, f.name)[index] for f in fields(self)))

    def __len__(self) -> int:
        return len(self.option)


def no_columns() -> Columns:
    """None at all."""
    none, nothing = np.zeros(0, dtype=np.intp), np.zeros(0)
    return Columns(none, none, nothing, nothing, nothing, nothing)


class OptionRows:
    """What does not depend on microbatches: who staffs each option, its post, what ZeRO moves."""

    def __init__(
        self,
        table: CostTable,
        cells: Cells,
        options: Sequence[StageOption],
        setting: Setting,
        runs: Ranges,
        cache: Cache,
    ) -> None:
        self.options = tuple(options)
        units = UnitArrays(table, setting, runs, cache)
        self.width = np.array([o.width for o in options], dtype=np.intp)
        self.take = np.array([o.take for o in options], dtype=np.intp)
        self.modes = sorted({m for o in options for m in o.staff})
        row = {mode: i for i, mode in enumerate(self.modes)}
        widest = int(self.width.max(initial=1))
        padded = [[row[m] for m in o.staff] + [0] * (widest - o.width) for o in options]
        self.staff = np.array(padded, dtype=np.intp).reshape(len(padded), widest)
        self.kinds, self.near = _kinds_near(cells, options)
        self.slots = find_slots(runs, table.num_units, len(self.kinds))
        posts = [cached_post(table, units, o, setting) for o in options]
        self.post_s = np.stack(posts) if posts else np.zeros((0, len(runs.first)))
        moved = [zero_seconds(table, units, o) for o in options]
        self.moved_s = {i: m for i, m in enumerate(moved) if m is not None}
        self._teams: tuple[IntArray, IntArray] | None = None
        self._joins: BoolArray | None = None
        self._find_crews(table)
        self.post_by_run = np.ascontiguousarray(self.post_s.T)
        some = list(self.moved_s)
        self.moved_row = np.full(len(options), -1, dtype=np.intp)
        self.moved_row[some] = np.arange(len(some))
        self._moved_rows = np.stack([self.moved_s[i] for i in some]) if some else np.zeros((1, 1))

    @cached_property
    def counts_replicas(self) -> bool:
        """Whether some replicas are groups, so that replicas are not devices."""
        return bool((self.width != self.take.sum(axis=1)).any())

    def teams(self, with_replicas: bool) -> tuple[IntArray, IntArray]:
        """The distinct rows of devices (and replicas) that options take, and which each of them takes."""
        if self._teams is None:
            take = self.take
            if with_replicas:
                take = np.concatenate([take, self.width[:, None]], axis=1)
            found, inverse = np.unique(take, axis=0, return_inverse=True)
            self._teams = found, inverse.reshape(-1).astype(np.intp)
        return self._teams

    @cached_property
    def place_sets(self) -> tuple[list[frozenset[int]], IntArray]:
        """All sets of places that stages stand in, and which one each option stands in."""
        found = sorted({o.places for o in self.options}, key=sorted)
        index = {p: i for i, p in enumerate(found)}
        return found, np.array([index[o.places] for o in self.options], dtype=np.intp)

    def joins(self, cells: Cells) -> BoolArray:
        """[left place set, right place set, link kind]: whether that kind of link joins the two."""
        if self._joins is None:
            places = self.place_sets[0]
            number = {links: i for i, links in enumerate(self.kinds)}
            self._joins = np.zeros((len(places), len(places), len(number)), dtype=np.bool_)
            for i, left in enumerate(places):
                for j, right in enumerate(places):
                    links = links_between(cells, left, right)
                    if links:
                        self._joins[i, j, number[links]] = True
        return self._joins

    def _find_crews(self, table: CostTable) -> None:
        """Options of the same devices in other modes are a crew; modes of the same members a team."""
        teams: dict[tuple[int, ...], int] = {}
        of_mode = [teams.setdefault(table.every_mode[m].members, len(teams)) for m in self.modes]
        self.team_of_mode: IntArray = np.array(of_mode, dtype=np.intp)
        self.num_teams = len(teams)
        crews: dict[tuple[object, ...], list[int]] = {}
        for row, option in enumerate(self.options):
            team = tuple(of_mode[i] for i in self.staff[row, : option.width])
            crews.setdefault((team, option.places), []).append(row)
        rows = sorted(crews.values(), key=lambda own: int(self.width[own[0]]))
        team_of = np.zeros((len(rows), self.staff.shape[1]), dtype=np.intp)
        for crew, own in enumerate(rows):
            wide = self.width[own[0]]
            team_of[crew, :wide] = self.team_of_mode[self.staff[own[0], :wide]]
        self._crews = (
            np.array([r for own in rows for r in own], dtype=np.intp),
            np.cumsum([0, *map(len, rows)], dtype=np.intp),
            np.array([self.width[own[0]] for own in rows], dtype=np.intp),
            team_of,
        )

    def crews(self, widest: int | None = None) -> tuple[IntArray, IntArray, IntArray, IntArray]:
        """Rows by crew, where each crew begins, its replicas, and their teams; narrow crews only."""
        row_of, begin, wide, team_of = self._crews
        if widest is None:
            return self._crews
        narrow = int((wide <= widest).sum())
        return row_of, begin[: narrow + 1], wide[:narrow], team_of

    @cached_property
    def room(self) -> tuple[IntArray, IntArray, FloatArray, FloatArray, FloatArray, FloatArray]:
        """Arrays as long as there may be columns, used again and again."""
        number = len(self.options) * len(self.slots.run)
        option, slot = np.empty(number, dtype=np.intp), np.empty(number, dtype=np.intp)
        return option, slot, np.empty(number), np.empty(number), np.empty(number), np.empty(number)

    @property
    def moved_rows(self) -> FloatArray:
        """What ZeRO moves, one row for each option of `moved_row` that is not -1."""
        return self._moved_rows

    def moved(self, rows: IntArray) -> FloatArray | float:
        """[option, run]: what ZeRO moves for every microbatch."""
        if not any(i in self.moved_s for i in rows.tolist()):
            return 0.0
        nothing = np.zeros(self.post_s.shape[1])
        return np.stack([self.moved_s.get(i, nothing) for i in rows.tolist()])


def _kinds_near(cells: Cells, options: Sequence[StageOption]) -> tuple[tuple[Links, ...], BoolArray]:
    """All kinds of links that two stages can have between them; [option, kind] whether this one can."""
    places = {o.places for o in options}
    near = {p: {links_between(cells, p, q) for q in places} for p in places}
    kinds = (frozenset(), *sorted({k for own in near.values() for k in own if k}, key=repr))
    reach = {p: [i == 0 or k in own for i, k in enumerate(kinds)] for p, own in near.items()}
    return kinds, np.array([reach[o.places] for o in options], dtype=np.bool_).reshape(-1, len(kinds))


def find_slots(runs: Ranges, num_units: int, num_kinds: int) -> Slots:
    """Every run with every pair of links it may stand between."""
    run, before, after = (
        a.ravel()
        for a in np.meshgrid(
            np.arange(len(runs.first)), np.arange(num_kinds), np.arange(num_kinds), indexing="ij"
        )
    )
    first, last = runs.first[run], runs.last[run]
    # The pipeline starts and ends where nothing is sent, and only there.
    real = ((first == 0) == (before == 0)) & ((last == num_units) == (after == 0))
    order = np.flatnonzero(real)
    order = order[np.lexsort((after[order], last[order], before[order], first[order]))]
    return Slots(run[order], first[order], last[order], before[order], after[order])


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
    ) -> None:
        self.loops = loops
        self.rows = rows
        self.setting = setting
        self._table_trains = table.training
        self._stalls = table.training and setting.schedule == "1f1b"
        self._units = units = UnitArrays(table, setting, runs, cache)
        self._seconds = np.stack([units.seconds(m) for m in rows.modes])
        self._sample = np.stack([units.sample_seconds(m) for m in rows.modes])
        self.before_s = boundary_seconds(table, setting, rows.kinds, cache)
        self._slots_of_run = _positions(rows.slots.run, len(runs.first))
        slots = rows.slots
        self._ahead = self.before_s[slots.before, slots.first]
        behind = self.before_s[slots.after, slots.last]
        self._waits = (self._ahead + behind) / 2 if self._stalls else np.zeros(len(slots.run))
        self._cut = (setting.microbatches - 1) * self._ahead
        widths = sorted(set(rows.width.tolist()))
        self._flight = np.full(
            (len(rows.modes), int(rows.width.max(initial=1)) + 1, len(runs.first)), -1.0
        )
        for i, mode in enumerate(rows.modes):
            if widths:
                self._flight[i, widths] = units.in_flight_by_width(mode, widths)
        if not loops:
            return
        self._seconds_by_run = np.ascontiguousarray(self._seconds.T)
        quickest = np.stack(
            [self._seconds[rows.team_of_mode == i].min(axis=0) for i in range(rows.num_teams)], axis=1
        )
        self._fastest_by_run = 1 / np.maximum(quickest, 1e-300)
        self._flight_by_run = np.ascontiguousarray(np.moveaxis(self._flight, 2, 0))

    @property
    def num_variables(self) -> int:
        """Columns before anything is pruned."""
        usable = int((self.rows.width <= self.setting.microbatches).sum())
        return usable * len(self.rows.slots.run)

    def relaxed(self, limits: StageLimits, widest: int | None = None, *, spread: bool = False) -> Columns:
        """All columns that may be within limits, each at most as dear as it is.

        With `widest` only those of so many replicas or fewer; with `spread`, which needs loops, as if
        each of several replicas kept one microbatch. Arrays may be used again by the next call.
        """
        if self.loops:
            return self._relaxed_loop(limits, widest, spread)
        parts = [part for chunk in self._chunks() for part in self._relaxed_chunk(chunk, limits)]
        if not parts:
            return no_columns()
        return Columns(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(Columns)))

    def exact(self, columns: Columns) -> tuple[Columns, IntArray]:
        """The given columns at their real prices, without those that cannot be, and which are left."""
        if self.loops:
            return self._exact_loop(columns)
        slots, extra, below = self.rows.slots, columns.extra_s.copy(), columns.most_below.copy()
        for width in np.unique(self.rows.width[columns.option]).tolist():
            index = np.flatnonzero(self.rows.width[columns.option] == width)
            option, slot = columns.option[index], columns.slot[index]
            run, staff = slots.run[slot], self.rows.staff[option]
            moved = self._moved_at(option, run)
            times = [self._seconds[staff[:, r], run] + moved for r in range(width)]
            sample = [self._sample[staff[:, r], run] for r in range(width)]
            extra[index], own = stage_extra(times, self._wait(slot), self.setting, sample)
            most = [self._flight[staff[:, r], width, run] for r in range(width)]
            below[index] = most_below(self.setting, own, most, width)
        extra = self._with_cut(extra, columns.slot)
        found = Columns(columns.option, columns.slot, columns.cost_s, extra, columns.post_s, below)
        kept = np.flatnonzero(np.isfinite(extra) & (below >= self.rows.width[columns.option]))
        return found.pick(kept), kept

    @property
    def _loop_setting(self) -> tuple[int, int, bool, bool, bool]:
        setting = self.setting
        larger = setting.samples % setting.microbatches
        gpipe = setting.schedule == "gpipe"
        return setting.microbatches, larger, self._stalls, gpipe, self._table_trains

    def _relaxed_loop(self, limits: StageLimits, widest: int | None, spread: bool) -> Columns:
        slots, found = self.rows.slots, self.rows.room
        count = relaxed_loop(
            self.rows.crews(widest),
            self.rows.staff,
            self._seconds_by_run,
            self._fastest_by_run,
            self._flight_by_run,
            self.rows.post_by_run,
            self.rows.moved_rows,
            self.rows.moved_row,
            self.rows.near,
            (slots.run, slots.before, slots.after),
            self._ahead,
            self._waits,
            self._cut,
            self._loop_setting,
            spread,
            (
                limits.extra_s,
                limits.post_s,
                limits.both_s,
                limits.fill_s,
                limits.all_s,
                limits.post_weight,
            ),
            found,
        )
        option, slot, cost_s, extra_s, post_s, below = found
        return Columns(
            option[:count], slot[:count], cost_s[:count], extra_s[:count], post_s[:count], below[:count]
        )

    def _exact_loop(self, columns: Columns) -> tuple[Columns, IntArray]:
        extra, below = np.empty(len(columns)), np.empty(len(columns))
        exact_loop(
            columns.option,
            columns.slot,
            self.rows.slots.run[columns.slot],
            self.rows.width,
            self.rows.staff,
            self._seconds_by_run,
            np.ascontiguousarray(self._sample.T),
            self._flight_by_run,
            self.rows.moved_rows,
            self.rows.moved_row,
            self._waits,
            self._cut,
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
        few = [np.ones(times[0].shape)] * width if self._stalls else None
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
        option, slots = chunk[rows], self.rows.slots
        near = self.rows.near[option, slots.before[slot]] & self.rows.near[option, slots.after[slot]]
        rows, runs, option, slot = rows[near], runs[near], option[near], slot[near]
        if self._stalls:
            flat = [t[rows, runs] for t in times]
            longest, extra, below = self._fluid(flat, self._wait(slot), [f[rows, runs] for f in most])
        else:
            longest, extra, below = longest[rows, runs], extra[rows, runs], below[rows, runs]
        extra = self._with_cut(extra, slot)
        cost = longest + self.before_s[slots.before[slot], slots.first[slot]]
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

    def _wait(self, slot: IntArray) -> FloatArray:
        """Half of either boundary's transfer under 1F1B."""
        if not self._stalls:
            return np.zeros(len(slot))
        slots, before = self.rows.slots, self.before_s
        ahead = before[slots.before[slot], slots.first[slot]]
        found: FloatArray = (ahead + before[slots.after[slot], slots.last[slot]]) / 2
        return found

    def _with_cut(self, extra: FloatArray, slot: IntArray) -> FloatArray:
        """Where transfers overlap, the boundary before a stage may be what takes longest."""
        if self._stalls:
            return extra
        slots = self.rows.slots
        cut = (self.setting.microbatches - 1) * self.before_s[slots.before[slot], slots.first[slot]]
        found: FloatArray = np.maximum(extra, cut)
        return found

    def _moved_at(self, option: IntArray, run: IntArray) -> FloatArray:
        moved = np.zeros(len(option))
        if self.rows.moved_s:
            for row in np.unique(option).tolist():
                if row in self.rows.moved_s:
                    own = option == row
                    moved[own] = self.rows.moved_s[row][run[own]]
        return moved


@dataclass(frozen=True, eq=False)
class _Positions:
    """Which entries of an array have a value, for every value."""

    order: IntArray
    start: IntArray
    number: IntArray

    def spread(self, values: IntArray) -> tuple[IntArray, IntArray]:
        """For every position of every value: which of `values` it belongs to, and the position."""
        number = self.number[values]
        owner = np.repeat(np.arange(len(values)), number)
        offset = np.arange(len(owner)) - np.repeat(np.cumsum(number) - number, number)
        return owner, self.order[self.start[values][owner] + offset]


def _positions(array: IntArray, size: int) -> _Positions:
    number = np.bincount(array, minlength=size)
    return _Positions(np.argsort(array, kind="stable"), np.cumsum(number) - number, number)
