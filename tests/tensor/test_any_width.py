"""Heads, key heads, widths and vocabularies of any size, primes too: the numbers of one device."""

from dataclasses import dataclass

import pytest
import torch
from amounts import examples
from choices import FREE, at_random, gpus, planned
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_rewriting import ROUNDING, TRAINING, shares
from threads import Choice, grouped, one_stage
from torch import nn
from torch.nn import functional

from graphpar.preparation import Prepared, prepare
from graphpar.runtime.numbers import compare_gradients
from graphpar.runtime.reference import OneDevice

Batch = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Sizes:
    """Each of `keys` key heads serves `queries` heads."""

    keys: int
    queries: int
    head: int
    inner: int
    words: int
    tied: bool
    fused: bool

    @property
    def width(self) -> int:
        return self.keys * self.queries * self.head


class Grouped(nn.Module):
    """A block with grouped queries and a gated perceptron between a table and a head."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        width, of_keys = sizes.width, sizes.keys * sizes.head
        self.table = nn.Embedding(sizes.words, width)
        self.before, self.between = nn.RMSNorm(width), nn.LayerNorm(width)
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * of_keys, bias=False)
        self.out = nn.Linear(width, width)
        self.gate, self.up = (nn.Linear(width, sizes.inner, bias=False) for _ in range(2))
        self.down = nn.Linear(sizes.inner, width)
        self.last = nn.Linear(width, sizes.words, bias=False)
        if sizes.tied:
            self.last.weight = self.table.weight

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss and the scores of (batch, length) words."""
        sizes, x = self.sizes, self.table(ids)
        h = self.before(x)
        k, v = self.kv(h).chunk(2, -1)
        q, k, v = (t.view(*ids.shape, -1, sizes.head).transpose(1, 2) for t in (self.q(h), k, v))
        if not sizes.fused:
            k, v = (t.repeat_interleave(sizes.queries, 1) for t in (k, v))
        h = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=sizes.fused)
        x = x + self.out(h.transpose(1, 2).reshape(x.shape))
        h = self.between(x)
        x = x + self.down(functional.silu(self.gate(h)) * self.up(h))
        scores = self.last(x)
        return functional.cross_entropy(scores.flatten(0, 1), labels.flatten()), scores


def check(model: nn.Module, prepared: Prepared, choice: Choice, size: int, batch: Batch) -> None:
    """Loss, scores and all gradients of every member are those of one device."""
    whole = OneDevice(model, prepared.captured, one_stage(prepared.graph), prepared.graph, 0)
    expected = whole.forward(batch, {})
    expected[0].backward()  # type: ignore[no-untyped-call]
    results, gradients, _ = grouped(model, prepared, choice, size, batch, {})
    for of_member in results:
        for result, wanted in zip(of_member, expected, strict=True):
            scale = float(wanted.detach().abs().max())
            torch.testing.assert_close(result, wanted.detach(), rtol=ROUNDING, atol=ROUNDING * scale)
    name, difference = compare_gradients(gradients, whole.gradients())
    assert difference <= ROUNDING, f"{name} differs by {difference}"


PRIMES = st.sampled_from([1, 2, 3, 5, 7, 11, 13])


@st.composite
def any_sizes(draw: st.DrawFn) -> Sizes:
    return Sizes(
        keys=draw(st.integers(1, 5)),
        queries=draw(st.integers(1, 3)),
        head=draw(st.sampled_from([3, 4, 5, 7])),
        inner=draw(st.one_of(PRIMES, st.integers(1, 16))),
        words=draw(st.sampled_from([5, 7, 11, 12, 13])),
        tied=draw(st.booleans()),
        fused=draw(st.booleans()),
    )


@pytest.mark.slow
@settings(max_examples=examples(40), deadline=None)
@given(sizes=any_sizes(), parts=shares(), samples=st.integers(1, 4), seed=st.integers(0, 10**6))
@example(Sizes(1, 3, 3, 1, 5, True, False), (0.5, 0.3, 0.2), 1, 0).via("fewer of all than members")
def test_any_sizes(sizes: Sizes, parts: tuple[float, ...], samples: int, seed: int) -> None:
    torch.manual_seed(seed)
    model = Grouped(sizes)
    batch = tuple(torch.randint(0, sizes.words, (samples, 5)) for _ in range(2))
    prepared = prepare(model, batch, {}, TRAINING)
    for choice in (
        planned(prepared, gpus(len(parts), FREE, parts)),
        at_random(one_stage(prepared.graph), parts, seed),
    ):
        check(model, prepared, choice, len(parts), (batch[0], batch[1]))


@pytest.mark.parametrize(
    ("sizes", "parts"),
    [
        (Sizes(1, 3, 3, 7, 11, False, True), (0.5, 0.5)),
        (Sizes(2, 2, 3, 13, 7, True, False), (0.4, 0.3, 0.3)),
        (Sizes(3, 1, 5, 11, 13, True, True), (0.6, 0.2, 0.1, 0.1)),
    ],
    ids=["one key head for two", "two for three", "three for four, uneven"],
)
def test_fewer_key_heads_than_members_and_primes(sizes: Sizes, parts: tuple[float, ...]) -> None:
    torch.manual_seed(0)
    model = Grouped(sizes)
    ids, labels = (torch.randint(0, sizes.words, (2, 5)) for _ in range(2))
    prepared = prepare(model, (ids, labels), {}, TRAINING)
    check(model, prepared, planned(prepared, gpus(len(parts), FREE, parts)), len(parts), (ids, labels))
