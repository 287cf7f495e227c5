"""From an exported program to our ops, all sizes still concrete.

Regions without gradient are inlined with their inputs detached, assertions are dropped, in-place ops
on fresh values become their functional form, and `requires_grad` is propagated by us because the
exported metadata is unreliable.
"""

import operator
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ConstantArgument,
    InputKind,
    OutputKind,
    TensorArgument,
)

from graphpar.errors import CaptureError
from graphpar.frontend.casting import Caster
from graphpar.frontend.conditions import Count
from graphpar.frontend.explain import OWN_GENERATOR
from graphpar.frontend.functionalize import is_parts
from graphpar.frontend.out_arguments import without_out_arguments
from graphpar.frontend.places import place, strip_prefix, unsupported
from graphpar.frontend.torch_private import (
    higher_order_name,
    is_random,
    mutated_arguments,
    op_name,
)
from graphpar.frontend.vmaps import AUTOCAST, casting_of, without_vmaps
from graphpar.frontend.weightless import values_of
from graphpar.frontend.writes import Values, dtype_name, is_off
from graphpar.ir.ops import SOURCES, Argument, Op, Ref, Symbol, TensorType, map_arguments
from graphpar.runtime.expected import EXPECTED

_ASSERTIONS = (
    "aten._assert", "aten.sym_constrain", "aten._functional_assert", "aten._assert_tensor_metadata",
)  # fmt: skip
_NUMBERS = re.compile(r"_\d+(?=[_@]|$)|@\d+$")
_KNOWN_RANDOM = frozenset({
    "aten.dropout.default", "aten.dropout_.default", "aten.feature_dropout.default",
    "aten.feature_dropout_.default", "aten.bernoulli_.float",
    "aten.scaled_dot_product_attention.default", "aten.rand.default", "aten.rand_like.default",
    "aten.randn.default", "aten.randn_like.default", "aten.bernoulli.default", "aten.bernoulli.p",
    "aten.uniform_.default", "aten.normal_.default", "aten.exponential_.default",
    "aten.randint.default", "aten.randint.low", "aten.randint_like.default",
    "aten.randint_like.low_dtype", "aten.normal.float_float",
    "aten.lstm.input", "aten.gru.input", "aten.rnn_tanh.input", "aten.rnn_relu.input",
})  # fmt: skip


@dataclass(frozen=True)
class Converted:
    """Ops with concrete sizes, flat inputs and results, and constants that export lifted.

    `inputs` and `results` hold for each flat argument and result of the user's function the name of
    its op, or a `Literal`. `overwritten` are the inputs that the model writes to.
    """

    ops: tuple[Op, ...]
    inputs: tuple["str | Literal", ...]
    results: tuple["str | Literal", ...]
    constants: Mapping[str, torch.Tensor]
    overwritten: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Literal:
    """An argument or result that is no tensor and the same at every call."""

    value: Any


def convert(
    program: ExportedProgram,
    model: nn.Module,
    differentiable: frozenset[int] = frozenset(),
    *,
    keeps_inputs: bool = False,
    aliased: frozenset[int] = frozenset(),
) -> Converted:
    """Translate an exported program op by op.

    Args:
        program: What torch.export made of the model.
        model: The model, for its parameters' names.
        differentiable: Places of the flat inputs that carry gradients; none for a whole model.
        keeps_inputs: Whether a write to an input is refused; else it changes a copy.
        aliased: Places of the flat inputs that share memory with others; a write to them is refused.

    Raises:
        CaptureError: An op cannot be translated; names the module and line.
    """
    given = [s.arg.name for s in program.graph_signature.input_specs if s.kind == InputKind.USER_INPUT]
    values = Values(keeps_inputs=keeps_inputs, shared=frozenset(given[place] for place in aliased))
    return _Converter(program, model, differentiable, values).run()


def renumbered(converted: Converted) -> Converted:
    """The same with ops of like names counted through, whatever numbers export gave them."""
    taken = {op.name for op in converted.ops if op.target in (*SOURCES, "output")}
    counts: Counter[str] = Counter()
    change: dict[str, str] = {}
    ops = []
    for op in converted.ops:
        if op.target not in (*SOURCES, "output"):
            name = _counted(_NUMBERS.sub("", op.name), counts, taken)
            taken.add(name)
            change[op.name] = name
        ops.append(replace(map_arguments(op, change), name=change.get(op.name, op.name)))
    results = tuple(change.get(r, r) if isinstance(r, str) else r for r in converted.results)
    return replace(converted, ops=tuple(ops), results=results)


def _counted(stem: str, counts: Counter[str], taken: set[str]) -> str:
    while True:
        name = f"{stem}_{counts[stem]}" if counts[stem] else stem
        counts[stem] += 1
        if name not in taken:
            return name


@dataclass
class _Converter:
    program: ExportedProgram
    model: nn.Module
    differentiable: frozenset[int]
    values: Values = field(default_factory=Values)
    constants: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.caster = Caster(self.values)

    def run(self) -> Converted:
        without_out_arguments(self.program.graph_module)
        without_vmaps(self.program.graph_module)
        signature = self.program.graph_signature
        graph = self.program.graph_module.graph
        nodes = {node.name: node for node in graph.nodes if node.op == "placeholder"}
        trained = {n for n, p in self.model.named_parameters(remove_duplicate=False) if p.requires_grad}
        given = [spec for spec in signature.input_specs if spec.kind == InputKind.USER_INPUT]
        carry = {spec.arg.name for i, spec in enumerate(given) if i in self.differentiable}
        for spec in signature.input_specs:
            self._source(spec, nodes, trained | carry)
        self._inline(self.program.graph_module, outer=True)
        results = self._results(graph, signature.output_specs)
        self._refuse_random_branches()
        ops = [*self.values.ops.values(), _output(results)]
        inputs = tuple(_flat_input(spec.arg) for spec in given)
        overwritten = frozenset(self.values.overwritten)
        return Converted(tuple(ops), inputs, results, self.constants, overwritten)

    def _source(self, spec: Any, nodes: Mapping[str, fx.Node], trained: set[str]) -> None:
        if isinstance(spec.arg, ConstantArgument) or spec.kind == InputKind.TOKEN:
            node = nodes.get(spec.arg.name)
            if node is not None:
                self.values.env[node] = getattr(spec.arg, "value", None)
            return
        node = nodes[spec.arg.name]
        if not isinstance(spec.arg, TensorArgument):
            raise self._not_a_tensor(spec, node)
        target = {
            InputKind.PARAMETER: "parameter",
            InputKind.BUFFER: "buffer",
            InputKind.CONSTANT_TENSOR: "constant",
            InputKind.USER_INPUT: "input",
        }[spec.kind]
        label = strip_prefix(spec.target) if spec.target else spec.arg.name
        if target == "constant":
            self.constants[label] = values_of(self.program.constants[spec.target])
        op = Op(node.name, target, (label,), types=_types(node.meta["val"])[0])
        if target in ("parameter", "input") and label in trained and op.type.is_floating:
            op = op.with_attrs(grad=True)
        self._emit(node, op)

    def _not_a_tensor(self, spec: Any, node: fx.Node) -> CaptureError:
        value = self.program.constants.get(spec.target or "")
        reader = next(iter(node.users), node)
        if isinstance(value, torch.Generator):
            return unsupported(reader, "; ".join(OWN_GENERATOR))
        return unsupported(
            reader,
            f"it reads {spec.arg.name!r}, a {type(value or spec.arg).__name__}, and only tensors and "
            "constants can be sent to workers; pass it as a tensor",
        )

    def _emit(self, node: fx.Node, op: Op) -> None:
        self.values.ops[op.name] = op
        self.values.env[node] = Ref(op.name)

    def _inline(self, module: fx.GraphModule, *, outer: bool) -> list[Argument]:
        """Translate every call of a (sub)graph; the inner graph's placeholders are already bound.

        Calls that serve assertions alone are left out: they are often of sizes that depend on the data
        (a count of placeholders for pictures, say), which no static graph can hold.
        """
        needed = _needed(module.graph)
        for node in module.graph.nodes:
            if node not in needed:
                self.values.env[node] = None  # nothing reads it later either
                continue
            if node.op == "call_function":
                try:
                    self._call(module, node)
                except (CaptureError, AssertionError):
                    raise
                except Exception as error:
                    what = f"{node.target} cannot be translated ({type(error).__name__}: {error})"
                    raise unsupported(node, what) from error
            elif node.op == "get_attr":
                self._attribute(module, node)
            elif node.op == "output" and not outer:
                returned = node.args[0]
                parts = returned if isinstance(returned, (tuple, list)) else (returned,)
                return [self._argument(p) for p in parts]
        return []

    def _attribute(self, module: fx.GraphModule, node: fx.Node) -> None:
        value = operator.attrgetter(str(node.target))(module)
        if isinstance(value, torch.Tensor):
            label = f"{node.name}_{len(self.constants)}"
            self.constants[label] = values_of(value)
            self._emit(
                node, Op(self.values.fresh(node.name), "constant", (label,), types=_types(value)[0])
            )

    def _call(self, module: fx.GraphModule, node: fx.Node) -> None:
        higher = higher_order_name(node.target)
        if higher is not None:
            self._region(module, node, higher)
        elif node.target is operator.getitem:
            self._getitem(node)
        else:
            name = op_name(node.target)
            if name is None:
                value = self._scalar(node)
                self.values.env[node] = value
            elif not name.startswith(_ASSERTIONS):
                self._operator(node, name)

    def _scalar(self, node: fx.Node) -> Argument:
        value = node.meta.get("val")
        if isinstance(value, (int, float, bool)):
            return value
        raise unsupported(node, f"{node.target} is no tensor operator")

    def _region(self, module: fx.GraphModule, node: fx.Node, higher: str) -> None:
        casting = self.caster.casting
        before: dict[Argument, Argument] = {}
        if higher == "wrap_with_set_grad_enabled":
            enabled, body, *operands = node.args
            given = values = [self._argument(a) for a in operands]
            if not enabled:
                values = [self._detached(v, node) for v in values]
                before = dict(zip(values, given, strict=True))
        elif higher == AUTOCAST:
            _device, _dtype, _enabled, _cache, body, *operands = node.args
            values = [self._argument(a) for a in operands]
            casting = casting_of(node)
        else:
            raise unsupported(
                node,
                f"the higher-order operator {higher} (control flow or a nested graph); for torch.cond, "
                "compute both branches and choose with torch.where(condition, a, b), for the others "
                "write the loop in Python",
            )
        assert isinstance(body, fx.Node)
        inner = getattr(module, str(body.target))
        places = [n for n in inner.graph.nodes if n.op == "placeholder"]
        self.values.env.update(zip(places, values, strict=True))
        outside = set(self.values.ops)
        with self.caster.under(casting):
            made = self._inline(inner, outer=False)
        if higher == AUTOCAST and casting is None:
            self._keep_formats(outside)
        # What returns its argument, such as a cast to the type that it has, keeps its gradient.
        self.values.env[node] = tuple(
            before.get(self._itself(m), m) if isinstance(m, Ref) else m for m in made
        )

    def _keep_formats(self, outside: set[str]) -> None:
        """Mark what was made since as computing in its own types, whatever precision= says."""
        for name, op in self.values.ops.items():
            if name not in outside and op.target not in SOURCES:
                self.values.ops[name] = op.with_attrs(island=True)

    def _itself(self, value: Ref) -> Ref:
        return Ref(self.values.itself(self.values.ops[value.name]).name)

    def _detached(self, value: Argument, node: fx.Node) -> Argument:
        if not isinstance(value, Ref):
            return value
        made = self.values.ops[value.name]
        if not made.attr("grad"):
            return value
        name = self.values.fresh(f"{value.name}_detached")
        module, source = place(node)
        self.values.ops[name] = Op(
            name, "aten.detach.default", (value,), types=made.types, module=module, source=source
        )
        self.values.views[name] = value.name
        return Ref(name)

    def _getitem(self, node: fx.Node) -> None:
        container = self._argument(node.args[0])
        index = node.args[1]
        assert isinstance(index, int)
        if isinstance(container, tuple):
            self.values.env[node] = container[index]
            return
        assert isinstance(container, Ref)
        producer = self.values.ops[container.name]
        kind = producer.types[index]
        op = replace(
            producer,
            name=self.values.fresh(node.name),
            target="getitem",
            args=(container, index),
            kwargs=(),
            types=(kind,),
            is_tuple=False,
            attrs=(),
        )
        if producer.attr("grad") and kind is not None and kind.is_floating:
            op = op.with_attrs(grad=True)
        if producer.name in self.values.views:
            whole = producer.name
            self.values.views[op.name] = self.values.views[whole] if is_parts(producer) else whole
        self._emit(node, op)

    def _operator(self, node: fx.Node, name: str) -> None:
        function = node.target
        name, keywords = _without_no_generator(name, node.kwargs)
        if is_random(function) and name not in _KNOWN_RANDOM and not is_off(node, name):
            raise unsupported(node, f"{name} draws random numbers in a way that would depend on the plan")
        if _drops_between_layers(node, name):
            raise unsupported(
                node,
                f"{name} drops out between its layers, with random numbers that would depend on the "
                "plan; set its dropout to 0 and put nn.Dropout between single layers",
            )
        try:
            types, is_tuple = _types(node.meta.get("val"))
        except ValueError as error:
            raise unsupported(node, str(error)) from None
        module, source = place(node)
        op = Op(
            self.values.fresh(node.name),
            name,
            tuple(self._argument(a) for a in node.args),
            tuple((k, self._argument(v)) for k, v in keywords.items()),
            types,
            is_tuple,
            module,
            source,
        )
        op = self.caster.cast(node, op)
        if mutated_arguments(function) and not name.startswith("aten."):
            op = op.with_attrs(writes=True)  # its name does not tell
        made = self.values.functional(node, op)
        if made is not op:
            self.values.env[node] = Ref(made.name)
            return
        self._emit(node, self.values.with_gradient(op))
        self.values.note_view(node, op)

    def _argument(self, value: Any) -> Argument:
        if isinstance(value, fx.Node):
            return self.values.env[value]
        if isinstance(value, (list, tuple)):
            return tuple(self._argument(v) for v in value)
        if value is None or isinstance(value, (bool, int, float, complex, str)):
            return int(value) if isinstance(value, Count) else value
        for kind, cls in (
            ("dtype", torch.dtype), ("device", torch.device), ("layout", torch.layout),
            ("memory_format", torch.memory_format),
        ):  # fmt: skip
            if isinstance(value, cls):
                return Symbol(kind, str(value).removeprefix("torch."))
        raise ValueError(f"an argument of type {type(value).__name__} cannot be kept in a graph")

    def _refuse_random_branches(self) -> None:
        """A branch on a number just drawn (a layer skipped at random) is another one at each step."""
        drawn: dict[str, bool] = {}
        for op in self.values.ops.values():
            if op.target in SOURCES:
                drawn[op.name] = False
                continue
            before = [drawn[o] for o in op.operands()]
            drawn[op.name] = all(before) and (bool(before) or op.target in _KNOWN_RANDOM)
            if op.target == EXPECTED and drawn[op.name]:
                raise CaptureError(
                    f"Module {op.module or '(top)'!r} at {op.args[2]} decides at random what to compute, "
                    "which a captured graph would decide once for all steps. Switch it off (layers "
                    "skipped at random: layerdrop, drop_path = 0), or choose with torch.where."
                )

    def _results(self, graph: fx.Graph, specs: list[Any]) -> tuple["str | Literal", ...]:
        returned = next(n for n in graph.nodes if n.op == "output").args[0]
        results: list[str | Literal] = []
        for spec, value in zip(specs, returned, strict=True):
            if spec.kind != OutputKind.USER_OUTPUT:
                raise CaptureError(
                    f"The model changes {spec.target or 'an input'} in a way that cannot be replayed "
                    f"({spec.kind.name}); return the new value instead of writing it in place."
                )
            argument = self._argument(value)
            results.append(argument.name if isinstance(argument, Ref) else Literal(value))
        return tuple(results)


def _needed(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that results depend on, or that write to something; assertions are not needed."""
    found: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "output" or node in found or _has_effect(node):
            found.add(node)
            found.update(node.all_input_nodes)
    return found


def _has_effect(node: fx.Node) -> bool:
    if node.op != "call_function":
        return False
    if higher_order_name(node.target) is not None:
        return True
    name = op_name(node.target)
    return name is not None and not name.startswith(_ASSERTIONS) and bool(mutated_arguments(node.target))


def _without_no_generator(name: str, keywords: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """`torch.rand(..., generator=None)` as what it is: the operator that takes no generator."""
    if keywords.get("generator", ...) is not None:
        return name, keywords
    plain = name.replace(".low_generator", ".low").replace(".generator", ".default")
    return plain, {key: value for key, value in keywords.items() if key != "generator"}


def _drops_between_layers(node: fx.Node, name: str) -> bool:
    """Whether a recurrent layer of several layers drops out; its arguments 4 to 6 tell."""
    if name.removeprefix("aten.") not in ("lstm.input", "gru.input", "rnn_tanh.input", "rnn_relu.input"):
        return False
    layers, drop, train = node.args[4:7]
    return train is True and bool(drop) and bool(layers != 1)


def _flat_input(argument: Any) -> "str | Literal":
    if isinstance(argument, ConstantArgument):
        return Literal(argument.value)
    return str(argument.name)


def _output(results: tuple["str | Literal", ...]) -> Op:
    return Op("output", "output", (tuple(Ref(r) for r in results if isinstance(r, str)),))


def _types(value: Any) -> tuple[tuple[TensorType | None, ...], bool]:
    if isinstance(value, (tuple, list)):
        return tuple(_tensor_type(v) for v in value), True
    kind = _tensor_type(value)
    return ((kind,) if kind is not None else ()), False


def _tensor_type(value: Any) -> TensorType | None:
    if not isinstance(value, torch.Tensor):
        return None
    for size in value.shape:
        if not isinstance(size, int):
            raise ValueError(
                f"it makes a tensor of the shape {tuple(value.shape)}, which depends on the data; use "
                "a fixed size and a mask instead"
            )
    return TensorType(tuple(value.shape), dtype_name(value.dtype))
