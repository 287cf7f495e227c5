"""What a plan of a scenario promises: its numbers, its bottleneck and what would relieve it."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from graphpar.choice.comparison import step_of
from graphpar.cost import CostTable, LinkCost
from graphpar.errors import InfeasibleError
from graphpar.partition.pipeline import partition
from graphpar.partition.settings import searched
from graphpar.partition.types import Partition
from graphpar.scenarios.known import Known
from graphpar.scenarios.report import CUT_SHORT
from graphpar.scenarios.task import Task, alone_on_one
from graphpar.scenarios.transfer import marked
from graphpar.scenarios.types import Answer, Bottleneck, KnownPlan
from graphpar.schedule import Schedule, build_schedule
from graphpar.schedule.simulate import Timeline, simulate
from graphpar.schedule.simulated import has_formula, overfull_words, stage_links
from graphpar.schedule.timing import timing_of
from graphpar.units import format_bytes

FULL = 0.95
"""A device fuller than this at its peak leaves the planner little choice."""

NEARLY = 0.95
"""Devices that are so nearly as busy as the busiest hold the step up as much."""

FASTER = 1e6
"""A link so many times as fast takes no time."""

FREE_MEMORY_GAIN = 0.02
"""If memory without limit would shorten the step by more than this, memory is the bottleneck."""


def answer_of(task: Task, found: Partition, known: Known | None = None) -> Answer:
    """What a plan of the task promises."""
    table = task.searched_table
    schedule = build_schedule(found, stage_links(table, found.pipelines), table.training)
    timeline = simulate(schedule, timing_of(table, found))
    capacity = {d: c.memory_bytes for c in table.device_classes for d in c.devices}
    peaks = dict(zip(found.used_devices, timeline.peak_bytes, strict=True))
    headroom = {d: capacity[d] - peaks[d] for d in peaks}
    used = tuple(headroom)
    everyone = [d for c in task.table.device_classes for d in c.devices]
    alone = None if task.step_only else _alone(table, task)
    least = min(headroom, key=headroom.__getitem__)
    # Limits do not count what an update takes tensor by tensor: `plan` takes such plans, too.
    fits = all(headroom[d] >= 0 or found.peak_bytes[d] <= capacity[d] for d in headroom)
    return Answer(
        "",
        status="ok" if fits else "infeasible",
        problem="" if fits else f"{least} lacks {format_bytes(-headroom[least])}",
        step_s=timeline.step_s,
        # A formula may count more than is played; a bound above the step would say nothing of it.
        bound_s=min(found.bound_s, timeline.step_s),
        gap=None if task.layout else found.gap,
        any_bound_s=found.physical_bound_s,
        batch=table.batch,
        bottleneck=None
        if task.step_only
        else _bottleneck(table, found, schedule, timeline, peaks, capacity, task, known),
        headroom_bytes=headroom,
        used=used,
        left_out=tuple(d for d in everyone if d not in headroom),
        shape=_shape(found),
        remarks=(*_remarks(found, task), *overfull_words(table, found, peaks)),
        one_device_s=alone[1] if alone else None,
        one_device=alone[0] if alone else "",
        plan=_kept(found, task),
    )


def _kept(found: Partition, task: Task) -> KnownPlan:
    again = task.again and not task.grouped
    pipelines = marked(found.pipelines, recompute=True) if again else found.pipelines
    return KnownPlan(pipelines, found.schedule, task.table.batch)


def _alone(table: CostTable, task: Task) -> tuple[str, float] | None:
    """The best single device and its step time; None where the model fits into none."""
    found = alone_on_one(table, task)
    return (found.used_devices[0], step_of(table, found)) if found is not None else None


def _shape(found: Partition) -> str:
    parts = []
    for pipeline in found.pipelines:
        stages = [
            f"{len(s.replicas)}x" * (len(s.replicas) > 1) + str(s.last - s.first) for s in pipeline.stages
        ]
        replicas = (r for s in pipeline.stages for r in s.replicas)
        widest = max(replicas, key=lambda r: len(r.devices))
        group = f" t={widest.width}" if widest.others else ""
        parts.append(f"[{' '.join(stages)}]{group} m={pipeline.microbatches}")
    counted = [f"{parts.count(p)} x {p}" if parts.count(p) > 1 else p for p in dict.fromkeys(parts)]
    return f"{' + '.join(counted)} {found.schedule}"


def _remarks(found: Partition, task: Task) -> tuple[str, ...]:
    remarks = []
    if not has_formula(found.schedule) and task.layout is None:
        remarks.append(
            f"{found.schedule} is tried, not searched with a bound of its own: the gap is against any "
            "order of work at all"
        )
    if found.truncated_by and task.layout is None:
        remarks.append(f"{CUT_SHORT} by {', '.join(found.truncated_by)}")
    if task.recompute and task.table.training:
        remarks.append("every unit computes its activations again; compile lets each stage choose")
    return (*remarks, *found.notes)


def _bottleneck(
    table: CostTable,
    found: Partition,
    schedule: Schedule,
    timeline: Timeline,
    peaks: dict[str, float],
    capacity: dict[str, float],
    task: Task,
    known: Known | None,
) -> Bottleneck:
    fullest = max(peaks, key=lambda d: peaks[d] / capacity[d])
    fullness = peaks[fullest] / capacity[fullest]
    if fullness > FULL and task.layout is None and _memory_binds(table, found, timeline, task, known):
        names = _told([d for d in peaks if peaks[d] / capacity[d] > FULL])
        return Bottleneck(
            "memory", fullest, fullness, f"more memory on {names}, recomputation, or smaller formats"
        )
    step_s = max(timeline.step_s, 1e-30)
    devices = found.used_devices
    slowest = max(range(len(devices)), key=lambda r: timeline.busy_share[r])
    busy, idle = timeline.busy_share[slowest], timeline.bubble_share
    sends = [(s + r) / step_s for s, r in zip(timeline.send_s, timeline.reduce_s, strict=True)]
    chatty = max(range(len(devices)), key=lambda r: sends[r])
    compute = Bottleneck("compute", devices[slowest], busy, _faster_devices(devices, timeline))
    if busy >= max(idle, sends[chatty]):
        return compute
    mended_s, link = _without_links(table, found, schedule)
    linked = 1 - mended_s / step_s
    if linked >= max(busy, idle - linked):
        return Bottleneck("link", devices[chatty], linked, link)
    if busy >= idle - linked:
        return compute
    relief = "a larger batch, for more microbatches, or more memory, for fewer stages"
    return Bottleneck("bubble", devices[slowest], idle - linked, relief)


def _faster_devices(devices: Sequence[str], timeline: Timeline) -> str:
    """Where only some are as busy as the busiest, one faster device in the place of any is no help."""
    most = max(timeline.busy_share)
    names = [d for d, busy in zip(devices, timeline.busy_share, strict=True) if busy >= NEARLY * most]
    if len(names) == 1:
        return f"a faster device in place of {names[0]}"
    return f"faster devices in place of {_told(names)}, or more devices"


def _told(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _without_links(table: CostTable, found: Partition, schedule: Schedule) -> tuple[float, str]:
    """The step of the plan if those links took no time that cost it most, and which they are."""
    topology = table.topology
    between = {pair: _faster(link) for pair, link in topology.between.items()}
    inside = {node: _faster(link) for node, link in topology.inside.items()}
    nodes = Counter(topology.node_of[d] for d in found.used_devices)
    several = [node for node, number in nodes.items() if number > 1]
    words = f"faster links inside nodes {_told(several)}"
    mended = {
        "a faster network between nodes": replace(
            topology, network=_faster(topology.network), between=between
        ),
        words if len(several) > 1 else f"a faster link inside node {''.join(several)}": replace(
            topology, inside=inside
        ),
    }
    steps = (
        (simulate(schedule, timing_of(replace(table, topology=links), found)).step_s, words)
        for words, links in mended.items()
    )
    return min(steps)


def _faster(link: LinkCost) -> LinkCost:
    return LinkCost(link.latency_s / FASTER, link.bytes_per_s * FASTER)


def _memory_binds(
    table: CostTable, found: Partition, timeline: Timeline, task: Task, known: Known | None
) -> bool:
    """Whether devices with memory without end would make the step notably shorter.

    Asked once for scenarios that differ in their links alone.
    """
    if known is not None and known.memory_binds is not None:
        return known.memory_binds
    endless = tuple(replace(c, memory_bytes=c.memory_bytes * 1e3) for c in table.device_classes)
    try:
        freed = partition(
            replace(table, device_classes=endless),
            gap=max(task.gap, FREE_MEMORY_GAIN),
            time_limit_s=task.time_limit_s / 4,
            schedule=searched(task.schedule),
            microbatches=task.microbatches,
            # Only what is shorter is of interest.
            incumbent=(found.pipelines, found.schedule) if has_formula(found.schedule) else None,
        )
        binds = freed.objective_s < min(found.objective_s, timeline.step_s) * (1 - FREE_MEMORY_GAIN)
    except (InfeasibleError, ValueError):
        binds = False
    if known is not None:
        known.memory_binds = binds
    return binds
