"""One scenario from its cost table to its numbers. Needs no torch, so that processes start fast."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from graphpar.cost import CostTable
from graphpar.errors import InfeasibleError
from graphpar.partition.baselines import one_device
from graphpar.partition.bounds import least_bytes
from graphpar.partition.pipeline import partition
from graphpar.partition.settings import Microbatches, ScheduleWish, searched
from graphpar.partition.types import Partition
from graphpar.scenarios.known import Known, speed_of
from graphpar.scenarios.layouts import configured, recomputed
from graphpar.scenarios.regular import best_regular
from graphpar.scenarios.report import CUT_SHORT
from graphpar.scenarios.transfer import carried, marked
from graphpar.scenarios.types import Answer, Bottleneck, KnownPlan, Layout
from graphpar.schedule import build_schedule
from graphpar.schedule_choice import UnavailableScheduleError, choose_schedule
from graphpar.simulate import Timeline, simulate
from graphpar.simulated import certified, has_formula, simulated, stage_links
from graphpar.timing import timing_of
from graphpar.units import format_bytes

FULL = 0.95
"""A device fuller than this at its peak leaves the planner little choice."""

CHOICE_S = 2.0
"""Most seconds for trying schedules in one scenario."""

LEAST_EXPLAIN_S, MOST_EXPLAIN_S = 1.0, 10.0
"""Seconds to look for what would fit where nothing does: as long as the search, within these."""

SEARCH_SHARE = 0.4
"""Of a scenario's time, for the search at least, however long other plans were looked at before."""

LOOKED = 2
"""Scenarios of other links alone in which equal pipelines are tried."""

FREE_MEMORY_GAIN = 0.02
"""If memory without limit would shorten the step by more than this, memory is the bottleneck."""


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


def solve(task: Task, known: Known | None = None) -> Answer:
    """The plan of one scenario and what it promises; nothing fitting is an answer too.

    `known` is what scenarios solved before say about this one.
    """
    began_s = time.monotonic()
    table = task.searched_table
    try:
        answer = answer_of(task, _best(table, task, known), known)
    except InfeasibleError as error:
        answer = Answer("", status="infeasible", problem=str(error), batch=table.batch)
    except ValueError as error:
        answer = Answer("", status="invalid", problem=str(error), batch=table.batch)
    return replace(answer, seconds=time.monotonic() - began_s)


def _best(table: CostTable, task: Task, known: Known | None) -> Partition:
    """The plan found, or one of another scenario that is faster here."""
    began_s = time.monotonic()
    others = [found for plan in task.hints if (found := brought(task, plan)) is not None]
    if known is not None and task.layout is None:
        others += _played(table, task, known)
        known.seed(p for p in others if has_formula(p.schedule))
        proven = _unbeaten(table, others, known)
        if proven is not None:
            return proven
    others += _alone_found(table, task)
    known_s = min((_step_s(table, other) for other in others), default=math.inf)
    left_s = task.time_limit_s - (time.monotonic() - began_s)
    searched_for_s = max(left_s, SEARCH_SHARE * task.time_limit_s)
    try:
        best = _found(table, replace(task, time_limit_s=searched_for_s), known, known_s)
    except InfeasibleError:
        if not others:
            raise
        best, others = _sound(table, others[0]), others[1:]
    best_s = _step_s(table, best) if others else 0.0
    for other in others:
        step_s = _step_s(table, other)
        if step_s < best_s:
            best, best_s = _in_family_of(best, _sound(table, other), step_s), step_s
    if known is not None and task.layout is None and not has_formula(best.schedule):
        known.keep(KnownPlan(best.pipelines, best.schedule, table.batch))
    return best


def _alone_found(table: CostTable, task: Task) -> list[Partition]:
    """The best single device, which a search cut short may miss; none where more was asked for."""
    free = task.layout is None and task.microbatches == "auto"
    if not free or not (task.schedule == "auto" or has_formula(task.schedule)):
        return []
    found = _one_device(table, task)
    return [found] if found is not None else []


def _step_s(table: CostTable, plan: Partition) -> float:
    """What the plan takes when it is played through, as one without a formula has been."""
    if not has_formula(plan.schedule):
        return plan.objective_s
    return simulated(table, plan.pipelines, plan.schedule, plan.paces or None).step_s


def _sound(table: CostTable, plan: Partition) -> Partition:
    """The plan with its lists checked and bounded."""
    return plan if has_formula(plan.schedule) else replace(certified(table, plan), truncated_by=())


def _unbeaten(table: CostTable, others: Sequence[Partition], known: Known) -> Partition | None:
    """A plan that no search can beat: it is as fast as the bound on all that would be searched."""
    searched_s = known.bound_s(table.topology)
    played = [(_step_s(table, p), p) for p in others] if searched_s else []
    step_s, fastest = min(played, key=lambda item: item[0], default=(math.inf, None))
    if fastest is None or step_s > searched_s:
        return None
    best = _sound(table, fastest)
    proven_s = searched_s if has_formula(best.schedule) else 0.0
    bound_s = min(max(proven_s, best.physical_bound_s), step_s)
    return replace(best, bound_s=bound_s, gap=(step_s - bound_s) / step_s if step_s > 0 else 0.0)


def _in_family_of(found: Partition, other: Partition, step_s: float) -> Partition:
    """A plan that was played through, with what the search proved about its family.

    Of schedules without a formula the search proved nothing: they have the bound on any order of work.
    """
    proven_s = found.bound_s if has_formula(other.schedule) else 0.0
    bound_s = min(max(proven_s, other.physical_bound_s), step_s)
    gap = (step_s - bound_s) / step_s if step_s > 0 else 0.0
    cut, family = found.truncated_by, found.family
    return replace(other, bound_s=bound_s, gap=gap, truncated_by=cut, family=family)


def _played(table: CostTable, task: Task, known: Known) -> list[Partition]:
    """Plans known by playing them through, among them the best of those that people write down.

    The latter are looked for over the fastest and the slowest links.
    """
    if known.looked < LOOKED:
        known.looked += 1
        limit_s = min(task.time_limit_s, CHOICE_S)
        plan = best_regular(table, task.schedule, time.monotonic() + limit_s)
        if plan is not None:
            known.keep(plan)
    made = (carried(table, plan, again=False, check=False) for plan in known.played)
    wanted = task.microbatches
    return [
        p
        for p in made
        if p is not None and (wanted == "auto" or all(q.microbatches == wanted for q in p.pipelines))
    ]


def brought(task: Task, plan: KnownPlan) -> Partition | None:
    """Another scenario's plan in this one; None where it cannot be had or was not asked for."""
    if task.schedule not in ("auto", plan.schedule) or task.layout is not None:
        return None
    found = carried(task.searched_table, plan, again=task.again)
    if found is None or task.microbatches == "auto":
        return found
    return found if all(p.microbatches == task.microbatches for p in found.pipelines) else None


def _found(table: CostTable, task: Task, known: Known | None, known_s: float) -> Partition:
    """The configuration asked for, or what a search finds; `known_s` is the step of a plan at hand."""
    if task.layout is not None:
        recompute = task.again and task.grouped
        found = configured(table, task.layout, searched(task.schedule), task.microbatches, recompute)
        named = task.schedule in ("interleaved", "zero-bubble")
        return _scheduled(table, found, task) if named else found
    found = _searched(table, task, known, known_s)
    if known is None:
        return _scheduled(table, found, task, known_s)
    known.note(table, found)
    if known.schedule is None:
        scheduled = _scheduled(table, found, task, known_s)
        known.schedule = scheduled.schedule
        known.tried.add(found.pipelines)
        return scheduled
    if task.schedule == "auto" and found.pipelines in known.tried:
        # Their best order is among the plans played through.
        return found
    known.tried.add(found.pipelines)
    # What was best with other links is tried, nothing else.
    if known.schedule == found.schedule or task.schedule != "auto":
        return _scheduled(table, found, task) if task.schedule != "auto" else found
    again = replace(task, schedule=known.schedule, time_limit_s=CHOICE_S)
    other = _scheduled(table, found, again)
    return min(found, other, key=lambda p: simulated(table, p.pipelines, p.schedule).step_s)


def _searched(table: CostTable, task: Task, known: Known | None, known_s: float) -> Partition:
    """The plan found by a search, or by others where that is good enough or there is no time."""
    before = known.best(table) if known is not None else None
    if before is not None and (before.gap <= task.gap or task.time_limit_s < LEAST_SEARCH_S):
        return before
    found = partition(
        table,
        gap=task.gap,
        time_limit_s=task.time_limit_s,
        schedule=searched(task.schedule),
        microbatches=task.microbatches,
        incumbent=(before.pipelines, before.schedule) if before is not None else None,
        explain_s=min(max(task.time_limit_s, LEAST_EXPLAIN_S), MOST_EXPLAIN_S),
        simple_plans=known_s == math.inf,
    )
    return known.improved(table, found) if known is not None else found


def _scheduled(table: CostTable, found: Partition, task: Task, known_s: float = math.inf) -> Partition:
    """The plan under the schedule wished for, or as it is with a note why not."""
    try:
        return choose_schedule(
            table,
            found,
            task.schedule,
            task.microbatches,
            time_limit_s=min(task.time_limit_s, CHOICE_S),
            cutoff_s=known_s if task.schedule == "auto" else math.inf,
        )
    except UnavailableScheduleError as error:
        note = f"{task.schedule} was asked for but cannot be had: {error}"
        return replace(found, notes=(*found.notes, note))


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
    alone = _alone(table, task)
    least = min(headroom, key=headroom.__getitem__)
    fits = headroom[least] >= 0
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
        bottleneck=_bottleneck(table, found, timeline, peaks, capacity, task, known),
        headroom_bytes=headroom,
        used=used,
        left_out=tuple(d for d in everyone if d not in headroom),
        shape=_shape(found),
        remarks=_remarks(found, task),
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
    found = _one_device(table, task)
    return (found.used_devices[0], found.objective_s) if found is not None else None


def _one_device(table: CostTable, task: Task) -> Partition | None:
    if least_bytes(table) + table.reserved_bytes > max(c.memory_bytes for c in table.device_classes):
        return None
    try:
        return one_device(table, schedule=searched(task.schedule), microbatches="auto")
    except (InfeasibleError, ValueError):
        return None


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
    timeline: Timeline,
    peaks: dict[str, float],
    capacity: dict[str, float],
    task: Task,
    known: Known | None,
) -> Bottleneck:
    fullest = max(peaks, key=lambda d: peaks[d] / capacity[d])
    fullness = peaks[fullest] / capacity[fullest]
    if fullness > FULL and task.layout is None and _memory_binds(table, found, timeline, task, known):
        return Bottleneck(
            "memory", fullest, fullness, f"more memory on {fullest}, recomputation, or smaller formats"
        )
    step_s = max(timeline.step_s, 1e-30)
    devices = found.used_devices
    slowest = max(range(len(devices)), key=lambda r: timeline.busy_share[r])
    busy = timeline.busy_share[slowest]
    sends = [s + r for s, r in zip(timeline.send_s, timeline.reduce_s, strict=True)]
    chatty = max(range(len(devices)), key=lambda r: sends[r])
    if busy >= max(sends[chatty] / step_s, timeline.bubble_share):
        return Bottleneck(
            "compute", devices[slowest], busy, f"a faster device in place of {devices[slowest]}"
        )
    if sends[chatty] / step_s >= timeline.bubble_share:
        node = table.topology.node_of[devices[chatty]]
        return Bottleneck(
            "link", devices[chatty], sends[chatty] / step_s, _faster_link(table, node, found)
        )
    return Bottleneck(
        "bubble",
        devices[slowest],
        timeline.bubble_share,
        "more microbatches: a larger batch, or fewer stages",
    )


def _faster_link(table: CostTable, node: str, found: Partition) -> str:
    nodes = {table.topology.node_of[d] for d in found.used_devices}
    return f"a faster link inside node {node}" if len(nodes) == 1 else "a faster network between nodes"


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
            gap=max(task.gap, 0.01),
            time_limit_s=task.time_limit_s / 4,
            schedule=searched(task.schedule),
            microbatches=task.microbatches,
        )
        binds = freed.objective_s < min(found.objective_s, timeline.step_s) * (1 - FREE_MEMORY_GAIN)
    except (InfeasibleError, ValueError):
        binds = False
    if known is not None:
        known.memory_binds = binds
    return binds


def solve_together(tasks: Sequence[Task]) -> list[Answer]:
    """Scenarios that differ in their links alone, in one process, each from what the others found.

    The fastest links come first, with most of the time, since no plan over slower ones beats their bound;
    then the slowest; then whichever is least certain. What is left without time takes the best plan of
    the others.
    """
    if len(tasks) == 1:
        return [solve(tasks[0], Known())]
    left_s = sum(task.time_limit_s for task in tasks)
    waiting = sorted(range(len(tasks)), key=lambda i: -speed_of(tasks[i].table.topology))
    known, answers = Known(), dict[int, Answer]()
    while waiting:
        if len(answers) < 2:
            number = waiting[-len(answers)]
        else:
            number = max(waiting, key=lambda i: known.gap(tasks[i].table))
        waiting.remove(number)
        share_s = left_s * SHARES[len(answers)] if len(answers) < len(SHARES) else left_s / 2
        began_s = time.monotonic()
        answers[number] = solve(replace(tasks[number], time_limit_s=max(share_s, 1e-3)), known)
        left_s -= time.monotonic() - began_s
    return [answers[number] for number in range(len(tasks))]


SHARES = (0.6, 0.5)
"""Of the time left, for the scenario with the fastest links and then for that with the slowest."""
LEAST_SEARCH_S = 0.1
"""A search shorter than this finds nothing that other scenarios' plans do not give."""
