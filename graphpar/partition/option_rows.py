"""Who may staff a stage where: what does not depend on microbatches.

A *crew* are the options of the same devices in all modes that move as much for ZeRO: at level 2 every
microbatch sends gradients, at level 3 weights as well.
"""

from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from functools import cached_property, reduce
from operator import or_

import numpy as np

from graphpar.cost import CostTable
from graphpar.partition.cells import Cells, Links, StageOption, pareto
from graphpar.partition.device_sets import DeviceSets, device_sets
from graphpar.partition.slots import Slots
from graphpar.partition.stage_costs import cached_post, least_step_s, zero_seconds
from graphpar.partition.unit_arrays import (
    BoolArray,
    Cache,
    FloatArray,
    IntArray,
    Ranges,
    Setting,
    UnitArrays,
)

Room = tuple[IntArray, IntArray, FloatArray, FloatArray, FloatArray, FloatArray]
"""Option, slot, seconds, and replicas from here on: see `chains.columns.Columns`."""

_FIRST_ROOM = 4_000_000
"""So many columns there is room for at first; memory counts only once it is used."""

_FEW_SETS = 32
"""So few sets of places are compared with one another."""

_OF_LINKS = ("joins", "near", "near_alone", "sorts", "stands_for", "slots", "room")
"""What depends on the kinds of links."""


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
        units = UnitArrays(table, setting, runs, cache)
        if setting.peers == 1:
            options = _without_outdone(table, units, options, setting)
        self.options = tuple(options)
        self.width = np.array([o.width for o in options], dtype=np.intp)
        self.take = np.array([o.take for o in options], dtype=np.intp)
        self.modes = sorted({m for o in options for m in o.staff})
        self.widths: list[int] = np.unique(self.width).tolist() or [1]
        self.key = (tuple(self.modes), tuple(self.widths))
        """Whoever has the same has equal arrays over modes and widths."""
        row = {mode: i for i, mode in enumerate(self.modes)}
        widest = int(self.width.max(initial=1))
        padded = [[row[m] for m in o.staff] + [0] * (widest - o.width) for o in options]
        self.staff = np.array(padded, dtype=np.intp).reshape(len(padded), widest)
        self.kinds, self._between, self.place = _places(cells, options, self.take)
        self._runs, self._num_units = runs, table.num_units
        self._merged: dict[bytes, OptionRows] = {}
        self._slots: dict[int, Slots] = {}
        self.by_size: dict[float, tuple[OptionRows, FloatArray]] = {}
        """By mean microbatch size the rows with kinds merged, and seconds by kind and boundary."""
        self.post_of, posts = _unlike([cached_post(table, units, o, setting) for o in options])
        self.post_by_run = np.ascontiguousarray(np.reshape(posts, (-1, len(runs.first))).T)
        """[run, _], of which `post_of` says the one of a row."""
        self.moved_row, moved = _unlike([zero_seconds(table, units, o) for o in options])
        self.moved_rows = np.stack(moved) if moved else np.zeros((1, 1))
        """[_, run]: what ZeRO moves for every microbatch; `moved_row` says which a row has, -1: none."""
        self._teams: tuple[IntArray, IntArray] | None = None
        self.usable: BoolArray | None = None
        """[set of devices, team]: whether they suffice for it, once somebody has asked."""
        self._sets: DeviceSets | None = None
        self._find_crews(table)

    @cached_property
    def counts_replicas(self) -> bool:
        """Whether some replicas are groups, so that replicas are not devices."""
        return bool((self.width != self.take.sum(axis=1)).any())

    def among(self, runs: Ranges, index: IntArray) -> "OptionRows":
        """The same on some of the runs only, which `index` numbers."""
        found = copy(self)
        for name in ("whole_slots", "scratch", "post_s", *_OF_LINKS):
            found.__dict__.pop(name, None)
        found._runs, found._merged, found._slots, found.by_size = runs, {}, {}, {}
        found.post_by_run = self.post_by_run[index]
        if (self.moved_row >= 0).any():
            found.moved_rows = np.ascontiguousarray(self.moved_rows[:, index])
        (post, post_of), (moved, moved_of) = self.least_post, self.least_moved
        found.least_post, found.least_moved = (post[index], post_of), (moved[index], moved_of)
        return found

    def summed_by(
        self, table: CostTable, setting: Setting, sums_s: FloatArray, cache: Cache
    ) -> "OptionRows":
        """The same where sums of the units before a stage, and of all up to its end, take a while.

        `sums_s` is [0 or 1, unit], by where it begins and where it ends (`common_cuts.known_sums_s`).
        What replicas under ZeRO exchange they do before, so that it does not follow.
        """
        found, units = copy(self), UnitArrays(table, setting, self._runs, cache)
        for name in ("post_s", "least_post"):
            found.__dict__.pop(name, None)
        found._merged, found.by_size = {}, {}
        some = [self.options[i] for i in np.unique(self.post_of, return_index=True)[1].tolist()]
        steps_s = np.stack([least_step_s(table, units, option) for option in some], axis=1)
        plain = np.array([table.every_mode[option.staff[0]].zero == 0 for option in some])
        ahead_s = sums_s[0, self._runs.first][:, None] * plain
        post_s = np.maximum(self.post_by_run + ahead_s, sums_s[1, self._runs.last][:, None] + steps_s)
        found.post_by_run = np.ascontiguousarray(post_s)
        return found

    def merged(self, seconds: FloatArray) -> "OptionRows":
        """The same with kinds of links as one that take equally long, given by kind and boundary."""
        _, first, of_kind = np.unique(seconds[1:], axis=0, return_index=True, return_inverse=True)
        if len(first) == len(self.kinds) - 1:
            return self
        number = np.concatenate([[0], of_kind.reshape(-1) + 1]).astype(np.intp)
        if number.tobytes() not in self._merged:
            found = self._merged[number.tobytes()] = copy(self)
            for name in _OF_LINKS:
                found.__dict__.pop(name, None)
            found.kinds = (self.kinds[0], *(self.kinds[1 + i] for i in first.tolist()))
            found._between = number[self._between]
        return self._merged[number.tobytes()]

    @cached_property
    def joins(self) -> BoolArray:
        """[left set of places, right set, kind]: whether that kind of link joins the two."""
        kinds = np.arange(len(self.kinds))
        found: BoolArray = (self._between[:, :, None] == kinds) & (kinds > 0)
        return found

    @cached_property
    def stands_for(self) -> BoolArray:
        """[set, other set, kind]: whether all that reach the other by it reach the set."""
        number = len(self.joins)
        if number > _FEW_SETS:
            # Where sets of places are many, hardly any two are reached alike.
            alone = np.eye(number, dtype=np.bool_)
            return np.repeat(alone[:, :, None], len(self.kinds), axis=2)
        left, right = self.joins[:, :, None, :], self.joins[:, None, :, :]
        found: BoolArray = np.logical_and.reduce(left | ~right, axis=0)
        return found

    @cached_property
    def near(self) -> BoolArray:
        """[option, kind]: whether it can have that beside it."""
        some = np.zeros((len(self._between), len(self.kinds)), dtype=np.bool_)
        some[np.arange(len(some)), self._between] = True
        some[:, 0] = True
        return some[self.place]

    @cached_property
    def slots(self) -> Slots:
        """Every run between every two kinds of links."""
        number = len(self.kinds)
        if number not in self._slots:
            self._slots[number] = Slots(self._runs, self._num_units, number)
        return self._slots[number]

    def teams(self, with_replicas: bool) -> tuple[IntArray, IntArray]:
        """The distinct rows of devices (and replicas) that options take, and which each of them takes."""
        if self._teams is None:
            take = self.take
            if with_replicas:
                take = np.concatenate([take, self.width[:, None]], axis=1)
            found, inverse = np.unique(take, axis=0, return_inverse=True)
            self._teams = found, inverse.reshape(-1).astype(np.intp)
        return self._teams

    def device_sets(self, counts: Sequence[int]) -> DeviceSets:
        """What may be behind the options on the devices of the pipeline, a count per cell."""
        if self._sets is None:
            with_replicas = self.counts_replicas
            teams, team = self.teams(with_replicas)
            self._sets = device_sets(teams, team, self.width, counts, with_replicas=with_replicas)
        return self._sets

    def _find_crews(self, table: CostTable) -> None:
        """Options of the same devices in other modes are a crew; modes of the same members a team.

        `crews` are rows by crew, where each begins, its replicas, [crew, replica] the team; narrow ones
        first.
        """
        teams: dict[tuple[tuple[int, ...], int], int] = {}
        modes = [table.every_mode[m] for m in self.modes]
        # Below level 2 nothing is sent for a microbatch.
        of_mode = [teams.setdefault((m.members, max(m.zero, 1)), len(teams)) for m in modes]
        self.team_of_mode: IntArray = np.array(of_mode, dtype=np.intp)
        self.num_teams = len(teams)
        crews: dict[tuple[object, ...], list[int]] = {}
        for row, option in enumerate(self.options):
            team = tuple(of_mode[i] for i in self.staff[row, : option.width])
            crews.setdefault((team, option.places, option.take), []).append(row)
        rows = sorted(crews.values(), key=lambda own: int(self.width[own[0]]))
        team_of = np.zeros((len(rows), self.staff.shape[1]), dtype=np.intp)
        for crew, own in enumerate(rows):
            wide = self.width[own[0]]
            team_of[crew, :wide] = self.team_of_mode[self.staff[own[0], :wide]]
        self.crews = (
            np.array([r for own in rows for r in own], dtype=np.intp),
            np.cumsum([0, *map(len, rows)], dtype=np.intp),
            np.array([self.width[own[0]] for own in rows], dtype=np.intp),
            team_of,
        )

    @cached_property
    def first_rows(self) -> IntArray:
        """The first row of each crew."""
        return self.crews[0][self.crews[1][:-1]]

    @cached_property
    def crew_of(self) -> IntArray:
        """The crew of each row."""
        row_of, begin = self.crews[:2]
        found = np.empty(len(row_of), dtype=np.intp)
        found[row_of] = np.repeat(np.arange(len(begin) - 1), np.diff(begin))
        return found

    @cached_property
    def without_last(self) -> IntArray:
        """For each crew an earlier one whose replicas are its own but for the last, by team; -1: none."""
        _, _, wide_of, team_of = self.crews
        known: dict[tuple[int, ...], int] = {}
        found = np.full(len(wide_of), -1, dtype=np.intp)
        for crew, (wide, row) in enumerate(zip(wide_of.tolist(), team_of.tolist(), strict=True)):
            found[crew] = known.get(tuple(row[: wide - 1]), -1)
            known.setdefault(tuple(row[:wide]), crew)
        return found

    @cached_property
    def near_alone(self) -> BoolArray:
        """`near` where every stage has one replica: links between other stages are none of theirs."""
        places = np.unique(self.place[self.width == 1])
        kinds = np.zeros(len(self.kinds), dtype=np.bool_)
        kinds[self._between[np.ix_(places, places)]] = True
        kinds[0] = True
        found: BoolArray = self.near & kinds
        return found

    @cached_property
    def sorts(self) -> tuple[BoolArray, IntArray]:
        """[sort, link kind]: what may be beside crews of a sort, and the sort of each crew."""
        found, sort_of = np.unique(self.near[self.first_rows], axis=0, return_inverse=True)
        return found, sort_of.reshape(-1).astype(np.intp)

    @cached_property
    def whole_slots(self) -> Slots:
        """Every run once, for bounds that leave open which links are beside it."""
        return Slots(self._runs, self._num_units, 0)

    @cached_property
    def scratch(self) -> FloatArray:
        """A number for every run and crew, used again and again."""
        return np.empty(len(self.post_by_run) * len(self.first_rows))

    @cached_property
    def post_s(self) -> FloatArray:
        """[row, run]: what follows its last backward."""
        return np.ascontiguousarray(self.post_by_run[:, self.post_of].T)

    @cached_property
    def least_post(self) -> tuple[FloatArray, IntArray]:
        """[run, _] the least post of the rows of a crew, and which of these each crew has."""
        return self._least_of(self.post_of, self.post_by_run.T)

    @cached_property
    def least_moved(self) -> tuple[FloatArray, IntArray]:
        """The same of what its rows move for ZeRO."""
        return self._least_of(self.moved_row, self.moved_rows)

    def _least_of(self, number_of: IntArray, arrays: FloatArray) -> tuple[FloatArray, IntArray]:
        """The least of what the rows of a crew have; nothing where one of them has none."""
        row_of, begin = self.crews[:2]
        known: dict[tuple[int, ...], int] = {}
        of_crew = [
            known.setdefault(tuple(np.unique(own).tolist()), len(known))
            for own in np.split(number_of[row_of], begin[1:-1])
        ]
        found = np.zeros((len(known), len(self.post_by_run)))
        for numbers, place in known.items():
            if min(numbers) >= 0:
                arrays[list(numbers)].min(axis=0, out=found[place])
        return np.ascontiguousarray(found.T), np.array(of_crew, dtype=np.intp)

    @cached_property
    def room(self) -> Room:
        """Arrays for columns, used again and again: of every crew on every run, or many."""
        number = len(self.options) * len(self.slots)
        return _room(max(self.scratch.size, min(number, _FIRST_ROOM)))

    def enlarge(self) -> None:
        """Have room for twice as many columns."""
        self.room = _room(2 * len(self.room[0]))

    def moved(self, rows: IntArray, run: IntArray | slice = slice(None)) -> FloatArray | float:
        """What ZeRO moves for every microbatch: [option, run], or of each option on a run of its own."""
        moved = self.moved_row[rows]
        if (moved < 0).all():
            return 0.0
        found = self.moved_rows[moved, run]
        found[moved < 0] = 0.0
        return found


def _unlike(arrays: Sequence[FloatArray | None]) -> tuple[IntArray, list[FloatArray]]:
    """Which of some arrays each is, -1: None; and these: that which is there again is one."""
    number: dict[int, int] = {}
    found: list[FloatArray] = []
    for array in arrays:
        if array is not None and id(array) not in number:
            number[id(array)] = len(found)
            found.append(array)
    return np.array([-1 if a is None else number[id(a)] for a in arrays], dtype=np.intp), found


def _room(number: int) -> Room:
    option, slot = np.empty(number, dtype=np.intp), np.empty(number, dtype=np.intp)
    return option, slot, np.empty(number), np.empty(number), np.empty(number), np.empty(number)


def _without_outdone(
    table: CostTable, units: UnitArrays, options: Sequence[StageOption], setting: Setting
) -> list[StageOption]:
    """Without the options for which the same devices at ZeRO level 1 sum and step sooner on every run.

    That takes as long for every microbatch, and holds no more. Beside other pipelines a post is only a
    bound, which says nothing of this.
    """
    every = table.every_mode
    keys = [replace(m, zero=0, costs=()) for m in every]
    divided = {keys[i]: i for i, m in enumerate(every) if m.zero == 1}
    other_of = [divided.get(k, -1) if m.zero == 0 else -1 for k, m in zip(keys, every, strict=True)]
    other_of = [
        o if o >= 0 and every[o].costs == m.costs else -1 for o, m in zip(other_of, every, strict=True)
    ]
    known = {(o.take, o.places, o.staff): o for o in options}
    found = []
    for option in options:
        staff = tuple(other_of[m] for m in option.staff)
        other = known.get((option.take, option.places, staff))
        if other is not None:
            mine, its = (cached_post(table, units, o, setting) for o in (option, other))
            if (its <= mine).all() and (its < mine).any():
                continue
        found.append(option)
    return found


def _places(
    cells: Cells, options: Sequence[StageOption], take: IntArray
) -> tuple[tuple[Links, ...], IntArray, IntArray]:
    """Where stages may stand, and what kinds of links they can have between them.

    Sets of places that are joined to every place by the same links are one: most are. Gives the kinds,
    [left set, right set] the kind between them, 0 where no two stages stand so, and [option] its set.
    """
    every = list({link for row in cells.links for link in row if link is not None})
    bit_of = {link: 1 << number for number, link in enumerate(every)}
    bits = [[bit_of[link] if link is not None else 0 for link in row] for row in cells.links]

    def reach(places: frozenset[int]) -> tuple[int, ...]:
        """By place the links to it, as bits."""
        return tuple(reduce(or_, (row[b] for b in places), 0) for row in bits)

    of_places = {p: reach(p) for p in dict.fromkeys(o.places for o in options)}
    like = {row: p for p, row in of_places.items()}
    number = {row: i for i, row in enumerate(like)}
    place = np.array([number[of_places[o.places]] for o in options], dtype=np.intp)
    apart = _apart(cells, take, place, len(like))
    masks = [
        [reduce(or_, (row[a] for a in p), 0) if apart[i, j] else 0 for j, row in enumerate(like)]
        for i, p in enumerate(like.values())
    ]
    links_of = {
        mask: pareto([link for link, bit in bit_of.items() if mask & bit])
        for mask in {m for row in masks for m in row}
    }
    kinds = (frozenset(), *sorted({k for k in links_of.values() if k}, key=repr))
    number_of = {links: i for i, links in enumerate(kinds)}
    kind_of = {mask: number_of[links] for mask, links in links_of.items()}
    between = np.array([[kind_of[m] for m in row] for row in masks], dtype=np.intp)
    return kinds, between.reshape(len(like), len(like)), place


def _apart(cells: Cells, take: IntArray, place: IntArray, number: int) -> BoolArray:
    """[set of places, another one]: whether some stages on the two have devices enough for both."""
    rows, at = (
        np.unique(np.column_stack([take, place]), axis=0),
        np.zeros((number, number), dtype=np.bool_),
    )
    for row in rows:
        fits = (rows[:, :-1] + row[:-1] <= np.array(cells.counts)).all(axis=1)
        at[row[-1], rows[fits, -1]] = True
    return at
