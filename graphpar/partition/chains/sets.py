"""Which stages are in a pipeline below a target where no device is in two of its stages.

The bound of `relaxed` has a device in several stages if its prices allow, and in its paths stages with
little extra make up for ones with much. Here a chain knows which devices are behind it, over

    (unit, kind of link, devices used from there on)

some milliseconds for the 2^8 sets of eight devices and ten thousand columns. Of chains whose largest
extra is between two values, a *window*, no stage has more than the larger one, and each costs its fill
and the smaller one at least. Windows are divided as long as they leave many columns. A column that is in
no chain below the target in any window is in no such chain at all.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from graphpar.partition.chains.columns import Columns
from graphpar.partition.chains.hopeful import Allowed
from graphpar.partition.chains.set_loops import below_target, group_columns
from graphpar.partition.device_sets import DeviceSets
from graphpar.partition.slots import Slots
from graphpar.partition.unit_arrays import FloatArray, IntArray, starts

DEEPEST = 5
"""So often windows are divided."""

_ROUNDING = 1 + 1e-12
"""Sums of the same numbers in another order differ by less."""


@dataclass(frozen=True)
class Window:
    """Columns that may be in a chain with a largest extra between two values, in seconds."""

    columns: IntArray
    least_s: float
    most_s: float
    depth: int


class _Settled(NamedTuple):
    """A window, the columns in its chains, and what each of these may have of cost, extra and post."""

    window: Window
    columns: IntArray
    all_s: FloatArray


class SetChains:
    """Chains of columns that cost less than a target.

    Columns come by slot; `rows` are the options of `sets` that they stand for.
    """

    def __init__(
        self,
        columns: Columns,
        rows: IntArray,
        sets: DeviceSets,
        slots: Slots,
        num_units: int,
        target_s: float,
        post_weight: float,
    ) -> None:
        self._columns, self._rows, self._target_s = columns, rows, target_s * _ROUNDING
        self._post_s = post_weight * columns.post_s
        self._sets = sets.sources, sets.begins, sets.rises, sets.replicas
        self._sizes = slots.num_kinds * (num_units + 1), len(sets.replicas), num_units
        team, replicas = sets.team[rows], int(sets.replicas.max())
        below = np.minimum(columns.most_below, float(replicas)).astype(np.intp)
        most = np.maximum(below - sets.width[rows], -1)
        teams, levels = len(sets.rises), replicas + 2
        self._group, first = group_columns(columns.slot, team, most + 1, teams, levels)
        self._groups = *slots.at(columns.slot[first]).places, team[first], most[first]

    def at_prices(self, nu: FloatArray, rho: FloatArray) -> tuple[float, IntArray]:
        """What a chain costs at least where options pay for extra and post, and who may be in one."""
        columns = self._columns
        cost = columns.cost_s + nu[self._rows] * columns.extra_s + rho[self._rows] * self._post_s
        return self._below(np.arange(len(columns)), cost, np.zeros(len(columns)))[:2]

    def in_windows(self, some: IntArray, few: int, deepest: int) -> tuple[IntArray, Allowed]:
        """Which of some columns are in a chain below the target, and what others for which they stand
        may take to be in one, too; windows of so `few`, and those that were divided
        so often, stay as they are.
        """
        waiting, last = [Window(some, 0.0, self._target_s, 0)], list[_Settled]()
        while waiting:
            window = waiting.pop()
            more = np.maximum(self._columns.extra_s, window.least_s) + self._post_s
            fill_s, left, others_s = self._below(window.columns, self._columns.cost_s, more)
            if window.depth == deepest or len(left) <= few:
                last.append(_Settled(window, left, self._target_s - others_s))
            else:
                waiting += self._halves(window, left, fill_s)
        return self._allowed(last)

    def _allowed(self, last: Sequence[_Settled]) -> tuple[IntArray, Allowed]:
        columns = np.concatenate([s.columns for s in last])
        order = np.argsort(columns, kind="stable")
        ends = [(s.window.least_s, s.window.most_s, len(s.columns)) for s in last]
        least_s, most_s = (np.repeat([e[i] for e in ends], [e[2] for e in ends])[order] for i in (0, 1))
        all_s, columns = np.concatenate([s.all_s for s in last])[order], columns[order]
        begins = np.append(np.flatnonzero(starts(columns)), len(columns))
        found = columns[begins[:-1]]
        return found, Allowed(self._columns.extra_s[found], begins, least_s, most_s, all_s)

    def _halves(self, window: Window, left: IntArray, fill_s: float) -> Iterator[Window]:
        most_s = min(window.most_s, self._target_s - fill_s)
        middle_s, depth = (window.least_s + most_s) / 2, window.depth + 1
        yield Window(left, middle_s, most_s, depth)
        yield Window(left[self._columns.extra_s[left] <= middle_s], window.least_s, middle_s, depth)

    def _below(
        self, some: IntArray, cost: FloatArray, more: FloatArray
    ) -> tuple[float, IntArray, FloatArray]:
        if len(some) == 0:
            return np.inf, some, np.zeros(0)
        columns, target_s = (some, cost, more), self._target_s
        return below_target(columns, self._group, self._groups, self._sets, self._sizes, target_s)
