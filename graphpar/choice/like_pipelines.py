"""Plans that people write down by hand, as candidates: like devices in like pipelines, played through.

The search weighs 1F1B and GPipe by a formula that is careful about gradient sums over slow links, and
other schedules are tried on the stages it ends with. Pipelines as equal as the devices allow, of stages
that take as equal times as the units allow, are often as good or better there, and are few. A quick
estimate orders them, the formula prices the first, and the best of those are played through.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise, product

import numpy as np

from graphpar.choice.orders import CHUNKS, interleaved, judged_s
from graphpar.cost import CostTable
from graphpar.errors import VerifyError
from graphpar.partition.bounds import least_bytes
from graphpar.partition.pipeline_price import price
from graphpar.partition.settings import ScheduleWish
from graphpar.partition.types import PipelineChoice, Replica, ScheduleName, StageChoice
from graphpar.schedule.simulated import Simulated, deal_any, has_formula, least_step_s, simulated

_SIZES = (1, 2, 4, 8)
"""Microbatch sizes that are tried."""

_MOST_FORWARDS = 10_000
"""Plans with more forwards of stages take too long to play through."""

_MOST_DEVICES = 64

_SPARED = 2 / 3
"""Of a microbatch's way through the stages, what orders with split backwards need not wait for."""

_MOST_PRICED = 24
"""Plans of either sort priced by the formula, the best by estimate."""

_MOST_PLAYED = 3
"""Plans of either sort played through, the best by the formula."""

Pipelines = tuple[PipelineChoice, ...]
Widths = tuple[int, ...]
"""Replicas of each stage of a pipeline."""


@dataclass
class _Blocks:
    """The units' times on one kind of device, and how they are best cut."""

    devices: tuple[str, ...]
    times: dict[int, list[float]]
    """By microbatch size: seconds of the units for one microbatch, forward and backward."""
    _cuts: dict[Widths, list[int]] = field(default_factory=dict)

    def cuts(self, widths: Widths) -> list[int]:
        """Where stages begin and end."""
        if widths not in self._cuts:
            self._cuts[widths] = even_cuts(self.times[_SIZES[0]], widths)
        return self._cuts[widths]

    def step_s(self, widths: Widths, microbatches: int, size: int) -> float:
        """Without messages, sums and update: the model once, and the longest stage again and again."""
        stages = self._stages_s(widths, size)
        again_s = (own * (-(-microbatches // w) - 1) for own, w in zip(stages, widths, strict=True))
        return math.fsum(stages) + max(again_s)

    def busiest_s(self, widths: Widths, microbatches: int, size: int) -> float:
        """What a replica of the longest stage has to do."""
        stages = zip(self._stages_s(widths, size), widths, strict=True)
        return max(own * -(-microbatches // w) for own, w in stages)

    def _stages_s(self, widths: Widths, size: int) -> list[float]:
        times = self.times[size]
        return [math.fsum(times[a:b]) for a, b in pairwise(self.cuts(widths))]


@dataclass(frozen=True)
class _Like:
    """Like pipelines over all devices of a kind; larger ones have more samples for it."""

    blocks: _Blocks
    widths: tuple[Widths, ...]
    samples: tuple[int, ...]
    size: int

    @cached_property
    def microbatches(self) -> tuple[int, ...]:
        """Of each pipeline."""
        return tuple(max(1, own // self.size) for own in self.samples)

    @property
    def replicated(self) -> bool:
        """Whether any stage has several replicas."""
        return any(width > 1 for own in self.widths for width in own)

    @property
    def forwards(self) -> int:
        """Forwards of all stages in a step."""
        return sum(m * len(own) for m, own in zip(self.microbatches, self.widths, strict=True))

    def estimate_s(self) -> float:
        """The step of the slowest pipeline, as `_Blocks.step_s` has it."""
        unlike = set(zip(self.widths, self.microbatches, strict=True))
        return max(self.blocks.step_s(*one, self.size) for one in unlike)

    def busiest_s(self) -> float:
        """What some replica has to do at least, whatever the order of work."""
        unlike = set(zip(self.widths, self.microbatches, strict=True))
        return max(self.blocks.busiest_s(*one, self.size) for one in unlike)

    def pipelines(self) -> Pipelines:
        """Stages on devices; copies of a stage stand side by side, as near as can be."""
        free = iter(self.blocks.devices)
        places: list[list[tuple[Replica, ...]]] = [[] for _ in self.widths]
        for stage in range(max(map(len, self.widths))):
            for own, widths in zip(places, self.widths, strict=True):
                if stage < len(widths):
                    own.append(tuple(Replica(next(free), 0) for _ in range(widths[stage])))
        return tuple(
            PipelineChoice(
                samples,
                microbatches,
                tuple(
                    StageChoice(a, b, replicas)
                    for (a, b), replicas in zip(pairwise(self.blocks.cuts(widths)), own, strict=True)
                ),
            )
            for samples, microbatches, widths, own in zip(
                self.samples, self.microbatches, self.widths, places, strict=True
            )
        )


def best_like(
    table: CostTable,
    wish: ScheduleWish,
    deadline_s: float,
    *,
    formulas: bool = True,
    cutoff_s: float = math.inf,
) -> Simulated | None:
    """The best plan of like pipelines of one kind of device, as far as there is time, or None.

    Plans are compared by `judged_s`.

    Args:
        table: Seconds and bytes of everything.
        wish: A schedule, or `auto`.
        deadline_s: When nothing new is tried, by `time.monotonic`.
        formulas: Whether schedules with a formula are tried, which the search covers.
        cutoff_s: Only plans that are judged to be shorter are of interest.
    """
    schedules = tuple(s for s in _schedules(wish) if formulas or not has_formula(s))
    if not schedules or not has_likes(table):
        return None
    bests: list[Simulated] = []

    def play(pipelines: Pipelines, orders: Sequence[ScheduleName]) -> None:
        for order in orders:
            least_s = _judged_s(bests[-1]) if bests else cutoff_s
            played = _played(table, pipelines, order, least_s)
            bests.extend([played] if played is not None else [])

    def is_late() -> bool:
        return bool(bests) and time.monotonic() > deadline_s

    for pipelines in _shortest(table, schedules, deadline_s, cutoff_s):
        if not is_late():
            play(pipelines, schedules)
    # Stages dealt out in several rounds wait for less and send more.
    for base, chunks in product([b.partition for b in bests[:-3:-1]], CHUNKS):
        dealt = tuple(interleaved(table, p, chunks) for p in base.pipelines)
        if not is_late() and not has_formula(base.schedule) and dealt != base.pipelines:
            play(dealt, (base.schedule,))
    return bests[-1] if bests else None


def has_likes(table: CostTable) -> bool:
    """Whether there is anything to order: a training step of several microbatches."""
    return table.training and table.max_microbatches > 1 and not table.tail_reason


def _schedules(wish: ScheduleWish) -> tuple[ScheduleName, ...]:
    if wish == "auto":
        return ("zero-bubble", "1f1b")
    return () if wish == "interleaved" else (wish,)


def _shortest(
    table: CostTable, schedules: Sequence[ScheduleName], deadline_s: float, cutoff_s: float
) -> list[Pipelines]:
    """Those that fit with the shortest steps by the formula, as far as there is time to price them.

    The formula may be fonder of replicas than other orders of work are, so both sorts are kept.
    """
    named: ScheduleName = next((s for s in schedules if has_formula(s)), "1f1b")
    priced: dict[bool, list[tuple[float, int, Pipelines]]] = {True: [], False: []}
    likes: list[tuple[float, int, _Like]] = []
    for like in _all_like(table):
        if time.monotonic() > deadline_s:
            return []
        estimate_s = like.estimate_s()
        if any(
            judged_s(estimate_s if has_formula(s) else like.busiest_s(), s) < cutoff_s for s in schedules
        ):
            likes.append((estimate_s, len(likes), like))
    for _, number, like in sorted(likes, key=lambda known: known[:2]):
        if time.monotonic() > deadline_s:
            break
        same = priced[like.replicated]
        if len(same) < _MOST_PRICED:
            pipelines = like.pipelines()
            step_s = _price_s(table, pipelines, named)
            if step_s is not None:
                same.append((step_s, number, pipelines))
    best = sorted(plan for same in priced.values() for plan in sorted(same)[:_MOST_PLAYED])
    return [pipelines for _, _, pipelines in best]


def _all_like(table: CostTable) -> Iterator[_Like]:
    """Those of each kind of device for which there are samples, and memory for the weights."""
    units = range(table.num_units)
    for kind, own in enumerate(table.device_classes):
        times = {
            size: [table.forward_s(u, kind, size) + table.backward_s(u, kind, size) for u in units]
            for size in _SIZES
        }
        blocks = _Blocks(own.devices, times)
        fewest = math.ceil(least_bytes(table) / max(own.memory_bytes - table.reserved_bytes, 1.0))
        most = min(len(own.devices), _MOST_DEVICES, table.max_replicas, table.batch)
        for widths in _forms(len(own.devices), most):
            if not fewest <= min(map(len, widths)) <= max(map(len, widths)) <= table.num_units:
                continue
            samples = tuple(shares(table.batch, [sum(w) for w in widths]))
            for size in _SIZES:
                like = _Like(blocks, widths, samples, size)
                enough = all(max(w) <= m for w, m in zip(widths, like.microbatches, strict=True))
                if size <= max(samples) and enough and like.forwards <= _MOST_FORWARDS:
                    yield like


def _forms(devices: int, most: int) -> Iterator[tuple[Widths, ...]]:
    """Pipelines as alike as can be over so many devices, with at most so many replicas of any stage.

    >>> list(_forms(3, 3))
    [((1, 1, 1),), ((1, 2),), ((2, 1),), ((3,),), ((1, 1), (1,)), ((1,), (1,), (1,))]
    """
    for copies in range(1, most + 1):
        fewest, more = divmod(devices, copies)
        for width in range(1, min(fewest, most // copies) + 1):
            ends = _ends(fewest, width)
            for first, last in ends if not more else [(0, 0)] * (width == 1):
                numbers = [(fewest + (i < more) - first - last) // width for i in range(copies)]
                yield tuple((first,) * (first > 0) + (width,) * n + (last,) * (last > 0) for n in numbers)


def _ends(devices: int, width: int) -> list[tuple[int, int]]:
    """How devices that do not make a whole stage are put before and behind the others."""
    whole, rest = divmod(devices, width)
    if not rest:
        return [(0, 0)]
    ends = [(rest, 0), (0, rest), (rest - rest // 2, rest // 2)]
    if whole > 1:
        more = rest + width
        ends.append((more - more // 2, more // 2))
    return list(dict.fromkeys(ends))


def shares(batch: int, weights: Sequence[int]) -> list[int]:
    """The batch in proportion to weights, in whole samples and at least one each.

    >>> shares(16, [3, 3, 2]), shares(3, [5, 1, 1])
    ([6, 6, 4], [1, 1, 1])
    """
    left, rest, shares = batch, sum(weights), []
    for number, weight in enumerate(weights):
        others = len(weights) - number - 1
        shares.append(min(max(round(left * weight / rest), 1), left - others))
        left, rest = left - shares[-1], rest - weight
    return shares


def even_cuts(times: Sequence[float], widths: Sequence[int]) -> list[int]:
    """Where to cut units into stages of so many replicas so that the busiest replica has least to do.

    Of several ways the one with the shortest stages in front, which hold the most in memory.

    >>> even_cuts([1.0, 1.0, 1.0, 1.0, 3.0], [1, 1, 1]), even_cuts([1.0, 3.0, 1.0, 1.0], [2, 1, 1])
    ([0, 1, 4, 5], [0, 2, 3, 4])
    """
    done = np.array([0.0, *accumulate(times)])
    # [from, to]: a stage has a unit at least.
    stage_s = np.where(np.tri(len(done), dtype=bool), np.inf, done - done[:, None])
    least_s = np.where(done < done[-1], np.inf, 0.0)
    ends = []
    for width in reversed(widths):
        busiest_s = np.maximum(stage_s / width, least_s)
        ends.append(busiest_s.argmin(axis=1))
        least_s = busiest_s.min(axis=1)
    cuts = [0]
    for end in reversed(ends):
        cuts.append(int(end[cuts[-1]]))
    return cuts


def _price_s(table: CostTable, pipelines: Pipelines, schedule: ScheduleName) -> float | None:
    """The step by 1F1B's formula, without most of its bubble; None where the plan does not fit."""
    try:
        dealt = tuple(deal_any(table, p, schedule) for p in pipelines)
        cost = price(table, dealt, schedule)
    except (ValueError, VerifyError):
        return None
    capacity = table.device_classes
    fits = all(peak <= capacity[table.class_of[d]].memory_bytes for d, peak in cost.peak_bytes.items())
    return cost.objective_s - _SPARED * cost.parts["fill_compute_s"] if fits else None


def _played(
    table: CostTable, pipelines: Pipelines, schedule: ScheduleName, cutoff_s: float
) -> Simulated | None:
    """The plan as it is played through; None where it does not fit, or is not judged to be shorter."""
    try:
        dealt = tuple(deal_any(table, p, schedule) for p in pipelines)
        if judged_s(least_step_s(table, dealt), schedule) >= cutoff_s:
            return None
        played = simulated(table, dealt, schedule)
    except (ValueError, VerifyError):
        return None
    return played if _judged_s(played) < cutoff_s and played.fits(table) else None


def _judged_s(played: Simulated) -> float:
    return judged_s(played.step_s, played.partition.schedule)
