"""Put what needs the whole batch at the end: the tail, which runs once on values of all samples.

A contrastive loss compares each sample with each other one, a balancing loss multiplies means over all
tokens. Such ops, and whatever follows from them, form the *tail*. All before it is worked on in parts.
What the tail reads of it is collected over the parts of the batch: values of samples are joined, sums
over samples are added up, shared values are taken once. Then the tail runs, and its gradients go back to
the parts. So every forward comes before the first backward.

That pays where the tail is small. A tail that holds much of the model's weights would have to run in one
place, so that the batch rather stays whole.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from graphpar.ir.chain import RANDOM_TARGETS, written_buffers
from graphpar.ir.graph import Graph, Level
from graphpar.ir.ops import SOURCES, Op, map_arguments

LARGEST_SHARE = 0.25
"""The largest part of the model's weights that a tail may read."""
COLLECTED = ("sample", "partial", "shared")
"""What values that the tail can collect mean to the samples."""


@dataclass(frozen=True)
class FindTail:
    """Mark the ops of the tail and move them to the end; a graph without a small tail stays as it is.

    >>> from graphpar.ir.text import format_graph, parse_graph
    >>> from graphpar.passes.batch import AnalyseBatch
    >>> print(format_graph(FindTail().run(AnalyseBatch().run(parse_graph('''graph captured "N" batch=2
    ... %x = input("x") : float32[B,3]
    ... %w = parameter("w") : float32[4,3]
    ... %h = aten.linear.default(%x, %w) : float32[B,4]
    ... %m = aten.amax.default(%h, (0,)) : float32[4] @ "" "net.py:3"
    ... %output = output((%m,))
    ... ''')))), end="")
    graph captured "N" batch=2
    %x = input("x") : float32[B,3] {samples="sample"}
    %w = parameter("w") : float32[4,3] {samples="shared"}
    %h = aten.linear.default(%x, %w) : float32[B,4] {samples="sample"}
    %m = aten.amax.default(%h, (0,)) : float32[4] \
{reduces="amax at (top) (net.py:3) reduces over the batch", samples="mixed", tail=true} @ "" "net.py:3"
    %output = output((%m,)) \
{reduces="amax at (top) (net.py:3) reduces over the batch", samples="mixed", tail=true}
    """

    name: str = "tail"
    takes: Level = "captured"
    gives: Level = "captured"

    def run(self, graph: Graph) -> Graph:
        """Build the graph with its tail last."""
        written = written_buffers(graph)
        if graph.output.attr("samples") != "mixed" or (written and not graph.output.attr("in_step")):
            return graph
        if any(graph[name].target in SOURCES for name in _mixed_results(graph)):
            return graph
        live = _live(graph)
        mixed = {op.name for op in graph.ops if op.name in live and op.attr("samples") == "mixed"}
        inside = mixed - {op.name for op in graph.ops if op.target in SOURCES}
        inside |= {name for name in graph.output.operands() if _cannot_cross(graph[name])}
        inside |= _pulled(graph, inside, live)
        inside |= _shared_alone(graph, inside, live)
        touched = {o for op in graph.ops if op.name in inside for o in op.operands()}
        if touched & written or not _worthwhile(graph, inside):
            return graph
        return graph.with_ops(_in_order(graph, inside, self.name))


def _live(graph: Graph) -> frozenset[str]:
    """What the results follow from; what is only computed ahead over the whole batch is not counted."""
    live = {graph.output.name}
    for op in reversed(graph.ops):
        if op.name in live and op.target != "gp.whole_batch":
            live.update(op.operands())
    return frozenset(live)


def _mixed_results(graph: Graph) -> list[str]:
    return [name for name in graph.output.operands() if graph[name].attr("samples") == "mixed"]


def _cannot_cross(op: Op) -> bool:
    if op.target in SOURCES:
        return False
    return not op.makes_tensor or op.attr("samples") not in COLLECTED


def _pulled(graph: Graph, inside: set[str], live: frozenset[str]) -> set[str]:
    """Ops whose result the tail reads though it cannot be collected: the tail makes it for itself."""
    pulled: set[str] = set()
    for op in reversed(graph.ops):
        if op.name in live and (op.name in inside or op.name in pulled):
            pulled.update(o for o in op.operands() if o not in inside and _cannot_cross(graph[o]))
    return pulled


def _shared_alone(graph: Graph, inside: set[str], live: frozenset[str]) -> set[str]:
    """Ops that compute what all samples share for the tail alone."""
    found: set[str] = set()
    for op in reversed(graph.ops):
        if op.target in SOURCES or op.name not in live or op.attr("samples") != "shared":
            continue
        if op.target == "gp.whole_batch" or op.target in RANDOM_TARGETS:
            continue
        if op.name in inside or op.attr("meets"):
            continue
        readers = [user.name for user in graph.users(op.name) if user.name in live]
        if readers and all(name in inside or name in found for name in readers):
            found.add(op.name)
    return found - {graph.output.name}


def _worthwhile(graph: Graph, inside: set[str]) -> bool:
    """Whether the tail reads something that the rest computes, and few of the weights."""
    read = {name for op in graph.ops if op.name in inside for name in op.operands()} - inside
    if not any(graph[name].target not in SOURCES for name in read):
        return False
    held = [op for op in graph.ops if op.target in ("parameter", "buffer")]
    of_tail = sum(op.type.numel(1) for op in held if op.name in read)
    return of_tail <= LARGEST_SHARE * sum(op.type.numel(1) for op in held)


def _in_order(graph: Graph, inside: set[str], made_by: str) -> Sequence[Op]:
    """The ops before the tail, the tail, the output; what both need stands in both."""
    before: list[Op] = []
    tail: list[Op] = []
    renamed: dict[str, str] = {}
    both: set[str] = set()
    for op in reversed(graph.ops[:-1]):
        if op.name not in inside or op.name in both:
            both.update(inside.intersection(op.operands()))
    for op in graph.ops[:-1]:
        if op.name not in inside:
            before.append(op)
            continue
        if op.name in both:
            before.append(op)
            renamed[op.name] = _fresh(f"{op.name}__tail", graph)
        copy = replace(map_arguments(op, renamed), name=renamed.get(op.name, op.name))
        if op.name in renamed:
            copy = replace(copy, origin=op.origin or (op.name,), made_by=made_by)
        tail.append(copy.with_attrs(tail=True))
    return [*before, *tail, map_arguments(graph.output, renamed).with_attrs(tail=True)]


def _fresh(name: str, graph: Graph) -> str:
    while name in graph:
        name += "_"
    return name
