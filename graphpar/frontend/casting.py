"""Casts that `torch.autocast` makes while a model runs, written into its graph."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from graphpar.frontend.autocast import Casting, NoSuchCasts, casts_of
from graphpar.frontend.places import unsupported
from graphpar.frontend.torch_private import flatten, unflatten
from graphpar.frontend.vmaps import CAST
from graphpar.frontend.writes import Values, dtype_name
from graphpar.ir.ops import Argument, Op, Ref, Symbol, TensorType

_INSTEAD = (
    "switch autocast off around it (torch.autocast(..., enabled=False)), or drop it and give precision= "
    "to compile"
)


@dataclass
class Caster:
    """Adds casts to ops that are converted under autocast.

    Attributes:
        values: What has been converted so far.
        casting: The setting at the moment.
        weights: Weights that were cast already: autocast remembers them until it ends.
    """

    values: Values
    casting: Casting | None = None
    weights: dict[tuple[str, torch.dtype], Ref] = field(default_factory=dict)

    @contextmanager
    def under(self, casting: Casting | None) -> Iterator[None]:
        """Within it, this setting holds."""
        outside, self.casting = self.casting, casting
        yield
        self.casting = outside
        if outside is None:
            self.weights.clear()

    def cast(self, node: fx.Node, op: Op) -> Op:
        """The op with the casts of its arguments that autocast makes.

        Raises:
            CaptureError: What autocast does to it cannot be said by such casts; names module and line.
        """
        if self.casting is None or CAST in node.meta:
            return op
        leaves, spec = flatten((op.args, dict(op.kwargs)), is_leaf=_is_leaf)
        args, kwargs = unflatten([self._as_torch(leaf) for leaf in leaves], spec)
        try:
            casts = casts_of(node.target, args, kwargs, self.casting, _device(node))
        except NoSuchCasts as error:
            raise unsupported(
                node, f"{error}, which no casts of its arguments explain; {_INSTEAD}"
            ) from error
        for where, dtype in casts.places.items():
            leaves[where] = self._value(op, leaves[where], dtype)
        args, kwargs = unflatten(leaves, spec)
        kwargs |= {k: Symbol("dtype", dtype_name(d)) for k, d in casts.keywords.items()}
        return replace(op, args=tuple(args), kwargs=tuple(kwargs.items()))

    def _as_torch(self, leaf: Argument) -> Any:
        if isinstance(leaf, Ref):
            return self.values.ops[leaf.name].type
        if not isinstance(leaf, Symbol):
            return leaf
        return torch.device(leaf.value) if leaf.kind == "device" else getattr(torch, leaf.value)

    def _value(self, op: Op, value: Ref, dtype: torch.dtype) -> Ref:
        """A value in another element type."""
        made, kind = self.values.itself(self.values.ops[value.name]), dtype_name(dtype)
        key = made.name, dtype
        if key in self.weights:
            return self.weights[key]
        cast = Op(
            name=self.values.fresh(f"{value.name}_cast"),
            target="aten._to_copy.default",
            args=(Ref(made.name),),
            kwargs=(("dtype", Symbol("dtype", kind)),),
            types=(TensorType(made.type.shape, kind),),
            module=op.module,
            source=op.source,
        )
        self.values.ops[cast.name] = self.values.with_gradient(cast)
        if made.target == "parameter":
            self.weights[key] = Ref(cast.name)
        return Ref(cast.name)


def _is_leaf(value: Any) -> bool:
    return isinstance(value, (Ref, Symbol))


def _device(node: fx.Node) -> torch.device:
    """Where an op runs in the example.

    Raises:
        CaptureError: Nowhere: torch casts nothing on the meta device.
    """
    values = [node.meta.get("val"), *(n.meta.get("val") for n in node.all_input_nodes)]
    device = next((v.device for v in values if isinstance(v, torch.Tensor)), torch.device("cpu"))
    if device.type == "meta":
        raise unsupported(
            node,
            "torch.autocast casts nothing on the meta device, so that its casts would get lost; build "
            "the model with memory, or drop autocast and give precision= to compile",
        )
    return device
