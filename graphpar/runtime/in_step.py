"""Parts of the batch that go through the model in step: where they meet (see `passes/in_step.py`).

Each pipeline has one part. The ranks that hold the same op give each other what they have of a sum,
small as it is, directly; every one adds up in the order of the ranks, so that all have the same bits. Ops
come in the same order everywhere, in backward in the reverse one, hence nobody waits in a circle.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional

from graphpar.runtime.program import Meeting
from graphpar.runtime.transport import Transport

_FIRST_TAG = 2**29
"""Tags of messages between stages are below, those of the tail above."""


class Swap(Protocol):
    """How a part meets the others in one op."""

    def __call__(self, tensor: torch.Tensor, *, back: bool) -> list[torch.Tensor]:
        """What every part brought, in the same order for all; `back` in backward."""


@dataclass(frozen=True)
class Meetings:
    """A rank's meetings with the ranks of other pipelines, by the name of the op."""

    meetings: Mapping[str, Meeting]
    transport: Transport
    rank: int

    def at(self, name: str) -> Swap | None:
        """How to meet in an op; None where the rank has the whole batch."""
        found = self.meetings.get(name)
        if found is None:
            return None
        meeting = found

        def swap(tensor: torch.Tensor, *, back: bool) -> list[torch.Tensor]:
            return self._swap(meeting, tensor.detach(), _FIRST_TAG + 2 * meeting.number + back)

        return swap

    def _swap(self, meeting: Meeting, tensor: torch.Tensor, tag: int) -> list[torch.Tensor]:
        others = [rank for rank in meeting.ranks if rank != self.rank]
        shape, dtype = tuple(tensor.shape), tensor.dtype
        posted = {rank: self.transport.post(rank, shape, dtype, tag) for rank in others}
        for rank in others:
            self.transport.send(rank, tensor, tag)
        return [tensor if r == self.rank else posted[r].wait() for r in meeting.ranks]


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, swap: Swap) -> torch.Tensor:
        ctx.swap = swap
        return _added(swap(x, back=False))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _added(ctx.swap(gradients[0], back=True)), None


def _added(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(parts).sum(0, dtype=parts[0].dtype)


class SumParts(nn.Module):
    """The sum of what all parts have; of a single part what it has."""

    def __init__(self, swap: Swap | None) -> None:
        super().__init__()
        self.swap = swap

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add up over all parts; the gradient is added up likewise."""
        if self.swap is None:
            return x
        result: torch.Tensor = _Sum.apply(x, self.swap)  # type: ignore[no-untyped-call]
        return result


class BatchNormOfParts(nn.Module):
    """Batch normalisation of a part by the statistics of all parts; running ones follow those.

    Shapes: x (N, C, ...). Means and squared deviations of parts are put together as by T. Chan,
    G. Golub and R. LeVeque, "Updating formulae and a pairwise algorithm for computing sample
    variances" (1979), which loses no digits where the mean is large.
    """

    def __init__(self, swap: Swap) -> None:
        super().__init__()
        self.swap = swap

    def forward(
        self,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        running_mean: torch.Tensor | None,
        running_var: torch.Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
        cudnn_enabled: bool = True,
    ) -> torch.Tensor:
        """The normalised part; arguments as those of `aten.batch_norm`."""
        count, mean, squares = _statistics(x.detach(), self.swap)
        if count <= 1:
            raise ValueError(
                f"Expected more than 1 value per channel when training, got an input of {list(x.shape)}"
            )
        with torch.no_grad():
            for running, new in ((running_mean, mean), (running_var, squares / (count - 1))):
                if running is not None:
                    running.mul_(1 - momentum).add_(new.to(running.dtype), alpha=momentum)
        scaled = (x, mean, squares / count, eps, count, self.swap)
        y: torch.Tensor = _Normalize.apply(*scaled)  # type: ignore[no-untyped-call]
        shape = (1, -1, *[1] * (x.ndim - 2))
        if weight is not None:
            y = y * weight.to(y.dtype).view(shape)
        return y if bias is None else y + bias.to(y.dtype).view(shape)


def _statistics(x: torch.Tensor, swap: Swap) -> tuple[float, torch.Tensor, torch.Tensor]:
    """Number of values per channel, their mean and sum of squared deviations, over all parts."""
    count = x.numel() // x.shape[1]
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    variance, mean = torch.var_mean(wide, [d for d in range(x.ndim) if d != 1], correction=0)
    own = torch.stack([torch.full_like(mean, count), mean, variance * count]).double()
    counts, means, squares = torch.stack(swap(own, back=False)).unbind(1)
    total = counts.sum(0)
    middle = (counts * means).sum(0) / total
    spread = (squares + counts * (means - middle).square()).sum(0)
    return float(total[0]), middle.to(wide.dtype), spread.to(wide.dtype)


class _Normalize(torch.autograd.Function):
    """(x - mean) / sqrt(variance + eps) with mean and variance of all parts.

    With z the result and g its gradient, that of x is (g - mean(g) - z mean(g z)) / sqrt(variance + eps),
    the means being those over all parts.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        mean: torch.Tensor,
        variance: torch.Tensor,
        eps: float,
        count: float,
        swap: Swap,
    ) -> torch.Tensor:
        z = functional.batch_norm(x, mean, variance, training=False, eps=eps)
        ctx.save_for_backward(z, variance)
        ctx.eps, ctx.count, ctx.swap = eps, count, swap
        return z

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (g,) = gradients
        z, variance = ctx.saved_tensors
        others = [d for d in range(z.ndim) if d != 1]
        own = torch.stack([g.sum(others), (g * z).sum(others)]).double()
        sums = torch.stack(ctx.swap(own, back=True)).sum(0) / ctx.count
        shape = (1, -1, *[1] * (z.ndim - 2))
        plain, along = (s.to(z.dtype).view(shape) for s in sums)
        scale = torch.rsqrt(variance + ctx.eps).to(z.dtype).view(shape)
        return (g - plain - z * along) * scale, None, None, None, None, None
