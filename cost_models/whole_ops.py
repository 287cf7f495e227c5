"""Which ops of a stage every member of a tensor group computes whole, and why."""

import re
from collections.abc import Mapping, Sequence

from graphpar.cost_models.mesh_times import MeshTimes
from graphpar.ir.graph import Graph
from graphpar.ir.links import links_of
from graphpar.ir.mesh import Ways
from graphpar.ir.ops import Op
from graphpar.partition.types import WholeOp

_LEAST_SHARE = 1e-3
"""Below this share of a stage's time an op is mentioned only where no rule knows it."""


def whole_ops(
    ops: Sequence[Op],
    graph: Graph,
    table: Mapping[str, Sequence[Ways]],
    chosen: Mapping[str, Ways],
    times: MeshTimes,
) -> tuple[WholeOp, ...]:
    """Ops that all members compute whole, alike ones together, the most expensive first.

    Args:
        ops: The ops of the stage.
        graph: Its graph.
        table: The ways in which each op could have been computed.
        chosen: The way that was chosen.
        times: Prices for the group.
    """
    seconds = {op.name: times.seconds(op, chosen[op.name]) for op in ops}
    least = _LEAST_SHARE * sum(seconds.values())
    found: dict[tuple[str, str, str], list[Op]] = {}
    for op in ops:
        way = chosen[op.name]
        is_number = all(kind is None or not kind.shape for kind in op.types)
        if way.divides or is_number or any(x not in ("whole", "copied") for x in way.results[0]):
            continue
        reason = _reason(op, graph, table[op.name], min(times.group.axes))
        is_unknown = reason == UNKNOWN and bool(op.attr("grad"))
        if seconds[op.name] > least or is_unknown:
            found.setdefault((op.target, re.sub(r"\d+", "*", op.module), reason), []).append(op)
    listed = [
        WholeOp(
            target,
            same[0].module,
            same[0].source,
            len(same),
            reason,
            sum(seconds[op.name] for op in same),
        )
        for (target, _, reason), same in found.items()
    ]
    return tuple(sorted(listed, key=lambda whole: -whole.seconds))


UNKNOWN = "no rule says how its work may be divided"


def _reason(op: Op, graph: Graph, ways: Sequence[Ways], size: int) -> str:
    if any(way.divides for way in ways):
        return "dividing it saves less than it costs"
    if op.attr("tail"):
        return "it runs once on the whole batch"
    if not links_of(op, graph):
        return UNKNOWN
    if len(ways) == 1:
        return "it draws random numbers or writes to a buffer"
    return f"no dimension of it has {size} units, one for each member"
