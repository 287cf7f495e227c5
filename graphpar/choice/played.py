"""One device, or another plan at hand, where that is shorter than the plan found when both are played.

The formula by which plans are searched leaves things out that the simulator plays: what workers on the
same cores cost each other, sums of weights that several stages read, replicas that start one after
another. A plan over several devices that is best by the formula may so take longer than one device does.
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

import numpy as np

from graphpar.choice.comparison import in_family_of, step_of
from graphpar.choice.orders import LEAST_GAIN, but_left_out, judged_s
from graphpar.cost import CostTable
from graphpar.errors import InfeasibleError
from graphpar.partition.check import check_partition
from graphpar.partition.handmade import Tried, one_device, simple_plans
from graphpar.partition.partition_words import idle_note
from graphpar.partition.settings import Microbatches, ScheduleWish, searched
from graphpar.partition.types import ROUNDING, Partition
from graphpar.schedule.simulated import has_formula, simulated
from graphpar.units import format_seconds

NO_GAIN = 0.02
"""A plan that is faster than one device by less than this is not worth the devices."""

BY_FORMULA = "formula: plans were compared as they are played through, the bound is of their formula"
"""What cut the search short of a plan that is longer by its formula and was taken all the same."""

_STAGED = ("interleaved", "zero-bubble")
"""Who asks for these asks for several stages."""

_MOST_FORWARDS = 10_000
"""A plan with more forwards of stages is not played through for this, ..."""

_FEW_FORWARDS = 2_000
"""... nor are others with more than so many, each of which takes up to 0.03 s."""

_MOST_LONGER = 2.0
"""Without shared cores, and weights that several stages sum, no plan takes so many times what its formula
says: 1.31 times was the most in 234 drawn tables of up to four devices."""


def best_played(
    table: CostTable,
    plan: Partition,
    found: Partition,
    wish: ScheduleWish = "auto",
    microbatches: Microbatches = "auto",
) -> Partition:
    """The plan, or another one at hand that is shorter when both are played through.

    Others are the best single device, plans that lost, and simple plans: where workers are crowded on the
    cores of this machine over as many as there are cores, where stages may share weights over all, over
    those of a kind, and over those of a node.
    As plans over several devices cost the gap that was proven, they have to be as much shorter as another
    order of work. A plan that is kept though one device is as good says so.

    Args:
        table: What the plan was made for.
        plan: The plan, as it would be taken.
        found: What the search found: what it proved of its family holds for the others.
        wish: A schedule, or `auto`. One that needs several stages is kept.
        microbatches: The number that was fixed, if any.
    """
    if len(plan.used_devices) == 1 and not has_formula(plan.schedule) and wish not in _STAGED:
        # One device takes as long in any order of work, and has a worse certificate in this one.
        plan = found
    if len(plan.used_devices) == 1 or _forwards(plan) > _MOST_FORWARDS:
        return plan
    tried = Tried(searched(wish), microbatches, physical_s=found.physical_bound_s)
    hopeful = [p for p in _at_hand(table, found, tried) if _may_be_shorter(table, p, plan)]
    if not hopeful:
        return plan
    plan_s = step_of(table, plan)
    best, best_s, as_good = plan, judged_s(plan_s, plan.schedule), ""
    several_s = best_s * (1 - LEAST_GAIN)
    for other in hopeful:
        alone = len(other.used_devices) == 1
        # More devices than one that is taken have to be worth it, and another one has to be faster.
        taken_alone = len(best.used_devices) == 1
        worth_s = best_s * (1 - NO_GAIN) if taken_alone else best_s
        most_s = best_s if alone else min(worth_s, several_s)
        most_s *= 1 + ROUNDING if alone and not taken_alone else 1 - ROUNDING
        if other.pipelines == plan.pipelines:
            continue
        played = simulated(table, other.pipelines, other.schedule)
        if not played.fits(table):
            continue
        if played.step_s < most_s and wish not in _STAGED:
            best, best_s = other, played.step_s
        elif alone and played.step_s <= plan_s * (1 + NO_GAIN):
            as_good = as_good or no_gain(other.used_devices[0], played.step_s)
    if best is plan:
        return _said(plan, as_good) if as_good else plan
    return _taken_instead(table, best, plan, found)


def no_gain(device: str, step_s: float) -> str:
    """What is said where one device does as well as a plan over several."""
    return f"no gain: use one device; {device} alone takes {format_seconds(step_s)} per step"


def _said(plan: Partition, words: str) -> Partition:
    return replace(plan, notes=(*plan.notes, words))


def _at_hand(table: CostTable, found: Partition, tried: Tried) -> Iterator[Partition]:
    """Plans with a formula: one device, simple ones where the formula leaves much out, what lost."""
    with suppress(InfeasibleError, ValueError):
        yield one_device(table, tried)
    few = _for_cores(table)
    # Pipelines that have to sum weights of several stages may be longer than any single stage.
    for devices in [few] if few else _sum_fast(table) if table.repeated else ():
        simple = simple_plans(table, replace(tried, devices=devices))
        yield from (p for p in simple if len(p.used_devices) > 1)
    yield from (p for p in found.runners_up if has_formula(p.schedule))


def _for_cores(table: CostTable) -> tuple[str, ...]:
    """All devices but the slowest workers on this machine beyond what its cores can serve at once.

    Empty where they serve all, or one alone.
    """
    shared = table.shared
    if shared is None:
        return ()
    busy, kept = 0.0, []
    for name in sorted(shared.workers, key=lambda name: shared.workers[name].slowdown):
        use = shared.workers[name]
        busy += use.cores / use.slowdown
        if busy <= shared.num_cores:
            kept.append(name)
    left_out = shared.workers.keys() - {*kept}
    rest = tuple(d for d in table.class_of if d not in left_out)
    return rest if left_out and len(rest) > 1 else ()


def _sum_fast(table: CostTable) -> Iterator[tuple[str, ...]]:
    """Devices that may sum what several of them hold: all, those of a kind, those of a node.

    The latter have the fastest links for it. Nodes of like devices and links count as one.
    """
    topology, nodes = table.topology, dict[str, list[str]]()
    for device in table.class_of:
        nodes.setdefault(topology.node_of[device], []).append(device)
    unlike: dict[object, tuple[str, ...]] = {}
    for node, own in nodes.items():
        kinds = tuple(sorted(table.class_of[d] for d in own))
        unlike.setdefault((kinds, topology.inside[node]), tuple(own))
    alike = (own.devices for own in table.device_classes)
    sets = dict.fromkeys((tuple(table.class_of), *alike, *unlike.values()))
    yield from (devices for devices in sets if len(devices) > 1)


def _may_be_shorter(table: CostTable, other: Partition, plan: Partition) -> bool:
    """Whether it is worth playing both through."""
    if _forwards(other) > _FEW_FORWARDS:
        return False
    unbounded = table.shared is not None or bool(table.repeated)
    return unbounded or other.objective_s < _MOST_LONGER * plan.objective_s


def _forwards(plan: Partition) -> int:
    return sum(p.microbatches * len(p.stages) for p in plan.pipelines)


def _taken_instead(table: CostTable, best: Partition, plan: Partition, found: Partition) -> Partition:
    """A plan that is shorter than another one played through, with what is to be known of it."""
    used = len(best.used_devices)
    taken = f"{best.used_devices[0]} alone was" if used == 1 else f"a plan over {used} devices was"
    plan_s, best_s = step_of(table, plan), step_of(table, best)
    crowds = table.shared is not None and plan_s > plan.objective_s * (1 + NO_GAIN)
    told = (
        f"{taken} taken: played through, a step takes {_both(best, best_s)}, and {_both(plan, plan_s)} "
        f"under the plan over {len(plan.used_devices)} devices that was found"
        f"{_kept_short(plan) * (plan_s < best_s)}{_of_cores(table) * crowds}"
    )
    idle = _idle(table, best, plan)
    if plan_s < best_s:
        idle = [note.partition(";")[0] for note in idle]
    notes = (*but_left_out(found.notes, best, plan), *idle, told)
    made = in_family_of(found, best, notes)
    check_partition(table, made)
    if made.gap > found.gap:
        made = replace(made, truncated_by=(*made.truncated_by, BY_FORMULA))
    return replace(made, runners_up=(replace(plan, runners_up=()), *found.runners_up[:2]))


def _both(plan: Partition, step_s: float) -> str:
    """A step as it is played through, and by the formula where that says something else."""
    played, formula = format_seconds(step_s), format_seconds(plan.objective_s)
    return played if played == formula else f"{played} ({formula} by the formula)"


def _kept_short(plan: Partition) -> str:
    """Why a plan without a formula is not taken though it is shorter."""
    return (
        f"; its order of work, {plan.schedule}, has no formula and so must be {100 * LEAST_GAIN:.0f} % "
        f"shorter; schedule={plan.schedule} takes it as it is"
    )


def _of_cores(table: CostTable) -> str:
    """What the formula leaves out, and what no plan can do about it."""
    told, shared = "; the formula leaves out what workers on the same cores cost each other", table.shared
    if shared is None or shared.workers.keys() != table.class_of.keys():
        return told
    least_s = np.full(len(table.costs), np.inf)
    for number, own in enumerate(table.device_classes):
        use = shared.workers[own.devices[0]]
        each_s = table.both_s[:, :, number] / np.array(table.sizes)[:, None]
        least_s = np.minimum(least_s, each_s.min(axis=0) * use.threads / use.slowdown)
    busy_s = table.batch * float(least_s[list(table.units)].sum()) / shared.num_cores
    return f"{told}, which computing keeps busy for {format_seconds(busy_s)} under any plan"


def _idle(table: CostTable, best: Partition, plan: Partition) -> list[str]:
    same = set(best.used_devices) == set(plan.used_devices)
    return [] if same else idle_note(table, best.pipelines)
