"""Ops by which the members of a tensor group work together (`gp.all_reduce` and the like).

Each is a pair of forward and backward: whoever sums in one copies in the other, whoever gathers slices.
torch's functional collectives sum again in backward, which doubles gradients on two members.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from graphpar.runtime.slices import join, padded, part_of, resized, take
from graphpar.runtime.team import Team

Cut = tuple[int, tuple[int, ...], int]
"""Dimension, units of each member, inner size."""


Finish = Callable[[], torch.Tensor]
"""Waits for what was begun, and gives the result."""


def gathered(team: Team, x: torch.Tensor, cut: Cut) -> Finish:
    """Begin to make the tensor whole on every member."""
    dim, counts, inner = cut
    x = x.detach().contiguous()
    shapes = []
    for count in counts:
        shape = list(x.shape)
        shape[dim] = resized(shape[dim], counts, inner, team.member, count)
        shapes.append(tuple(shape))
    arriving = team.start_exchange([x] * team.size, shapes)
    return lambda: join(arriving(), dim, counts, inner)


def scattered_sum(team: Team, x: torch.Tensor, cut: Cut) -> Finish:
    """Begin to make the member's slice of the sum over all members."""
    dim, counts, inner = cut
    x = x.detach()
    blocks = [(part_of if k == team.member else take)(x, dim, counts, inner, k) for k in range(team.size)]
    arriving = team.start_exchange(blocks, [tuple(blocks[team.member].shape)] * team.size)

    def finish() -> torch.Tensor:
        parts = arriving()
        own = parts.pop(team.member)
        total = parts.pop()
        for part in (own, *parts):
            total += part
        return total

    return finish


def regrouped(team: Team, x: torch.Tensor, made: Cut, wanted: Cut) -> Finish:
    """Begin to make a slice of one kind from slices of another."""
    x = x.detach()
    (a, a_counts, a_inner), (b, b_counts, b_inner) = made, wanted
    if a == b:
        whole = gathered(team, x, made)
        return lambda: take(whole(), b, b_counts, b_inner, team.member)
    blocks = [take(x, b, b_counts, b_inner, k) for k in range(team.size)]
    own = blocks[team.member].shape
    shapes = []
    for count in a_counts:
        shape = list(own)
        shape[a] = resized(own[a], a_counts, a_inner, team.member, count)
        shapes.append(tuple(shape))
    arriving = team.start_exchange(blocks, shapes)
    return lambda: join(arriving(), a, a_counts, a_inner)


Owned = tuple[bool, bool]
"""Whether the operand, and in backward the gradient, may be overwritten."""
Way = Callable[[Team, torch.Tensor, Sequence[Cut], bool], Finish]
"""Begins to bring a tensor into another layout; the last argument says that it may be overwritten."""


def _same(team: Team, x: torch.Tensor, cuts: Sequence[Cut], owned: bool) -> Finish:
    return lambda: x.detach()


def _sum(team: Team, x: torch.Tensor, cuts: Sequence[Cut], owned: bool) -> Finish:
    return team.start_sum(x, owned)


def _gather(team: Team, x: torch.Tensor, cuts: Sequence[Cut], owned: bool) -> Finish:
    return gathered(team, x, cuts[0])


def _scatter(team: Team, x: torch.Tensor, cuts: Sequence[Cut], owned: bool) -> Finish:
    return scattered_sum(team, x, cuts[0])


def _slice(team: Team, x: torch.Tensor, cuts: Sequence[Cut], owned: bool) -> Finish:
    dim, counts, inner = cuts[0]
    return lambda: take(x.detach(), dim, counts, inner, team.member)


def _pad(team: Team, x: torch.Tensor, cuts: Sequence[Cut], owned: bool) -> Finish:
    dim, counts, inner = cuts[0]
    return lambda: padded(x.detach(), dim, counts, inner, team.member)


def _regroup(team: Team, x: torch.Tensor, cuts: Sequence[Cut], owned: bool) -> Finish:
    return regrouped(team, x, cuts[0], cuts[1])


def _regroup_back(team: Team, x: torch.Tensor, cuts: Sequence[Cut], owned: bool) -> Finish:
    return regrouped(team, x, cuts[1], cuts[0])


PAIRS: dict[str, tuple[Way, Way]] = {
    "gp.copy_to_group": (_same, _sum),
    "gp.all_reduce": (_sum, _same),
    "gp.reduce_copies": (_sum, _sum),
    "gp.take_shard": (_slice, _gather),
    "gp.take_part": (_slice, _pad),
    "gp.all_gather": (_gather, _slice),
    "gp.gather_copies": (_gather, _scatter),
    "gp.reduce_scatter": (_scatter, _gather),
    "gp.all_to_all": (_regroup, _regroup_back),
}
"""What each op does in forward, and with the gradient in backward."""


def cuts_of(numbers: Sequence[Any]) -> list[Cut]:
    """Dimension, counts and inner size of each slice, from the arguments of an op."""
    return [(numbers[i], tuple(numbers[i + 1]), numbers[i + 2]) for i in range(0, len(numbers), 3)]


class _Paired(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, team: Team, ways: tuple[Way, Way], cuts: Sequence[Cut], owned: Owned
    ) -> torch.Tensor:
        ctx.team, ctx.back, ctx.cuts, ctx.owned = team, ways[1], cuts, owned[1]
        return ways[0](team, x, cuts, owned[0])()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        gradient = gradients[0].contiguous()
        return ctx.back(ctx.team, gradient, ctx.cuts, ctx.owned)(), None, None, None, None


class Paired(nn.Module):
    """One of `PAIRS`."""

    def __init__(self, team: Team, target: str, owned: Owned = (False, False)) -> None:
        super().__init__()
        self.team, self.ways, self.owned = team, PAIRS[target], owned

    def forward(self, x: torch.Tensor, *cut: Any) -> torch.Tensor:
        """The value in its other layout; `cut` holds dimension, counts, inner size of each slice."""
        moved: torch.Tensor = _Paired.apply(x, self.team, self.ways, cuts_of(cut), self.owned)  # type: ignore[no-untyped-call]
        return moved


class Lookup(nn.Module):
    """Rows of a table of which the member holds a part; zeros where another member has them."""

    def forward(
        self, table: torch.Tensor, positions: torch.Tensor, first: int, padding: int
    ) -> torch.Tensor:
        """Summed over the members: the rows at the positions."""
        here = (positions >= first) & (positions < first + table.shape[0])
        own = torch.where(here, positions - first, 0)
        inside = 0 <= padding - first < table.shape[0]
        rows = nn.functional.embedding(own, table, padding - first if inside and padding >= 0 else None)
        return rows * here.unsqueeze(-1).to(rows.dtype)


class _ClassLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        scores: torch.Tensor,
        target: torch.Tensor,
        team: Team,
        first: int,
        reduction: int,
        ignored: int,
    ) -> torch.Tensor:
        exact = scores.detach().to(torch.promote_types(scores.dtype, torch.float32))
        largest = team.maximum(exact.amax(1))
        raised = (exact - largest[:, None]).exp()
        here = (target >= first) & (target < first + scores.shape[1])
        own = torch.where(here, target - first, 0)
        hit = exact.gather(1, own[:, None])[:, 0] * here
        total, wanted = team.start_sum(torch.stack((raised.sum(1), hit)), True)().unbind(0)
        valid = target != ignored
        losses = torch.where(valid, total.log() + largest - wanted, 0.0)
        count = valid.sum() if reduction == 1 else torch.ones((), device=scores.device)
        chances = raised / total[:, None]
        chances[here & valid] -= nn.functional.one_hot(own[here & valid], scores.shape[1]).to(
            chances.dtype
        )
        ctx.save_for_backward(chances * valid[:, None] / count)
        ctx.dtype = scores.dtype
        return (losses.sum() / count).to(scores.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None, None]:
        (slope,) = ctx.saved_tensors
        return (slope * gradients[0]).to(ctx.dtype), None, None, None, None, None


class ClassLoss(nn.Module):
    """Cross entropy over scores of which each member has the columns of its classes."""

    def __init__(self, team: Team) -> None:
        super().__init__()
        self.team = team

    def forward(
        self, scores: torch.Tensor, target: torch.Tensor, first: int, reduction: int, ignored: int
    ) -> torch.Tensor:
        """The same number on every member."""
        loss: torch.Tensor = _ClassLoss.apply(scores, target, self.team, first, reduction, ignored)  # type: ignore[no-untyped-call]
        return loss


class GroupedProduct(nn.Module):
    """Rows sorted by expert times their expert's weights; zeros for the experts of other members."""

    def forward(
        self, rows: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor, first: int
    ) -> torch.Tensor:
        """Summed over the members: the product of every row."""
        bounds = [0, *ends.tolist()][first : first + weights.shape[0] + 1]
        pieces = [rows.new_zeros(int(bounds[0]), weights.shape[2])]
        for weight, start, stop in zip(weights, bounds, bounds[1:], strict=False):
            pieces.append(rows[int(start) : int(stop)] @ weight)
        pieces.append(rows.new_zeros(rows.shape[0] - int(bounds[-1]), weights.shape[2]))
        return torch.cat(pieces)


def group_module(target: str, team: Team | None, owned: Owned = (False, False)) -> nn.Module | None:
    """The module of one of these ops; None for an op that is none of them."""
    if target == "gp.lookup":
        return Lookup()
    if target == "gp.grouped_product":
        return GroupedProduct()
    if target == "gp.class_loss":
        assert team is not None, "a tensor group's op outside a group"
        return ClassLoss(team)
    if target in PAIRS:
        assert team is not None, "a tensor group's op outside a group"
        return Paired(team, target, owned)
    return None
