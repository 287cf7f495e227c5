"""Products in 8 bits: operands scaled into the range of a small format, multiplied, scaled back.

Activations and weights go as float8_e4m3fn, gradients, whose range is wider, as float8_e5m2
(Micikevicius et al. 2022, https://arxiv.org/abs/2209.05433). Each tensor has one scale, made from its
largest element at every use. Scales are powers of two: then what an element is rounded to does not depend
on which other elements it shares a tensor with, unless it is tiny beside them, and a microbatch, a member
of a tensor group and one device alone round alike.

Devices with units for it (CUDA, compute capability 8.9 and later) multiply the 8-bit numbers themselves.
All others multiply what the 8-bit numbers stand for, exactly and with float32 sums: the same result up to
the order of additions, no faster than without.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import ScalingType, scaled_mm

from graphpar.ir.formats import EIGHT_BIT_MULTIPLE
from graphpar.runtime.casts import LowerWeights

FORWARD, BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2
_TOP = {FORWARD: 2.0**7, BACKWARD: 2.0**14}
"""What the power of two at or below a tensor's largest element becomes: its double still fits."""
_EXPONENT = 0x7F800000
"""The bits of a float32 that hold its exponent; alone they are the power of two at or below its size."""
_LEAST_POWER = 2.0**-100
_KNOWN = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Scaled:
    """A matrix in 8 bits, and what its numbers must be multiplied with (one number, float32)."""

    numbers: torch.Tensor
    unit: torch.Tensor

    def turned(self) -> "Scaled":
        """The transpose, rows in sequence."""
        return Scaled(self.numbers.t().contiguous(), self.unit)


def scaled(x: torch.Tensor, dtype: torch.dtype) -> Scaled:
    """A matrix rounded to an 8-bit format; NaN and infinities stay or become NaN.

    >>> found = scaled(torch.tensor([[3.0, -1000.0]]), FORWARD)
    >>> found.numbers.float(), found.unit
    (tensor([[   0.7500, -256.0000]]), tensor(4.))
    """
    largest = torch.linalg.vector_norm(x, float("inf"), dtype=torch.float32)
    power = (largest.view(torch.int32) & _EXPONENT).view(torch.float32).clamp_min(_LEAST_POWER)
    unit = power * (1 / _TOP[dtype])
    # float16 cannot hold every scale.
    wide = x.float() if x.dtype == torch.float16 else x
    numbers = (wide * unit.reciprocal()).to(dtype, memory_format=torch.contiguous_format)
    return Scaled(numbers, unit)


def has_units(device: torch.device) -> bool:
    """Whether a device multiplies 8-bit numbers."""
    if device.type != "cuda" or torch.version.cuda is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 9)


def multiplied(left: Scaled, right: Scaled, dtype: torch.dtype, *, by_units: bool) -> torch.Tensor:
    """`left @ right.T`, both with their rows in sequence, sums in float32, rounded to a format once."""
    if by_units:
        one = ScalingType.TensorWise
        return scaled_mm(
            left.numbers, right.numbers.t(), left.unit, one, right.unit, one, output_dtype=dtype
        )
    # Products of two such numbers are exact in float32, and scales are powers of two.
    wide = left.numbers.float() @ right.numbers.float().t()
    return (wide * (left.unit * right.unit)).to(dtype)


@dataclass
class _Weight:
    """A weight in 8 bits, as it stands and turned, and which version of it that is."""

    version: int
    upright: Scaled
    _turned: Scaled | None = None

    @property
    def turned(self) -> Scaled:
        """The transpose, made when it is first asked for."""
        self._turned = self._turned or self.upright.turned()
        return self._turned


class EightBitWeights:
    """One stage's weights in 8 bits; all microbatches of a step read the same.

    Only copies that `lower` keeps are kept here: their memory is theirs for good, and every change of
    them leaves a trace.
    """

    def __init__(self, lower: LowerWeights) -> None:
        self._lower = lower
        self._kept: dict[tuple[Any, ...], _Weight] = {}

    def of(self, weight: torch.Tensor) -> _Weight:
        """A weight in 8 bits, made anew where it has changed."""
        key = weight.data_ptr(), tuple(weight.shape), weight.stride()
        kept = self._kept.get(key)
        if kept is None or kept.version != weight._version:
            kept = _Weight(weight._version, scaled(weight.detach(), FORWARD))
            if self._lower.holds(weight):
                self._kept[key] = kept
        return kept


class EightBitProduct(nn.Module):
    """`x @ weight.T + bias`, or `bias + x @ weight`, in 8 bits, its gradients too.

    Shapes: x (..., K), weight (N, K), or (K, N) where `is_linear` is False; bias (N) or none; the result
    (..., N). What has no rows, other widths than multiples of 16, or another kind of bias is computed in
    the format that it comes in.
    """

    def __init__(self, weights: EightBitWeights, *, is_linear: bool) -> None:
        super().__init__()
        self.weights, self.is_linear = weights, is_linear

    def forward(
        self, first: torch.Tensor, second: torch.Tensor, third: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The product; arguments stand as those of `aten.linear` (x, weight, bias) or `aten.addmm`."""
        if self.is_linear:
            x, weight, bias = first, second, third
        else:
            assert third is not None
            bias, x, weight = first, second, third
        if not _fits(x, weight, bias):
            plain: Any = nn.functional.linear if self.is_linear else torch.addmm
            result: torch.Tensor = plain(first, second, third)
            return result
        in_8_bits = self.weights.of(weight)
        by_units = has_units(x.device)
        result = _Product.apply(x, weight, bias, in_8_bits, self.is_linear, by_units)  # type: ignore[no-untyped-call]
        return result


def _fits(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether the units take these operands."""
    return (
        x.numel() > 0
        and x.dtype in _KNOWN
        and weight.ndim == 2
        and all(width % EIGHT_BIT_MULTIPLE == 0 for width in weight.shape)
        and (bias is None or bias.ndim == 1)
    )


class _Product(torch.autograd.Function):
    """Keeps what the forward read in 8 bits; three products, each rounded once."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        in_8_bits: _Weight,
        is_linear: bool,
        by_units: bool,
    ) -> torch.Tensor:
        rows = scaled(x.reshape(-1, x.shape[-1]), FORWARD)
        right = in_8_bits.upright if is_linear else in_8_bits.turned
        made = multiplied(rows, right, x.dtype, by_units=by_units)
        ctx.save_for_backward(rows.numbers, rows.unit)
        ctx.weight, ctx.is_linear, ctx.by_units, ctx.shape = in_8_bits, is_linear, by_units, x.shape
        ctx.weight_dtype = weight.dtype
        result = made.view(*x.shape[:-1], made.shape[-1])
        return result if bias is None else result + bias

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        numbers, unit = ctx.saved_tensors
        wide = gradients[0].reshape(-1, gradients[0].shape[-1])
        narrow = scaled(wide, BACKWARD)
        into = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            right = ctx.weight.turned if ctx.is_linear else ctx.weight.upright
            into = multiplied(narrow, right, wide.dtype, by_units=ctx.by_units).view(ctx.shape)
        if ctx.needs_input_grad[1]:
            pair = _columns(narrow), _columns(Scaled(numbers, unit))
            left, right = pair if ctx.is_linear else pair[::-1]
            of_weight = multiplied(left, right, ctx.weight_dtype, by_units=ctx.by_units)
        if ctx.needs_input_grad[2]:
            of_bias = wide.sum(0)
        return into, of_weight, of_bias, None, None, None


def _columns(matrix: Scaled) -> Scaled:
    """The transpose, with zeros after each column up to a multiple that units take."""
    lacking = -matrix.numbers.shape[0] % EIGHT_BIT_MULTIPLE
    if not lacking:
        return matrix.turned()
    turned = matrix.numbers.new_zeros((matrix.numbers.shape[1], matrix.numbers.shape[0] + lacking))
    turned[:, : matrix.numbers.shape[0]] = matrix.numbers.t()
    return Scaled(turned, matrix.unit)
