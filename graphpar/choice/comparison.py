"""Two plans against each other, and what is proven of one that was not searched for."""

from dataclasses import replace

from graphpar.choice.orders import judged_s
from graphpar.cost import CostTable
from graphpar.partition.certificate import BEYOND, certificate, family_note
from graphpar.partition.fewer_devices import is_of_some_devices
from graphpar.partition.types import Partition
from graphpar.schedule.simulated import has_formula, simulated


def is_better(table: CostTable, mine: Partition, other: Partition) -> bool:
    """Whether a plan is to be taken instead of another one.

    Two plans with a formula are compared by it, for that is what bounds are proven of; otherwise they
    are as they are played through.
    """
    if has_formula(mine.schedule) and has_formula(other.schedule):
        return mine.objective_s < other.objective_s
    mine_s, other_s = (judged_s(step_of(table, p), p.schedule) for p in (mine, other))
    return mine_s < other_s


def step_of(table: CostTable, plan: Partition) -> float:
    """What the plan takes when it is played through, as one without a formula has been."""
    if not has_formula(plan.schedule):
        return plan.objective_s
    return simulated(table, plan.pipelines, plan.schedule, plan.paces or None).step_s


def in_family_of(found: Partition, other: Partition, notes: tuple[str, ...] | None = None) -> Partition:
    """A plan that was not searched for, with what the search proved about its family.

    Of schedules without a formula the search proved nothing, nor, where it was over a part of the
    devices, of plans that may use others, nor of one that is shorter than what it proved: they have
    the bound on plans of any kind.

    Args:
        found: What the search ended with.
        other: Another plan, checked and with that bound.
        notes: What is said of it, unless its own notes are.
    """
    covered = has_formula(other.schedule) and not is_of_some_devices(found.family)
    known = certificate(other.objective_s, found.bound_s if covered else 0.0, other.physical_bound_s)
    family, cut = found.family, found.truncated_by
    if known.beyond:
        notes = (*(other.notes if notes is None else notes), family_note(found.bound_s))
    if known.beyond or not covered:
        family = f"plans of any kind, any order of work; the search was over: {family}"
        part = "devices" if has_formula(other.schedule) else "schedule"
        beyond = f"{part}: no bound is known but that on plans of any kind"
        cut = (*cut, BEYOND if known.beyond else beyond)
    return replace(
        other,
        status=known.status,
        bound_s=known.bound_s,
        gap=known.gap,
        seconds=found.seconds,
        truncated_by=cut,
        family=family,
        notes=other.notes if notes is None else notes,
    )
