"""Whether one pipeline over few devices fits into memory, whatever it takes: no seconds, no links.

A stage of `w` replicas, `r` of which has room for `F_r` microbatches of `s` samples, with `D` replicas
from it to the end of the pipeline, fits under 1F1B where `min(m_r, ceil(D / w)) <= F_r` for all of them.
How many microbatches `m_r` each gets depends on seconds. Two conditions do without:

* it *may* fit if every `F_r >= 1`, and some `F_r w >= D` or `sum F_r >= m`, for the `m_r` add up to m;
* it *does* fit, however they are dealt, if every `F_r w >= D` or every `F_r >= m`.

Which sets of devices can run the units from each one to the end follows by dynamic programming, over
sets: some thousand times some thousand runs of units, in hundredths of a second. Where no pipeline may
fit with the smallest microbatches that are tried, none does in any number (`may_fit`): larger ones keep
and need no less per sample. Where one does fit, it is priced as it stands before it counts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from graphpar.cost import CostTable
from graphpar.partition.assign import groups_hold, name_devices
from graphpar.partition.cells import StageOption
from graphpar.partition.chains.limits import ChainAnswer, Stage
from graphpar.partition.device_sets import states_of, strides_of
from graphpar.partition.family import Family
from graphpar.partition.jit import compiled_exactly
from graphpar.partition.pipeline_price import price
from graphpar.partition.search import Found
from graphpar.partition.unit_arrays import (
    MEMORY_TOLERANCE,
    UNLIMITED,
    Cache,
    FloatArray,
    IntArray,
    Ranges,
    Setting,
    UnitArrays,
)


@dataclass(frozen=True, eq=False)
class _Room:
    """By team and run of units the most replicas from a stage to the end with which it fits.

    `row[team, run]` is the option of the team that has this; options come by `options`.
    """

    below: FloatArray
    row: IntArray


class MemoryFit:
    """Which pipelines on some devices fit, of a family whose stages are not counted."""

    def __init__(
        self,
        family: Family,
        limits: Sequence[int],
        options: Sequence[StageOption],
        runs: Ranges,
        cache: Cache,
    ) -> None:
        self._family, self._options, self._runs, self._cache = family, options, runs, cache
        # Runs are all those between some units.
        self._parts = len(np.unique(runs.first))
        self._width = np.array([o.width for o in options], dtype=np.intp)
        self._widths = np.unique(self._width).tolist()
        self._modes = sorted({m for o in options for m in o.staff})
        number, widest = {m: i for i, m in enumerate(self._modes)}, max(self._widths)
        staff = [[number[m] for m in o.staff] + [0] * (widest - o.width) for o in options]
        self._staff = np.array(staff, dtype=np.intp)
        take = np.array([o.take for o in options], dtype=np.intp).reshape(len(options), len(limits))
        groups = bool((self._width != take.sum(axis=1)).any())
        if groups:
            # Replicas are not devices: both are counted.
            take, limits = np.concatenate([take, self._width[:, None]], axis=1), (*limits, sum(limits))
        teams, team = np.unique(take, axis=0, return_inverse=True)
        self._team = team.reshape(-1).astype(np.intp)
        self._row = np.searchsorted(self._widths, self._width)
        states = states_of(limits)
        self._replicas = states[:, -1].copy() if groups else states.sum(axis=1)
        self._order = np.argsort(self._replicas, kind="stable")
        self._rest = teams @ strides_of(limits)
        self._states, self._teams = states.astype(np.intp), teams.astype(np.intp)

    def may_fit(self, setting: Setting) -> bool:
        """Whether any pipeline may fit with microbatches of this size or larger ones; False is proven.

        `larger_hold_more` must hold of the table, or the setting be the only one.
        """
        return self._line(self._room(setting, certain=False)) is not None

    def witness(self, setting: Setting) -> Found | None:
        """A pipeline that fits in a setting, priced to be sure; None promises nothing."""
        room = self._room(setting, certain=True)
        line = self._line(room)
        if line is None:
            return None
        stages = tuple(Stage(a, b, self._options[room.row[t, self._run(a, b)]]) for a, b, t in line)
        found = Found(setting, ChainAnswer(0.0, 0.0, 0.0, 0.0, stages))
        return found if self._holds(found) else None

    def _holds(self, found: Found) -> bool:
        """Whether every device of a pipeline has work, and the memory for it."""
        table = self._family.table
        pipelines = name_devices(table, self._family.cells, (found,))
        if not groups_hold(table, pipelines):
            return False
        if not all(r.microbatches for p in pipelines for s in p.stages for r in s.replicas):
            return False
        memory = {d: c.memory_bytes for c in table.device_classes for d in c.devices}
        peaks = price(table, pipelines, found.setting.schedule).peak_bytes
        return all(peak <= memory[d] * (1 + MEMORY_TOLERANCE) for d, peak in peaks.items())

    def _room(self, setting: Setting, *, certain: bool) -> _Room:
        """How many replicas may follow every stage, or may certainly."""
        units = UnitArrays(self._family.table, setting, self._runs, self._cache)
        flight = np.stack([units.in_flight_by_width(m, self._widths) for m in self._modes])
        shape = len(self._rest), len(self._runs.first)
        room = _Room(np.full(shape, -1.0), np.zeros(shape, dtype=np.intp))
        size = -(-setting.samples // setting.microbatches)
        # Larger microbatches that are no multiple may make use of room that is less than one of these.
        number = setting.microbatches if certain else -(-setting.samples // size)
        how = number, setting.microbatches, size > 1, setting.schedule == "gpipe", certain
        room_loop(flight, self._staff, self._width, self._row, self._team, how, room.below, room.row)
        return room

    def _run(self, first: int, last: int) -> int:
        """The number of a run of units."""
        n = self._parts
        return first * n - first * (first - 1) // 2 + last - first - 1

    def _line(self, room: _Room) -> list[tuple[int, int, int]] | None:
        """A pipeline of stages with room, as (first unit, last, team); None where there is none."""
        n = self._parts
        team = np.full((len(self._replicas), n + 1), -1, dtype=np.intp)
        last = np.full((len(self._replicas), n + 1), -1, dtype=np.intp)
        state = int(
            fit_loop(
                self._order,
                self._replicas,
                self._states,
                self._teams,
                self._rest,
                room.below,
                n,
                team,
                last,
            )
        )
        if state < 0:
            return None
        line, unit = [], 0
        while unit < n:
            chosen, end = int(team[state, unit]), int(last[state, unit])
            line.append((unit, end, chosen))
            state, unit = state - int(self._rest[chosen]), end
        return line


def rehearse() -> None:
    """Run the loop once, so that it is compiled."""
    none, found = np.zeros(1, dtype=np.intp), np.full((1, 2), -1, dtype=np.intp)
    one = np.ones((1, 1), dtype=np.intp)
    fit_loop(none, none, 0 * one, one, none, np.zeros((1, 1)), 1, found, found.copy())
    flight, how = np.zeros((1, 1, 1)), (1, 1, False, False, True)
    below = np.zeros((1, 1))
    room_loop(flight, none.reshape(1, 1), one[0], none, none, how, below, none.reshape(1, 1))


@compiled_exactly
def room_loop(
    flight: FloatArray,
    staff: IntArray,
    width: IntArray,
    place: IntArray,
    team: IntArray,
    setting: tuple[int, int, bool, bool, bool],
    below: FloatArray,
    row: IntArray,
) -> None:
    """Set [team, run] to the most replicas from a stage on, and to the first option with so much room.

    Options have replicas of the modes `staff[option]` with room for `flight[mode, place of the width,
    run]` microbatches. `setting` is (microbatches to be held, microbatches, whether they have several
    samples, GPipe, whether it is to fit for certain).
    """
    number, microbatches, several, gpipe, certain = setting
    for option in range(len(width)):
        wide, at, mine = width[option], place[option], team[option]
        if certain and wide > microbatches:
            continue
        for run in range(flight.shape[2]):
            least = most = whole = flight[staff[option, 0], at, run]
            for r in range(1, wide):
                own = flight[staff[option, r], at, run]
                least, most, whole = min(least, own), max(most, own), whole + own
            if least < 1:
                continue
            some = least if certain else most
            enough = least if certain else whole + (wide if several else 0)
            limit = UNLIMITED if enough >= number else (-1.0 if gpipe else wide * some)
            if limit > below[mine, run]:
                below[mine, run], row[mine, run] = limit, option


def larger_hold_more(table: CostTable) -> bool:
    """Whether larger microbatches keep no less per sample, and have no smaller temporaries."""
    sizes = table.sizes
    return all(
        all(a / s <= b / t * (1 + 1e-12) for (s, a), (t, b) in pairwise(zip(sizes, row, strict=True)))
        and all(x <= y for x, y in pairwise(more))
        for mode in table.every_mode
        for cost in mode.costs
        for row, more in zip(cost.saved_bytes, cost.working_bytes, strict=True)
    )


@compiled_exactly
def fit_loop(
    order: IntArray,
    replicas: IntArray,
    states: IntArray,
    teams: IntArray,
    rest: IntArray,
    below: FloatArray,
    num_units: int,
    team_of: IntArray,
    last_of: IntArray,
) -> int:
    """The first set of devices on which all units fit, or -1; runs are numbered by first unit, then last.

    `states` and `teams` are the devices of each cell, or replicas besides, that sets and stages have.

    `team_of[set, unit]` and `last_of` become the first stage of what fits from a unit on, -1 where
    nothing does.
    """
    last_of[0, num_units] = num_units
    for state in order:
        for team in range(len(rest)):
            some = True
            for cell in range(teams.shape[1]):
                if teams[team, cell] > states[state, cell]:
                    some = False
                    break
            if not some:
                continue
            source = state - rest[team]
            for last in range(1, num_units + 1):
                if last_of[source, last] < 0:
                    continue
                for first in range(last):
                    run = first * num_units - first * (first - 1) // 2 + last - first - 1
                    if last_of[state, first] < 0 and below[team, run] >= replicas[state]:
                        team_of[state, first], last_of[state, first] = team, last
        if last_of[state, 0] >= 0:
            return int(state)
    return -1
