"""What kinds of devices run in whole stages, exactly; what lies between stages has a price.

`lines` takes a pipeline as a line of stages: along it memory by position is exact, but what is
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
from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd

import numpy as np

from graphpar.partition.clock import OutOfTimeError
from graphpar.partition.counting.columns import BODY, FIRST, LAST
from graphpar.partition.counting.lines import TOLERANCE, Line, Lines, best_prices
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
    """Replicas that columns put among the `due` last ones for sure (`master`)."""
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
        totals = [total]
        for kind in self._kinds:
            joined = np.full(total.shape, np.inf)
            join_loop(total, kind.solve(priced), joined)
            total = joined
            totals.append(total)
        value = float(total[3, self._blocks])
        if not np.isfinite(value):
            return np.inf, None
        used: list[int] = []
        both, blocks = 3, self._blocks
        for place in reversed(range(len(self._kinds))):
            kind, before = self._kinds[place], totals[place]
            mine, held = _parted(before, kind.found, both, blocks, float(totals[place + 1][both, blocks]))
            used += kind.columns(mine, held)
            both, blocks = both - mine, blocks - held
        return value, np.array(used, dtype=np.intp)


def _parted(before: FloatArray, own: FloatArray, both: int, blocks: int, value: float) -> tuple[int, int]:
    """The ends and blocks of a kind in a least price that `join_loop` found."""
    for mine in range(4):
        if mine & ~both:
            continue
        sums = before[both - mine, : blocks + 1][::-1] + own[mine, : blocks + 1]
        held = int(np.argmax(sums == value))
        if sums[held] == value:
            return mine, held
    raise AssertionError


_Stages = tuple[IntArray, IntArray, IntArray, IntArray, FloatArray]
"""Columns, their devices, blocks, whether odd, prices."""


class _Kind:
    """Columns of one kind, those with equal devices and blocks in turn the cheapest.

    What was cheapest is found again from the values: sums are the same ones, to the last bit.
    """

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
        self.found = np.full((4, lines.blocks + 1), np.inf)
        """[ends, blocks]: the least price of stages that fit into the devices."""

    def solve(self, priced: FloatArray) -> FloatArray:
        """What `found` is under some prices."""
        body, first, last = (self._cheapest(place, priced) for place in range(3))
        self._tried = body, first, last
        knapsack_loop(*body[1:], self._value)
        self.found = np.full((4, self._blocks + 1), np.inf)
        self.found[0] = self._value[0, self._most]
        end_loop(*first[1:], self._value, self._most, 0, self.found[1])
        end_loop(*last[1:], self._value, self._most, 0, self.found[2])
        for taken, odd, those in self._alike_ends():
            close_loop(last[2][those], last[4][those], self._opened(taken, odd), self.found[3])
        return self.found

    def _alike_ends(self) -> Iterator[tuple[int, int, IntArray]]:
        """Devices, whether odd, and the places of last stages that leave room for a first one."""
        _, devices, _, odd, _ = self._tried[2]
        for taken, parity in np.unique(np.stack([devices, odd], axis=1), axis=0).tolist():
            if taken <= self._most:
                yield taken, parity, np.flatnonzero((devices == taken) & (odd == parity))

    def _opened(self, taken: int, parity: int) -> FloatArray:
        """[blocks]: the least price with a first stage on the devices that a last one leaves."""
        value = np.full(self._blocks + 1, np.inf)
        end_loop(*self._tried[1][1:], self._value, self._most - taken, parity, value)
        return value

    def _cheapest(self, place: int, priced: FloatArray) -> _Stages:
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
        used, devices, parity, value = [], self._most, 0, float(self.found[ends, blocks])

        def take(stages: _Stages, place: int) -> None:
            nonlocal devices, blocks, parity
            used.append(int(stages[0][place]))
            devices, blocks = devices - int(stages[1][place]), blocks - int(stages[2][place])
            parity ^= int(stages[3][place])

        if ends == 3:
            place, value = self._closing(blocks, value)
            take(last, place)
        elif ends == 2:
            take(last, self._place(last, devices, blocks, parity, value))
        if ends % 2:
            take(first, self._place(first, devices, blocks, parity, value))
        while blocks > 0:
            value = float(self._value[parity, devices, blocks])
            if devices > 0 and self._value[parity, devices - 1, blocks] == value:
                devices -= 1
            else:
                take(body, self._place(body, devices, blocks, parity, value))
        return used

    def _closing(self, blocks: int, value: float) -> tuple[int, float]:
        """The last stage of a pattern with both ends, and the least price of what is before it."""
        _, _, held, _, price = self._tried[2]
        for taken, odd, those in self._alike_ends():
            those = those[held[those] <= blocks]
            opened = self._opened(taken, odd)[blocks - held[those]]
            found = np.flatnonzero(opened + price[those] == value)
            if len(found):
                return int(those[found[0]]), float(opened[found[0]])
        raise AssertionError

    def _place(self, stages: _Stages, devices: int, blocks: int, parity: int, value: float) -> int:
        """The stage that makes a least price with others on the devices it leaves."""
        fits = np.flatnonzero((stages[1] <= devices) & (stages[2] <= blocks))
        own, held, odd = stages[1][fits], stages[2][fits], stages[3][fits]
        sums = self._value[parity ^ odd, devices - own, blocks - held] + stages[4][fits]
        return int(fits[np.flatnonzero(sums == value)[0]])


@compiled_exactly
def knapsack_loop(
    devices: IntArray, blocks: IntArray, odd: IntArray, price: FloatArray, value: FloatArray
) -> None:
    """Fill `value[parity, devices, blocks]` with the least price of stages.

    Stages may repeat and come by devices; the parity is that of the odd ones among them. One whose place
    others fill as cheaply is of no use with more devices either.
    """
    parities, most, number = value.shape[0], value.shape[1] - 1, value.shape[2]
    used = np.empty(len(devices), dtype=np.intp)
    count, coming = 0, 0
    for parity in range(parities):
        for b in range(number):
            value[parity, 0, b] = 0.0 if b == 0 and parity == 0 else np.inf
    for d in range(1, most + 1):
        for parity in range(parities):
            value[parity, d] = value[parity, d - 1]
        for place in range(count):
            stage = used[place]
            held, own, left = blocks[stage], price[stage], d - devices[stage]
            for parity in range(parities):
                before, here = value[parity ^ odd[stage], left], value[parity, d]
                # Not `min`, which asks about NaN and is no vector instruction.
                for b in range(number - held):
                    new, old = before[b] + own, here[b + held]
                    here[b + held] = new if new < old else old
        while coming < len(devices) and devices[coming] == d:
            held, own, parity = blocks[coming], price[coming], odd[coming]
            if held < number and own < value[parity, d, held]:
                used[count] = coming
                count += 1
                value[parity, d, held] = own
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
) -> None:
    """Fill `found[blocks]` with the least price of one of these stages and others on `most` devices.

    All together have a parity.
    """
    number = value.shape[2]
    for stage in range(len(devices)):
        left = most - devices[stage]
        if left < 0:
            continue
        held, own, before = blocks[stage], price[stage], value[parity ^ odd[stage], left]
        for b in range(number - held):
            new, old = before[b] + own, found[b + held]
            found[b + held] = new if new < old else old


@compiled_exactly
def close_loop(blocks: IntArray, price: FloatArray, opened: FloatArray, found: FloatArray) -> None:
    """Lower `found[blocks]` to the least price of one of these stages after what `opened` says."""
    number = len(found)
    for stage in range(len(blocks)):
        held, own = blocks[stage], price[stage]
        for b in range(number - held):
            new, old = opened[b] + own, found[b + held]
            found[b + held] = new if new < old else old


@compiled_exactly
def join_loop(total: FloatArray, own: FloatArray, joined: FloatArray) -> None:
    """Lower `joined[ends, blocks]` to the least price of some kinds with one more.

    Ends are a bit each: 1 for the first stage, 2 for the last.
    """
    number = total.shape[1]
    for mine in range(4):
        for held in range(number):
            price = own[mine, held]
            if not price < np.inf:
                continue
            for ends in range(4):
                if ends & mine:
                    continue
                before, here = total[ends], joined[ends | mine]
                for b in range(number - held):
                    new, old = before[b] + price, here[b + held]
                    here[b + held] = new if new < old else old
