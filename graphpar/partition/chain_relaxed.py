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
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from graphpar.partition.chain_columns import Columns, Slots
from graphpar.partition.unit_arrays import FloatArray, IntArray

_ROUNDS = 60
"""Steps of the subgradient method."""

_FEW = 20_000
"""Columns that steps look at; every so often those are chosen anew among all."""

_RENEWED = 15

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
        counts: Sequence[int],
        weights: FloatArray,
        post_weight: float,
    ) -> None:
        self._slots = slots
        self._num_units = num_units
        self._num_kinds = int(slots.before.max(initial=0)) + 1
        self._take = take.astype(np.float64)
        self._counts = np.array(counts, dtype=np.float64)
        self._post_weight = post_weight
        have = self._counts > 0
        nu = np.where(have, weights, 0.0)
        total = float(self._counts @ nu)
        even = np.where(have, 1 / max(float(self._counts.sum()), 1.0), 0.0)
        self.prices = Prices(nu / total if total > 0 else even, even, np.zeros(len(self._counts)))

    def bound(self, columns: Columns, target_s: float, rounds: int = _ROUNDS) -> Bounded:
        """Raise the bound towards the target, and say what each column adds to it."""
        best, found = -np.inf, Bounded(-np.inf, np.zeros(len(columns)))
        prices, theta = self.prices, 1.0
        some: Columns | None = None
        few = len(columns) <= _FEW
        mean = np.zeros(2 * len(self._counts))
        for step in range(rounds):
            if few or step % _RENEWED == 0:
                value, reduced, path = self._paths(columns, prices)
                if not np.isfinite(value):
                    return Bounded(np.inf, np.full(len(columns), np.inf))
                if value > best:
                    best, found, self.prices = value, Bounded(value, reduced), prices
                else:
                    theta *= 0.7
                if not few:
                    cutoff = np.partition(reduced, _FEW)[_FEW]
                    some = columns.pick(reduced <= cutoff)
                    value, _, path = self._paths(some, prices)
                used = columns if few else some
            else:
                assert some is not None
                value, _, path = self._paths(some, prices)
                used = some
            assert used is not None
            aim = target_s if np.isfinite(target_s) else max(value, best) * _HOPE
            if best >= target_s or len(path) == 0:
                break
            gradient, scale = self._gradient(used, path)
            mean = 0.6 * mean + 0.4 * gradient
            norm = float(gradient @ gradient)
            if norm <= 1e-18:
                break
            length = theta * max(aim - value, 1e-4 * abs(value)) / norm
            prices = self._moved(prices, length * mean, scale)
            theta *= 0.985
        if not few:
            value, reduced, _ = self._paths(columns, prices)
            if value > best:
                found, self.prices = Bounded(value, reduced), prices
        return found

    def _column_prices(self, columns: Columns, prices: Prices) -> FloatArray:
        nu, use = self._take @ prices.nu, self._take @ prices.use
        found: FloatArray = columns.cost_s + nu[columns.option] * columns.extra_s + use[columns.option]
        if self._post_weight > 0:
            found += self._post_weight * (self._take @ prices.rho)[columns.option] * columns.post_s
        return found

    def _paths(self, columns: Columns, prices: Prices) -> tuple[float, FloatArray, IntArray]:
        """The bound at some prices, the reduced costs, and the columns of the shortest path."""
        if len(columns) == 0:
            return np.inf, np.zeros(0), np.zeros(0, dtype=np.intp)
        cost, slots, n = self._column_prices(columns, prices), self._slots, self._num_units
        least = np.full(len(slots.run), np.inf)
        np.minimum.at(least, columns.slot, cost)
        # From the end: what the rest of the chain costs at least, by unit and link before it.
        rest = np.full((n + 1, self._num_kinds), np.inf)
        rest[n, 0] = 0.0
        starts = np.searchsorted(slots.first, np.arange(n + 1))
        for unit in range(n - 1, -1, -1):
            own = slice(starts[unit], starts[unit + 1])
            total = least[own] + rest[slots.last[own], slots.after[own]]
            np.minimum.at(rest[unit], slots.before[own], total)
        whole = float(rest[0, 0])
        if not np.isfinite(whole):
            return np.inf, np.full(len(columns), np.inf), np.zeros(0, dtype=np.intp)
        ahead = np.full((n + 1, self._num_kinds), np.inf)
        ahead[0, 0] = 0.0
        for unit in range(n):
            own = slice(starts[unit], starts[unit + 1])
            total = least[own] + ahead[unit, slots.before[own]]
            np.minimum.at(ahead, (slots.last[own], slots.after[own]), total)
        through = ahead[slots.first, slots.before] + rest[slots.last, slots.after] - whole
        reduced = np.maximum(cost + through[columns.slot], 0.0)
        value = whole - float(self._counts @ prices.use)
        return value, reduced, self._path(columns, reduced, whole)

    def _path(self, columns: Columns, reduced: FloatArray, whole: float) -> IntArray:
        """Columns without reduced cost, one after another."""
        tight = np.flatnonzero(reduced <= 1e-9 * abs(whole) + 1e-300)
        first, before = self._slots.first[columns.slot[tight]], self._slots.before[columns.slot[tight]]
        at: dict[tuple[int, int], int] = {}
        for column, unit, kind in zip(tight.tolist(), first.tolist(), before.tolist(), strict=True):
            at.setdefault((unit, kind), column)
        path, place = [], (0, 0)
        while place[0] < self._num_units and place in at:
            column = at[place]
            path.append(column)
            slot = int(columns.slot[column])
            place = int(self._slots.last[slot]), int(self._slots.after[slot])
        return np.array(path, dtype=np.intp)

    def _gradient(self, columns: Columns, path: IntArray) -> tuple[FloatArray, tuple[float, float]]:
        """By cell: how much more than there is a path uses, and whose extra and post stand out."""
        take = self._take[columns.option[path]]
        number = np.maximum(self._counts, 1e-9)
        uses = np.where(self._counts > 0, take.sum(axis=0) - self._counts, 0.0)
        extra = (take * columns.extra_s[path, None]).sum(axis=0) / number
        scale = float(columns.extra_s[path].max())
        have = self._counts > 0
        mean = float(self.prices.nu @ (extra * number))
        off = np.where(have, (extra - mean) / scale if scale > 0 else 0.0, 0.0)
        return np.concatenate([uses, off]), (scale, 1.0)

    def _moved(self, prices: Prices, step: FloatArray, scale: tuple[float, float]) -> Prices:
        size = len(self._counts)
        use = np.maximum(prices.use + step[:size], 0.0)
        nu = prices.nu
        if scale[0] > 0:
            nu = np.maximum(prices.nu + step[size:] / scale[0] / np.maximum(self._counts, 1.0), 0.0)
            total = float(self._counts @ nu)
            nu = nu / total if total > 0 else prices.nu
        return Prices(nu, prices.rho, use)
