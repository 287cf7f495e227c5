"""Plans found for one setting, priced under another: where a search starts, and what it may not miss."""

import math
from collections.abc import Mapping
from dataclasses import replace

from graphpar.cost import CostTable
from graphpar.errors import VerifyError
from graphpar.partition.family import share_step
from graphpar.partition.handmade import priced_plan
from graphpar.partition.settings import microbatch_counts
from graphpar.partition.share_bounds import apportion
from graphpar.partition.types import Partition, PipelineChoice, Replica
from graphpar.scenarios.types import KnownPlan
from graphpar.schedule.simulated import certified, deal_any, has_formula, simulated


def carried(table: CostTable, plan: KnownPlan, *, again: bool, check: bool = True) -> Partition | None:
    """A plan of another setting under this table; None where it cannot be had or does not fit.

    A batch that is a multiple of the plan's takes more microbatches of that size, a smaller one fewer;
    any other one takes what a search would try that is nearest to it.

    Args:
        table: Prices of this setting.
        plan: What was found elsewhere.
        again: Whether the table's plain mode computes all activations again.
        check: Whether lists without a formula are checked and bounded here, or `certified` later.
    """
    pipelines = _resized(table, plan)
    if pipelines is None or any(s.recompute < again for p in pipelines for s in p.stages):
        return None
    if again:
        pipelines = marked(pipelines, recompute=False)
    if not _possible(table, pipelines):
        return None
    try:
        if table.batch != plan.batch:
            # Replicas share what are more or fewer microbatches now.
            pipelines = tuple(deal_any(table, p, plan.schedule) for p in pipelines)
        if has_formula(plan.schedule):
            found = priced_plan(table, pipelines, plan.schedule)
        else:
            found = simulated(table, pipelines, plan.schedule).partition
            found = certified(table, found) if check else found
    except (ValueError, VerifyError):
        return None
    if any(r.microbatches == 0 for p in found.pipelines for s in p.stages for r in s.replicas):
        return None
    fits = all(
        peak <= table.device_classes[table.class_of[device]].memory_bytes
        for device, peak in found.peak_bytes.items()
    )
    return replace(found, truncated_by=()) if fits else None


def marked(pipelines: tuple[PipelineChoice, ...], *, recompute: bool) -> tuple[PipelineChoice, ...]:
    """The same stages, all of them computing activations again or none."""
    return tuple(
        replace(p, stages=tuple(replace(s, recompute=recompute) for s in p.stages)) for p in pipelines
    )


def placed(plan: KnownPlan, places: Mapping[str, str]) -> KnownPlan:
    """The plan on other devices, each in the place of another."""

    def moved(replica: Replica) -> Replica:
        first, *others = (places[name] for name in replica.devices)
        return replace(replica, device=first, others=tuple(others))

    pipelines = tuple(
        replace(
            p, stages=tuple(replace(s, replicas=tuple(moved(r) for r in s.replicas)) for s in p.stages)
        )
        for p in plan.pipelines
    )
    return replace(plan, pipelines=pipelines)


def _resized(table: CostTable, plan: KnownPlan) -> tuple[PipelineChoice, ...] | None:
    """Shares and microbatches in proportion to another batch; None where pipelines would have none."""
    batch = table.batch
    if batch == plan.batch:
        return plan.pipelines
    made = []
    for pipeline in plan.pipelines:
        samples, rest = divmod(pipeline.samples * batch, plan.batch)
        microbatches, odd = divmod(pipeline.microbatches * batch, plan.batch)
        if rest or odd or not microbatches:
            return _nearly_resized(table, plan)
        made.append(replace(pipeline, samples=samples, microbatches=microbatches))
    return tuple(made)


def _nearly_resized(table: CostTable, plan: KnownPlan) -> tuple[PipelineChoice, ...] | None:
    """Shares nearly in proportion, and microbatches of about the same size.

    Both are such as a search tries, so that what it proved holds for this plan, too.
    """
    shares = apportion([p.samples for p in plan.pipelines], table.batch, share_step(table))
    if shares is None:
        return None
    made = []
    for pipeline, samples in zip(plan.pipelines, shares, strict=True):
        widest = max(len(stage.replicas) for stage in pipeline.stages)
        wanted = samples * pipeline.microbatches / pipeline.samples
        counts = [n for n in microbatch_counts(table, samples, "auto") if n >= widest]
        if not counts:
            return None
        nearest = min(counts, key=lambda n: abs(math.log(n / wanted)))
        made.append(replace(pipeline, samples=samples, microbatches=nearest))
    return tuple(made)


def _possible(table: CostTable, pipelines: tuple[PipelineChoice, ...]) -> bool:
    stages = [s for p in pipelines for s in p.stages]
    if any(p.stages[-1].last != table.num_units for p in pipelines):
        return False
    if any(d not in table.class_of for s in stages for r in s.replicas for d in r.devices):
        return False
    if max(p.microbatches for p in pipelines) > table.max_microbatches:
        return False
    copies = max(sum(len(s.replicas) for p in pipelines for s in p.stages if s.first == 0), 1)
    priced = all(table.mode_number(s, r) is not None for s in stages for r in s.replicas)
    return priced and copies <= table.max_replicas
