"""What kinds of devices run in whole stages, exactly; what lies between stages has a price.

`counting_lines` takes a pipeline as a line of stages: along it memory by position is exact, but what is
taken of each kind of device is priced. With many kinds that says too little: a mixture of lines uses
devices to the last one, while whole stages leave some of each kind idle. Here it is the other way round.
Any stages of one kind that fit into its devices together are a *pattern*, and

    V[d, l] = least price of stages with l blocks on d devices of a kind     (a knapsack, stages repeat)

is exact. A pipeline is a pattern of each kind: blocks add up over the kinds, one has the first stage, one
the last. What remains are rows of the counting programme (nodes, whole groups, memory by position), and
these are priced: with prices p >= 0 on rows `a x <= b` a pipeline that keeps them costs at least what the
cheapest patterns do at `cost + p a`, less `p b` (Lagrange). Prices begin as the duals of the linear
relaxation and rise by cutting planes, rows of memory join when they are broken. Whatever prices are, the
bound is one. Patterns that keep all rows are a pipeline.
"""

import time
from dataclasses import dataclass
from math import gcd

import numpy as np

from graphpar.partition.clock import OutOfTimeError
from graphpar.partition.counting_columns import BODY, FIRST, LAST
from graphpar.partition.counting_lines import TOLERANCE, Line, Lines, best_prices
from graphpar.partition.jit import compiled_exactly
from graphpar.partition.unit_arrays import FloatArray, IntArray

_ROUNDS = 40
"""Prices tried for one box."""

_PATIENCE = 12
"""Rounds without a better bound or pipeline after which no more prices are tried."""

_MOST_PRICES = 20.0
"""Prices are at most this multiple of what may be spent, per whole row."""

_INWARDS = 0.5
"""The next prices lie by this share towards the best ones so far, which damps the cutting planes."""

_JOIN = 3
"""Rows of memory that join in one round."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows `values x <= limits` over the columns of lines, with prices to begin with."""

    values: FloatArray
    """[row, column]"""
    limits: FloatArray
    prices: FloatArray


@dataclass(frozen=True, eq=False)
class Stocks:
    """Devices of each kind, and of each column its kind and how many it takes."""

    counts: tuple[int, ...]
    kind: IntArray
    devices: IntArray
    odd: IntArray
    """1 where a column has one boundary inside a node that only its kind has: another one needs it."""


@dataclass(frozen=True, eq=False)
class Harvest:
    """What pipelines cost at least, the cheapest met that keeps everything, the columns of all met."""

    cost: float
    line: Line | None
    met: IntArray


def judge_kinds(
    lines: Lines, stocks: Stocks, rows: Rows, spend: float, close: float, deadline_s: float
) -> Harvest:
    """Raise what pipelines cost at least, until it exceeds `spend` or a pipeline meets it.

    Args:
        lines: The columns and what they cost.
        stocks: Who has how many devices.
        rows: Everything else that a pipeline must keep but memory by position; with memory's rows that
            have a price already.
        spend: Only pipelines that cost less are of interest.
        close: A difference in cost that does not matter.
        deadline_s: `time.monotonic()` at which to stop.

    Raises:
        OutOfTimeError: Time is up.
    """
    return _Search(lines, stocks, rows, spend, close, deadline_s).work()


class _Search:
    def __init__(
        self, lines: Lines, stocks: Stocks, rows: Rows, spend: float, close: float, deadline_s: float
    ) -> None:
        self._lines, self._spend, self._close, self._deadline_s = lines, spend, close, deadline_s
        self._patterns = _Patterns(lines, stocks)
        # Every row in units of its own size, so that prices compare.
        self._scale = np.maximum(np.abs(rows.limits), 1.0)
        self._values = rows.values / self._scale[:, None]
        self._limits = rows.limits / self._scale
        self._prices = rows.prices * self._scale
        self._met: list[tuple[float, IntArray]] = []
        self._line: Line | None = None
        self._cost = -np.inf

    def work(self) -> Harvest:
        whole = self._whole()
        best, idle = self._prices, 0
        for _ in range(_ROUNDS):
            if time.monotonic() > self._deadline_s:
                raise OutOfTimeError
            cost, used = self._patterns.cheapest(self._lines.cost + self._prices @ self._values)
            value = min(whole, cost - float(self._prices @ self._limits))
            idle += 1
            if value > self._cost:
                self._cost, best, idle = value, self._prices, 0
            if used is None or value > self._spend:
                break
            idle = 0 if self._take(used) else idle
            if self._best - self._cost < self._close or idle >= _PATIENCE:
                break
            best = self._join(used, best)
            ceiling, wanted = self._wanted(used)
            if min(whole, ceiling) - self._cost < self._close:
                break
            self._prices = (1 - _INWARDS) * wanted + _INWARDS * best
        met = [used for _, used in self._met]
        return Harvest(self._cost, self._line, np.unique(np.concatenate([*met, np.zeros(0, np.intp)])))

    @property
    def _best(self) -> float:
        return self._line.cost if self._line is not None else np.inf

    def _whole(self) -> float:
        """The cheapest pipeline of a single stage."""
        lines = self._lines
        if len(lines.whole) == 0:
            return np.inf
        column = int(lines.whole[lines.cost[lines.whole].argmin()])
        line = lines.line_of((column,))
        if lines.holds(line) and line.cost < self._spend:
            self._line = line
        return line.cost

    def _take(self, used: IntArray) -> bool:
        """Keep patterns that are a pipeline if none was cheaper."""
        lines = self._lines
        # From the end of the line by growing due: if any order keeps memory this one does.
        order = np.lexsort((lines.due[used], -lines.columns.role[used]))
        line = lines.line_of(tuple(used[order].tolist()))
        if line.cost >= min(self._best, self._spend) or not lines.holds(line):
            return False
        self._line = line
        return True

    def _join(self, used: IntArray, best: FloatArray) -> FloatArray:
        """Let rows of memory that patterns break join without a price."""
        lines = self._lines
        last = lines.columns.role[used] == LAST
        load = np.where(lines.columns.role[used] <= FIRST, 0, lines.width[used])
        dues = np.unique(lines.due[used][~last & (lines.columns.role[used] == BODY)])
        held = [
            np.where(last, np.minimum(load, d), np.where(lines.due[used] <= d, load, 0)).sum()
            for d in dues.tolist()
        ]
        excess = np.array(held) / dues - 1
        worst = [int(dues[i]) for i in np.argsort(-excess)[:_JOIN] if excess[i] > TOLERANCE]
        for due in worst:
            row = memory_row(lines, due) / due
            if (self._values == row).all(axis=1).any():
                continue
            self._values = np.concatenate([self._values, row[None]])
            self._limits = np.append(self._limits, 1.0)
            best = np.append(best, 0.0)
        return best

    def _wanted(self, used: IntArray) -> tuple[float, FloatArray]:
        """The prices for which the cheapest of the patterns met costs most, and what it costs then."""
        self._met.append((float(self._lines.cost[used].sum()), used))
        excess = np.array([self._values[:, u].sum(axis=1) - self._limits for _, u in self._met])
        costs = np.array([cost for cost, _ in self._met])
        size = min(abs(self._spend), float(np.abs(costs).max())) + 1e-30
        return best_prices(costs, excess, _MOST_PRICES * size)


def memory_row(lines: Lines, due: int) -> FloatArray:
    """Replicas that columns put among the `due` last ones for sure (`counting_master`)."""
    role, width = lines.columns.role, lines.width
    inner = np.where((role == BODY) & (lines.due <= due), width, 0)
    found: FloatArray = np.where(role == LAST, np.minimum(width, due), inner).astype(np.float64)
    return found


class _Patterns:
    """The cheapest whole stages of every kind for every number of blocks, under given prices."""

    def __init__(self, lines: Lines, stocks: Stocks) -> None:
        self._blocks = lines.blocks
        self._kinds = [
            _Kind(lines, stocks, number, count)
            for number, count in enumerate(stocks.counts)
            if count > 0 and (stocks.kind == number).any()
        ]

    def cheapest(self, priced: FloatArray) -> tuple[float, IntArray | None]:
        """The least price of patterns that make a pipeline of several stages, and their columns."""
        total = np.full((4, self._blocks + 1), np.inf)
        total[0, 0] = 0.0
        steps: list[tuple[IntArray, IntArray]] = []
        for kind in self._kinds:
            total, ends, own = _joined(total, kind.solve(priced))
            steps.append((ends, own))
        value = float(total[3, self._blocks])
        if not np.isfinite(value):
            return np.inf, None
        used: list[int] = []
        both, blocks = 3, self._blocks
        for kind, (of_ends, of_blocks) in zip(reversed(self._kinds), reversed(steps), strict=True):
            mine, held = int(of_ends[both, blocks]), int(of_blocks[both, blocks])
            used += kind.columns(mine, held)
            both, blocks = both - mine, blocks - held
        return value, np.array(used, dtype=np.intp)


def _joined(total: FloatArray, own: FloatArray) -> tuple[FloatArray, IntArray, IntArray]:
    """[ends, blocks] of some kinds with one more: the least price, that kind's ends and blocks.

    Ends are a bit each: 1 for the first stage, 2 for the last.
    """
    number = total.shape[1]
    best = np.full(total.shape, np.inf)
    of_ends, of_blocks = (np.zeros(total.shape, dtype=np.intp) for _ in range(2))
    held = np.arange(number)
    before = held[:, None] - held[None]
    for mine in range(4):
        row = np.where(before >= 0, own[mine][None], np.inf)
        for ends in range(4):
            if ends & mine:
                continue
            sums = total[ends][np.maximum(before, 0)] + row
            place = sums.argmin(axis=1)
            value = sums[held, place]
            better = value < best[ends | mine]
            best[ends | mine][better] = value[better]
            of_ends[ends | mine][better] = mine
            of_blocks[ends | mine][better] = place[better]
    return best, of_ends, of_blocks


class _Kind:
    """Columns of one kind, those with equal devices and blocks in turn the cheapest."""

    def __init__(self, lines: Lines, stocks: Stocks, number: int, count: int) -> None:
        mine = np.flatnonzero((stocks.kind == number) & (lines.columns.role >= FIRST))
        self._unit = gcd(*stocks.devices[mine].tolist()) if len(mine) else 1
        self._most, self._blocks = count // self._unit, lines.blocks
        self._index = [mine[lines.columns.role[mine] == role] for role in (BODY, FIRST, LAST)]
        devices = [stocks.devices[i] // self._unit for i in self._index]
        blocks = [lines.columns.blocks[i] for i in self._index]
        odd = [stocks.odd[i] for i in self._index]
        self._pair = [
            (d * (lines.blocks + 1) + b) * 2 + o for d, b, o in zip(devices, blocks, odd, strict=True)
        ]
        parities = 1 + int(any(o.any() for o in odd))
        self._value = np.zeros((parities, self._most + 1, lines.blocks + 1))
        self._pick = np.zeros(self._value.shape, dtype=np.intp)

    def solve(self, priced: FloatArray) -> FloatArray:
        """[ends, blocks]: the least price of stages that fit into the devices."""
        body, first, last = (self._cheapest(place, priced) for place in range(3))
        self._tried = body, first, last
        knapsack_loop(*body[1:], self._value, self._pick)
        found = np.full((4, self._blocks + 1), np.inf)
        self._arg = np.full((4, self._blocks + 1), -1, dtype=np.intp)
        found[0] = self._value[0, self._most]
        end_loop(*first[1:], self._value, self._most, 0, found[1], self._arg[1])
        end_loop(*last[1:], self._value, self._most, 0, found[2], self._arg[2])
        for taken, odd in np.unique(np.stack([last[1], last[3]], axis=1), axis=0).tolist():
            if taken > self._most:
                continue
            opened, _ = self._opened(self._most - taken, odd)
            those = np.flatnonzero((last[1] == taken) & (last[3] == odd))
            for place in those.tolist():
                blocks = int(last[2][place])
                value = opened[: self._blocks + 1 - blocks] + last[4][place]
                better = value < found[3][blocks:]
                found[3][blocks:][better] = value[better]
                self._arg[3][blocks:][better] = place
        return found

    def _opened(self, most: int, parity: int) -> tuple[FloatArray, IntArray]:
        """[blocks]: the least price with a first stage on so many devices, and which."""
        value = np.full(self._blocks + 1, np.inf)
        arg = np.full(self._blocks + 1, -1, dtype=np.intp)
        end_loop(*self._tried[1][1:], self._value, most, parity, value, arg)
        return value, arg

    def _cheapest(
        self, place: int, priced: FloatArray
    ) -> tuple[IntArray, IntArray, IntArray, IntArray, FloatArray]:
        """Columns, devices, blocks, whether odd, and prices, by devices: the cheapest of those alike."""
        index, pair = self._index[place], self._pair[place]
        order = np.lexsort((priced[index], pair))
        begins = np.concatenate([[True], np.diff(pair[order]) != 0])[: len(order)]
        order = order[begins]
        both, odd = np.divmod(pair[order], 2)
        devices, blocks = np.divmod(both, self._blocks + 1)
        return index[order], devices, blocks, odd, priced[index[order]]

    def columns(self, ends: int, blocks: int) -> list[int]:
        """The columns of a pattern that was found."""
        body, first, last = self._tried
        used, devices, parity = [], self._most, 0

        def take(stages: tuple[IntArray, IntArray, IntArray, IntArray, FloatArray], place: int) -> None:
            nonlocal devices, blocks, parity
            used.append(int(stages[0][place]))
            devices, blocks = devices - int(stages[1][place]), blocks - int(stages[2][place])
            parity ^= int(stages[3][place])

        if ends >= 2:
            take(last, int(self._arg[ends][blocks]))
        if ends % 2:
            take(first, int(self._opened(devices, parity)[1][blocks]))
        while blocks > 0:
            place = int(self._pick[parity, devices, blocks])
            if place < 0:
                devices -= 1
            else:
                take(body, place)
        return used


@compiled_exactly
def knapsack_loop(
    devices: IntArray,
    blocks: IntArray,
    odd: IntArray,
    price: FloatArray,
    value: FloatArray,
    pick: IntArray,
) -> None:
    """Fill `value[parity, devices, blocks]` with the least price of stages, and which is last.

    Stages may repeat and come by devices; the parity is that of the odd ones among them. One whose place
    others fill as cheaply is of no use with more devices either.
    """
    parities, most, number = value.shape[0], value.shape[1] - 1, value.shape[2]
    used = np.empty(len(devices), dtype=np.intp)
    count, coming = 0, 0
    for parity in range(parities):
        for b in range(number):
            value[parity, 0, b] = 0.0 if b == 0 and parity == 0 else np.inf
            pick[parity, 0, b] = -1
    for d in range(1, most + 1):
        for parity in range(parities):
            for b in range(number):
                value[parity, d, b] = value[parity, d - 1, b]
                pick[parity, d, b] = -1
        for place in range(count):
            stage = used[place]
            held, own, left = blocks[stage], price[stage], d - devices[stage]
            for parity in range(parities):
                before, here = value[parity ^ odd[stage], left], value[parity, d]
                for b in range(held, number):
                    new = before[b - held] + own
                    if new < here[b]:
                        here[b] = new
                        pick[parity, d, b] = stage
        while coming < len(devices) and devices[coming] == d:
            held, own, parity = blocks[coming], price[coming], odd[coming]
            if held < number and own < value[parity, d, held]:
                used[count] = coming
                count += 1
                value[parity, d, held] = own
                pick[parity, d, held] = coming
            coming += 1


@compiled_exactly
def end_loop(
    devices: IntArray,
    blocks: IntArray,
    odd: IntArray,
    price: FloatArray,
    value: FloatArray,
    most: int,
    parity: int,
    found: FloatArray,
    arg: IntArray,
) -> None:
    """Fill `found[blocks]` with the least price of one of these stages and others on `most` devices.

    All together have a parity.
    """
    number = value.shape[2]
    for stage in range(len(devices)):
        left = most - devices[stage]
        if left < 0:
            continue
        held, own = blocks[stage], price[stage]
        for b in range(held, number):
            new = value[parity ^ odd[stage], left, b - held] + own
            if new < found[b]:
                found[b] = new
                arg[b] = stage
