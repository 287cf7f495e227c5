"""The best single pipeline of a chain of equal blocks over many devices: count stages, not places.

The chain is some head units, L equal blocks, some tail units. A *column* is a stage option with a
number of blocks: `x_j` body stages of column j, one first column (head units with some blocks), one
last column. Columns that break a limit on extra or post are left out, and

    minimise    sum_j x_j (fill_j + transfer)  + first and last
    such that   sum_j blocks_j x_j  = L                            all blocks are run
                sum_j [class of j = c] devices_j x_j <= N_c        devices of each class
                sum_{j of class c in groups} devices_j x_j <= what groups fill of nodes
                sum_{j: D_j <= d} width_j x_j <= d   for all d     memory by position
                boundaries leave nodes, rows of `nodes`
                one first column, one last column

A column says which of its two boundaries stay inside a node (`outside_j` do not). `D_j` is the most
replicas that may follow from a stage of column j on (itself included) with its microbatches in
flight still fitting into memory. Where stages stand is a matter of order only: sorted by `D_j` from
the pipeline's end they all keep their limits if any order does (the earliest due date rule, Jackson
1955), and that the sorted order keeps them is what the rows above say. So the count is an exact
account of memory by position. The number of columns does not depend on the number of devices, but for
the number of widths; it grows with modes times blocks (10^5 for a large model with all options on).

So the columns are never all given to a solver. The linear relaxation is solved by column generation:
columns with negative reduced cost join until there are none, memory rows when they are broken. Then

    every integer solution that uses column j costs at least  LP value + reduced cost of j,

hence the integer programme over the columns within `delta` of the LP value bounds all others as well:
its own bound or LP value + delta, whichever is less. `delta` starts small and grows to what is left
between the best solution and the LP value, so that nothing is lost (reduced cost fixing; Nemhauser and
Wolsey, Integer and Combinatorial Optimization, 1988, II.5).
"""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from graphpar.cost import CostTable
from graphpar.partition.cells import Cells, StageOption
from graphpar.partition.chains.limits import ChainAnswer, Stage
from graphpar.partition.clock import OutOfTimeError, ShouldStop, never
from graphpar.partition.counting.columns import (
    BODY,
    FIRST,
    LAST,
    Columns,
    Span,
    drop_dearer,
    drop_wider,
    drop_wider_and_dearer,
    price_columns,
)
from graphpar.partition.counting.floors import Floors, Least, Spread
from graphpar.partition.counting.kinds import Rows, Stocks, memory_row
from graphpar.partition.counting.lines import Line, Lines
from graphpar.partition.counting.master import Master
from graphpar.partition.counting.nodes import filled, filling_alike, node_rows, odd_columns, packed_rows
from graphpar.partition.counting.options import node_group
from graphpar.partition.counting.order import Placed, line_up
from graphpar.partition.counting.rows import AlikeRows
from graphpar.partition.counting.runs import BOTH, Limits, Stages, join_runs, sums_of
from graphpar.partition.counting.segments import Prices
from graphpar.partition.repeats import Repeats
from graphpar.partition.solver import Backend
from graphpar.partition.solver_matrix import Patience
from graphpar.partition.stage_costs import StageLimits
from graphpar.partition.unit_arrays import Cache, FloatArray, IntArray, Setting

_USED = 1e-9
"""A column that a relaxation takes less of is not in use."""


@dataclass(frozen=True)
class CountingLimits:
    """How closely one programme is solved, by what, and for how long before it gives up."""

    gap: float
    backend: Backend
    patience_s: float = float("inf")


class CountingProgram:
    """The programme of one setting; its columns do not depend on any limit.

    `counts` are the devices of each cell that the pipeline may use, all by default. With a span
    relaxations bound the pipelines of all its microbatch counts, in either schedule.
    """

    def __init__(
        self,
        table: CostTable,
        cells: Cells,
        options: Sequence[StageOption],
        setting: Setting,
        repeats: Repeats,
        limits: CountingLimits,
        counts: Sequence[int] | None = None,
        cache: Cache | None = None,
        should_stop: ShouldStop = never,
        span: Span = (),
    ) -> None:
        self._cells = cells
        self._counts = tuple(cells.counts if counts is None else counts)
        self._repeats = repeats
        self._limits = limits
        self._options = tuple(options)
        self._num_units = table.num_units
        self._devices = sum(self._counts)
        self._take = np.array([o.take for o in options], dtype=np.intp)
        self._width = np.array([o.width for o in options], dtype=np.intp)
        self._group = np.array([node_group(table, cells, o) for o in options], dtype=np.intp)
        alike = [(o.take, o.width, g) for o, g in zip(options, self._group.tolist(), strict=True)]
        teams = {key: i for i, key in enumerate(alike)}
        self._team = np.array([teams[key] for key in alike], dtype=np.intp)
        columns = price_columns(table, cells, options, setting, repeats, cache, should_stop, span)
        self._mode = np.array([o.staff[0] for o in options], dtype=np.intp)
        self._columns = columns.pick(np.flatnonzero(self._most(columns) > 0))
        first = self._columns.most_below[self._columns.role == FIRST]
        self._first_binds = bool((first < self._devices).any())
        self._rows, self._row_lower, self._row_upper = self._alike_rows(self._columns)
        self._warm = np.zeros(0, dtype=np.intp)
        self._dues: tuple[float, ...] = ()
        self._duals: FloatArray = np.zeros(0)
        self._basic: IntArray = np.zeros(0, dtype=np.intp)
        self._basic_rows: npt.NDArray[np.bool_] | None = None
        self._values: FloatArray = np.zeros(0)

    @property
    def num_variables(self) -> int:
        """Columns before any limit."""
        return len(self._columns)

    @property
    def is_quick(self) -> bool:
        """Whether solving takes no more than milliseconds."""
        return False

    @cached_property
    def extras_s(self) -> FloatArray:
        """All values the busiest stage's extra can take, increasing."""
        found: FloatArray = np.unique(self._columns.extra_s)
        return found

    @cached_property
    def posts_s(self) -> FloatArray:
        """All values the largest post can take, increasing."""
        found: FloatArray = np.unique(self._columns.post_s)
        return found

    def tighten(self, target_s: float, post_limit_s: float, post_weight: float) -> float:
        """Nothing is forgotten: columns are generated anew for every solve."""
        return 0.0

    def solve(self, limits: StageLimits, deadline_s: float) -> ChainAnswer | None:
        """The least fill under the limits with a bound on it, or None where nothing fits.

        Raises:
            OutOfTimeError: `time.monotonic()` passed `deadline_s` without an answer.
        """
        index = self._narrowest(self._keeping(limits))
        if len(index) == 0:
            return None
        if time.monotonic() > deadline_s:
            raise OutOfTimeError
        columns = self._columns.pick(index)
        master = self._master(index, columns.fill_s, limits.slack_s, limits.fill_s)
        patience = Patience(self._limits.patience_s, deadline_s)
        try:
            solution = master.solve(np.searchsorted(index, self._still(index)), self._dues, patience)
        finally:
            self._warm, self._dues = index[master.active], master.dues
        if solution is None:
            return None
        used = np.repeat(solution.columns, solution.counts)
        return self._answer(columns, used, solution.value, min(solution.bound, solution.value))

    def relaxed(
        self, limits: StageLimits, least: Least, deadline_s: float, known: Floors | None = None
    ) -> float | None:
        """A lower bound on what pipelines within the limits cost beyond `least`; None where none fits.

        Pipelines are those of the columns that are `known` to be of use, of all columns by default.
        """
        index = self._keeping(limits, known)
        if len(index) == 0:
            return None
        if time.monotonic() > deadline_s:
            raise OutOfTimeError
        index = self._cheapest(index, least)
        master = self._master(index, self._beyond(index, least), 0.0, np.inf)
        basic = np.flatnonzero(np.isin(index, self._basic)) if self._basic_rows is not None else None
        try:
            value = master.relax(
                np.searchsorted(index, self._still(index)),
                self._dues,
                deadline_s,
                basic,
                self._basic_rows,
            )
        finally:
            self._warm, self._dues, self._duals = index[master.active], master.dues, master.duals
            self._values = master.values
        if master.basic is not None:
            self._basic, self._basic_rows = self._warm[master.basic.columns], master.basic.rows
        return value

    def spread(self, least: Least) -> Spread:
        """How far the last relaxation, with this least, takes means where a pipeline takes the most."""
        if len(self._values) != len(self._warm) or not (self._values > _USED).any():
            return Spread(0.0, 0.0, 0.0, 0.0)
        used = self._warm[self._values > _USED]
        share = self._values[self._values > _USED] * self._columns.blocks[used] / self._repeats.number
        found: list[float] = []
        for own, low in ((self._columns.extra_s, least.extra_s), (self._columns.post_s, least.post_s)):
            mean = low + float(share @ np.maximum(own[used] - low, 0.0))
            found += [float(own[used].max()), max(float(own[used].max()) - mean, 0.0)]
        return Spread(*found)

    def floors(
        self, limits: StageLimits, least: Least, value: float, known: Floors | None = None
    ) -> Floors:
        """What pipelines within the limits cost at least that use a column, by the last relaxation.

        `value` is what that said. Whoever uses a column costs at least that and the column's reduced
        cost. It holds for columns that `_cheapest` dropped as well: all others of a pipeline may be
        replaced by those that stand for them, which have no negative reduced cost.
        """
        index = self._keeping(limits, known)
        cost = self._beyond(index, least)
        master = self._master(index, cost, 0.0, np.inf)
        master.dues = self._dues
        least_s = least.step_s + value
        return Floors(index, least_s + np.maximum(master.reduced(self._duals), 0.0), least_s)

    def lines(
        self,
        limits: StageLimits,
        least: Least,
        known: Floors | None = None,
        spend: float = np.inf,
        *,
        exact: bool = True,
    ) -> Lines | None:
        """The lines of the columns within the limits, at what they cost at least beyond `least`.

        Lines that cost `spend` or more may be missing; unless `exact` others as well, if they are many.
        """
        known = known or Floors(np.arange(len(self._columns)), np.zeros(len(self._columns)), 0.0)
        index = self._keeping(limits, known)
        if len(index) == 0:
            return None
        index = self._cheapest(index, least)
        number = len(self._counts) + len(self._group_limits())
        upper = self._row_upper[3 : 3 + number]
        taken = self._rows.of(index)[3 : 4 + number]
        usable = (taken[:-1][upper <= 0] <= 0).all(axis=0)
        index, taken = index[usable], taken[:, usable]
        columns, cost = self._columns.pick(index), self._beyond(index, least)
        due = np.minimum(columns.most_below, self._devices).astype(np.intp)
        kept = drop_dearer(columns, cost, self._team[columns.option], due)
        index, columns, cost, taken = index[kept], columns.pick(kept), cost[kept], taken[:, kept]
        option = columns.option
        stages = Stages(
            columns, cost, self._width[option], due[kept], self._take[option], known.rise_s(index)
        )
        limit = Limits(self._repeats.number, spend, least.step_s + spend - known.least_s)
        joined = join_runs(stages, self._cells.node_sizes, self._cells.alone, limit, exact=exact)
        taken = sums_of(taken, joined.members)
        rows, filled = taken[:-1], -taken[-1]
        # The whole would be 2 per node; a tenth weighs like the other sums in usual plans.
        scale = 2.0 + 0.2 * float((np.array(self._counts) / np.array(self._cells.node_sizes)).sum())
        sums = np.concatenate([rows[upper > 0] / upper[upper > 0][:, None], filled[None] / scale])
        constant = np.zeros(len(sums))
        constant[-1] = 1.0
        columns, runs = joined.columns, (joined.members >= 0).sum(axis=1) > 1
        return Lines(
            columns=columns,
            cost=joined.cost,
            width=joined.width,
            sums=sums,
            constant=constant,
            blocks=self._repeats.number,
            devices=self._devices,
            nodes=node_rows(self._cells, columns.outside, joined.take, runs),
            odd=odd_columns(self._cells, columns, joined.take),
            take=joined.take,
            stages=stages.columns,
            members=joined.members,
            rise=joined.rise,
            packed=packed_rows(self._cells, joined.take),
        )

    def kinds(self, lines: Lines) -> tuple[Stocks, Rows]:
        """What each kind has, and the rows besides, with the prices of the last relaxation."""
        stocks = Stocks(
            self._counts, lines.take.argmax(axis=1), lines.take.sum(axis=1), lines.odd.sum(axis=0)
        )
        begin, fixed = 3 + len(self._counts), len(self._row_lower)
        rows = sums_of(self._fixed_rows(lines.stages)[0][begin:], lines.members)
        nodes = len(self._group_limits())
        rows[nodes : nodes + len(lines.nodes[0])] = lines.nodes[0]
        lower, upper = self._row_lower[begin:], self._row_upper[begin:]
        # Those with a lower limit the other way round.
        sign = np.where(np.isfinite(lower), -1.0, 1.0)
        rows, limits = sign[:, None] * rows, np.where(np.isfinite(lower), -lower, upper)
        prices, dues = np.zeros(len(rows)), []
        if len(self._duals):
            prices = np.maximum(-sign * self._duals[begin:fixed], 0.0)
            found = zip(self._dues, self._duals[fixed:].tolist(), strict=False)
            dues = [(int(d), -dual) for d, dual in found if dual < 0]
        # Runs keep most rows of nodes by themselves.
        binds = (rows > 0).any(axis=1) | (limits < 0)
        memory = [memory_row(lines, d)[None] for d, _ in dues]
        return stocks, Rows(
            np.concatenate([rows[binds], *memory]),
            np.concatenate([limits[binds], [float(d) for d, _ in dues]]),
            np.concatenate([prices[binds], [p for _, p in dues]]),
        )

    def worth(self) -> Prices:
        """What blocks and the devices of every kind are worth, by the last relaxation."""
        if len(self._duals) == 0:
            return Prices(0.0, np.zeros(len(self._counts)))
        devices = np.maximum(-self._duals[3 : 3 + len(self._counts)], 0.0) * np.array(self._counts)
        return Prices(float(self._duals[0]), devices)

    @property
    def counts(self) -> tuple[int, ...]:
        """Devices of each kind that pipelines may use."""
        return self._counts

    @property
    def node_sizes(self) -> tuple[int, ...]:
        """Devices of the largest node of each kind."""
        return self._cells.node_sizes

    def answer_of(self, lines: Lines, line: Line, bound_s: float) -> ChainAnswer:
        """A line as a pipeline, with a lower bound on the fill of others."""
        used, columns = lines.stages_of(line), lines.stages
        fill = float(columns.fill_s[used].sum())
        if (columns.arm[used] == BOTH).all() or (lines.columns.arm[list(line.columns)] < BOTH).any():
            return self._answer(columns, used, fill, min(bound_s, fill))
        order, joined = lines.in_order(line)
        return self._pipeline(columns, order, joined, fill, min(bound_s, fill))

    def _beyond(self, index: IntArray, least: Least) -> FloatArray:
        """Fill of columns, and their part in how far extra and post exceed the least."""
        columns = self._columns
        over = np.maximum(columns.extra_s[index] - least.extra_s, 0.0)
        over += least.post_weight * np.maximum(columns.post_s[index] - least.post_s, 0.0)
        found: FloatArray = columns.fill_s[index] + columns.blocks[index] / self._repeats.number * over
        return found

    def _keeping(self, limits: StageLimits, known: Floors | None = None) -> IntArray:
        """The columns that keep the limits, of all or of those that are known to be of use."""
        index = slice(None) if known is None else known.index
        extra, post = self._columns.extra_s[index], self._columns.post_s[index]
        within = (extra <= limits.extra_s) & (post <= limits.post_s) & (extra + post <= limits.both_s)
        found: IntArray = np.flatnonzero(within) if known is None else known.index[within]
        return found

    def _cheapest(self, index: IntArray, least: Least) -> IntArray:
        """Columns that no narrower one stands for at what they cost beyond the least."""
        columns, cost = self._columns.pick(index), self._beyond(index, least)
        mode, width = self._mode[columns.option], self._width[columns.option]
        kept: IntArray = index[drop_wider_and_dearer(columns, cost, mode, width, self._devices)]
        return kept

    def _master(self, index: IntArray, cost: FloatArray, slack_s: float, cutoff_s: float) -> Master:
        columns = self._columns.pick(index)
        return Master(
            cost=cost,
            rows=self._rows.pick(index),
            row_lower=self._row_lower,
            row_upper=self._row_upper,
            most=self._most(columns),
            due=np.where(columns.role == FIRST, np.inf, np.minimum(columns.most_below, self._devices)),
            load=np.where(columns.role <= FIRST, 0, self._width[columns.option]).astype(np.float64),
            is_last=columns.role == LAST,
            num_devices=self._devices,
            slack=slack_s,
            cutoff=cutoff_s,
            backend=self._limits.backend,
        )

    def _narrowest(self, index: IntArray) -> IntArray:
        """Columns that no narrower one within the same limits may stand for, if only fill counts."""
        columns = self._columns.pick(index)
        mode, width = self._mode[columns.option], self._width[columns.option]
        kept: IntArray = index[drop_wider(columns, mode, width, self._devices)]
        return kept

    def _still(self, index: IntArray) -> IntArray:
        """Columns that the last programme used and that are within the limits."""
        found: IntArray = np.intersect1d(self._warm, index)
        return found

    def _alike_rows(self, columns: Columns) -> tuple[AlikeRows, FloatArray, FloatArray]:
        """The same where most columns are alike: in devices, replicas, role and boundaries."""
        key = (self._team[columns.option] * 4 + columns.role) * 3 + columns.outside
        if self._first_binds:
            below = np.minimum(columns.most_below, self._devices).astype(np.intp)
            key = key * (self._devices + 2) + np.where(columns.role == FIRST, below + 1, 0)
        _, one, sort = np.unique(key, return_index=True, return_inverse=True)
        table, lower, upper = self._fixed_rows(columns.pick(one))
        table[0] = 0.0
        return AlikeRows(columns.blocks.astype(np.float64), sort.reshape(-1), table), lower, upper

    def _fixed_rows(self, columns: Columns) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Coefficients [row, column] of all rows but those of memory, with their limits."""
        take, width = self._take[columns.option], self._width[columns.option]
        rows: list[npt.NDArray[np.float64]] = [columns.blocks.astype(np.float64)]
        lower, upper = [float(self._repeats.number)], [float(self._repeats.number)]
        for role in (FIRST, LAST):
            rows.append(((columns.role == role) | (columns.role == 0)).astype(np.float64))
            lower.append(1.0)
            upper.append(1.0)
        for index, number in enumerate(self._counts):
            rows.append(take[:, index].astype(np.float64))
            lower.append(-np.inf)
            upper.append(float(number))
        for index, groups, number in self._group_limits():
            rows.append(np.where(np.isin(self._group[columns.option], groups), take[:, index], 0.0))
            lower.append(-np.inf)
            upper.append(float(number))
        nodes, least = node_rows(self._cells, columns.outside, take)
        rows += list(nodes)
        lower += least.tolist()
        upper += [np.inf] * len(nodes)
        if self._first_binds:
            # Whatever the pipeline uses is below its first stage.
            first, below = columns.role == FIRST, np.minimum(columns.most_below, self._devices)
            rows.append(np.where(columns.role > 0, width, 0.0) - np.where(first, below, 0.0))
            lower.append(-np.inf)
            upper.append(0.0)
        return np.stack(rows), np.array(lower), np.array(upper)

    def _group_limits(self) -> list[tuple[int, list[int], int]]:
        """Cell, sizes of groups, and the devices that groups of these sizes fill at most."""
        found, sizes = [], np.unique(self._group).tolist()
        for index, rooms in enumerate(self._cells.rooms):
            for place in range(len(sizes)):
                groups = filling_alike(rooms, sizes[place:])
                whole = sum(n * filled(room, groups) for room, n in Counter(rooms).items())
                if whole < self._counts[index]:
                    found.append((index, groups, whole))
        return found

    def _most(self, columns: Columns) -> IntArray:
        """How often a column may be used at all."""
        take = self._take[columns.option]
        fit = np.where(take > 0, np.array(self._counts) // np.maximum(take, 1), 10**9)
        most = np.minimum(
            fit.min(axis=1, initial=10**9), columns.most_below // self._width[columns.option]
        )
        most = np.minimum(most, self._repeats.number // np.maximum(columns.blocks, 1))
        found: IntArray = np.where(columns.role == BODY, most, np.minimum(most, 1)).astype(np.intp)
        return found

    def _answer(self, columns: Columns, used: IntArray, fill_s: float, bound_s: float) -> ChainAnswer:
        """Line the stages up: from the end by growing `most_below`, equals by option, then in nodes."""
        below = np.minimum(columns.most_below[used], self._devices)
        # Roles are numbered in the order of the line.
        rank = np.lexsort((columns.blocks[used], columns.option[used], -below, columns.role[used]))
        take = self._take[columns.option[used]]
        cell, devices = take.argmax(axis=1), take.sum(axis=1)
        size = np.array(self._cells.node_sizes)[cell]
        width, inside = self._width[columns.option[used]], 2 - columns.outside[used]
        fields = (columns.role[used], cell, devices, width, below.astype(np.intp), inside, size)
        to_place = [Placed(*row) for row in zip(*(f.tolist() for f in fields), strict=True)]
        order, joined = line_up(to_place, rank, self._cells.rooms)
        return self._pipeline(columns, used[order], joined, fill_s, bound_s)

    def _pipeline(
        self, columns: Columns, used: IntArray, joined: list[bool], fill_s: float, bound_s: float
    ) -> ChainAnswer:
        """Stages from the first to the last; those that are `joined` share the node of the one before."""
        stages, unit = [], 0
        for number, (index, joins) in enumerate(zip(used, joined, strict=True)):
            end = self._end(unit, int(columns.blocks[index]), number, len(used))
            stages.append(Stage(unit, end, self._options[columns.option[index]], joins))
            unit = end
        return ChainAnswer(
            fill_s=fill_s,
            extra_s=float(columns.extra_s[used].max()),
            post_s=float(columns.post_s[used].max()),
            bound_s=bound_s,
            stages=tuple(stages),
        )

    def _end(self, unit: int, blocks: int, number: int, count: int) -> int:
        """The unit after a stage; the first stage holds the head and the last one the tail."""
        if number == count - 1:
            return self._num_units
        return (self._repeats.start if number == 0 else unit) + blocks * self._repeats.period
