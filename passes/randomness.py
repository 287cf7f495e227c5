"""Give every random op a stream of its own, so that its numbers depend on no plan.

A random op draws from a stream keyed by (seed, step, stream, position in the global batch). The stream
is the op's number in the captured graph, which no partition changes.
"""

from dataclasses import dataclass, replace

from graphpar.ir.graph import Graph, Level
from graphpar.ir.ops import Argument, Op
from graphpar.ir.optable import packet


@dataclass(frozen=True)
class KeyRandomness:
    """Replace dropout, attention with dropout, and random tensors by keyed ops of our own.

    >>> from graphpar.ir.text import format_op, parse_graph
    >>> g = KeyRandomness().run(parse_graph('''graph captured "N" batch=2
    ... %x = input("x") : float32[B]
    ... %d = aten.dropout.default(%x, 0.5, true) : float32[B]
    ... %output = output((%d,))
    ... '''))
    >>> print(format_op(g["d"]))
    %d = gp.dropout(%x, 0.5, false, stream=0) : float32[B] from(%d) by("randomness")
    """

    name: str = "randomness"
    takes: Level = "captured"
    gives: Level = "captured"

    def run(self, graph: Graph) -> Graph:
        """Build the graph with keyed random ops, numbered in order of execution."""
        stream = 0
        ops = []
        for op in graph.ops:
            keyed = self._keyed(op, stream)
            stream += keyed is not op
            ops.append(keyed)
        return graph.with_ops(ops)

    def _keyed(self, op: Op, stream: int) -> Op:
        kind = packet(op)
        if kind in ("dropout", "feature_dropout") and op.argument(2, "train"):
            by_channel = kind == "feature_dropout"
            return self._become(op, "gp.dropout", stream, op.args[0], op.argument(1, "p"), by_channel)
        if kind == "scaled_dot_product_attention" and op.argument(4, "dropout_p", 0.0):
            return self._become(
                op,
                "gp.attention",
                stream,
                *op.args[:3],
                op.argument(3, "attn_mask"),
                op.argument(4, "dropout_p"),
                op.argument(5, "is_causal", False),
                op.kwarg("scale"),
                op.kwarg("enable_gqa", False),
            )
        drawn = _distribution(op)
        if drawn is not None:
            name, *parameters = drawn
            shape, dtype = op.type.shape, op.type.dtype
            return self._become(op, "gp.random", stream, name, shape, dtype, *parameters)
        if kind == "bernoulli":
            chance = op.argument(1, "p") if op.target.endswith(".p") else op.args[0]
            return self._become(op, "gp.bernoulli", stream, op.args[0], chance)
        return op

    def _become(self, op: Op, target: str, stream: int, *args: Argument) -> Op:
        return replace(
            op,
            target=target,
            args=args,
            kwargs=(("stream", stream),),
            origin=op.origin or (op.name,),
            made_by=self.name,
        )


def _distribution(op: Op) -> tuple[Argument, ...] | None:
    """Name and parameters of what an op draws that makes a tensor of random numbers; None for others."""
    kind = packet(op)
    if kind in ("rand", "rand_like"):
        return ("uniform",)
    if kind in ("randn", "randn_like"):
        return ("normal",)
    if kind == "uniform":
        return "uniform", op.argument(1, "from", 0.0), op.argument(2, "to", 1.0)
    if kind == "exponential":
        return "exponential", op.argument(1, "lambd", 1.0)
    if kind == "normal_functional":
        return "normal", op.argument(1, "mean", 0.0), op.argument(2, "std", 1.0)
    if op.target == "aten.normal.float_float":
        return "normal", op.args[0], op.args[1]
    if kind in ("randint", "randint_like"):
        bounds = op.args[1:] if kind == "randint_like" else op.args[:-1]
        return ("integers", *((0,) if len(bounds) == 1 else ()), *bounds)
    return None
