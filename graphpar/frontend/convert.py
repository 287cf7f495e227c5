"""From an exported program to our ops, all sizes still concrete.

Regions without gradient are inlined with their inputs detached, assertions are dropped, in-place ops
on fresh values become their functional form, and `requires_grad` is propagated by us because the
exported metadata is unreliable.
"""

import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
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
from graphpar.frontend.export import MODEL_PREFIX
from graphpar.frontend.functionalize import write_back
from graphpar.frontend.torch_private import (
    higher_order_name,
    is_random,
    lookup_op,
    mutated_arguments,
    op_name,
    views_first_argument,
)
from graphpar.ir.ops import Argument, Op, Ref, Symbol, TensorType
from graphpar.ir.optable import packet

_ASSERTIONS = (
    "aten._assert", "aten.sym_constrain", "aten._functional_assert", "aten._assert_tensor_metadata",
)  # fmt: skip
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
_TORCH_ROOT = torch.__path__[0]
_KNOWN_RANDOM = frozenset({
    "aten.dropout.default", "aten.native_dropout.default", "aten.feature_dropout.default",
    "aten.scaled_dot_product_attention.default", "aten.rand.default", "aten.rand_like.default",
    "aten.randn.default", "aten.randn_like.default", "aten.bernoulli.default", "aten.bernoulli.p",
    "aten.lstm.input", "aten.gru.input", "aten.rnn_tanh.input", "aten.rnn_relu.input",
})  # fmt: skip


@dataclass(frozen=True)
class Converted:
    """Ops with concrete sizes, flat inputs and results, and constants that export lifted.

    `inputs` and `results` hold for each flat argument and result of the user's function the name of
    its op, or a `Literal`.
    """

    ops: tuple[Op, ...]
    inputs: tuple["str | Literal", ...]
    results: tuple["str | Literal", ...]
    constants: Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Literal:
    """An argument or result that is no tensor and the same at every call."""

    value: Any


def strip_prefix(name: str) -> str:
    """The user's name of something inside `Traced`."""
    return name.removeprefix(MODEL_PREFIX)


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.float32` as `float32`."""
    return str(dtype).removeprefix("torch.")


def convert(program: ExportedProgram, model: nn.Module) -> Converted:
    """Translate an exported program op by op.

    Raises:
        CaptureError: An op cannot be translated; names the module and line.
    """
    return _Converter(program, model).run()


@dataclass
class _Converter:
    program: ExportedProgram
    model: nn.Module
    ops: dict[str, Op] = field(default_factory=dict)
    env: dict[fx.Node, Argument] = field(default_factory=dict)
    views: dict[str, str] = field(default_factory=dict)
    constants: dict[str, torch.Tensor] = field(default_factory=dict)

    def run(self) -> Converted:
        signature = self.program.graph_signature
        graph = self.program.graph_module.graph
        nodes = {node.name: node for node in graph.nodes if node.op == "placeholder"}
        trained = {n for n, p in self.model.named_parameters(remove_duplicate=False) if p.requires_grad}
        for spec in signature.input_specs:
            self._source(spec, nodes, trained)
        self._inline(self.program.graph_module, outer=True)
        results = self._results(graph, signature.output_specs)
        ops = [*self.ops.values(), _output(results)]
        inputs = tuple(
            _flat_input(spec.arg) for spec in signature.input_specs if spec.kind == InputKind.USER_INPUT
        )
        return Converted(tuple(ops), inputs, results, self.constants)

    def _source(self, spec: Any, nodes: Mapping[str, fx.Node], trained: set[str]) -> None:
        if isinstance(spec.arg, ConstantArgument) or spec.kind == InputKind.TOKEN:
            node = nodes.get(spec.arg.name)
            if node is not None:
                self.env[node] = getattr(spec.arg, "value", None)
            return
        if not isinstance(spec.arg, TensorArgument):
            raise CaptureError(
                f"Input {spec.arg.name!r} is a {type(spec.arg).__name__}; only tensors and constants "
                "can be sent to workers. Pass it as a tensor, or make it an attribute of the model."
            )
        node = nodes[spec.arg.name]
        target = {
            InputKind.PARAMETER: "parameter",
            InputKind.BUFFER: "buffer",
            InputKind.CONSTANT_TENSOR: "constant",
            InputKind.USER_INPUT: "input",
        }[spec.kind]
        label = strip_prefix(spec.target) if spec.target else spec.arg.name
        if target == "constant":
            self.constants[label] = self.program.constants[spec.target]
        op = Op(node.name, target, (label,), types=_types(node.meta["val"])[0])
        if target == "parameter" and label in trained and op.type.is_floating:
            op = op.with_attrs(grad=True)
        self._emit(node, op)

    def _emit(self, node: fx.Node, op: Op) -> None:
        self.ops[op.name] = op
        self.env[node] = Ref(op.name)

    def _inline(self, module: fx.GraphModule, *, outer: bool) -> list[Argument]:
        """Translate every call of a (sub)graph; the inner graph's placeholders are already bound."""
        for node in module.graph.nodes:
            if node.op == "call_function":
                self._call(module, node)
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
            self.constants[label] = value
            self._emit(node, Op(self._fresh(node.name), "constant", (label,), types=_types(value)[0]))

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
                self.env[node] = value
            elif not name.startswith(_ASSERTIONS):
                self._operator(node, name)

    def _scalar(self, node: fx.Node) -> Argument:
        value = node.meta.get("val")
        if isinstance(value, (int, float, bool)):
            return value
        raise self._unsupported(node, f"{node.target} is no tensor operator")

    def _region(self, module: fx.GraphModule, node: fx.Node, higher: str) -> None:
        if higher == "wrap_with_set_grad_enabled":
            enabled, body, *operands = node.args
            values = [self._argument(a) for a in operands]
            if not enabled:
                values = [self._detached(v, node) for v in values]
        elif higher == "wrap_with_autocast":
            _device, _dtype, enabled, _cache, body, *operands = node.args
            if enabled:
                raise self._unsupported(
                    node,
                    "autocast inside the model; drop it and give precision= to compile instead",
                )
            values = [self._argument(a) for a in operands]
        else:
            raise self._unsupported(
                node, f"the higher-order operator {higher} (control flow or a nested graph)"
            )
        assert isinstance(body, fx.Node)
        inner = getattr(module, str(body.target))
        places = [n for n in inner.graph.nodes if n.op == "placeholder"]
        self.env.update(zip(places, values, strict=True))
        self.env[node] = tuple(self._inline(inner, outer=False))

    def _detached(self, value: Argument, node: fx.Node) -> Argument:
        if not isinstance(value, Ref):
            return value
        made = self.ops[value.name]
        if not made.attr("grad"):
            return value
        name = self._fresh(f"{value.name}_detached")
        module, source = _place(node)
        self.ops[name] = Op(
            name, "aten.detach.default", (value,), types=made.types, module=module, source=source
        )
        return Ref(name)

    def _getitem(self, node: fx.Node) -> None:
        container = self._argument(node.args[0])
        index = node.args[1]
        assert isinstance(index, int)
        if isinstance(container, tuple):
            self.env[node] = container[index]
            return
        assert isinstance(container, Ref)
        producer = self.ops[container.name]
        kind = producer.types[index]
        op = replace(
            producer,
            name=self._fresh(node.name),
            target="getitem",
            args=(container, index),
            kwargs=(),
            types=(kind,),
            is_tuple=False,
            attrs=(),
        )
        if producer.attr("grad") and kind is not None and kind.is_floating:
            op = op.with_attrs(grad=True)
        if producer.name in self.views:
            self.views[op.name] = producer.name
        self._emit(node, op)

    def _operator(self, node: fx.Node, name: str) -> None:
        function = node.target
        if is_random(function) and name not in _KNOWN_RANDOM:
            raise self._unsupported(
                node, f"{name} draws random numbers in a way that would depend on the plan"
            )
        types, is_tuple = _types(node.meta.get("val"))
        module, source = _place(node)
        op = Op(
            self._fresh(node.name),
            name,
            tuple(self._argument(a) for a in node.args),
            tuple((k, self._argument(v)) for k, v in node.kwargs.items()),
            types,
            is_tuple,
            module,
            source,
        )
        made = self._functional(node, op)
        if made is not op:
            self.env[node] = Ref(made.name)
            return
        self._emit(node, self._with_gradient(op))
        self._note_view(function, op)

    def _with_gradient(self, op: Op) -> Op:
        flows = any(self.ops[o].attr("grad") for o in op.operands())
        floats = any(t is not None and t.is_floating for t in op.types)
        if flows and floats and packet(op) not in ("detach", "detach_"):
            return op.with_attrs(grad=True)
        return op

    def _functional(self, node: fx.Node, op: Op) -> Op:
        """Replace an in-place op by its functional form; later reads see the new value.

        Writes to buffers stay: they are meant to last. Where another live value shares the storage
        in a way that cannot be followed, the write is refused.
        """
        written = mutated_arguments(node.target)
        if not written:
            return op
        first = op.args[written[0]] if written[0] < len(op.args) else None
        if len(written) > 1 or not isinstance(first, Ref):
            raise self._unsupported(node, f"{op.target} writes to several values")
        chain = self._view_chain(first.name)
        root = self.ops[chain[-1]]
        if root.target == "buffer":
            return op
        if root.target in ("input", "parameter", "constant"):
            raise self._unsupported(node, f"{op.target} overwrites an input or a parameter in place")
        others = [n for n in self.ops if n not in chain and self._view_chain(n)[-1] == root.name]
        if any(self._read_later(name, node) for name in others):
            raise self._unsupported(node, f"{op.target} writes to storage that another live value shares")
        new = self._without_side_effect(node, op)
        self.ops[new.name] = new
        self._redirect(first.name, new.name)
        current = new
        for view, base in pairwise(chain):
            back = write_back(self.ops[view], self.ops[base], current, self._fresh(f"{base}_new"))
            if back is None:
                if self._read_later(base, node):
                    raise self._unsupported(node, f"{op.target} writes through {self.ops[view].target}")
                break
            if self.ops[base].attr("grad") or current.attr("grad"):
                back = back.with_attrs(grad=True)
            self.ops[back.name] = current = back
            self._redirect(base, back.name)
        return new

    def _without_side_effect(self, node: fx.Node, op: Op) -> Op:
        name, _, overload = op.target.rpartition(".")
        functional = f"{name.removesuffix('_')}.{overload}"
        if functional == "aten.zero.default":
            functional = "aten.zeros_like.default"
        try:
            lookup_op(functional)
        except AttributeError:
            raise self._unsupported(node, f"{op.target} has no form without side effects") from None
        return self._with_gradient(replace(op, target=functional))

    def _redirect(self, old: str, new: str) -> None:
        for made, value in self.env.items():
            if value == Ref(old):
                self.env[made] = Ref(new)

    def _view_chain(self, name: str) -> list[str]:
        """The value, what it is a view of, and so on to the value that owns the storage."""
        chain = [name]
        while chain[-1] in self.views:
            chain.append(self.views[chain[-1]])
        return chain

    def _read_later(self, name: str, node: fx.Node) -> bool:
        """Whether a value is still read after this node."""
        return any(
            user not in self.env and user is not node
            for made, value in self.env.items()
            if value == Ref(name)
            for user in made.users
        )

    def _note_view(self, function: Any, op: Op) -> None:
        if views_first_argument(function) and op.args and isinstance(op.args[0], Ref):
            self.views[op.name] = op.args[0].name

    def _argument(self, value: Any) -> Argument:
        if isinstance(value, fx.Node):
            return self.env[value]
        if isinstance(value, (list, tuple)):
            return tuple(self._argument(v) for v in value)
        if value is None or isinstance(value, (bool, int, float, complex, str)):
            return value
        for kind, cls in (
            ("dtype", torch.dtype), ("device", torch.device), ("layout", torch.layout),
            ("memory_format", torch.memory_format),
        ):  # fmt: skip
            if isinstance(value, cls):
                return Symbol(kind, str(value).removeprefix("torch."))
        raise CaptureError(f"An argument of type {type(value).__name__} cannot be kept in a graph.")

    def _fresh(self, name: str) -> str:
        candidate, count = name, 0
        while candidate in self.ops:
            count += 1
            candidate = f"{name}_{count}"
        return candidate

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

    def _unsupported(self, node: fx.Node, what: str) -> CaptureError:
        module, source = _place(node)
        return CaptureError(
            f"Module {module or '(top)'!r} at {source or 'an unknown line'} cannot be captured: {what}."
        )


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
            raise CaptureError(
                f"A tensor has the shape {tuple(value.shape)}, which depends on the data in it. "
                "Use a fixed size and a mask instead."
            )
    return TensorType(tuple(value.shape), dtype_name(value.dtype))


def _place(node: fx.Node) -> tuple[str, str]:
    """Module path and source line of the user's code that made a node."""
    stack = node.meta.get("nn_module_stack") or {}
    path = ""
    for entry in stack.values():
        path = entry[0]
    path = re.sub(r"^L__self__\.?", "", path)
    path = "" if path == MODEL_PREFIX[:-1] else strip_prefix(path)
    return re.sub(r"@\d+$", "", path), _source_line(node.meta.get("stack_trace") or "")


def _source_line(trace: str) -> str:
    for filename, line in reversed(_FRAME.findall(trace)):
        if not filename.startswith(_TORCH_ROOT):
            return f"{filename.rpartition('/')[2]}:{line}"
    return ""
