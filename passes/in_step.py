"""Let parts of the batch go through the model in step, and meet wherever statistics need all samples.

Batch normalisation in training, and whatever else takes a sum over samples and goes on with single ones,
needs the whole batch in the middle of the model. Each pipeline then takes its share of the batch as one
microbatch, and wherever such a sum is read the pipelines add up theirs (`gp.sum_parts`, in backward for
the gradient again; a batch normalisation does it inside). From there on the sum is the same for all.
Buffers are changed once per step, by values that are the same for all, so that every copy stays equal.
"""

from dataclasses import dataclass, replace

from graphpar.ir.chain import writes_buffer
from graphpar.ir.graph import Graph, Level
from graphpar.ir.ops import Op, Ref, map_arguments
from graphpar.ir.optable import packet
from graphpar.passes.batch import AnalyseBatch, BatchBuilder, mixing_reason
from graphpar.passes.samples import SHARED, Samples, place_of
from graphpar.passes.tail import FindTail


@dataclass(frozen=True)
class SplitBatch:
    """Find the freest way to split the batch: at will, with a tail, in step, else not at all.

    >>> from graphpar.ir.text import format_op, parse_graph
    >>> for op in SplitBatch().run(parse_graph('''graph captured "N" batch=2
    ... %x = input("x") : float32[B,4]
    ... %w = parameter("w") : float32[4,4]
    ... %h = aten.linear.default(%x, %w) : float32[B,4]
    ... %m = aten.sum.dim_IntList(%h, (0,)) : float32[4]
    ... %c = aten.sub.Tensor(%h, %m) : float32[B,4]
    ... %y = aten.linear.default(%c, %w) : float32[B,4]
    ... %output = output((%y,))
    ... ''')).ops[4:6]: print(format_op(op))
    %m_total = gp.sum_parts(%m) : float32[4] {meets=true, samples="shared"} from(%m) by("batch")
    %c = aten.sub.Tensor(%h, %m_total) : float32[B,4] {samples="sample"}
    """

    name: str = "batch"
    takes: Level = "captured"
    gives: Level = "captured"

    def run(self, graph: Graph) -> Graph:
        """Build the graph with marks."""
        plain = FindTail().run(AnalyseBatch().run(graph))
        if not mixing_reason(plain):
            return plain
        met = FindTail().run(AnalyseInStep().run(graph))
        if not mixing_reason(met):
            return met
        return plain.with_ops([*plain.ops[:-1], plain.output.with_attrs(whole=mixing_reason(met))])


@dataclass(frozen=True)
class AnalyseInStep:
    """Like `AnalyseBatch`, for parts that meet: sums over samples are the whole batch's where needed."""

    name: str = "batch"
    takes: Level = "captured"
    gives: Level = "captured"

    def run(self, graph: Graph) -> Graph:
        """Build the graph with marks and sums over all parts."""
        ops = _InStep(graph, self.name).run().ops
        read = {name for op in ops for name in op.operands()}
        ops = tuple(op for op in ops if op.target != "gp.sum_parts" or op.name in read)
        first = next((op for op in ops if op.attr("meets") or writes_buffer(op)), None)
        if first is None:
            return graph.with_ops(ops)
        return graph.with_ops([*ops[:-1], ops[-1].with_attrs(in_step=_reason(first, graph))])


def _reason(op: Op, graph: Graph) -> str:
    if packet(op) == "batch_norm":
        return f"{place_of(op)} takes its statistics over the whole batch"
    if op.target == "gp.sum_parts":
        made = graph[op.origin[0]] if op.origin and op.origin[0] in graph else op
        return f"{place_of(made)} is needed as a sum over the whole batch"
    return f"{place_of(op)} updates a buffer once per whole batch"


class _InStep(BatchBuilder):
    def compute(self, op: Op) -> None:
        """Handle what only parts in step can do, then as ever."""
        if packet(op) == "batch_norm" and op.argument(5, "training") is True:
            call = self.call(op)
            x, *others = op.operands()
            alike = all(self.states[name] == SHARED for name in others)
            if self.states[x].kind == "sample" and call.dim(Ref(x)) == 0 and alike:
                self.add(op.with_attrs(meets=True), call.like(Ref(x)))
                return
        elif writes_buffer(op):
            op = self._met(op)
        super().compute(op)

    def needs_whole(self, op: Op, state: Samples) -> Op | None:
        """The op with sums over the whole batch in place of sums over the part."""
        changed = self._met(op)
        return None if changed is op else changed

    def _met(self, op: Op) -> Op:
        partial = [name for name in op.operands() if self.states[name].kind == "partial"]
        change = {name: self._total(name) for name in partial if self.ops[name].makes_tensor}
        return map_arguments(op, change) if change else op

    def _total(self, name: str) -> str:
        known = next(
            (o.name for o in self.ops.values() if o.target == "gp.sum_parts" and o.operands() == (name,)),
            None,
        )
        if known is not None:
            return known
        made = self.ops[name]
        total = replace(
            made,
            name=self.fresh(f"{name}_total"),
            target="gp.sum_parts",
            args=(Ref(name),),
            kwargs=(),
            attrs=(),
            origin=made.origin or (name,),
            made_by=self.made_by,
        )
        if made.attr("grad"):
            total = total.with_attrs(grad=True)
        return self.add(total.with_attrs(meets=True), SHARED).name
