"""Regular plans of a large cluster: like stages of one kind of device, with blocks spread evenly.

A regular plan runs every stage in one mode with the same number of replicas, and every stage holds as
many blocks as the others or one less. It is what people write down by hand (tensor width x stages x
copies). There are few enough to look at all of them, in arrays over replicas and stages, without a
solver. Seconds are estimated with the slowest link that a stage may meet; bytes are counted by position
as `pipeline_price` counts them, for the member that holds most. So where a regular plan fits into memory
one is found, whatever time is left for a search.
"""

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise

import numpy as np

from graphpar.cost import CostTable, LinkCost
from graphpar.partition.cells import Cells, StageOption
from graphpar.partition.chains.limits import ChainAnswer, Stage
from graphpar.partition.clock import ShouldStop, never
from graphpar.partition.counting.columns import BoolArray
from graphpar.partition.family import Family
from graphpar.partition.repeats import Repeats, find_repeats
from graphpar.partition.search import Found
from graphpar.partition.unit_arrays import FloatArray, IntArray, Setting

_NO_LINK = LinkCost(0.0, float("inf"))

_AT_ONCE = 100_000
"""Steps of up to so many plans of a mode are estimated at once."""

_SPARE_STAGES = 2
"""Stages beyond the fewest with the same number of blocks: they lighten the first and the last."""


@dataclass(frozen=True)
class _Regular:
    """A regular plan that fits, by its estimated step."""

    step_s: float
    setting: Setting
    option: StageOption
    stages: int


def regular_plans(family: Family, should_stop: ShouldStop = never) -> Iterator[Found]:
    """Regular plans that fit into memory, the shortest estimated step first; links are not checked.

    The best of every mode, microbatch count and kind; nothing for tables without equal blocks. Once it is
    time to stop no more are looked at than it takes to find one.
    """
    repeats = family.repeats or find_repeats(family.table)
    if repeats is None:
        return
    # Under GPipe no less is in memory, so what does not fit under 1F1B does not fit at all.
    schedule = "1f1b" if "1f1b" in family.schedules else family.schedules[0]
    table, by_mode = family.table, _by_mode(family)
    settings = [Setting(table.batch, m, schedule) for m in family.counts(table.batch)]
    each = np.eye(len(table.sizes)).tolist()
    # [setting, tabulated size]: by how much each counts for a microbatch.
    sizes = np.array([[table.at_size(row, s.samples / s.microbatches) for row in each] for s in settings])
    modes = [
        _Mode(table, family.cells, repeats, cell, mode, options, settings, sizes)
        for (cell, mode), options in by_mode.items()
    ]
    for plan in _shortest_first(modes, should_stop):
        stages = tuple(
            Stage(a, b, plan.option) for a, b in pairwise(_cuts(repeats, table.num_units, plan.stages))
        )
        step = plan.step_s
        yield Found(plan.setting, ChainAnswer(step, 0.0, 0.0, 0.0, stages))


def _shortest_first(modes: Sequence["_Mode"], should_stop: ShouldStop) -> Iterator[_Regular]:
    """The best plans of every mode and setting, the shortest first.

    Of what may still be shorter first a rough bound is known, then the least estimate of a plan that need
    not fit.
    """
    # A plan comes before what is not known to be longer.
    queue = [
        (bound_s, 2, number, setting)
        for number, mode in enumerate(modes)
        for setting, bound_s in enumerate(mode.bounds_s())
    ]
    heapq.heapify(queue)
    found: dict[tuple[int, int], _Regular] = {}
    while queue:
        bound_s, unknown, *pair = heapq.heappop(queue)
        mode, setting = pair
        if unknown == 0:
            yield found[mode, setting]
        elif found and should_stop():
            continue
        elif unknown == 2:
            least_s = max(bound_s, modes[mode].least_s(setting))
            heapq.heappush(queue, (least_s, 1, mode, setting))
        elif (plan := modes[mode].best(setting)) is not None:
            found[mode, setting] = plan
            heapq.heappush(queue, (plan.step_s, 0, mode, setting))


def _by_mode(family: Family) -> dict[tuple[int, int], list[StageOption]]:
    """Options by cell and mode."""
    found: dict[tuple[int, int], list[StageOption]] = {}
    for option in family.options:
        cells, modes = {c for g in option.groups for c in g}, set(option.staff)
        if len(cells) == 1 and len(modes) == 1 and option.width <= family.table.max_replicas:
            found.setdefault((cells.pop(), modes.pop()), []).append(option)
    return found


def stage_blocks(number: int, stages: int) -> list[int]:
    """Blocks of every stage: as even as can be, fewer at the first, the last, then from the front.

    The first stage has the head and most in flight, the last one the tail.

    >>> stage_blocks(126, 16)[:2], stage_blocks(126, 16)[-2:], stage_blocks(7, 4)
    ([7, 8], [8, 7], [1, 2, 2, 2])
    """
    most = -(-number // stages)
    spare = most * stages - number
    order = [0, stages - 1, *range(1, stages - 1)]
    fewer = set(order[:spare])
    return [most - (i in fewer) for i in range(stages)]


def _cuts(repeats: Repeats, num_units: int, stages: int) -> list[int]:
    ends = np.cumsum(stage_blocks(repeats.number, stages)).tolist()
    return [0, *(repeats.unit(b) for b in ends[:-1]), num_units]


def _stage_counts(number: int) -> IntArray:
    """For every number of blocks the fewest stages with no more than that, and some beyond."""
    fewest = {-(-number // most) for most in range(1, number + 1)}
    found = {s + more for s in fewest for more in range(_SPARE_STAGES + 1) if s + more <= number}
    return np.array(sorted(found), dtype=np.intp)


_Row = tuple[float, ...]
"""Of a microbatch, by its size."""


@lru_cache(maxsize=8)
def _stage_ends(number: int) -> tuple[IntArray, ...]:
    """By `_stage_counts`: blocks of the stages that may bind (first, last, fullest), and how many stages
    there are from the first of the fullest on."""
    rows = [stage_blocks(number, int(s)) for s in _stage_counts(number)]
    ends = [(r[0], r[-1], max(r), len(r) - r.index(max(r))) for r in rows]
    return tuple(np.array(ends).T)


class _Mode:
    """All regular plans of one mode on one cell; arrays are [replicas per stage, stages]."""

    def __init__(
        self,
        table: CostTable,
        cells: Cells,
        repeats: Repeats,
        cell: int,
        number: int,
        options: list[StageOption],
        settings: Sequence[Setting],
        sizes: FloatArray,
    ) -> None:
        mode = table.every_mode[number]
        self._table, self._number, self._mode, self._options = table, number, mode, options
        self._settings, self._estimates = settings, dict[int, FloatArray]()
        self._microbatches = np.array([setting.microbatches for setting in settings])
        self._sizes = [setting.samples / setting.microbatches for setting in settings]
        place = cells.cells[cell].place
        # Where there is a single node there may be no network, and the other way round.
        self._network = cells.links[-1][0] or cells.links[place][place] or _NO_LINK
        self._inside = cells.links[place][place] or self._network
        self._parts = (
            range(repeats.start),
            range(repeats.start, repeats.unit(1)),
            range(repeats.end, table.num_units),
        )
        self._boundary = repeats.unit(1)
        self._costs = [[mode.costs[table.units[u]] for u in part] for part in self._parts]
        passes = [[(c.forward_s, c.backward_s)[: 1 + table.training] for c in own] for own in self._costs]
        # [setting, part]: seconds of head, block and tail.
        self._passes_s = sizes @ np.array([np.sum(_summed(own, table), axis=0) for own in passes]).T
        self._class = table.device_classes[mode.members[0]]
        self._memory = self._class.memory_bytes - table.reserved_bytes
        self._width = np.array([o.width for o in options], dtype=np.intp)[:, None]
        devices = self._width * len(mode.members)
        # Without nodes in the account all devices of a cell are joined alike.
        rooms = cells.rooms[cell] if cells.rooms else (cells.counts[cell],)
        self._is_inside = devices <= (cells.node_sizes[cell] if cells.node_sizes else rooms[0])
        self._stages = _stage_counts(repeats.number)[None, :]
        self._groups = max(cells.groups(cell, mode), 1)
        self._room = self._width * self._stages <= cells.groups(cell, mode)
        self._blocks = repeats.number
        self._first, self._last, self._most, self._below = _stage_ends(repeats.number)
        self._gradients, self._weights = self._bytes("gradient_bytes"), self._bytes("weight_bytes")

    @cached_property
    def _saved(self) -> list[list[_Row]]:
        """[part, member]: what a microbatch keeps."""
        return [_summed([c.saved_bytes for c in own], self._table) for own in self._costs]

    @cached_property
    def _working(self) -> list[list[_Row]]:
        """[part]: rows of which one is the largest temporary."""
        return [_largest([c.working_bytes for c in own]) for own in self._costs]

    @cached_property
    def _fixed(self) -> list[FloatArray]:
        """[part, width, 1]: bytes held, whatever a microbatch is."""
        one, state = np.ones_like(self._width), self._bytes("optimizer_bytes")
        by = [self._width if self._mode.zero >= level else one for level in (3, 2, 1)]
        return [
            self._weights[i] / by[0] + self._gradients[i] / by[1] + state[i] / by[2] for i in range(3)
        ]

    def bounds_s(self) -> list[float]:
        """No plan of a setting has a shorter estimated step: its blocks on all groups at once."""
        if not self._room.any() or self._memory <= 0:
            return [np.inf] * len(self._settings)
        found: list[float] = (
            self._microbatches * self._blocks * self._passes_s[:, 1] / self._groups
        ).tolist()
        return found

    def least_s(self, number: int) -> float:
        """The least estimated step of a setting, whatever fits into memory."""
        if not self._room.any() or self._memory <= 0:
            return np.inf
        return float(self._estimated_s(number).min())

    def best(self, number: int) -> _Regular | None:
        """The plan of a setting with the least estimated step, if there is one."""
        if self.least_s(number) == np.inf:
            return None
        setting = self._settings[number]
        step = np.where(self._fits(setting), self._estimated_s(number), np.inf)
        row, column = np.unravel_index(int(np.argmin(step)), step.shape)
        if step[row, column] == np.inf:
            return None
        return _Regular(
            float(step[row, column]), setting, self._options[row], int(self._stages[0, column])
        )

    def _fits(self, setting: Setting) -> BoolArray:
        """Whether the first stage, the fullest and the last one fit into memory."""
        size = -(-setting.samples // setting.microbatches)
        saved = [max(self._table.at_size(row, size) for row in rows) for rows in self._saved]
        whole = [
            (self._gradients[i] if self._mode.zero > 1 else 0.0)
            + (self._weights[i] if self._mode.zero > 2 else 0.0)
            for i in range(3)
        ]
        largest = (
            max((self._table.at_size(row, size) for row in rows), default=0.0) for rows in self._working
        )
        working = [own + more for own, more in zip(largest, whole, strict=True)]
        held = -(-setting.microbatches // self._width)
        alone = self._stages == 1

        again, updated = self._repeated_bytes(), self._update_per_gradient()
        more = sum(r.gradient_bytes for r in self._table.repeated)

        def peak(blocks: IntArray, below: IntArray, head: FloatArray, tail: FloatArray) -> FloatArray:
            flying = np.minimum(held, below) if setting.schedule == "1f1b" else held
            flying = flying if self._table.training else 0 * flying
            fixed = self._fixed[1] * blocks + self._fixed[0] * head + self._fixed[2] * tail
            kept = saved[1] * blocks + saved[0] * head + saved[2] * tail
            most = np.maximum(working[1], np.maximum(working[0] * head, working[2] * tail))
            # More than some stages hold; a single one holds nothing twice.
            twice = np.where(alone, 0.0, 1.0) * (1 - head)
            stepped = self._gradients[1] * blocks + self._gradients[0] * head + self._gradients[2] * tail
            update = updated * (stepped + twice * more)
            found: FloatArray = fixed + twice * again + np.maximum(flying * kept + most, update)
            return found

        no, yes = np.zeros(self._stages.shape), np.ones(self._stages.shape)
        # With blocks spread evenly the first of the fullest stages may be the first or the last one.
        inner = peak(self._most, self._below, no, no)
        first = peak(self._first, self._stages, yes, np.where(alone, 1.0, 0.0))
        last = peak(self._last, np.ones_like(self._stages), np.where(alone, 1.0, 0.0), yes)
        fits: BoolArray = np.maximum(np.maximum(first, last), inner) <= self._memory
        return fits

    def _repeated_bytes(self) -> FloatArray:
        """All weights that several units read, with gradients and state, as a stage may hold them."""
        weights, gradients, state = (
            sum(getattr(r, name) for r in self._table.repeated)
            for name in ("weight_bytes", "gradient_bytes", "optimizer_bytes")
        )
        by = [self._width if self._mode.zero >= level else 1.0 for level in (3, 2, 1)]
        found: FloatArray = weights / by[0] + gradients / by[1] + state / by[2] + 0.0 * self._width
        return found

    def _update_per_gradient(self) -> FloatArray:
        """[width, 1]: what the optimiser's update takes per byte of a stage's gradients."""
        if not self._table.training:
            return np.zeros(self._width.shape)
        widths = self._width[:, 0].tolist()
        shares = [self._class.update_per_gradient(self._mode.zero, width) for width in widths]
        return np.array(shares)[:, None]

    def _estimated_s(self, number: int) -> FloatArray:
        """The estimated step where there are devices and microbatches enough, and else endless."""
        if number not in self._estimates:
            few = self._room.size * len(self._settings) <= _AT_ONCE
            some = range(len(self._settings)) if few else [number]
            self._estimates.update(zip(some, self._steps_s(some), strict=True))
        return self._estimates[number]

    def _steps_s(self, numbers: Sequence[int]) -> FloatArray:
        """[setting, replicas per stage, stages]: estimated steps, exact but for the links."""
        table, zero, own = self._table, self._mode.zero, list(numbers)
        head, block, tail = self._passes_s[own].T[:, :, None, None]
        microbatches = self._microbatches[own, None, None]
        overhead = table.mode_overhead_s(self._number) * (2 if table.training else 1)
        cut = np.array([self._cut_s(self._sizes[number]) for number in own])
        cuts = np.where(self._stages > 1, cut[:, None, None], 0.0)
        most = self._most * block
        heaviest = np.maximum(most, np.maximum(self._first * block + head, self._last * block + tail))
        heaviest = np.where(self._stages > 1, heaviest, self._blocks * block + head + tail)
        fullest = self._most.astype(np.float64)
        gradients, weights = self._gradients[1] * fullest, self._weights[1] * fullest
        moved = 0.0 * self._width
        if table.training and zero >= 2:
            moved = self._half_ring_s(gradients) + (2 * self._half_ring_s(weights) if zero > 2 else 0.0)
        period = heaviest + overhead + moved + cuts
        fill = (
            self._blocks * block
            + head
            + tail
            + self._stages * (overhead + moved)
            + (self._stages - 1) * cuts
        )
        step = fill + (-(-microbatches // self._width) - 1) * period
        if table.training:
            sync = 2 * self._half_ring_s(gradients) if zero == 0 else 0.0
            sync = sync + (self._half_ring_s(gradients) if zero == 1 else 0.0)
            sync = sync + (self._half_ring_s(weights) if 0 < zero < 3 else 0.0)
            optimizer = self._optimizer_s() * self._most / (self._width if zero else 1)
            step = step + sync + optimizer
        found: FloatArray = np.where(self._room & (self._width <= microbatches), step, np.inf)
        return found

    def _cut_s(self, size: float) -> float:
        """What a microbatch takes from stage to stage."""
        forward, backward = self._table.cut_bytes(self._boundary, size)
        both = forward, backward if self._table.training else 0.0
        return sum(self._network.seconds(sent) + self._table.message_s * (sent > 0) for sent in both)

    def _half_ring_s(self, num_bytes: FloatArray) -> FloatArray:
        message = num_bytes / self._width
        far = self._network.latency_s + message / self._network.bytes_per_s
        near = self._inside.latency_s + message / self._inside.bytes_per_s
        seconds = np.where(self._is_inside, near, np.maximum(near, far))
        found: FloatArray = (self._width - 1) * (seconds + self._table.sum_s_per_byte * message)
        return found

    def _optimizer_s(self) -> float:
        return sum(c.optimizer_s for c in self._costs[1])

    def _bytes(self, name: str) -> list[float]:
        """Of head, block and tail: bytes of the member with most."""
        members = range(len(self._mode.members))
        return [max(sum(getattr(c, name)[m] for c in own) for m in members) for own in self._costs]


def _summed(costs: Sequence[Sequence[_Row]], table: CostTable) -> list[_Row]:
    """Rows of several units, one each for what each unit has several of; interpolated, sums stay sums."""
    none = (0.0,) * len(table.sizes)
    return [tuple(map(sum, zip(*rows, strict=True))) for rows in zip(*costs, strict=True)] or [none]


def _largest(costs: Sequence[Sequence[_Row]]) -> list[_Row]:
    """The rows of several units that are nowhere below another one."""
    rows = dict.fromkeys(row for own in costs for row in own)
    return [
        row
        for row in rows
        if not any(other != row and all(map(float.__ge__, other, row)) for other in rows)
    ]
