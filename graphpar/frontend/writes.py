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

from graphpar.frontend.functionalize import write_back
from graphpar.frontend.places import unsupported
from graphpar.frontend.torch_private import (
    lookup_op,
    mutated_arguments,
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
    "aten.zero.default": "aten.zeros_like.default",
    **{f"aten.__i{name}__.{kind}": f"aten.__{name}__.{kind}"
       for name in ("and", "or", "xor", "lshift", "rshift") for kind in ("Tensor", "Scalar")},
    "aten.bernoulli.float": "aten.bernoulli.p",
    "aten.normal.default": "aten.normal_functional.default",
}  # fmt: skip
"""Functional forms that are not the in-place op's name without its underscore."""


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
    """

    ops: dict[str, Op] = field(default_factory=dict)
    env: dict[fx.Node, Argument] = field(default_factory=dict)
    views: dict[str, str] = field(default_factory=dict)
    keeps_inputs: bool = False
    shared: frozenset[str] = frozenset()

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
            _log.warning(
                "%s overwrites the argument %s at module %r, %s; the caller's tensor stays as it is",
                op.target, root.args[0], op.module or "(top)", op.source,
            )  # fmt: skip
        others = [n for n in self.ops if n not in chain and self._view_chain(n)[-1] == root.name]
        if any(self._read_later(name, node) for name in others):
            raise unsupported(node, f"{op.target} writes to storage that another live value shares")
        new = self._keep_type(functional)
        self._redirect(first.name, new.name)
        return self._write_back(node, op, chain, new)

    def _refuse_shared(self, node: fx.Node, op: Op, label: str) -> None:
        if label in self.shared:
            raise unsupported(
                node,
                f"{op.target} overwrites the argument {label}, whose memory another argument, or the "
                "model, uses as well and would see the change; write to a clone, or pass a clone",
            )

    def _write_back(self, node: fx.Node, op: Op, chain: list[str], new: Op) -> Op:
        """Carry a written value to all that it was a view of; returns it as a view of the new base."""
        current, bases = new, []
        for place, (view, base) in enumerate(pairwise(chain), start=1):
            back = None
            if packet(self.ops[view]) != "detach" or not self.ops[base].attr("grad"):
                back = write_back(self.ops[view], self.ops[base], current, self.fresh(f"{base}_new"))
            if back is None:
                if any(self._read_later(left, node) for left in chain[place:]):
                    raise unsupported(node, _write_refused(op, self.ops[view]))
                return new
            if self.ops[base].attr("grad") or current.attr("grad"):
                back = back.with_attrs(grad=True)
            self.ops[back.name] = current = back
            self._redirect(base, back.name)
            bases.append(back.name)
        return self._views_again(chain, [new.name, *bases])

    def _views_again(self, chain: list[str], written: list[str]) -> Op:
        """Take the views of the new base that were taken of the old one; returns the last.

        Without this a second write through the same view would not reach the base.
        """
        base = written[-1]
        for view, old in reversed(list(zip(chain[:-1], written[:-1], strict=True))):
            made = self.ops[view]
            name = self.fresh(f"{view}_again")
            again = replace(made, name=name, args=(Ref(base), *made.args[1:]), attrs=())
            self.ops[name] = self.with_gradient(again)
            self.views[name] = base
            self._redirect(old, name)
            base = name
        return self.ops[base]

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
        name, _, overload = op.target.rpartition(".")
        functional = op.target if name.endswith("__") else f"{name.removesuffix('_')}.{overload}"
        if functional == "aten.bernoulli.float" and len(op.args) == 1:
            op = replace(op, args=(*op.args, 0.5))
        functional = _FUNCTIONAL.get(functional, functional)
        try:
            lookup_op(functional)
        except AttributeError:
            raise unsupported(node, f"{op.target} has no form without side effects") from None
        return self.with_gradient(replace(op, target=functional))

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
