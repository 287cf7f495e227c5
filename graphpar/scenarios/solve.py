"""One scenario from its cost table to its numbers. Needs no torch, so that processes start fast."""

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from graphpar.choice.comparison import in_family_of, is_better, step_of
from graphpar.choice.final import CHOICE_S, choose_plan
from graphpar.choice.like_pipelines import best_like
from graphpar.choice.limits import BRIEF_S, PlanTime
from graphpar.choice.orders import UnavailableScheduleError, choose_schedule
from graphpar.choice.played import best_played
from graphpar.cost import CostTable
from graphpar.errors import InfeasibleError
from graphpar.partition.beside import nodes_beside
from graphpar.partition.certificate import BEYOND, certificate
from graphpar.partition.handmade import Tried, simple_plans
from graphpar.partition.pipeline import partition
from graphpar.partition.settings import schedules_of, searched
from graphpar.partition.types import Partition
from graphpar.scenarios.answering import answer_of
from graphpar.scenarios.known import Known, speed_of
from graphpar.scenarios.layouts import configured
from graphpar.scenarios.task import Task, alone_on_one, quarrels_of
from graphpar.scenarios.transfer import carried
from graphpar.scenarios.types import Answer, KnownPlan, Layout
from graphpar.schedule.simulated import certified, has_formula

ORDERS_S = 2.0
"""Most seconds for trying schedules in one of several scenarios that differ in their links alone."""

LEAST_EXPLAIN_S, MOST_EXPLAIN_S = 1.0, 10.0
"""Seconds to look for what would fit where nothing does: as long as the search, within these."""

FEW_DEVICES = 8
"""Up to so many a cluster's simple plans are priced in milliseconds."""

LOOKED = 2
"""Scenarios of other links alone in which equal pipelines are tried."""


def solve(task: Task, known: Known | None = None) -> Answer:
    """The plan of one scenario and what it promises; nothing fitting is an answer too.

    `known` is what scenarios solved before say about this one.
    """
    began_s = time.monotonic()
    table = task.searched_table
    try:
        found = _best(table, task, known)
        _check_formats(task, found)
        answer = answer_of(task, found, known)
    except _QuarrelError as quarrel:
        answer = Answer("", status="invalid", quarrels=quarrel.groups, batch=table.batch)
    except InfeasibleError as error:
        answer = Answer("", status="infeasible", problem=str(error), batch=table.batch)
    except ValueError as error:
        answer = Answer("", status="invalid", problem=str(error), batch=table.batch)
    return replace(answer, seconds=time.monotonic() - began_s)


class _QuarrelError(Exception):
    """A plan puts devices into a stage that have no format in common."""

    def __init__(self, groups: tuple[tuple[str, ...], ...]) -> None:
        super().__init__(groups)
        self.groups = groups


def _check_formats(task: Task, found: Partition) -> None:
    groups = quarrels_of(task, found)
    if groups:
        raise _QuarrelError(groups)


def _best(table: CostTable, task: Task, known: Known | None) -> Partition:
    """The configuration asked for, or the plan found, or one of another scenario that is better here."""
    if task.layout is not None:
        return _configured(table, task, task.layout)
    others = [found for plan in task.hints if (found := brought(task, plan)) is not None]
    if known is None and task.hurries:
        # What a short search has to beat.
        others += _beside_found(table, task)
    find = partial(_planned, table, task, others)
    if known is not None:
        others += _played(table, task, known)
        known.seed(p for p in others if has_formula(p.schedule))
        proven = _unbeaten(table, others, known)
        if proven is not None:
            return _or_played(table, proven, task)
        others += _alone_found(table, task)
        find = partial(_found_together, table, task, others, known)
    try:
        best = find()
    except InfeasibleError:
        if not others:
            raise
        best, others = _sound(table, others[0]), others[1:]
    found, best = best, _best_of(table, best, others)
    if known is not None or best is not found:
        best = _or_played(table, best, task)
    if known is not None and not has_formula(best.schedule):
        known.keep(KnownPlan(best.pipelines, best.schedule, table.batch))
    return best


def _or_played(table: CostTable, best: Partition, task: Task) -> Partition:
    """The plan, or one device where that is shorter, as `choose_plan` ends with it."""
    return best_played(table, best, best, task.schedule, task.microbatches)


def _best_of(table: CostTable, found: Partition, others: Sequence[Partition]) -> Partition:
    """What was found, or one of the others that is better, with what was proven."""
    best = found
    for other in others:
        if is_better(table, other, best):
            best = in_family_of(found, _sound(table, other))
    return best


def _planned(table: CostTable, task: Task, others: Sequence[Partition]) -> Partition:
    """A plan as `plan` and `compile` find it, from the best of the others on where there are any."""
    clock = PlanTime(task.time_limit_s)
    formulas = [p for p in others if has_formula(p.schedule)]
    start = min(formulas, key=lambda p: p.objective_s, default=None)
    search = partial(
        partition,
        table,
        gap=task.gap,
        schedule=searched(task.schedule),
        microbatches=task.microbatches,
        incumbent=(start.pipelines, start.schedule) if start is not None else None,
        explain_s=_explain_s(task),
    )
    found = clock.search(search)
    _check_formats(task, found)
    chosen = clock.choose(partial(_scheduled, table, found, task), CHOICE_S)
    return found if quarrels_of(task, chosen) else chosen


def _alone_found(table: CostTable, task: Task) -> list[Partition]:
    """The best single device, which a search cut short may miss; none where more was asked for."""
    free = task.microbatches == "auto"
    if not free or not (task.schedule == "auto" or has_formula(task.schedule)):
        return []
    found = alone_on_one(table, task)
    return [found] if found is not None else []


def _beside_found(table: CostTable, task: Task) -> list[Partition]:
    """Groups that hold the whole model, one node's beside the other's, where that is left open."""
    if task.microbatches != "auto" or not any(len(mode.members) > 1 for mode in table.modes):
        return []
    if task.schedule != "auto" and not has_formula(task.schedule):
        return []
    made = (
        nodes_beside(table, schedule) for schedule in schedules_of(table, searched(task.schedule))[:1]
    )
    return [found for found in made if found is not None and not quarrels_of(task, found)]


def _sound(table: CostTable, plan: Partition) -> Partition:
    """The plan with its lists checked and bounded."""
    return plan if has_formula(plan.schedule) else replace(certified(table, plan), truncated_by=())


def _unbeaten(table: CostTable, others: Sequence[Partition], known: Known) -> Partition | None:
    """A plan that no search can beat: it is as fast as the bound on all that would be searched."""
    searched_s = known.bound_s(table.topology)
    if not searched_s or not others:
        return None
    best = others[0]
    for other in others[1:]:
        best = other if is_better(table, other, best) else best
    step_s = step_of(table, best)
    if step_s > searched_s:
        return None
    best = _sound(table, best)
    proven = certificate(step_s, searched_s if has_formula(best.schedule) else 0.0, best.physical_bound_s)
    cut = (BEYOND,) if proven.beyond else best.truncated_by
    return replace(best, bound_s=proven.bound_s, gap=proven.gap, truncated_by=cut)


def _played(table: CostTable, task: Task, known: Known) -> list[Partition]:
    """Plans known by playing them through, among them the best of those that people write down.

    The latter are looked for over the fastest and the slowest links.
    """
    if known.looked < LOOKED:
        known.looked += 1
        limit_s = min(task.time_limit_s, ORDERS_S)
        like = best_like(table, task.schedule, time.monotonic() + limit_s)
        if like is not None:
            known.keep(KnownPlan(like.partition.pipelines, like.partition.schedule, table.batch))
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
    if found is None or quarrels_of(task, found):
        return None
    if task.microbatches == "auto":
        return found
    return found if all(p.microbatches == task.microbatches for p in found.pipelines) else None


def _configured(table: CostTable, task: Task, layout: Layout) -> Partition:
    """The configuration asked for, as given."""
    recompute = task.again and task.grouped
    found = configured(table, layout, searched(task.schedule), task.microbatches, recompute)
    if task.schedule not in ("interleaved", "zero-bubble"):
        return found
    return _ordered(table, found, task)


def _found_together(table: CostTable, task: Task, others: Sequence[Partition], known: Known) -> Partition:
    """What a search finds that goes on from those over other links, in the best order known."""
    known_s = min((step_of(table, other) for other in others), default=math.inf)
    task = replace(task, time_limit_s=max(task.time_limit_s, LEAST_SEARCH_S / 2))
    found = _searched(table, task, known, known_s)
    known.note(table, found)
    if known.schedule is None:
        scheduled = _ordered(table, found, task, known_s)
        known.schedule = scheduled.schedule
        known.tried.add(found.pipelines)
        return scheduled
    if task.schedule == "auto" and found.pipelines in known.tried:
        # Their best order is among the plans played through.
        return found
    known.tried.add(found.pipelines)
    # What was best with other links is tried, nothing else.
    if task.schedule != "auto":
        return _ordered(table, found, task)
    if known.schedule == found.schedule:
        return found
    other = _ordered(table, found, replace(task, schedule=known.schedule, time_limit_s=ORDERS_S))
    return other if is_better(table, other, found) else found


def _searched(table: CostTable, task: Task, known: Known, known_s: float) -> Partition:
    """The plan found by a search, or by others where that is good enough or there is no time."""
    before = known.best(table)
    if before is not None and (before.gap <= task.gap or task.time_limit_s < LEAST_SEARCH_S):
        return _or_simple(table, task, known, before) if _weighs_simple(table, known) else before
    found = partition(
        table,
        gap=task.gap,
        time_limit_s=task.time_limit_s,
        schedule=searched(task.schedule),
        microbatches=task.microbatches,
        incumbent=(before.pipelines, before.schedule) if before is not None else None,
        explain_s=_explain_s(task),
        compare_simple=known_s == math.inf or _weighs_simple(table, known),
    )
    return known.improved(table, found)


def _weighs_simple(table: CostTable, known: Known) -> bool:
    """Whether plans made without a planner are looked at; over many devices they take long to price, and
    like pipelines, where there was time to look for them, make them needless."""
    return not known.played or len(table.class_of) <= FEW_DEVICES


def _or_simple(table: CostTable, task: Task, known: Known, found: Partition) -> Partition:
    """The plan, or one that people make without a planner where it is shorter here."""
    simple = simple_plans(table, Tried(searched(task.schedule), task.microbatches))
    best = min(simple, key=lambda p: p.objective_s, default=found)
    return known.improved(table, best) if best.objective_s < found.objective_s else found


def _explain_s(task: Task) -> float:
    return min(max(task.time_limit_s, LEAST_EXPLAIN_S), MOST_EXPLAIN_S)


def _scheduled(table: CostTable, found: Partition, task: Task, time_limit_s: float) -> Partition:
    """What is taken in the end, as `plan` takes it, or what was found with a note why nothing else is."""
    brief = task.time_limit_s < BRIEF_S and task.schedule == "auto"
    cutoff_s = step_of(table, found) if brief else math.inf
    try:
        return choose_plan(
            table, found, task.schedule, task.microbatches,
            time_limit_s=time_limit_s, cutoff_s=cutoff_s,
        )  # fmt: skip
    except UnavailableScheduleError as error:
        return _unscheduled(found, task, error)


def _ordered(table: CostTable, found: Partition, task: Task, known_s: float = math.inf) -> Partition:
    """The stages found under the schedule wished for, or as they are with a note why not."""
    try:
        return choose_schedule(
            table,
            found,
            task.schedule,
            task.microbatches,
            time_limit_s=min(task.time_limit_s, ORDERS_S),
            cutoff_s=known_s if task.schedule == "auto" else math.inf,
        )
    except UnavailableScheduleError as error:
        return _unscheduled(found, task, error)


def _unscheduled(found: Partition, task: Task, error: UnavailableScheduleError) -> Partition:
    note = f"{task.schedule} was asked for but cannot be had: {error}"
    return replace(found, notes=(*found.notes, note))


def solve_together(tasks: Sequence[Task]) -> list[Answer]:
    """Scenarios that differ in their links alone, in one process, each from what the others found.

    The fastest links come first, with most of the time, since no plan over slower ones beats their bound;
    then the slowest; then whichever is least certain. What is left without time takes the best plan of
    the others.
    """
    if len(tasks) == 1:
        return [solve(tasks[0])]
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
