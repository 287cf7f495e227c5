"""Collectives on their way while a member computes, forward and backward, and sums sent together.

A collective is begun in one place and awaited in another. In backward the second place comes first: it
begins the gradient's collective, and the first place waits for it. What autograd computes between the
two runs meanwhile. A product's weight gradient is computed late, between those two places, by a node of
its own: the gradient of what the product read leaves first.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from graphpar.runtime.group_ops import PAIRS, Cut, Finish, Owned, Way, cuts_of
from graphpar.runtime.team import Team


class _Pending:
    """One collective on its way, forward and later backward."""

    def __init__(self, team: Team, ways: tuple[Way, Way], cuts: Sequence[Cut], owned: Owned) -> None:
        self.team, (self.ahead, self.back), self.cuts = team, ways, cuts
        self.owned = owned
        self.finish: Finish | None = None

    def take(self) -> torch.Tensor:
        """Wait for what was begun last."""
        assert self.finish is not None
        finish, self.finish = self.finish, None
        return finish()


class _Begin(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, pending: _Pending) -> torch.Tensor:
        ctx.pending = pending
        pending.finish = pending.ahead(pending.team, x, pending.cuts, pending.owned[0])
        return x.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.pending.take(), None


class _End(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, carrier: torch.Tensor, pending: _Pending) -> torch.Tensor:
        ctx.pending, ctx.shape, ctx.dtype = pending, carrier.shape, carrier.dtype
        return pending.take()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        pending: _Pending = ctx.pending
        gradient = gradients[0].contiguous()
        pending.finish = pending.back(pending.team, gradient, pending.cuts, pending.owned[1])
        # Stands for the gradient that is on its way; the other end puts that in its place.
        return gradient.new_zeros((), dtype=ctx.dtype).expand(ctx.shape), None


class Begin(nn.Module):
    """Begin one of `PAIRS`; gives what `End` needs."""

    def __init__(self, team: Team, target: str, owned: Owned) -> None:
        super().__init__()
        self.team, self.ways, self.owned = team, PAIRS[target], owned

    def forward(self, x: torch.Tensor, target: str, *cut: Any) -> tuple[torch.Tensor, _Pending]:
        """A stand-in for the value, and the collective on its way."""
        pending = _Pending(self.team, self.ways, cuts_of(cut), self.owned)
        carrier: torch.Tensor = _Begin.apply(x, pending)  # type: ignore[no-untyped-call]
        return carrier, pending


class End(nn.Module):
    """Wait for what `Begin` began."""

    def forward(self, begun: tuple[torch.Tensor, _Pending]) -> torch.Tensor:
        """The value in its other layout."""
        value: torch.Tensor = _End.apply(*begun)  # type: ignore[no-untyped-call]
        return value


class _Late:
    """Where a product leaves how to compute its weight's gradient."""

    work: Callable[[], torch.Tensor] | None = None


class _LateWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, late: _Late) -> torch.Tensor:
        ctx.late = late
        return weight.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        work, ctx.late.work = ctx.late.work, None
        return work(), None


class LateWeight(nn.Module):
    """A weight whose gradient is computed when backward comes here."""

    def forward(self, weight: torch.Tensor) -> tuple[torch.Tensor, _Late]:
        """The weight, and where its product leaves the work."""
        late = _Late()
        value: torch.Tensor = _LateWeight.apply(weight, late)  # type: ignore[no-untyped-call]
        return value, late


class _LateProduct(torch.autograd.Function):
    """`x @ weight` or `x @ weight.T`, plus a bias."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        late: _Late,
        is_linear: bool,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.late, ctx.is_linear = late, is_linear
        if is_linear:
            return nn.functional.linear(x, weight, bias)
        return torch.mm(x, weight) if bias is None else torch.addmm(bias, x, weight)

    @staticmethod
    def backward(
        ctx: Any, *gradients: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        gradient = gradients[0]
        rows, wide = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
        is_linear = ctx.is_linear
        ctx.late.work = lambda: wide.t() @ rows if is_linear else rows.t() @ wide
        into = None
        if ctx.needs_input_grad[0]:
            into = (wide @ (weight if is_linear else weight.t())).view(x.shape)
        bias = wide.sum(0) if ctx.needs_input_grad[2] else None
        return into, weight.new_zeros(()).expand(weight.shape), bias, None, None


class LateProduct(nn.Module):
    """A product of rows with a weight that `LateWeight` gave."""

    def forward(
        self,
        x: torch.Tensor,
        weight: tuple[torch.Tensor, _Late],
        bias: torch.Tensor | None,
        is_linear: bool,
    ) -> torch.Tensor:
        """The product."""
        value: torch.Tensor = _LateProduct.apply(x, weight[0], bias, weight[1], is_linear)  # type: ignore[no-untyped-call]
        return value


class _SumTogether(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, team: Team, ahead: bool, back: bool, *values: torch.Tensor) -> Any:
        ctx.team, ctx.back = team, back
        return tuple(_summed(team, values)) if ahead else tuple(v.detach() for v in values)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        return None, None, None, *(_summed(ctx.team, gradients) if ctx.back else gradients)


def _summed(team: Team, values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """All of them summed over the members in one message."""
    flat = torch.cat([v.detach().reshape(-1) for v in values])
    parts = torch.split(team.start_sum(flat, True)(), [v.numel() for v in values])
    return [part.view(v.shape) for part, v in zip(parts, values, strict=True)]


class SumTogether(nn.Module):
    """Several small sums over the members of one kind (`gp.all_reduce`, say) in one message."""

    def __init__(self, team: Team, target: str) -> None:
        super().__init__()
        self.team = team
        self.ahead = target in ("gp.all_reduce", "gp.reduce_copies")
        self.back = target in ("gp.copy_to_group", "gp.reduce_copies")

    def forward(self, values: Sequence[torch.Tensor], target: str) -> tuple[torch.Tensor, ...]:
        """The values, summed."""
        made: tuple[torch.Tensor, ...] = _SumTogether.apply(self.team, self.ahead, self.back, *values)  # type: ignore[no-untyped-call]
        return made


def overlap_module(target: str, argument: str, owned: Owned, team: Team | None) -> nn.Module | None:
    """The module of one of these ops; None for an op that is none of them."""
    if target == "gp.end":
        return End()
    if target == "gp.late_weight":
        return LateWeight()
    if target == "gp.late_product":
        return LateProduct()
    if target not in ("gp.begin", "gp.sum_together"):
        return None
    assert team is not None, "a tensor group's op outside a group"
    return Begin(team, argument, owned) if target == "gp.begin" else SumTogether(team, argument)
