"""Plans over all devices, where a search was over some of them only."""

import time
from collections.abc import Sequence
from dataclasses import replace

from graphpar.cost import CostTable
from graphpar.errors import InfeasibleError
from graphpar.partition.check import check_partition
from graphpar.partition.handmade import Tried, priced_plan, simple_plans
from graphpar.partition.partition_words import idle_note, table_notes
from graphpar.partition.search import INFINITY
from graphpar.partition.types import ROUNDING, Partition, PipelineChoice, ScheduleName

CUT = "devices: the search was over some of them, and of others only plans at hand were tried"
"""What a plan says after such a search, unless no plan of any kind is shorter."""

_FEW_DEVICES = 64
"""Over so many simple plans take a second at most, which they always have."""

_GRACE_S = 0.5
"""How long they may take over more devices where there is no other plan: better late than none."""


def without_search(
    table: CostTable,
    reason: str,
    known: tuple[Sequence[PipelineChoice], ScheduleName] | None,
    tried: Tried,
    physical_s: float,
    began_s: float,
) -> Partition:
    """The best plan at hand where nothing can be searched; arguments as those of `with_all_devices`.

    Raises:
        InfeasibleError: None of them fits.
    """
    best = with_all_devices(table, None, f"nothing, for {reason}", known, tried, physical_s, began_s)
    if best is None:
        raise InfeasibleError(f"none of the plans at hand fits, and {reason}", limit="units")
    best = replace(best, truncated_by=(f"units: {reason}",))
    check_partition(table, best)
    return best


def few_devices(table: CostTable) -> bool:
    """Whether simple plans take a second at most."""
    return len(table.class_of) <= _FEW_DEVICES


def simple_until_s(table: CostTable, deadline_s: float, any_plan: bool) -> float:
    """When to stop pricing simple plans."""
    if few_devices(table):
        return INFINITY
    return deadline_s if any_plan else max(deadline_s, time.monotonic() + _GRACE_S)


def with_all_devices(
    table: CostTable,
    found: Partition | None,
    family: str,
    known: tuple[Sequence[PipelineChoice], ScheduleName] | None,
    tried: Tried | None,
    physical_s: float,
    began_s: float,
) -> Partition | None:
    """What a search over some devices found, or a plan over all of them that is better.

    The latter's bound is that on plans of any kind: what the search proved holds for its own devices, so
    that neither is told to be optimal for it.

    Args:
        table: All devices; it was checked.
        found: The best plan over some, if any fits there.
        family: What was searched, in words.
        known: A plan known before, which fits.
        tried: What simple plans are asked for, if any; the deadline is for many devices with a plan.
        physical_s: The physical bound of the table.
        began_s: `time.monotonic()` when the search began.
    """
    others = [] if known is None else [priced_plan(table, *known, physical_s)]
    if tried is not None:
        until_s = simple_until_s(table, tried.deadline_s, found is not None or known is not None)
        below_s = min((p.objective_s for p in (found, *others) if p is not None), default=INFINITY)
        few = replace(tried, deadline_s=until_s, below_s=below_s, physical_s=physical_s)
        others += simple_plans(table, few)
    best = min(others, key=lambda p: p.objective_s, default=None)
    if found is not None and (best is None or best.objective_s >= found.objective_s):
        if found.objective_s <= physical_s * (1 + ROUNDING):
            return found
        return replace(found, status="feasible", truncated_by=(*found.truncated_by, CUT))
    if best is None:
        return None
    cut = (*found.truncated_by, CUT) if found is not None else (CUT,)
    words = f"plans over all devices that were at hand; the search was over: {family}"
    notes = (*idle_note(table, best.pipelines), *table_notes(table))
    seconds = time.monotonic() - began_s
    return replace(best, truncated_by=cut, family=words, notes=notes, seconds=seconds)
