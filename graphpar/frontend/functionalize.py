"""How a write through a view becomes a new value of what was viewed.

`x[:, 1:] = y` is exported as a slice of `x` and a copy into the slice. In a graph without side effects
it is `x' = slice_scatter(x, y, ...)`, and later reads of `x` read `x'`.
"""

from dataclasses import replace

from graphpar.ir.ops import Argument, BatchSize, Op, Ref
from graphpar.ir.optable import packet

_SCATTER = {"slice": "aten.slice_scatter.default", "select": "aten.select_scatter.default"}
_SAME = frozenset({"detach", "alias", "contiguous", "to", "_to_copy", "lift_fresh"})
_RESHAPES = frozenset({"view", "reshape", "_unsafe_view", "unsqueeze", "squeeze", "flatten"})


def write_back(view: Op, base: Op, written: Op, name: str) -> Op | None:
    """The op that makes the new value of `base` after its `view` was replaced by `written`.

    Returns None for views that have no inverse here (expanded ones, say).

    >>> from graphpar.ir.text import format_op, parse_op
    >>> base = parse_op('%x = aten.clone.default(%a) : int64[2,8]')
    >>> view = parse_op('%v = aten.slice.Tensor(%x, 1, 1, 8) : int64[2,7]')
    >>> new = parse_op('%n = aten.clone.default(%b) : int64[2,7]')
    >>> print(format_op(write_back(view, base, new, "x2")))
    %x2 = aten.slice_scatter.default(%x, %n, 1, 1, 8) : int64[2,8]
    """
    kind = packet(view)
    made = replace(written, name=name, kwargs=(), types=base.types, is_tuple=False, made_by="capture")
    source = Ref(written.name)
    if kind in _SCATTER:
        target = _SCATTER[kind]
        return replace(made, target=target, args=(Ref(base.name), source, *view.args[1:]))
    if kind in _SAME:
        return replace(made, target="aten.alias.default", args=(source,))
    if kind in _RESHAPES:
        return replace(made, target="aten.reshape.default", args=(source, _shape(base)))
    if kind in ("transpose", "t"):
        dims: tuple[Argument, ...] = view.args[1:3] if kind == "transpose" else (0, 1)
        return replace(made, target="aten.transpose.int", args=(source, *dims))
    if kind == "permute" and isinstance(view.args[1], tuple):
        forward = [d % len(base.type.shape) for d in view.args[1] if isinstance(d, int)]
        inverse = tuple(forward.index(d) for d in range(len(forward)))
        return replace(made, target="aten.permute.default", args=(source, inverse))
    return None


def _shape(op: Op) -> tuple[int | BatchSize, ...]:
    return op.type.shape
