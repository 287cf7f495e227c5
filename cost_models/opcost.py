"""Work of every op: the right rule by the op's name, a guess from bytes where there is none.

Rules live in `pointwise.py` (element by element, reductions, views) and `products.py` (matrix
products, attention, norms, losses, lookups). Backward work follows what autograd computes: the
gradient of an operand is counted only where that operand needs one.
"""

from graphpar.cost_models.layout import Layout, is_view
from graphpar.cost_models.pointwise import POINTWISE_RULES, pointwise, unknown, view
from graphpar.cost_models.products import PRODUCT_RULES
from graphpar.cost_models.work import Call, Kernel, OpWork
from graphpar.ir.graph import Graph
from graphpar.ir.ops import SOURCES, Op
from graphpar.ir.optable import POINTWISE, packet

_RULES = {**POINTWISE_RULES, **PRODUCT_RULES}


def work_of(op: Op, graph: Graph, layout: Layout, batch: int, precision: str = "float32") -> OpWork:
    """Kernels and saved values of one op for a microbatch of so many samples.

    >>> from graphpar.cost_models.layout import find_layout
    >>> from graphpar.ir.text import parse_graph
    >>> g = parse_graph('''graph captured "N" batch=2
    ... %x = input("x") : float32[B,4]
    ... %w = parameter("w") : float32[8,4] {grad=true}
    ... %y = aten.linear.default(%x, %w) : float32[B,8] {grad=true}
    ... %output = output((%y,))
    ... ''')
    >>> work = work_of(g["y"], g, find_layout(g), batch=2)
    >>> [k.flops for k in work.forward], [k.flops for k in work.backward], work.saved
    ([128], [128], ('x',))
    """
    if op.target in SOURCES or op.target == "output":
        return OpWork(())
    call = Call(op, graph, batch, precision, op.name in layout.copies)
    if not any(t is not None for t in op.types):
        return OpWork(())
    if is_view(op, graph):
        return view(call)
    name = packet(op)
    if name in _RULES:
        return _RULES[name](call)
    if name in POINTWISE or f"{name.rstrip('_')}" in POINTWISE:
        return pointwise(call)
    return unknown(call)


def fan_out_kernels(op: Op, graph: Graph, batch: int, precision: str) -> tuple[Kernel, ...]:
    """Additions that join the gradients of a value with several users."""
    if not op.attr("grad") or op.target in SOURCES or not op.makes_tensor:
        return ()
    users = sum(bool(user.attr("grad")) for user in graph.users(op.name))
    call = Call(op, graph, batch, precision)
    size = call.numel(op)
    one = Kernel("pointwise", size, 3 * call.bytes(op), size, call.dtype(call.out))
    return (one,) * max(users - 1, 0)
