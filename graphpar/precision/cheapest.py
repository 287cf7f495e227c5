"""One cost table that is nowhere dearer than several: what the search for number formats starts from."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

from graphpar.cost import CostTable, CutEdge, Mode, ModeCost, ModeKey, UnitCost


def cheapest(tables: Sequence[CostTable]) -> CostTable:
    """A table that is nowhere dearer than any of those given, for the same units and devices.

    It has the modes of all of them, each as cheap as in the table where it is cheapest.
    """
    first = tables[0]
    numbers = list(dict.fromkeys(zip(*(t.units for t in tables), strict=True)))
    kinds = {of_tables: kind for kind, of_tables in enumerate(numbers)}
    units = tuple(kinds[of_tables] for of_tables in zip(*(t.units for t in tables), strict=True))
    costs = tuple(
        _least_cost([t.costs[n] for t, n in zip(tables, of_tables, strict=True)]) for of_tables in numbers
    )
    places: dict[ModeKey, list[tuple[int, Mode]]] = {}
    for place, table in enumerate(tables):
        for mode in table.modes:
            places.setdefault(mode.key, []).append((place, mode))
    modes = tuple(
        replace(
            having[0][1],
            costs=tuple(
                _least_cost([mode.costs[of_tables[place]] for place, mode in having])
                for of_tables in numbers
            ),
        )
        for having in places.values()
    )
    edges = tuple(_least_edge(same) for same in zip(*(t.edges for t in tables), strict=True))
    return replace(first, units=units, costs=costs, edges=edges, modes=modes)


CostT = TypeVar("CostT", UnitCost, ModeCost)


def _least_cost(same: Sequence[CostT]) -> CostT:
    """What the search weighs of a unit, each number the least of several prices."""
    names = "forward_s backward_s optimizer_s weight_bytes saved_bytes working_bytes".split()
    if isinstance(same[0], UnitCost):
        # Tables in which all devices share a format do not tell bytes by class.
        apart = [_told_by_class(c) for c in same if isinstance(c, UnitCost)]
        rows = {name: _least([row[name] for row in apart]) for name in apart[0]}
        return replace(same[0], **{n: _least([getattr(c, n) for c in same]) for n in names}, **rows)
    return replace(same[0], **{name: _least([getattr(c, name) for c in same]) for name in names})


def _told_by_class(cost: UnitCost) -> dict[str, Any]:
    number = len(cost.forward_s)
    return {
        "weights_by_class": cost.weights_by_class or (cost.weight_bytes,) * number,
        "saved_by_class": cost.saved_by_class or (cost.saved_bytes,) * number,
        "working_by_class": cost.working_by_class or (cost.working_bytes,) * number,
    }


def _least(values: Sequence[Any]) -> Any:
    """The least number, element by element where there are tuples of them."""
    if isinstance(values[0], tuple):
        return tuple(map(_least, zip(*values, strict=True)))
    return min(values)


def _least_edge(edges: Sequence[CutEdge]) -> CutEdge:
    return replace(
        edges[0],
        bytes_per_sample=min(e.bytes_per_sample for e in edges),
        gradient_bytes_per_sample=min(e.gradient_bytes_per_sample for e in edges),
        fixed_bytes=min(e.fixed_bytes for e in edges),
        gradient_fixed_bytes=min(e.gradient_fixed_bytes for e in edges),
    )
