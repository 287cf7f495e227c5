"""A plan on named devices, before it has a certificate."""

from collections.abc import Sequence
from dataclasses import dataclass

from graphpar.cost import CostTable
from graphpar.partition.pipeline_price import price, share_microbatches
from graphpar.partition.types import PipelineChoice, ScheduleName, SearchedSchedule


@dataclass(frozen=True)
class Candidate:
    """A plan on named devices and its price."""

    pipelines: tuple[PipelineChoice, ...]
    schedule: ScheduleName
    step_s: float


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
