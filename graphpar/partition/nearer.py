"""Other names for the same plan: devices change places where that brings those that exchange closer.

`assign` names devices stage by stage and looks ahead little. Here nodes, stages and replicas of equal
devices change places, and replicas change with idle devices, as long as that makes the step shorter, or
as long and its messages and sums shorter. Memory and computing stay as they are.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations

from graphpar.cost import CostTable
from graphpar.partition.assign import groups_hold
from graphpar.partition.gradient_sums import gradient_sums
from graphpar.partition.pipeline_price import price, share_microbatches, transfers_s
from graphpar.partition.types import PipelineChoice, Replica, ScheduleName

Pipelines = tuple[PipelineChoice, ...]

_SHARE = 0.05
_MOST_S = 1.0
"""Share of a search's time for bringing devices nearer, or this long."""

_HAIR = 1e-9
"""Steps that differ by less are equal."""


def links_differ(table: CostTable) -> bool:
    """Whether it matters which nodes stages stand in, beyond which share one."""
    topology = table.topology
    return bool(topology.between) or len(set(topology.inside.values())) > 1


def most_s(limit_s: float) -> float:
    """Seconds that bringing devices nearer may take where all may take so long.

    >>> most_s(60.0), most_s(2.0)
    (1.0, 0.1)
    """
    return min(_MOST_S, _SHARE * limit_s)


def brought_nearer(
    table: CostTable, pipelines: Pipelines, schedule: ScheduleName, deadline_s: float
) -> Pipelines:
    """The plan, or a better one with other devices of the same kinds in its places.

    Args:
        table: Seconds and bytes of everything.
        pipelines: A plan that fits.
        schedule: Its schedule.
        deadline_s: `time.monotonic()` at which to stop with what was found so far.
    """
    best, measure = pipelines, _measure(table, pipelines, schedule)
    improved = True
    while improved:
        improved = False
        for exchange in _exchanges(table, best):
            if time.monotonic() > deadline_s:
                return best
            tried = tuple(share_microbatches(table, p, schedule) for p in _renamed(best, exchange))
            found = _measure(table, tried, schedule)
            if _is_less(found, measure) and groups_hold(table, tried):
                best, measure, improved = tried, found, True
                break
    return best


def _measure(table: CostTable, pipelines: Pipelines, schedule: ScheduleName) -> tuple[float, float]:
    """The step, and all messages of a microbatch with all sums: what a maximum hides counts there."""
    told_s = math.fsum(s for p in pipelines for s in transfers_s(table, p))
    summed_s = math.fsum(s.seconds for s in gradient_sums(table, pipelines)) if table.training else 0.0
    return price(table, pipelines, schedule).objective_s, told_s + summed_s


def _is_less(one: tuple[float, float], other: tuple[float, float]) -> bool:
    if abs(one[0] - other[0]) > _HAIR * other[0]:
        return one[0] < other[0]
    return one[1] < other[1] * (1 - _HAIR)


def _renamed(pipelines: Pipelines, names: Mapping[str, str]) -> Pipelines:
    def replica(own: Replica) -> Replica:
        others = tuple(names.get(d, d) for d in own.others)
        return replace(own, device=names.get(own.device, own.device), others=others)

    return tuple(
        replace(p, stages=tuple(replace(s, replicas=tuple(map(replica, s.replicas))) for s in p.stages))
        for p in pipelines
    )


def _exchanges(table: CostTable, pipelines: Pipelines) -> Iterator[dict[str, str]]:
    """Devices that may change places, larger sets first."""
    idle = _idle(table, pipelines)
    yield from _pairs(table, _nodes(table))
    stages = [[d for r in s.replicas for d in r.devices] for p in pipelines for s in p.stages]
    yield from _pairs(table, stages)
    replicas = [list(r.devices) for p in pipelines for s in p.stages for r in s.replicas]
    for number in sorted({len(r) for r in replicas}):
        spare = [own[i : i + number] for own in idle for i in range(0, len(own) - number + 1, number)]
        yield from _pairs(table, [*(r for r in replicas if len(r) == number), *spare])


def _idle(table: CostTable, pipelines: Pipelines) -> list[list[str]]:
    """Devices without work, by class and node."""
    used = {d for p in pipelines for s in p.stages for r in s.replicas for d in r.devices}
    found: dict[tuple[int, str], list[str]] = {}
    for device, kind in table.class_of.items():
        if device not in used:
            found.setdefault((kind, table.topology.node_of[device]), []).append(device)
    return list(found.values())


def _nodes(table: CostTable) -> list[list[str]]:
    found: dict[str, list[str]] = {}
    for device in table.class_of:
        found.setdefault(table.topology.node_of[device], []).append(device)
    return list(found.values())


def _pairs(table: CostTable, sets: Sequence[Sequence[str]]) -> Iterator[dict[str, str]]:
    """Exchanges of two sets of the same devices kind by kind, if they are not in the same node."""
    kinds = [tuple(table.class_of[d] for d in own) for own in sets]
    nodes = [[table.topology.node_of[d] for d in own] for own in sets]
    for i, j in combinations(range(len(sets)), 2):
        if kinds[i] == kinds[j] and nodes[i] != nodes[j]:
            there = dict(zip(sets[i], sets[j], strict=True))
            yield there | {b: a for a, b in there.items()}
