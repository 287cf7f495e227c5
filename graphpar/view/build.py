"""From a plan, and a measured step if there is one, to the data that the views draw."""

from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

import msgspec

from graphpar.partition.types import StageChoice
from graphpar.plans.page import whole_notes
from graphpar.plans.plan import Plan
from graphpar.plans.precision import format_runs
from graphpar.plans.records import PlanPrecision
from graphpar.schedule import Schedule
from graphpar.schedule.simulate import peak_parts, resident_bytes
from graphpar.view.fold import fold_units
from graphpar.view.measured import measured_timeline
from graphpar.view.model import (
    Lane,
    ViewCertificate,
    ViewComparison,
    ViewData,
    ViewDevice,
    ViewError,
    ViewErrors,
    ViewLink,
    ViewNode,
    ViewPipeline,
    ViewStage,
    ViewTimeline,
)
from graphpar.view.outline import outline
from graphpar.view.shares import shares_of

if TYPE_CHECKING:
    from graphpar.runtime.comparison import StepComparison
    from graphpar.runtime.last_step import LastStep
    from graphpar.runtime.true_error import TrueError

_SPLITS_WEIGHTS = 3
"""The ZeRO level from which on a device holds a part of its weights only."""


def view_of(
    plan: Plan,
    measured: "LastStep | None" = None,
    difference: "StepComparison | None" = None,
    first_step: "TrueError | None" = None,
) -> ViewData:
    """Everything there is to draw of a plan; simulates its step once."""
    timeline = plan.timeline()
    schedule = timeline.schedule
    ran = measured_timeline(plan, schedule, measured) if measured is not None else None
    peaks = {r.rank: float(r.peak_bytes) for r in measured.reports} if measured is not None else {}
    used = tuple(_devices(plan, schedule, peaks))
    return ViewData(
        model=plan.model,
        model_hash=plan.model_hash,
        training=plan.training,
        precision=plan.precision,
        batch=plan.batch,
        batch_reason=plan.batch_reason,
        schedule=plan.partition.schedule,
        step_s=timeline.step_s,
        bottleneck=plan.replicas.index(plan.bottleneck),
        shares=shares_of(timeline),
        nodes=_nodes(plan),
        links=tuple(_links(plan)),
        devices=used + tuple(ViewDevice(d, k, node_of(d)) for d, k in sorted(plan.left_out.items())),
        num_ranks=len(used),
        pipelines=tuple(_pipelines(plan)),
        stages=tuple(_stages(plan, schedule)),
        units=plan.units,
        edges=plan.edges,
        certificate=_certificate(plan),
        notes=(*plan.partition.notes, *plan.notes, *whole_notes(plan)),
        assumptions=plan.assumptions,
        options={name: str(value) for name, value in sorted(plan.options.items())},
        explanation=plan.explanation,
        routes=schedule.routes,
        predicted=ViewTimeline(
            timeline.step_s,
            tuple(
                Lane(rank, schedule.actions[rank], timeline.starts_s[rank], timeline.ends_s[rank])
                for rank in range(schedule.num_ranks)
            ),
        ),
        measured=ran,
        comparison=_comparison(difference) if difference is not None else None,
        errors=_errors(plan.error_budget, first_step) if plan.error_budget is not None else None,
    )


def _comparison(found: "StepComparison") -> ViewComparison:
    return ViewComparison(found.devices, found.reasons, found.off, found.tolerance)


def _errors(report: PlanPrecision, first_step: "TrueError | None") -> ViewErrors:
    return ViewErrors(
        budget=report.budget,
        rows=(
            ViewError(
                "result",
                report.output_error,
                report.measured_output_error,
                first_step.output if first_step is not None else None,
            ),
            ViewError(
                "gradient (of its norm in the first step)" if first_step is not None else "gradient",
                report.gradient_error,
                report.measured_gradient_error,
                first_step.gradient_norm if first_step is not None else None,
            ),
        ),
        step_s=report.step_s,
        looser=report.looser,
        tighter=report.tighter,
        runs=tuple(format_runs(report.units)),
        note=report.note,
        first_step_kept=first_step.kept if first_step is not None else None,
    )


def _devices(plan: Plan, schedule: Schedule, peaks: dict[int, float]) -> Iterator[ViewDevice]:
    stages = dict(enumerate(zip(plan.stages, _choices(plan), strict=True)))
    for rank, (replica, share) in enumerate(zip(plan.replicas, _member_shares(plan), strict=True)):
        resident, saved, working = peak_parts(schedule, plan.timing, rank)
        own = [stages[number] for number in schedule.stages_of[rank]]
        weighs = sum(stage.weight_bytes for stage, _ in own)
        splits = any(choice.zero >= _SPLITS_WEIGHTS for _, choice in own)
        yield ViewDevice(
            name=replica.device,
            kind=replica.kind,
            node=plan.timing.ranks[rank].node,
            stages=schedule.stages_of[rank],
            share=share,
            microbatches=replica.microbatches,
            forward_s=replica.forward_s,
            backward_s=replica.backward_s,
            comm_s=replica.comm_s,
            busy_share=replica.busy_share,
            peak_bytes=resident + saved + working,
            capacity_bytes=replica.capacity_bytes,
            resident_bytes=resident,
            later_bytes=resident_bytes(plan.timing, rank) - resident,
            weight_bytes=0.0 if splits else min(resident, share * weighs),
            saved_bytes=saved,
            working_bytes=working,
            update_bytes=plan.timing.ranks[rank].update_bytes,
            memory_by_size=tuple(
                (
                    schedule.stages_of[rank][0] if row.stage is None else row.stage,
                    row.size,
                    row.saved_bytes,
                    row.working_bytes,
                    row.deferred_bytes,
                    row.gradient_bytes,
                    row.spared_bytes,
                )
                for row in plan.timing.ranks[rank].sizes
            ),
            measured_peak_bytes=peaks.get(rank),
        )


def _nodes(plan: Plan) -> tuple[ViewNode, ...]:
    """Nodes in the order of the cluster's description; those with work that it lacks come last."""
    used = Counter(timing.node for timing in plan.timing.ranks)
    kinds: dict[str, Counter[str]] = {
        str(node["name"]): Counter() for node in _described_nodes(plan.cluster)
    }
    for replica, timing in zip(plan.replicas, plan.timing.ranks, strict=True):
        kinds.setdefault(timing.node, Counter())[replica.kind] += 1
    for device, kind in plan.left_out.items():
        kinds.setdefault(node_of(device), Counter())[kind] += 1
    return tuple(
        ViewNode(name, tuple(sorted(counts.items())), used[name]) for name, counts in kinds.items()
    )


def node_of(device: str) -> str:
    """A device is named after its node: `a/0` is on `a`; one without a slash stands alone."""
    return device.rpartition("/")[0] or device


def _described_nodes(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    """The nodes as far as the description has them; plans made by hand may say little."""
    nodes = cluster.get("nodes", [])
    if not isinstance(nodes, list):
        return []
    return [node for node in nodes if isinstance(node, dict) and "name" in node]


def _links(plan: Plan) -> Iterator[ViewLink]:
    for link in plan.timing.links:
        yield ViewLink(link.node, link.other, link.cost.bytes_per_s, link.cost.latency_s)
    network = plan.timing.network
    yield ViewLink("", "", network.bytes_per_s, network.latency_s)


def _pipelines(plan: Plan) -> Iterator[ViewPipeline]:
    first = 0
    for pipeline in plan.partition.pipelines:
        yield ViewPipeline(pipeline.samples, first, pipeline.sizes())
        first += pipeline.microbatches


def _stages(plan: Plan, schedule: Schedule) -> Iterator[ViewStage]:
    for stage, choice in zip(plan.stages, _choices(plan), strict=True):
        ranks = iter(schedule.ranks_of[stage.index])
        yield ViewStage(
            index=stage.index,
            pipeline=stage.pipeline,
            first=stage.first,
            last=stage.last,
            weight_bytes=stage.weight_bytes,
            ranks=schedule.ranks_of[stage.index],
            blocks=fold_units(plan.units, stage.first, stage.last),
            modules=outline(plan.units, stage.first, stage.last),
            groups=tuple(tuple(islice(ranks, len(r.devices))) for r in choice.replicas),
            precision=choice.precision,
            unit_formats=choice.unit_formats,
            recompute=choice.recompute,
            zero=choice.zero,
            sharing=tuple(dict.fromkeys(_sharing(choice))),
        )


def _sharing(choice: StageChoice) -> Iterator[str]:
    """Axes of tensor groups that have two, and dear memory."""
    for replica in choice.replicas:
        if replica.mesh:
            yield f"groups of {' x '.join(map(str, replica.mesh))}"
        if replica.lean:
            yield f"members hold less (price of memory {replica.lean})"


def _choices(plan: Plan) -> Iterator[StageChoice]:
    for pipeline in plan.partition.pipelines:
        yield from pipeline.stages


def _member_shares(plan: Plan) -> Iterator[float]:
    """For each rank its share of the work on a microbatch."""
    shares: dict[str, float] = {}
    for choice in _choices(plan):
        for replica in choice.replicas:
            shares.update(zip(replica.devices, replica.member_shares, strict=True))
    yield from shares.values()


def _certificate(plan: Plan) -> ViewCertificate:
    fields = ViewCertificate.__dataclass_fields__
    known = msgspec.to_builtins(plan.partition)
    if plan.explanation is not None:
        known["parts"] = dict(plan.explanation.parts)
    return msgspec.convert({name: known[name] for name in fields}, ViewCertificate)
