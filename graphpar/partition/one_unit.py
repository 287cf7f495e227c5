"""Plans that never cut the model: for what has to see all of its parameters on every device.

An optimiser whose step on one parameter depends on the others (a common norm, a common step size) is
exact where a device holds all of them. The table is folded into a single unit, planned as ever (replicas
of unlike speed, recomputation), and the answer told in units again.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

from graphpar.cost import CostTable, ModeCost, UnitCost
from graphpar.partition.types import Partition

CostT = TypeVar("CostT", UnitCost, ModeCost)


def as_one_unit(table: CostTable) -> CostTable:
    """The same model and devices, all units as one.

    >>> from graphpar.cost import DeviceClass, LinkCost, Topology
    >>> link = LinkCost(1e-6, 1e9)
    >>> unit = UnitCost("u", ((1.0,),), ((2.0,),), (0.5,), 8.0, 8.0, 0.0, (4.0,), (3.0,))
    >>> device, topology = DeviceClass("d", ("d0",), 1e9), Topology({"d0": "n"}, {"n": link}, link)
    >>> chain = CostTable(1, True, (1,), (0, 0), ("a", "b"), (unit,), (), (device,), topology, 1, 1)
    >>> folded = as_one_unit(chain)
    >>> folded.num_units, folded.costs[0].forward_s, folded.costs[0].working_bytes
    (1, ((2.0,),), (3.0,))
    """
    cost = _folded([table.costs[kind] for kind in table.units])
    modes = tuple(
        replace(mode, costs=(_folded([mode.costs[kind] for kind in table.units]),))
        for mode in table.modes
    )
    name = f"{table.unit_names[0]} .. {table.unit_names[-1]}"
    folded = (replace(cost, name=name),)
    few = (sum(table.few_row_bytes[kind] for kind in table.units),) if table.few_row_bytes else ()
    largest = (max(table.largest_gradient_bytes),) if table.largest_gradient_bytes else ()
    return replace(
        table,
        units=(0,),
        unit_names=(name,),
        costs=folded,
        edges=(),
        modes=modes,
        passing_gradient_bytes=(),
        few_row_bytes=few,
        largest_gradient_bytes=largest,
        result_bytes=(sum(table.result_bytes),) if table.result_bytes else (),
        repeated=(),
    )


def told_in_units(found: Partition, num_units: int) -> Partition:
    """A plan of one unit as one of the units that were folded into it."""
    pipelines = tuple(
        replace(p, stages=tuple(replace(s, first=0, last=num_units) for s in p.stages))
        for p in found.pipelines
    )
    return replace(found, pipelines=pipelines, family=f"{found.family}; the model is never cut")


def _folded(costs: Sequence[CostT]) -> CostT:
    """Units one after another: times and what is held add up, temporaries are the largest of them."""
    names = "forward_s backward_s optimizer_s weight_bytes gradient_bytes optimizer_bytes saved_bytes"
    sums: dict[str, Any] = {name: _sum([getattr(c, name) for c in costs]) for name in names.split()}
    split = all(c.weight_s for c in costs)
    for name in ("weight_s", "deferred_bytes", "split_s"):
        sums[name] = _sum([getattr(c, name) for c in costs]) if split else type(getattr(costs[0], name))()
    if isinstance(costs[0], UnitCost):
        more = ["meetings", "met_bytes", "weights_by_class", "saved_by_class"]
        more += ["deferred_by_class"] * split
        sums |= {name: _sum([getattr(c, name) for c in costs]) for name in more}
        if not split:
            sums["deferred_by_class"] = ()
        sums |= {"working_by_class": _largest([c.working_by_class for c in costs]), "growing_bytes": ()}
    return replace(costs[0], **sums, working_bytes=_largest([c.working_bytes for c in costs]))


def _sum(values: Sequence[Any]) -> Any:
    if isinstance(values[0], tuple):
        return tuple(map(_sum, zip(*values, strict=True)))
    return sum(values)


def _largest(values: Sequence[Any]) -> Any:
    if isinstance(values[0], tuple):
        return tuple(map(_largest, zip(*values, strict=True)))
    return max(values)
