"""Plans that people write down by hand, as candidates: like devices in equal pipelines, played through.

The search weighs 1F1B and GPipe by a formula that is careful about gradient sums over slow links, and
other schedules are tried on the stages it ends with. Equal pipelines of equal stages are often as good or
better there, and are few.
"""

import time
from collections.abc import Iterator
from dataclasses import replace

from graphpar.cost import CostTable
from graphpar.errors import InfeasibleError, VerifyError
from graphpar.partition.settings import ScheduleWish
from graphpar.partition.types import ScheduleName
from graphpar.scenarios.layouts import configured
from graphpar.scenarios.types import KnownPlan, Layout
from graphpar.simulated import deal_any, simulated

_SIZES = (1, 2, 4, 8)
"""Microbatch sizes that are tried."""

_MOST_FORWARDS = 10_000
"""Plans with more forwards of stages take too long to play through."""

_MOST_DEVICES = 64


def best_regular(table: CostTable, wish: ScheduleWish, deadline_s: float) -> KnownPlan | None:
    """The fastest of equal pipelines of each kind of device, as far as there is time; None for none."""
    best: tuple[float, KnownPlan] | None = None
    for layout, part in _layouts(table):
        for schedule in _schedules(wish):
            if time.monotonic() > deadline_s:
                return best[1] if best is not None else None
            found = _played(table, part, layout, schedule)
            if found is not None and (best is None or found[0] < best[0]):
                best = found
    return best[1] if best is not None else None


def _schedules(wish: ScheduleWish) -> tuple[ScheduleName, ...]:
    if wish == "auto":
        return ("1f1b", "zero-bubble")
    return () if wish == "interleaved" else (wish,)


def _layouts(table: CostTable) -> Iterator[tuple[Layout, CostTable]]:
    """Copies and stages of one kind of device, the fastest first, with the table of that kind alone."""
    if not table.training or table.max_microbatches == 1 or table.tail_reason:
        return
    numbers = range(len(table.device_classes))
    whole = [sum(table.forward_s(u, k, 1) for u in range(table.num_units)) for k in numbers]
    for kind in sorted(numbers, key=whole.__getitem__):
        classes = tuple(
            c if k == kind else replace(c, devices=()) for k, c in enumerate(table.device_classes)
        )
        part, number = replace(table, device_classes=classes), len(classes[kind].devices)
        for copies in (n for n in range(1, min(number, _MOST_DEVICES) + 1) if number % n == 0):
            stages, share = number // copies, table.batch // copies
            if stages > table.num_units or not share or copies > table.max_replicas:
                continue
            for count in dict.fromkeys(max(1, share // size) for size in _SIZES):
                if stages * copies * count <= _MOST_FORWARDS:
                    yield Layout(1, stages, copies, count), part


def _played(
    table: CostTable, part: CostTable, layout: Layout, schedule: ScheduleName
) -> tuple[float, KnownPlan] | None:
    try:
        made = configured(part, layout, "1f1b", "auto")
        pipelines = tuple(deal_any(table, p, schedule) for p in made.pipelines)
        played = simulated(table, pipelines, schedule)
    except (InfeasibleError, ValueError, VerifyError):
        return None
    if not played.fits(table):
        return None
    return played.step_s, KnownPlan(pipelines, schedule, table.batch)
