"""Calls that write into a tensor given as `out=`: compute first, then copy."""

import torch
from torch import fx

from graphpar.frontend.torch_private import without_out


def without_out_arguments(module: fx.GraphModule) -> None:
    """Replace `f(x, out=t)` by `t.copy_(f(x))` in a graph and all graphs within it.

    Example:
        >>> from torch import fx
        >>> graph = fx.Graph()
        >>> x, t = graph.placeholder("x"), graph.placeholder("t")
        >>> out = graph.output(graph.call_function(torch.ops.aten.exp.out, (x,), {"out": t}))
        >>> module = fx.GraphModule(torch.nn.Module(), graph)
        >>> without_out_arguments(module)
        >>> [str(n.target) for n in module.graph.nodes if n.op == "call_function"]
        ['aten.exp.default', 'aten.copy_.default']
    """
    for part in module.modules():
        if not isinstance(part, fx.GraphModule):
            continue
        for node in list(part.graph.nodes):
            if node.op == "call_function" and isinstance(node.kwargs.get("out"), fx.Node):
                _compute_then_copy(part.graph, node)


def _compute_then_copy(graph: fx.Graph, node: fx.Node) -> None:
    compute = without_out(node.target)
    if compute is None:
        return
    kwargs = {name: value for name, value in node.kwargs.items() if name != "out"}
    with graph.inserting_before(node):
        made = graph.call_function(compute, node.args, kwargs)
        copied = graph.call_function(torch.ops.aten.copy_.default, (node.kwargs["out"], made))
    made.meta, copied.meta = dict(node.meta), dict(node.meta)
    node.replace_all_uses_with(copied)
    graph.erase_node(node)
