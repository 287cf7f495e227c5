"""Values that must be known of the whole batch before any part of it runs.

`gp.whole_batch(%x)` reads `%x` as computed over the whole batch. Such an `%x` follows from inputs alone
(a count of labels that are not ignored), so the driver computes it once and sends it along as an input.
"""

from dataclasses import replace

from graphpar.ir.graph import Graph
from graphpar.ir.ops import Op, Ref

WHOLE_PREFIX = "whole:"
"""Inputs that carry a value computed over the whole batch are labelled with this and their name."""


def prologue(graph: Graph) -> Graph | None:
    """The part of a captured graph that computes whole-batch values from the inputs; None if empty.

    Its results are the operands of the `gp.whole_batch` ops, in order.
    """
    wholes = [op for op in graph.ops if op.target == "gp.whole_batch"]
    if not wholes:
        return None
    live = {name for op in wholes for name in op.operands()}
    kept: list[Op] = []
    for op in reversed(graph.ops):
        if op.name in live and op.target != "gp.whole_batch":
            live.update(op.operands())
            kept.append(op)
        elif op.name in live:
            live.update(op.operands())
            kept.append(replace(op, target="aten.alias.default"))
    results = tuple(Ref(op.operands()[0]) for op in wholes)
    return graph.with_ops([*reversed(kept), Op("output", "output", (results,))])


def whole_batch_names(graph: Graph) -> tuple[str, ...]:
    """Labels of the inputs that carry whole-batch values, in the order of the prologue's results."""
    return tuple(WHOLE_PREFIX + op.name for op in graph.ops if op.target == "gp.whole_batch")


def tail_reason(graph: Graph) -> str:
    """Which op needs the whole batch in a graph that has a tail, for people; empty where none has."""
    return str(graph.output.attr("reduces")) if graph.output.attr("tail") else ""
