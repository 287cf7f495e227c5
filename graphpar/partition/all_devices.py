"""Simple plans over all devices, where a search was over some of them only."""

import time
from dataclasses import replace

from graphpar.cost import CostTable
from graphpar.partition.handmade import Tried, simple_plans
from graphpar.partition.search import INFINITY
from graphpar.partition.types import Partition

CUT = "devices: the search was over some of them, and of others only simple plans were tried"
"""What a plan says that stands outside of what was searched."""

_FEW_DEVICES = 64
"""Over so many simple plans take a second at most, which they always have."""

_GRACE_S = 0.5
"""How long they may take over more devices where there is no other plan: better late than none."""


def few_devices(table: CostTable) -> bool:
    """Whether simple plans take a second at most."""
    return len(table.class_of) <= _FEW_DEVICES


def simple_until_s(table: CostTable, deadline_s: float, any_plan: bool) -> float:
    """When to stop pricing simple plans."""
    if few_devices(table):
        return INFINITY
    return deadline_s if any_plan else max(deadline_s, time.monotonic() + _GRACE_S)


def with_all_devices(
    table: CostTable, found: Partition | None, tried: Tried, family: str
) -> Partition | None:
    """What a search over some devices found, or a simple plan over all of them that is better.

    Its bound is that on plans of any kind: what the search proved holds for its own devices.

    Args:
        table: All devices.
        found: The best plan over some, if any fits there.
        tried: What simple plans are asked for; the deadline holds for many devices with a plan.
        family: What was searched, in words.
    """
    until_s = simple_until_s(table, tried.deadline_s, found is not None)
    below_s = INFINITY if found is None else found.objective_s
    better = list(simple_plans(table, replace(tried, deadline_s=until_s, below_s=below_s)))
    best = min(better, key=lambda p: p.objective_s, default=None)
    if best is None or best.objective_s >= below_s:
        return found
    cut = (*found.truncated_by, CUT) if found is not None else (CUT,)
    words = f"simple plans over all devices; the search was over: {family}"
    return replace(best, truncated_by=cut, family=words)
