"""What a model without weights computes with besides: numbers of its own keep their values.

Without weights a model is captured on the meta device, where tensors have no values. Tensors that do have
some (plain attributes of modules, what a loss or a script holds) are replaced by ones without, and become
constants of the graph with the values they have. What the forward makes of plain numbers
(`torch.tensor([1.0, 2.0])`) it makes by operators instead, and where it names no device, on the model's.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import partial
from itertools import groupby
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from graphpar.errors import CaptureError
from graphpar.frontend.frames import is_users, users_line

_LARGEST = 4096
"""Numbers that are made by operators at most."""
_VALUES: ContextVar[dict[int, tuple[torch.Tensor, torch.Tensor]] | None] = ContextVar(
    "VALUES", default=None
)
"""Tensors that stand for others which have values, by identity: themselves, and these."""


@contextmanager
def values_apart(model: nn.Module, loss: Any) -> Iterator[None]:
    """Within it, where the model has no weights, tensors that it or the loss reaches have no values."""
    if not any(t.device.type == "meta" for t in (*model.parameters(), *model.buffers())):
        yield
        return
    stand_ins: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    twins: dict[int, torch.Tensor] = {}

    def swap(own: Any, name: Any) -> None:
        value = own[name]
        if not isinstance(value, torch.Tensor) or value.device.type == "meta":
            return
        if id(value) not in twins:
            twins[id(value)] = made = value.detach().to("meta")
            stand_ins[id(made)] = made, value
        stack.callback(own.__setitem__, name, value)
        own[name] = twins[id(value)]

    with ExitStack() as stack:
        for own in _reached(model, loss):
            for name in list(own):
                swap(own, name)
        token = _VALUES.set(stand_ins)
        stack.callback(_VALUES.reset, token)
        yield


def values_of(constant: torch.Tensor) -> torch.Tensor:
    """The tensor that a constant of an export stands for."""
    _, value = (_VALUES.get() or {}).get(id(constant), (constant, constant))
    return value


def _reached(model: nn.Module, loss: Any) -> Iterator[Any]:
    """Whatever holds tensors by name that the forward or the loss may read, weights left out."""
    functions: dict[int, Any] = {}
    for module in model.modules():
        yield vars(module)
        functions[id(type(module))] = type(module).forward
    if isinstance(loss, nn.Module):
        for module in loss.modules():
            yield from (vars(module), module._buffers, module._parameters)
    if isinstance(loss, partial):
        yield loss.keywords
        loss = loss.func
    for function in (*functions.values(), loss):
        if isinstance(function, FunctionType) and is_users(function.__code__.co_filename):
            yield _Names(function.__globals__, function.__code__.co_names)
            yield _Cells(function)


class _Names:
    """The global names that a function reads."""

    def __init__(self, held: dict[str, Any], names: Sequence[str]) -> None:
        self._held, self._names = held, [name for name in names if name in held]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __getitem__(self, name: str) -> Any:
        return self._held[name]

    def __setitem__(self, name: str, value: Any) -> None:
        self._held[name] = value


class _Cells:
    """What a function encloses, by place."""

    def __init__(self, function: FunctionType) -> None:
        self._cells = function.__closure__ or ()

    def __iter__(self) -> Iterator[int]:
        return (place for place, cell in enumerate(self._cells) if _is_filled(cell))

    def __getitem__(self, place: int) -> Any:
        return self._cells[place].cell_contents

    def __setitem__(self, place: int, value: Any) -> None:
        self._cells[place].cell_contents = value


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


@contextmanager
def numbers_as_operators() -> Iterator[None]:
    """Within it, and within `values_apart`, the user's code makes tensors of numbers by operators."""
    if _VALUES.get() is None:
        yield
        return
    with torch.device("meta"), _Numbers():
        yield


class _Numbers(TorchFunctionMode):
    """Makes what `torch.tensor` and its like would, of operators that a graph can hold."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and args and _is_plain(args[0]):
            return _made(args[0], kwargs.get("dtype") or _kind(args[0]))
        if func is torch.Tensor.new_tensor and _is_plain(args[1]):
            return _made(args[1], kwargs.get("dtype") or args[0].dtype)
        return func(*args, **kwargs)


def _is_plain(data: Any) -> bool:
    if isinstance(data, (list, tuple)):
        return all(map(_is_plain, data))
    return isinstance(data, (bool, int, float, complex))


def _flat(data: Any) -> Iterator[Any]:
    if isinstance(data, (list, tuple)):
        for part in data:
            yield from _flat(part)
    else:
        yield data


def _shape(data: Any) -> tuple[int, ...]:
    if not isinstance(data, (list, tuple)):
        return ()
    return (len(data), *(_shape(data[0]) if data else ()))


def _kind(data: Any) -> torch.dtype:
    """The type that `torch.tensor` would choose."""
    numbers = list(_flat(data))
    if any(isinstance(n, complex) for n in numbers):
        return torch.complex64 if torch.get_default_dtype() == torch.float32 else torch.complex128
    if any(isinstance(n, float) for n in numbers) or not numbers:
        return torch.get_default_dtype()
    return torch.bool if all(isinstance(n, bool) for n in numbers) else torch.int64


def _made(data: Any, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of these numbers, pieces of equal ones put together."""
    numbers, shape = list(_flat(data)), _shape(data)
    if len(numbers) > _LARGEST:
        raise CaptureError(
            f"The model has no weights and makes a tensor of {len(numbers)} numbers at {users_line()}, "
            "whose values would be lost. Keep them in a buffer, which weights= fills."
        )
    if not shape:
        return torch.full((), numbers[0], dtype=dtype, device="meta")
    runs = [list(run) for _, run in groupby(numbers, key=repr)]
    pieces = [torch.full((len(run),), run[0], dtype=dtype, device="meta") for run in runs]
    if not pieces:
        return torch.empty(shape, dtype=dtype, device="meta")
    return (torch.cat(pieces) if len(pieces) > 1 else pieces[0]).reshape(shape)
