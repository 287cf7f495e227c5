"""Price a plan whose schedule has no formula, by playing its action lists through.

Interleaved and zero-bubble schedules are lists found with the times of the stages; what they take is what
the simulator says of the very lists that would run.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from graphpar.cost import CostTable
from graphpar.partition.certificate import gap_of
from graphpar.partition.gradient_sums import modes_of
from graphpar.partition.physical_bound import physical_bound_s
from graphpar.partition.pipeline_price import (
    Price,
    price,
    replica_times_s,
    share_microbatches,
    transfers_s,
)
from graphpar.partition.types import Partition, PipelineChoice, ScheduleName, StageChoice, StagePace
from graphpar.schedule import StageLink, build_schedule, validate
from graphpar.schedule.simulate import Timeline, simulate
from graphpar.schedule.timing import Timing, timing_of
from graphpar.units import format_bytes


@dataclass(frozen=True)
class Simulated:
    """A plan that was played through: its step and the peak of every device."""

    partition: Partition
    step_s: float

    def fits(self, table: CostTable) -> bool:
        """Whether every device has the memory."""
        return not any(need > have for need, have in self.needs(table).values())

    def needs(self, table: CostTable) -> dict[str, tuple[float, float]]:
        """For each device the bytes it needs at its peak, and those it has."""
        return {
            device: (peak, table.device_classes[table.class_of[device]].memory_bytes)
            for device, peak in self.partition.peak_bytes.items()
        }


def overfull_words(
    table: CostTable, plan: Partition, expected_bytes: Mapping[str, float]
) -> tuple[str, ...]:
    """What is said of a device within its limit that is expected to need more than it has.

    Limits count neither what an update that goes tensor by tensor takes for a while nor, in inference,
    results, which stay until the end of the step.
    """
    own = {d: c.memory_bytes for c in table.device_classes for d in c.devices}
    lacks = {
        device: need - own[device]
        for device, need in expected_bytes.items()
        if need > own[device] >= plan.peak_bytes.get(device, math.inf)
    }
    if not lacks:
        return ()
    worst = max(lacks, key=lacks.__getitem__)
    lack = format_bytes(lacks[worst])
    when = (
        "while tensors are updated one by one" if table.training else "with the results of a whole step"
    )
    return (f"{worst} is expected to lack {lack} {when}",)


def has_formula(schedule: ScheduleName) -> bool:
    """Whether the step of a schedule is given by a formula of `pipeline_price`."""
    return schedule in ("gpipe", "1f1b")


def price_any(table: CostTable, pipelines: Sequence[PipelineChoice], schedule: ScheduleName) -> Price:
    """Price a plan by its formula where it has one, else by playing it through.

    Raises:
        VerifyError: The plan cannot be scheduled like that.
    """
    if has_formula(schedule):
        return price(table, pipelines, schedule)
    found = simulated(table, pipelines, schedule).partition
    return Price(found.objective_s, found.parts, found.peak_bytes)


def deal_any(table: CostTable, pipeline: PipelineChoice, schedule: ScheduleName) -> PipelineChoice:
    """The pipeline with its microbatches dealt to replicas by the rule of 1F1B where it has no other.

    Stages of one device get what the slowest of them would.
    """
    if has_formula(schedule):
        return share_microbatches(table, pipeline, schedule)
    first: dict[tuple[str, ...], StageChoice] = {}
    dealt = share_microbatches(table, pipeline, "1f1b")
    stages = []
    for stage in dealt.stages:
        devices = tuple(d for r in stage.replicas for d in r.devices)
        stages.append(replace(stage, replicas=first.setdefault(devices, stage).replicas))
    return replace(dealt, stages=tuple(stages))


def simulated(
    table: CostTable,
    pipelines: Sequence[PipelineChoice],
    schedule: ScheduleName,
    paces: tuple[StagePace, ...] | None = None,
) -> Simulated:
    """Play a plan made by hand through.

    `paces` are those of the stages unless others are given.

    Raises:
        VerifyError: The plan cannot be scheduled like that.
    """
    if paces is None:
        paces = () if has_formula(schedule) else stage_paces(table, pipelines)
    plan = as_given(pipelines, schedule, paces)
    lists = build_schedule(plan, stage_links(table, pipelines), table.training)
    timing = timing_of(table, plan)
    timeline = simulate(lists, timing)
    peaks = dict(zip(plan.used_devices, timeline.peak_bytes, strict=True))
    plan = replace(plan, objective_s=timeline.step_s, peak_bytes=peaks)
    return Simulated(replace(plan, parts=_parts(table, plan, timeline, timing)), timeline.step_s)


def as_given(
    pipelines: Sequence[PipelineChoice], schedule: ScheduleName, paces: tuple[StagePace, ...] = ()
) -> Partition:
    """A partition that nobody searched for or priced."""
    return Partition(
        pipelines=tuple(pipelines),
        schedule=schedule,
        status="feasible",
        objective_s=0.0,
        parts={},
        bound_s=0.0,
        gap=1.0,
        physical_bound_s=0.0,
        seconds=0.0,
        truncated_by=("not searched: simulated as given",),
        family="this plan only",
        peak_bytes={d: 0.0 for p in pipelines for s in p.stages for r in s.replicas for d in r.devices},
        paces=paces,
    )


def certified(table: CostTable, plan: Partition) -> Partition:
    """A simulated plan with the bound that no plan of any kind can beat, its lists proven sound.

    Raises:
        VerifyError: The lists break a rule.
    """
    validate(build_schedule(plan, stage_links(table, plan.pipelines), table.training))
    bound_s = min(physical_bound_s(table), plan.objective_s)
    gap = gap_of(plan.objective_s, bound_s)
    return replace(plan, bound_s=bound_s, physical_bound_s=bound_s, gap=gap)


def _parts(table: CostTable, plan: Partition, timeline: Timeline, timing: Timing) -> dict[str, float]:
    """The parts that a formula would have: one microbatch there and back, the end, the rest."""
    last = max(range(len(timing.ranks)), key=lambda r: timeline.ends_s[r][-1])
    optimizer_s = timing.ranks[last].optimizer_s
    sync_s = timeline.reduce_s[last]
    rest_s = max(0.0, timeline.step_s - optimizer_s - sync_s)
    longest = max(plan.pipelines, key=lambda p: through_s(table, p))
    moved_s = min(math.fsum(transfers_s(table, longest)), rest_s)
    fill_s = min(through_s(table, longest), rest_s - moved_s)
    return {
        "fill_compute_s": fill_s,
        "fill_transfer_s": moved_s,
        "steady_s": timeline.step_s - optimizer_s - sync_s - fill_s - moved_s,
        "sync_s": sync_s,
        "optimizer_s": optimizer_s,
    }


def through_s(table: CostTable, pipeline: PipelineChoice) -> float:
    """Seconds that one microbatch computes on its way through the stages and back."""
    size = pipeline.samples / pipeline.microbatches
    return math.fsum(max(replica_times_s(table, stage, size)) for stage in pipeline.stages)


def stage_paces(table: CostTable, pipelines: Sequence[PipelineChoice]) -> tuple[StagePace, ...]:
    """The times that an order is found with, stage by stage; of unlike replicas those of the slowest."""
    return tuple(
        _pace(table, stage, pipeline.samples / pipeline.microbatches, moved_s)
        for pipeline in pipelines
        for stage, moved_s in zip(pipeline.stages, transfers_s(table, pipeline)[1:], strict=True)
    )


def _pace(table: CostTable, stage: StageChoice, size: float, moved_s: float) -> StagePace:
    units = range(stage.first, stage.last)
    rows = []
    # Replicas of one mode are alike.
    for mode in dict.fromkeys(modes_of(table, stage)):
        overhead_s = table.mode_overhead_s(mode)
        ahead, back = table.unit_seconds(mode, size)
        weight_s = sum(table.weight_s(u, mode, size) for u in units)
        forward_s = overhead_s + sum(ahead[stage.first : stage.last])
        back_s = overhead_s + sum(back[stage.first : stage.last]) - weight_s
        if weight_s > 0:
            back_s += overhead_s + sum(table.split_s(u, mode, size) for u in units)
        rows.append(StagePace(forward_s, back_s, weight_s, moved_s / 2))
    return max(rows, key=lambda pace: pace.forward_s + pace.backward_s + pace.weight_s)


def stage_links(table: CostTable, pipelines: Sequence[PipelineChoice]) -> list[StageLink]:
    """What crosses between the stages of every pipeline, from the table's edges."""
    links: list[StageLink] = []
    offset = 0
    for pipeline in pipelines:
        stage_of = [n for n, s in enumerate(pipeline.stages) for _ in range(s.first, s.last)]
        sums: dict[tuple[int, int], list[float]] = {}
        for edge in table.edges:
            ends = stage_of[edge.source], stage_of[edge.target]
            if ends[0] < ends[1]:
                total = sums.setdefault(ends, [0.0, 0.0, 0.0, 0.0])
                total[0] += edge.bytes_per_sample
                total[1] += edge.gradient_bytes_per_sample if table.training else 0.0
                total[2] += edge.fixed_bytes
                total[3] += edge.gradient_fixed_bytes if table.training else 0.0
        links += [
            StageLink(offset + a, offset + b, each, back, fixed, fixed_back)
            for (a, b), (each, back, fixed, fixed_back) in sorted(sums.items())
        ]
        offset += len(pipeline.stages)
    return links


def least_step_s(table: CostTable, pipelines: Sequence[PipelineChoice]) -> float:
    """No order of work of these stages and microbatches is shorter; 0 where replicas or sizes are unlike.

    A device starts when a microbatch has come through the stages before its first one that feed it, and
    has all its work to do. After its last backward, gradients of weights aside, the gradient still goes
    back through those stages, as far as there is one.
    """
    least_s = 0.0
    for pipeline in pipelines:
        modes = [set(modes_of(table, stage)) for stage in pipeline.stages]
        if pipeline.samples % pipeline.microbatches or any(len(own) > 1 for own in modes):
            continue
        size = pipeline.samples / pipeline.microbatches
        links = stage_links(table, [pipeline])
        there_s, back_s = ([0.0] * len(modes) for _ in range(2))
        works: dict[str, list[float]] = {}
        for number, (stage, (mode,)) in enumerate(zip(pipeline.stages, modes, strict=True)):
            units, overhead_s = range(stage.first, stage.last), table.mode_overhead_s(mode)
            ahead, back = (row[stage.first : stage.last] for row in table.unit_seconds(mode, size))
            forward_s = overhead_s + math.fsum(ahead)
            weight_s = math.fsum(table.weight_s(u, mode, size) for u in units)
            backward_s = overhead_s - weight_s + math.fsum(back)
            for replica in stage.replicas:
                for device in replica.devices:
                    work = works.setdefault(device, [there_s[number], back_s[number], 0.0, 0.0])
                    # Of several stages any may be the first to start and the last to end.
                    work[:2] = min(work[0], there_s[number]), min(work[1], back_s[number])
                    work[2] += replica.microbatches * (forward_s + backward_s)
                    work[3] += replica.microbatches * weight_s
            for link in links:
                if link.source == number:
                    after = link.target
                    there_s[after] = max(there_s[after], there_s[number] + forward_s)
                    if link.has_gradient:
                        back_s[after] = max(back_s[after], back_s[number] + backward_s)
        least_s = max(
            least_s, *(there + own + max(back, later) for there, back, own, later in works.values())
        )
    return least_s
