"""How many microbatches fit on every run of units, in every mode, for every number of replicas."""

import numpy as np
import numpy.typing as npt

from graphpar.partition.jit import compiled_exactly
from graphpar.partition.option_rows import OptionRows
from graphpar.partition.unit_arrays import UNLIMITED, FloatArray, IntArray, UnitArrays, unlike_members

_HALF: npt.DTypeLike = np.float32


MOST_BITS = 62
"""Replicas that have a bit of their own."""


def flights(
    units: UnitArrays, rows: OptionRows, largest: int
) -> tuple[FloatArray, tuple[FloatArray, IntArray]]:
    """[run, mode, width], -1 where nothing fits; and what the mode of a team with most room has.

    That is [run, team] the number on one replica, and for how many replicas one microbatch fits: bits,
    the last one for all numbers beyond. Numbers are in half the digits: beyond 2^24 is never reached. The
    same arrays for all settings whose `largest` microbatch has as many samples.
    """
    keys = ("flight by run", rows.key, largest), ("best flight", rows.key, largest)
    if keys[0] not in units.cache:
        free, members = _free(units, rows)
        found = np.empty((len(free), len(rows.modes), rows.widths[-1] + 1), dtype=_HALF)
        teams = len(free), rows.num_teams
        best = np.empty(teams, dtype=_HALF), np.empty(teams, dtype=np.intp)
        working, saved = _temporaries(units, rows, members)
        of_mode = np.array([mode for mode, _ in members], dtype=np.intp)
        widths = np.array(rows.widths, dtype=np.intp)
        trains = units.table.training
        _flight_loop(free, of_mode, *working, *saved, widths, rows.team_of_mode, trains, found, *best)
        units.cache[keys[0]], units.cache[keys[1]] = found, best
    return units.cache[keys[0]], units.cache[keys[1]]


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
    of_row = np.empty((2, len(members)), dtype=np.intp)
    for row, (mode, member) in enumerate(members):
        chosen = units.table.every_mode[rows.modes[mode]]
        some = tuple(rows.widths) if chosen.zero else (1,)
        largest, kept = units.working_bytes(chosen, member, some), units.saved_bytes(chosen, member)
        of_row[0, row] = working.setdefault(id(largest), (len(working), largest))[0]
        of_row[1, row] = saved.setdefault(id(kept), (len(saved), kept))[0]
    every = np.empty((len(rows.post_by_run), len(working), len(rows.widths)))
    for i, array in working.values():
        every[:, i] = np.atleast_2d(array).T
    return (every, of_row[0]), (np.stack([array for _, array in saved.values()], axis=1), of_row[1])


@compiled_exactly
def _flight_loop(
    free: FloatArray,
    of_mode: IntArray,
    working: FloatArray,
    works: IntArray,
    saved: FloatArray,
    saves: IntArray,
    widths: IntArray,
    team_of_mode: IntArray,
    trains: bool,
    flight: FloatArray,
    alone: FloatArray,
    fits: IntArray,
) -> None:
    """Rows of a mode come together; that with least room counts."""
    flight[:] = -1.0
    alone[:] = -1.0
    fits[:] = 0
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
        for mode in range(len(team_of_mode)):
            team = team_of_mode[mode]
            alone[run, team] = max(alone[run, team], flight[run, mode, 1])
            for wide in widths:
                if flight[run, mode, wide] >= 1:
                    fits[run, team] |= 1 << min(wide, MOST_BITS)
