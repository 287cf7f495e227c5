"""Plans made without a search: priced as given, and the splits people use without a planner."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise

from graphpar.cost import CostTable
from graphpar.errors import InfeasibleError
from graphpar.partition.certificate import gap_of
from graphpar.partition.check import check_partition
from graphpar.partition.physical_bound import physical_bound_s
from graphpar.partition.pipeline_price import price, replica_times_s, share_microbatches
from graphpar.partition.settings import (
    Microbatches,
    ScheduleChoice,
    microbatch_counts,
    schedules_of,
)
from graphpar.partition.table_check import check_table
from graphpar.partition.types import (
    Partition,
    PipelineChoice,
    Replica,
    ScheduleName,
    StageChoice,
)
from graphpar.units import format_bytes


def evaluate(
    table: CostTable, pipelines: Sequence[PipelineChoice], schedule: ScheduleName = "1f1b"
) -> Partition:
    """Price a configuration made by hand; microbatches are dealt to the replicas by the rule.

    The bound is the physical one. ValueError where the configuration is not a plan at all, such as a
    unit that nobody runs; memory is priced, not enforced.
    """
    check_table(table)
    return priced_plan(table, pipelines, schedule)


def priced_plan(
    table: CostTable,
    pipelines: Sequence[PipelineChoice],
    schedule: ScheduleName,
    physical_s: float | None = None,
) -> Partition:
    """`evaluate` for a table that was checked; `physical_s` is its physical bound where that is known."""
    began_s = time.monotonic()
    dealt = tuple(share_microbatches(table, p, schedule) for p in pipelines)
    cost = price(table, dealt, schedule)
    bound = min(physical_bound_s(table) if physical_s is None else physical_s, cost.objective_s)
    return Partition(
        pipelines=dealt,
        schedule=schedule,
        status="feasible",
        objective_s=cost.objective_s,
        parts=cost.parts,
        bound_s=bound,
        gap=gap_of(cost.objective_s, bound),
        physical_bound_s=bound,
        seconds=time.monotonic() - began_s,
        truncated_by=("not searched: priced as given",),
        family="this plan only",
        peak_bytes=cost.peak_bytes,
    )


@dataclass(frozen=True)
class Tried:
    """Under which settings a simple plan is priced, and for how long.

    Attributes:
        schedule: A schedule, or `auto` for the best of those there are.
        microbatches: A fixed number per pipeline, or `auto`.
        deadline_s: `time.monotonic()` at which to stop with what was found so far.
        physical_s: The physical bound of a table that was checked, where it is known.
        below_s: What a plan's step must take less than to be of use.
        devices: Those that a plan is made of; empty for all.
    """

    schedule: ScheduleChoice = "auto"
    microbatches: Microbatches = "auto"
    deadline_s: float = math.inf
    physical_s: float | None = None
    below_s: float = math.inf
    devices: tuple[str, ...] = ()

    def of(self, table: CostTable) -> list[str]:
        """The devices that a plan is made of, in the table's order."""
        return [d for d in table.class_of if not self.devices or d in self.devices]


def even_split(table: CostTable, tried: Tried = Tried()) -> Partition:
    """The same number of units on every device, all devices in the table's order, one pipeline.

    The microbatch count and the schedule are the best for this split. With more devices than units
    every unit gets the same number of replicas, up to one.

    Raises:
        InfeasibleError: The even split does not fit into memory under any microbatch count.
    """
    devices = tried.of(table)
    stages = min(len(devices), table.num_units)
    cuts = _even_cuts(table.num_units, stages)
    groups = [devices[a:b] for a, b in pairwise(_even_cuts(len(devices), stages))]
    return _best_setting(table, "the even split", cuts, groups, tried)


def greedy_split(table: CostTable, tried: Tried = Tried()) -> Partition:
    """Units in proportion to each device's speed, all devices in the table's order, one pipeline.

    Raises:
        InfeasibleError: This split does not fit into memory under any microbatch count.
    """
    devices = tried.of(table)[: table.num_units]
    speed = _speeds(table, table.sizes[0])
    cuts = _proportional_cuts(table, devices, [speed[table.class_of[d]] for d in devices])
    return _best_setting(table, "the greedy split", cuts, [[d] for d in devices], tried)


def data_parallel(table: CostTable, tried: Tried = Tried()) -> Partition:
    """Every device holds the whole model and takes turns over the microbatches.

    Raises:
        InfeasibleError: The model does not fit into one device, or samples mix.
    """
    devices = tried.of(table)
    return _best_setting(table, "data parallelism", [0, table.num_units], [devices], tried)


def one_device(table: CostTable, tried: Tried = Tried()) -> Partition:
    """Everything on the device that takes least for a step, of those that it fits into.

    Raises:
        InfeasibleError: The model does not fit into any device.
    """
    if tried.physical_s is None:
        check_table(table)
        tried = replace(tried, physical_s=physical_bound_s(table))
    best, problem = None, InfeasibleError("no device was tried", limit="memory")
    # Which is fastest depends on the size of microbatches, and which sizes fit on the device.
    for device in _one_of_each_kind(table, tried):
        try:
            one = _best_setting(table, "one device", [0, table.num_units], [[device]], tried)
        except InfeasibleError as error:
            problem = error
            continue
        if best is None or one.objective_s < best.objective_s:
            best = one
            tried = replace(tried, below_s=min(tried.below_s, best.objective_s))
    if best is None:
        raise problem
    return best


def _one_of_each_kind(table: CostTable, tried: Tried) -> list[str]:
    """The first device of each class, those first that are fast with the largest microbatches."""
    firsts: dict[int, str] = {}
    for device in tried.of(table):
        firsts.setdefault(table.class_of[device], device)
    speed = _speeds(table, table.sizes[-1])
    return sorted(firsts.values(), key=lambda d: -speed[table.class_of[d]])


def simple_plans(table: CostTable, tried: Tried = Tried()) -> Iterator[Partition]:
    """Those of the plans above that fit."""
    for make in (one_device, data_parallel, greedy_split, even_split):
        with suppress(InfeasibleError):
            yield make(table, tried)


def _even_cuts(total: int, parts: int) -> list[int]:
    return [total * i // parts for i in range(parts + 1)]


def _speeds(table: CostTable, size: float) -> list[float]:
    """Microbatches per second of a device of each class."""
    found = []
    for kind in range(len(table.device_classes)):
        passes = (
            table.forward_s(u, kind, size) + table.backward_s(u, kind, size)
            for u in range(table.num_units)
        )
        found.append(1 / max(sum(passes), 1e-30))
    return found


def _proportional_cuts(table: CostTable, devices: Sequence[str], speeds: Sequence[float]) -> list[int]:
    """At least one unit each, the rest by cumulative speed."""
    total, cuts, done = sum(speeds), [0], 0.0
    for index, speed in enumerate(speeds):
        done += speed
        low, high = cuts[-1] + 1, table.num_units - (len(devices) - index - 1)
        cuts.append(min(max(round(table.num_units * done / total), low), high))
    cuts[-1] = table.num_units
    return cuts


def _best_setting(
    table: CostTable,
    name: str,
    cuts: Sequence[int],
    groups: Sequence[Sequence[str]],
    tried: Tried,
) -> Partition:
    """The given stages under the microbatch count and schedule that suit them best."""
    names = schedules_of(table, tried.schedule)
    stages = tuple(
        StageChoice(a, b, tuple(Replica(d, 0) for d in group))
        for (a, b), group in zip(pairwise(cuts), groups, strict=True)
    )
    physical_s = tried.physical_s
    if physical_s is None:
        check_table(table)
        physical_s = physical_bound_s(table)
    over = max(_least_excess_bytes(table, stage) for stage in stages)
    if over > 0:
        raise InfeasibleError(
            f"{name} does not fit: {format_bytes(over)} too much on a device", limit="memory"
        )
    best: Partition | None = None
    over, below_s = float("inf"), tried.below_s
    late = slow = False
    # Small microbatches first: they need least memory.
    for count in reversed(microbatch_counts(table, table.batch, tried.microbatches)):
        if max(map(len, groups)) > min(count, table.max_replicas):
            continue
        if _least_s(table, stages, count) >= below_s:
            slow = True
            continue
        for one in names:
            late = late or time.monotonic() > tried.deadline_s
            if late:
                continue
            found = priced_plan(table, [PipelineChoice(table.batch, count, stages)], one, physical_s)
            if any(r.microbatches == 0 for p in found.pipelines for s in p.stages for r in s.replicas):
                continue
            excess = excess_bytes(table, found)
            over = min(over, excess)
            if excess <= 0 and (best is None or found.objective_s < best.objective_s):
                best, below_s = found, min(below_s, found.objective_s)
    if best is None and late:
        raise InfeasibleError(f"no time was left to price {name}", limit="time")
    if best is None and slow:
        raise InfeasibleError(f"{name} takes {tried.below_s:.3g} s or more", limit="time")
    if best is None:
        reason = (
            f"{format_bytes(over)} too much on a device"
            if over < float("inf")
            else ("more replicas than microbatches or than the model allows")
        )
        raise InfeasibleError(f"{name} does not fit: {reason}", limit="memory")
    check_partition(table, best)
    return best


def _least_s(table: CostTable, stages: Sequence[StageChoice], count: int) -> float:
    """The least that computing takes, however microbatches are dealt: one of them through all stages, and
    what any stage has to do besides."""
    fill_s = besides_s = 0.0
    for stage in stages:
        times_s = replica_times_s(table, stage, table.batch / count)
        fill_s += max(times_s)
        rate = sum(1 / max(t, 1e-30) for t in times_s)
        besides_s = max(besides_s, count / rate - max(times_s))
    return fill_s + besides_s


def _least_excess_bytes(table: CostTable, stage: StageChoice) -> float:
    """By how much weights, gradients and state alone are too much for some device of a stage."""
    excess = -math.inf
    for kind in {table.class_of[r.device] for r in stage.replicas}:
        costs = [table.every_mode[kind].costs[unit] for unit in table.units[stage.first : stage.last]]
        held = sum(c.weight_bytes[0] + c.gradient_bytes[0] + c.optimizer_bytes[0] for c in costs)
        excess = max(excess, held + table.reserved_bytes - table.device_classes[kind].memory_bytes)
    return excess


def excess_bytes(table: CostTable, found: Partition) -> float:
    return max(
        peak - table.device_classes[table.class_of[d]].memory_bytes
        for d, peak in found.peak_bytes.items()
    )
