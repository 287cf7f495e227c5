"""Time a plan's stages on this machine as they will run: at their sizes, in their formats, with pauses.

Planning prices a stage as the sum of its units, at any size. What is chosen in the end is one cut, one
microbatch size and one device for every stage, and that can be tried as it is: a worker that holds the
whole model passes through the plan's own stages, and waits after each as the stage's device will. What a
pause costs depends on what a stage reads again after it, hence on cut and size.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from statistics import median

import msgspec

from graphpar.cost_models.measured import StageSeconds, StageTiming
from graphpar.errors import GraphparError
from graphpar.local.kept import TOO_LONG, NotTimedError, kept_or_fresh
from graphpar.local.trial_worker import MOST_TWINS, TrialModel, TrialWorker
from graphpar.neighbours import reference_s
from graphpar.partition.types import Partition, PipelineChoice, Replica, StageChoice
from graphpar.plans.plan import hash_of
from graphpar.runtime.passes import Spent
from graphpar.schedule.timing import RankTiming, SizeTiming, Timing

_log = logging.getLogger("graphpar.schedule.timing")

ROUNDS = 4
"""Passes that are counted at most, after one that warms up."""

LEAST_ROUNDS = 2
"""As few where they agree, or the budget is not enough for more; with less a stage keeps its price."""

SETTLING = 4
"""Passes without pauses before, at most: the first of a fresh process are slower."""

AGREES = 0.01
"""Two passes in a row that differ by less need no third one."""

UNLIKE = 0.1
"""Of two passes alone that differ by more one was disturbed, and a third one tells which."""

IN_FLIGHT = 2
"""Microbatches that go forward before the first goes back, where a replica has as many."""

_RESTS_S = 0.1
"""Updates are timed after so long a wait, when what they read has left the caches."""


def timed_stages(
    model: TrialModel,
    model_hash: str,
    found: Partition,
    timing: Timing,
    slowdowns: Mapping[str, float],
    budget_s: float,
) -> StageTiming:
    """What is kept of these stages, as long as the machine is as fast as it was then; else timed anew.

    Raises:
        NotTimedError: None of them was tried.
    """
    pipelines = [msgspec.to_builtins(pipeline) for pipeline in found.pipelines]
    asked = [*model.key(model_hash), pipelines, sorted(slowdowns.items()), budget_s, _VERSION]
    return kept_or_fresh(
        model.threads,
        hash_of(asked),
        StageTiming,
        lambda: time_stages(model, found, timing, slowdowns, budget_s),
    )


_VERSION = 10
"""Of what is timed and how; what was kept of another one is timed anew."""


def time_stages(
    model: TrialModel, found: Partition, timing: Timing, slowdowns: Mapping[str, float], budget_s: float
) -> StageTiming:
    """Run the stages of a plan one after another in one worker.

    Args:
        model: Runs the model.
        found: The plan's pipelines.
        timing: What is predicted, which says what a trial will take.
        slowdowns: Of every device that is a worker on this machine.
        budget_s: What may be spent on a pipeline.

    Raises:
        NotTimedError: That fails, or takes too long for every pipeline that runs here as a whole.
    """
    possible = [t for k in range(len(found.pipelines)) for t in _trials(found, k, slowdowns)]
    short = [t for t in possible if t.costs_s(timing, LEAST_ROUNDS) <= budget_s]
    trials = _alike(short)
    if not possible:
        raise NotTimedError("every pipeline has stages that run elsewhere")
    if not trials:
        raise NotTimedError(TOO_LONG.format(budget_s))
    try:
        with model.worker([alike[0].alone for alike in trials]) as worker:
            speed_s = reference_s()
            size = max(alike[0].size for alike in trials)
            used = [slowdowns[device] for device in found.used_devices if device in slowdowns]
            twins = sorted(used)[1 : 1 + MOST_TWINS]
            with model.twins(twins, size):
                rows = [
                    row
                    for number, alike in enumerate(trials)
                    for row in _run(alike, worker, number, alike[0].rounds(timing, budget_s))
                ]
            several = len(found.used_devices) > 1
            waits = several or any(slowdown > 1 for slowdown in used)
            longer = _rested(model, worker, size, several) if waits and model.train is not None else 1.0
            return StageTiming(
                tuple(rows),
                longer,
                speed_s,
                threads=model.threads,
                beside=model.threads * sum(1 / slowdown for slowdown in twins),
                update_beside=model.threads if several else 0.0,
                left_out="" if len(short) == len(possible) else TOO_LONG.format(budget_s),
            )
    except GraphparError as error:
        _log.warning("The plan's stages could not be timed, so that units stand for them: %s", error)
        raise NotTimedError("timing them failed") from error


def retimed(
    timing: Timing, found: Partition, measured: StageTiming, slowdowns: Mapping[str, float]
) -> Timing:
    """The timing with what was measured of stages in place of what their units add up to.

    Other microbatch sizes, and halves of backwards, keep their proportions to the size that was timed.
    The timing's seconds are those of workers that have the cores to themselves: the simulator adds what
    others cost each action. So that is taken off what was measured beside others.
    """
    alone = measured.as_alone(timing.shared)
    ranks = tuple(
        _retimed_rank(rank, _first_stage(found, rank.device), alone, slowdowns[rank.device])
        if rank.device in slowdowns
        else rank
        for rank in timing.ranks
    )
    return replace(timing, ranks=ranks)


def _retimed_rank(
    rank: RankTiming, first_stage: int, measured: StageTiming, slowdown: float
) -> RankTiming:
    sizes = []
    for row in rank.sizes:
        stage = first_stage if row.stage is None else row.stage
        seconds = measured.of(stage, slowdown)
        timed = None if seconds is None else rank.at_size(seconds.size, row.stage)
        sizes.append(row if seconds is None or timed is None else _scaled(row, timed, seconds))
    return replace(rank, sizes=tuple(sizes), optimizer_s=rank.optimizer_s * measured.update)


def _first_stage(found: Partition, device: str) -> int:
    """The number of a device's first stage among those of all pipelines."""
    stages = [stage for pipeline in found.pipelines for stage in pipeline.stages]
    return next(k for k, stage in enumerate(stages) if any(device in r.devices for r in stage.replicas))


def _scaled(row: SizeTiming, timed: SizeTiming, seconds: StageSeconds) -> SizeTiming:
    """A row times what was measured over what was predicted at the size that was timed."""
    ahead = seconds.forward_s * seconds.slowdown / timed.forward_s if timed.forward_s > 0 else 1.0
    back = seconds.backward_s * seconds.slowdown / timed.backward_s if timed.backward_s > 0 else 1.0
    return replace(
        row,
        forward_s=row.forward_s * ahead,
        backward_s=row.backward_s * back,
        weight_s=row.weight_s * back,
        split_s=row.split_s * back,
    )


@dataclass(frozen=True)
class _Stage:
    """A stage in a trial: its number in the plan, the device it is tried for, whether that counts."""

    number: int
    device: str
    slowdown: float
    counts: bool


@dataclass(frozen=True)
class _Trial:
    """One pipeline to be passed through, each stage as on one of its devices.

    Attributes:
        alone: The pipeline's stages, one after another on one device.
        stages: The same, with their devices in the plan.
        size: Samples of a microbatch.
        microbatches: How many of them a replica has in a step.
    """

    alone: Partition
    stages: tuple[_Stage, ...]
    size: int
    microbatches: int

    @property
    def in_flight(self) -> int:
        """Microbatches that go forward before the first goes back."""
        return min(self.microbatches, IN_FLIGHT)

    def rounds(self, timing: Timing, budget_s: float) -> int:
        """How many passes are counted."""
        return ROUNDS if self.costs_s(timing, ROUNDS) <= budget_s else LEAST_ROUNDS

    def costs_s(self, timing: Timing, rounds: int) -> float:
        """Seconds that all passes will take, by what was predicted."""
        by_device, total_s = {rank.device: rank for rank in timing.ranks}, 0.0
        for stage in self.stages:
            row = by_device[stage.device].at_size(self.size, stage.number)
            total_s += (row.forward_s + row.backward_s) * (1 + rounds + SETTLING / stage.slowdown)
        return self.in_flight * total_s

    @property
    def key(self) -> Hashable:
        """The same for trials that do the same."""
        stages = [(cut.first, cut.last, cut.formats) for cut in self.alone.pipelines[0].stages]
        return (*stages, *(s.slowdown for s in self.stages), self.size, self.microbatches)

    def seconds(self, worker: TrialWorker, number: int, rounds: int) -> list[tuple[float, float]]:
        """Pass through the stages, as the `number`-th partition that the worker was given.

        Forward and backward seconds of every stage.
        """
        slowdowns = [stage.slowdown for stage in self.stages]

        def once(slowdowns: Sequence[float]) -> tuple[Spent, Spent]:
            return worker.by_stage(number, self.size, slowdowns, self.in_flight)

        until_alike(lambda: once([1.0] * len(slowdowns)), 2, SETTLING)
        once(slowdowns)
        passes = until_alike(lambda: once(slowdowns), LEAST_ROUNDS, rounds)
        return [(self._mean_s(passes, k, 0), self._mean_s(passes, k, 1)) for k in range(len(slowdowns))]

    def _mean_s(self, passes: Sequence[tuple[Spent, Spent]], stage: int, direction: int) -> float:
        """Over a step's microbatches: the first comes after something else, and makes the gradients."""
        first_s, later_s = (median(p[turn][stage][direction] for p in passes) for turn in (0, 1))
        return (first_s + (self.microbatches - 1) * later_s) / self.microbatches


def until_alike(
    once: Callable[[], tuple[Spent, Spent]], least: int, most: int
) -> list[tuple[Spent, Spent]]:
    """Passes until the last two take the same, or as many as there may be.

    Where there may be two, and they are unlike, a third one is made: without it half of what disturbed
    one of them would be in the result.

    >>> times = iter([2.0, 1.2, 1.0, 1.001, 1.0])
    >>> len(until_alike(lambda: ([(next(times), 0.0)], [(1.0, 1.0)]), 2, 5))
    4
    >>> times = iter([1.0, 1.5, 1.0, 2.0])
    >>> len(until_alike(lambda: ([(next(times), 0.0)], [(0.0, 0.0)]), 2, 2))
    3
    """
    passes: list[tuple[Spent, Spent]] = []
    totals_s: list[float] = []
    while len(passes) < most:
        passes.append(once())
        totals_s.append(sum(sum(map(sum, spent)) for spent in passes[-1]))
        if len(passes) >= least and abs(totals_s[-1] - totals_s[-2]) <= AGREES * totals_s[-1]:
            break
    if len(passes) == 2 and abs(totals_s[1] - totals_s[0]) > UNLIKE * min(totals_s):
        passes.append(once())
    return passes


def _alike(trials: Iterable[_Trial]) -> list[list[_Trial]]:
    """Trials that do the same together, as pipelines side by side often do."""
    found: dict[Hashable, list[_Trial]] = {}
    for trial in trials:
        found.setdefault(trial.key, []).append(trial)
    return list(found.values())


def _run(
    alike: Sequence[_Trial], worker: TrialWorker, number: int, rounds: int
) -> Iterator[StageSeconds]:
    """What stages of trials that do the same take, measured once."""
    seconds = alike[0].seconds(worker, number, rounds)
    for trial in alike:
        for stage, (forward_s, backward_s) in zip(trial.stages, seconds, strict=True):
            if stage.counts:
                yield StageSeconds(stage.number, stage.slowdown, trial.size, forward_s, backward_s)


def _trials(found: Partition, number: int, slowdowns: Mapping[str, float]) -> list[_Trial]:
    """Trials of a pipeline: as many as a stage has replicas with unlike slowdowns.

    None of one with a stage that nobody runs on this machine.
    """
    pipeline = found.pipelines[number]
    first_stage = sum(len(p.stages) for p in found.pipelines[:number])
    kinds = [_kinds(stage, slowdowns) for stage in pipeline.stages]
    if not all(kinds):
        return []
    replicas = max(len(stage.replicas) for stage in pipeline.stages)
    alone = replace(
        found, pipelines=(_on_one_device(pipeline, _batch(found)),), schedule="gpipe", shardings=()
    )
    return [
        _Trial(
            alone=alone,
            stages=tuple(
                _Stage(
                    first_stage + k,
                    *mine[min(turn, len(mine) - 1)],
                    counts=turn < len(mine) and _passes_through(stage),
                )
                for k, (stage, mine) in enumerate(zip(pipeline.stages, kinds, strict=True))
            ),
            size=max(pipeline.sizes()),
            microbatches=max(pipeline.microbatches // replicas, 1),
        )
        for turn in range(max(map(len, kinds)))
    ]


def _kinds(stage: StageChoice, slowdowns: Mapping[str, float]) -> list[tuple[str, float]]:
    """One device here for each slowdown among a stage's replicas."""
    found: dict[float, str] = {}
    for replica in stage.replicas:
        if replica.device in slowdowns:
            found.setdefault(slowdowns[replica.device], replica.device)
    return [(device, slowdown) for slowdown, device in sorted(found.items())]


def _passes_through(stage: StageChoice) -> bool:
    """Whether a microbatch costs a stage what a pass costs it, and no messages or second forward."""
    return not stage.recompute and stage.zero < 2 and not any(r.others for r in stage.replicas)


def _on_one_device(pipeline: PipelineChoice, batch: int) -> PipelineChoice:
    stages = tuple(
        replace(stage, replicas=(Replica(f"local/{k}", 1),), recompute=False, zero=0)
        for k, stage in enumerate(pipeline.stages)
    )
    return replace(pipeline, samples=batch, microbatches=1, stages=stages)


def _batch(found: Partition) -> int:
    return sum(pipeline.samples for pipeline in found.pipelines)


def _rested(model: TrialModel, worker: TrialWorker, size: int, several: bool) -> float:
    """How many times longer an update takes after a wait, beside another one if there are several.

    Updates right after a pass and rested ones are taken in turn.
    """
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(1) as pool:
        twin = stack.enter_context(model.worker()) if several else None
        ratios = []
        for _ in range(1 + ROUNDS):
            worker.whole(size)
            at_once_s = worker.update()
            worker.whole(size)
            if twin is not None:
                twin.whole(size)
            time.sleep(_RESTS_S)
            beside = pool.submit(twin.update) if twin is not None else None
            ratios.append(worker.update() / max(at_once_s, 1e-9))
            if beside is not None:
                beside.result()
    return max(median(ratios[1:]), 1.0)
