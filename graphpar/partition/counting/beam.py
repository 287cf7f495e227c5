"""Build lines stage by stage, the most promising first, as many at once as a beam is wide.

Under prices with which a line that keeps all sums costs at most 1 (`lines`), a part of a line
whose own price and least price to go exceed 1 is no part of one. The others are grown from the last stage
to the first. Of parts with the same blocks, replicas and sums the cheapest stands for all. As long as no
part had to be left out for lack of room the search is complete: what it does not find is not there.
"""

import time
from dataclasses import dataclass

import numpy as np

from graphpar.partition.clock import OutOfTimeError
from graphpar.partition.counting.lines import TOLERANCE, Line, Lines
from graphpar.partition.unit_arrays import FloatArray, IntArray

_CHUNK_ENTRIES = 2_000_000
"""Pairs of parts and columns looked at together."""

_SPARE = 24
"""Parts looked at for every part kept: many are alike or take too many devices."""


@dataclass(frozen=True, eq=False)
class Harvest:
    """The best line found, if any, and whether everything was looked at."""

    line: Line | None
    complete: bool


@dataclass(frozen=True, eq=False)
class _Parts:
    """Parts of lines, all with the same number of stages; arrays over parts."""

    blocks: IntArray
    replicas: IntArray
    cost: FloatArray
    price: FloatArray
    sums: FloatArray
    """[part, sum]"""
    odd: IntArray
    """A bit for each kind with a boundary inside a node that wants another one."""
    column: IntArray
    parent: IntArray

    def pick(self, index: IntArray) -> "_Parts":
        return _Parts(
            self.blocks[index],
            self.replicas[index],
            self.cost[index],
            self.price[index],
            self.sums[index],
            self.odd[index],
            self.column[index],
            self.parent[index],
        )


def grow_lines(lines: Lines, prices: FloatArray, spend: float, width: int, deadline_s: float) -> Harvest:
    """The cheapest line that keeps all sums and costs less than `spend`, as far as a beam finds it.

    Raises:
        OutOfTimeError: `time.monotonic()` passed `deadline_s`.
    """
    return _Beam(lines, prices, spend, width, deadline_s).work()


class _Beam:
    def __init__(
        self, lines: Lines, prices: FloatArray, spend: float, width: int, deadline_s: float
    ) -> None:
        self._lines, self._spend, self._width, self._deadline_s = lines, spend, width, deadline_s
        self._priced = lines.priced(prices, spend)
        self._to_go = lines.to_go(self._priced)
        self._most = 1 + TOLERANCE - float(prices[1:] @ lines.constant)
        self._sums = np.ascontiguousarray(lines.sums.T)
        self._room = 1 + TOLERANCE - lines.constant
        self._odd: IntArray = (1 << np.arange(len(lines.odd))) @ lines.odd
        self._levels: list[_Parts] = []
        self._best: tuple[float, int, int, int] | None = None
        self._complete = True

    def work(self) -> Harvest:
        parts = self._begin()
        while len(parts.blocks):
            self._levels.append(parts)
            self._close(parts)
            parts = self._narrow(self._extend(parts))
        line = self._line()
        if line is not None and not self._lines.holds(line):
            # Sums know nodes of all kinds together only.
            return Harvest(None, complete=False)
        return Harvest(line, self._complete)

    @property
    def _limit(self) -> float:
        """Only lines that cost less are of interest."""
        return self._best[0] if self._best is not None else self._spend

    def _begin(self) -> _Parts:
        lines = self._lines
        whole = lines.whole[self._keeps(self._sums[lines.whole])]
        if len(whole):
            cheapest = int(whole[lines.cost[whole].argmin()])
            self._offer(float(lines.cost[cheapest]), -1, -1, cheapest)
        index = lines.last[self._keeps(self._sums[lines.last])]
        nobody = np.full(len(index), -1, dtype=np.intp)
        return self._narrow(self._parts(index, nobody, None))

    def _keeps(self, sums: FloatArray) -> IntArray:
        found: IntArray = np.flatnonzero(
            (sums[:, : self._growing] <= self._room[: self._growing]).all(axis=1)
        )
        return found

    @property
    def _growing(self) -> int:
        """Sums that only grow along a line; the last one, of nodes, may fall again."""
        return len(self._room) - 1

    def _parts(self, column: IntArray, parent: IntArray, before: _Parts | None) -> _Parts:
        """Parts that end in the given columns, each after a part (by place) or after nobody."""
        lines = self._lines
        new = _Parts(
            blocks=lines.columns.blocks[column],
            replicas=lines.width[column],
            cost=lines.cost[column],
            price=self._priced[column],
            sums=self._sums[column],
            odd=self._odd[column],
            column=column,
            parent=parent,
        )
        if before is None:
            return new
        return _Parts(
            blocks=new.blocks + before.blocks[parent],
            replicas=new.replicas + before.replicas[parent],
            cost=new.cost + before.cost[parent],
            price=new.price + before.price[parent],
            sums=new.sums + before.sums[parent],
            odd=new.odd ^ before.odd[parent],
            column=column,
            parent=parent,
        )

    def _close(self, parts: _Parts) -> None:
        """Complete parts with first stages."""
        lines, first = self._lines, self._lines.first
        fits = parts.blocks[:, None] + lines.columns.blocks[first][None] == lines.blocks
        fits &= parts.replicas[:, None] + lines.width[first][None] <= lines.due[first][None]
        fits &= parts.cost[:, None] + lines.cost[first][None] < self._limit
        fits &= parts.odd[:, None] == self._odd[first][None]
        part, place = np.nonzero(fits)
        sums = parts.sums[part] + self._sums[first[place]]
        kept = (sums <= self._room).all(axis=1)
        part, place = part[kept], place[kept]
        if len(part):
            cost = parts.cost[part] + lines.cost[first[place]]
            best = int(cost.argmin())
            self._offer(
                float(cost[best]), len(self._levels) - 1, int(part[best]), int(first[place[best]])
            )

    def _offer(self, cost: float, level: int, part: int, column: int) -> None:
        if cost < self._limit:
            self._best = (cost, level, part, column)

    def _extend(self, parts: _Parts) -> _Parts:
        """All parts with one stage more that may become a line."""
        lines, body = self._lines, self._lines.body
        width, blocks, due = lines.width[body], lines.columns.blocks[body], lines.due[body]
        found: list[_Parts] = []
        step = max(1, _CHUNK_ENTRIES // max(1, len(body)))
        for low in range(0, len(parts.blocks), step):
            if time.monotonic() > self._deadline_s:
                raise OutOfTimeError
            chunk = np.arange(low, min(low + step, len(parts.blocks)))
            replicas = parts.replicas[chunk, None] + width[None]
            behind = parts.blocks[chunk, None] + blocks[None]
            fits = (replicas <= due[None]) & (behind <= lines.blocks)
            part, place = np.nonzero(fits)
            total = self._to_go[behind[part, place], np.minimum(replicas[part, place], lines.cap)]
            total = total + parts.price[chunk[part]] + self._priced[body[place]]
            kept = self._promising(total)
            part, place = chunk[part[kept]], body[place[kept]]
            kept = self._keeps(parts.sums[part] + self._sums[place])
            found.append(self._parts(place[kept], part[kept], parts))
        return _joined(found)

    def _promising(self, total: FloatArray) -> IntArray:
        """Places of what may become a line, the least prices where there are too many."""
        kept = np.flatnonzero(total <= self._most)
        most = _SPARE * self._width
        if len(kept) > most:
            self._complete = False
            kept = kept[np.argpartition(total[kept], most)[:most]]
        return kept

    def _narrow(self, parts: _Parts) -> _Parts:
        """The most promising parts, one of those that are alike."""
        lines = self._lines
        total = parts.price + self._to_go[parts.blocks, np.minimum(parts.replicas, lines.cap)]
        kept = np.flatnonzero((total <= self._most) & (parts.cost < self._limit))
        kept = kept[np.lexsort((parts.cost[kept], total[kept]))]
        if len(kept) > _SPARE * self._width:
            kept, self._complete = kept[: _SPARE * self._width], False
        alike = np.column_stack(
            [parts.blocks[kept], parts.replicas[kept], parts.odd[kept], np.round(parts.sums[kept] * 1e8)]
        ).astype(np.int64)
        # Sorted by price: the first of those that are alike costs least.
        place = np.sort(np.unique(alike, axis=0, return_index=True)[1])
        if len(place) > self._width:
            place, self._complete = place[: self._width], False
        return parts.pick(kept[place])

    def _line(self) -> Line | None:
        if self._best is None:
            return None
        _, level, part, column = self._best
        columns = [column]
        while level >= 0:
            columns.append(int(self._levels[level].column[part]))
            part, level = int(self._levels[level].parent[part]), level - 1
        columns.reverse()
        lines = self._lines
        sums = lines.sums[:, columns].sum(axis=1) + lines.constant
        return Line(tuple(columns), float(lines.cost[columns].sum()), sums)


def _joined(parts: list[_Parts]) -> _Parts:
    if len(parts) == 1:
        return parts[0]
    return _Parts(*(np.concatenate([getattr(p, n) for p in parts]) for n in _Parts.__dataclass_fields__))
