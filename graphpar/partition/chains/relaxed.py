"""A lower bound on all pipelines of a setting, and on those that use a given stage.

With weights `nu`, `rho` >= 0 of devices that add up to one over all of them, and prices `lambda` >= 0 on
their use, every pipeline costs

    fill + X + Y >= sum over its stages j of
                        cost_j + nu(j) extra_j + rho(j) post_j + lambda(j)   -   lambda . devices

where `nu(j)` adds up the weights of the devices of the stage: each device is in one stage at most, and
no extra exceeds X. The right side is least along a shortest path over (unit, kind of link), in which a
device may occur again and again; the prices see to it that this does not pay (Held and Karp, 1971:
subgradients; Christofides, Mingozzi and Toth, 1981: state-space relaxation). The shortest path through a
column minus the shortest path is its reduced cost: whoever uses it costs at least the bound plus that.

Where memory binds, the path also counts the replicas from each stage to the end (`deep`), so that it
keeps memory by position as the dynamic programme does.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from graphpar.partition.chains.columns import Columns, StagePrices
from graphpar.partition.chains.path_loops import chain_paths
from graphpar.partition.slots import SlotArrays, Slots
from graphpar.partition.stage_costs import StageLimits
from graphpar.partition.unit_arrays import FloatArray, IntArray, starts

ROUNDS = 60
"""Steps of the subgradient method."""

_FEW = 20_000
"""Columns that steps look at; every so often those are chosen anew among all."""

_FEW_TO_SWEEP = 5_000
"""So few columns are not bounded further: a sweep over them is cheaper than another step."""

_RENEWED = 15

_SHARE_KEPT = 0.7
"""Where no more than this share may still be below the target, the others are forgotten."""

_STEP = 5e-4
"""Less progress than this is none."""

_PATIENCE = 10
"""Steps without progress after which the method ends."""

_HOPE = 1.03
"""Where no plan is known, the bound is aimed at this multiple of itself."""


@dataclass(frozen=True, eq=False)
class Bounded:
    """A lower bound, and for every column what using it adds to it."""

    bound_s: float
    reduced_s: FloatArray


@dataclass(frozen=True, eq=False)
class Prices:
    """Per cell: weights of extra and post, price of use."""

    nu: FloatArray
    rho: FloatArray
    use: FloatArray


class Relaxation:
    """The relaxation of one setting; keeps the best prices found."""

    def __init__(
        self,
        slots: Slots,
        num_units: int,
        take: IntArray,
        width: IntArray,
        counts: Sequence[int],
        weights: FloatArray,
        post_weight: float,
        known: Prices | None = None,
        *,
        loops: bool = False,
    ) -> None:
        self._loops = loops
        self._all_slots = slots
        self._num_units = num_units
        self._num_kinds = slots.num_kinds
        self._take = take.astype(np.float64)
        self._width = width
        self._counts = np.array(counts, dtype=np.float64)
        self.post_weight = post_weight
        have = self._counts > 0
        nu = np.where(have, weights, 0.0)
        total = float(self._counts @ nu)
        even = np.where(have, 1 / max(float(self._counts.sum()), 1.0), 0.0)
        first = Prices(nu / total if total > 0 else even, even, np.zeros(len(self._counts)))
        self.prices = first if known is None else known

    def bound(
        self, columns: Columns, target_s: float, *, rounds: int = ROUNDS, deep: bool = False
    ) -> Bounded:
        """Raise the bound towards the target, and say what each column adds to it.

        Infinite for those that were excluded on the way.
        """
        replicas = int(self._counts.sum()) if deep else 0
        if self._loops:
            columns, self._places = self._compact(columns)
        everything = _Index(columns, self._width, replicas, loops=self._loops)
        best, found = -np.inf, Bounded(-np.inf, np.zeros(len(columns)))
        prices, theta = self.prices, 1.0
        few = len(columns) <= _FEW
        used, index, number, left = columns, everything, len(columns), None
        mean = np.zeros(3 * len(self._counts))
        stale, highest = 0, -np.inf
        for step in range(rounds):
            anew = few or step % _RENEWED == 0
            if anew:
                value, reduced, path = self._paths(columns, everything, prices)
                if not np.isfinite(value):
                    return Bounded(np.inf, np.full(number, np.inf))
                if value > best:
                    best, found, self.prices = value, Bounded(value, reduced), prices
                else:
                    theta *= 0.7
                if best >= target_s:
                    break
                hopeful = best + found.reduced_s < target_s
                some = int(hopeful.sum())
                if self._loops and step == 0 and some < _FEW_TO_SWEEP:
                    break
                if not few and some < _SHARE_KEPT * len(columns):
                    kept = np.flatnonzero(hopeful)
                    left = kept if left is None else left[kept]
                    columns, everything, reduced = (
                        columns.pick(kept),
                        everything.pick(kept),
                        reduced[kept],
                    )
                    found = Bounded(best, found.reduced_s[kept])
                    few = len(columns) <= _FEW
                    used, index = columns, everything
                    anew = False
                if not few:
                    kept = np.flatnonzero(reduced <= np.partition(reduced, _FEW)[_FEW])
                    used, index = columns.pick(kept), everything.pick(kept)
            if not (few and anew):
                value, _, path = self._paths(used, index, prices)
            aim = target_s if np.isfinite(target_s) else max(value, best) * _HOPE
            stale = 0 if value > highest * (1 + _STEP) else stale + 1
            highest = max(highest, value)
            if len(path) == 0 or stale > _PATIENCE:
                break
            gradient, scale = self._gradient(used, path, prices)
            mean = 0.6 * mean + 0.4 * gradient
            norm = float(gradient @ gradient)
            if norm <= 1e-18:
                break
            length = theta * max(aim - value, 1e-4 * abs(value)) / norm
            prices = self._moved(prices, length * mean, scale)
            theta *= 0.985
        if not few and best < target_s:
            value, reduced, _ = self._paths(columns, everything, prices)
            if value > best:
                found, self.prices = Bounded(value, reduced), prices
        if left is None:
            return found
        every = np.full(number, np.inf)
        every[left] = found.reduced_s
        return Bounded(found.bound_s, every)

    def first_look(
        self, stages: StagePrices, limits: StageLimits, *, deep: bool
    ) -> tuple[float, Columns]:
        """The bound on plans of crews at the prices known, and the columns that it leaves."""
        levels = int(self._counts.sum()) + 1 if deep else 1
        paid = float(self._counts @ self.prices.use)
        per_option, sizes = self._for_loops(self.prices, levels)
        places = self._all_slots.every.places
        chain_s, columns = stages.ideal(limits, per_option, paid, places, sizes)
        return chain_s - paid, columns

    def _for_loops(
        self, prices: Prices, levels: int
    ) -> tuple[tuple[IntArray, FloatArray, FloatArray, FloatArray], tuple[int, int, int]]:
        """By option replicas counted and prices; sizes of arrays."""
        units = self._num_units + 1
        counted = self._width if levels > 1 else np.zeros_like(self._width)
        rho = self.post_weight * (self._take @ prices.rho)
        per_option = counted, self._take @ prices.nu, rho, self._take @ prices.use
        return per_option, (levels, self._num_kinds * units, self._num_units)

    def _compact(self, columns: Columns) -> tuple[Columns, tuple[IntArray, IntArray]]:
        """Columns, which come by slot, with only the slots numbered that they have; where those are."""
        anew = starts(columns.slot)
        places = self._all_slots.at(columns.slot[anew]).places
        return replace(columns, slot=np.cumsum(anew) - 1), places

    @property
    def _slots(self) -> SlotArrays:
        return self._all_slots.every

    @cached_property
    def _starts(self) -> IntArray:
        """[unit]: the first slot that begins there."""
        return np.searchsorted(self._slots.first, np.arange(self._num_units + 1))

    def _column_prices(self, columns: Columns, prices: Prices) -> FloatArray:
        nu, use = self._take @ prices.nu, self._take @ prices.use
        found: FloatArray = columns.cost_s + nu[columns.option] * columns.extra_s + use[columns.option]
        if self.post_weight > 0:
            found += self.post_weight * (self._take @ prices.rho)[columns.option] * columns.post_s
        return found

    def _paths(
        self, columns: Columns, index: "_Index", prices: Prices
    ) -> tuple[float, FloatArray, IntArray]:
        """The bound at some prices, the reduced costs, and the columns of the shortest path."""
        if len(columns) == 0:
            return np.inf, np.zeros(0), np.zeros(0, dtype=np.intp)
        if self._loops:
            return self._loop_paths(columns, index, prices)
        cost, slots = self._column_prices(columns, prices), self._slots
        least = index.least(cost, len(slots.run))
        rest = self._rest(least, index)
        whole = float(rest[:, 0, 0].min())
        if not np.isfinite(whole):
            return np.inf, np.full(len(columns), np.inf), np.zeros(0, dtype=np.intp)
        ahead = self._ahead(least, index)
        before = ahead[:, slots.first, slots.before]
        after = rest[:, slots.last, slots.after]
        through = np.stack([before + _shifted(after, w) for w in index.widths])
        # A column may stand wherever no more replicas follow than its memory allows.
        through = np.minimum.accumulate(through, axis=1).reshape(-1)
        reduced = np.maximum(cost + through[index.place(len(slots.run))] - whole, 0.0)
        value = whole - float(self._counts @ prices.use)
        return value, reduced, self._path(columns, cost, least, rest, index)

    def _loop_paths(
        self, columns: Columns, index: "_Index", prices: Prices
    ) -> tuple[float, FloatArray, IntArray]:
        """`_paths` by compiled loops, for columns in the order of their slots."""
        per_option, sizes = self._for_loops(prices, index.levels)
        value, reduced, path = chain_paths(
            (
                columns.option,
                columns.slot,
                columns.cost_s,
                columns.extra_s,
                columns.post_s,
                columns.most_below,
            ),
            per_option,
            self._places,
            *sizes,
        )
        if not np.isfinite(value):
            return np.inf, np.full(len(columns), np.inf), path
        return value - float(self._counts @ prices.use), reduced, path

    def _rest(self, least: FloatArray, index: "_Index") -> FloatArray:
        """[replicas left, unit, link before]: what the rest of the chain costs at least."""
        slots, n = self._slots, self._num_units
        rest = np.full((index.levels, n + 1, self._num_kinds), np.inf)
        rest[0, n, 0] = 0.0
        for unit in range(n - 1, -1, -1):
            own = slice(self._starts[unit], self._starts[unit + 1])
            after = rest[:, slots.last[own], slots.after[own]]
            total = np.minimum.reduce(
                [least[i, :, own] + _shifted(after, w) for i, w in enumerate(index.widths)]
            )
            for kind in range(self._num_kinds):
                mine = slots.before[own] == kind
                if mine.any():
                    rest[:, unit, kind] = total[:, mine].min(axis=1)
        return rest

    def _ahead(self, least: FloatArray, index: "_Index") -> FloatArray:
        """[replicas left, unit, link before]: what the chain before costs at least."""
        slots, n = self._slots, self._num_units
        ahead = np.full((index.levels, n + 1, self._num_kinds), np.inf)
        ahead[:, 0, 0] = 0.0
        levels = np.arange(index.levels)[:, None]
        for unit in range(n):
            own = slice(self._starts[unit], self._starts[unit + 1])
            before = ahead[:, unit, slots.before[own]]
            # In the number of replicas left after the stage.
            total = np.minimum.reduce(
                [_dropped(least[i, :, own] + before, w) for i, w in enumerate(index.widths)]
            )
            np.minimum.at(ahead, (levels, slots.last[own], slots.after[own]), total)
        return ahead

    def _path(
        self,
        columns: Columns,
        cost: FloatArray,
        least: FloatArray,
        rest: FloatArray,
        index: "_Index",
    ) -> IntArray:
        slots = self._slots
        level, unit, kind = int(rest[:, 0, 0].argmin()), 0, 0
        path: list[int] = []
        while unit < self._num_units:
            own = np.arange(self._starts[unit], self._starts[unit + 1])
            own = own[slots.before[own] == kind]
            totals = [
                least[i, level, own]
                + (rest[level - w, slots.last[own], slots.after[own]] if w <= level else np.inf)
                for i, w in enumerate(index.widths)
            ]
            row, place = np.unravel_index(int(np.argmin(totals)), (len(totals), len(own)))
            slot = int(own[place])
            mine = (columns.slot == slot) & (index.row == row) & (index.below >= level)
            some = np.flatnonzero(mine)
            path.append(int(some[cost[some].argmin()]))
            level, unit = level - index.widths[int(row)], int(slots.last[slot])
            kind = int(slots.after[slot])
        return np.array(path, dtype=np.intp)

    def _gradient(
        self, columns: Columns, path: IntArray, prices: Prices
    ) -> tuple[FloatArray, tuple[float, float]]:
        """By cell: how much more than there is a path uses, and whose extra and post stand out."""
        take = self._take[columns.option[path]]
        uses = np.where(self._counts > 0, take.sum(axis=0) - self._counts, 0.0)
        extra, extra_scale = self._excess(take, columns.extra_s[path], prices.nu)
        post, post_scale = self._excess(take, columns.post_s[path], prices.rho)
        if self.post_weight == 0 or post_scale < 0.01 * extra_scale:
            post, post_scale = np.zeros(len(post)), 0.0
        return np.concatenate([uses, extra, post]), (extra_scale, post_scale)

    def _excess(
        self, take: FloatArray, seconds: FloatArray, weights: FloatArray
    ) -> tuple[FloatArray, float]:
        """Whose devices take longer than the weighted mean of all, in units of the longest."""
        number = np.maximum(self._counts, 1e-9)
        each = (take * seconds[:, None]).sum(axis=0) / number
        scale = float(seconds.max())
        if scale <= 0:
            return np.zeros(len(number)), 0.0
        mean = float(weights @ (each * number))
        return np.where(self._counts > 0, (each - mean) / scale, 0.0), scale

    def _moved(self, prices: Prices, step: FloatArray, scale: tuple[float, float]) -> Prices:
        size = len(self._counts)
        use = np.maximum(prices.use + step[:size], 0.0)
        nu = self._weights(prices.nu, step[size : 2 * size], scale[0])
        rho = self._weights(prices.rho, step[2 * size :], scale[1])
        return Prices(nu, rho, use)

    def _weights(self, weights: FloatArray, step: FloatArray, scale: float) -> FloatArray:
        if scale <= 0:
            return weights
        moved = np.maximum(weights + step / scale / np.maximum(self._counts, 1.0), 0.0)
        total = float(self._counts @ moved)
        return moved / total if total > 0 else weights


class _Index:
    """Where columns stand in an array [width, most replicas from here on, slot].

    `levels` is one more than the replicas counted; with none counted all widths are nothing.
    """

    def __init__(self, columns: Columns, width: IntArray, replicas: int, *, loops: bool) -> None:
        self.levels, self.loops = replicas + 1, loops
        if loops:
            return
        of_column = width[columns.option] if replicas else np.zeros(len(columns), dtype=np.intp)
        kinds, row = np.unique(of_column, return_inverse=True)
        self.widths: list[int] = kinds.tolist() or [0]
        self.row: IntArray = row.reshape(-1).astype(np.intp)
        self.below: IntArray = np.clip(columns.most_below, 0, replicas).astype(np.intp)
        self._slot = columns.slot

    def pick(self, kept: IntArray) -> "_Index":
        """Of some columns only."""
        if self.loops:
            return self
        found = _Index.__new__(_Index)
        found.levels, found.widths, found.loops = self.levels, self.widths, False
        found.row, found.below, found._slot = self.row[kept], self.below[kept], self._slot[kept]
        return found

    def place(self, num_slots: int) -> IntArray:
        """The position of each column in the flat array."""
        found: IntArray = (self.row * self.levels + self.below) * num_slots + self._slot
        return found

    def least(self, cost: FloatArray, num_slots: int) -> FloatArray:
        """[width, replicas left, slot]: the least cost of a column that may stand there."""
        flat = np.full(len(self.widths) * self.levels * num_slots, np.inf)
        np.minimum.at(flat, self.place(num_slots), cost)
        least = flat.reshape(len(self.widths), self.levels, num_slots)
        found: FloatArray = np.minimum.accumulate(least[:, ::-1], axis=1)[:, ::-1]
        return found


def _shifted(after: FloatArray, width: int) -> FloatArray:
    """[replicas left] after a stage, by those left before it."""
    if width == 0:
        return after
    found = np.full(after.shape, np.inf)
    found[width:] = after[:-width]
    return found


def _dropped(before: FloatArray, width: int) -> FloatArray:
    """[replicas left] before a stage, by those left after it."""
    if width == 0:
        return before
    found = np.full(before.shape, np.inf)
    found[:-width] = before[width:]
    return found
