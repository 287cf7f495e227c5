"""Captures at some sequence lengths become captures at those between them.

An export takes seconds and a sweep may ask for many lengths. Three exports are enough where every size
and every whole number in them lies on one straight line over the lengths: then those of a length in
between lie on it as well. What bends between them (a window, a table of fixed size) does not, and such
a model is captured at each length. Sizes that are rounded, up to a multiple of 64 or to whole strides,
would look straight at lengths that are multiples of it apart: so a length has to be a multiple of the
step that the three are apart from one another. And what is rounded up to a power of two, as
parallel scans are, looks straight where the three are doublings of the first: then no others follow.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

import torch

from graphpar.frontend.torch_private import flatten
from graphpar.ir.chain import build_chain
from graphpar.ir.graph import Graph
from graphpar.ir.ops import BatchSize, Op, Symbol, TensorType
from graphpar.preparation import Prepared

FEWEST = 3
"""Captures that others are made of: two give a line, and the third shows that it is one."""


def support(lengths: Collection[int], captured: Collection[int] = ()) -> tuple[int, ...]:
    """The lengths to capture so that others follow: the ends, and the one between that most follow from.

    Of several in between one that is captured already is preferred, then one near the middle.

    >>> support([256, 512, 768, 1024]), support([512, 640]), support([128, 256, 512, 1024], [512])
    ((256, 768, 1024), (512, 640), (128, 512, 1024))
    >>> support([1024, 1536, 2048, 4096])
    (1024, 1536, 4096)
    """
    ordered = sorted(set(lengths))
    if len(ordered) <= FEWEST:
        return tuple(ordered)
    low, *inner, high = ordered

    @cache
    def left(step: int, doubled: bool) -> int:
        return sum(not _lies(low, high, step, doubled, n) for n in inner)

    def worth(middle: int) -> tuple[int, bool, int]:
        return left(*_spacing((low, middle, high))), middle not in captured, abs(2 * middle - low - high)

    return low, min(inner, key=worth), high


def _follows(ends: Sequence[int], length: int) -> bool:
    """Whether what is straight at these three lengths, in order, is so at another one between them.

    >>> _follows((256, 768, 1024), 512), _follows((256, 512, 1024), 768), _follows((6, 9, 15), 10)
    (True, False, False)
    """
    return _lies(ends[0], ends[-1], *_spacing(ends), length)


def _spacing(ends: Sequence[int]) -> tuple[int, bool]:
    """The step that lengths are multiples of apart, and whether all are doublings of the first."""
    step = math.gcd(*(b - a for a, b in pairwise(ends)))
    return step, all(_is_doubling(ends[0], end) for end in ends)


def _lies(low: int, high: int, step: int, doubled: bool, length: int) -> bool:
    """Whether a length lies between two in whole steps, and is a doubling where it has to be."""
    in_step = low < length < high and (length - low) % step == 0
    return in_step and (not doubled or _is_doubling(low, length))


def _is_doubling(low: int, length: int) -> bool:
    """Whether a length is another one times a power of two."""
    times, rest = divmod(length, low)
    return rest == 0 and times.bit_count() == 1


def between(captures: Mapping[int, Prepared], length: int) -> Prepared | None:
    """The capture at a length between three others; None where it does not follow from them.

    Args:
        captures: Captures of one model by their length; three of them.
        length: Between the least and the greatest of them.
    """
    ends = sorted(captures)
    if len(ends) != FEWEST or not _follows(ends, length):
        return None
    graph = _on_line(captures, length)
    # Where units are cut depends on what crosses, and that on the length.
    return replace(captures[ends[0]], graph=graph, chain=build_chain(graph)) if graph else None


def are_straight(captures: Mapping[int, Prepared]) -> bool:
    """Whether three captures lie on a line over their lengths."""
    return _on_line(captures, sorted(captures)[1]) is not None


def _on_line(captures: Mapping[int, Prepared], length: int) -> Graph | None:
    """The graph at a length from those at three; None where something of them is not on a line."""
    low, middle, high = sorted(captures)
    made = [captures[end] for end in (low, middle, high)]
    first = made[0].graph

    def traits(prepared: Prepared) -> object:
        graph = prepared.graph
        return bool(prepared.batch_reason), graph.batch, graph.aliases, len(graph.ops)

    if any(traits(prepared) != traits(made[0]) for prepared in made):
        return None
    line = _Line(low, middle, high, length)
    try:
        return first.with_ops(
            [line.op(*three) for three in zip(*(p.graph.ops for p in made), strict=True)]
        )
    except _BentError:
        return None


class _BentError(Exception):
    """Something of three captures is not on a line."""


class _Line:
    """Values at a length from those at three others."""

    def __init__(self, low: int, middle: int, high: int, at: int) -> None:
        self.low, self.middle, self.high, self.at = low, middle, high, at

    def op(self, a: Op, b: Op, c: Op) -> Op:
        """The op at the length."""
        if (a.name, a.target) != (b.name, b.target) or (a.name, a.target) != (c.name, c.target):
            raise _BentError
        if a == b == c:
            return a
        args, kwargs, types, attrs = (
            self.value(x, y, z)
            for x, y, z in (
                (a.args, b.args, c.args),
                (a.kwargs, b.kwargs, c.kwargs),
                (a.types, b.types, c.types),
                (a.attrs, b.attrs, c.attrs),
            )
        )
        rest = {"args": (), "kwargs": (), "types": (), "attrs": ()}
        if not replace(a, **rest) == replace(b, **rest) == replace(c, **rest):  # type: ignore[arg-type]
            raise _BentError
        return replace(a, args=args, kwargs=kwargs, types=types, attrs=attrs)

    def value(self, x: Any, y: Any, z: Any) -> Any:
        """A part of an op: whole numbers on the line, everything else the same at all three."""
        if not type(x) is type(y) is type(z):
            raise _BentError
        if x == y == z or (x != x and y != y and z != z):
            return x
        if isinstance(x, tuple) and len(x) == len(y) == len(z):
            return tuple(self.value(*three) for three in zip(x, y, z, strict=True))
        if type(x) is int:
            return self.whole(x, y, z)
        if isinstance(x, BatchSize) and not (x.parts or y.parts or z.parts):
            return BatchSize(self.whole(x.times, y.times, z.times))
        if isinstance(x, TensorType) and x.dtype == y.dtype == z.dtype:
            return TensorType(self.value(x.shape, y.shape, z.shape), x.dtype)
        if isinstance(x, Symbol) and x.kind == y.kind == z.kind == "batch":
            # A number per sample, such as its tokens.
            each = [float(one.value) for one in (x, y, z)]
            if all(number.is_integer() for number in each):
                number = self.whole(*map(int, each))
                return replace(x, value=repr(float(number)) if "." in x.value else str(number))
        raise _BentError

    def whole(self, x: int, y: int, z: int) -> int:
        """The whole number on the line of three.

        >>> _Line(2, 3, 5, 4).whole(5, 7, 11)
        9
        """
        if (y - x) * (self.high - self.low) != (z - x) * (self.middle - self.low):
            raise _BentError
        more, rest = divmod((z - x) * (self.at - self.low), self.high - self.low)
        if rest:
            raise _BentError
        return x + more


def same_form(call: tuple[Any, Any], other: tuple[Any, Any]) -> bool:
    """Whether two calls have the same structure, shapes and constants."""
    (mine, spec), (others, other_spec) = flatten(call), flatten(other)
    return spec == other_spec and all(map(_same_leaf, mine, others))


def _same_leaf(mine: Any, other: Any) -> bool:
    if not isinstance(mine, torch.Tensor) or not isinstance(other, torch.Tensor):
        return type(mine) is type(other) and bool(mine == other)
    return (mine.shape, mine.dtype, mine.device) == (other.shape, other.dtype, other.device)


def sequence_length(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """The second dimension of the first tensor that has one."""
    tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor) and t.dim() > 1]
    return int(tensors[0].shape[1]) if tensors else 1
