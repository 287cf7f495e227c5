"""The bits of keyed random numbers: rows and columns mixed, on a CUDA device in one kernel.

The mixing function is the 32-bit finalizer with the multipliers 0x7feb352d and 0x846ca68b, found by
exhaustive search for low bias (Chris Wellons, "Prospecting for Hash Functions", 2018,
https://nullprogram.com/blog/2018/07/31/). It is whole numbers throughout, so that every device makes
the same bits. Triton comes with torch's CUDA builds; where it does not work (it needs a C compiler when
first called) a dozen of torch's kernels do the same, and it is said once.
"""

import functools
import logging
from dataclasses import dataclass
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # torch without CUDA
    triton = None

_log = logging.getLogger("graphpar.random")

MULTIPLIERS = (0x7FEB352D, 0x846CA68B - 2**32)
_BLOCK = 1024
_MOST = 2**31 - _BLOCK
"""Elements of one call of the kernel, which counts them in 32 bits."""


def mix(x: torch.Tensor) -> torch.Tensor:
    """Mix int32 bits in place; `>>` on int32 keeps the sign, hence the masks."""
    x ^= (x >> 16) & 0xFFFF
    x *= MULTIPLIERS[0]
    x ^= (x >> 15) & 0x1FFFF
    x *= MULTIPLIERS[1]
    x ^= (x >> 16) & 0xFFFF
    return x


@dataclass(frozen=True)
class Grid:
    """Where the elements of a tensor lie: numbers of rows (two int32 halves), bits of columns (int32)."""

    low: torch.Tensor
    high: torch.Tensor
    columns: torch.Tensor

    @property
    def count(self) -> int:
        """How many elements there are."""
        return len(self.low) * len(self.columns)

    def new(self, dtype: torch.dtype) -> torch.Tensor:
        """An empty tensor [rows, columns]."""
        return self.low.new_empty(len(self.low), len(self.columns), dtype=dtype)

    def mixed(self, key: int) -> torch.Tensor:
        """What the kernel makes, by torch's."""
        rows = mix(mix(self.low ^ key) ^ self.high)
        return mix(rows[:, None] ^ self.columns[None, :])


def mixed(grid: Grid, key: int) -> torch.Tensor:
    """Bits (int32) of every row mixed with those of every column [rows, columns]."""
    if not _fits(grid):
        return grid.mixed(key)
    out = grid.new(torch.int32)
    _launch(grid, key, out)
    return out


def kept(grid: Grid, key: int, threshold: int, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """`scale` where the mixed bits reach the threshold, else 0 [rows, columns]."""
    if dtype.itemsize > 4 or not _fits(grid):
        return (grid.mixed(key) >= threshold).to(dtype) * scale
    out = grid.new(dtype)
    _launch(grid, key, out, threshold, scale, draws=False)
    return out


if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator]
    def _mix(x, first: tl.constexpr, second: tl.constexpr):  # type: ignore[no-untyped-def]
        x ^= (x >> 16) & 0xFFFF
        x *= first
        x ^= (x >> 15) & 0x1FFFF
        x *= second
        x ^= (x >> 16) & 0xFFFF
        return x

    @triton.jit  # type: ignore[untyped-decorator]
    def _kernel(  # type: ignore[no-untyped-def]
        low, high, columns, out, count, width, key, threshold, scale,
        first: tl.constexpr, second: tl.constexpr, draws: tl.constexpr, block: tl.constexpr,
    ):  # fmt: skip
        at = tl.program_id(0) * block + tl.arange(0, block)
        inside = at < count
        row = at // width
        x = _mix(tl.load(low + row, mask=inside) ^ key, first, second)
        x = _mix(x ^ tl.load(high + row, mask=inside), first, second)
        x = _mix(x ^ tl.load(columns + at % width, mask=inside), first, second)
        if draws:
            tl.store(out + at, x, mask=inside)
        else:
            tl.store(out + at, tl.where(x >= threshold, scale, 0.0).to(out.dtype.element_ty), mask=inside)


def _fits(grid: Grid) -> bool:
    """Whether the kernel is to be called."""
    device = grid.low.device
    return device.type == "cuda" and 0 < grid.count <= _MOST and _works(device)


def _launch(
    grid: Grid, key: int, out: torch.Tensor, threshold: int = 0, scale: float = 0.0, *, draws: bool = True
) -> None:
    blocks: Any = (triton.cdiv(grid.count, _BLOCK),)
    given = grid.low, grid.high, grid.columns, out, grid.count, len(grid.columns)
    with torch.cuda.device_of(out):  # type: ignore[no-untyped-call]
        _kernel[blocks](*given, key, threshold, scale, *MULTIPLIERS, draws, _BLOCK)


@functools.cache
def _works(device: torch.device) -> bool:
    """Whether the kernel runs there and gives torch's numbers."""
    if triton is None:
        return False
    generator = torch.Generator("cpu").manual_seed(0)
    numbers = torch.randint(-(2**31), 2**31, (315,), generator=generator, device="cpu")
    grid = Grid(*numbers.to(torch.int32).to(device).split([7, 7, 301]))  # type: ignore[no-untyped-call]
    got, factors = grid.new(torch.int32), grid.new(torch.float32)
    try:
        _launch(grid, -77, got)
        _launch(grid, -77, factors, -5, 1.5, draws=False)
        wanted = grid.mixed(-77)
        same = torch.equal(got, wanted) and torch.equal(factors, (wanted >= -5) * 1.5)
    except Exception as error:
        same, reason = False, str(error)
    else:
        reason = "its numbers are not torch's"
    if not same:
        _log.warning("torch's kernels make the random bits on %s, which takes longer: %s", device, reason)
    return same
