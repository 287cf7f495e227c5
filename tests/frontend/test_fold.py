"""Repeated blocks are stamped instead of followed, and the graph is the one that following gives."""

import copy
import logging
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from graphpar.frontend.blocks import find_blocks
from graphpar.frontend.capture import Captured, capture
from graphpar.ir.text import format_graph

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """A residual block with settings, in the manner of transformers' layers."""

    def __init__(
        self, index: int, *, scale: float = 1.0, drop: float = 0.0, trained: bool = True
    ) -> None:
        super().__init__()
        self.layer_idx, self.scale = index, scale
        self.inner, self.norm = nn.Linear(6, 6), nn.LayerNorm(6)
        self.drop = nn.Dropout(drop)
        self.register_buffer("offset", torch.full((6,), 0.5))
        self.requires_grad_(trained)

    def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        """A linear layer of the normalised input, added to it."""
        y = self.drop(self.inner(self.norm(x))) * self.scale + self.offset
        gated: torch.Tensor = x + (y if gate is None else y * gate)
        return gated


class Stack(nn.Module):
    """Blocks in a list; `gated` calls some of them otherwise, in code outside of the blocks."""

    def __init__(self, blocks: list[nn.Module], gated: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.layers, self.head, self.gated = nn.ModuleList(blocks), nn.Linear(6, 2), gated

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The mean of the squares of what the last block gives."""
        gate = torch.sigmoid(x)
        for i, layer in enumerate(self.layers):
            x = layer(x, gate) if i in self.gated else layer(x)
        loss: torch.Tensor = self.head(x).square().mean()
        return loss


def both(model: nn.Module, *args: Any, **kwargs: Any) -> tuple[Captured, Captured]:
    """Captured with repeated blocks stamped, and with everything followed."""
    before = [dict(m.__dict__) for m in model.modules()]
    folded = capture(model, args, kwargs, loss="returned", fold=2)
    assert [dict(m.__dict__) for m in model.modules()] == before, "the model was changed"
    return folded, capture(model, args, kwargs, loss="returned", fold=0)


def assert_equal(folded: Captured, whole: Captured) -> None:
    assert format_graph(folded.graph) == format_graph(whole.graph)
    assert folded.graph == whole.graph
    assert (folded.signature, folded.unsplittable) == (whole.signature, whole.unsplittable)


def test_equal_blocks_are_stamped() -> None:
    folded, whole = both(Stack([Block(i) for i in range(5)]).train(), X)
    assert_equal(folded, whole)
    assert (folded.stamped, whole.stamped) == (3, 0), "the first input wants no gradient"


@settings(max_examples=12, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from([1.0, 0.5]), st.sampled_from([0.0, 0.1]), st.booleans()),
        min_size=2,
        max_size=6,
    ),
    st.sets(st.integers(0, 5)),
)
def test_any_mixture_of_blocks_gives_the_graph_of_following_all(
    forms: list[tuple[float, float, bool]], gated: set[int]
) -> None:
    blocks: list[nn.Module] = [
        Block(i, scale=scale, drop=drop, trained=trained)
        for i, (scale, drop, trained) in enumerate(forms)
    ]
    assert_equal(*both(Stack(blocks, tuple(gated)).train(), X))


class ReadsItsPlace(Block):
    def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(x) / (self.layer_idx + 1)


class LeavesATrace(Block):
    seen: ClassVar[list[torch.Tensor]] = []

    def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        y = super().forward(x)
        self.seen.append(y.sum())
        return y


class WritesItsInput(Block):
    def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        result: torch.Tensor = x.mul_(2.0) + self.inner(x)
        return result


class ReturnsItsInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(-1, 6)


class MakesAConstant(Block):
    def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(x) * torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])


class Traced(Stack):
    """Adds what the blocks left behind to its result."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As ever, and the traces."""
        LeavesATrace.seen.clear()
        return super().forward(x) + torch.stack(LeavesATrace.seen).sum()


class Doubled(Stack):
    """Works on a value of its own, so that blocks may overwrite it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As ever, of the double."""
        return super().forward(x * 2.0)


@pytest.mark.parametrize(
    "model",
    [
        Stack([ReadsItsPlace(i) for i in range(3)]),
        Traced([LeavesATrace(i) for i in range(3)]),
        Doubled([WritesItsInput(i) for i in range(3)]),
        Doubled([ReturnsItsInput() for _ in range(3)]),
        Stack([MakesAConstant(i) for i in range(3)]),
    ],
    ids=lambda model: type(model.layers[0]).__name__,
)
def test_what_cannot_be_stamped_is_followed_and_said(
    model: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "graphpar.capture"):
        folded, whole = both(model, X)
    assert_equal(folded, whole)
    assert folded.stamped == 0
    assert "followed one by one" in caplog.text


def test_blocks_that_differ_or_share_are_not_equal() -> None:
    shared = [Block(0), Block(1)]
    shared[1].inner.weight = shared[0].inner.weight
    assert find_blocks(nn.ModuleList(shared), 2) == ()
    hooked = [Block(0), Block(1)]
    hooked[1].register_forward_hook(lambda *_: None)
    assert find_blocks(nn.ModuleList(hooked), 2) == ()
    renumbered = [Block(0), Block(5)]  # no place in the list: a setting
    assert find_blocks(nn.ModuleList(renumbered), 2) == ()
    constant = [Block(0), Block(1)]
    for block in constant:
        block.mask = torch.ones(6)
    assert find_blocks(nn.ModuleList(constant), 2) == ()
    found = find_blocks(nn.ModuleList([Block(0), Block(1)]), 2)
    assert [(b.path, b.kind, b.positions) for b in found] == [
        ("0", 0, (("", "layer_idx"),)),
        ("1", 0, (("", "layer_idx"),)),
    ]


def test_buffers_that_blocks_write_to_are_each_ones_own() -> None:
    layer = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU(inplace=True))
    model = Stack([copy.deepcopy(layer) for _ in range(3)]).train()
    folded, whole = both(model, X)
    assert_equal(folded, whole)
    assert folded.stamped == 1, "the first input wants no gradient"
