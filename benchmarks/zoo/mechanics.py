"""What torch offers and people use: adapters, ties, hooks, parametrisations, checkpoints."""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from zoo.case import Case, case, ids, normal


def vectors(samples: int) -> tuple[Tensor, Tensor]:
    """Vectors and one of four classes each."""
    return normal(samples, 8), ids(samples, high=4)


class LoRALinear(nn.Module):
    """A frozen layer with a trained low-rank update."""

    def __init__(self, base: nn.Linear, r: int = 2, alpha: float = 4.0) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_A = nn.ParameterDict({"default": nn.Parameter(torch.randn(r, base.in_features) * 0.1)})
        self.lora_B = nn.ParameterDict({"default": nn.Parameter(torch.randn(base.out_features, r) * 0.1)})
        self.scaling, self.dropout, self.merged = {"default": alpha / r}, nn.Dropout(0.1), False

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        result = self.base(x, *args, **kwargs)
        for name in self.lora_A.keys():  # noqa: SIM118
            a, b = self.lora_A[name], self.lora_B[name]
            result = result + F.linear(F.linear(self.dropout(x.to(a.dtype)), a), b) * self.scaling[name]
        return result


@case
def lora() -> Case:
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 4))
    for name, child in list(model.named_children()):
        if isinstance(child, nn.Linear):
            setattr(model, name, LoRALinear(child))
    return Case(model, vectors, nn.CrossEntropyLoss())


class Tied(nn.Module):
    """One layer used thrice, its weight used transposed, and a parameter under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.b.weight = self.a.weight
        self.alias, self.head = self.a, nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Any:
        for layer in (self.a, self.b, self.alias):
            x = torch.tanh(layer(x))
        return self.head(F.linear(x, self.a.weight.t()))


@case
def tied() -> Case:
    return Case(Tied(), vectors, F.cross_entropy)


class Checkpointed(nn.Module):
    """Segments computed again, the old and the new way."""

    def __init__(self) -> None:
        super().__init__()
        blocks = [nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Dropout(0.1)) for _ in range(4)]
        self.blocks, self.head = nn.Sequential(*blocks), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Any:
        x = x.requires_grad_() if self.training else x
        x = checkpoint_sequential(self.blocks[:2], 2, x, use_reentrant=True)
        x = checkpoint(self.blocks[2], x, use_reentrant=False)
        return self.head(checkpoint(self.blocks[3], x, use_reentrant=True, preserve_rng_state=True))


@case
def checkpointed() -> Case:
    return Case(Checkpointed(), vectors, F.cross_entropy)


class Symmetric(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return x.triu() + x.triu(1).transpose(-1, -2)


@case
def parametrized() -> Case:
    first = nn.Linear(8, 8)
    parametrize.register_parametrization(first, "weight", Symmetric())
    model = nn.Sequential(
        first, nn.Tanh(), parametrizations.orthogonal(nn.Linear(8, 8)), nn.Softsign(),
        parametrizations.weight_norm(nn.Linear(8, 4)),
    )  # fmt: skip
    return Case(model, vectors, F.cross_entropy)


class Attending(nn.Module):
    """nn.MultiheadAttention with weights wanted, padding masks, a bias of keys, and other widths."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(
            8, 2, dropout=0.1, batch_first=True, kdim=6, vdim=6, add_bias_kv=True
        )
        self.slots, self.head = nn.Parameter(torch.randn(3, 8)), nn.Linear(8, 4)

    def forward(
        self, x: Tensor, key_padding_mask: Tensor | None = None, *, need_weights: bool = True
    ) -> Any:
        q = self.slots.unsqueeze(0).repeat(x.size(0), 1, 1)
        out, weights = self.attn(q, x, x, key_padding_mask=key_padding_mask, need_weights=need_weights)
        return self.head(out.mean(1)), weights


@case
def multihead_weights() -> Case:
    def batch(n: int) -> tuple[Any, ...]:
        mask = torch.arange(5)[None] >= torch.tensor([5, 3, 4, 2, 5, 1, 4])[:n, None]
        return normal(n, 5, 6), mask, ids(n, high=4)

    return Case(Attending(), batch, lambda out, y: F.cross_entropy(out[0], y) + out[1].pow(2).sum() / 100)


def keep(module: Any, args: Any, out: Tensor) -> None:
    """Keep a module's result beside it."""
    module.kept = [out]


class Hooked(nn.Module):
    """Forward hooks and pre-hooks that change values and collect features."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())
        self.head = nn.Linear(16, 4)
        self.body[1].register_forward_hook(keep)
        self.body[2].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        self.body[3].register_forward_hook(lambda module, args, out: out + 1)

    def forward(self, x: Tensor) -> Any:
        late = self.body(x)
        return self.head(torch.cat([self.body[1].kept.pop(), late], -1))


@case
def hooked() -> Case:
    return Case(Hooked(), vectors, F.cross_entropy)


class FakeQuant(nn.Module):
    """Quantisation aware training: a range that is observed, and torch's own fake quantisation."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)
        self.register_buffer("high", torch.tensor(1.0))

    def forward(self, x: Tensor) -> Any:
        h = self.a(x).relu()
        if self.training:
            self.high.copy_(0.9 * self.high + 0.1 * h.detach().abs().max())
        scale = (self.high / 127).clamp(min=1e-6)
        h = torch.fake_quantize_per_tensor_affine(
            h, scale.clone(), torch.zeros(1, dtype=torch.int32), -128, 127
        )
        w = self.b.weight
        w = w + ((w / 0.05).round() * 0.05 - w).detach()
        return F.linear(h, w, self.b.bias)


@case
def fake_quantised() -> Case:
    return Case(FakeQuant(), vectors, F.cross_entropy)
