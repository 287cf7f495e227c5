"""Random numbers that depend on seed, step, stream and position in the global batch, on nothing else.

A counter-based hash of each element's position makes every bit (`mixing`), so that any split of the
batch, any stage and any device draws the same numbers.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import pi, prod

import torch

from graphpar.runtime.mixing import MULTIPLIERS, Grid, kept, mix, mixed
from graphpar.runtime.slices import places, resized

_GOLDEN = 0x9E3779B9 - 2**32


@dataclass
class StepContext:
    """Where in training and in the global batch the microbatch at hand is; set before each forward.

    Attributes:
        seed: The job's seed.
        step: Number of the optimiser step.
        batch: Samples in the global batch.
        first_sample: Place of the microbatch's first sample in the global batch.
        samples: Samples in the microbatch.
    """

    seed: int = 0
    step: int = 0
    batch: int = 1
    first_sample: int = 0
    samples: int = 1


@dataclass(frozen=True)
class Layout:
    """Where samples lie in a tensor: dimension `dim` has the size outer x samples x inner."""

    dim: int
    outer: int = 1
    inner: int = 1


@dataclass(frozen=True)
class Part:
    """Which slice of a tensor a member of a tensor group has (see `slices.take`)."""

    dim: int
    counts: tuple[int, ...]
    inner: int
    member: int

    def places(self, size: int, device: torch.device) -> tuple[torch.Tensor, int]:
        """For each element of the slice its place in the whole, and the size of the whole."""
        whole = resized(size, self.counts, self.inner, self.member, sum(self.counts))
        return places(whole, self.counts, self.inner, self.member).to(device), whole


Parts = tuple[Part, ...]
"""A slice, and a slice of that slice."""


def _to_int32(x: torch.Tensor) -> torch.Tensor:
    return (((x + 2**31) & 0xFFFFFFFF) - 2**31).to(torch.int32)


def _mix_number(value: int) -> int:
    """The same mixing of one whole number, in plain Python; signed like an int32."""
    x = (value ^ (value >> 32)) & 0xFFFFFFFF
    x = (x ^ (x >> 16)) * MULTIPLIERS[0] & 0xFFFFFFFF
    x = (x ^ (x >> 15)) * MULTIPLIERS[1] & 0xFFFFFFFF
    x ^= x >> 16
    return x - 2**32 if x >= 2**31 else x


def random_bits(
    shape: torch.Size,
    stream: int,
    context: StepContext,
    layout: Layout | None,
    device: torch.device,
) -> torch.Tensor:
    """Random int32 bits, one per element of `shape`.

    Args:
        shape: Shape of the microbatch's tensor.
        stream: Number of the random op in the captured graph.
        context: Step and place in the global batch.
        layout: Where samples lie in `shape`; None for a tensor that all samples share.
        device: Where to make them.
    """
    grid = _grid(shape, context, layout, device, ())
    return mixed(grid, _key(stream, context)).view(shape)


def _key(stream: int, context: StepContext) -> int:
    """What makes the bits of a stream in a step other than those of all others."""
    key = context.seed
    for number in (context.step, stream):
        key = _mix_number((_mix_number(key) * 31 + number) ^ 0x5BD1E995)
    return key


def _grid(
    shape: torch.Size,
    context: StepContext,
    layout: Layout | None,
    device: torch.device,
    parts: Parts,
) -> Grid:
    """Rows are indices up to and including the batch dimension, columns those after it."""
    dim = layout.dim if layout is not None else 0
    head, tail = range(dim + 1 if shape else dim), range(dim + 1, len(shape))
    place = (context.samples, context.first_sample, context.batch) if layout is not None else (1, 0, 1)
    low, high = _rows(tuple(shape[d] for d in head), *place, layout, device, _within(parts, head))
    return Grid(low, high, _columns(tuple(shape[d] for d in tail), device, _within(parts, tail)))


def _within(parts: Parts, dims: range) -> Parts:
    """The parts as those of a tensor of these dimensions alone, without those that divide others."""
    return tuple(replace(part, dim=part.dim - dims.start) for part in parts if part.dim in dims)


@functools.lru_cache(maxsize=256)
def _rows(
    sizes: tuple[int, ...],
    samples: int,
    first_sample: int,
    batch: int,
    layout: Layout | None,
    device: torch.device,
    parts: Parts,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lower and upper half of each row's number in the global batch; the same for every step."""
    rows = _global_rows(sizes, samples, first_sample, batch, layout, device, parts)
    return _to_int32(rows & 0xFFFFFFFF), _to_int32(rows >> 32)


@functools.lru_cache(maxsize=16)
def _columns(sizes: tuple[int, ...], device: torch.device, parts: Parts) -> torch.Tensor:
    """Bits of each column, the same for every step and stream."""
    return mix(_to_int32(_places(sizes, range(len(sizes)), parts, device)[0]) * _GOLDEN)


def _places(
    shape: Sequence[int], dims: range, parts: Parts, device: torch.device
) -> tuple[torch.Tensor, int]:
    """For each element of these dimensions, flattened, its place in the whole, and the whole's size."""
    cut = sorted({part.dim for part in parts if part.dim in dims})
    if not cut:
        size = prod(shape[d] for d in dims)
        return torch.arange(size, device=device), size
    before, first = _places(shape, range(dims.start, cut[0]), (), device)
    own, whole = _along(shape[cut[0]], [part for part in parts if part.dim == cut[0]], device)
    after, tail = _places(shape, range(cut[0] + 1, dims.stop), parts, device)
    place = (before[:, None, None] * whole + own[None, :, None]) * tail + after[None, None, :]
    return place.reshape(-1), first * whole * tail


def _along(size: int, parts: Sequence[Part], device: torch.device) -> tuple[torch.Tensor, int]:
    """Places of a slice, or of a slice of a slice, along one dimension, and the size of the whole."""
    *outer, last = parts
    own, whole = last.places(size, device)
    for part in reversed(outer):
        before, whole = part.places(whole, device)
        own = before[own]
    return own, whole


def _global_rows(
    sizes: tuple[int, ...],
    samples: int,
    first_sample: int,
    batch: int,
    layout: Layout | None,
    device: torch.device,
    parts: Parts,
) -> torch.Tensor:
    """For each index of these dimensions, the batch dimension last, its number in the global batch."""
    dim = max(len(sizes) - 1, 0)
    index, total = _places(sizes, range(dim, len(sizes)), parts, device)
    if layout is not None:
        inner, outer = layout.inner, layout.outer
        o = index // (samples * inner)
        s = index // inner % samples + first_sample
        index = (o * batch + s) * inner + index % inner
        total = outer * batch * inner
    before, _ = _places(sizes, range(dim), parts, device)
    return (before[:, None] * total + index[None, :]).reshape(-1)


def keep_factors(
    shape: torch.Size,
    drop: float,
    stream: int,
    context: StepContext,
    layout: Layout | None,
    device: torch.device,
    dtype: torch.dtype,
    parts: Parts = (),
) -> torch.Tensor:
    """1 / (1 - drop) where an element is kept, with probability `1 - drop` each, else 0.

    `parts` says which slice of the microbatch's tensor `shape` is, and of which slice of that; empty for
    all of it. What is kept is what the whole keeps there.
    """
    threshold = round(drop * 2**32) - 2**31
    if threshold >= 2**31:
        return torch.zeros(shape, dtype=dtype, device=device)
    grid = _grid(shape, context, layout, device, parts)
    return kept(grid, _key(stream, context), threshold, 1.0 / (1.0 - drop), dtype).view(shape)


def uniform(
    shape: torch.Size,
    stream: int,
    context: StepContext,
    layout: Layout | None,
    device: torch.device,
) -> torch.Tensor:
    """Uniform float32 numbers in [0, 1) of 24 bits."""
    bits = random_bits(shape, stream, context, layout, device)
    return ((bits >> 8) & 0xFFFFFF).to(torch.float32) * 2.0**-24


def normal(
    shape: torch.Size,
    stream: int,
    context: StepContext,
    layout: Layout | None,
    device: torch.device,
) -> torch.Tensor:
    """Standard normal float32 numbers (Box and Muller, 1958) from two uniform streams."""
    first = uniform(shape, 2 * stream + 2**30, context, layout, device)
    second = uniform(shape, 2 * stream + 2**30 + 1, context, layout, device)
    return torch.sqrt(-2.0 * torch.log1p(-first)) * torch.cos(2 * pi * second)
