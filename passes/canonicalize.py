"""Drop what computes nothing: dead ops, dropout that is off, casts to the type a value already has.

Lookups that would leave a sparse gradient leave a dense one.
"""

from dataclasses import dataclass, replace

from graphpar.ir.chain import writes_buffer, written_buffers
from graphpar.ir.graph import Graph, Level
from graphpar.ir.ops import SOURCES, Op, map_arguments
from graphpar.ir.optable import CASTS, packet

_SPARSE = {"embedding": 4, "embedding_bag": 5}
"""Where a lookup is told to leave a sparse gradient."""


@dataclass(frozen=True)
class Canonicalize:
    """Remove ops without effect and merge equal ops that read only inputs and constants.

    A table's gradient is made dense, whatever `nn.Embedding(sparse=)` says: replicas, tensor groups and
    divided optimiser state add up and cut gradients, and the optimisers that take either step alike.

    >>> from graphpar.ir.text import format_graph, parse_graph
    >>> print(format_graph(Canonicalize().run(parse_graph('''graph captured "N" batch=2
    ... %x = input("x") : float32[B]
    ... %d = aten.dropout.default(%x, 0.5, false) : float32[B]
    ... %dead = aten.neg.default(%x) : float32[B]
    ... %y = aten.abs.default(%d) : float32[B]
    ... %output = output((%y,))
    ... '''))), end="")
    graph captured "N" batch=2
    %x = input("x") : float32[B]
    %y = aten.abs.default(%x) : float32[B]
    %output = output((%y,))
    """

    name: str = "canonicalize"
    takes: Level = "captured"
    gives: Level = "captured"

    def run(self, graph: Graph) -> Graph:
        """Build the smaller graph."""
        return _with_dense_gradients(_without_dead(_without_identities(graph)))


def _without_identities(graph: Graph) -> Graph:
    stands_for: dict[str, str] = {}
    seen: dict[Op, str] = {}
    kept: list[Op] = []
    # What follows from a buffer that is written to is worth something else before and after.
    moving = set(written_buffers(graph))
    for op in graph.ops:
        op = map_arguments(op, stands_for)
        if moving.intersection(op.operands()):
            moving.add(op.name)
            kept.append(op)
            continue
        if _is_identity(op, graph):
            stands_for[op.name] = op.operands()[0]
            continue
        if op.target in SOURCES or op.attr("grad") or not op.operands() or op.target == "output":
            kept.append(op)
            continue
        key = replace(op, name="", module="", source="", origin=())
        if _repeatable(op) and key in seen:
            stands_for[op.name] = seen[key]
            continue
        seen[key] = op.name
        kept.append(op)
    return graph.with_ops(kept)


def _repeatable(op: Op) -> bool:
    return op.target.startswith("aten.") and not writes_buffer(op) and "rand" not in op.target


def _is_identity(op: Op, graph: Graph) -> bool:
    kind = packet(op)
    if not op.operands() or not op.makes_tensor:
        return False
    before = graph[op.operands()[0]]
    if not before.makes_tensor or before.type != op.type:
        return False
    if kind in ("dropout", "feature_dropout"):
        return op.argument(2, "train") is False or op.argument(1, "p") == 0.0
    if kind in CASTS:
        return True
    return kind in ("view", "reshape", "alias", "lift_fresh_copy") and before.type == op.type


def _without_dead(graph: Graph) -> Graph:
    live: set[str] = set()
    for op in reversed(graph.ops):
        keeps = op.target in ("output", "input") or writes_buffer(op)
        if keeps or op.name in live:
            live.add(op.name)
            live.update(op.operands())
    return graph.with_ops(op for op in graph.ops if op.name in live)


def _with_dense_gradients(graph: Graph) -> Graph:
    return graph.with_ops(_with_dense_gradient(op) for op in graph.ops)


def _with_dense_gradient(op: Op) -> Op:
    place = _SPARSE.get(packet(op)) if op.target.startswith("aten.") else None
    if place is None or not op.argument(place, "sparse", False):
        return op
    args = tuple(False if at == place else argument for at, argument in enumerate(op.args))
    return replace(op, args=args, kwargs=tuple((k, v) for k, v in op.kwargs if k != "sparse"))
