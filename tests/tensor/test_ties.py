"""Every rule about which dimensions run together, tried: all strategies of all ops give dense numbers."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from choices import at_random
from test_rewriting import TRAINING, check
from threads import one_stage
from torch import nn
from torch.nn import functional

from graphpar.ir.links import _RULES, links_of
from graphpar.ir.more_links import MORE_RULES
from graphpar.ir.optable import packet
from graphpar.ir.strategies import Strategy, strategies_of
from graphpar.ir.text import parse_graph
from graphpar.passes.shard import Shard
from graphpar.preparation import Prepared, prepare

Case = Callable[[Any, Any], Any]
CASES: dict[str, Case] = {
    "unbind": lambda h, m: h.unbind(2)[1],
    "stack": lambda h, m: torch.stack((h, h.tanh()), 2),
    "broadcast_tensors": lambda h, m: torch.broadcast_tensors(h, h[:, :1])[1],  # type: ignore[no-untyped-call]
    "gather": lambda h, m: h.gather(3, m.places.expand(h.shape[0], -1, -1, -1)),
    "einsum": lambda h, m: torch.einsum("bchw,cwk->bhk", h, m.cube),
    "glu": lambda h, m: functional.glu(h, 1),
    "repeat": lambda h, m: h.repeat(1, 1, 2, 1),
    "roll": lambda h, m: h.roll(1, 2),
    "mse_loss": lambda h, m: functional.mse_loss(h, h.cos(), reduction="sum"),
    "l1_loss": lambda h, m: functional.l1_loss(h, h.cos(), reduction="none"),
    "smooth_l1_loss": lambda h, m: functional.smooth_l1_loss(h, h.cos(), reduction="sum"),
    "huber_loss": lambda h, m: functional.huber_loss(h, h.cos(), reduction="none"),
    "tril": lambda h, m: h.tril(),
    "triu": lambda h, m: h.triu(1),
    "max_pool2d": lambda h, m: functional.max_pool2d(h, 2),
    "avg_pool2d": lambda h, m: functional.avg_pool2d(h, 2),
    "adaptive_avg_pool2d": lambda h, m: functional.adaptive_avg_pool2d(h, 3),
    "adaptive_max_pool2d": lambda h, m: functional.adaptive_max_pool2d(h, 3),
    "max_pool1d": lambda h, m: functional.max_pool1d(h.flatten(2), 2),
    "avg_pool1d": lambda h, m: functional.avg_pool1d(h.flatten(2), 2),
    "adaptive_avg_pool1d": lambda h, m: functional.adaptive_avg_pool1d(h.flatten(2), 3),
    "upsample_nearest2d": lambda h, m: functional.interpolate(h, scale_factor=2),
    "upsample_bilinear2d": lambda h, m: functional.interpolate(h, scale_factor=2, mode="bilinear"),
    "flip": lambda h, m: h.flip(3),
    "cumprod": lambda h, m: h.sigmoid().cumprod(2),
    "logcumsumexp": lambda h, m: h.logcumsumexp(2),
    "logsumexp": lambda h, m: h.logsumexp((1, 3), keepdim=True),
    "prod": lambda h, m: h.sigmoid().prod(2),
    "any": lambda h, m: (h > 1.5).any(3),
    "all": lambda h, m: (h > -1.5).all(3, keepdim=True),
    "max": lambda h, m: h.max(2)[0],
    "min": lambda h, m: h.min(1, keepdim=True)[0],
    "argmax": lambda h, m: h.argmax(3),
    "argmin": lambda h, m: h.argmin(1, keepdim=True),
    "amax": lambda h, m: h.amax((1, 2)),
    "amin": lambda h, m: h.amin(3),
    "sum": lambda h, m: h.sum((1, 3)),
    "mean": lambda h, m: h.mean((2, 3), keepdim=True),
    "softmax": lambda h, m: h.softmax(1),
    "log_softmax": lambda h, m: h.log_softmax(3),
    "layer_norm": lambda h, m: functional.layer_norm(h, (6, 8), m.cube[0, :1].expand(6, 8)),
    "rms_norm": lambda h, m: functional.rms_norm(h, (8,)),
    "linear": lambda h, m: functional.linear(h, m.square, m.line),
    "addmm": lambda h, m: torch.addmm(m.line, h.flatten(0, 2), m.square),
    "mm": lambda h, m: torch.mm(h.flatten(0, 2), m.square),
    "baddbmm": lambda h, m: torch.baddbmm(
        m.line,
        h.flatten(0, 1),
        h.flatten(0, 1).transpose(1, 2)[..., :8].expand(-1, 8, 6) @ h.flatten(0, 1),
    ),
    "bmm": lambda h, m: torch.bmm(h.flatten(0, 1), h.flatten(0, 1).transpose(1, 2)),
    "matmul": lambda h, m: torch.matmul(h, m.cube),
    "scaled_dot_product_attention": lambda h, m: functional.scaled_dot_product_attention(
        h, h.sin(), h.cos()
    ),
    "embedding": lambda h, m: functional.embedding(m.ids(h), m.square),
    "cross_entropy_loss": lambda h, m: functional.cross_entropy(
        h.flatten(0, 2), m.ids(h)[..., 0].flatten(), reduction="sum"
    ),
    "view": lambda h, m: h.view(-1, 4, 48).view(-1, 4, 3, 2, 8),
    "reshape": lambda h, m: h.transpose(1, 2).reshape(-1, 6, 32),
    "flatten": lambda h, m: h.flatten(1),
    "unflatten": lambda h, m: h.unflatten(3, (2, 4)),
    "unsqueeze": lambda h, m: h.unsqueeze(2),
    "squeeze": lambda h, m: h.mean(1, keepdim=True).squeeze(1),
    "transpose": lambda h, m: h.transpose(1, 3),
    "t": lambda h, m: h.flatten(0, 2) @ m.square.t(),
    "permute": lambda h, m: h.permute(2, 0, 3, 1),
    "expand": lambda h, m: h[:, :, :1].expand(-1, -1, 5, -1),
    "split": lambda h, m: h.split(3, 2)[1],
    "chunk": lambda h, m: h.chunk(2, 3)[0],
    "split_with_sizes": lambda h, m: h.split([2, 4], 2)[1],
    "slice": lambda h, m: h[:, 1:3, :, ::2],
    "select": lambda h, m: h[:, 2],
    "cat": lambda h, m: torch.cat((h, h.tanh()), 1),
    "pad": lambda h, m: functional.pad(h, (1, 2)),
    "index": lambda h, m: m.square[m.ids(h)],
    "topk": lambda h, m: h.topk(2, 2)[0],
    "sort": lambda h, m: h.sort(1)[0],
    "cumsum": lambda h, m: h.cumsum(3),
    "conv1d": lambda h, m: functional.conv1d(h.flatten(2), m.cube[:, :4, :3], m.line[:4]),
    "conv2d": lambda h, m: functional.conv2d(h, m.cube.view(4, 4, 2, 8)[..., :3]),
    "conv3d": lambda h, m: functional.conv3d(
        h.unsqueeze(1), m.cube.view(4, 1, 2, 2, 16)[..., :3], m.line[:4]
    ),
    "gp.dropout": lambda h, m: functional.dropout(h, 0.3),
}
"""By operator something that has it; values are (batch, 4, 6, 8)."""


class Ops(nn.Module):
    """All cases side by side, each with weights of its own, so that each is compared by itself."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)

        def drawn(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=draw))

        self.before = nn.ParameterList(drawn(4, 6, 8) for _ in CASES)
        self.cube, self.square, self.line = drawn(4, 8, 8), drawn(8, 8), drawn(8)
        self.register_buffer("places", torch.randint(0, 8, (1, 4, 6, 5), generator=draw))
        # Every number of a result weighs another: a sum of them would not tell where they are.
        made = (case(torch.randn(3, 4, 6, 8, generator=draw), self) for case in CASES.values())
        self.after = nn.ParameterList(drawn(*(result.shape[1:] or (1,))) for result in made)

    def ids(self, h: torch.Tensor) -> torch.Tensor:
        return (h.detach() * 3).abs().long() % 8

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        losses = []
        for case, before, after in zip(CASES.values(), self.before, self.after, strict=True):
            made = case(x * before, self)
            scaled = made.float() * after
            losses.append((scaled.square() if made.ndim else scaled).sum())
        return torch.stack(losses).sum()


@cache
def captured() -> tuple[Ops, Prepared, tuple[torch.Tensor]]:
    model, batch = Ops(), (torch.randn(3, 4, 6, 8, generator=torch.Generator().manual_seed(1)),)
    return model, prepare(model, batch, {}, TRAINING), batch


NOT_LEFT_BY_EXPORT = {
    "_softmax", "_log_softmax", "_unsafe_view", "unsafe_split", "constant_pad_nd", "convolution",
    "gp.cast_weight", "gp.attention", "transformers.grouped_mm_fallback.default",
    "_grouped_mm",
}  # fmt: skip
"""Other names of ops that are here, and what tests of stock models and of formats have."""


def test_classes_that_are_no_run_are_not_cut() -> None:
    """A member tells its classes by where they begin; cut inside of runs they have no beginning."""
    graph = parse_graph("""graph lowered "Runs" batch=2
%x = input("x") : float32[B,4,2]
%y = input("y") : int64[B]
%w = parameter("w") : float32[4,2] {grad=true}
%m = aten.mul.Tensor(%x, %w) : float32[B,4,2] {grad=true, stage=0}
%v = aten.view.default(%m, (B, 8)) : float32[B,8] {grad=true, stage=0}
%l = aten.cross_entropy_loss.default(%v, %y, none, 2) : float32[] {grad=true, stage=0}
%output = output((%l,))
""")
    (ways,) = ([s for s in strategies_of(graph, (0.5, 0.5))[name] if s.special] for name in ("l",))
    assert [str(way.operands[0]) for way in ways] == ["dim1:2/2x2"]
    local = Shard(0, 1, {"l": ways[0]}).run(graph)["l"]
    assert local.target == "gp.class_loss" and local.args[2] == 4, "from the fifth class on"


@pytest.mark.slow
def test_every_rule_is_tried() -> None:
    _, prepared, _ = captured()
    graph = one_stage(prepared.graph)
    table = strategies_of(graph, (0.5, 0.5))
    divided = {
        packet(op)
        for op in graph.ops
        if links_of(op, graph) and any(way.shares for way in table.get(op.name, ()))
    }
    assert {*_RULES, *MORE_RULES} - divided == NOT_LEFT_BY_EXPORT


@pytest.mark.slow
@pytest.mark.parametrize("parts", [(0.6, 0.4), (0.5, 0.3, 0.2)])
def test_every_strategy_of_every_op(parts: tuple[float, ...]) -> None:
    """Each is taken until none is untried; three members can share little but the samples here.

    Weights have many readers, some of which take them as a copy and others whole.
    """
    model, prepared, batch = captured()
    graph = one_stage(prepared.graph)
    table = strategies_of(graph, parts)
    untried = {(name, way) for name, ways in table.items() for way in ways if way.shares}

    def is_untried(name: str, way: Strategy) -> bool:
        return (name, way) in untried

    for seed in range(20):
        choice = at_random(graph, parts, seed, prefers=is_untried)
        check(model, prepared, choice, len(parts), batch, {})
        untried -= set(choice.chosen.items())
        if not untried:
            return
    raise AssertionError(f"never tried: {sorted(name for name, _ in untried)}")
