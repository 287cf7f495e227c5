"""Mixes of instance types that a budget pays for, with lower bounds on the step of each.

Whatever is left idle costs nothing in time, so more instances never make the best plan slower: where the
fastest is looked for, only mixes to which no instance more could be added are. Idle ones cost money, so
where the cheapest is, all are.

Every choice of prices on the time of devices and samples bounds the step of every mix at once
(`physical_bound.TimePrices`), so hundreds of thousands of mixes are bounded by one product of matrices.
Prices that suit one mix best are found for it alone, where it comes to that, and sharpen the bounds of
those like it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from graphpar import catalogue
from graphpar.cost import CostTable
from graphpar.partition.bounds import least_bytes
from graphpar.partition.memory_bound import room_bytes
from graphpar.partition.physical_bound import PhysicalBound, TimePrices
from graphpar.partition.unit_arrays import BoolArray, FloatArray, IntArray

Objective = Literal["time", "cost"]
"""What is to be least: the time of a step, or what it costs to rent the instances for so long."""

MOST_MIXES = 1_000_000
MOST_DEVICES = 1024

_CENT = 1e-9
"""Relative to the budget: a price list's cents must not make the last instance too dear."""


@dataclass(frozen=True)
class Mixes:
    """All mixes that are looked at.

    Attributes:
        types: Names of the instance types.
        usd_per_h: Their prices.
        counts: [mix, type]: instances of each type.
    """

    types: tuple[str, ...]
    usd_per_h: FloatArray
    counts: IntArray

    def named(self, mix: int) -> dict[str, int]:
        """Instances of each type that a mix has any of."""
        return {t: int(n) for t, n in zip(self.types, self.counts[mix], strict=True) if n}

    def price(self, counts: Mapping[str, int]) -> float:
        """Dollars per hour of so many instances."""
        return sum(float(p) * counts.get(t, 0) for t, p in zip(self.types, self.usd_per_h, strict=True))

    def find(self, counts: Mapping[str, int]) -> int | None:
        """The number of a mix; None where it is not looked at, for more could be paid."""
        wanted = np.array([counts.get(t, 0) for t in self.types])
        rows = np.flatnonzero((self.counts == wanted).all(axis=1))
        return int(rows[0]) if len(rows) else None


def mixes_within(prices: Mapping[str, float], usd_per_h: float, objective: Objective = "time") -> Mixes:
    """The mixes to which no instance more could be added; where the cost counts, all that can be paid.

    Raises:
        ValueError: There are too many of them, or one has too many devices.

    >>> mixes_within({"g5.xlarge": 1.0, "p3.2xlarge": 3.0}, 7.0).counts.tolist()
    [[0, 7], [1, 4], [2, 1]]
    >>> mixes_within({"g5.xlarge": 1.0, "p3.2xlarge": 3.0}, 3.0, "cost").counts.tolist()
    [[0, 1], [0, 2], [0, 3], [1, 0]]
    """
    types = tuple(sorted(prices, key=prices.__getitem__, reverse=True))
    money = usd_per_h * (1 + _CENT)
    counts, left = np.zeros((1, 0), dtype=np.intp), np.full(1, money)
    every = objective == "cost"
    for name in types if every else types[:-1]:
        most = (np.maximum(left, 0) // prices[name]).astype(np.intp)
        if int((most + 1).sum()) > MOST_MIXES:
            raise ValueError(
                f"more than {MOST_MIXES:,} clusters cost up to {usd_per_h:g} $/h; give fewer types or a "
                "smaller budget"
            )
        row = np.repeat(np.arange(len(left)), most + 1)
        first = np.cumsum(most + 1) - (most + 1)
        number = np.arange(len(row)) - first[row]
        counts = np.column_stack([counts[row], number])
        left = left[row] - number * prices[name]
    rest = np.floor(np.maximum(left, 0) / prices[types[-1]]).astype(np.intp)
    counts = counts[counts.any(axis=1)] if every else np.column_stack([counts, rest])
    most_devices = int((counts @ np.array([catalogue.instances()[t].count for t in types])).max())
    if most_devices > MOST_DEVICES:
        raise ValueError(
            f"{usd_per_h:g} $/h pay for {most_devices} devices, of which at most "
            f"{MOST_DEVICES} are planned; give a smaller budget, or leave out the cheapest types"
        )
    return Mixes(types, np.array([prices[t] for t in types]), counts)


class MixBounds:
    """A lower bound on the step of every mix: infinite where its devices cannot hold the model.

    Attributes:
        least_s: [mix]: no plan on the mix has a shorter step; grows as more is known.
        excluded: [mix]: whether it cannot be planned as asked at all; its bound is infinite, too.
        problem: Why; the first reason of several.
    """

    def __init__(self, mixes: Mixes) -> None:
        self._mixes = mixes
        self.least_s: FloatArray = np.zeros(len(mixes.counts))
        self.excluded: BoolArray = np.zeros(len(mixes.counts), dtype=np.bool_)
        self.problem = ""
        self._sharp: BoolArray = np.zeros(len(mixes.counts), dtype=np.bool_)
        self._parts: list[_Part] = []
        self._part_of: IntArray = np.full(len(mixes.counts), -1, dtype=np.intp)

    def cover(self, mixes: BoolArray, table: CostTable, devices: FloatArray) -> None:
        """Bound some mixes by the prices of a table.

        Args:
            mixes: [mix]: which.
            table: Prices of all kinds of devices that are in them.
            devices: [type, class]: devices of each class of the table in an instance of each type.
        """
        rows = np.flatnonzero(mixes)
        part = _Part(rows, self._mixes.counts[rows] @ devices, PhysicalBound(table))
        self._part_of[rows] = len(self._parts)
        self._parts.append(part)
        each = [room_bytes(table, row) for row in np.eye(devices.shape[1], dtype=int).tolist()]
        # A device by itself sends no messages and has more room than the table says.
        several = part.numbers.sum(axis=1) > 1
        self.least_s[rows[several & (part.numbers @ np.array(each) < least_bytes(table))]] = np.inf
        # Prices that suit one type alone, and one instance of each together.
        for alone in [*devices[devices.any(axis=1)], devices.sum(axis=0)]:
            self._bound(part, part.bound.prices(alone.astype(int).tolist())[1])

    def sharpen(self, mix: int) -> bool:
        """Bound a mix by the prices that suit it best, and all others, too; False where that was done."""
        if self._sharp[mix]:
            return False
        self._sharp[mix] = True
        part = self._parts[self._part_of[mix]]
        number = part.numbers[np.searchsorted(part.rows, mix)]
        best_s, prices = part.bound.prices(number.astype(int).tolist())
        self._bound(part, prices)
        self.raise_to(mix, best_s)
        return True

    def exclude(self, mixes: BoolArray | int, problem: str) -> None:
        """Note that some mixes cannot be planned as asked, and why."""
        self.excluded[mixes] = True
        self.least_s[mixes] = np.inf
        self.problem = self.problem or (problem if self.excluded.any() else "")

    def raise_to(self, mix: int, least_s: float) -> None:
        """What else is known of a mix."""
        self.least_s[mix] = max(self.least_s[mix], least_s)

    def _bound(self, part: "_Part", prices: TimePrices) -> None:
        found = prices.work_s / np.maximum(part.numbers @ prices.device + prices.sample, 1e-300)
        self.least_s[part.rows] = np.maximum(self.least_s[part.rows], found)


@dataclass(frozen=True)
class _Part:
    """Mixes that are bounded by one table."""

    rows: IntArray
    numbers: FloatArray
    """[mix of the part, class]: devices."""
    bound: PhysicalBound
