"""Follow the batch dimension through the graph and make sums over samples exact under any split.

After this pass each op carries `samples` (see `samples.py`), and

- a mean over samples is a sum over samples divided by a count of the *whole* batch. The mean over
  labels that are not ignored is the known trap: its count is known only to the whole batch, so
  averaging the means of microbatches is wrong;
- a value that follows from inputs alone and is needed whole (such a count) is read through
  `gp.whole_batch`: the driver computes it once over the whole batch and sends it along;
- a shared term added to a sum over samples is scaled by `gp.share`, the part of the batch at hand, so
  that the parts add up to it once;
- a batch size used as a number (not as a shape) is the whole batch's: `batch:times`.
"""

from dataclasses import dataclass, field, replace

from graphpar.ir.chain import RANDOM_TARGETS, writes_buffer, written_buffers
from graphpar.ir.graph import Graph, Level
from graphpar.ir.ops import (
    SOURCES,
    Argument,
    BatchSize,
    Op,
    Ref,
    Symbol,
    TensorType,
    map_arguments,
)
from graphpar.ir.optable import IDENTITY, packet
from graphpar.passes import (  # noqa: F401 - they register rules
    sample_batches,
    sample_moves,
    sample_rules,
)
from graphpar.passes.dispatch import infer
from graphpar.passes.losses import CLASS_LOSSES, REDUCTION, terms
from graphpar.passes.samples import (
    DISPATCHED,
    PARTIAL,
    SHARED,
    Call,
    Samples,
    dims_argument,
    mixed,
    place_of,
    settled,
)
from graphpar.passes.sizes import has_loose_batch_size, sized, whole_batch_numbers

_REDUCTIONS = frozenset(
    """
    sum mean amax amin max min any all prod logsumexp var std var_mean std_mean norm
    linalg_vector_norm linalg_norm linalg_matrix_norm argmax argmin median nanmedian mode nansum
    nanmean count_nonzero special_logsumexp
    """.split()
)
_DIM_SECOND = frozenset({
    "logsumexp", "special_logsumexp", "any", "all", "argmax", "argmin", "amax", "amin", "nansum",
    "nanmean", "count_nonzero", "linalg_vector_norm", "linalg_norm", "linalg_matrix_norm", "mode",
})  # fmt: skip
"""Reductions whose default overload takes dimensions too."""
_REDUCES_UNASKED: dict[str, Argument] = {"linalg_matrix_norm": (-2, -1), "mode": -1}
"""Dimensions of reductions that do not mean all of them where none is given."""
_MEAN, _SUM = 1, 2
EXPECTED = "graphpar.expected.default"
"""The check of a branch on values (see `graphpar.frontend.decisions`); its result is zero."""


@dataclass(frozen=True)
class AnalyseBatch:
    """Mark what every value means to the samples and split reductions over them exactly.

    >>> from graphpar.ir.text import format_graph, parse_graph
    >>> print(format_graph(AnalyseBatch().run(parse_graph('''graph captured "N" batch=2
    ... %x = input("x") : float32[B,3]
    ... %m = aten.mean.default(%x) : float32[]
    ... %output = output((%m,))
    ... '''))), end="")
    graph captured "N" batch=2
    %x = input("x") : float32[B,3] {samples="sample"}
    %m_sum = aten.sum.default(%x) : float32[] {samples="partial"} from(%m) by("batch")
    %m = aten.div.Tensor(%m_sum, batch:3) : float32[] {samples="partial"} from(%m) by("batch")
    %output = output((%m,)) {samples="partial"}
    """

    name: str = "batch"
    takes: Level = "captured"
    gives: Level = "captured"

    def run(self, graph: Graph) -> Graph:
        """Build the graph with marks and split reductions."""
        return BatchBuilder(graph, self.name).run()


def mixing_reason(graph: Graph) -> str:
    """Why the batch must stay whole, as text for people; empty when it may be split.

    Only what reaches the output or changes a buffer counts, and nothing of a tail, which runs on the
    whole batch (see `tail.py`).
    """
    if why := graph.output.attr("whole"):
        return str(why)
    in_step = graph.output.attr("in_step")
    for op in graph.ops:
        same = op.attr("meets") or op.attr("samples") == "shared"
        if writes_buffer(op) and not (in_step and same):
            return f"{place_of(op)} updates a buffer once per whole batch"
    whole = graph.output.attr("samples") == "mixed" and not graph.output.attr("tail")
    return str(graph.output.attr("reduces", "")) if whole else ""


@dataclass
class BatchBuilder:
    """Builds the graph op by op; `in_step.py` builds one for parts that meet on top of it."""

    graph: Graph
    made_by: str
    ops: dict[str, Op] = field(default_factory=dict)
    states: dict[str, Samples] = field(default_factory=dict)
    early: set[str] = field(default_factory=set)
    whole: dict[str, str] = field(default_factory=dict)

    def run(self) -> Graph:
        """Build it."""
        written = written_buffers(self.graph)
        for op in self.graph.ops:
            if op.target in SOURCES:
                self._source(op, written)
            elif op.target == "output":
                self._output(op)
            else:
                self.compute(op)
        return self.graph.with_ops(self.ops.values())

    # --- bookkeeping ---

    def add(self, op: Op, state: Samples) -> Op:
        """Add an op to the graph, marked with its state."""
        state = settled(op, state) if op.target not in SOURCES else state
        op = op.with_attrs(samples=state.kind)
        if state.kind == "sample" and state.outer != 1:
            op = op.with_attrs(outer=state.outer)
        met_before = any(self.states[o].kind == "mixed" for o in op.operands())
        if state.kind == "mixed" and (not met_before or op.target == "output"):
            op = op.with_attrs(reduces=state.reason)
        self.ops[op.name] = op
        self.states[op.name] = state
        operands = op.operands()
        if op.target not in (*SOURCES, *RANDOM_TARGETS) and all(o in self.early for o in operands):
            self.early.add(op.name)
        return op

    def _source(self, op: Op, written: frozenset[str]) -> None:
        dims = op.type.batch_dims
        if not dims:
            state = SHARED
        elif len(dims) == 1:
            size = op.type.shape[dims[0]]
            state = Samples("sample", inner=size.times if isinstance(size, BatchSize) else 1)
        else:
            state = Samples("mixed", reason=f"input {op.name} has several batch dimensions")
        self.add(op, state)
        if op.target in ("input", "constant") or (op.target == "buffer" and op.name not in written):
            self.early.add(op.name)

    def _output(self, op: Op) -> None:
        op = self._shared_loss(op)
        states = [self.states[name] for name in op.operands()]
        mixed = next((s for s in states if s.kind in DISPATCHED | {"mixed", "iota"}), None)
        if mixed is not None:
            reason = mixed.reason or "a result is a position in the batch"
            self.add(op, Samples("mixed", reason=reason))
        elif any(s.kind == "partial" for s in states):
            self.add(op, PARTIAL)
        else:
            self.add(op, Samples("sample") if any(s.kind == "sample" for s in states) else SHARED)

    def _shared_loss(self, op: Op) -> Op:
        """A loss that does not depend on the batch is counted once, not once for each part of it.

        A graph for one number of samples only is never run on parts.
        """
        if not any(t is not None and t.batch_dims for source in self.graph.ops for t in source.types):
            return op
        names = op.operands()
        if len(names) != 1 or self.states[names[0]] != SHARED or not self.ops[names[0]].attr("grad"):
            return op
        loss = self.ops[names[0]]
        if not loss.makes_tensor or loss.type.numel(1) != 1:
            return op
        return map_arguments(op, {loss.name: self._share(loss, op)})

    def call(self, op: Op) -> Call:
        """What a rule is given of an op."""
        return Call(op, self.ops, self.states)

    def compute(self, op: Op) -> None:
        """Add an op that is neither a source nor the output, with what it needs besides."""
        op = sized(whole_batch_numbers(op))
        if has_loose_batch_size(op, self.call(op)):
            self.add(op, mixed(op, "computes with the size of the batch"))
            return
        if any(self.states[o].kind == "mixed" for o in op.operands()):
            op = self._with_whole_operands(op, {"mixed"})
        kind = packet(op)
        if kind in CLASS_LOSSES and self._class_loss(op):
            return
        if kind in REDUCTION and self._element_loss(op):
            return
        if kind in _REDUCTIONS and not op.target.endswith(".other") and self._reduction(op):
            return
        if op.target == EXPECTED and self._holds_for_parts(op):
            self.add(op, SHARED)
            return
        state = infer(self.call(op))
        if state.kind == "mixed" and any(self.states[o].kind == "partial" for o in op.operands()):
            op, state = self._as_whole(op, state)
            changed = self.needs_whole(op, state) if state.kind == "mixed" else None
            if changed is not None:
                self.compute(changed)
                return
        if state.kind == "partial" and kind in ("add", "sub", "rsub"):
            op = self._share_constants(op)
        if op.target in RANDOM_TARGETS and state.kind == "sample":
            op = replace(op, kwargs=(*op.kwargs, ("layout", (state.outer, state.inner))))
        self.add(op, state)

    def _holds_for_parts(self, op: Op) -> bool:
        """Whether what is expected of the whole batch follows for each part: all are, or none is."""
        asked = self.ops[op.operands()[0]]
        while packet(asked) in IDENTITY and asked.operands():
            asked = self.ops[asked.operands()[0]]
        kind = packet(asked).removeprefix("_is_").removesuffix("_true")
        return (kind, op.args[1]) in (("all", 1.0), ("any", 0.0))

    # --- whole-batch values ---

    def needs_whole(self, op: Op, state: Samples) -> Op | None:
        """An op to compute instead of one that mixes samples; None for none."""
        return None

    def _as_whole(self, op: Op, state: Samples) -> tuple[Op, Samples]:
        changed = self._with_whole_operands(op, {"partial"})
        if changed is op:
            return op, state
        return changed, infer(self.call(changed))

    def _with_whole_operands(self, op: Op, kinds: set[str]) -> Op:
        """Read operands that follow from inputs alone as computed over the whole batch."""
        change = {
            name: self._whole(name)
            for name in op.operands()
            if self.states[name].kind in kinds and self._may_be_whole(name)
        }
        return map_arguments(op, change) if change else op

    def _may_be_whole(self, name: str) -> bool:
        op = self.ops[name]
        return name in self.early and op.makes_tensor and not op.type.batch_dims

    def _whole(self, name: str) -> str:
        if name not in self.whole:
            made = self.ops[name]
            op = replace(
                made,
                name=self.fresh(f"{name}_whole"),
                target="gp.whole_batch",
                args=(Ref(name),),
                kwargs=(),
                attrs=(),
                origin=made.origin or (name,),
                made_by=self.made_by,
            )
            self.whole[name] = self.add(op, SHARED).name
        return self.whole[name]

    def _share_constants(self, op: Op) -> Op:
        """Scale what a sum over samples is added to or taken from, a number among it."""
        terms = tuple(self._as_value(op, argument) for argument in op.args[:2])
        if packet(op) == "rsub":
            terms = terms[::-1]
        if terms != op.args[:2]:
            kind = "add" if packet(op) == "add" else "sub"
            kwargs = (*op.kwargs, *(("alpha", a) for a in op.args[2:]))
            op = self._piece(op, op.name, f"aten.{kind}.Tensor", terms, kwargs)
        change = {
            name: self._share(self.ops[name], op)
            for name in op.operands()
            if self.states[name].kind == "shared"
        }
        return map_arguments(op, change)

    def _as_value(self, op: Op, argument: Argument) -> Argument:
        """A number as the op that makes it."""
        if isinstance(argument, Ref):
            return argument
        number = self._piece(op, f"{op.name}_number", "aten.full.default", ((), argument))
        scalar = TensorType((), op.type.dtype)
        kwargs = (("dtype", Symbol("dtype", scalar.dtype)), ("device", Symbol("device", "cpu")))
        made = replace(number, kwargs=kwargs, types=(scalar,), attrs=())
        return Ref(self.add(made, SHARED).name)

    def _share(self, shared: Op, user: Op) -> str:
        """The name of the part of a shared value that falls to the samples at hand."""
        share = replace(
            shared,
            name=self.fresh(f"{shared.name}_share"),
            target="gp.share",
            args=(Ref(shared.name),),
            kwargs=(),
            attrs=(),
            origin=user.origin or (user.name,),
            made_by=self.made_by,
        )
        if shared.attr("grad"):
            share = share.with_attrs(grad=True)
        return self.add(share, PARTIAL).name

    def fresh(self, name: str) -> str:
        """A name that is free, from the one wished for."""
        candidate, count = name, 0
        while candidate in self.ops or candidate in self.graph:
            count += 1
            candidate = f"{name}_{count}"
        return candidate

    # --- reductions over samples ---

    def _reduction(self, op: Op) -> bool:
        """Handle a reduction that crosses the batch dimension of a per-sample value."""
        call = self.call(op)
        x = op.args[0]
        state, kind, dim = call.state(x), call.type(x), call.dim(x)
        if state.kind != "sample" or kind is None or dim is None:
            if state.kind == "shared" and all(call.state(r) == SHARED for r in call.operands()):
                self.add(op, SHARED)
                return True
            if state.kind == "partial" and packet(op) in ("sum", "mean"):
                self.add(op, PARTIAL)
                return True
            return False
        dims = self._reduced_dims(op, len(kind.shape))
        if dim not in dims:
            self.add(op, call.like(x) if op.makes_tensor else state)
            return True
        name = packet(op)
        if name in ("sum", "nansum", "count_nonzero"):
            self.add(op, PARTIAL)
        elif name == "mean":
            self._mean(op, kind, dims)
        else:
            self.add(op, call.mixed("reduces over the batch"))
        return True

    def _reduced_dims(self, op: Op, ndim: int) -> tuple[int, ...]:
        if op.target.endswith(".default") and packet(op) not in _DIM_SECOND:
            return tuple(range(ndim))
        position = 2 if "norm" in packet(op) else 1
        default = _REDUCES_UNASKED.get(packet(op))
        return dims_argument(op.argument(position, "dim", default), ndim)

    def _mean(self, op: Op, kind: TensorType, dims: tuple[int, ...]) -> None:
        count = 1
        for d in dims:
            size = kind.shape[d]
            count *= size.times if isinstance(size, BatchSize) else size
        total = self._piece(op, f"{op.name}_sum", op.target.replace(".mean.", ".sum.").replace(
            ".sum.dim", ".sum.dim_IntList"), op.args, op.kwargs)  # fmt: skip
        self.add(total, PARTIAL)
        self._divide(op, total.name, Symbol("batch", str(count)))

    def _piece(
        self,
        op: Op,
        name: str,
        target: str,
        args: tuple[Argument, ...],
        kwargs: tuple[tuple[str, Argument], ...] = (),
    ) -> Op:
        return replace(
            op,
            name=self.fresh(name) if name != op.name else name,
            target=target,
            args=args,
            kwargs=kwargs,
            origin=op.origin or (op.name,),
            made_by=self.made_by,
        )

    def _divide(self, op: Op, total: str, by: Argument) -> None:
        self.add(self._piece(op, op.name, "aten.div.Tensor", (Ref(total), by)), PARTIAL)

    def _element_loss(self, op: Op) -> bool:
        position = REDUCTION[packet(op)]
        reduction = op.argument(position, "reduction", _MEAN)
        call = self.call(op)
        state, shape = terms(call)
        if state.kind != "sample":
            return False
        if reduction not in (_MEAN, _SUM):
            self.add(op, state)
            return True
        total = self._summed(op, position)
        if reduction == _SUM:
            self.add(replace(total, name=op.name), PARTIAL)
            return True
        self.add(total, PARTIAL)
        count = 1
        for size in shape:
            count *= size.times if isinstance(size, BatchSize) else size
        self._divide(op, total.name, Symbol("batch", str(count)))
        return True

    def _summed(self, op: Op, position: int) -> Op:
        """The same loss with reduction 'sum'."""
        args, kwargs = op.args, op.kwargs
        if len(args) > position:
            args = (*args[:position], _SUM, *args[position + 1 :])
        else:
            kwargs = (*((k, v) for k, v in kwargs if k != "reduction"), ("reduction", _SUM))
        return self._piece(op, f"{op.name}_sum", op.target, args, kwargs)

    def _class_loss(self, op: Op) -> bool:
        call = self.call(op)
        x, target = op.args[0], op.args[1]
        reduction = op.argument(3, "reduction", _MEAN)
        states = (call.state(x), call.state(target))
        if not (states[0] == states[1] and states[0].kind == "sample"):
            return False
        scores = call.type(x)
        if scores is None or len(scores.shape) < 2 or call.dim(x) != 0 or call.dim(target) != 0:
            return False
        weight = op.argument(2, "weight")
        if call.state(weight) != SHARED:
            return False
        if reduction not in (_MEAN, _SUM):
            self.add(op, states[0])
            return True
        total = self._summed(op, 3)
        if reduction == _SUM:
            self.add(replace(total, name=op.name), PARTIAL)
            return True
        assert isinstance(target, Ref)
        count = self._label_count(op, target, weight)
        self.add(total, PARTIAL)
        if isinstance(count, Ref) and self.states[count.name].kind == "partial":
            self.compute(self._piece(op, op.name, "aten.div.Tensor", (Ref(total.name), count)))
        else:
            self._divide(op, total.name, count)
        return True

    def _label_count(self, op: Op, target: Ref, weight: Argument) -> Argument:
        """The denominator of a class loss's mean, over the whole batch."""
        kind = self.ops[target.name].type
        scores = self.call(op).type(op.args[0])
        if kind.is_floating:  # class probabilities: every position counts once
            assert scores is not None
            count = 1
            for i, size in enumerate(scores.shape):
                if i != 1:
                    count *= size.times if isinstance(size, BatchSize) else size
            return Symbol("batch", str(count))
        ignored = op.argument(4, "ignore_index", -100)
        valid = self._helper(op, "valid", "aten.ne.Scalar", (target, ignored), kind, "bool")
        counted = valid
        if isinstance(weight, Ref):
            safe = self._helper(
                op, "safe", "aten.mul.Tensor", (target, Ref(valid.name)), kind, kind.dtype
            )
            dtype = self.ops[weight.name].type.dtype
            each = self._helper(
                op, "weights", "aten.index.Tensor", (weight, (Ref(safe.name),)), kind, dtype
            )
            counted = self._helper(
                op, "counted", "aten.mul.Tensor", (Ref(each.name), Ref(valid.name)), kind, dtype
            )
        dtype = "int64" if counted.type.dtype == "bool" else counted.type.dtype
        total = self._helper(
            op, "count", "aten.sum.default", (Ref(counted.name),), TensorType((), dtype), dtype
        )
        # What the model itself computes is known only when all parts have been worked on.
        return Ref(self._whole(total.name) if self._may_be_whole(total.name) else total.name)

    def _helper(
        self,
        op: Op,
        suffix: str,
        target: str,
        args: tuple[Argument, ...],
        like: TensorType,
        dtype: str,
    ) -> Op:
        piece = self._piece(op, f"{op.name}_{suffix}", target, args)
        piece = replace(piece, types=(TensorType(like.shape, dtype),), attrs=())
        return self.add(piece, PARTIAL if suffix == "count" else infer(self.call(piece)))
