"""The rules against torch itself: FLOPs counted by torch, bytes that autograd really keeps."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention, silu
from torch.utils.flop_counter import FlopCounterMode

from graphpar.cluster import Cluster
from graphpar.cost_models.layout import find_layout
from graphpar.cost_models.memory import ALLOCATOR_SLACK
from graphpar.cost_models.opcost import work_of
from graphpar.cost_models.roofline import Roofline
from graphpar.cost_options import PricingOptions
from graphpar.frontend.capture import capture
from graphpar.ir.chain import build_chain
from graphpar.ir.graph import Graph

WIDTH, HEADS, LENGTH, VOCABULARY, BATCH = 32, 4, 16, 50, 3


class Block(nn.Module):
    """A transformer block; attention fused or written out, feed-forward plain or gated."""

    def __init__(self, *, fused: bool, gated: bool) -> None:
        super().__init__()
        self.fused, self.gated = fused, gated
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.heads, self.joined = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.gate = nn.Linear(WIDTH, 4 * WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        parts = self.heads(self.first(x)).split(WIDTH, dim=2)
        q, k, v = (p.view(batch, length, HEADS, -1).transpose(1, 2) for p in parts)
        if self.fused:
            y = scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            y = torch.softmax(q @ k.transpose(-2, -1) * 0.35, dim=-1) @ v
        x = x + self.joined(y.transpose(1, 2).reshape(batch, length, WIDTH))
        h = self.second(x)
        inner = silu(self.gate(h)) * self.up(h) if self.gated else gelu(self.up(h))
        out: torch.Tensor = x + self.down(inner)
        return out


class Language(nn.Module):
    """Tokens to a loss."""

    def __init__(self, *, fused: bool, gated: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block(fused=fused, gated=gated) for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        for block in self.blocks:
            x = block(x)
        return cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


class Pictures(nn.Module):
    """Two convolutions and a mean over places."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3)
        self.head = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.second(torch.relu(self.first(x))))
        return cross_entropy(self.head(x.mean((2, 3))), labels)


def tokens() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (BATCH, LENGTH))


def language(*, fused: bool, gated: bool) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    return Language(fused=fused, gated=gated), (tokens(), tokens())


def pictures() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    return Pictures(), (torch.randn(BATCH, 3, 12, 12), torch.randint(0, 10, (BATCH,)))


CASES = {
    "plain attention": lambda: language(fused=False, gated=False),
    "gated": lambda: language(fused=False, gated=True),
    "pictures": pictures,
}


def matrix_flops(graph: Graph) -> tuple[float, float]:
    """FLOPs of matrix products in forward and backward."""
    layout = find_layout(graph)
    works = [work_of(op, graph, layout, BATCH) for op in graph.ops]
    forward = sum(k.flops for w in works for k in w.forward if k.matrix is not None)
    backward = sum(k.flops for w in works for k in w.backward if k.matrix is not None)
    return forward, backward


@pytest.mark.parametrize("case", CASES)
def test_flops_are_those_that_torch_counts(case: str) -> None:
    model, inputs = CASES[case]()
    graph = capture(model, inputs, {}).graph
    with FlopCounterMode(display=False) as forward:
        loss = model(*inputs)
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    expected = forward.get_total_flops(), backward.get_total_flops()
    assert matrix_flops(graph) == pytest.approx(expected)


def kept_bytes(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> int:
    """Bytes of the storage that autograd keeps besides weights and inputs."""
    known = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *inputs)}
    alive: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(*inputs)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in alive}
    assert loss.requires_grad
    return sum(size for pointer, size in storages.items() if pointer not in known)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("gated", [True, False])
def test_saved_bytes_are_those_that_autograd_keeps(fused: bool, gated: bool) -> None:
    model, inputs = language(fused=fused, gated=gated)
    graph = capture(model, inputs, {}).graph
    cluster = Cluster.from_dict({"devices": [{"kind": "cpu"}]})
    options = PricingOptions(batch=BATCH, training=True)
    table = Roofline().price(graph, build_chain(graph), cluster, options)
    predicted = sum(table.costs[kind].saved_bytes[-1] for kind in table.units) / ALLOCATOR_SLACK
    assert predicted == pytest.approx(kept_bytes(model, inputs), rel=0.03)


class Biased(nn.Module):
    """Attention with a learned bias for every pair of places."""

    def __init__(self, trained: bool) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.bias = nn.Parameter(torch.randn(2, 24, 24), requires_grad=trained)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4).contiguous()
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=self.bias[None])
        result: torch.Tensor = self.out(mixed.transpose(1, 2).flatten(2)).square().mean()
        return result


def test_attention_whose_mask_is_trained_keeps_its_weights_on_a_processor() -> None:
    saved, kept = [], []
    for trained in (False, True):
        model, x = Biased(trained), torch.randn(BATCH, 24, 16)
        graph = capture(model, (x,), {}).graph
        options = PricingOptions(batch=BATCH, training=True)
        for kind in ("cpu", "a100-sxm-40gb"):
            cluster = Cluster.from_dict({"devices": [{"kind": kind}]})
            table = Roofline().price(graph, build_chain(graph), cluster, options)
            saved.append(sum(table.costs[u].saved_bytes[-1] for u in table.units) / ALLOCATOR_SLACK)
        kept.append(kept_bytes(model, (x,)))
    weights = 4 * BATCH * 2 * 24 * 24
    assert saved[2] - saved[0] == pytest.approx(weights, rel=1e-6)
    assert saved[3] == saved[1]
    assert kept[1] - kept[0] == pytest.approx(weights, rel=0.5)
