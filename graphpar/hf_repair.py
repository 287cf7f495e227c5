"""Inputs of another shape, from what a model says when it refuses the ones it was given."""

import re
from collections.abc import Callable, Iterator, Mapping
from math import prod
from typing import Any

import torch

_PRODUCT = re.compile(r"shapes cannot be multiplied \((\d+)x(\d+) and (\d+)x\d+\)")
_CHANNELS = re.compile(r"expected input\[([\d, ]+)\] to have (\d+) channels")
_PICTURE = re.compile(r"\((\d+) ?[*x,] ?(\d+)\)[^(]*(?:model|expected)[^(]*\((\d+) ?[*x,] ?(\d+)\)")
_NORMALISED = re.compile(r"expected input with shape \[\*, (\d+)\], but got input of size ?\[([\d, ]+)\]")
_MAX_REPAIRS = 3


def with_repairs(
    inputs: Mapping[str, Any], attempt: Callable[[dict[str, Any]], Any]
) -> tuple[dict[str, Any], Any]:
    """Inputs that an attempt accepts, these or others of changed shapes, and what it returned.

    Args:
        inputs: Keyword arguments of a model.
        attempt: Runs the model with them.

    Raises:
        Exception: What the attempt raised with the inputs as given.
    """
    given, first = dict(inputs), None
    for _ in range(_MAX_REPAIRS + 1):
        try:
            return given, attempt(given)
        except Exception as error:
            first = first or error
            changed = next(_repaired(given, str(error)), None)
            if changed is None:
                break
            given = changed
    assert first is not None
    raise first


def _repaired(inputs: Mapping[str, Any], said: str) -> Iterator[dict[str, Any]]:
    """The inputs with one of them changed as an error suggests.

    >>> said = "mat1 and mat2 shapes cannot be multiplied (40x62 and 64x64)"
    >>> {k: tuple(v.shape) for k, v in next(_repaired({"x": torch.zeros(4, 10, 64)}, said)).items()}
    {'x': (4, 10, 66)}
    """
    for name, tensor in inputs.items():
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point() or tensor.ndim < 2:
            continue
        if "index out of range" in said and bool((tensor < 0).any()):  # some of it serves as an index
            yield {**inputs, name: tensor.abs().clamp(max=1.0)}
        shape = _wanted(tuple(tensor.shape), said)
        if shape is not None and shape != tuple(tensor.shape) and min(shape) > 0:
            yield {**inputs, name: _like(tensor, shape)}


def _wanted(shape: tuple[int, ...], said: str) -> tuple[int, ...] | None:
    if found := _PRODUCT.search(said):
        rows, has, needs = (int(n) for n in found.groups())
        if prod(shape[:-1]) == rows or has == shape[-1]:
            return (*shape[:-1], shape[-1] + needs - has)
    if found := _NORMALISED.search(said):
        if int(found[2].split(",")[-1]) == shape[-1]:
            return (*shape[:-1], int(found[1]))
    if found := _CHANNELS.search(said):
        seen = [int(n) for n in found[1].split(",")]
        if len(shape) >= 3 and shape[-(len(seen) - 1)] == seen[1]:
            return tuple(
                int(found[2]) if i == len(shape) - len(seen) + 1 else n for i, n in enumerate(shape)
            )
    if found := _PICTURE.search(said):
        sizes = [int(n) for n in found.groups()]
        if list(shape[-2:]) == sizes[:2]:
            return (*shape[:-2], *sizes[2:])
        if list(shape[-2:]) == sizes[2:]:
            return (*shape[:-2], *sizes[:2])
    return None


def _like(tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Random numbers of another shape."""
    if tensor.device.type == "meta":
        return tensor.new_empty(shape)
    generator = torch.Generator(tensor.device).manual_seed(prod(shape))
    return torch.randn(shape, dtype=tensor.dtype, device=tensor.device, generator=generator)
