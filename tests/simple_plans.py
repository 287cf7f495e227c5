"""No answer may be worse than the splits that people use without a planner."""

from contextlib import suppress
from dataclasses import replace
from weakref import WeakSet

import pytest

from graphpar.choice.comparison import step_of
from graphpar.cost import CostTable
from graphpar.errors import InfeasibleError
from graphpar.partition import handmade, pipeline
from graphpar.partition.settings import Microbatches, ScheduleChoice
from graphpar.partition.types import Partition
from graphpar.scenarios import solve as scenarios
from graphpar.scenarios.known import Known
from graphpar.scenarios.task import Task

MOST_DEVICES = 16
"""Pricing the splits of larger clusters takes too long for a test that is about something else."""


def watch_plans(patch: pytest.MonkeyPatch) -> None:
    """Hold every partition and every scenario's plan that is made from now on against simple plans."""
    run = pipeline._Run  # what every answer comes from, and what knows all that was asked for
    compare, answer, best = run.compare, run.answer, scenarios._best
    asked: WeakSet[pipeline._Run] = WeakSet()

    def comparing(self: pipeline._Run, schedule: ScheduleChoice, microbatches: Microbatches) -> None:
        asked.add(self)  # else the caller has better plans, and takes the best of all
        compare(self, schedule, microbatches)

    def answered(self: pipeline._Run) -> Partition:
        found, family = answer(self), self.family
        if self in asked:
            schedule = family.schedules[0] if len(family.schedules) == 1 else "auto"
            _assert_no_worse(found, family.table, schedule, family.microbatches)
        return found

    def planned(table: CostTable, task: Task, known: Known | None) -> Partition:
        found = best(table, task, known)
        if task.layout is None and task.schedule == "auto":
            priced = replace(found, objective_s=step_of(table, found))
            if table.shared is None and not table.repeated:
                _assert_no_worse(priced, table, "auto", task.microbatches)
            else:  # where what workers cost each other, or stages sum, counts more than any formula
                with suppress(InfeasibleError):
                    alone = handmade.one_device(table, handmade.Tried("auto", task.microbatches))
                    assert priced.objective_s <= step_of(table, alone) * (1 + 1e-9)
        return found

    patch.setattr(run, "compare", comparing)
    patch.setattr(run, "answer", answered)
    patch.setattr(scenarios, "_best", planned)


def _assert_no_worse(
    found: Partition, table: CostTable, schedule: ScheduleChoice, microbatches: Microbatches
) -> None:
    """One device, data parallelism, an even and a proportional split take no less time."""
    if len(table.class_of) > MOST_DEVICES:
        return
    for simple in handmade.simple_plans(table, handmade.Tried(schedule, microbatches)):
        assert found.objective_s <= simple.objective_s * (1 + 1e-9), simple.pipelines
