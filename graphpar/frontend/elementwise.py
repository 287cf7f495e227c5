"""Which custom `torch.autograd.Function`s act element by element, forward and backward.

A Function is one operator of the graph, and what an unknown operator does to the samples of a batch is
unknown. One that consists of nothing but operators that act element by element, on tensors of one
shape, keeps samples apart as these do.
"""

from collections.abc import Callable, Sequence
from threading import Thread
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from graphpar.frontend.torch_private import DispatchMode, flatten
from graphpar.ir.optable import POINTWISE

_SIZES = (2, 3)
"""Sizes to try; what a Function computes from its sizes differs between them."""
_CONSTANT = "scalar_tensor"
"""Makes a tensor of no dimensions out of a number."""
_SHAPE_READS = (torch.Tensor.shape.__get__, torch.Tensor.size)  # type: ignore[attr-defined]
_SIZE_READS = (
    torch.Tensor.numel,
    torch.Tensor.nelement,
    torch.Tensor.__len__,
    torch.Tensor.stride,
    torch.Tensor.nbytes.__get__,  # type: ignore[attr-defined]
    torch.numel,
)
_Ops = list[tuple[str, tuple[str, ...]]]


def acts_by_element(
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    tensors: Sequence[torch.Tensor],
    result: Any,
) -> bool:
    """Whether a Function with these arguments and this result only calls elementwise operators.

    It is run on small tensors of as many dimensions and of two sizes; the same operators with the same
    numbers must be called, so that no number follows from a size, and no size may be read, for what a
    Function does with it may show at large sizes only. What computes without operators of torch, in numpy
    or in an extension, is not seen so; hence other values in one place must change nothing in the others.

    Args:
        forward: Takes the tensors, returns the result.
        backward: Takes the tensors and the gradient of the result, and in what context to run the
            Function's own backward, returns gradients of the tensors.
        tensors: Its arguments.
        result: What it makes of them.
    """
    shapes = {tuple(t.shape) for t in tensors}
    if not isinstance(result, torch.Tensor) or shapes != {tuple(result.shape)}:
        return False  # operands that are broadcast are summed over in the backward
    kinds = [(t.dtype, t.ndim) for t in tensors]
    found: list[_Ops] = []

    def look() -> None:
        try:
            if _keeps_apart(forward, backward, kinds):
                found.extend(_called(forward, backward, kinds, size) for size in _SIZES)
        except Exception:  # whatever a Function says to numbers that it does not expect
            found.clear()

    # The modes of the capture belong to its thread, and must not see this.
    thread = Thread(target=look)
    thread.start()
    thread.join()
    return len(found) == len(_SIZES) and found[0] == found[1] and _are_elementwise(found[0])


def _called(
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    kinds: Sequence[tuple[torch.dtype, int]],
    size: int,
) -> _Ops:
    """Operators that a Function calls, and their arguments that are no tensors."""
    given = [torch.full((size,) * ndim, 0.5).to(dtype) for dtype, ndim in kinds]
    with _Recorder() as recorder:
        with _NoSizes():
            made = forward(*given)
        start = torch.full_like(made, 0.25)
        backward(given, start, _NoSizes())
    if made.shape != given[0].shape:
        raise ValueError("the result has another shape than the arguments")
    return list(recorder.ops)


def _keeps_apart(
    forward: Callable[..., Any], backward: Callable[..., Any], kinds: Sequence[tuple[torch.dtype, int]]
) -> bool:
    """Whether results and gradients of all elements but the first stay when the first one changes."""

    def rest(first: float) -> list[torch.Tensor]:
        given = [_unlike(dtype, ndim, first) for dtype, ndim in kinds]
        made = forward(*given)
        gradients = backward(given, _unlike(made.dtype, made.ndim, first))
        return [t.detach().flatten()[1:] for t in (made, *gradients) if t is not None]

    before, after = rest(0.125), rest(0.875)
    return all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(before, after, strict=True))


def _unlike(dtype: torch.dtype, ndim: int, first: float) -> torch.Tensor:
    """A small tensor of unlike values, the first of them given."""
    count: int = max(_SIZES) ** ndim
    values = torch.linspace(0.25, 0.75, count)
    values[0] = first
    scale = 1 if dtype.is_floating_point or dtype.is_complex else count
    return (values * scale).reshape((max(_SIZES),) * ndim).to(dtype)


class _Recorder(DispatchMode):  # type: ignore[misc]
    """Writes down every operator that is called."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: _Ops = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves, _ = flatten((args, kwargs or {}))
        plain = tuple(repr(leaf) for leaf in leaves if not isinstance(leaf, torch.Tensor))
        self.ops.append((str(func), plain))
        return func(*args, **(kwargs or {}))


class _NoSizes(TorchFunctionMode):
    """Tells no size of a tensor, and of a shape only whether another tensor has it as well."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func in _SHAPE_READS and isinstance(made, torch.Size):
            return _Shape(made)
        if func in _SHAPE_READS or func in _SIZE_READS:
            raise ValueError("it reads the size of a tensor")
        return made


class _Shape(tuple[int, ...]):
    """A shape that operators take, and that shows no size."""

    __slots__ = ()
    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Shape):
            raise ValueError("it compares a shape with numbers")
        return tuple.__eq__(self, other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def _hidden(self, *_: Any) -> Any:
        raise ValueError("it reads the size of a tensor")

    __getitem__ = __iter__ = __lt__ = __gt__ = __le__ = __ge__ = __contains__ = count = index = _hidden


def _are_elementwise(ops: _Ops) -> bool:
    return all(_packet(target) in POINTWISE or _packet(target) == _CONSTANT for target, _ in ops)


def _packet(target: str) -> str:
    """The operator without overload, that of a derivative and one in place as the plain one.

    Empty where it is none of torch's own.

    >>> _packet("aten.mul_.Tensor"), _packet("aten.gelu_backward.default"), _packet("my.scale.default")
    ('mul', 'gelu', '')
    """
    namespace, _, rest = target.partition(".")
    name = rest.partition(".")[0]
    if namespace != "aten":
        return ""
    return name if name.startswith("__") else name.removesuffix("_").removesuffix("_backward")
