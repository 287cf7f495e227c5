"""The best single pipeline of a chain of equal blocks over many devices: count stages, not places.

The chain is some head units, L equal blocks, some tail units. A *column* is a stage option with a
number of blocks: `x_j` body stages of column j, one first column (head units with some blocks), one
last column. Columns that break a limit on extra or post are left out, and

    minimise    sum_j x_j (fill_j + transfer)  + first and last
    such that   sum_j blocks_j x_j  = L                            all blocks are run
                sum_j [class of j = c] devices_j x_j <= N_c        devices of each class
                sum_{j of class c in groups >= t} devices_j x_j <= t sum_nodes floor(size / t)
                sum_{j: D_j <= d} width_j x_j <= d   for all d     memory by position
                sum_j outside_j x_j >= 2 sum_j min(1, devices_j / node_j) x_j  nodes are left
                one first column, one last column

A column says which of its two boundaries stay inside a node (`outside_j` do not). `D_j` is the most
replicas that may follow from a stage of column j on (itself included) with its microbatches in
flight still fitting into memory. Where stages stand is a matter of order only: sorted by `D_j` from
the pipeline's end they all keep their limits if any order does (the earliest due date rule, Jackson
1955), and that the sorted order keeps them is what the rows above say. So the count is an exact
account of memory by position. Its size does not depend on the number of blocks or devices, but for
the number of widths and of blocks per stage.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from graphpar.cost import CostTable, Mode
from graphpar.partition.cells import Cells, StageOption
from graphpar.partition.chain import ChainAnswer, OutOfTimeError, Stage
from graphpar.partition.repeats import Repeats
from graphpar.partition.solver import Backend, Outcome, Program, Term, Variable
from graphpar.partition.stage_costs import StageCosts, StageLimits, build_costs
from graphpar.partition.unit_arrays import FloatArray, IntArray, Setting, some_ranges

_INNER_GAP = 0.1
"""Share of the asked-for gap that a single programme may leave open."""


ROLES = ("whole", "first", "body", "last")


@dataclass(frozen=True, eq=False)
class Columns:
    """The stages that may be opened, one entry per column in every array.

    `role` is an index into ROLES, `outside` how many of the two boundaries leave the node or end the
    pipeline, `key` is equal for columns that differ in width only.
    """

    role: IntArray
    option: IntArray
    length: IntArray
    blocks: IntArray
    outside: IntArray
    key: IntArray
    fill_s: FloatArray
    extra_s: FloatArray
    post_s: FloatArray
    most_below: FloatArray

    def pick(self, index: IntArray) -> "Columns":
        """Only some columns."""
        return Columns(*(getattr(self, f.name)[index] for f in fields(self)))

    def __len__(self) -> int:
        return len(self.role)


@dataclass(frozen=True)
class CountingLimits:
    """How closely one programme is solved, and by what."""

    gap: float
    backend: Backend


class CountingProgram:
    """The programme of one setting; `costs` and `columns` do not depend on any limit."""

    def __init__(
        self,
        table: CostTable,
        cells: Cells,
        options: Sequence[StageOption],
        setting: Setting,
        repeats: Repeats,
        limits: CountingLimits,
    ) -> None:
        self._cells = cells
        self._repeats = repeats
        self._limits = limits
        self._devices = sum(cells.counts)
        runs = _runs(table, repeats)
        ranges = some_ranges([(first, last) for _, first, last, _ in runs])
        self.costs = build_costs(table, cells, options, setting, ranges)
        self._take = np.array([o.take for o in self.costs.options], dtype=np.intp)
        self._width = np.array([o.width for o in self.costs.options], dtype=np.intp)
        self._group = np.array([len(o.groups[0]) for o in self.costs.options], dtype=np.intp)
        self._columns = _columns(self.costs, runs, table, cells)

    @property
    def num_columns(self) -> int:
        """Columns before any limit."""
        return len(self._columns)

    def solve(self, limits: StageLimits, deadline_s: float) -> ChainAnswer | None:
        """The least fill under the limits with a bound on it, or None where nothing fits.

        Raises:
            OutOfTimeError: `time.monotonic()` passed `deadline_s` without an answer.
        """
        everything = self._columns
        within = (everything.extra_s <= limits.extra_s) & (everything.post_s <= limits.post_s)
        within &= everything.extra_s + everything.post_s <= limits.both_s
        columns = _undominated(everything.pick(np.flatnonzero(within)))
        if len(columns) == 0:
            return None
        program, pool = self._program(columns)
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            raise OutOfTimeError
        outcome = program.solve(
            time_limit_s=left_s,
            relative_gap=self._limits.gap * _INNER_GAP,
            backend=self._limits.backend,
        )
        if outcome.status == "infeasible":
            return None
        if not outcome.has_point:
            raise OutOfTimeError
        counts = np.array([round(outcome.value(x)) for x in pool], dtype=np.intp)
        return self._answer(columns, counts, outcome)

    def _program(self, columns: Columns) -> tuple[Program, list[Variable]]:
        program = Program("counting")
        take = self._take[columns.option]
        most = self._most(columns, take)
        pool = [program.integer(f"x{i}", 0, int(most[i])) for i in range(len(columns))]

        def row(weights: FloatArray | IntArray) -> list[Term]:
            return [(float(weights[i]), pool[i]) for i in np.flatnonzero(weights)]

        program.constrain(row(columns.blocks), "==", self._repeats.number, "blocks")
        whole = columns.role == ROLES.index("whole")
        for name in ("first", "last"):
            ends = whole | (columns.role == ROLES.index(name))
            program.constrain(row(ends.astype(np.intp)), "==", 1, f"one {name} stage")
        for index, number in enumerate(self._cells.counts):
            program.constrain(row(take[:, index]), "<=", number, f"devices of cell {index}")
        for index, size, number in self._group_limits(columns):
            wide = np.where(self._group[columns.option] >= size, take[:, index], 0)
            program.constrain(row(wide), "<=", number, f"groups of {size} in cell {index}")
        program.constrain(row(self._outside_row(columns)), ">=", 0, "boundaries between nodes")
        for name, weights, limit in self._memory_rows(columns):
            program.constrain(row(weights), "<=", limit, name)
        program.minimize(row(columns.fill_s))
        return program, pool

    def _group_limits(self, columns: Columns) -> Iterator[tuple[int, int, int]]:
        """Cell, group size, and the devices of the cell in whole groups of that size.

        Exact where every group size divides the larger ones, else a relaxation.
        """
        for index, sizes in enumerate(self._cells.rooms):
            for group in np.unique(self._group[columns.option]):
                whole = sum(n // int(group) * int(group) for n in sizes)
                if whole < sum(sizes):
                    yield index, int(group), whole

    def _most(self, columns: Columns, take: IntArray) -> IntArray:
        """How often a column may be used at all."""
        with np.errstate(divide="ignore"):
            fit = np.where(take > 0, np.array(self._cells.counts) // np.maximum(take, 1), 10**9)
        most = np.minimum(fit.min(axis=1), columns.most_below // self._width[columns.option])
        most = np.minimum(most, self._repeats.number // np.maximum(columns.blocks, 1))
        body = columns.role == ROLES.index("body")
        found: IntArray = np.where(body, most, np.minimum(most, 1)).astype(np.intp)
        return found

    def _outside_row(self, columns: Columns) -> FloatArray:
        """Boundaries that leave a node, at least twice the nodes that the stages fill.

        Neighbouring stages in one node form a group with two boundaries to the outside; a stage that
        spans nodes is a group of its own.
        """
        sizes = np.array(self._cells.node_sizes, dtype=np.float64)
        share = np.minimum((self._take / sizes).sum(axis=1), 1.0)
        found: FloatArray = columns.outside - 2 * share[columns.option]
        return found

    def _memory_rows(self, columns: Columns) -> Iterator[tuple[str, FloatArray, float]]:
        width = self._width[columns.option].astype(np.float64)
        first, body, last = (columns.role == ROLES.index(r) for r in ("first", "body", "last"))
        below = np.minimum(columns.most_below, self._devices)
        for due in np.unique(below[body & (below < self._devices)]):
            # The last stage is below all others; one as wide as `due` leaves no room at all.
            bound = np.where(body & (below <= due), width, 0.0) + last * np.minimum(width, due)
            yield f"memory with {due:.0f} devices below", bound, float(due)
        if (below[first] < self._devices).any():
            # Whatever the pipeline uses is below its first stage.
            yield "memory of the first stage", width * (first | body | last) - first * below, 0.0

    def _answer(self, columns: Columns, counts: IntArray, outcome: Outcome) -> ChainAnswer:
        """Line the stages up: from the end by growing `most_below`, equals by option."""
        assert outcome.objective is not None
        used = np.repeat(np.arange(len(columns)), counts)
        below = np.minimum(columns.most_below[used], self._devices)
        # Roles are numbered in the order of the line.
        order = np.lexsort((columns.blocks[used], columns.option[used], -below, columns.role[used]))
        stages, unit = [], 0
        for index in used[order]:
            length = int(columns.length[index])
            option = self.costs.options[columns.option[index]]
            stages.append(Stage(unit, unit + length, option))
            unit += length
        bound = outcome.bound if outcome.bound is not None else 0.0
        return ChainAnswer(
            fill_s=outcome.objective,
            extra_s=float(columns.extra_s[used].max()),
            post_s=float(columns.post_s[used].max()),
            bound_s=min(bound, outcome.objective),
            stages=tuple(stages),
        )


def counting_options(table: CostTable, cells: Cells, max_width: int) -> list[StageOption]:
    """Stages of interchangeable replicas, in widths 1 to 4 and then in steps of at most a third.

    Replicas are devices or tensor groups of one class, which stand inside a node unless the network is
    as good as the link their price holds for.
    """
    options = []
    for index, cell in enumerate(cells.cells):
        for number, mode in enumerate(table.every_mode):
            if set(mode.members) != {cell.device_class} or not _may_group(cells, index, mode):
                continue
            most = sum(n // len(mode.members) for n in cells.rooms[index])
            for width in widths(min(most, max_width)):
                if width > 1 or mode.zero == 0:
                    options.append(_option(cells, index, number, len(mode.members), width))
    return options


def _may_group(cells: Cells, index: int, mode: Mode) -> bool:
    """Whether the members of a mode fit into a node of a cell, joined by what its price needs."""
    if mode.link is None:
        return True
    place = cells.cells[index].place
    link = cells.links[place][place]
    # `links` holds the best of several inside links: that of the worst node must do.
    worst = cells.worst_inside[index]
    enough = link is not None and worst is not None and worst.at_least(mode.link)
    return enough and len(mode.members) <= cells.node_sizes[index]


def _option(cells: Cells, index: int, mode: int, group: int, width: int) -> StageOption:
    """A stage of one class: links inside a node as long as a node has room."""
    devices = group * width
    size, place = cells.node_sizes[index], cells.cells[index].place
    inside, network = cells.links[place][place], cells.links[-1][0]
    ring = inside if devices <= size else network
    near = (inside, network) if devices < size else (network,)
    return StageOption(
        take=tuple(devices if i == index else 0 for i in range(len(cells.counts))),
        places=frozenset({place}),
        ring=frozenset() if ring is None or width == 1 else frozenset({ring}),
        staff=(mode,) * width,
        groups=((index,) * group,) * width,
        sides=tuple(dict.fromkeys(frozenset({k}) for k in near if k is not None)),
    )


def widths(most: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, 16, ... up to the given number.

    >>> widths(20)
    [1, 2, 3, 4, 6, 8, 12, 16]
    """
    found = {p * f // 2 for p in (2**i for i in range(1, 32)) for f in (1, 2, 3)}
    return sorted(w for w in found if w <= most)


def _runs(table: CostTable, repeats: Repeats) -> list[tuple[str, int, int, int]]:
    """Role, first unit, unit after the last, and blocks of every column, whatever its option."""
    number, units = repeats.number, table.num_units
    inner = 1 if repeats.start == 0 else 0
    first = [("first", 0, repeats.unit(b), b) for b in range(inner, number + 1)]
    # A stage in the middle sends and receives; one that starts as early as it can stands for all.
    body = [
        ("body", repeats.unit(inner), repeats.unit(inner + b), b) for b in range(1, number - inner + 1)
    ]
    last = [("last", repeats.unit(number - b), units, b) for b in range(number + 1)]
    runs = [("whole", 0, units, number), *first, *body, *last]
    return [run for run in runs if run[1] < run[2] and (run[0] in ("whole", "first") or run[1] > 0)]


def _columns(
    costs: StageCosts, runs: Sequence[tuple[str, int, int, int]], table: CostTable, cells: Cells
) -> Columns:
    """Every run on every arm that suits its ends, where memory and nodes allow it."""
    role = np.array([ROLES.index(r) for r, _, _, _ in runs])
    first, last, blocks = (np.array([run[i] for run in runs]) for i in (1, 2, 3))
    option, before, after = (
        np.array([getattr(a, name) for a in costs.arms])
        for name in ("option", "link_before", "link_after")
    )
    fits = np.isfinite(costs.extra_s) & (costs.most_below[option] > 0)
    fits &= (first == 0)[None] == (before == 0)[:, None]
    fits &= (last == table.num_units)[None] == (after == 0)[:, None]
    network = _network_kind(costs, cells)
    sides = np.array(
        [int(b in (0, network)) + int(a in (0, network)) for b, a in zip(before, after, strict=True)]
    )
    fits &= _room(costs, cells, 2 - sides)[:, None]
    arm, run = np.nonzero(fits)
    chosen = option[arm]
    support = np.array([o.staff[0] for o in costs.options])
    key = np.unique(
        np.stack([role[run], blocks[run], support[chosen], before[arm], after[arm]]),
        axis=1,
        return_inverse=True,
    )[1]
    return Columns(
        role=role[run],
        option=chosen,
        length=(last - first)[run],
        blocks=blocks[run],
        outside=sides[arm],
        key=key.reshape(-1),
        fill_s=costs.fill_s[chosen, run] + costs.before_s[before[arm], first[run]],
        extra_s=costs.extra_s[arm, run],
        post_s=costs.post_s[chosen, run],
        most_below=costs.most_below[chosen, run],
    )


def _network_kind(costs: StageCosts, cells: Cells) -> int:
    network = cells.links[-1][0]
    kind = frozenset() if network is None else frozenset({network})
    return costs.link_kinds.index(kind)


def _room(costs: StageCosts, cells: Cells, inside: IntArray) -> npt.NDArray[np.bool_]:
    """[arm]: whether a node holds the stage and a neighbour for each boundary inside the node."""
    sizes = np.array(cells.node_sizes)
    width = np.array([o.num_devices for o in costs.options])
    size = np.array([max(s for s, n in zip(sizes, o.take, strict=True) if n) for o in costs.options])
    option = np.array([a.option for a in costs.arms])
    found: npt.NDArray[np.bool_] = (inside == 0) | (width[option] + inside <= size[option])
    return found


def _undominated(columns: Columns) -> Columns:
    """Drop a column where a narrower one with the same blocks, mode and links may stand instead.

    Its fill is no more, for what ZeRO moves grows with the width. The narrower leaves every stage at
    most as many replicas below, hence it may replace the wider wherever its own limit on replicas below
    is no stricter. Options are ordered by mode and width.
    """
    order = np.lexsort((columns.option, columns.key))
    kept, key, most = [], -1, -1.0
    for index, here, below in zip(
        order.tolist(), columns.key[order].tolist(), columns.most_below[order].tolist(), strict=True
    ):
        if here != key or below > most:
            kept.append(index)
            key, most = here, below
    return columns.pick(np.array(kept, dtype=np.intp))
