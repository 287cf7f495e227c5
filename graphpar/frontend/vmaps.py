"""Calls of `torch.vmap` in an exported graph, replaced by the batched operators they come down to.

torch.export records a vmap as it is written: a level that is entered, tensors that are wrapped and
operators called on wrapped tensors. No worker can run that op by op. Each outermost vmap is therefore run
once more on tensors without values and traced below autograd, where torch's own rules have made batched
operators of everything: nested vmaps, `in_dims`, `out_dims` and captured tensors come out as ordinary
operators with the mapped dimension among their others.
"""

import operator
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from graphpar.errors import CaptureError
from graphpar.frontend.autocast import Casting
from graphpar.frontend.places import unsupported
from graphpar.frontend.torch_private import (
    enters_vmap,
    flatten,
    higher_order_name,
    leave_vmap,
    leaves_vmap,
    prepares_vmap,
    sets_gradient_mode,
    standing_for,
    traced_below_autograd,
    unflatten,
)

AUTOCAST = "wrap_with_autocast"
CAST = "graphpar_cast"
"""Marks nodes that were traced under autocast and need no casts any more."""


def without_vmaps(module: fx.GraphModule, casting: Casting | None = None) -> None:
    """Replace every vmap in a graph and in all graphs within it.

    Args:
        module: The graph.
        casting: The autocast that it runs under.

    Raises:
        CaptureError: Something in a vmap has no batched form; names module and line.
    """
    for node in list(module.graph.nodes):
        if prepares_vmap(node.target):
            module.graph.erase_node(node)
    for region in list(_regions(module, casting)):
        region.replace()
    for node in module.graph.nodes:
        inside = casting_of(node) if higher_order_name(node.target) == AUTOCAST else casting
        for body in node.all_input_nodes:
            if body.op == "get_attr" and isinstance(_attribute(module, body), fx.GraphModule):
                without_vmaps(_attribute(module, body), inside)


def casting_of(node: fx.Node) -> Casting | None:
    """The setting of an autocast, None where it is switched off."""
    device, dtype, enabled, *_ = node.args
    return Casting(device, dtype) if enabled else None  # type: ignore[arg-type]


def _regions(module: fx.GraphModule, casting: Casting | None) -> Iterator["_Region"]:
    """Each outermost vmap, from entering its level to leaving it."""
    depth = 0
    nodes: list[fx.Node] = []
    for node in list(module.graph.nodes):
        depth += enters_vmap(node.target)
        if depth:
            nodes.append(node)
        if leaves_vmap(node.target):
            depth -= 1
            if not depth:
                yield _Region(module, tuple(nodes), node, casting)
                nodes = []


@dataclass
class _Region:
    module: fx.GraphModule
    nodes: tuple[fx.Node, ...]
    before: fx.Node
    casting: Casting | None = None
    depth: int = 0
    records: bool = True
    current: fx.Node | None = None
    values: dict[fx.Node, Any] = field(default_factory=dict)

    def replace(self) -> None:
        """Put what the part comes down to in its place."""
        given, made = self._given(), self._made()
        fakes = [self._standing_for(node) for node in given]
        try:
            with self.casting.on() if self.casting else nullcontext():
                traced = traced_below_autograd(lambda *tensors: self._run(given, made, tensors), fakes)
        except CaptureError:
            raise
        except Exception as error:
            first_line = next((line for line in str(error).splitlines() if line.strip()), "")
            raise unsupported(
                self.current or self.nodes[0],
                "it is called under torch.vmap and has no form there that a graph can hold "
                f"({first_line[:200]}); move it out of torch.vmap",
            ) from error
        self._insert(traced, given, made)

    def _given(self) -> list[fx.Node]:
        """What the region reads from outside, and tensors it reads from the module."""
        inside = {n for n in self.nodes if not self._held(n)}
        read = (n for node in self.nodes for n in node.all_input_nodes)
        return list(dict.fromkeys(n for n in read if n not in inside and self._is_value(n)))

    def _held(self, node: fx.Node) -> bool:
        return node.op == "get_attr" and self._is_value(node)

    def _is_value(self, node: fx.Node) -> bool:
        return node.op != "get_attr" or isinstance(_attribute(self.module, node), torch.Tensor)

    def _made(self) -> list[fx.Node]:
        """What is read of the region outside."""
        inside = set(self.nodes)
        return [
            n for n in self.nodes if n.op == "call_function" and any(u not in inside for u in n.users)
        ]

    def _standing_for(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            return _attribute(self.module, node)
        return node.meta["val"]

    def _run(self, given: Sequence[fx.Node], made: Sequence[fx.Node], tensors: Sequence[Any]) -> Any:
        self.values = dict(zip(given, tensors, strict=True))
        try:
            for node in self.nodes:
                if node.op == "call_function":
                    self._call(self.module, node)
            return [self.values[node] for node in made]
        finally:
            while self.depth:  # left open by an error
                leave_vmap()
                self.depth -= 1

    def _call(self, module: fx.GraphModule, node: fx.Node) -> None:
        self.current = node
        with standing_for(node):
            higher = higher_order_name(node.target)
            if higher is not None:
                self.values[node] = self._within(module, node, higher)
                return
            args, kwargs = fx.map_arg((node.args, node.kwargs), self.values.__getitem__)
            assert callable(node.target)
            if sets_gradient_mode(node.target):
                self.records = bool(args[0])
                return
            made = node.target(*args, **kwargs)
            self.values[node] = made if self.records else _without_gradient(made)
            self.depth += enters_vmap(node.target) - leaves_vmap(node.target)

    def _within(self, module: fx.GraphModule, node: fx.Node, higher: str) -> Any:
        """What a part with its own setting for gradients or autocast computes."""
        before = self.records
        setting: AbstractContextManager[Any] = nullcontext()
        if higher == "wrap_with_set_grad_enabled":
            records, body, *operands = node.args
            self.records = bool(records)
        elif higher == AUTOCAST:
            device, dtype, enabled, _cache, body, *operands = node.args
            setting = torch.autocast(device, dtype, enabled, False)  # type: ignore[arg-type]
        else:
            raise unsupported(node, f"the higher-order operator {higher} under torch.vmap")
        assert isinstance(body, fx.Node)
        inner = _attribute(module, body)
        values = [fx.map_arg(operand, self.values.__getitem__) for operand in operands]
        places = [n for n in inner.graph.nodes if n.op == "placeholder"]
        for place, value in zip(places, values, strict=True):
            self.values[place] = value
        with setting:
            made = self._body(inner)
        self.records = before
        return made

    def _body(self, inner: fx.GraphModule) -> Any:
        for part in inner.graph.nodes:
            if part.op == "call_function":
                self._call(inner, part)
            elif part.op == "get_attr" and isinstance(_attribute(inner, part), torch.Tensor):
                self.values[part] = _attribute(inner, part)
        returned = next(n for n in inner.graph.nodes if n.op == "output").args[0]
        return fx.map_arg(returned, self.values.__getitem__)

    def _insert(self, traced: fx.GraphModule, given: list[fx.Node], made: list[fx.Node]) -> None:
        graph = self.module.graph
        places = [n for n in traced.graph.nodes if n.op == "placeholder"]
        copies = dict(zip(places, given, strict=True))
        with graph.inserting_before(self.before):
            for node in traced.graph.nodes:
                if node.op == "get_attr":
                    copies[node] = self._kept(_attribute(traced, node))
                elif node.op == "call_function":
                    copies[node] = graph.node_copy(node, copies.__getitem__)
                    for key in ("nn_module_stack", "stack_trace"):
                        copies[node].meta.setdefault(key, self.nodes[0].meta.get(key))
                    copies[node].meta[CAST] = True
        returned = next(n for n in traced.graph.nodes if n.op == "output").args[0]
        for node, result in zip(made, returned, strict=True):
            node.replace_all_uses_with(copies[result])
        for node in reversed(self.nodes):
            if not self._held(node):
                graph.erase_node(node)

    def _kept(self, value: Any) -> fx.Node:
        """A node for a tensor that tracing found to be constant."""
        count = len(self.module._buffers)
        name = f"_vmap_constant{count}"
        self.module.register_buffer(name, value)
        return self.module.graph.get_attr(name)


def _without_gradient(made: Any) -> Any:
    """What an operator returns where no gradients are recorded."""
    leaves, spec = flatten(made)
    return unflatten([x.detach() if isinstance(x, torch.Tensor) else x for x in leaves], spec)


def _attribute(module: fx.GraphModule, node: fx.Node) -> Any:
    return operator.attrgetter(str(node.target))(module)
