"""Modules that run graphpar's own ops (`gp.*`) inside a stage."""

import torch
from torch import nn

from graphpar.runtime.casts import LowerWeights
from graphpar.runtime.random import Layout, Part, StepContext, keep_factors, normal, uniform


class _Keyed(nn.Module):
    """A module that draws from a keyed stream."""

    def __init__(
        self, context: StepContext, stream: int, layout: Layout | None, parts: tuple[Part, ...] = ()
    ) -> None:
        super().__init__()
        self.context, self.stream, self.layout, self.parts = context, stream, layout, parts

    def factors(self, x: torch.Tensor, drop: float) -> torch.Tensor:
        """What the elements of `x` are multiplied with: 0 where they are dropped."""
        where = self.layout, x.device, x.dtype, self.parts
        return keep_factors(x.shape, drop, self.stream, self.context, *where)


class Dropout(_Keyed):
    """Dropout of elements, or of whole channels of (samples, channels, ...) with `by_channel`."""

    def forward(self, x: torch.Tensor, drop: float, by_channel: bool) -> torch.Tensor:
        """Zero with probability `drop` and scale the rest."""
        pattern = x
        for dim in range(2, x.ndim) if by_channel else ():
            pattern = pattern.narrow(dim, 0, 1)
        if drop >= 1.0:
            return x * 0.0
        return x * self.factors(pattern, drop)


class Bernoulli(_Keyed):
    """Zeros and ones; `chance` is a number or a tensor of probabilities."""

    def forward(self, x: torch.Tensor, chance: torch.Tensor | float) -> torch.Tensor:
        """A sample of the same shape and type as `x`."""
        draw = uniform(x.shape, self.stream, self.context, self.layout, x.device)
        return (draw < chance).to(x.dtype)


class Random(_Keyed):
    """A fresh random tensor."""

    def forward(
        self,
        distribution: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        *parameters: float,
    ) -> torch.Tensor:
        """Numbers of a distribution with its parameters; those left out are the standard ones.

        `uniform` (low, high), `integers` (low, high, the second excluded), `normal` (mean, deviation),
        `exponential` (rate).
        """
        draw = normal if distribution == "normal" else uniform
        x = draw(torch.Size(shape), self.stream, self.context, self.layout, device)
        if distribution == "exponential":
            x = -torch.log1p(-x) / parameters[0]
        elif distribution == "normal" and parameters:
            x = x * parameters[1] + parameters[0]
        elif parameters:
            x = x * (parameters[1] - parameters[0]) + parameters[0]
        return (x.floor() if distribution == "integers" else x).to(dtype)


class Attention(_Keyed):
    """Scaled dot-product attention with dropout on its weights.

    Shapes: query (..., H, L, E), key and value (..., Hkv, S, E), mask broadcast to (..., H, L, S).
    """

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        drop: float,
        is_causal: bool,
        scale: float | None,
        enable_gqa: bool,
    ) -> torch.Tensor:
        """The attended values."""
        if enable_gqa:
            copies = query.shape[-3] // key.shape[-3]
            key = key.repeat_interleave(copies, -3)
            value = value.repeat_interleave(copies, -3)
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        scores = (query * factor) @ key.transpose(-2, -1)
        if is_causal:
            size = scores.shape[-2:]
            seen = torch.ones(size, dtype=torch.bool, device=query.device).tril()
            scores = scores.masked_fill(~seen, float("-inf"))
        if mask is not None:
            bad = mask.dtype == torch.bool
            scores = scores.masked_fill(~mask, float("-inf")) if bad else scores + mask
        # Sums of many exponentials need float32 at least; the result goes on in the scores' own format.
        exact = torch.promote_types(scores.dtype, torch.float32)
        weights = torch.softmax(scores, dim=-1, dtype=exact).to(scores.dtype)
        return (weights * self.factors(weights, drop)) @ value


class Share(nn.Module):
    """Scale a value that all samples share by the part of the batch at hand."""

    def __init__(self, context: StepContext) -> None:
        super().__init__()
        self.context = context

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The value times samples here over samples in all."""
        return x * (self.context.samples / self.context.batch)


class CastWeight(nn.Module):
    """A weight in a lower format; its gradient arrives in the weight's own."""

    def __init__(self, weights: LowerWeights) -> None:
        super().__init__()
        self.weights = weights

    def forward(self, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The weight's copy of that format."""
        return self.weights.cast(weight, dtype)
