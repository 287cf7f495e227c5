"""Random numbers that depend on seed, step, stream and position in the global batch, on nothing else.

A counter-based hash of each element's position makes every bit, so that any split of the batch, any
stage and any device draws the same numbers. The mixing function is the 32-bit finalizer with the
multipliers 0x7feb352d and 0x846ca68b, found by exhaustive search for low bias (Chris Wellons,
"Prospecting for Hash Functions", 2018, https://nullprogram.com/blog/2018/07/31/).
"""

from dataclasses import dataclass
from math import pi, prod

import torch

from graphpar.runtime.slices import places, resized

_MULTIPLIERS = (0x7FEB352D, 0x846CA68B - 2**32)
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


def _mix(x: torch.Tensor) -> torch.Tensor:
    """Mix int32 bits in place; `>>` on int32 keeps the sign, hence the masks."""
    x ^= (x >> 16) & 0xFFFF
    x *= _MULTIPLIERS[0]
    x ^= (x >> 15) & 0x1FFFF
    x *= _MULTIPLIERS[1]
    x ^= (x >> 16) & 0xFFFF
    return x


def _to_int32(x: torch.Tensor) -> torch.Tensor:
    return (((x + 2**31) & 0xFFFFFFFF) - 2**31).to(torch.int32)


def _mix_number(value: int) -> int:
    """The same mixing of one whole number, in plain Python; signed like an int32."""
    x = (value ^ (value >> 32)) & 0xFFFFFFFF
    x = (x ^ (x >> 16)) * _MULTIPLIERS[0] & 0xFFFFFFFF
    x = (x ^ (x >> 15)) * _MULTIPLIERS[1] & 0xFFFFFFFF
    x ^= x >> 16
    return x - 2**32 if x >= 2**31 else x


def random_bits(
    shape: torch.Size,
    stream: int,
    context: StepContext,
    layout: Layout | None,
    device: torch.device,
    part: Part | None = None,
) -> torch.Tensor:
    """Random int32 bits, one per element of `shape`.

    Args:
        shape: Shape of the microbatch's tensor.
        stream: Number of the random op in the captured graph.
        context: Step and place in the global batch.
        layout: Where samples lie in `shape`; None for a tensor that all samples share.
        device: Where to make them.
        part: Which slice of the microbatch's tensor `shape` is; None for all of it. The bits are
            those that the whole has there.
    """
    key = context.seed
    for number in (context.step, stream):
        key = _mix_number((_mix_number(key) * 31 + number) ^ 0x5BD1E995)
    dim = layout.dim if layout is not None else 0
    rows = _global_rows(shape, dim, context, layout, device, part)
    columns = _places(shape, range(dim + 1, len(shape)), part, device)[0]
    row_bits = _mix(_mix(_to_int32(rows & 0xFFFFFFFF) ^ key) ^ _to_int32(rows >> 32))
    column_bits = _mix(_to_int32(columns) * _GOLDEN)
    return _mix(row_bits[:, None] ^ column_bits[None, :]).view(shape)


def _places(
    shape: torch.Size, dims: range, part: Part | None, device: torch.device
) -> tuple[torch.Tensor, int]:
    """For each element of these dimensions, flattened, its place in the whole, and the whole's size."""
    if part is None or part.dim not in dims:
        size = prod(shape[d] for d in dims)
        return torch.arange(size, device=device), size
    before, _ = _places(shape, range(dims.start, part.dim), None, device)
    own, whole = part.places(shape[part.dim], device)
    after, tail = _places(shape, range(part.dim + 1, dims.stop), None, device)
    place = (before[:, None, None] * whole + own[None, :, None]) * tail + after[None, None, :]
    return place.reshape(-1), (before.numel() * whole) * tail


def _global_rows(
    shape: torch.Size,
    dim: int,
    context: StepContext,
    layout: Layout | None,
    device: torch.device,
    part: Part | None,
) -> torch.Tensor:
    """For each index up to and including the batch dimension its number in the global batch."""
    index, total = _places(shape, range(dim, dim + 1 if shape else dim), part, device)
    if layout is not None:
        inner, outer = layout.inner, layout.outer
        o = index // (context.samples * inner)
        s = index // inner % context.samples + context.first_sample
        index = (o * context.batch + s) * inner + index % inner
        total = outer * context.batch * inner
    before, _ = _places(shape, range(dim), part, device)
    return (before[:, None] * total + index[None, :]).reshape(-1)


def keep_mask(
    shape: torch.Size,
    drop: float,
    stream: int,
    context: StepContext,
    layout: Layout | None,
    device: torch.device,
    part: Part | None = None,
) -> torch.Tensor:
    """True where an element is kept, with probability `1 - drop` each."""
    threshold = round(drop * 2**32) - 2**31
    if threshold >= 2**31:
        return torch.zeros(shape, dtype=torch.bool, device=device)
    return random_bits(shape, stream, context, layout, device, part) >= threshold


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
