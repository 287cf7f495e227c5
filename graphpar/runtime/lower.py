"""From one stage of a lowered graph to a `torch.fx.GraphModule` for one microbatch size.

Passes never touch torch; this module is where the graph becomes executable, at the very end.
"""

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from graphpar.errors import VerifyError
from graphpar.frontend.torch_private import is_random, lookup_op
from graphpar.ir.formats import multiplies_8_bits
from graphpar.ir.graph import Graph
from graphpar.ir.ops import SOURCES, Argument, BatchSize, Op, Ref, Symbol, TensorType
from graphpar.ir.optable import packet
from graphpar.ir.recomputed import Units
from graphpar.runtime.attention import ATTENTION, attention
from graphpar.runtime.casts import LowerWeights
from graphpar.runtime.complex_ops import OF_COMPLEX
from graphpar.runtime.deferral import Deferral, Late
from graphpar.runtime.eight_bits import EightBitProduct, EightBitWeights
from graphpar.runtime.failed_op import with_places
from graphpar.runtime.group_ops import group_module
from graphpar.runtime.in_step import BatchNormOfParts, Meetings, SumParts
from graphpar.runtime.overlap import overlap_module
from graphpar.runtime.own_ops import Attention, Bernoulli, CastWeight, Dropout, Random, Share
from graphpar.runtime.random import Layout, Part, StepContext
from graphpar.runtime.recompute import Recomputed, UnitPart, cut_out
from graphpar.runtime.steady import Steady, leave_out
from graphpar.runtime.team import Team


@dataclass(frozen=True)
class Message:
    """A value that crosses to another stage: its tag, the other stage, and whether gradients return."""

    tag: int
    name: str
    stage: int
    has_gradient: bool


@dataclass(frozen=True)
class Collect:
    """A value of which the tail reads what all parts of the batch make.

    Attributes:
        name: The op that stands for the whole.
        part: The value that each microbatch gives.
        type: Type of both; with the microbatch's size or the batch's.
        kind: What it means to the samples: sample, partial or shared.
        outer: How often the batch is repeated along its dimension.
    """

    name: str
    part: str
    type: TensorType
    kind: str
    outer: int
    has_gradient: bool

    @property
    def layout(self) -> tuple[int, int]:
        """The dimension that belongs to the samples, and how many rows in sequence are of one."""
        (dim,) = self.type.batch_dims
        size = self.type.shape[dim]
        assert isinstance(size, BatchSize)
        return dim, size.times // self.outer


@dataclass(frozen=True)
class TailInterface:
    """What the tail of a stage reads of the whole batch, and which of the graph's results it makes."""

    inputs: tuple[str, ...]
    collects: tuple[Collect, ...]
    results: tuple[tuple[int, str], ...]


@dataclass(frozen=True)
class StageInterface:
    """What a stage reads and makes.

    Attributes:
        stage: Number of the stage in its pipeline.
        inputs: Labels of the graph inputs it reads.
        tensors: Labels of the parameters, buffers and constants it holds, by kind.
        receives: Values from earlier stages.
        sends: Values for later stages; a value with several readers stands here once for each.
        results: Names of the graph's results it makes, with their place among all results.
        tail: What runs once on the whole batch, if anything; none of the above but the tensors is its.
    """

    stage: int
    inputs: tuple[str, ...]
    tensors: Mapping[str, tuple[str, ...]]
    receives: tuple[Message, ...]
    sends: tuple[Message, ...]
    results: tuple[tuple[int, str], ...]
    tail: TailInterface | None = None


def stage_ops(graph: Graph, stage: int) -> tuple[Op, ...]:
    """The ops of one stage, and the sources they read, in order of execution."""
    own = [op for op in graph.ops if op.attr("stage") == stage]
    read = {name for op in own for name in op.operands() if op.target != "gp.recv"}
    sources = [
        op for op in graph.ops if op.target in SOURCES and (op.name in read or op.attr("held") == stage)
    ]
    return (*sources, *own)


def interface(graph: Graph, stage: int) -> StageInterface:
    """What a stage of a lowered graph reads and makes."""
    ops = stage_ops(graph, stage)
    parts, whole = in_parts_and_tail(ops)
    return StageInterface(
        stage=stage,
        inputs=_labels(parts, "input"),
        tensors={kind: _labels(ops, kind) for kind in ("parameter", "buffer", "constant")},
        receives=tuple(_message(op) for op in ops if op.target == "gp.recv"),
        sends=tuple(_message(op) for op in ops if op.target == "gp.send"),
        results=_results(graph, parts),
        tail=TailInterface(
            inputs=_labels(whole, "input"),
            collects=tuple(_collect(op) for op in whole if op.target == "gp.collect"),
            results=_results(graph, whole),
        )
        if whole
        else None,
    )


def in_parts_and_tail(ops: Sequence[Op]) -> tuple[tuple[Op, ...], tuple[Op, ...]]:
    """A stage's ops that run for each microbatch, and those of its tail, each with their sources."""
    tail = [op for op in ops if op.attr("tail")]
    if not tail:
        return tuple(ops), ()
    read_by_tail = {name for op in tail for name in op.operands()}
    read_before = {name for op in ops if not op.attr("tail") for name in op.operands()}
    idle = {op.name for op in ops if op.target in SOURCES and op.name in read_by_tail - read_before}
    parts = tuple(op for op in ops if not op.attr("tail") and op.name not in idle)
    sources = [op for op in ops if op.target in SOURCES and op.name in read_by_tail]
    return parts, (*sources, *tail)


def _labels(ops: Sequence[Op], target: str) -> tuple[str, ...]:
    return tuple(str(op.args[0]) for op in ops if op.target == target)


def _results(graph: Graph, ops: Sequence[Op]) -> tuple[tuple[int, str], ...]:
    mine = {op.name for op in ops if op.target not in SOURCES}
    return tuple((i, n) for i, n in enumerate(graph.output.operands()) if n in mine)


def _collect(op: Op) -> Collect:
    outer = op.attr("outer", 1)
    assert isinstance(outer, int)
    kind = str(op.attr("samples"))
    return Collect(op.name, op.operands()[0], op.type, kind, outer, bool(op.attr("grad")))


def _message(op: Op) -> Message:
    stage, tag = op.args[1], op.args[2]
    assert isinstance(stage, int) and isinstance(tag, int)
    return Message(tag, op.name, stage, bool(op.attr("grad")))


class StageBuilder:
    """Builds the modules of one stage, one per microbatch size, all on the same tensors.

    Args:
        graph: A lowered graph.
        stage: Which stage of it.
        tensors: Parameters, buffers and constants by label, on their device.
        device: Where the stage runs.
        context: Filled in before each forward.
        lower_weights: The rank's weights in lower formats.
        team: The rank's tensor group; None where it works alone.
        recompute: Ops of the units whose values are computed again for the backward.
        deferral: Where ops with late weights note what they owe; None where backward is done at once.
        meetings: Where the rank's part of the batch meets others; None where it has all of it.
    """

    def __init__(
        self,
        graph: Graph,
        stage: int,
        tensors: Mapping[str, torch.Tensor],
        device: torch.device,
        context: StepContext,
        lower_weights: LowerWeights | None = None,
        team: Team | None = None,
        recompute: Units = (),
        deferral: Deferral | None = None,
        meetings: Meetings | None = None,
    ) -> None:
        self.team = team
        self.ops = stage_ops(graph, stage)
        self.interface = interface(graph, stage)
        self.tensors, self.device, self.context = tensors, device, context
        self._lower_weights = lower_weights or LowerWeights()
        self._eight_bits = EightBitWeights(self._lower_weights)
        self._recompute, self._meetings = recompute, meetings
        self._parts, self._tail = in_parts_and_tail(self.ops)
        self._deferral = deferral
        self._modules: dict[tuple[int, int], fx.GraphModule] = {}
        self._tails: dict[int, fx.GraphModule] = {}

    def module(self, samples: int, batch: int) -> fx.GraphModule:
        """The stage for microbatches of so many samples of a global batch of so many.

        Its arguments are the inputs, then the received values; its results the values to send, then
        the graph's results and what the tail collects, each in the order of the interface.
        """
        key = (samples, batch)
        if key not in self._modules:
            results = [name for _, name in self.interface.results]
            collects = self.interface.tail.collects if self.interface.tail is not None else ()
            results += [collect.part for collect in collects]
            self._modules[key] = self._build(self._parts, results, _Stamp(samples, batch, self.device))
        return self._modules[key]

    def tail(self, batch: int) -> fx.GraphModule:
        """The stage's tail for a global batch of so many samples.

        Its arguments are the inputs of the whole batch, then the collected values; its results those
        of the graph, in the order of the interface.
        """
        if batch not in self._tails:
            assert self.interface.tail is not None
            results = [name for _, name in self.interface.tail.results]
            self._tails[batch] = self._build(self._tail, results, _Stamp(batch, batch, self.device))
        return self._tails[batch]

    def whole(self, inputs: Mapping[str, torch.Tensor], batch: int) -> list[torch.Tensor]:
        """Results of a stage that is all there is, for the whole batch at once."""
        _, found = self.module(batch, batch)(*(inputs[label] for label in self.interface.inputs))
        results = dict(self._by_place(self.interface.results, found))
        tail = self.interface.tail
        if tail is not None:
            collected = found[len(self.interface.results) :]
            _, last = self.tail(batch)(*(inputs[label] for label in tail.inputs), *collected)
            results.update(self._by_place(tail.results, last))
        return [results[place] for place in sorted(results)]

    @staticmethod
    def _by_place(
        results: tuple[tuple[int, str], ...], values: Sequence[torch.Tensor]
    ) -> Iterator[tuple[int, torch.Tensor]]:
        return ((place, value) for (place, _), value in zip(results, values, strict=False))

    def _build(self, ops: Sequence[Op], results: Sequence[str], stamp: "_Stamp") -> fx.GraphModule:
        root = nn.Module()
        graph = fx.Graph()
        env: dict[str, Any] = {}
        for kinds in (("input",), ("gp.recv", "gp.collect")):
            for op in ops:
                if op.target in kinds:
                    env[op.name] = graph.placeholder(_identifier(op.name))
        sends: list[fx.Node] = []
        steady = self._steady(ops, results, stamp)
        for name, value in steady.values.items():
            if not isinstance(value, torch.Tensor):  # `item()` of a constant
                env[name] = value
                continue
            root.register_buffer(_identifier(name), value)
            env[name] = graph.get_attr(_identifier(name))
        for item in self._in_parts(steady, results):
            if isinstance(item, UnitPart):
                env.update(self._part(root, graph, item, env, stamp))
            elif item.target == "gp.send":
                sends.append(env[item.operands()[0]])
                env[item.name] = sends[-1]
            elif item.target in SOURCES and item.target != "input":
                env[item.name] = self._attach(root, graph, item)
            elif item.name not in env:
                env[item.name] = self._run(root, graph, item, env, stamp)
        graph.output((tuple(sends), tuple(env[name] for name in results)))
        return with_places(fx.GraphModule(root, graph), ops, env)

    def _in_parts(self, steady: Steady, results: Sequence[str]) -> Sequence[Op | UnitPart]:
        """What runs in order; recomputed units are one part each, the tail is kept as it is."""
        if not self._recompute or any(op.attr("tail") for op in steady.ops):
            return steady.ops
        buffers = {op.name: op for op in self.ops if op.target == "buffer"}
        return cut_out(steady.ops, self._recompute, results, buffers)

    def _part(
        self,
        root: nn.Module,
        graph: fx.Graph,
        part: UnitPart,
        env: Mapping[str, fx.Node],
        stamp: "_Stamp",
    ) -> dict[str, fx.Node]:
        """A module for the part, called on what it reads; the values it gives by name."""
        inner_root, inner = nn.Module(), fx.Graph()
        inside = {name: inner.placeholder(_identifier(name)) for name in part.reads}
        for op in part.ops:
            inside[op.name] = self._run(inner_root, inner, op, inside, stamp)
        inner.output(tuple(inside[name] for name in part.gives))
        name = f"{_identifier(part.ops[0].name)}_unit"
        root.add_module(
            name, Recomputed(with_places(fx.GraphModule(inner_root, inner), part.ops, inside))
        )
        made = graph.call_module(name, tuple(env[n] for n in part.reads))
        return {n: graph.call_function(operator.getitem, (made, i)) for i, n in enumerate(part.gives)}

    def _run(
        self, root: nn.Module, graph: fx.Graph, op: Op, env: Mapping[str, fx.Node], stamp: "_Stamp"
    ) -> fx.Node:
        swap = self._meetings.at(op.name) if self._meetings is not None else None
        if op.target == "gp.sum_parts" or (swap is not None and packet(op) == "batch_norm"):
            name = f"{_identifier(op.name)}_op"
            module = (
                SumParts(swap) if swap is None or op.target == "gp.sum_parts" else BatchNormOfParts(swap)
            )
            root.add_module(name, module)
            return graph.call_module(name, tuple(stamp.argument(a, env) for a in op.args))
        if op.target.startswith("gp."):
            return self._own(root, graph, op, env, stamp)
        if multiplies_8_bits(op):
            return self._in_8_bits(root, graph, op, env, stamp)
        if self._deferral is not None and op.attr("late"):
            return self._late(root, graph, op, env, stamp)
        return _call(graph, op, env, stamp)

    def _in_8_bits(
        self, root: nn.Module, graph: fx.Graph, op: Op, env: Mapping[str, fx.Node], stamp: "_Stamp"
    ) -> fx.Node:
        name = f"{_identifier(op.name)}_8_bits"
        root.add_module(name, EightBitProduct(self._eight_bits, is_linear=packet(op) == "linear"))
        given = (*op.args, *(value for _, value in op.kwargs))
        return graph.call_module(name, tuple(stamp.argument(a, env) for a in given))

    def _late(
        self, root: nn.Module, graph: fx.Graph, op: Op, env: Mapping[str, fx.Node], stamp: "_Stamp"
    ) -> fx.Node:
        places = op.attr("late")
        assert isinstance(places, tuple) and self._deferral is not None
        name = f"{_identifier(op.name)}_late"
        whole = [place for place in places if isinstance(place, int)]
        root.add_module(name, Late(_function(op), whole, self._deferral))
        arguments = tuple(stamp.argument(a, env) for a in op.args)
        return graph.call_module(name, arguments, {k: stamp.argument(v, env) for k, v in op.kwargs})

    def _steady(self, ops: Sequence[Op], results: Sequence[str], stamp: "_Stamp") -> Steady:
        """Compute what needs neither inputs, weights nor buffers."""
        values: dict[str, Any] = {}
        with torch.no_grad():
            for op in ops:
                if op.target == "constant":
                    values[op.name] = self.tensors[str(op.args[0])]
                elif _is_steady(op, values):
                    arguments = [stamp.argument(a, values) for a in op.args]
                    keywords = {k: stamp.argument(v, values) for k, v in op.kwargs}
                    values[op.name] = _function(op)(*arguments, **keywords)
        return leave_out(ops, values, results)

    def _attach(self, root: nn.Module, graph: fx.Graph, op: Op) -> fx.Node:
        name = _identifier(op.name)
        tensor = self.tensors[str(op.args[0])]
        if isinstance(tensor, nn.Parameter):
            root.register_parameter(name, tensor)
        else:
            root.register_buffer(name, tensor)
        return graph.get_attr(name)

    def _own(
        self, root: nn.Module, graph: fx.Graph, op: Op, env: Mapping[str, fx.Node], stamp: "_Stamp"
    ) -> fx.Node:
        arguments = tuple(stamp.argument(a, env) for a in op.args)
        name = f"{_identifier(op.name)}_op"
        root.add_module(name, self._own_module(op, stamp))
        if op.target == "gp.random":
            shape, dtype = arguments[1], stamp.dtype(str(op.args[2]))
            arguments = (arguments[0], shape, dtype, self.device, *arguments[3:])
        return graph.call_module(name, arguments)

    def _own_module(self, op: Op, stamp: "_Stamp") -> nn.Module:
        if op.target == "gp.share":
            return Share(self.context)
        if op.target == "gp.cast_weight":
            return CastWeight(self._lower_weights)
        of_group = _group_module(op, self.team)
        if of_group is not None:
            return of_group
        stream, given = op.kwarg("stream"), op.kwarg("layout")
        assert isinstance(stream, int)
        layout = None
        if isinstance(given, tuple):
            outer, inner = given
            assert isinstance(outer, int) and isinstance(inner, int)
            layout = Layout(op.type.batch_dims[0], outer, inner)
        classes = {
            "gp.dropout": Dropout,
            "gp.bernoulli": Bernoulli,
            "gp.random": Random,
            "gp.attention": Attention,
        }
        return classes[op.target](self.context, stream, layout, _parts(op, stamp))


def _group_module(op: Op, team: Team | None) -> nn.Module | None:
    """The module of an op by which members of a tensor group work together."""
    given = op.kwarg("owned")
    owned = (bool(given[0]), bool(given[1])) if isinstance(given, tuple) else (False, False)
    kind = op.args[1] if len(op.args) > 1 else ""
    named = kind if isinstance(kind, str) else ""
    axis = op.kwarg("axis")
    if team is not None and isinstance(axis, int):
        team = team.along(axis)
    return group_module(op.target, team, owned) or overlap_module(op.target, named, owned, team)


def _parts(op: Op, stamp: "_Stamp") -> tuple[Part, ...]:
    """Which slice of its result a random op makes in a tensor group, and which slice of that."""
    found = []
    for given in (op.kwarg("part"), op.kwarg("inner_part")):
        if isinstance(given, tuple):
            dim, counts, inner, member = given
            assert isinstance(dim, int) and isinstance(inner, int) and isinstance(member, int)
            assert isinstance(counts, tuple)
            units = (stamp.argument(count, {}) for count in counts)
            found.append(Part(dim, tuple(units), inner, member))
    return tuple(found)


class _Stamp:
    """Turns arguments of the graph into torch's, for one microbatch size on one device."""

    def __init__(self, samples: int, batch: int, device: torch.device) -> None:
        self.samples, self.batch, self.device = samples, batch, device

    def argument(self, value: Argument, env: Mapping[str, Any]) -> Any:
        """One argument; references become what `env` holds for them."""
        if isinstance(value, Ref):
            return env[value.name]
        if isinstance(value, BatchSize):
            return value.at(self.samples)
        if isinstance(value, tuple):
            return [self.argument(v, env) for v in value]
        return self.symbol(value) if isinstance(value, Symbol) else value

    def symbol(self, value: Symbol) -> Any:
        """A torch constant; any device becomes the stage's own."""
        if value.kind == "batch":
            times = float(value.value) if "." in value.value else int(value.value)
            return times * self.batch
        if value.kind == "device":
            return self.device
        return self.dtype(value.value)

    def dtype(self, name: str) -> Any:
        """A dtype, layout or memory format by its name in torch."""
        return getattr(torch, name)


def _is_steady(op: Op, values: Mapping[str, Any]) -> bool:
    """Whether torch computes the op from known values alone, without drawing at random."""
    if not all(name in values for name in op.operands()):
        return False
    return op.target == "getitem" or (op.target.startswith("aten.") and not is_random(_function(op)))


def _call(graph: fx.Graph, op: Op, env: Mapping[str, fx.Node], stamp: _Stamp) -> fx.Node:
    arguments = tuple(stamp.argument(a, env) for a in op.args)
    keywords = {k: stamp.argument(v, env) for k, v in op.kwargs}
    function = attention if op.target == ATTENTION and op.attr("grad") else _function(op)
    return graph.call_function(function, arguments, keywords)


def _function(op: Op) -> Callable[..., Any]:
    """What torch calls for an op."""
    if op.target == "getitem":
        return operator.getitem
    if op.target in OF_COMPLEX and op.type.dtype.startswith("complex"):
        return OF_COMPLEX[op.target]
    try:
        function: Callable[..., Any] = lookup_op(op.target)
    except AttributeError:
        raise VerifyError(
            f"Op %{op.name} calls {op.target}, which torch {torch.__version__} does not have and no "
            "module known to this worker defines. Plan again with the torch version that runs the job, "
            "or define the operator with torch.library.custom_op."
        ) from None
    return function


def _identifier(name: str) -> str:
    """A name for a value that no attribute of `nn.Module` (`to`, `half`, `type`) bears already."""
    return "v_" + "".join(c if c.isalnum() else "_" for c in name)
