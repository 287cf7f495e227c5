"""How many microbatches fit on every run of units, in every mode, for every number of replicas."""

import numpy as np
import numpy.typing as npt

from graphpar.partition.jit import compiled_exactly
from graphpar.partition.option_rows import OptionRows
from graphpar.partition.unit_arrays import UNLIMITED, FloatArray, IntArray, UnitArrays, unlike_members

_HALF: npt.DTypeLike = np.float32


MOST_BITS = 62
"""Replicas that have a bit of their own."""


def flights(units: UnitArrays, rows: OptionRows, largest: int) -> FloatArray:
    """[run, mode, width]: the number, -1 where nothing fits.

    In half the digits: numbers beyond 2^24 are never reached. The same array for all settings whose
    `largest` microbatch has as many samples.
    """
    key = ("flight by run", rows.key, largest)
    if key not in units.cache:
        of_rows = _rows(units, rows)
        found = np.empty((len(of_rows[0]), len(rows.modes), rows.widths[-1] + 1), dtype=_HALF)
        _flight_loop(*of_rows, units.table.training, found)
        units.cache[key] = found
    return units.cache[key]


def rooms_of_teams(units: UnitArrays, rows: OptionRows, largest: int) -> tuple[FloatArray, IntArray]:
    """[run, team]: the number on one replica, and for how many replicas one fits; of the best mode.

    The latter in bits, of which the last one is for all numbers of replicas beyond.
    """
    keys = ("alone by run", rows.key, largest), ("fits by run", rows.key, largest)
    if keys[0] not in units.cache:
        of_rows = _rows(units, rows)
        teams = len(of_rows[0]), rows.num_teams
        found = np.empty(teams, dtype=_HALF), np.empty(teams, dtype=np.intp)
        _room_loop(*of_rows, units.table.training, rows.team_of_mode, *found)
        units.cache[keys[0]], units.cache[keys[1]] = found
    return units.cache[keys[0]], units.cache[keys[1]]


def _rows(
    units: UnitArrays, rows: OptionRows
) -> tuple[FloatArray, IntArray, FloatArray, IntArray, FloatArray, IntArray, IntArray]:
    """The first arguments of both loops; a row is a member of a mode, of like ones the first."""
    free, members = _free(units, rows)
    working, saved = _temporaries(units, rows, members)
    of_mode = np.array([mode for mode, _ in members], dtype=np.intp)
    return free, of_mode, *working, *saved, np.array(rows.widths, dtype=np.intp)


def _free(units: UnitArrays, rows: OptionRows) -> tuple[FloatArray, list[tuple[int, int]]]:
    """[run, row, width]: bytes for microbatches and temporaries; the mode and the member of each row."""
    every, key = units.table.every_mode, ("free by run", rows.key)
    each = [(i, m, *pair) for i, m in enumerate(rows.modes) for pair in unlike_members(every[m])]
    if key not in units.cache:
        found = np.empty((len(rows.post_by_run), len(each), len(rows.widths)))
        for row, (_, mode, member, device_class) in enumerate(each):
            chosen, device = every[mode], units.table.device_classes[device_class]
            some = tuple(rows.widths) if chosen.zero else (1,)
            found[:, row] = units.free_bytes(chosen, mode, member, device, some).T
        units.cache[key] = found
    return units.cache[key], [(i, member) for i, _, member, _ in each]


Alike = tuple[FloatArray, IntArray]
"""Unlike arrays over runs, and which of them each row has."""


def _temporaries(
    units: UnitArrays, rows: OptionRows, members: list[tuple[int, int]]
) -> tuple[Alike, Alike]:
    """[run, _, width] the largest temporaries and [run, _] what a microbatch keeps, of each row."""
    working: dict[int, tuple[int, FloatArray]] = {}
    saved: dict[int, tuple[int, FloatArray]] = {}
    first_of = _alike(units, rows, members)
    of_row = np.empty((2, len(members)), dtype=np.intp)
    for row in np.unique(first_of).tolist():
        mode, member = members[row]
        chosen = units.table.every_mode[rows.modes[mode]]
        some = tuple(rows.widths) if chosen.zero else (1,)
        largest, kept = units.working_bytes(chosen, member, some), units.saved_bytes(chosen, member)
        mine = first_of == row
        of_row[0, mine] = working.setdefault(id(largest), (len(working), largest))[0]
        of_row[1, mine] = saved.setdefault(id(kept), (len(saved), kept))[0]
    every = np.empty((len(rows.post_by_run), len(working), len(rows.widths)))
    for i, array in working.values():
        every[:, i] = np.atleast_2d(array).T
    return (every, of_row[0]), (np.stack([array for _, array in saved.values()], axis=1), of_row[1])


def _alike(units: UnitArrays, rows: OptionRows, members: list[tuple[int, int]]) -> IntArray:
    """By row the first one whose microbatches keep and need as much: devices differ in seconds alone."""
    key = ("alike", rows.key)
    if key not in units.cache:
        known: dict[object, int] = {}
        first = []
        for row, (mode, member) in enumerate(members):
            chosen = units.table.every_mode[rows.modes[mode]]
            names = ("saved_bytes", "working_bytes", "gradient_bytes", "weight_bytes")
            held = tuple(getattr(c, name)[member] for c in chosen.costs for name in names)
            first.append(known.setdefault((chosen.zero, held), row))
        units.cache[key] = np.array(first, dtype=np.intp)
    return units.cache[key]


@compiled_exactly
def _flight_loop(
    free: FloatArray,
    of_mode: IntArray,
    working: FloatArray,
    works: IntArray,
    saved: FloatArray,
    saves: IntArray,
    widths: IntArray,
    trains: bool,
    flight: FloatArray,
) -> None:
    """Rows of a mode come together; that with least room counts."""
    flight[:] = -1.0
    for run in range(len(free)):
        last = -1
        for row in range(len(of_mode)):
            mode, kept, own = of_mode[row], saved[run, saves[row]], working[run, works[row]]
            room, bounded = free[run, row], trains and kept > 0
            for i in range(len(widths)):
                left, most = room[i] - own[i], -1.0
                if left >= 0:
                    most = min(np.floor(left / kept), UNLIMITED) if bounded else UNLIMITED
                if mode == last:
                    most = min(most, flight[run, mode, widths[i]])
                flight[run, mode, widths[i]] = most
            last = mode


@compiled_exactly
def _room_loop(
    free: FloatArray,
    of_mode: IntArray,
    working: FloatArray,
    works: IntArray,
    saved: FloatArray,
    saves: IntArray,
    widths: IntArray,
    trains: bool,
    team_of_mode: IntArray,
    alone: FloatArray,
    fits: IntArray,
) -> None:
    """The same without a division but for one replica."""
    alone[:] = -1.0
    fits[:] = 0
    rows = len(of_mode)
    for run in range(len(free)):
        bits, number = -1, UNLIMITED
        for row in range(rows):
            mode, kept, own = of_mode[row], saved[run, saves[row]], working[run, works[row]]
            room, least, mine = free[run, row], kept if trains else 0.0, 0
            for i in range(len(widths)):
                left = room[i] - own[i]
                if left >= 0 and left >= least:
                    mine |= 1 << min(widths[i], MOST_BITS)
                if widths[i] == 1:
                    most = -1.0
                    if left >= 0:
                        most = min(np.floor(left / kept), UNLIMITED) if least > 0 else UNLIMITED
                    number = min(number, most)
            bits &= mine
            if row + 1 == rows or of_mode[row + 1] != mode:
                team = team_of_mode[mode]
                fits[run, team] |= bits
                if widths[0] == 1:
                    alone[run, team] = max(alone[run, team], number)
                bits, number = -1, UNLIMITED
