"""Mark the ops that make the gradients of their weights in a second half of the backward."""

from dataclasses import dataclass

from graphpar.ir.graph import Graph, Level
from graphpar.ir.late import late_weights


@dataclass(frozen=True)
class DeferWeightGradients:
    """Give products with trained weights the attribute `late`: the places of those arguments.

    Attributes:
        stages: The stages whose backward is done in two halves.

    >>> from graphpar.ir.text import format_op, parse_graph
    >>> g = DeferWeightGradients(frozenset({0})).run(parse_graph('''graph lowered "N" batch=2
    ... %x = input("x") : float32[B,4]
    ... %w = parameter("a.weight") : float32[4,4] {grad=true}
    ... %v = parameter("b.weight") : float32[4,4] {grad=true}
    ... %h = aten.linear.default(%x, %w) : float32[B,4] {grad=true, stage=0}
    ... %y = aten.linear.default(%h, %v) : float32[B,4] {grad=true, stage=0}
    ... %output = output((%y,))
    ... '''))
    >>> [op.attr("late") for op in g.ops if op.target.startswith("aten")]
    [None, (1,)]
    """

    stages: frozenset[int]
    name: str = "defer"
    takes: Level = "lowered"
    gives: Level = "lowered"

    def run(self, graph: Graph) -> Graph:
        """Build the marked graph."""
        ops = []
        for op in graph.ops:
            late = late_weights(graph, op) if op.attr("stage") in self.stages else ()
            ops.append(op.with_attrs(late=late) if late else op)
        return graph.with_ops(ops, level="lowered")
