"""Which schedule a plan gets: 1F1B and GPipe by formula, interleaved and zero-bubble lists by simulation.

The partitioner searches partitions for 1F1B and GPipe, whose step is a formula, and proves a bound. Here
the stages it found, and those of simple splits, are tried under the other schedules: backwards in two
halves, every device with two to four stages, or both, and with neighbouring microbatch counts. Each try
is played through as it would run; those that do not fit into memory are out. On few devices the best is
then changed in one thing at a time (`near_plans`) while that helps. What is chosen is the shortest
simulated step, where it is shorter by more than `LEAST_GAIN`.

A simulated schedule is outside the family that the bound of the search covers, so the certificate of a
plan that uses one is the bound that no plan of any kind can beat.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, pairwise

from graphpar.choice.near_plans import as_replicas, near_plans
from graphpar.cost import CostTable
from graphpar.errors import InfeasibleError, VerifyError
from graphpar.partition.gradient_sums import modes_of
from graphpar.partition.handmade import Tried, even_split, greedy_split
from graphpar.partition.settings import Microbatches, ScheduleWish, microbatch_counts
from graphpar.partition.types import (
    ROUNDING,
    Partition,
    PipelineChoice,
    ScheduleName,
    StageChoice,
    StagePace,
)
from graphpar.schedule.simulated import (
    Simulated,
    certified,
    deal_any,
    has_formula,
    least_step_s,
    simulated,
    stage_paces,
)
from graphpar.units import format_percent, format_seconds

LEAST_GAIN = 0.10
"""A schedule without a formula must be this much shorter: it costs the certificate of the search, and
ran up to 9 % longer than simulated where it was measured (docs/schedules.md)."""

CHUNKS = (2, 3, 4)
"""Stages per device that are tried."""

MOST_ACTIONS = 40_000
"""Forwards of all stages in one try; larger plans keep the schedule they were searched for."""

_MOST_DEVICES = 32
"""Simple splits are tried besides on clusters up to this size."""

_MOST_CHANGED = 8
"""Plans of up to so many devices are changed in one thing at a time, ..."""

_MOST_CHANGES = 80
"""... and so many of those that may be shorter are played through."""


def judged_s(step_s: float, schedule: ScheduleName) -> float:
    """A step as it is compared with others: without a formula it has to be that much shorter.

    >>> judged_s(9.0, "1f1b"), judged_s(9.0, "zero-bubble")
    (9.0, 10.0)
    """
    return step_s if has_formula(schedule) else step_s / (1 - LEAST_GAIN)


class UnavailableScheduleError(ValueError):
    """The schedule asked for cannot be had on these devices; the text says why."""


@dataclass(frozen=True)
class _Try:
    """A way to run pipelines, in words for people."""

    words: str
    schedule: ScheduleName
    pipelines: tuple[PipelineChoice, ...]
    paces: tuple[StagePace, ...] | None = None


def choose_schedule(
    table: CostTable,
    found: Partition,
    wish: ScheduleWish = "auto",
    microbatches: Microbatches = "auto",
    *,
    time_limit_s: float = 5.0,
    cutoff_s: float = math.inf,
) -> Partition:
    """The partition under the schedule that makes its step shortest, or under the one asked for.

    Args:
        table: What the partition was made for.
        found: What the search found for 1F1B or GPipe.
        wish: A schedule, or `auto`.
        microbatches: The number that was fixed, if any.
        time_limit_s: Seconds after which nothing new is tried; the notes then say so.
        cutoff_s: Ways that cannot be shorter than this are not played through.

    Raises:
        UnavailableScheduleError: The schedule asked for cannot be had on these devices; says why.
        InfeasibleError: It does not fit into memory in any way that was tried.
    """
    named = wish not in ("auto", "gpipe", "1f1b")
    why_not = _why_not(table, found, wish)
    if why_not:
        if named:
            raise UnavailableScheduleError(why_not)
        return found
    choice = _Choice(table, found, wish, microbatches, time.monotonic() + time_limit_s, cutoff_s)
    choice.work()
    return choice.answer(named)


def _why_not(table: CostTable, found: Partition, wish: ScheduleWish) -> str:
    """Why no other schedule is tried; empty where some are."""
    if wish in ("gpipe", "1f1b"):
        return f"{wish} was asked for"
    if not table.training:
        return "there is no backward in inference"
    if table.tail_reason:
        return f"{table.tail_reason}, so that all forwards have to come before the first backward"
    if table.max_microbatches == 1:
        reason = table.batch_reason or table.in_step_reason or "one sample"
        return f"each pipeline has one microbatch ({reason})"
    if len(table.class_of) == 1:
        return "one device has no stages to wait for"
    if max((p.microbatches for p in found.pipelines), default=1) * len(found.used_devices) > MOST_ACTIONS:
        return "the plan is too large to be played through often"
    return ""


class _Choice:
    """One choice in the making."""

    def __init__(
        self,
        table: CostTable,
        found: Partition,
        wish: ScheduleWish,
        microbatches: Microbatches,
        deadline_s: float,
        cutoff_s: float,
    ) -> None:
        self.table, self.found, self.wish = table, found, wish
        self.microbatches, self.deadline_s, self.cutoff_s = microbatches, deadline_s, cutoff_s
        self.base_s = simulated(table, found.pipelines, found.schedule).step_s
        self.best: Simulated | None = None
        self.shortest: dict[str, Simulated] = {}
        self.tight: dict[str, Simulated] = {}
        self.out: dict[str, str] = {}
        self.changes = 0
        self.unplayed = False
        self.late = False

    def work(self) -> None:
        """Try all ways on the stages found, the best two on others, then other microbatch counts."""
        for number, base in enumerate(self._bases()):
            promising = {words for words, _ in self._in_order()[:2]}
            for attempt in self._tries(base):
                if self._is_late():
                    return
                if number == 0 or attempt.words in promising:
                    self._play(attempt)
        self._ungroup(self.found)
        self._other_counts()
        self._change()
        if self.best is not None and self.changes:
            self._ungroup(self.best.partition)
            self._change()

    def _is_late(self) -> bool:
        self.late = self.late or time.monotonic() > self.deadline_s
        return self.late

    def _bases(self) -> Iterator[Partition]:
        """Plans with stages that wait for each other: what was found, runners-up, simple splits."""
        at_hand = [base for base in (self.found, *self.found.runners_up) if _is_deep(base)]
        yield from at_hand or filter(_is_deep, self._splits())

    def _splits(self) -> Iterator[Partition]:
        if len(self.table.class_of) > _MOST_DEVICES:
            return
        for make in (greedy_split, even_split):
            try:
                yield make(self.table, Tried("1f1b", self.microbatches))
            except (InfeasibleError, ValueError):
                continue

    def _tries(self, base: Partition) -> Iterator[_Try]:
        if any(stage.zero > 1 for pipeline in base.pipelines for stage in pipeline.stages):
            self.out.setdefault("zero-bubble and interleaved", "not where gradients are divided (ZeRO 2)")
            return
        names = [n for n in ("zero-bubble", "interleaved") if self.wish in ("auto", n)]
        if "zero-bubble" in names:
            yield _Try("zero-bubble", "zero-bubble", base.pipelines)
            yield _Try("zero-bubble", "zero-bubble", base.pipelines, self._frugal(base.pipelines))
        for chunks in CHUNKS:
            pipelines = tuple(interleaved(self.table, p, chunks) for p in base.pipelines)
            if pipelines == base.pipelines:
                continue
            if "interleaved" in names:
                yield _Try(f"interleaved, {chunks} stages each", "interleaved", pipelines)
            if "zero-bubble" in names:
                yield _Try(f"zero-bubble, {chunks} stages each", "zero-bubble", pipelines)

    def _frugal(self, pipelines: tuple[PipelineChoice, ...]) -> tuple[StagePace, ...]:
        """Paces that keep no more microbatches in any device than 1F1B does."""
        paces = iter(stage_paces(self.table, pipelines))
        return tuple(
            replace(
                next(paces), held=-(-sum(len(s.replicas) for s in p.stages[i:]) // len(stage.replicas))
            )
            for p in pipelines
            for i, stage in enumerate(p.stages)
        )

    def _play(self, attempt: _Try) -> bool:
        """Simulate a try; whether it is the best so far."""
        forwards = sum(p.microbatches * len(p.stages) for p in attempt.pipelines)
        if forwards > MOST_ACTIONS:
            self.out.setdefault(attempt.words, "too long to be played through")
            return False
        try:
            dealt = tuple(deal_any(self.table, p, attempt.schedule) for p in attempt.pipelines)
            if least_step_s(self.table, dealt) >= self.cutoff_s:
                return False
            played = simulated(self.table, dealt, attempt.schedule, attempt.paces)
        except (ValueError, VerifyError):
            self.out.setdefault(attempt.words, "some replica would have no work or no price")
            return False
        if not played.fits(self.table):
            self.out[attempt.words] = f"{format_seconds(played.step_s)}, but does not fit into memory"
            known = self.tight.get(attempt.words)
            if known is None or _excess(self.table, played) < _excess(self.table, known):
                self.tight[attempt.words] = played
            return False
        known = self.shortest.get(attempt.words)
        # By the same measure as below: the best is always among the shortest.
        if known is None or played.step_s < known.step_s * (1 - ROUNDING):
            self.shortest[attempt.words] = played
        if self.best is None or played.step_s < self.best.step_s * (1 - ROUNDING):
            self.best = played
            return True
        return False

    def _other_counts(self) -> None:
        """Walk from the best to neighbouring microbatch counts as long as that helps."""
        if self.best is None or self.microbatches != "auto":
            return
        for direction in (-1, 1):
            while not self._is_late() and self._step_to(direction):
                pass

    def _ungroup(self, base: Partition) -> None:
        """Try all ways on the members of a plan's tensor groups."""
        for pipelines in as_replicas(self.table, base.pipelines):
            for attempt in self._tries(replace(base, pipelines=pipelines)):
                if self._is_late():
                    return
                self._play(attempt)

    def _change(self) -> None:
        """Change the best in one thing at a time as long as that helps."""
        if len(self.table.class_of) > _MOST_CHANGED:
            return
        before: Simulated | None = None
        for words in sorted(self.tight, key=lambda words: self.tight[words].step_s):
            # What does not fit is changed to what exceeds memory less.
            while (played := self.tight[words]) is not before:
                before = played
                self._changed(words, played.partition)
        while self.best is not None and self.best is not before:
            before, best = self.best, self.best.partition
            self._changed(next(w for w, p in self.shortest.items() if p.partition is best), best)

    def _changed(self, words: str, base: Partition) -> None:
        """Play plans that are near another one until one of them is the best."""
        for pipelines in near_plans(self.table, base.pipelines):
            if self._is_late():
                return
            if any(s.zero > 1 for p in pipelines for s in p.stages):
                continue
            try:
                dealt = tuple(deal_any(self.table, p, base.schedule) for p in pipelines)
            except ValueError:
                continue
            least_s = self.best.step_s if self.best is not None else math.inf
            if least_step_s(self.table, dealt) >= least_s:
                continue
            if self.changes >= _MOST_CHANGES:
                self.unplayed = True
                return
            self.changes += 1
            if self._play(_Try(words, base.schedule, pipelines)):
                return

    def _step_to(self, direction: int) -> bool:
        assert self.best is not None
        best = self.best.partition
        words = next(w for w, played in self.shortest.items() if played.partition is best)
        moved = []
        for pipeline in best.pipelines:
            counts = microbatch_counts(self.table, pipeline.samples, "auto")
            beyond = [n for n in counts if (n - pipeline.microbatches) * direction > 0]
            if not beyond:
                return False
            moved.append(replace(pipeline, microbatches=min(beyond) if direction > 0 else max(beyond)))
        return self._play(_Try(words, best.schedule, tuple(moved)))

    def answer(self, named: bool) -> Partition:
        """The plan as it was found, or under another schedule, with what the others would take."""
        if self.best is None and named:
            self._nothing()
        wins = self.best is not None and (named or _judged_s(self.best) < self.base_s)
        if self.best is None or not wins:
            return replace(self.found, notes=(*self.found.notes, *self._notes(self.found.schedule)))
        others = [p.partition for _, p in self._in_order() if p is not self.best]
        base = replace(self.found, runners_up=())
        best = certified(self.table, self.best.partition)
        return replace(
            best,
            status="optimal" if best.gap <= ROUNDING else "feasible",
            seconds=self.found.seconds,
            truncated_by=(
                *self.found.truncated_by,
                "schedule: no bound is known but that on plans of any kind",
            ),
            family=f"plans of any kind, any order of work; the stages come from: {self.found.family}",
            notes=(*but_left_out(self.found.notes, best, self.found), *self._notes(best.schedule)),
            runners_up=(base, *(certified(self.table, p) for p in others[:2])),
            num_programs=self.found.num_programs,
            num_variables=self.found.num_variables,
        )

    def _notes(self, chosen: str) -> Iterator[str]:
        told = [f"{self.found.schedule} {format_seconds(self.base_s)}"]
        told += [f"{words} {format_seconds(played.step_s)}" for words, played in self._in_order()]
        told += [f"{words} {why}" for words, why in self.out.items() if words not in self.shortest]
        if len(told) > 1:
            yield f"schedules, simulated: {'; '.join(told)}"
        if chosen != self.found.schedule:
            took, gap = format_seconds(self.found.objective_s), format_percent(self.found.gap)
            yield (
                f"the search itself ended with {self.found.schedule}: {took} by its formula, proven "
                f"within {gap} of the best of its family"
            )
        elif self.best is not None and self.best.step_s < self.base_s:
            other, took = self.best.partition.schedule, format_seconds(self.best.step_s)
            yield (
                f"{chosen} was kept: {other} takes {took} instead of {format_seconds(self.base_s)}, but "
                "the bound of the search covers no other order, so that one must be "
                f"{100 * LEAST_GAIN:.0f} % shorter; schedule={other} takes it as it is"
            )
        if self.late:
            yield "schedules: not all were tried for lack of time"
        if self.unplayed:
            yield f"schedules: of plans that differ in one thing only {self.changes} were played through"

    def _in_order(self) -> list[tuple[str, Simulated]]:
        return sorted(self.shortest.items(), key=lambda item: item[1].step_s)

    def _nothing(self) -> None:
        if not self.tight:
            raise UnavailableScheduleError(
                "no split of the model that was tried gives several stages and several microbatches"
            )
        needs = min(self.tight.values(), key=partial(_excess, self.table)).needs(self.table)
        device = max(needs, key=lambda d: needs[d][0] - needs[d][1])
        need, have = needs[device]
        raise InfeasibleError(
            f"schedule={self.wish!r} does not fit: {device} would need {need:.3g} bytes of {have:.3g}. "
            "Use smaller microbatches, or schedule='auto'.",
            limit="memory",
            need=need,
            have=have,
        )


def _judged_s(played: Simulated) -> float:
    return judged_s(played.step_s, played.partition.schedule)


def _is_deep(plan: Partition) -> bool:
    """Whether any stage waits for another more than once."""
    return any(len(p.stages) > 1 and p.microbatches > 1 for p in plan.pipelines)


def but_left_out(notes: Sequence[str], best: Partition, found: Partition) -> Iterator[str]:
    """What was said of the plan that was found, as far as it holds for another one."""
    same = set(best.used_devices) == set(found.used_devices)
    yield from (note for note in notes if same or not note.startswith("left out"))


def _excess(table: CostTable, played: Simulated) -> float:
    return max(need - have for need, have in played.needs(table).values())


def interleaved(table: CostTable, pipeline: PipelineChoice, chunks: int) -> PipelineChoice:
    """The pipeline with `chunks` stages for each that it has, dealt to the same devices in turn.

    The units are dealt so that every device keeps about the time per microbatch that it had, a share of
    it in each round. A pipeline of one stage, of tensor groups, of too few units, or interleaved already
    stays as it is.
    """
    stages = pipeline.stages
    devices = [d for s in stages for r in s.replicas for d in r.devices]
    groups = any(r.others for s in stages for r in s.replicas)
    if len(stages) < 2 or groups or len(devices) != len(set(devices)):
        return pipeline
    if table.num_units < chunks * len(stages):
        return pipeline
    size = pipeline.samples / pipeline.microbatches
    times = [_unit_times_s(table, stage, size) for stage in stages]
    wanted = [sum(row[s.first : s.last]) / chunks for row, s in zip(times, stages, strict=True)]
    cuts = _smoothed(times, _dealt_cuts(times, wanted, chunks))
    made = [
        replace(stages[k % len(stages)], first=first, last=last)
        for k, (first, last) in enumerate(pairwise(cuts))
    ]
    return replace(pipeline, stages=tuple(made))


def _unit_times_s(table: CostTable, stage: StageChoice, size: float) -> list[float]:
    """What each unit of the chain would take on the stage's slowest replica."""
    modes = set(modes_of(table, stage))
    return [
        max(table.forward_s(u, m, size) + table.backward_s(u, m, size) for m in modes)
        for u in range(table.num_units)
    ]


def _dealt_cuts(times: Sequence[Sequence[float]], wanted: Sequence[float], chunks: int) -> list[int]:
    """Give out units from the front, each stage up to what is wanted of its device."""
    number, units = len(wanted) * chunks, len(times[0])
    cuts = [0]
    for k in range(number - 1):
        device = k % len(wanted)
        at, most = cuts[-1] + 1, units - (number - k - 1)
        load = times[device][cuts[-1]]
        while at < most and load + times[device][at] / 2 <= wanted[device]:
            load += times[device][at]
            at += 1
        cuts.append(at)
    return [*cuts, units]


def _smoothed(times: Sequence[Sequence[float]], cuts: list[int]) -> list[int]:
    """Move one cut, or two, by a unit as long as the busiest device gets less."""
    sums = [[0.0, *accumulate(row)] for row in times]

    def loads(at: Sequence[int]) -> list[float]:
        found = [0.0] * len(times)
        for k, (first, last) in enumerate(pairwise(at)):
            found[k % len(times)] += sums[k % len(times)][last] - sums[k % len(times)][first]
        return sorted(found, reverse=True)

    best = loads(cuts)
    for _ in range(4 * len(cuts)):
        moves = [
            [*cuts[:a], cuts[a] + x, *cuts[a + 1 : b], *([cuts[b] + y] if b > a else []), *cuts[b + 1 :]]
            for a in range(1, len(cuts) - 1)
            for b in range(a, min(a + len(times) + 1, len(cuts) - 1))
            for x in (-1, 1)
            for y in ((-1, 1) if b > a else (0,))
        ]
        legal = [m for m in moves if all(p < q for p, q in pairwise(m))]
        tried = min(((loads(m), m) for m in legal), default=(best, cuts))
        if tried[0] >= best:
            return cuts
        best, cuts = tried
    return cuts
