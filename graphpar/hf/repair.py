"""Inputs of another shape, from what a model says when it refuses the ones it was given."""

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch

from graphpar.hf.refusal import blamed_names, words_of

_PRODUCT = re.compile(r"shapes cannot be multiplied \((\d+)x(\d+) and (\d+)x\d+\)")
_CHANNELS = re.compile(r"expected input\[([\d, ]+)\] to have (\d+) channels")
_PICTURE = re.compile(r"\((\d+) ?[*x,] ?(\d+)\)[^(]*(?:model|expected)[^(]*\((\d+) ?[*x,] ?(\d+)\)")
_MULTIPLE = re.compile(r"(?:multiple of|divisible by)(?:[^()]*\((\d+)\)|\D*(\d+)).*?got:? (\d+)")
_UNEQUAL = re.compile(r"size of tensor a \((\d+)\) must match the size of tensor b \((\d+)\)")
_SHAPE = re.compile(r"tensor of shape \(([\w, ]+)\)")
_INDEXED = re.compile(r"value tensor of shape \[(\d+)[^]]*\].*indexing result of shape \[(\d+)")
_NORMALISED = re.compile(r"expected input with shape \[\*, (\d+)\], but got input of size ?\[([\d, ]+)\]")
_MAX_REPAIRS = 6
"""After so many refusals nothing more is tried."""


def with_repairs(
    inputs: Mapping[str, Any],
    attempt: Callable[[dict[str, Any]], Any],
    further: Callable[[str], Any] = lambda name: None,
) -> tuple[dict[str, Any], Any]:
    """Inputs that an attempt accepts, these or others of changed shapes, and what it returned.

    Args:
        inputs: Keyword arguments of a model.
        attempt: Runs the model with them.
        further: Makes an input of a name that the model takes; None where none is known.

    Raises:
        Exception: What the attempt raised with the inputs as given.
    """
    search = _Search(attempt, further)
    found = search.run(dict(inputs))
    if found is None:
        raise search.refusals[0]
    return found


@dataclass
class _Search:
    """Changes inputs as refusals suggest; takes a change back that leaves the refusal as it was."""

    attempt: Callable[[dict[str, Any]], Any]
    further: Callable[[str], Any]
    refusals: list[Exception] = field(default_factory=list)

    def run(self, inputs: dict[str, Any]) -> tuple[dict[str, Any], Any] | None:
        """Inputs that are accepted and what came of them, or None where no change helps."""
        try:
            return inputs, self.attempt(inputs)
        except TimeoutError:
            raise
        except Exception as error:
            known = str(error) in map(str, self.refusals)
            self.refusals.append(error)
            if known:
                return None
            changes = itertools.chain(
                _repaired(inputs, str(error)), _completed(inputs, error, self.further)
            )
            for changed in changes:
                if len(self.refusals) > _MAX_REPAIRS:
                    return None
                if (found := self.run(changed)) is not None:
                    return found
            return None


def _completed(
    inputs: Mapping[str, Any], error: Exception, further: Callable[[str], Any]
) -> Iterator[dict[str, Any]]:
    """The inputs with one more, which the error or the line that raised it names."""
    for name in dict.fromkeys((*words_of(error), *blamed_names(error))):
        if name not in inputs and (made := further(name)) is not None:
            yield {**inputs, name: made}


def _repaired(inputs: Mapping[str, Any], said: str) -> Iterator[dict[str, Any]]:
    """The inputs with one of them changed as an error suggests.

    >>> said = "mat1 and mat2 shapes cannot be multiplied (40x62 and 64x64)"
    >>> {k: tuple(v.shape) for k, v in next(_repaired({"x": torch.zeros(4, 10, 64)}, said)).items()}
    {'x': (4, 10, 66)}
    """
    if found := _INDEXED.search(said):
        yield from _marking(inputs, *(int(n) for n in found.groups()))
    for name, tensor in inputs.items():
        if not isinstance(tensor, torch.Tensor) or tensor.ndim < 2:
            continue
        if (found := _UNEQUAL.search(said)) and name.endswith("input_ids") and tensor.ndim == 2:
            if tensor.shape[1] == int(found[1]):  # several codes at each place
                yield {**inputs, name: _like(tensor, (*tensor.shape, int(found[2])))}
        if not tensor.is_floating_point() and (tensor.ndim < 3 or name.endswith("mask")):
            continue
        if "index out of range" in said and bool((tensor < 0).any()):  # some of it serves as an index
            yield {**inputs, name: tensor.abs().clamp(max=1.0)}
        shape = _wanted(tuple(tensor.shape), said)
        if shape is not None and shape != tuple(tensor.shape) and min(shape) > 0:
            yield {
                **inputs,
                **_masks(inputs, name, tensor.shape, shape, _MULTIPLE.search(said) is not None),
                name: _like(tensor, shape),
            }


def _masks(
    inputs: Mapping[str, Any], name: str, before: Sequence[int], after: Sequence[int], longer: bool
) -> dict[str, Any]:
    """The mask of an input whose shape changes: as long as it where that was what was wrong."""
    mask = inputs.get(f"{name}_mask")
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2 or not len(before) == len(after) == 3:
        return {}
    changed = 1 if before[1] != after[1] else 2
    shape = (mask.shape[0], after[changed] if longer else after[3 - changed])
    return {f"{name}_mask": torch.ones(shape, dtype=mask.dtype, device=mask.device)}


def _marking(inputs: Mapping[str, Any], places: int, marked: int) -> Iterator[dict[str, Any]]:
    """The inputs with so many places of the text marked, equally many in each sample.

    >>> made = next(_marking({"marks": torch.ones(2, 3), "input_ids": torch.ones(2, 3)}, 8, 6))
    >>> made["marks"].tolist(), made["input_ids"].shape
    ([[1.0, 1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0, 0.0]], torch.Size([2, 5]))
    """
    for name, mask in inputs.items():
        if not isinstance(mask, torch.Tensor) or mask.ndim != 2 or mask.device.type == "meta":
            continue
        batch, length = mask.shape
        if name == "attention_mask" or places % batch or int(mask.bool().sum()) != marked:
            continue
        each = places // batch
        more = max(0, each + 1 - length)
        made = {
            k: torch.cat([v, v[:, -1:].expand(batch, more)], dim=1)
            if isinstance(v, torch.Tensor) and v.shape == mask.shape
            else v
            for k, v in inputs.items()
        }
        made[name] = (
            (torch.arange(length + more, device=mask.device) < each).to(mask.dtype).repeat(batch, 1)
        )
        yield made


def _wanted(shape: tuple[int, ...], said: str) -> tuple[int, ...] | None:
    """The shape that an error asks for instead of this one, where its sizes are this one's."""
    for pattern, rule in _RULES:
        if (found := pattern.search(said)) and (wanted := rule(shape, found)):
            return wanted
    return None


def _for_product(shape: tuple[int, ...], found: re.Match[str]) -> tuple[int, ...] | None:
    rows, has, needs = (int(n) for n in found.groups())
    if prod(shape[:-1]) == rows or has == shape[-1]:
        return (*shape[:-1], shape[-1] + needs - has)
    return None


def _for_norm(shape: tuple[int, ...], found: re.Match[str]) -> tuple[int, ...] | None:
    has = int(found[2].split(",")[-1])
    return (*shape[:-1], int(found[1])) if has == shape[-1] else None


def _for_channels(shape: tuple[int, ...], found: re.Match[str]) -> tuple[int, ...] | None:
    seen = [int(n) for n in found[1].split(",")]
    place = len(shape) - len(seen) + 1
    if len(shape) < 3 or not 0 <= place < len(shape) or shape[place] != seen[1]:
        return None
    return (*shape[:place], int(found[2]), *shape[place + 1 :])


def _for_multiple(shape: tuple[int, ...], found: re.Match[str]) -> tuple[int, ...] | None:
    factor, has = int(found[1] or found[2]), int(found[3])
    place = max((i for i, n in enumerate(shape) if n == has and i), default=None)
    if place is None or not factor:
        return None
    return (*shape[:place], -(-has // factor) * factor, *shape[place + 1 :])


def _for_unequal(shape: tuple[int, ...], found: re.Match[str]) -> tuple[int, ...] | None:
    has, needs = (int(n) for n in found.groups())
    if shape[1:].count(has) != 1:
        return None
    return (shape[0], *(needs if n == has else n for n in shape[1:]))


def _for_dimension(shape: tuple[int, ...], found: re.Match[str]) -> tuple[int, ...] | None:
    parts = [part.strip() for part in found[1].split(",")]
    if len(parts) != len(shape) + 1 or sum(part.isdigit() for part in parts) != 1:
        return None
    place = next(i for i, part in enumerate(parts) if part.isdigit())
    return (*shape[:place], int(parts[place]), *shape[place:])


def _for_picture(shape: tuple[int, ...], found: re.Match[str]) -> tuple[int, ...] | None:
    sizes = tuple(int(n) for n in found.groups())
    for has, needs in ((sizes[:2], sizes[2:]), (sizes[2:], sizes[:2])):
        if shape[-2:] == has:
            return (*shape[:-2], *needs)
    return None


_RULES = (
    (_PRODUCT, _for_product),
    (_NORMALISED, _for_norm),
    (_CHANNELS, _for_channels),
    (_MULTIPLE, _for_multiple),
    (_UNEQUAL, _for_unequal),
    (_SHAPE, _for_dimension),
    (_PICTURE, _for_picture),
)
"""What torch and transformers say of a size that does not fit, and the shape that would."""


def _like(tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Random numbers of another shape, whole ones in the range of those that were there."""
    if tensor.device.type == "meta":
        return tensor.new_empty(shape)
    generator = torch.Generator(tensor.device).manual_seed(prod(shape))
    if not tensor.is_floating_point():
        low, high = int(tensor.min()), int(tensor.max())
        return torch.randint(
            max(low, 0), high + 1, shape, dtype=tensor.dtype, device=tensor.device, generator=generator
        )
    return torch.randn(shape, dtype=tensor.dtype, device=tensor.device, generator=generator)
