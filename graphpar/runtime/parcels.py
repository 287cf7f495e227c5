"""Which gradients of a rank travel together, in the order in which backward makes them."""

from collections.abc import Collection, Iterator, Mapping
from itertools import groupby

from graphpar.ir.graph import Graph
from graphpar.ir.ops import Op
from graphpar.ir.recomputed import Units

_SMALL_BYTES = 2**16
"""Gradients up to this size wait for others of their unit; larger ones go alone and are not copied."""


def parcels_of(
    graph: Graph, stage: int, labels: Collection[str], units: Units
) -> tuple[tuple[tuple[str, ...], ...], ...]:
    """Parcels of the parameters of each unit, last units first.

    A gradient is whole when backward has come to the first op that reads the parameter.

    Args:
        graph: What the rank runs.
        stage: Its stage there.
        labels: Parameters whose gradients are sent.
        units: Ops of each unit of the model; a parameter goes with the first that reads it. Of those that
            no unit reads each goes alone.
    """
    place = {op.name: number for number, op in enumerate(graph.ops)}
    unit_of = {name: number for number, names in enumerate(units) for name in names}
    found: list[tuple[int, int, Op]] = []
    for op in graph.sources("parameter"):
        if op.args[0] not in labels:
            continue
        readers = [user for user in graph.users(op.name) if user.attr("stage") == stage]
        first = min((place[reader.name] for reader in readers), default=-1)  # a member may only hold it
        unit = _first_unit(graph, readers, unit_of)
        found.append((first, -1 - first if unit is None else unit, op))
    found.sort(key=lambda item: item[:2], reverse=True)
    return tuple(
        tuple(_parcels([op for _, _, op in members])) for _, members in groupby(found, lambda f: f[1])
    )


def _first_unit(graph: Graph, readers: Collection[Op], unit_of: Mapping[str, int]) -> int | None:
    """The first unit that reads a weight, be it through a cast or a collective; None where none does."""
    found: list[int] = []
    seen, waiting = {op.name for op in readers}, list(readers) if unit_of else []
    while waiting:
        op = waiting.pop()
        if op.name in unit_of:
            found.append(unit_of[op.name])
            continue
        for user in graph.users(op.name):
            if user.name not in seen:
                seen.add(user.name)
                waiting.append(user)
    return min(found, default=None)


def _parcels(ops: Collection[Op]) -> Iterator[tuple[str, ...]]:
    for _, alike in groupby(ops, lambda op: (op.type.dtype, op.type.bytes(1) > _SMALL_BYTES)):
        small: list[str] = []
        held = 0
        for op in alike:
            small.append(str(op.args[0]))
            held += op.type.bytes(1)
            if held > _SMALL_BYTES:
                yield tuple(small)
                small, held = [], 0
        if small:
            yield tuple(small)
