"""Lines of columns: what the rows of the counting programme say only on average, exactly.

A *line* is a pipeline as a sequence of columns from its last stage to its first. Along a line three
things are exact that the linear relaxation of `master` mixes: every stage keeps its memory where it
stands, the blocks add up in whole numbers, and there is one first and one last stage. What couples the
stages of a line otherwise are a few sums, each at most 1:

    spent      sum of the columns' cost / what may be spent
    devices    sum of the devices taken of a class / devices there are, and the same for whole groups
    nodes      1 + (twice the nodes filled - boundaries to the outside) / a constant

With prices p >= 0 on the sums but `spent`, a line that keeps all of them costs at least what the least
priced line costs, less the sum of the prices (Lagrange), for `cost + p * (sums - 1) <= cost`. The least
priced line is a shortest path,

    U[l, d] = min over columns with w replicas and b blocks that hold d + w replicas below:
              price + U[l + b, d + w]     U[l, d] = price of the first stage where it has all blocks left

over blocks `l` and replicas `d` behind a stage. Prices rise by cutting planes (Kelley, "The cutting-plane
method for solving convex programs", 1960): those for which the cheapest of the lines met so far costs
most, which are the prices of the cheapest mixture of these lines that keeps all sums. Beyond `cap`
replicas all `d` count as one: there a line may be priced that memory forbids, and a bound stays one.
"""

import time
from dataclasses import dataclass

import numpy as np
from scipy import sparse

from graphpar.partition.clock import OutOfTimeError
from graphpar.partition.counting.columns import BODY, FIRST, LAST, WHOLE, Columns
from graphpar.partition.jit import COMPILED, compiled_exactly
from graphpar.partition.solver import MatrixProgram
from graphpar.partition.unit_arrays import FloatArray, IntArray

_MOST_STEPS = 16_000_000
"""Sums that one shortest path may look at."""

_LEAST_CAP = 16

_ROUNDS = 40
"""Shortest paths tried for the prices of one set of columns."""

_FIRST_PRICES, _RAISE, _MOST_PRICES = 1.0, 8.0, 600.0
"""Prices are at most a multiple of what may be spent, which is raised where it binds, up to a limit."""

_INWARDS = 0.4
"""The next prices lie by this share towards the best ones so far, which damps the cutting planes."""

TOLERANCE = 1e-9
"""A price above 1 by less than this is rounding."""


@dataclass(frozen=True, eq=False)
class Line:
    """A line from its last stage to its first: its columns, cost, sums but for `spent`."""

    columns: tuple[int, ...]
    cost: float
    sums: FloatArray


@dataclass(frozen=True, eq=False)
class Verdict:
    """The best prices found on the sums but `spent`, and what a line costs at least that keeps these.

    `met` are the cheapest lines under all prices tried.
    """

    prices: FloatArray
    cost: float
    met: tuple[Line, ...]

    def excludes(self, spend: float) -> bool:
        """Whether no line that keeps all sums costs so little."""
        return self.cost > spend * (1 + TOLERANCE)

    def shares(self, spend: float) -> FloatArray:
        """Prices on all sums, first on what is spent, that add up to one: a line costs at most 1."""
        found: FloatArray = np.concatenate([[spend], self.prices]) / (spend + self.prices.sum())
        return found


class Lines:
    """The lines that may be made of some columns.

    Args:
        columns: The columns.
        cost: What each costs.
        width: Its replicas.
        sums: [sum, column], without `spent`.
        constant: [sum], added once for a line.
        blocks: Blocks of a whole line.
        devices: Most replicas of a line.
        nodes: Further sums over a pipeline's columns, [row, column], and what they are at least.
        odd: Sums that are even in a pipeline: boundaries inside nodes of a kind, [kind, column].
        take: Devices of each kind, [column, kind].
        stages: The columns of single stages that these are made of, the same ones by default.
        members: [column, place] of those, the last stage first, -1 for none (`runs`).
        rise: What each adds to the least cost of all lines, at least; the cost where that is not known.
        packed: What further sums are at least where all stages that fit into a node stand in one.
    """

    def __init__(
        self,
        *,
        columns: Columns,
        cost: FloatArray,
        width: IntArray,
        sums: FloatArray,
        constant: FloatArray,
        blocks: int,
        devices: int,
        nodes: tuple[FloatArray, FloatArray],
        odd: IntArray,
        take: IntArray,
        stages: Columns | None = None,
        members: IntArray | None = None,
        rise: FloatArray | None = None,
        packed: tuple[FloatArray, FloatArray] | None = None,
    ) -> None:
        self.columns, self.cost, self.width = columns, cost, width
        self.packed = nodes if packed is None else packed
        self.rise: FloatArray = cost if rise is None else rise
        self.take, self.stages = take, columns if stages is None else stages
        self.members: IntArray = np.arange(len(columns))[:, None] if members is None else members
        self.nodes, self.odd = nodes, odd
        self.sums, self.constant = sums, constant
        self.blocks, self.devices = blocks, devices
        self.due: IntArray = np.minimum(columns.most_below, devices).astype(np.intp)
        self.body: IntArray = np.flatnonzero(columns.role == BODY)
        self.first: IntArray = np.flatnonzero(columns.role == FIRST)
        self.last: IntArray = np.flatnonzero(columns.role == LAST)
        self.whole: IntArray = np.flatnonzero(columns.role == WHOLE)
        self._body_pair, body_pairs = self._pairs(self.body)
        self._first_pair, first_pairs = self._pairs(self.first)
        self.cap = self._choose_cap(len(body_pairs))
        self._body_end = self._ends(body_pairs)
        self._first_end = self._ends(first_pairs)
        self._first_blocks = first_pairs[:, 1]
        most = int(body_pairs[:, 1].max(initial=0))
        self._room = np.full((blocks + 1 + most, self.cap + 1), np.inf)
        self._body_width, self._body_blocks = (np.ascontiguousarray(p) for p in body_pairs.T)
        self._place = body_pairs[:, 1] * (self.cap + 1) + self._body_end

    def _pairs(self, index: IntArray) -> tuple[IntArray, IntArray]:
        """The distinct pairs of replicas and blocks, by blocks, and that of each column."""
        both = np.stack([self.width[index], self.columns.blocks[index]], axis=1)
        found, inverse = np.unique(both[:, ::-1], axis=0, return_inverse=True)
        return inverse.reshape(-1).astype(np.intp), found[:, ::-1]

    def _choose_cap(self, pairs: int) -> int:
        """Replicas that are told apart: as far as memory may bind and time allows."""
        binding = self.columns.most_below[self.columns.most_below < self.devices]
        exact = min(self.devices, int(binding.max()) + 1) if len(binding) else 0
        affordable = _MOST_STEPS // (max(1, pairs) * (self.blocks + 1))
        return min(exact, max(_LEAST_CAP, affordable))

    def _ends(self, pairs: IntArray) -> IntArray:
        """[replicas behind, pair]: replicas with a stage of the pair, up to the cap."""
        behind = np.arange(self.cap + 1)[:, None]
        found: IntArray = np.minimum(behind + pairs[None, :, 0], self.cap)
        return found

    def _cheapest(
        self, index: IntArray, pair: IntArray, ends: IntArray, prices: FloatArray
    ) -> FloatArray:
        """[replicas behind, pair]: the least price of a column that holds so many below."""
        table = np.full((self.cap + 1, ends.shape[1]), np.inf)
        np.minimum.at(table, (np.minimum(self.due[index], self.cap), pair), prices[index])
        table = np.minimum.accumulate(table[::-1], axis=0)[::-1]
        found: FloatArray = np.take_along_axis(table, ends, axis=0)
        return found

    def to_go(self, prices: FloatArray) -> FloatArray:
        """[blocks behind, replicas behind]: the least price of what is still to come."""
        body = self._cheapest(self.body, self._body_pair, self._body_end, prices)
        closing = self._cheapest(self.first, self._first_pair, self._first_end, prices)
        ends = np.full((self.blocks + 1, self.cap + 1), np.inf)
        for number in np.unique(self._first_blocks):
            ends[number] = closing[:, self._first_blocks == number].min(axis=1)
        if COMPILED:
            room = np.empty((self.blocks + 1, self.cap + 1))
            rows = np.ascontiguousarray(body.T)
            reach = np.empty(len(rows), dtype=np.intp)
            reach_loop(rows, self._body_blocks, reach)
            to_go_loop(ends, rows, self._body_blocks, self._body_width, reach, room)
            return room
        room = self._room
        room[:] = np.inf
        flat = room.reshape(-1)
        for behind in range(self.blocks, -1, -1):
            best = ends[self.blocks - behind]
            if body.shape[1]:
                onward = flat[behind * (self.cap + 1) :].take(self._place)
                onward += body
                best = np.minimum(best, onward.min(axis=1))
            room[behind] = best
        return room[: self.blocks + 1].copy()

    def priced(self, prices: FloatArray, spend: float) -> FloatArray:
        """What every column costs under prices on all sums, the first on what is spent."""
        found: FloatArray = prices[0] / spend * self.cost + prices[1:] @ self.sums
        return found

    def cheapest_line(self, priced: FloatArray, to_go: FloatArray) -> tuple[float, Line | None]:
        """The least price of a line without the constants, and the line."""
        last = self.last
        ends = priced[last] + to_go[self.columns.blocks[last], np.minimum(self.width[last], self.cap)]
        best = float(ends.min(initial=np.inf))
        whole = float(priced[self.whole].min(initial=np.inf))
        if not min(best, whole) < np.inf:
            return np.inf, None
        if whole <= best:
            return whole, self.line_of((int(self.whole[priced[self.whole].argmin()]),))
        return best, self.line_of(tuple(self._follow(int(last[ends.argmin()]), priced, to_go)))

    def _follow(self, column: int, priced: FloatArray, to_go: FloatArray) -> list[int]:
        """The cheapest line that ends in a column."""
        blocks, columns = self.columns.blocks, [column]
        behind, replicas = int(blocks[column]), min(int(self.width[column]), self.cap)
        inner = np.concatenate([self.body, self.first])
        closes = self.columns.role[inner] == FIRST
        ends = blocks[inner]
        while True:
            after = np.minimum(replicas + self.width[inner], self.cap)
            fits = np.minimum(self.due[inner], self.cap) >= after
            fits &= np.where(closes, behind + ends == self.blocks, behind + ends <= self.blocks)
            usable = np.flatnonzero(fits)
            onward = np.where(
                closes[usable],
                0.0,
                to_go[behind + np.minimum(ends[usable], self.blocks - behind), after[usable]],
            )
            best = usable[int((priced[inner[usable]] + onward).argmin())]
            columns.append(int(inner[best]))
            if closes[best]:
                return columns
            behind, replicas = behind + int(ends[best]), int(after[best])

    def line_of(self, columns: tuple[int, ...]) -> Line:
        """The line of some columns, the last stage's first."""
        used = list(columns)
        sums = self.sums[:, used].sum(axis=1) + self.constant
        return Line(columns, float(self.cost[used].sum()), sums)

    def among(self, index: IntArray, line: Line | None) -> Line | None:
        """A line that was found `only` among some columns."""
        return None if line is None else self.line_of(tuple(index[list(line.columns)].tolist()))

    def stages_of(self, line: Line) -> IntArray:
        """The single stages of a line, from its last to its first."""
        members = self.members[list(line.columns)]
        found: IntArray = members[members >= 0]
        return found

    def in_order(self, line: Line) -> tuple[IntArray, list[bool]]:
        """Single stages from the first to the last, and whether each joins the node of the one before.

        Columns stand by falling due, which keeps memory if any order does; equals by what they are.
        """
        used, columns = np.array(line.columns, dtype=np.intp), self.columns
        rank = np.lexsort(
            (columns.blocks[used], columns.option[used], -self.due[used], columns.role[used])
        )
        members = self.members[used[rank]][:, ::-1]
        stands = members >= 0
        joined = np.concatenate([np.zeros((len(members), 1), dtype=np.bool_), stands[:, :-1]], axis=1)
        return members[stands], joined[stands].tolist()

    def only(self, index: IntArray) -> "Lines":
        """The lines of some of the columns."""
        return Lines(
            columns=self.columns.pick(index),
            cost=self.cost[index],
            width=self.width[index],
            sums=self.sums[:, index],
            constant=self.constant,
            blocks=self.blocks,
            devices=self.devices,
            nodes=(self.nodes[0][:, index], self.nodes[1]),
            odd=self.odd[:, index],
            take=self.take[index],
            stages=self.stages,
            members=self.members[index],
            rise=self.rise[index],
            packed=(self.packed[0][:, index], self.packed[1]),
        )

    def holds(self, line: Line) -> bool:
        """Whether a line keeps its memory, the nodes, and all sums but what is spent."""
        used = list(line.columns)
        fits = self.due[used] >= np.cumsum(self.width[used])
        rows, least = self.nodes
        stands = rows[:, used].sum(axis=1) >= least - TOLERANCE * (1 + np.abs(least))
        paired = self.odd[:, used].sum(axis=1) % 2 == 0
        return bool(fits.all() and stands.all() and paired.all() and (line.sums <= 1 + TOLERANCE).all())

    def is_packed(self, line: Line) -> bool:
        """Whether all stages of a line may stand in as few nodes as each can."""
        rows, least = self.packed
        held: FloatArray = rows[:, list(line.columns)].sum(axis=1)
        return bool((held >= least - TOLERANCE * (1 + np.abs(least))).all())

    def judge(
        self, spend: float, close: float, start: FloatArray, known: list[Line], deadline_s: float
    ) -> Verdict:
        """Raise what lines that keep the sums are known to cost at least, until it exceeds `spend`.

        Prices are good enough where others raise that by no more than `close`. `start` are prices to
        begin with, `known` are lines met before; only guidance either.

        Raises:
            OutOfTimeError: `time.monotonic()` passed `deadline_s`.
        """
        met: list[Line] = []
        prices, best, most = start, (-np.inf, start), _FIRST_PRICES
        for _ in range(_ROUNDS):
            if time.monotonic() > deadline_s:
                raise OutOfTimeError
            priced = self.cost + prices @ self.sums
            least, line = self.cheapest_line(priced, self.to_go(priced))
            value = least + float(prices @ self.constant) - float(prices.sum())
            if line is None or value > best[0]:
                best = value, prices
            if line is None or value > spend * (1 + TOLERANCE):
                break
            met.append(line)
            ceiling, wanted = _mixture([*known, *met], most * spend)
            while (
                ceiling - best[0] < close
                and most < _MOST_PRICES
                and (wanted.max(initial=0.0) >= most * spend * (1 - TOLERANCE))
            ):
                most *= _RAISE
                ceiling, wanted = _mixture([*known, *met], most * spend)
            if ceiling - best[0] < close:
                break
            prices = (1 - _INWARDS) * wanted + _INWARDS * best[1]
        return Verdict(best[1], best[0], tuple(met))


@compiled_exactly
def reach_loop(body: FloatArray, blocks: IntArray, reach: IntArray) -> None:
    """Below how many replicas behind each pair of `body[pair, replicas behind]` is of use.

    Pairs come by blocks, the narrower first: one with as many blocks that costs no more and leaves fewer
    replicas behind stands for a wider one, for what is still to come costs no less with more of them.
    """
    least = np.empty(body.shape[1])
    for pair in range(len(blocks)):
        if pair == 0 or blocks[pair] != blocks[pair - 1]:
            least[:] = np.inf
        reach[pair] = 0
        for replicas in range(body.shape[1]):
            if body[pair, replicas] < least[replicas]:
                least[replicas] = body[pair, replicas]
                reach[pair] = replicas + 1


@compiled_exactly
def to_go_loop(
    ends: FloatArray,
    body: FloatArray,
    blocks: IntArray,
    width: IntArray,
    reach: IntArray,
    room: FloatArray,
) -> None:
    """Fill `room[blocks behind, replicas behind]` with the least price to go.

    `ends[blocks]` are first stages, `body[pair, replicas behind]` pairs of blocks and replicas, each of
    use below `reach[pair]` replicas behind.
    """
    number, cap = room.shape[0] - 1, room.shape[1] - 1
    for behind in range(number, -1, -1):
        here = room[behind]
        here[:] = ends[number - behind]
        for pair in range(len(blocks)):
            after = behind + blocks[pair]
            if after > number:
                continue
            there, price = room[after], body[pair]
            near, far = min(max(cap - width[pair], 0), reach[pair]), width[pair]
            # Not `min`, which asks about NaN and is no vector instruction.
            for replicas in range(near):
                new, old = price[replicas] + there[replicas + far], here[replicas]
                here[replicas] = new if new < old else old
            for replicas in range(near, reach[pair]):
                new, old = price[replicas] + there[cap], here[replicas]
                here[replicas] = new if new < old else old


def _mixture(lines: list[Line], most: float) -> tuple[float, FloatArray]:
    """The prices up to `most` for which the cheapest of some lines costs most, and what it costs."""
    costs = np.array([line.cost for line in lines])
    return best_prices(costs, np.array([line.sums for line in lines]) - 1, most)


def best_prices(costs: FloatArray, excess: FloatArray, most: float) -> tuple[float, FloatArray]:
    """The prices on rows for which the least of `costs + excess @ prices` is largest, and that least.

    Raises:
        OutOfTimeError: The solver gave up.
    """
    number, prices = excess.shape
    matrix = np.concatenate([excess, np.full((number, 1), -1.0)], axis=1)
    outcome = MatrixProgram(
        cost=np.array([0.0] * prices + [-1.0]),
        lower=np.array([0.0] * prices + [-np.inf]),
        upper=np.array([most] * prices + [np.inf]),
        integer=np.zeros(prices + 1, dtype=np.bool_),
        matrix=sparse.csr_matrix(matrix),
        row_lower=-costs,
        row_upper=np.full(number, np.inf),
    ).solve()
    if not outcome.has_point:
        raise OutOfTimeError
    return float(outcome.values[prices]), np.clip(outcome.values[:prices], 0.0, most)
