"""Which ops may make the gradients of their weights later than those of their inputs."""

from graphpar.ir.formats import multiplies_8_bits
from graphpar.ir.graph import Graph
from graphpar.ir.ops import Op, Ref

WEIGHTS: dict[str, tuple[int, ...]] = {
    "aten.linear.default": (1, 2),
    "aten.addmm.default": (2, 0),
    "aten.mm.default": (1,),
    "aten.matmul.default": (1,),
    "aten.conv1d.default": (1, 2),
    "aten.conv2d.default": (1, 2),
    "aten.conv3d.default": (1, 2),
    "aten.conv_transpose2d.input": (1, 2),
}
"""Products whose weights' gradients cost about as much as those of their inputs, and where the weights
stand among the arguments, the matrix first, then a bias."""

_SAME_VALUES = frozenset(
    {
        "aten.t.default",
        "aten.transpose.int",
        "aten.permute.default",
        "aten.view.default",
        "aten.reshape.default",
        "gp.cast_weight",
    }
)
"""What may stand between a parameter and the op: it keeps nothing for its own backward."""


def late_weights(graph: Graph, op: Op) -> tuple[int, ...]:
    """Places of the arguments of an op whose gradients may be made later; none where nothing is gained.

    Both another operand and the matrix must need gradients: without the first nobody waits for the op,
    without the second there is little to put off. Products in 8 bits make both gradients from the same
    rounded numbers, at once.

    >>> from graphpar.ir.text import parse_graph
    >>> g = parse_graph('''graph captured "N" batch=2
    ... %x = input("x") : float32[B,4]
    ... %w = parameter("a.weight") : float32[4,4] {grad=true}
    ... %h = aten.linear.default(%x, %w) : float32[B,4] {grad=true}
    ... %y = aten.linear.default(%h, %w) : float32[B,4] {grad=true}
    ... %output = output((%y,))
    ... ''')
    >>> late_weights(g, g["h"]), late_weights(g, g["y"])
    ((), (1,))
    """
    places = () if multiplies_8_bits(op) else WEIGHTS.get(op.target, ())
    late = [place for place in places if _is_weight(graph, op, place)]
    if not places or places[0] not in late:
        return ()
    others = (a for i, a in enumerate(op.args) if i not in late)
    waits = any(isinstance(a, Ref) and graph[a.name].attr("grad") for a in others)
    return tuple(sorted(late)) if waits else ()


def _is_weight(graph: Graph, op: Op, place: int) -> bool:
    if place >= len(op.args):
        return False
    argument = op.args[place]
    while isinstance(argument, Ref):
        source = graph[argument.name]
        if source.target == "parameter":
            return bool(source.attr("grad"))
        if source.target not in _SAME_VALUES or not source.args:
            return False
        argument = source.args[0]
    return False
