"""Modules chosen by arguments, experts, and outputs of every sort."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from zoo.case import Case, case, ids, normal
from zoo.mechanics import vectors


class Output(NamedTuple):
    """What a router returns."""

    logits: Tensor
    aux: dict[str, Tensor]


class Router(nn.Module):
    """A ModuleDict chosen by a string, a switch by a bool, None, and numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict({"text": nn.Embedding(20, 8), "dense": nn.Linear(8, 8)})
        self.act = nn.ModuleDict([["relu", nn.ReLU()], ["gelu", nn.GELU()]])
        self.head = nn.Linear(8, 4)

    def forward(
        self, x: Tensor, kind: str = "dense", extra: Tensor | None = None, *, scale: float = 1.0,
        return_hidden: bool = False, act: str = "gelu",
    ) -> Any:  # fmt: skip
        h = self.encoders[kind](x)
        if h.dim() == 3:
            h = h.sum(1)
        if extra is not None:
            h = h + extra
        h = self.act[act](h) * scale
        return Output(self.head(h), {"hidden": h} if return_hidden else {})


@case
def routed() -> Case:
    def batch(n: int) -> tuple[Any, ...]:
        return ids(n, 5), "text", None, ids(n, high=4)

    def loss(out: Output, y: Tensor) -> Any:
        return F.cross_entropy(out.logits, y) + out.aux["hidden"].pow(2).mean()

    return Case(Router(), batch, loss, lambda n: {"return_hidden": True, "scale": 0.5})


@dataclass
class Detections:
    """Losses by name, and a step's numbers."""

    losses: dict[str, Tensor]
    count: int
    logits: Tensor | None = None


class ManyLosses(nn.Module):
    """A dataclass with a dict of losses, summed outside."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.cls, self.reg = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 2)

    def forward(self, x: Tensor, targets: dict[str, Any]) -> Any:
        h = self.body(x).relu()
        losses = {
            "cls": F.cross_entropy(
                self.cls(h), targets["labels"], weight=torch.tensor([1.0, 2.0, 1.0, 0.5])
            ),
            "reg": F.smooth_l1_loss(self.reg(h), targets["boxes"], reduction="sum")
            / targets["labels"].numel(),
        }
        return Detections(losses, len(losses), self.cls(h))


@case
def losses_in_a_dict() -> Case:
    def batch(n: int) -> tuple[Any, ...]:
        return normal(n, 8), {"labels": ids(n, high=4), "boxes": normal(n, 2)}, torch.zeros(n)

    return Case(ManyLosses(), batch, lambda out, _: sum(out.losses.values()))


@torch.compile(backend="eager")
def fused_gate(x: Tensor, y: Tensor) -> Tensor:
    """A function that its author compiles."""
    return F.silu(x) * y


class Compiled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Any:
        return self.head(fused_gate(self.w1(x), self.w2(x)))


@case
def compiled_function() -> Case:
    return Case(Compiled(), vectors, F.cross_entropy)


class SwitchMoE(nn.Module):
    """Switch transformer: top-1, a capacity by cumulated counts, einsum dispatch, a balancing loss."""

    def __init__(self, experts: int = 3) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(8, experts), experts
        self.w1 = nn.Parameter(torch.randn(experts, 8, 16) * 0.3)
        self.w2 = nn.Parameter(torch.randn(experts, 16, 8) * 0.3)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor, y: Tensor) -> Any:
        _b, n, _d = x.shape
        probs = F.softmax(self.gate(x), dim=-1)
        top, index = probs.max(dim=-1)
        mask = F.one_hot(index, self.experts).float()
        balance = (mask.mean((0, 1)) * probs.mean((0, 1))).sum() * self.experts
        capacity = max(1, int(1.25 * n / self.experts))
        position = (torch.cumsum(mask, dim=1) - 1) * mask
        mask = mask * (position < capacity).float()
        place = F.one_hot((position * mask).sum(-1).long(), capacity).float()
        dispatch = mask.unsqueeze(-1) * place.unsqueeze(2)
        expert_in = torch.einsum("bnd,bnec->becd", x, dispatch)
        h = F.gelu(torch.einsum("becd,edh->bech", expert_in, self.w1))
        out = torch.einsum("bech,ehd->becd", h, self.w2)
        combined = torch.einsum("becd,bnec->bnd", out, dispatch * top[..., None, None])
        logits = self.head((x + combined).mean(1))
        return {"loss": F.cross_entropy(logits, y) + 0.01 * balance, "logits": logits}


@case
def switch_experts() -> Case:
    return Case(SwitchMoE(), lambda n: (normal(n, 6, 8), ids(n, high=4)))


class LoopMoE(nn.Module):
    """Mixtral as nanoMoE repositories write it: a loop over experts with torch.where and index_add_."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.head = nn.Linear(8, 3, bias=False), nn.Linear(8, 4)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 8)) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Any:
        weights, selected = torch.topk(F.softmax(self.gate(x), dim=1), 2)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        results = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            batch_idx, nth = torch.where(selected == i)
            results[batch_idx] += weights[batch_idx, nth, None] * expert(x[batch_idx])
        return self.head(results)


@case
def looped_experts() -> Case:
    return Case(LoopMoE(), vectors, F.cross_entropy)


class Perceiver(nn.Module):
    """Latents that attend to inputs again and again with the same weights."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(4, 8))
        self.q, self.kv, self.out = nn.Linear(8, 8), nn.Linear(6, 16), nn.Linear(8, 8)
        self.self_attn, self.head = nn.TransformerEncoderLayer(8, 2, 16, 0.1), nn.Linear(8, 4)

    def forward(self, data: Tensor, mask: Tensor) -> Any:
        x = self.latents.expand(data.shape[0], *self.latents.shape)
        for _ in range(2):
            k, v = self.kv(data).chunk(2, dim=-1)
            sim = torch.einsum("bid,bjd->bij", self.q(x), k) * 8**-0.5
            sim.masked_fill_(~mask[:, None, :], -torch.finfo(sim.dtype).max)
            x = x + self.out(torch.einsum("bij,bjd->bid", sim.softmax(dim=-1), v))
            x = self.self_attn(x.transpose(0, 1)).transpose(0, 1)
        return self.head(x.mean(dim=-2))


@case
def perceiver() -> Case:
    def batch(n: int) -> tuple[Any, ...]:
        mask = torch.arange(5)[None] < torch.tensor([5, 3, 4, 2, 5, 1, 4])[:n, None]
        return normal(n, 5, 6), mask, ids(n, high=4)

    return Case(Perceiver(), batch, F.cross_entropy)


class Weighted(nn.Module):
    """int64 inputs, weights of samples, a frozen part in eval mode, class weights with ignored labels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)).requires_grad_(False)
        self.head = nn.Linear(8, 4)
        self.register_buffer("weight", torch.tensor([1.0, 2.0, 3.0, 0.5]))

    def train(self, mode: bool = True) -> "Weighted":
        super().train(mode)
        self.stem.eval()
        return self

    def forward(self, x: Tensor, y: Tensor, w: Tensor) -> Any:
        logits = self.head(self.stem(x.float()))
        per_sample = F.cross_entropy(logits, y, weight=self.weight, ignore_index=3, reduction="none")
        return (per_sample * w).sum() / w.sum() + F.cross_entropy(
            logits, y, weight=self.weight, ignore_index=3
        )


@case
def weighted_samples() -> Case:
    return Case(
        Weighted(),
        lambda n: (ids(n, 8), ids(n, high=4), torch.rand(n, generator=torch.Generator().manual_seed(n))),
    )
