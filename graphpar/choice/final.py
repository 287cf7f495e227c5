"""Which plan is taken in the end: what the search found, another order of its work, or like pipelines.

`plan`, `compile` and what-if questions all choose here, so that they answer the same question alike. A
plan in a schedule without a formula has to be shorter by `orders.LEAST_GAIN`, wherever it comes
from. One with a formula is covered by the search, and is tried only where that was cut short, or was
over a part of the devices. At last a plan over several devices is compared with one device, both played
through (`played`).
"""

import math
import time
import warnings
from dataclasses import replace

from graphpar.choice.comparison import in_family_of, is_better, step_of
from graphpar.choice.like_pipelines import best_like, has_likes
from graphpar.choice.orders import (
    UnavailableScheduleError,
    but_left_out,
    choose_schedule,
    judged_s,
)
from graphpar.choice.played import best_played
from graphpar.cost import CostTable
from graphpar.errors import InfeasibleError
from graphpar.partition.fewer_devices import is_of_some_devices
from graphpar.partition.handmade import priced_plan
from graphpar.partition.settings import Microbatches, ScheduleWish
from graphpar.partition.types import Partition
from graphpar.schedule.simulated import Simulated, certified, has_formula
from graphpar.units import format_percent, format_seconds

CHOICE_S = 5.0
"""Most seconds for trying other orders of work, and as many for like pipelines."""


def choose_plan(
    table: CostTable,
    found: Partition,
    wish: ScheduleWish = "auto",
    microbatches: Microbatches = "auto",
    *,
    time_limit_s: float = CHOICE_S,
    cutoff_s: float = math.inf,
) -> Partition:
    """What the search found, in the order that makes it shortest, or a better plan of like pipelines.

    Args:
        table: What the partition was made for.
        found: What the search found for 1F1B or GPipe.
        wish: A schedule, or `auto`.
        microbatches: The number that was fixed, if any.
        time_limit_s: Seconds after which nothing new is tried, for either.
        cutoff_s: Other orders of work that cannot be shorter than this are not played through.

    Raises:
        UnavailableScheduleError: The schedule asked for cannot be had on these devices; says why.
        InfeasibleError: It does not fit into memory in any way that was tried.
    """
    ordered = _in_best_order(table, found, wish, microbatches, time_limit_s, cutoff_s)
    return best_played(table, ordered, found, wish, microbatches)


def scheduled(
    table: CostTable,
    found: Partition,
    wish: ScheduleWish,
    microbatches: Microbatches,
    *,
    time_limit_s: float,
) -> Partition:
    """The partition under the schedule wished for; where that cannot be had, as it is, and it is said."""
    try:
        return choose_plan(table, found, wish, microbatches, time_limit_s=time_limit_s)
    except UnavailableScheduleError as error:
        warnings.warn(
            f"Training(schedule={wish!r}) is ignored: {error}. The schedule is {found.schedule}.",
            stacklevel=6,
        )
        return replace(found, notes=(*found.notes, f"{wish} was asked for but cannot be had: {error}"))


def _in_best_order(
    table: CostTable,
    found: Partition,
    wish: ScheduleWish,
    microbatches: Microbatches,
    time_limit_s: float,
    cutoff_s: float,
) -> Partition:
    """What the search found in its best order of work, or like pipelines."""
    like = _like(table, found, wish, microbatches, time_limit_s)
    cutoff_s = cutoff_s if like is None else min(cutoff_s, like.step_s)
    try:
        chosen = choose_schedule(
            table, found, wish, microbatches, time_limit_s=time_limit_s, cutoff_s=cutoff_s
        )
    except InfeasibleError:
        if like is None:
            raise
        chosen = found
    if like is None:
        return chosen
    made = _sound(table, like.partition)
    if _fulfils(chosen, wish) and not is_better(table, made, chosen):
        return chosen
    best = in_family_of(found, made, like_notes(found, like))
    return replace(best, runners_up=(replace(found, runners_up=()), *found.runners_up[:2]))


def _like(
    table: CostTable,
    found: Partition,
    wish: ScheduleWish,
    microbatches: Microbatches,
    time_limit_s: float,
) -> Simulated | None:
    """The best plan of like pipelines that is to be taken instead of what was found, if there is one."""
    if len(table.class_of) == 1 or microbatches != "auto" or not has_likes(table):
        return None
    formulas = bool(found.truncated_by) or is_of_some_devices(found.family)
    cutoff_s = step_of(table, found) if _fulfils(found, wish) else math.inf
    least_s = found.physical_bound_s
    if (least_s if formulas else judged_s(least_s, "zero-bubble")) >= cutoff_s:
        return None
    until_s = time.monotonic() + time_limit_s
    return best_like(table, wish, until_s, formulas=formulas, cutoff_s=cutoff_s)


def _sound(table: CostTable, played: Partition) -> Partition:
    """The plan by its formula, or with its lists checked and bounded."""
    if has_formula(played.schedule):
        return priced_plan(table, played.pipelines, played.schedule)
    return replace(certified(table, played), truncated_by=())


def _fulfils(plan: Partition, wish: ScheduleWish) -> bool:
    return wish in ("auto", plan.schedule)


def like_notes(found: Partition, like: Simulated) -> tuple[str, ...]:
    """What is said of a plan of like pipelines: where it comes from, and what it was better than."""
    told = (
        f"like pipelines, as people write them down, take {format_seconds(like.step_s)}; the search "
        f"itself ended with {found.schedule}: {format_seconds(found.objective_s)} by its formula, proven "
        f"within {format_percent(found.gap)} of the best of its family"
    )
    return (*but_left_out(found.notes, like.partition, found), told)
