"""The columns of the counting programme: every stage that may be opened, priced in arrays.

A *column* is a stage option (mode, replicas), the links at its two boundaries, a role and a number of
blocks. Arrays are indexed [width, run] while one mode is priced, where a run is a role with a number of
blocks; columns that cannot be used or that another one replaces are dropped at once.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from graphpar.cost import CostTable, Mode
from graphpar.partition.cells import Cells, StageOption
from graphpar.partition.clock import OutOfTimeError, ShouldStop, never
from graphpar.partition.repeats import Repeats
from graphpar.partition.stage_costs import boundary_seconds, ring_array, summing
from graphpar.partition.unit_arrays import (
    UNLIMITED,
    Cache,
    FloatArray,
    IntArray,
    Setting,
    UnitArrays,
    some_ranges,
)

BoolArray = npt.NDArray[np.bool_]
_ItemT = TypeVar("_ItemT")

Span = tuple[int, ...]
"""Microbatch counts that columns are to hold for at once; none where the setting's own is meant."""

WHOLE, FIRST, BODY, LAST = range(4)
"""Roles of a column, in the order of the line."""


@dataclass(frozen=True, eq=False)
class Columns:
    """The stages that may be opened, one entry per column in every array.

    `option` numbers the stage options; `arm` is 0 to 3: a bit for either boundary that leaves the node or
    ends the pipeline (1 before, 2 after); `most_below` is the most replicas from the stage on with which
    its memory holds.
    """

    role: IntArray
    option: IntArray
    blocks: IntArray
    arm: IntArray
    fill_s: FloatArray
    extra_s: FloatArray
    post_s: FloatArray
    most_below: FloatArray

    def pick(self, index: IntArray) -> "Columns":
        """Only some columns."""
        return Columns(*(getattr(self, f.name)[index] for f in fields(self)))

    @property
    def outside(self) -> IntArray:
        """How many of the two boundaries leave the node or end the pipeline."""
        found: IntArray = self.arm % 2 + self.arm // 2
        return found

    def __len__(self) -> int:
        return len(self.role)


@dataclass(frozen=True, eq=False)
class Runs:
    """The runs of units a stage may hold: role, first unit, unit after the last, blocks."""

    role: IntArray
    first: IntArray
    last: IntArray
    blocks: IntArray


def find_runs(table: CostTable, repeats: Repeats) -> Runs:
    """Every role with every number of blocks."""
    number, units = repeats.number, table.num_units
    inner = 1 if repeats.start == 0 else 0
    rows = [(WHOLE, 0, units, number)]
    rows += [(FIRST, 0, repeats.unit(b), b) for b in range(inner, number + 1)]
    # A stage in the middle sends and receives; one that starts as early as it can stands for all.
    rows += [
        (BODY, repeats.unit(inner), repeats.unit(inner + b), b) for b in range(1, number - inner + 1)
    ]
    rows += [(LAST, repeats.unit(number - b), units, b) for b in range(number + 1)]
    kept = [r for r in rows if r[1] < r[2] and (r[0] in (WHOLE, FIRST) or r[1] > 0)]
    return Runs(*(np.array([r[i] for r in kept], dtype=np.intp) for i in range(4)))


def price_columns(
    table: CostTable,
    cells: Cells,
    options: Sequence[StageOption],
    setting: Setting,
    repeats: Repeats,
    cache: Cache | None = None,
    should_stop: ShouldStop = never,
    span: Span = (),
) -> Columns:
    """All columns of a setting that may be part of a best pipeline.

    With a span they are lower bounds on those of all its microbatch counts, in either schedule.
    `cache` keeps what settings of the same table, options and blocks share.

    Raises:
        OutOfTimeError: `should_stop` said so.
    """
    runs = find_runs(table, repeats)
    pairs = list(zip(runs.first.tolist(), runs.last.tolist(), strict=True))
    units = UnitArrays(table, setting, some_ranges(pairs), cache)
    settings = [replace(setting, microbatches=m) for m in span] or [setting]
    grids = _undominated(
        [g for g in _watched(_grids(table, units, options, settings), should_stop) if g.usable.any()]
    )
    cuts = [_cuts(table, cells, settings, cell) for cell in range(len(cells.cells))]
    found = [
        part
        for grid in _watched(grids, should_stop)
        for part in _arms(table, cells, runs, grid, settings, cuts[grid.cell], either=bool(span))
    ]
    if not found:
        none, nothing = np.zeros(0, dtype=np.intp), np.zeros(0)
        return Columns(none, none, none, none, nothing, nothing, nothing, nothing)
    return Columns(*(np.concatenate([getattr(c, f.name) for c in found]) for f in fields(Columns)))


def _watched(items: Iterable[_ItemT], should_stop: ShouldStop) -> Iterator[_ItemT]:
    """Items each of which takes long."""
    for item in items:
        if should_stop():
            raise OutOfTimeError
        yield item


@dataclass(frozen=True, eq=False)
class _Grid:
    """All widths of one mode: [width, run]; `extra_s` is without waiting."""

    mode: Mode
    number: int
    option: IntArray
    width: IntArray
    devices: IntArray
    cell: int
    fill_s: FloatArray
    extra_s: FloatArray
    post_s: FloatArray
    most_below: FloatArray
    usable: BoolArray


def _grids(
    table: CostTable, units: UnitArrays, options: Sequence[StageOption], settings: Sequence[Setting]
) -> Iterator[_Grid]:
    """All modes, by the setting of `units` but for extra, which is the least of the settings."""
    setting = units.setting
    each = [UnitArrays(table, s, units.runs, units.cache) for s in settings]
    by_mode: dict[tuple[int, int], list[int]] = {}
    for number, option in enumerate(options):
        if option.width <= setting.microbatches:
            by_mode.setdefault((option.staff[0], option.groups[0][0]), []).append(number)
    for (number, cell), own in by_mode.items():
        mode = table.every_mode[number]
        width = np.array([options[i].width for i in own], dtype=np.intp)
        moved = _moved(table, units, number, [options[i] for i in own])
        seconds = units.seconds(number)[None] + moved
        below = _most_below(units, number, width, min(s.microbatches for s in settings))
        extras = [
            _more(u.setting, width) * (u.seconds(number)[None] + moved) + _ragged(u, number, width)
            for u in each
        ]
        yield _Grid(
            mode=mode,
            number=number,
            option=np.array(own, dtype=np.intp),
            width=width,
            devices=width * len(mode.members),
            cell=cell,
            fill_s=seconds,
            extra_s=_least(extras, settings, width),
            post_s=_post(table, units, number, [options[i] for i in own], setting),
            most_below=below,
            usable=np.isfinite(seconds) & (below >= width[:, None]),
        )


def _least(values: Sequence[FloatArray], settings: Sequence[Setting], width: IntArray) -> FloatArray:
    """[width, run]: the least of some values over the settings with a microbatch for each replica."""
    if len(values) == 1:
        return values[0]
    alone = (np.array([s.microbatches for s in settings]) >= width[:, None]).T[:, :, None]
    rows = [np.where(fits, own, np.inf) for fits, own in zip(alone, values, strict=True)]
    found: FloatArray = np.minimum.reduce(rows)
    return found


def _moved(table: CostTable, units: UnitArrays, mode: int, options: Sequence[StageOption]) -> FloatArray:
    """What ZeRO moves for every microbatch."""
    zero, each = table.every_mode[mode].zero, table.sum_s_per_byte
    if zero < 2 or not table.training:
        return np.zeros((len(options), 1))
    key = ("moved", mode, tuple(o.take for o in options))
    if key in units.cache:
        return units.cache[key]
    gradients = units.most_bytes(mode, "gradient_bytes")
    weights = units.most_bytes(mode, "weight_bytes")
    rows = []
    for option in options:
        row = ring_array(option.ring, option.width, gradients, each) / 2
        if zero > 2:
            row = row + ring_array(option.ring, option.width, weights, each)
        rows.append(row)
    found = units.cache[key] = np.stack(rows)
    return found


def _post(
    table: CostTable,
    units: UnitArrays,
    mode: int,
    options: Sequence[StageOption],
    setting: Setting,
) -> FloatArray:
    """Gradient sync and optimiser."""
    if not table.training:
        return np.zeros((len(options), len(units.valid)))
    key = ("posts", mode, setting.peers, setting.across, tuple(o.take for o in options))
    if key in units.cache:
        return units.cache[key]
    zero, each = table.every_mode[mode].zero, table.sum_s_per_byte
    gradients = units.most_bytes(mode, "gradient_bytes")
    weights = units.most_bytes(mode, "weight_bytes")
    optimizer = units.ranges([c.optimizer_s for c in table.every_mode[mode].costs])
    rows = []
    for option in options:
        sync = ring_array(*summing(option, zero, setting), gradients, each)
        if zero == 1:
            sync = sync + ring_array(option.ring, option.width, gradients, each) / 2
        if zero in (1, 2):
            sync = sync + ring_array(option.ring, option.width, weights, each) / 2
        rows.append(sync + optimizer / (option.width if zero else 1))
    found = units.cache[key] = np.stack(rows)
    return found


def _most_below(units: UnitArrays, mode: int, width: IntArray, microbatches: int) -> FloatArray:
    """The most replicas from the stage on with which memory holds, -1 where it never does."""
    gpipe = units.setting.schedule == "gpipe"
    flight = units.in_flight_by_width(mode, width.tolist())
    own = -(-microbatches // width[:, None])
    bounded = np.full(flight.shape, -1.0) if gpipe else width[:, None] * flight
    found: FloatArray = np.where(own <= flight, UNLIMITED, bounded)
    return found


def _undominated(grids: Sequence[_Grid]) -> list[_Grid]:
    """Drop stages that another mode on the same devices does no worse in every respect."""
    teams: dict[tuple[object, ...], list[_Grid]] = {}
    for grid in grids:
        # Where a group may stand is a matter of the link its price holds for.
        teams.setdefault((grid.mode.members, grid.mode.link, grid.cell), []).append(grid)
    for team in teams.values():
        # The fastest first: they leave little of the others to compare with.
        team.sort(key=lambda g: float(np.where(g.usable, g.fill_s, 0.0).sum() / g.usable.sum()))
        for grid in team:
            for other in team:
                if other is not grid and other.usable.any():
                    _drop_where_worse(grid, other)
                    if not grid.usable.any():
                        break
    return list(grids)


def _drop_where_worse(grid: _Grid, other: _Grid) -> None:
    """Mark what the other mode, where it is still in use, replaces; ties go to whoever is asked first.

    With the same replicas both wait equally often, so that less extra without it is less extra whatever
    the links are. Of unequal microbatches a stage that is faster on average may have more.
    """
    rows, others = _same_widths(grid.width, other.width)
    worse = other.usable[others] & (other.fill_s[others] <= grid.fill_s[rows])
    worse &= other.extra_s[others] <= grid.extra_s[rows]
    worse &= (other.post_s[others] <= grid.post_s[rows]) & (
        other.most_below[others] >= grid.most_below[rows]
    )
    grid.usable[rows] &= ~worse


def _same_widths(left: IntArray, right: IntArray) -> tuple[IntArray | slice, IntArray | slice]:
    """The places of the widths that two increasing lists share."""
    if len(left) == len(right) and (left == right).all():
        return slice(None), slice(None)
    rows, others = np.intersect1d(left, right, assume_unique=True, return_indices=True)[1:]
    return rows, others


def _cuts(
    table: CostTable, cells: Cells, settings: Sequence[Setting], cell: int
) -> tuple[list[bool], list[FloatArray]]:
    """Whether there is a link inside and across nodes; by setting [link, boundary] seconds over them."""
    place = cells.cells[cell].place
    links = cells.links[place][place], cells.links[-1][0]
    kinds = [frozenset() if k is None else frozenset({k}) for k in links]
    return [bool(k) for k in kinds], [boundary_seconds(table, s, kinds) for s in settings]


def _arms(
    table: CostTable,
    cells: Cells,
    runs: Runs,
    grid: _Grid,
    settings: Sequence[Setting],
    links: tuple[list[bool], list[FloatArray]],
    *,
    either: bool,
) -> Iterator[Columns]:
    """The stages of one mode between all kinds of links that a neighbour may give them.

    With `either` schedule stages that have the memory for GPipe take the least of both.
    """
    kinds, cuts = links
    stalls = table.training and settings[0].schedule == "1f1b"
    least = min(s.size for s in settings)
    shortest = cuts[[s.size for s in settings].index(least)]
    is_first = (runs.role == FIRST) | (runs.role == WHOLE)
    is_last = (runs.role == LAST) | (runs.role == WHOLE)
    for before in (0, 1):
        for after in (0, 1):
            # Ends count as boundaries to the outside; a node must hold the neighbours that are inside.
            inner = (before == 0) + (after == 0)
            room = grid.devices[:, None] + inner <= cells.node_sizes[grid.cell]
            usable = grid.usable & (room if inner else True)
            usable = usable & ~(is_first & (before == 0)) & ~(is_last & (after == 0))
            if not kinds[before]:
                usable = usable & is_first
            if not kinds[after]:
                usable = usable & is_last
            rows, columns = np.nonzero(usable)
            if len(rows) == 0:
                continue
            aheads = [np.where(is_first, 0.0, c[before][runs.first]) for c in cuts]
            behinds = [np.where(is_last, 0.0, c[after][runs.last]) for c in cuts]
            ends = list(zip(aheads, behinds, strict=True))
            extra = grid.extra_s
            if stalls:
                extra = extra + _least(_waits(settings, grid, ends, np.inf), settings, grid.width)
            if either or not stalls:
                sent = [(s.microbatches - 1) * a for s, a in zip(settings, aheads, strict=True)]
                busy = grid.extra_s
                if table.handling_s:
                    waits = _waits(settings, grid, ends, table.handling_s)
                    busy = busy + _least(waits, settings, grid.width)
                overlapped = np.maximum(busy, np.minimum.reduce(sent))
                keeps_all = grid.most_below >= UNLIMITED
                extra = (
                    np.where(keeps_all, np.minimum(extra, overlapped), extra) if stalls else overlapped
                )
            ahead = np.where(is_first, 0.0, shortest[before][runs.first])
            yield Columns(
                role=runs.role[columns],
                option=grid.option[rows],
                blocks=runs.blocks[columns],
                arm=np.full(len(rows), before + 2 * after, dtype=np.intp),
                fill_s=(grid.fill_s + ahead)[rows, columns],
                extra_s=extra[rows, columns],
                post_s=grid.post_s[rows, columns],
                most_below=grid.most_below[rows, columns],
            )


def _waits(
    settings: Sequence[Setting],
    grid: _Grid,
    ends: Sequence[tuple[FloatArray, FloatArray]],
    most_s: float,
) -> list[FloatArray]:
    """[width, run] by setting: half of either boundary for each further microbatch, up to the most."""
    return [
        _more(s, grid.width) * (np.minimum(ahead, most_s) + np.minimum(behind, most_s)) / 2
        for s, (ahead, behind) in zip(settings, ends, strict=True)
    ]


def _more(setting: Setting, width: IntArray) -> IntArray:
    """[width, 1]: microbatches of the replica that has most, but the first one."""
    found: IntArray = -(-setting.microbatches // width[:, None]) - 1
    return found


def _ragged(units: UnitArrays, mode: int, widths: IntArray) -> FloatArray:
    """What unequal microbatches add to the first replica, which ends last (`pipeline_price.ragged_s`)."""
    setting = units.setting
    larger = setting.samples % setting.microbatches
    if larger == 0:
        return np.zeros((1, 1))
    width = widths[:, None]
    share = larger * -(-setting.microbatches // width) / setting.microbatches
    found: FloatArray = (-(-larger // width) - share) * units.sample_seconds(mode)[None]
    return found


_NARROWER_LOOKED_AT = 6


def drop_wider(columns: Columns, mode: IntArray, width: IntArray, devices: int) -> IntArray:
    """Columns but those whose place a narrower one with the same blocks, mode and links may take.

    Its fill is no more, for what ZeRO moves grows with the width. The narrower leaves every stage at
    most as many replicas below, hence it may replace the wider wherever its own limit on replicas below
    is no stricter.
    """
    key = ((mode * 4 + columns.role) * 4 + columns.arm) * (int(columns.blocks.max(initial=0)) + 1)
    key = key + columns.blocks
    order = np.lexsort((width, key))
    below = np.minimum(columns.most_below[order], devices)
    group = np.cumsum(np.concatenate([[0], np.diff(key[order]) != 0]))
    lifted = below + group * (devices + 2.0)
    best = np.concatenate([[-1.0], np.maximum.accumulate(lifted)[:-1]])
    kept: IntArray = order[lifted > best]
    return np.sort(kept)


def drop_wider_and_dearer(
    columns: Columns, cost: FloatArray, mode: IntArray, width: IntArray, devices: int
) -> IntArray:
    """The same where columns cost something besides their fill: a narrower one must not cost more.

    What lies beyond a limit of extra or post grows as replicas get fewer, so that a wider column may be
    worth its devices. Each is compared with the few next narrower ones alone; more would only drop more.
    """
    key = ((mode * 4 + columns.role) * 4 + columns.arm) * (int(columns.blocks.max(initial=0)) + 1)
    key = key + columns.blocks
    order = np.lexsort((width, key))
    group, below, costs = key[order], np.minimum(columns.most_below[order], devices), cost[order]
    dropped = np.zeros(len(order), dtype=np.bool_)
    for step in range(1, min(_NARROWER_LOOKED_AT, len(order) - 1) + 1):
        replaced = (group[step:] == group[:-step]) & (below[step:] <= below[:-step])
        dropped[step:] |= replaced & (costs[step:] >= costs[:-step])
    kept: IntArray = np.sort(order[~dropped])
    return kept


def drop_dearer(columns: Columns, cost: FloatArray, team: IntArray, due: IntArray) -> IntArray:
    """Columns but those that another one stands for: the same devices, role, blocks and boundaries.

    The other costs no more and keeps its memory with at least as many replicas below. `team` numbers what
    devices a column takes as how many replicas.
    """
    key = (team * 4 + columns.role) * 4 + columns.arm
    return undominated(key * (int(columns.blocks.max(initial=0)) + 1) + columns.blocks, cost, due)


def undominated(key: IntArray, cost: FloatArray, due: IntArray) -> IntArray:
    """Places but those for which another one with the same key costs no more and has no earlier due.

    >>> key, cost, due = np.array([1, 1, 1, 2]), np.array([3.0, 4.0, 4.0, 9.0]), np.array([5, 5, 6, 1])
    >>> undominated(key, cost, due).tolist()
    [0, 2, 3]
    """
    order = np.lexsort((cost, -due, key))
    begins = np.concatenate([[True], np.diff(key[order]) != 0])[: len(order)]
    # With falling due only what costs less than all before it in its group is of use. Ranks are exact
    # where sums with a group's number would round.
    rank = np.empty(len(cost), dtype=np.intp)
    rank[np.argsort(cost, kind="stable")] = np.arange(len(cost))
    lifted = rank[order] - np.cumsum(begins) * len(cost)
    before = np.concatenate([[np.iinfo(np.intp).max], np.minimum.accumulate(lifted)[:-1]])[: len(order)]
    found: IntArray = np.sort(order[(lifted < before) | begins])
    return found
