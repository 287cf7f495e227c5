"""What one process works on: a scenario's table and what is asked of it. Needs no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from graphpar.cost import CostTable
from graphpar.errors import InfeasibleError
from graphpar.partition.bounds import least_bytes
from graphpar.partition.handmade import Tried, one_device
from graphpar.partition.settings import Microbatches, ScheduleWish, searched
from graphpar.partition.types import Partition
from graphpar.scenarios.layouts import recomputed
from graphpar.scenarios.types import KnownPlan, Layout

HURRIED_S = 5.0
"""A search longer than this needs no plan to beat."""


@dataclass(frozen=True)
class Task:
    """What one process works on."""

    table: CostTable
    schedule: ScheduleWish = "auto"
    microbatches: Microbatches = "auto"
    recompute: bool | None = None
    layout: Layout | None = None
    gap: float = 0.01
    time_limit_s: float = 10.0
    hints: tuple[KnownPlan, ...] = ()
    formats: Mapping[str, str] = field(default_factory=dict)
    """By device the format that it computes in; float32 without one."""
    step_only: bool = False
    """Whether the step alone is asked for: neither what limits it nor the best single device."""

    @property
    def hurries(self) -> bool:
        """Whether there is so little time that the search should know what it has to beat."""
        return self.time_limit_s < HURRIED_S

    @property
    def again(self) -> bool:
        """Whether every unit computes its activations again."""
        return bool(self.recompute) and self.table.training

    @property
    def grouped(self) -> bool:
        """Whether it is a configuration of tensor groups, which have modes of their own."""
        return self.layout is not None and self.layout.tensor > 1

    @property
    def searched_table(self) -> CostTable:
        """The table that plans are made under."""
        return recomputed(self.table) if self.again and not self.grouped else self.table


def quarrels_of(task: Task, found: Partition) -> tuple[tuple[str, ...], ...]:
    """Devices that are to run the same stage but would do so in unlike formats."""
    stages = (
        tuple(name for r in stage.replicas for name in r.devices)
        for pipeline in found.pipelines
        for stage in pipeline.stages
    )
    return tuple(names for names in stages if len({task.formats.get(n) for n in names}) > 1)


def alone_on_one(table: CostTable, task: Task) -> Partition | None:
    if least_bytes(table) + table.reserved_bytes > max(c.memory_bytes for c in table.device_classes):
        return None
    try:
        return one_device(table, Tried(searched(task.schedule), task.microbatches))
    except (InfeasibleError, ValueError):
        return None
