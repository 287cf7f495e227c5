"""From a partition to a plan: schedule it, predict it, and write down all of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from graphpar.cost import CostTable
from graphpar.explanation.account import Explanation
from graphpar.partition.types import Partition
from graphpar.plans.plan import Plan
from graphpar.plans.records import Option, PlanEdge, PlanPrecision, PlanReplica, PlanStage
from graphpar.schedule import Schedule, StageLink, build_schedule, validate
from graphpar.schedule.simulate import Timeline, simulate
from graphpar.schedule.simulated import has_formula, overfull_words
from graphpar.schedule.timing import Timing, timing_of, with_sums
from graphpar.units import format_percent

_SENDS = "sends overlap with compute; a device sends one message at a time, links are not shared"
_GRADIENTS = "gradients are summed by a ring all-reduce after the last backward"
_TRIED = (
    "stages on this machine's processor take what they took when they were tried; the objective, its "
    "bounds and what holds the plan back are of the sums of their units, by which it was chosen"
)


@dataclass(frozen=True)
class Prediction:
    """A partition, the schedule that carries it out, and its simulated timeline.

    `tried` says that seconds of stages in the timing are not the table's; `untried` are workers beside
    those of which some are, `why_untried` the reason where it is none of the stages' own.
    """

    partition: Partition
    schedule: Schedule
    timing: Timing
    timeline: Timeline
    tried: bool = False
    untried: tuple[str, ...] = ()
    why_untried: str = ""


@dataclass(frozen=True)
class PlanSubject:
    """What a plan is for: the model, the cluster, and what was asked.

    `cluster` is the cluster as a plain dict; both hashes are compared when a plan is used again.
    """

    model: str
    model_hash: str
    cluster: Mapping[str, Any]
    cluster_hash: str
    precision: str = "float32"
    options: Mapping[str, Option] = field(default_factory=dict)
    error_budget: PlanPrecision | None = None


def predict(
    table: CostTable,
    partition: Partition,
    links: Sequence[StageLink],
    summed_bytes: Mapping[tuple[int, ...], float] | None = None,
    retime: Callable[[Timing], tuple[Timing, str]] | None = None,
) -> Prediction:
    """Schedule a partition, prove the schedule sound, and simulate it.

    `summed_bytes` are what sets of ranks sum in the graph that runs: weights used in several stages too,
    of which the table knows nothing; `retime` corrects the seconds of stages that were tried, and says
    why others were not.

    Raises:
        VerifyError: The partition cannot be scheduled, or its schedule breaks a rule.
    """
    schedule = build_schedule(partition, links, table.training)
    validate(schedule)
    timing = timing_of(table, partition)
    if summed_bytes:
        timing = with_sums(timing, table, partition, summed_bytes)
    tried, why_not = (timing, "") if retime is None else retime(timing)
    prediction = Prediction(
        partition, schedule, tried, simulate(schedule, tried), tried != timing, why_untried=why_not
    )
    return replace(prediction, untried=_untried(timing, tried)) if prediction.tried else prediction


def _untried(before: Timing, after: Timing) -> tuple[str, ...]:
    """Workers on this machine of which some stage keeps its price."""
    here = before.shared.workers if before.shared is not None else {}
    return tuple(
        old.device
        for old, new in zip(before.ranks, after.ranks, strict=True)
        if old.device in here and any(a == b for a, b in zip(old.sizes, new.sizes, strict=True))
    )


def _said_of_trials(prediction: Prediction) -> tuple[str, ...]:
    why = f" ({prediction.why_untried})" if prediction.why_untried else ""
    if not prediction.tried:
        return (f"stages were not tried{why}: the sums of their units stand",) if why else ()
    if not prediction.untried:
        return (_TRIED,)
    kept = ", ".join(prediction.untried)
    instead = "the sums of their units stand"
    return (_TRIED, f"stages of {kept} were not tried, or not all of them{why}: {instead}")


def _said_of_formula(prediction: Prediction) -> tuple[str, ...]:
    """Whether the step is another one than the plan was chosen by; trials say so by themselves.

    A schedule without a formula was played through before it was chosen, but without what only the
    lowered stages tell: sums of weights that several of them read.
    """
    step_s, chosen_s = prediction.timeline.step_s, prediction.partition.objective_s
    if prediction.tried or chosen_s <= 0:
        return ()
    off, how = abs(step_s / chosen_s - 1), "longer" if step_s > chosen_s else "shorter"
    if off < _SAME_STEP:
        return ()
    if has_formula(prediction.partition.schedule):
        by, about = "by the programme's formula", "the formula"
    else:
        by, about = "when the plan was chosen, before its stages were lowered", "that"
    return (
        f"played through action by action, a step is {format_percent(off)} {how} than {by}; the gap and "
        f"the bound are about {about}",
    )


_SAME_STEP = 0.05
"""Steps that differ by less are not told apart on the page."""


def make_plan(
    subject: PlanSubject,
    table: CostTable,
    prediction: Prediction,
    *,
    assumptions: Sequence[str] = (),
    notes: Sequence[str] = (),
    explanation: Explanation | None = None,
) -> Plan:
    """The plan of a predicted partition; `assumptions` are added to those of the simulator."""
    partition, timeline = prediction.partition, prediction.timeline
    used = set(partition.used_devices)
    peaks_bytes = dict(zip(partition.used_devices, timeline.peak_bytes, strict=True))
    plan = Plan(
        model=subject.model,
        model_hash=subject.model_hash,
        cluster=dict(subject.cluster),
        cluster_hash=subject.cluster_hash,
        training=table.training,
        precision=subject.precision,
        batch=table.batch,
        batch_reason=table.batch_reason,
        options=dict(subject.options),
        units=table.unit_names,
        partition=partition,
        stages=_stages(table, prediction),
        edges=tuple(_edge(prediction, link) for link in prediction.schedule.links),
        left_out={d: c.name for c in table.device_classes for d in c.devices if d not in used},
        timing=prediction.timing,
        predicted_step_s=timeline.step_s,
        predicted_peak_bytes=peaks_bytes,
        bubble_share=timeline.bubble_share,
        assumptions=(
            _SENDS,
            *((_GRADIENTS,) if table.training else ()),
            *_said_of_trials(prediction),
            *_said_of_formula(prediction),
            *assumptions,
        ),
        notes=(*notes, *overfull_words(table, partition, peaks_bytes)),
        explanation=explanation,
        error_budget=subject.error_budget,
    )
    # Plain data and back: whole numbers become floats where floats belong, and the cluster's tuples
    # become lists, so that the plan equals itself after saving and loading.
    return msgspec.convert(msgspec.to_builtins(plan), Plan)


def _stages(table: CostTable, prediction: Prediction) -> tuple[PlanStage, ...]:
    rows: list[PlanStage] = []
    for number, pipeline in enumerate(prediction.partition.pipelines):
        for choice in pipeline.stages:
            index = len(rows)
            units = range(choice.first, choice.last)
            rows.append(
                PlanStage(
                    index=index,
                    pipeline=number,
                    first=choice.first,
                    last=choice.last,
                    weight_bytes=sum(table.costs[table.units[u]].weight_bytes for u in units),
                    replicas=tuple(
                        _replica(table, prediction, rank, index)
                        for rank in prediction.schedule.ranks_of[index]
                    ),
                )
            )
    return tuple(rows)


def _replica(table: CostTable, prediction: Prediction, rank: int, stage: int) -> PlanReplica:
    """A rank as one of a stage's replicas: work is that in the stage, the rest that of the whole rank."""
    schedule, timeline = prediction.schedule, prediction.timeline
    numbers = prediction.timing.ranks[rank]
    device_class = table.device_classes[table.class_of[numbers.device]]
    microbatches = schedule.microbatches_of(rank, stage)
    costs = [numbers.at_size(schedule.microbatch_sizes[m], stage) for m in microbatches]
    return PlanReplica(
        device=numbers.device,
        kind=device_class.name,
        microbatches=len(microbatches),
        forward_s=sum(c.forward_s for c in costs),
        backward_s=sum(c.backward_s for c in costs),
        comm_s=timeline.send_s[rank] + timeline.reduce_s[rank] + timeline.collective_s[rank],
        busy_share=timeline.busy_share[rank],
        peak_bytes=timeline.peak_bytes[rank],
        capacity_bytes=device_class.memory_bytes,
    )


def _edge(prediction: Prediction, link: StageLink) -> PlanEdge:
    """The edge with the slowest pair of replicas that use it."""
    schedule, timing = prediction.schedule, prediction.timing
    span = next(p for p in schedule.pipelines if p.first_stage <= link.source < p.last_stage)
    pairs = {
        (schedule.rank_of(link.source, m), schedule.rank_of(link.target, m))
        for m in range(span.first_microbatch, span.last_microbatch)
    }
    size = schedule.microbatch_sizes[span.first_microbatch]
    source, target = max(
        sorted(pairs), key=lambda pair: timing.link(*pair).seconds(link.forward_bytes(size))
    )
    cost = timing.link(source, target)
    return PlanEdge(
        source=link.source,
        target=link.target,
        forward_bytes_per_sample=link.forward_bytes_per_sample,
        backward_bytes_per_sample=link.backward_bytes_per_sample,
        forward_fixed_bytes=link.forward_fixed_bytes,
        backward_fixed_bytes=link.backward_fixed_bytes,
        source_device=timing.ranks[source].device,
        target_device=timing.ranks[target].device,
        latency_s=cost.latency_s,
        bytes_per_s=cost.bytes_per_s,
    )
