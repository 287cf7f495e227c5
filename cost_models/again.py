"""What of a unit torch computes once more for the backward, where only what enters the unit is kept."""

from collections.abc import Mapping, Sequence

from graphpar.cost_models.work import OpWork
from graphpar.ir.graph import Graph


def kept_last(graph: Graph, works: Mapping[str, OpWork]) -> int:
    """Number of a unit's ops up to the last one that keeps something for its backward; or 0."""
    last = 0
    for number, (name, work) in enumerate(works.items(), 1):
        if graph[name].attr("grad") and work.backward and (work.saved or work.saved_bytes):
            last = number
    return last


def run_again(graph: Graph, works: Mapping[str, OpWork]) -> Sequence[str]:
    """The ops that run again: torch stops as soon as it has all that the backward needs.

    The last op that keeps something notes its operands before it computes; one that keeps nothing else,
    as a product does, is not reached (`torch.utils.checkpoint`, `set_checkpoint_early_stop`).

    >>> from graphpar.cost_models.work import Kernel
    >>> from graphpar.ir.text import parse_graph
    >>> g = parse_graph('''graph captured "N" batch=2
    ... %w = parameter("w") : float32[4,4] {grad=true}
    ... %x = input("x") : float32[B,4]
    ... %h = aten.linear.default(%x, %w) : float32[B,4] {grad=true}
    ... %r = aten.relu.default(%h) : float32[B,4] {grad=true}
    ... %y = aten.linear.default(%r, %w) : float32[B,4] {grad=true}
    ... %z = aten.add.Tensor(%x, %y) : float32[B,4] {grad=true}
    ... %output = output((%z,))
    ... ''')
    >>> k = (Kernel("matmul", 1, 1, 1),)
    >>> works = {"h": OpWork(k, k, ("x", "w")), "r": OpWork(k, k, ("r",)),
    ...          "y": OpWork(k, k, ("r", "w")), "z": OpWork(k, k)}
    >>> run_again(g, works)
    ['h', 'r']
    """
    names = list(works)[: kept_last(graph, works)]
    if names and works[names[-1]].saved_bytes == 0 and names[-1] not in works[names[-1]].saved:
        names.pop()
    return names
