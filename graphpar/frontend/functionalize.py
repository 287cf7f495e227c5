"""How a write through a view becomes a new value of what was viewed.

`x[:, 1:] = y` is exported as a slice of `x` and a copy into the slice. In a graph without side effects
it is `x' = slice_scatter(x, y, ...)`, and later reads of `x` read `x'`.
"""

from dataclasses import replace

from graphpar.ir.ops import Argument, BatchSize, Op, Ref
from graphpar.ir.optable import packet

_SCATTER = {name: f"aten.{name}_scatter.default" for name in ("slice", "select", "diagonal")}
_SAME = frozenset({"detach", "alias", "contiguous", "to", "_to_copy", "lift_fresh"})
_PARTS = frozenset({"unbind", "split", "split_with_sizes", "chunk", "tensor_split"})
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
    if view.type.dtype != base.type.dtype:  # the same bits as numbers of another type
        return None
    made = replace(written, name=name, kwargs=(), types=base.types, is_tuple=False, made_by="capture")
    source = Ref(written.name)
    if kind in _SCATTER:
        target = _SCATTER[kind]
        return replace(made, target=target, args=(Ref(base.name), source, *view.args[1:]))
    if kind == "narrow":
        dim, first, length = view.args[1:4]
        if not (isinstance(first, int) and isinstance(length, int)) or first < 0:
            return None
        places = (dim, first, first + length)
        return replace(made, target=_SCATTER["slice"], args=(Ref(base.name), source, *places))
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


def is_parts(op: Op) -> bool:
    """Whether an op takes a value apart along a dimension, without copying it."""
    return packet(op) in _PARTS


def part_of(part: Op, whole: Op) -> Op:
    """The view of what was taken apart that is one of the parts.

    >>> from graphpar.ir.text import parse_op
    >>> whole = parse_op('%w = aten.split.Tensor(%x, 2, 1) : (int64[4,2], int64[4,1])')
    >>> part = parse_op('%p = getitem(%w, 1) : int64[4,1]')
    >>> from graphpar.ir.text import format_op
    >>> print(format_op(part_of(part, whole)))
    %p = aten.slice.Tensor(%x, 1, 2, 3) : int64[4,1]
    """
    index = part.args[1]
    assert isinstance(index, int)
    place = 1 if packet(whole) == "unbind" else 2
    dim = whole.args[place] if len(whole.args) > place else dict(whole.kwargs).get("dim", 0)
    assert isinstance(dim, int)
    if packet(whole) == "unbind":
        return replace(part, target="aten.select.int", args=(whole.args[0], dim, index))
    sizes = [kind.sizes(1)[dim] for kind in whole.types if kind is not None]
    index %= len(sizes)
    first = sum(sizes[:index])
    return replace(
        part, target="aten.slice.Tensor", args=(whole.args[0], dim, first, first + sizes[index])
    )


def _shape(op: Op) -> tuple[int | BatchSize, ...]:
    return op.type.shape
