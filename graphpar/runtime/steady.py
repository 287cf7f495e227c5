"""What is the same in every forward of a stage (masks, positions): computed once, when it is built."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from graphpar.ir.ops import SOURCES, Op, Ref

_ATTENTION = "aten.scaled_dot_product_attention.default"


@dataclass(frozen=True)
class Steady:
    """A stage without the ops that were computed ahead.

    Attributes:
        ops: The ops left to run.
        values: What was computed and is read by those ops or is a result, by op name.
    """

    ops: tuple[Op, ...]
    values: Mapping[str, Any]


def leave_out(ops: Iterable[Op], values: Mapping[str, Any], results: Iterable[str]) -> Steady:
    """The ops that are still to run when `values`, constants among them, are known."""
    ops = tuple(ops)
    sources = {op.name for op in ops if op.target in SOURCES}
    computed = {name: value for name, value in values.items() if name not in sources}
    left = tuple(without_causal_mask(op, values) for op in ops if op.name not in computed)
    read = {name for op in left for name in op.operands()} | set(results)
    return Steady(left, {name: value for name, value in computed.items() if name in read})


def without_causal_mask(op: Op, values: Mapping[str, Any]) -> Op:
    """The same attention told to be causal, where its mask is known to say just that.

    Kernels for causal attention read no mask; with one, some devices have to take a slower kernel.

    >>> from graphpar.ir.text import format_op, parse_op
    >>> text = '%a = aten.scaled_dot_product_attention.default(%q, %k, %v, %m) : float32[B,2,3,4]'
    >>> seen = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    >>> print(format_op(without_causal_mask(parse_op(text), {"m": seen.tril()})))
    %a = aten.scaled_dot_product_attention.default(%q, %k, %v, none, 0.0, true) : float32[B,2,3,4]
    >>> without_causal_mask(parse_op(text), {"m": seen}) == parse_op(text)
    True
    """
    if op.target != _ATTENTION:
        return op
    mask = op.argument(3, "attn_mask", None)
    if not isinstance(mask, Ref) or not _is_causal(values.get(mask.name)):
        return op
    drop = op.argument(4, "dropout_p", 0.0)
    named = tuple((k, v) for k, v in op.kwargs if k not in ("attn_mask", "dropout_p", "is_causal"))
    return replace(op, args=(*op.args[:3], None, drop, True), kwargs=named)


def _is_causal(mask: Any) -> bool:
    """Whether a mask lets each position see itself and all before it, in every sample and head."""
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool or mask.ndim < 2:
        return False
    if mask.shape[-1] != mask.shape[-2]:
        return False
    lower = torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device).tril()
    return bool((mask == lower).all())
