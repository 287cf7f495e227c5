"""A plan on named devices, before it has a certificate."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from graphpar.cost import CostTable
from graphpar.partition.gradient_sums import modes_of, unit_costs
from graphpar.partition.pipeline_price import price, share_microbatches
from graphpar.partition.types import PipelineChoice, ScheduleName, SearchedSchedule, StageChoice


@dataclass(frozen=True)
class Candidate:
    """A plan on named devices and its price."""

    pipelines: tuple[PipelineChoice, ...]
    schedule: ScheduleName
    step_s: float


def best_candidate(
    table: CostTable, pipelines: tuple[PipelineChoice, ...], schedule: ScheduleName
) -> Candidate:
    """A plan with the replicas in their order, or with those first whose optimiser is fastest.

    The first replica of a stage under ZeRO is the one that sums with other pipelines.
    """
    found = Candidate(pipelines, schedule, price(table, pipelines, schedule).objective_s)
    if len(pipelines) == 1:
        return found
    others = tuple(
        share_microbatches(
            table, replace(p, stages=tuple(_quick_first(table, s) for s in p.stages)), schedule
        )
        for p in pipelines
    )
    if others == pipelines:
        return found
    other = Candidate(others, schedule, price(table, others, schedule).objective_s)
    return min(found, other, key=lambda c: c.step_s)


def _quick_first(table: CostTable, stage: StageChoice) -> StageChoice:
    """The same stage with the replica first whose optimiser is fastest, where one speaks for all."""
    if not stage.zero or len(stage.replicas) < 2:
        return stage
    steps = {
        replica: sum(c.optimizer_s for c in unit_costs(table, stage, mode))
        for replica, mode in zip(stage.replicas, modes_of(table, stage), strict=True)
    }
    return replace(stage, replicas=tuple(sorted(stage.replicas, key=steps.__getitem__)))


def prefer_1f1b(table: CostTable, schedules: Sequence[SearchedSchedule], best: Candidate) -> Candidate:
    """The same plan under 1F1B where that takes no longer: it keeps less in memory."""
    if best.schedule == "1f1b" or "1f1b" not in schedules:
        return best
    dealt = tuple(share_microbatches(table, p, "1f1b") for p in best.pipelines)
    cost = price(table, dealt, "1f1b")
    fits = all(
        peak <= table.device_classes[table.class_of[d]].memory_bytes
        for d, peak in cost.peak_bytes.items()
    )
    slower = not fits or cost.objective_s > best.step_s
    return best if slower else Candidate(dealt, "1f1b", cost.objective_s)
