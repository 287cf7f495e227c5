"""The values of a graph under conversion, and in-place ops among them made functional.

An in-place op on a fresh value becomes its functional form, and later reads see the new value, be it
through the value itself, what it is a view of, or views of that.
"""

import logging
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import fx

from graphpar.frontend.functionalize import part_of, write_back
from graphpar.frontend.places import unsupported
from graphpar.frontend.torch_private import (
    functional_twin,
    lookup_op,
    mutated_arguments,
    op_name,
    shares_storage,
    views_first_argument,
)
from graphpar.ir.ops import Argument, Op, Ref, Symbol, TensorType
from graphpar.ir.optable import packet

_log = logging.getLogger("graphpar.capture")
_RESHAPES_IN_PLACE = frozenset(
    {"unsqueeze_", "squeeze_", "t_", "transpose_", "swapaxes_", "swapdims_", "detach_"}
)
"""In-place ops that change how a value is seen, not what is in it."""
_MAY_RETURN_ITS_ARGUMENT = frozenset(
    {
        "aten.to.dtype", "aten.to.dtype_layout", "aten.to.device", "aten.to.other",
        "aten.contiguous.default", "aten.dropout.default", "aten.feature_dropout.default",
    }
)  # fmt: skip
"""Ops whose result, where it shares memory with the argument, is the argument."""
_FUNCTIONAL = {
    **{f"aten.__i{name}__.{kind}": f"aten.__{name}__.{kind}"
       for name in ("and", "or", "xor", "lshift", "rshift") for kind in ("Tensor", "Scalar")},
    "aten.zero_.default": "aten.zeros_like.default",
    "aten.normal_.default": "aten.normal_functional.default",
}  # fmt: skip
"""Functional forms of another name, and where the one of the same name has no derivative."""


BLOCK = "graphpar.block.default"
"""Stands for a block that capture does not follow (see `fold.py`): tensors, number, whether it trains."""


def _holds_trained(op: Op) -> bool:
    return op.target == BLOCK and op.args[2] is True


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.float32` as `float32`."""
    return str(dtype).removeprefix("torch.")


@dataclass
class Values:
    """What has been converted so far.

    Attributes:
        ops: Ops by name, in order.
        env: What each node of the exported graph stands for at this point.
        views: For each value that is a view, the value it views.
        keeps_inputs: Whether a write to an input is refused; else it changes a copy.
        shared: Inputs whose memory another input, or the model, uses as well.
        overwritten: Inputs that are written to.
    """

    ops: dict[str, Op] = field(default_factory=dict)
    env: dict[fx.Node, Argument] = field(default_factory=dict)
    views: dict[str, str] = field(default_factory=dict)
    keeps_inputs: bool = False
    shared: frozenset[str] = frozenset()
    overwritten: set[str] = field(default_factory=set)

    def fresh(self, name: str) -> str:
        candidate, count = name, 0
        while candidate in self.ops:
            count += 1
            candidate = f"{name}_{count}"
        return candidate

    def itself(self, op: Op) -> Op:
        """What an op returns where it returns its very argument: a cast to the type that a value has."""
        while op.target in _MAY_RETURN_ITS_ARGUMENT and op.name in self.views:
            op = self.ops[self.views[op.name]]
        return op

    def with_gradient(self, op: Op) -> Op:
        flows = any(self.ops[o].attr("grad") for o in op.operands()) or _holds_trained(op)
        floats = any(t is not None and t.is_floating for t in op.types)
        if flows and floats and packet(op) not in ("detach", "detach_"):
            return op.with_attrs(grad=True)
        return op

    def functional(self, node: fx.Node, op: Op) -> Op:
        """Replace an in-place op by its functional form; later reads see the new value.

        Writes to buffers stay: they are meant to last. Where another live value shares the storage
        in a way that cannot be followed, the write is refused.
        """
        written = mutated_arguments(node.target)
        if not written:
            return op
        first = op.args[written[0]] if written[0] < len(op.args) else None
        if len(written) > 1 or not isinstance(first, Ref):
            raise unsupported(node, f"{op.target} writes to several values")
        chain = self._view_chain(first.name)
        root = self.ops[chain[-1]]
        if root.target == "parameter" and not root.attr("grad"):
            root = replace(root, target="buffer")  # a frozen weight that the forward keeps is just that
            self.ops[root.name] = root
        if root.target == "buffer":
            self.views[op.name] = first.name  # its result is the buffer, or the same view of it
            return op
        functional = self._without_side_effect(node, op)
        if packet(op) in _RESHAPES_IN_PLACE:
            return self._reshape_in_place(functional, first)
        if any(o in self.ops and self.ops[o].target == BLOCK for o in root.operands()):
            raise unsupported(node, f"{op.target} overwrites what a block makes")
        if root.target == "input" and self.keeps_inputs:
            raise unsupported(node, f"{op.target} overwrites an input in place")
        if root.target in ("parameter", "constant"):
            raise unsupported(node, _overwritten(op, root))
        if root.target == "input":
            self._refuse_shared(node, op, str(root.args[0]))
            self.overwritten.add(root.name)
            _log.warning(
                "%s overwrites the argument %s at module %r, %s; the caller's tensor stays as it is",
                op.target, root.args[0], op.module or "(top)", op.source,
            )  # fmt: skip
        others = [n for n in self.ops if n not in chain and self._view_chain(n)[-1] == root.name]
        others = [n for n in others if self._read_later(n, node)]
        new = self._keep_type(functional)
        self._redirect(first.name, new.name)
        return self._write_back(node, op, chain, new, others)

    def _refuse_shared(self, node: fx.Node, op: Op, label: str) -> None:
        if label in self.shared:
            raise unsupported(
                node,
                f"{op.target} overwrites the argument {label}, whose memory another argument, or the "
                "model, uses as well and would see the change; write to a clone, or pass a clone",
            )

    def _write_back(self, node: fx.Node, op: Op, chain: list[str], new: Op, others: list[str]) -> Op:
        """Carry a written value to all that it was a view of; returns it as a view of the new base."""
        current, now = new, {chain[0]: new.name}
        for place, (view, base) in enumerate(pairwise(chain), start=1):
            back = None
            if packet(self.ops[view]) != "detach" or not self.ops[base].attr("grad"):
                seen = self._as_view(view)
                back = write_back(seen, self.ops[base], current, self.fresh(f"{base}_new"))
            if back is None:
                if others or any(self._read_later(left, node) for left in chain[place:]):
                    raise unsupported(node, _write_refused(op, self.ops[view]))
                return new
            if self.ops[base].attr("grad") or current.attr("grad"):
                back = back.with_attrs(grad=True)
            self.ops[back.name] = current = back
            self._redirect(base, back.name)
            now[base] = back.name
        # Without this a second write through the same view would not reach the base.
        again = {chain[-1]: now[chain[-1]]}
        for name in [chain[0], *others]:
            self._view_again(node, name, again, now)
        return self.ops[again[chain[0]]]

    def _view_again(self, node: fx.Node, name: str, again: dict[str, str], now: dict[str, str]) -> None:
        """Take a view of the new base as it was taken of the old one.

        Args:
            node: The write.
            name: The view.
            again: What has been taken again, by what it was before; the root's new value at first.
            now: Values that were written, which reads no longer find under their old name.
        """
        chain = self._view_chain(name)
        for view, base in reversed(list(pairwise(chain))):
            if view in again:
                continue
            made = self._as_view(view)
            if made.is_tuple:
                raise unsupported(node, "it writes to storage that another live value shares")
            taken = self.fresh(f"{view}_again")
            fresh = replace(made, name=taken, args=(Ref(again[base]), *made.args[1:]), attrs=())
            self.ops[taken] = self.with_gradient(fresh)
            self.views[taken] = again[base]
            self._redirect(now.get(view, view), taken)
            again[view] = taken

    def _as_view(self, name: str) -> Op:
        """The op that takes a view of its first argument; of several parts taken at once, that of one."""
        op = self.ops[name]
        if op.target != "getitem" or not isinstance(op.args[0], Ref):
            return op
        return part_of(op, self.ops[op.args[0].name])

    def _reshape_in_place(self, functional: Op, first: Ref) -> Op:
        """An op such as `unsqueeze_`: the value is seen in another shape from here on."""
        self.ops[functional.name] = functional
        self.views[functional.name] = first.name
        self._redirect(first.name, functional.name)
        return functional

    def _keep_type(self, op: Op) -> Op:
        """Add an op and, where an in-place op keeps a type that its functional form changes, a cast."""
        kind = self._result_type(op)
        if kind == op.type.dtype:
            self.ops[op.name] = op
            return op
        made = replace(op, types=(TensorType(op.type.shape, kind),))
        self.ops[made.name] = made
        cast = replace(
            op,
            name=self.fresh(f"{op.name}_cast"),
            target="aten._to_copy.default",
            args=(Ref(op.name),),
            kwargs=(("dtype", Symbol("dtype", op.type.dtype)),),
            attrs=(),
        )
        self.ops[cast.name] = cast = self.with_gradient(cast)
        return cast

    def _result_type(self, op: Op) -> str:
        """The element type torch gives the result of an op, asked of tensors without memory."""
        arguments = [self._example(a) for a in op.args]
        keywords = {k: self._example(v) for k, v in op.kwargs}
        return dtype_name(lookup_op(op.target)(*arguments, **keywords).dtype)

    def _example(self, argument: Argument) -> Any:
        if isinstance(argument, Ref):
            kind = self.ops[argument.name].type
            return torch.empty(kind.sizes(1), dtype=getattr(torch, kind.dtype), device="meta")
        if isinstance(argument, tuple):
            return [self._example(a) for a in argument]
        if isinstance(argument, Symbol):
            return "meta" if argument.kind == "device" else getattr(torch, argument.value)
        return argument

    def _without_side_effect(self, node: fx.Node, op: Op) -> Op:
        if packet(op) == "copy_":
            return self._copied(op)
        if packet(op) == "fill_diagonal_":
            return self._diagonal_filled(node, op)
        functional = _FUNCTIONAL.get(op.target) or op_name(functional_twin(node.target))
        if functional is None:
            raise unsupported(node, f"{op.target} has no form without side effects")
        if op.target == "aten.bernoulli_.float" and len(op.args) == 1:
            op = replace(op, args=(*op.args, 0.5))
        return self.with_gradient(replace(op, target=functional))

    def _diagonal_filled(self, node: fx.Node, op: Op) -> Op:
        """The value that `fill_diagonal_` writes, which torch has no functional form for."""
        matrix, value, *wraps = op.args
        if len(op.type.shape) != 2 or any(wraps):
            raise unsupported(node, f"{op.target} of more dimensions than two, or wrapped around")
        kind = TensorType((min(op.type.sizes(1)),), op.type.dtype)
        parts = [("diagonal", (matrix,)), ("full_like", (None, value))]
        made = replace(op, kwargs=(), types=(kind,))
        for name, args in parts:
            args = tuple(Ref(made.name) if a is None else a for a in args)
            made = replace(
                made, name=self.fresh(f"{op.name}_{name}"), target=f"aten.{name}.default", args=args
            )
            self.ops[made.name] = made
        scattered = replace(op, target="aten.diagonal_scatter.default", args=(matrix, Ref(made.name)))
        return self.with_gradient(replace(scattered, kwargs=()))

    def _copied(self, op: Op) -> Op:
        """The value that `copy_` writes; torch has no derivative for its functional form."""
        source = op.args[1]
        assert isinstance(source, Ref)
        if self.ops[source.name].type.shape != op.type.shape:
            kind = TensorType(op.type.shape, self.ops[source.name].type.dtype)
            name = self.fresh(f"{op.name}_expand")
            wide = replace(
                op,
                name=name,
                target="aten.expand.default",
                args=(source, kind.shape),
                kwargs=(),
                types=(kind,),
            )
            self.ops[name] = self.with_gradient(wide)
            source = Ref(name)
        return self.with_gradient(replace(op, target="aten.clone.default", args=(source,), kwargs=()))

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

    def note_view(self, node: fx.Node, op: Op) -> None:
        """Remember what an op's result is a view of; a reshape or cast may be a view or a copy."""
        if not (views_first_argument(node.target) and op.args and isinstance(op.args[0], Ref)):
            return
        first = node.args[0]
        assert isinstance(first, fx.Node)
        if is_off(node, op.target) or shares_storage(node.meta.get("val"), first.meta.get("val")):
            self.views[op.name] = op.args[0].name


def _write_refused(op: Op, view: Op) -> str:
    if packet(view) == "detach":
        return (
            f"{op.target} changes, outside autograd, a value whose gradient is still wanted; write "
            "to a clone of it instead"
        )
    return f"{op.target} writes through {view.target}; write to the whole value instead"


def is_off(node: fx.Node, name: str) -> bool:
    """Whether a kind of dropout does nothing because the model does not train."""
    return "dropout" in name and len(node.args) > 2 and node.args[2] is False


def _overwritten(op: Op, root: Op) -> str:
    """Why what is no buffer may not be written to, and what to do."""
    if root.target == "parameter":
        return (
            f"{op.target} overwrites the parameter {root.args[0]} in place; if the model does so at its "
            "first call in a mode only, call it once in that mode before; else compute with a changed "
            "copy, such as F.linear(x, self.weight * self.mask), or use nn.utils.parametrize"
        )
    return (
        f"{op.target} overwrites a constant in place: a tensor in a plain attribute should be a "
        "buffer; what a loss keeps for its next call belongs into the model: a buffer of one module of "
        "both, returning the loss"
    )
