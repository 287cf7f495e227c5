"""Whether the parts of a plan agree with each other, for plans that people edited."""

from collections.abc import Iterator
from math import prod

from graphpar.ir.mesh import axis_shares
from graphpar.partition.types import MOST_LEAN, PipelineChoice, Replica, StageChoice
from graphpar.plans.records import PlanRecord

_SHARE_ROUNDING = 1e-6
"""How far the shares of a tensor group may be from one in all; files round numbers."""


def find_contradiction(plan: PlanRecord) -> str | None:
    """The first contradiction as `field PATH: what is wrong`, or None if the plan is sound."""
    return next(_contradictions(plan), None)


def _contradictions(plan: PlanRecord) -> Iterator[str]:
    """Later checks may rely on what earlier ones have established."""
    if plan.batch < 1:
        yield f"field batch: {plan.batch} samples; at least 1 is needed"
    pipelines = plan.partition.pipelines
    if not pipelines:
        yield "field partition.pipelines: is empty; at least one pipeline is needed"
    for index, pipeline in enumerate(pipelines):
        yield from _pipeline_contradictions(f"partition.pipelines[{index}]", pipeline, len(plan.units))
    total = sum(p.samples for p in pipelines)
    if total != plan.batch:
        yield f"field partition.pipelines: take {total} samples of a batch of {plan.batch}"
    yield from _device_contradictions(plan)
    yield from _table_contradictions(plan)
    yield from _edge_contradictions(plan)
    yield from _timing_contradictions(plan)
    yield from _prediction_contradictions(plan)


def _device_contradictions(plan: PlanRecord) -> Iterator[str]:
    """A device runs one stage, or with all that stand beside it the same several ones."""
    several = plan.partition.schedule in ("interleaved", "zero-bubble")
    seen: dict[str, tuple[int, StageChoice]] = {}
    for number, pipeline in enumerate(plan.partition.pipelines):
        for stage in pipeline.stages:
            devices = [d for r in stage.replicas for d in r.devices]
            for device in devices:
                where, before = seen.setdefault(device, (number, stage))
                if (before is not stage and not several) or devices.count(device) > 1:
                    yield f"field partition.pipelines: device {device} runs two stages; it may run one"
                elif where != number or before.replicas != stage.replicas:
                    yield (
                        f"field partition.pipelines: device {device} runs stages with unlike replicas; "
                        "all its stages must have the same replicas in one pipeline"
                    )
    paces, stages = plan.partition.paces, sum(len(p.stages) for p in plan.partition.pipelines)
    if paces and len(paces) != stages:
        yield f"field partition.paces: {len(paces)} for {stages} stages"


def _pipeline_contradictions(where: str, pipeline: PipelineChoice, num_units: int) -> Iterator[str]:
    if not 1 <= pipeline.microbatches <= pipeline.samples:
        yield (
            f"field {where}.microbatches: {pipeline.microbatches} microbatches of "
            f"{pipeline.samples} samples; each needs at least one"
        )
    end = 0
    for s, stage in enumerate(pipeline.stages):
        if stage.first != end or stage.last <= stage.first:
            yield (
                f"field {where}.stages[{s}]: units {stage.first} to {stage.last}; "
                f"a stage must begin at unit {end} and hold at least one"
            )
        end = stage.last
        shares = [r.microbatches for r in stage.replicas]
        if sum(shares) != pipeline.microbatches or min(shares, default=0) < 1:
            yield (
                f"field {where}.stages[{s}].replicas: take {shares} microbatches; each needs at "
                f"least one, and all together {pipeline.microbatches}"
            )
        for r, replica in enumerate(stage.replicas):
            yield from group_contradictions(f"{where}.stages[{s}].replicas[{r}]", replica)
    if end != num_units:
        yield f"field {where}.stages: cover {end} of {num_units} units"


def group_contradictions(where: str, replica: Replica) -> Iterator[str]:
    """Shares of a tensor group: none at all for equal ones, else one for each member."""
    shares = replica.shares
    if shares and len(shares) != len(replica.devices):
        yield f"field {where}.shares: {len(shares)} shares for {len(replica.devices)} members"
    elif shares and (min(shares) <= 0 or abs(sum(shares) - 1) > _SHARE_ROUNDING):
        yield f"field {where}.shares: {list(shares)}; each must be positive and all add up to 1"
    most = MOST_LEAN if replica.others else 0
    if not 0 <= replica.lean <= most:
        members = "a tensor group" if replica.others else "a device on its own"
        yield f"field {where}.lean: {replica.lean}; for {members} it goes from 0 to {most}"
    yield from _mesh_contradictions(where, replica)


def _mesh_contradictions(where: str, replica: Replica) -> Iterator[str]:
    """A mesh: two axes of at least two members each, whose shares are products along them."""
    mesh, size = replica.mesh, len(replica.devices)
    if not mesh:
        return
    if len(mesh) != 2 or min(mesh) < 2 or prod(mesh) != size:
        yield f"field {where}.mesh: {list(mesh)} for {size} members; two axes of two or more are needed"
    elif len(replica.member_shares) == size:
        along = axis_shares(replica.member_shares, mesh)
        made = [a * b for a in along[0] for b in along[1]]
        if any(abs(a - b) > _SHARE_ROUNDING for a, b in zip(made, replica.member_shares, strict=True)):
            yield f"field {where}.shares: {list(replica.shares)}; on a mesh, products along its two axes"


def _table_contradictions(plan: PlanRecord) -> Iterator[str]:
    """The table of stages repeats the partition for people; both must say the same."""
    chosen = [(p, s) for p, pipeline in enumerate(plan.partition.pipelines) for s in pipeline.stages]
    if len(chosen) != len(plan.stages):
        yield f"field stages: {len(plan.stages)} rows for {len(chosen)} stages of the partition"
    for index, ((pipeline, choice), row) in enumerate(zip(chosen, plan.stages, strict=True)):
        have = (
            row.index,
            row.pipeline,
            row.first,
            row.last,
            tuple((r.device, r.microbatches) for r in row.replicas),
        )
        want = (
            index,
            pipeline,
            choice.first,
            choice.last,
            tuple((d, r.microbatches) for r in choice.replicas for d in r.devices),
        )
        if have != want:
            yield (
                f"field stages[{index}]: says (index, pipeline, first, last, replicas) {have}, "
                f"the partition says {want}"
            )


def _edge_contradictions(plan: PlanRecord) -> Iterator[str]:
    pipeline_of = [row.pipeline for row in plan.stages]
    seen: set[tuple[int, int]] = set()
    for index, edge in enumerate(plan.edges):
        pair = edge.source, edge.target
        inside = 0 <= edge.source < edge.target < len(pipeline_of)
        if not inside or pipeline_of[edge.source] != pipeline_of[edge.target] or pair in seen:
            yield (
                f"field edges[{index}]: from stage {edge.source} to {edge.target}; an edge leads "
                "to a later stage of its pipeline, and a pair of stages has one edge"
            )
        seen.add(pair)


def _timing_contradictions(plan: PlanRecord) -> Iterator[str]:
    timed = tuple(r.device for r in plan.timing.ranks)
    if timed != plan.devices:
        yield "field timing.ranks: are not the devices of the partition in their order"
    rank_of = {device: rank for rank, device in enumerate(plan.devices)}
    stages = [(p, stage) for p in plan.partition.pipelines for stage in p.stages]
    for number, (pipeline, stage) in enumerate(stages):
        for rank in (rank_of[d] for r in stage.replicas for d in r.devices):
            rows = plan.timing.ranks[rank].sizes
            lacking = set(pipeline.sizes()) - {r.size for r in rows if r.stage in (None, number)}
            if lacking:
                yield (
                    f"field timing.ranks[{rank}].sizes: lacks microbatches of {min(lacking)} "
                    f"in stage {number}"
                )
    for index, group in enumerate(plan.timing.gradient_groups):
        if not all(0 <= r < len(timed) for r in group.ranks):
            yield f"field timing.gradient_groups[{index}].ranks: ranks are 0 to {len(timed) - 1}"


def _prediction_contradictions(plan: PlanRecord) -> Iterator[str]:
    if set(plan.predicted_peak_bytes) != set(plan.devices):
        yield "field predicted_peak_bytes: does not name exactly the devices of the partition"
    overlap = sorted(set(plan.left_out) & set(plan.devices))
    if overlap:
        yield f"field left_out: {overlap[0]} is used by the partition"
    numbers = {
        "predicted_step_s": plan.predicted_step_s,
        "partition.objective_s": plan.partition.objective_s,
        "partition.bound_s": plan.partition.bound_s,
        "partition.gap": plan.gap,
    }
    for where, number in numbers.items():
        if number < 0:
            yield f"field {where}: {number} is negative"
