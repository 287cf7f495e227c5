"""The arguments of an op at one member of a tensor group: sizes, weights that enter once, own kernels."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from graphpar.ir.mesh import localized
from graphpar.ir.ops import Argument, Op, Ref
from graphpar.ir.optable import packet
from graphpar.ir.shards import Layout, Split
from graphpar.ir.strategies import Strategy

_RESHAPES = ("view", "reshape", "_unsafe_view", "flatten", "unflatten")
_KEYED = ("gp.dropout", "gp.attention")


def local_arguments(op: Op, local: Op, ways: Sequence[Strategy], coords: Sequence[int]) -> Op:
    """The local op with arguments that fit its local types.

    Args:
        op: The op as it was.
        local: The op reading the member's operands, with the member's types.
        ways: How it is computed, along each axis of the group.
        coords: Which member, by its place along each.
    """
    if any(way.first_only and member > 0 for way, member in zip(ways, coords, strict=True)):
        local = _BARE[packet(op)](local)
    special = [axis for axis, way in enumerate(ways) if way.special]
    if special:
        local = _SPECIAL[ways[special[0]].special](local, _first(ways, coords))
        along = (("axis", special[0]),) if len(special) < len(ways) else ()
        return replace(local, kwargs=along) if local.target == "gp.class_loss" else local
    cuts = _cuts_of_result(ways, coords)
    if not cuts:
        return local
    if packet(op) in _RESHAPES:
        return replace(
            local, target="aten.reshape.default", args=(local.args[0], local.type.shape), kwargs=()
        )
    if packet(op) in ("expand", "broadcast_to"):
        return replace(local, args=(local.args[0], local.type.shape))
    if packet(op) in ("split", "unsafe_split", "split_with_sizes"):
        return _split(local, packet(op))
    if op.target in _KEYED:
        keys = zip(("part", "inner_part"), cuts, strict=False)
        return replace(local, kwargs=(*local.kwargs, *keys))
    return local


def _cuts_of_result(ways: Sequence[Strategy], coords: Sequence[int]) -> list[Argument]:
    """Slice of the first result that is cut along each axis: dimension, units, inner size, member."""
    cut: list[Layout] = [
        next((layout for layout in way.results if isinstance(layout, Split)), "whole") for way in ways
    ]
    found: list[Argument] = []
    for split, member in zip(localized(cut, coords), coords, strict=True):
        if isinstance(split, Split):
            found.append((split.dim, split.numbers, split.inner, member))
    return found


def _split(local: Op, name: str) -> Op:
    kinds = [t for t in local.types if t is not None]
    given = local.argument(2, "dim", 0)
    assert isinstance(given, int)
    dim = given % len(kinds[0].shape)
    sizes = tuple(t.shape[dim] for t in kinds)
    first: Argument = sizes if name == "split_with_sizes" else sizes[0]
    return replace(local, args=(local.args[0], first, *local.args[2:]))


def _without_third(local: Op) -> Op:
    """Linear without its bias."""
    kept = tuple((k, v) for k, v in local.kwargs if k != "bias")
    return replace(local, args=local.args[:2], kwargs=kept)


def _without_bias_at_two(local: Op) -> Op:
    """Convolution with no bias."""
    kept = tuple((k, None if k == "bias" else v) for k, v in local.kwargs)
    args = (*local.args[:2], None, *local.args[3:]) if len(local.args) > 2 else local.args
    return replace(local, args=args, kwargs=kept)


def _product(target: str) -> Callable[[Op], Op]:
    """`bias + a @ b` without the bias."""
    return lambda local: replace(local, target=target, args=local.args[1:3], kwargs=())


_BARE: dict[str, Callable[[Op], Op]] = {
    "linear": _without_third,
    "addmm": _product("aten.mm.default"),
    "baddbmm": _product("aten.bmm.default"),
    "conv1d": _without_bias_at_two,
    "conv2d": _without_bias_at_two,
    "conv3d": _without_bias_at_two,
    "convolution": _without_bias_at_two,
}


def _first(ways: Sequence[Strategy], coords: Sequence[int]) -> int:
    """Where the member's slice of what is cut begins, of a slice of a slice within the whole."""
    cut: list[Layout] = [
        next(layout for layout in way.operands if isinstance(layout, Split)) if way.special else "whole"
        for way in ways
    ]
    places = zip(localized(cut, coords), coords, strict=True)
    return sum(split.first(k) * split.inner for split, k in places if isinstance(split, Split))


def _lookup(local: Op, first: int) -> Op:
    """Rows of the table that the member holds; zeros for the others."""
    padding = local.argument(2, "padding_idx", -1)
    return replace(local, target="gp.lookup", args=(*local.args[:2], first, padding), kwargs=())


def _classes(local: Op, first: int) -> Op:
    """Cross entropy over scores whose classes are cut."""
    reduction, ignored = local.argument(3, "reduction", 1), local.argument(4, "ignore_index", -100)
    return replace(
        local, target="gp.class_loss", args=(*local.args[:2], first, reduction, ignored), kwargs=()
    )


def _experts(local: Op, first: int) -> Op:
    """Products of the rows that belong to the member's experts."""
    ends = local.argument(2, "offs")
    assert isinstance(ends, Ref)
    return replace(local, target="gp.grouped_product", args=(*local.args[:2], ends, first), kwargs=())


_SPECIAL: dict[str, Callable[[Op, int], Op]] = {
    "lookup": _lookup,
    "classes": _classes,
    "experts": _experts,
}

_FIRST_AT = {"gp.lookup": 2, "gp.class_loss": 2, "gp.grouped_product": 3}
"""Place of the number of the member's first unit among the arguments."""


def moved(local: Op, strategy: Strategy | None, member: int) -> Op:
    """An op of one member for another one with as many units, whose units begin elsewhere."""
    place = _FIRST_AT.get(local.target)
    if strategy is not None and strategy.special and place is not None:
        args = (*local.args[:place], _first((strategy,), (member,)), *local.args[place + 1 :])
        return replace(local, args=args)
    part = local.kwarg("part")
    if isinstance(part, tuple):
        own = {"part": (*part[:-1], member)}
        return replace(local, kwargs=tuple((key, own.get(key, value)) for key, value in local.kwargs))
    return local
