"""The best single pipeline under limits, exactly: dynamic programming over (unit, devices used).

Given limits on every stage's extra and post,

    W[u, k, p, b] = least fill of a suffix of the pipeline that starts at unit u, uses exactly the
                    devices k (a count per cell), whose first stage stands in the places p and is
                    reached over a link of kind b
                  = min over options o with places p, last unit, link kind a after the stage:
                        fill(o, u, last) + transfer(b, u) + V[last, k - o, p, a]
    V[v, k, p, a] = min over places q whose link from p is of kind a of W[v, k, q, a]
    V[n, 0, p, 0] = 0

with the terms that break a limit or the memory left out. Memory depends only on how many replicas
follow. That is the number of devices in k; where there are tensor groups, k counts replicas as well,
as if they were devices of one more cell. Work: units^2 / 2 * sum over k of the options within k, in
array operations.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import numpy.typing as npt

from graphpar.partition.cells import Cells, StageOption, links_between
from graphpar.partition.stage_costs import StageCosts, StageLimits
from graphpar.partition.unit_arrays import FloatArray

BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.intp]


class OutOfTimeError(Exception):
    """The deadline passed before the programme was solved."""


@dataclass(frozen=True)
class Stage:
    """Units `first` to `last - 1` staffed by an option."""

    first: int
    last: int
    option: StageOption


@dataclass(frozen=True)
class ChainAnswer:
    """The pipeline with the least fill under the limits.

    `bound_s` is a lower bound on the fill of every such pipeline; the dynamic programme's is exact.
    """

    fill_s: float
    extra_s: float
    post_s: float
    bound_s: float
    stages: tuple[Stage, ...]


class ChainProgram:
    """The dynamic programme of one pipeline over the devices `limits` (a count per cell)."""

    def __init__(self, costs: StageCosts, cells: Cells, limits: Sequence[int]) -> None:
        self.costs = costs
        take = [o.take for o in costs.options]
        self._counts_replicas = any(o.width != o.num_devices for o in costs.options)
        if self._counts_replicas:
            limits = (*limits, sum(limits))
            take = [(*o.take, o.width) for o in costs.options]
        self.limits = tuple(limits)
        self._num_units = costs.before_s.shape[1] - 1
        self._strides = _strides(self.limits)
        self._states = _states(self.limits)
        self._places = sorted({o.places for o in costs.options}, key=sorted)
        self._join = _joins(costs, cells, self._places)
        self._exits = {pair: i for i, pair in enumerate(_exit_pairs(costs, self._places))}
        self._take = np.array(take, dtype=np.intp).reshape(len(take), len(self.limits))
        self._rows = self._arm_rows()
        self._most_below = np.ascontiguousarray(costs.most_below[self._rows["option"]].transpose(0, 2, 1))

    @property
    def num_variables(self) -> int:
        """Stages with finite costs, between all kinds of links."""
        return int(np.isfinite(self.costs.extra_s).sum())

    @property
    def extras_s(self) -> FloatArray:
        """All values the busiest stage's extra can take, increasing."""
        return self.costs.extras_s

    @property
    def posts_s(self) -> FloatArray:
        """All values the largest post can take, increasing."""
        return self.costs.posts_s

    def solve(self, limits: StageLimits, deadline_s: float) -> ChainAnswer | None:
        """The least fill with every stage within the limits, or None.

        Raises:
            OutOfTimeError: `time.monotonic()` passed `deadline_s`.
        """
        cost, longest = self._allowed(limits)
        if longest == 0:
            return None
        exits = self._sweep(cost, longest, deadline_s)
        return self._trace(cost, longest, exits)

    def _arm_rows(self) -> dict[str, IntArray]:
        arms, options = self.costs.arms, self.costs.options
        index = {p: i for i, p in enumerate(self._places)}
        place = [index[options[a.option].places] for a in arms]
        return {
            "option": np.array([a.option for a in arms], dtype=np.intp),
            "before": np.array([a.link_before for a in arms], dtype=np.intp),
            "place": np.array(place, dtype=np.intp),
            "exit": np.array(
                [self._exits[p, a.link_after] for p, a in zip(place, arms, strict=True)],
                dtype=np.intp,
            ),
        }

    def _allowed(self, limits: StageLimits) -> tuple[FloatArray, int]:
        """Cost per arm [arm, l, u] with everything over a limit infinite, and the longest stage."""
        costs, option, before = self.costs, self._rows["option"], self._rows["before"]
        post = costs.post_s[option]
        allowed: BoolArray = (costs.extra_s <= limits.extra_s) & (post <= limits.post_s)
        allowed &= costs.extra_s + post <= limits.both_s
        allowed &= costs.most_below[option] > 0
        cost = costs.fill_s[option] + costs.before_s[before][:, : self._num_units, None]
        # The pipeline starts and ends where nothing is sent, and only there.
        last = np.arange(self._num_units)[:, None] + np.arange(self._num_units)[None, :] + 1
        after = np.array([a.link_after for a in costs.arms])
        ends = np.equal((last == self._num_units)[None], (after == 0)[:, None, None])
        starts = np.equal((np.arange(self._num_units) == 0)[None, :], (before == 0)[:, None])
        allowed = allowed & ends & starts[:, :, None]
        lengths = np.flatnonzero(allowed.any(axis=(0, 1)))
        longest = int(lengths[-1]) + 1 if len(lengths) else 0
        cost = np.where(allowed, cost, np.inf)[:, :, :longest]
        # Minima are taken over l: with u innermost they run over whole rows at once.
        return np.ascontiguousarray(cost.transpose(0, 2, 1)), longest

    def _sweep(self, cost: FloatArray, longest: int, deadline_s: float) -> FloatArray:
        """V as [state, exit, unit], padded with infinity beyond the chain's end."""
        n = self._num_units
        exits = np.full((len(self._states), len(self._exits), n + longest), np.inf)
        exits[0, :, n] = 0.0
        most = self._most_below[:, :longest]
        usable = np.isfinite(cost).any(axis=(1, 2))
        below, limited = -1, cost
        for number in self._order():
            state = self._states[number]
            if self._replicas(state) != below:
                below = self._replicas(state)
                limited = np.where(most >= below, cost, np.inf)
                if time.monotonic() > deadline_s:
                    raise OutOfTimeError
            rows = np.flatnonzero(usable & self._within(state))
            if len(rows):
                heads = self._heads(limited, exits, number, rows, longest)
                self._open(exits, number, rows, heads)
        return exits

    def _replicas(self, state: tuple[int, ...]) -> int:
        return state[-1] if self._counts_replicas else sum(state)

    def _within(self, state: tuple[int, ...]) -> BoolArray:
        fits: BoolArray = np.logical_and.reduce(self._take <= np.array(state), axis=1)
        found: BoolArray = fits[self._rows["option"]]
        return found

    def _rest(self, number: int, rows: IntArray) -> IntArray:
        taken = self._take[self._rows["option"][rows]] @ self._strides
        rest: IntArray = number - taken
        return rest

    def _candidates(
        self, cost: FloatArray, exits: FloatArray, number: int, rows: IntArray, longest: int
    ) -> FloatArray:
        """Suffix costs [row, l, u] of every arm that may head a state."""
        after = exits[self._rest(number, rows), self._rows["exit"][rows]]
        row_step, unit_step = after.strides
        windows = np.lib.stride_tricks.as_strided(
            after[:, 1:],
            (len(rows), longest, self._num_units),
            (row_step, unit_step, unit_step),
            writeable=False,
        )
        found: FloatArray = cost[rows] + windows
        return found

    def _heads(
        self, cost: FloatArray, exits: FloatArray, number: int, rows: IntArray, longest: int
    ) -> FloatArray:
        found: FloatArray = self._candidates(cost, exits, number, rows, longest).min(axis=1)
        return found

    def _open(self, exits: FloatArray, number: int, rows: IntArray, heads: FloatArray) -> None:
        """Make the suffixes of a state available to every place they can be reached from."""
        for (place, kind), exit_number in self._exits.items():
            if kind == 0:
                continue
            mask = self._join[place, self._rows["place"][rows], self._rows["before"][rows]]
            mask &= self._rows["before"][rows] == kind
            if mask.any():
                exits[number, exit_number, : self._num_units] = heads[mask].min(axis=0)
        start = self._rows["before"][rows] == 0
        if start.any():
            # Exit 0 is never entered before the chain's end: it keeps the values of whole pipelines.
            exits[number, 0, 0] = heads[start, 0].min()

    def _order(self) -> list[int]:
        """States that some suffix may use, by number of replicas."""
        states = list(range(1, len(self._states)))
        if self._counts_replicas:
            states = [i for i in states if 0 < self._states[i][-1] <= sum(self._states[i][:-1])]
        return sorted(states, key=lambda i: (self._replicas(self._states[i]), i))

    def _trace(self, cost: FloatArray, longest: int, exits: FloatArray) -> ChainAnswer | None:
        whole = exits[:, 0, 0]
        # Fewer devices among equal plans.
        best = min(range(len(whole)), key=lambda i: (whole[i], sum(self._states[i])))
        if not np.isfinite(whole[best]):
            return None
        stages: list[Stage] = []
        extra = post = 0.0
        unit, number, rows = 0, best, np.flatnonzero(self._rows["before"] == 0)
        while unit < self._num_units:
            row, length = self._pick(cost, exits, number, rows, unit, longest)
            arm = self.costs.arms[row]
            option = self.costs.options[arm.option]
            stages.append(Stage(unit, unit + length + 1, option))
            extra = max(extra, float(self.costs.extra_s[row, unit, length]))
            post = max(post, float(self.costs.post_s[arm.option, unit, length]))
            number = int(self._rest(number, np.array([row]))[0])
            place = int(self._rows["place"][row])
            joined = self._join[place, self._rows["place"], self._rows["before"]]
            rows = np.flatnonzero(joined & (self._rows["before"] == arm.link_after))
            unit += length + 1
        fill = float(whole[best])
        return ChainAnswer(fill, extra, post, fill, tuple(stages))

    def _pick(
        self,
        cost: FloatArray,
        exits: FloatArray,
        number: int,
        rows: IntArray,
        unit: int,
        longest: int,
    ) -> tuple[int, int]:
        """The arm and length that attain the value of a state at a unit."""
        state = self._states[number]
        rows = rows[self._within(state)[rows]]
        below = self.costs.most_below[self._rows["option"][rows], unit, :longest] >= self._replicas(state)
        after = exits[self._rest(number, rows), self._rows["exit"][rows]]
        values = cost[rows, :, unit] + after[:, unit + 1 : unit + 1 + longest]
        values = np.where(below, values, np.inf)
        row, length = np.unravel_index(int(values.argmin()), values.shape)
        return int(rows[row]), int(length)


def count_states(limits: Sequence[int]) -> int:
    """States of the dynamic programme per unit."""
    total = 1
    for number in limits:
        total *= number + 1
    return total


def _states(limits: Sequence[int]) -> list[tuple[int, ...]]:
    return list(product(*(range(n + 1) for n in limits)))


def _strides(limits: Sequence[int]) -> IntArray:
    strides = [1]
    for number in reversed(limits[1:]):
        strides.append(strides[-1] * (number + 1))
    return np.array(strides[::-1], dtype=np.intp)


def _joins(costs: StageCosts, cells: Cells, places: Sequence[frozenset[int]]) -> npt.NDArray[np.bool_]:
    """[left place set, right place set, link kind]: whether that kind of link joins the two."""
    number = {links: i for i, links in enumerate(costs.link_kinds)}
    joins = np.zeros((len(places), len(places), len(number)), dtype=np.bool_)
    for i, left in enumerate(places):
        for j, right in enumerate(places):
            links = links_between(cells, left, right)
            if links:
                joins[i, j, number[links]] = True
    return joins


def _exit_pairs(costs: StageCosts, places: Sequence[frozenset[int]]) -> list[tuple[int, int]]:
    """The end of the pipeline first, then every place set with every kind of link."""
    ends = [(p, 0) for p in range(len(places))]
    return ends + [(p, k) for p in range(len(places)) for k in range(1, len(costs.link_kinds))]
