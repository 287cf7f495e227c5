"""How many microbatches fit on every run of units, in every mode, for every number of replicas."""

import numpy as np
import numpy.typing as npt

from graphpar.partition.jit import compiled_exactly
from graphpar.partition.option_rows import OptionRows
from graphpar.partition.unit_arrays import UNLIMITED, FloatArray, IntArray, UnitArrays, unlike_members

_HALF: npt.DTypeLike = np.float32


def flights(units: UnitArrays, rows: OptionRows, largest: int) -> tuple[FloatArray, FloatArray]:
    """[run, mode, width], and [run, team, width] of the mode with most room; -1 where nothing fits.

    In half the digits: numbers beyond 2^24 are never reached. The same arrays for all settings whose
    `largest` microbatch has as many samples.
    """
    keys = ("flight by run", rows.key, largest), ("best flight", rows.key, largest)
    if keys[0] not in units.cache:
        free, members = _free(units, rows)
        number = len(free), len(rows.modes), rows.widths[-1] + 1
        found = (
            np.empty(number, dtype=_HALF),
            np.empty((number[0], rows.num_teams, number[2]), dtype=_HALF),
        )
        working, saved = _temporaries(units, rows, members)
        of_mode = np.array([mode for mode, _ in members], dtype=np.intp)
        widths = np.array(rows.widths, dtype=np.intp)
        trains = units.table.training
        _flight_loop(free, of_mode, *working, *saved, widths, rows.team_of_mode, trains, *found)
        units.cache[keys[0]], units.cache[keys[1]] = found
    return units.cache[keys[0]], units.cache[keys[1]]


def _free(units: UnitArrays, rows: OptionRows) -> tuple[FloatArray, list[tuple[int, int]]]:
    """[run, row, width]: bytes for microbatches and temporaries; the mode and the member of each row."""
    every, key = units.table.every_mode, ("free by run", rows.key)
    each = [(i, m, *pair) for i, m in enumerate(rows.modes) for pair in unlike_members(every[m])]
    if key not in units.cache:
        found = np.empty((rows.post_s.shape[1], len(each), len(rows.widths)))
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
    every = np.empty((rows.post_s.shape[1], len(working), len(rows.widths)))
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
    best: FloatArray,
) -> None:
    """Rows of a mode come together; that with least room counts."""
    flight[:] = -1.0
    best[:] = -1.0
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
            mine, most_of = flight[run, mode], best[run, team_of_mode[mode]]
            for wide in widths:
                most_of[wide] = max(most_of[wide], mine[wide])
