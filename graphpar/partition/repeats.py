"""Find the repeated middle of a chain: a few units, then many equal blocks, then a few units."""

from dataclasses import dataclass

from graphpar.cost import CostTable


@dataclass(frozen=True)
class Repeats:
    """Blocks of `period` units from unit `start`, `number` of them, each like the others."""

    start: int
    period: int
    number: int

    def unit(self, block: int) -> int:
        """The unit at which a block starts."""
        return self.start + block * self.period

    def coarser(self, most: int) -> "Repeats | None":
        """At least `most` blocks, each of as many of these as that allows; None where that is one.

        What does not divide evenly is left to what follows the last block.

        >>> Repeats(1, 1, 126).coarser(48)
        Repeats(start=1, period=2, number=63)
        """
        joined = self.number // most
        return Repeats(self.start, self.period * joined, self.number // joined) if joined > 1 else None

    @property
    def end(self) -> int:
        """The unit after the last block."""
        return self.unit(self.number)


def find_repeats(table: CostTable) -> Repeats | None:
    """The longest run of equal blocks, finest blocks first among equals; None without repetition.

    Blocks are equal when their units are, and when the same number of bytes enters each of them.
    """
    best: Repeats | None = None
    for period in range(1, table.num_units // 2 + 1):
        for found in _runs(table.units, period):
            even = _same_cuts(table, found)
            if even.number < 2:
                continue
            if best is None or even.number * period > best.number * best.period:
                best = even
    return best


def _runs(units: tuple[int, ...], period: int) -> list[Repeats]:
    """Maximal runs of blocks of one period."""
    found, start = [], 0
    while start + 2 * period <= len(units):
        end = start + period
        while end < len(units) and units[end] == units[end - period]:
            end += 1
        number = (end - start) // period
        if number >= 2:
            found.append(Repeats(start, period, number))
            start = max(start + 1, end - period)
        else:
            start += 1
    return found


def _same_cuts(table: CostTable, run: Repeats) -> Repeats:
    """The run without blocks at its ends whose incoming bytes are unlike those in the middle."""
    cuts = [
        tuple(table.cut_bytes(run.unit(b), size) for size in (table.sizes[0], table.sizes[-1]))
        for b in range(run.number + 1)
    ]
    usual = cuts[(run.number + 1) // 2]
    low = (run.number + 1) // 2
    high = low
    while low > 0 and cuts[low - 1] == usual:
        low -= 1
    while high < run.number and cuts[high + 1] == usual:
        high += 1
    return Repeats(run.unit(low), run.period, high - low)
