"""The batch size among an op's arguments: a size of its result, a number to compute with, or neither."""

from collections.abc import Sequence
from dataclasses import replace

from graphpar.ir.ops import Argument, BatchSize, Dim, Op, Symbol
from graphpar.ir.optable import POINTWISE, packet
from graphpar.passes.samples import Call, dims_argument

_SIZES: dict[str, tuple[int, ...]] = {
    "view": (1,), "reshape": (1,), "_unsafe_view": (1,), "expand": (1,), "broadcast_to": (1,),
    "repeat": (1,), "tile": (1,), "unflatten": (2,), "full": (0,), "zeros": (0,), "ones": (0,),
    "empty": (0,), "new_full": (1,), "new_zeros": (1,), "new_ones": (1,), "new_empty": (1,),
    "arange": (0, 1, 2), "gp.random": (1,), "affine_grid_generator": (1,),
}  # fmt: skip
"""Positions of the arguments that are sizes of the result, stamped for the samples at hand."""
_NUMBERS = POINTWISE | {"full", "new_full", "scalar_tensor"}
"""Ops whose plain numbers are values, not sizes."""


def whole_batch_numbers(op: Op) -> Op:
    """A batch size among the scalars of arithmetic means the whole batch, not the part at hand."""
    if packet(op).rstrip("_") not in _NUMBERS:
        return op

    def number(argument: Argument) -> Argument:
        return Symbol("batch", str(argument.times)) if isinstance(argument, BatchSize) else argument

    return replace(
        op,
        args=tuple(number(a) for a in op.args),
        kwargs=tuple((k, number(v)) for k, v in op.kwargs),
    )


def broadcast(shapes: Sequence[tuple[Dim, ...]]) -> tuple[Dim, ...]:
    """The shape that shapes which fit each other broadcast to.

    >>> broadcast([(BatchSize(), 1), (3,)])
    (BatchSize(times=1), 3)
    """
    rank = max(map(len, shapes))
    padded = [(1,) * (rank - len(shape)) + shape for shape in shapes]
    return tuple(next((d for d in dims if d != 1), 1) for dims in zip(*padded, strict=True))


def sized(op: Op) -> Op:
    """A squeeze would drop the batch dimension of a single sample: say the shape that is meant."""
    if packet(op) != "squeeze" or not op.type.batch_dims:
        return op
    return replace(op, target="aten.reshape.default", args=(op.args[0], op.type.shape), kwargs=())


def has_loose_batch_size(op: Op, call: Call) -> bool:
    """Whether the batch size stands among the arguments as anything but the size of a result."""
    sizes = _SIZES.get(packet(op), ())
    kind, dim = (call.type(op.args[0]), call.dim(op.args[0])) if op.args else (None, None)
    if packet(op) == "slice" and kind is not None:
        along = dims_argument(op.argument(1, "dim", 0), len(kind.shape))
        sizes = (2, 3) if along == (dim,) else ()
    loose = [a for place, a in enumerate(op.args) if place not in sizes]
    return any(map(_mentions_batch, (*loose, *(v for _, v in op.kwargs))))


def _mentions_batch(argument: Argument) -> bool:
    if isinstance(argument, tuple):
        return any(map(_mentions_batch, argument))
    return isinstance(argument, BatchSize)
