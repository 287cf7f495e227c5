"""The rewriting alone: members in threads give the numbers of one device, however ops are computed."""

from math import prod
from typing import Any

import pytest
import torch
from amounts import examples
from choices import FREE, at_random, gpus, planned
from hypothesis import given, settings
from hypothesis import strategies as st
from threads import Choice, grouped, one_stage
from torch import nn

from graphpar.ir.shards import Split
from graphpar.ir.text import format_graph, parse_graph
from graphpar.passes.shard import Shard
from graphpar.preparation import Prepared, prepare
from graphpar.runtime.numbers import compare_gradients
from graphpar.runtime.reference import OneDevice
from graphpar.training import Training

TRAINING = Training(optimizer=torch.optim.SGD)
ROUNDING = 1e-5


def check(
    model: nn.Module,
    prepared: Prepared,
    choice: Choice,
    size: int,
    args: Any,
    kwargs: Any,
    again: bool = False,
    rounding: float = ROUNDING,
    mesh: tuple[int, ...] = (),
) -> None:
    """Loss and all gradients of a group are those of one device; computed `again` for backward or not."""
    whole = OneDevice(model, prepared.captured, one_stage(prepared.graph), prepared.graph, 0)
    (loss,) = whole.forward(args, kwargs)
    loss.backward()  # type: ignore[no-untyped-call]
    results, gradients, _ = grouped(model, prepared, choice, size, args, kwargs, again=again, mesh=mesh)
    for (result,) in results:
        torch.testing.assert_close(result, loss.detach(), rtol=rounding, atol=rounding / 100)
    name, difference = compare_gradients(gradients, whole.gradients())
    assert difference <= rounding, f"{name} differs by {difference}"


@st.composite
def shares(draw: st.DrawFn, most: int = 4) -> tuple[float, ...]:
    """Two to four members of unlike strength."""
    parts = draw(st.lists(st.floats(0.2, 1.0), min_size=2, max_size=most))
    return tuple(p / sum(parts) for p in parts)


class Mixer(nn.Module):
    """A random stack of attention and perceptron blocks; `tied`: some weights have several readers.

    Kinds: `a`ttention, `b` with a trained bias and weights that are transposed first, `m` a perceptron.
    """

    def __init__(
        self, kinds: list[str], width: int, heads: int, inner: int, drop: float, tied: bool = False
    ) -> None:
        super().__init__()
        self.kinds, self.heads, self.drop = kinds, heads, drop
        self.embed = nn.Embedding(13, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in kinds)
        self.first = nn.ModuleList(nn.Linear(width, inner if k == "m" else 3 * width) for k in kinds)
        self.second = nn.ModuleList(nn.Linear(inner if k == "m" else width, width) for k in kinds)
        self.near = nn.Parameter(torch.randn(heads, 7, 7), requires_grad="b" in kinds)
        self.head = nn.Linear(width, 13, bias=False)
        if tied:
            self.head.weight = self.embed.weight
            for second in self.second:
                second.bias = self.second[0].bias

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for kind, norm, first, second in zip(
            self.kinds, self.norms, self.first, self.second, strict=True
        ):
            h = norm(x) @ first.weight.T + first.bias if kind == "b" else first(norm(x))
            if kind != "m":
                batch, length, _ = h.shape
                q, k, v = (t.view(batch, length, self.heads, -1).transpose(1, 2) for t in h.chunk(3, -1))
                h = nn.functional.scaled_dot_product_attention(
                    q, k, v, None if kind == "a" else self.near, self.drop, is_causal=kind == "a"
                )
                h = h.transpose(1, 2).reshape(batch, length, -1)
            else:
                h = nn.functional.gelu(h)
            x = x + nn.functional.dropout(second(h), self.drop)
        scores = self.head(x)
        result: torch.Tensor = nn.functional.cross_entropy(scores.view(-1, 13), labels.view(-1))
        return result


@settings(max_examples=examples(24, 6), deadline=None)
@given(
    kinds=st.lists(st.sampled_from("abm"), min_size=1, max_size=3),
    heads=st.integers(1, 5),
    head_size=st.integers(
        3, 5
    ),  # a norm over two numbers is plus or minus one: its gradient is all rounding
    inner=st.integers(1, 17),
    drop=st.sampled_from([0.0, 0.3]),
    tied=st.booleans(),
    again=st.booleans(),
    parts=shares(),
    across=st.one_of(st.just(()), shares(most=2)),
    seed=st.integers(0, 10**6),
)
def test_any_strategies_on_any_stack(
    kinds: list[str],
    heads: int,
    head_size: int,
    inner: int,
    drop: float,
    tied: bool,
    again: bool,
    parts: tuple[float, ...],
    across: tuple[float, ...],
    seed: int,
) -> None:
    # With `across` members stand in a mesh, and each axis has strategies of its own.
    torch.manual_seed(seed)
    # In float64: a bias of one number has a gradient whose terms may all but cancel, down to rounding.
    model = Mixer(kinds, heads * head_size, heads, inner, drop, tied).double()
    batch = torch.randint(0, 13, (3, 7)), torch.randint(0, 13, (3, 7))
    prepared = prepare(model, batch, {}, TRAINING)
    choice = at_random(one_stage(prepared.graph), parts, seed, inner=across)
    if across:
        mesh = (len(parts), len(across))
        check(model, prepared, choice, prod(mesh), batch, {}, again, rounding=1e-10, mesh=mesh)
        return
    for way in (choice, planned(prepared, gpus(len(parts), FREE, parts))):
        check(model, prepared, way, len(parts), batch, {}, again, rounding=1e-10)


class Pixels(nn.Module):
    """Convolutions, pooling and a loss: nothing here has a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, 7, 3)
        self.out = nn.Linear(7, 4)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        h = nn.functional.dropout(nn.functional.max_pool2d(torch.relu(self.first(x)), 2), 0.2)
        h = self.second(h).mean((2, 3))
        result: torch.Tensor = nn.functional.cross_entropy(self.out(h), y)
        return result


@pytest.mark.parametrize("parts", [(0.5, 0.5), (0.6, 0.4), (0.4, 0.2, 0.2, 0.2)])
def test_the_samples_are_cut_wherever_they_can_be(parts: tuple[float, ...]) -> None:
    """Three samples: the last of four members has none."""
    batch = torch.randn(3, 3, 8, 8), torch.randint(0, 4, (3,))
    ids = torch.randint(0, 13, (3, 7)), torch.randint(0, 13, (3, 7))
    for model, given_batch in ((Pixels(), batch), (Mixer(["b", "m"], 12, 3, 5, 0.0), ids)):
        prepared = prepare(model, given_batch, {}, TRAINING)
        graph = one_stage(prepared.graph)
        choice = at_random(graph, parts, 0, prefers=lambda name, strategy: bool(strategy.samples))
        assert sum(bool(s.samples) for s in choice.chosen.values()) >= 8
        local = Shard(0, 1, choice.chosen, choice.forms, choice.weights).run(graph)
        assert parse_graph(format_graph(local)) == local
        for again in (False, True):
            check(model, prepared, choice, len(parts), given_batch, {}, again)


def stock(name: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """A tiny stock model with a batch."""
    hf = pytest.importorskip("transformers", reason="transformers is not installed")
    ids = torch.randint(0, 64, (4, 12))
    labels = {"labels": ids.clone()}
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1}
    llama = {**sizes, "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 32}
    if name == "gpt2":
        config = hf.GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=1, n_head=4)
        return hf.GPT2LMHeadModel(config), (ids,), labels
    if name == "llama":
        return hf.LlamaForCausalLM(hf.LlamaConfig(**llama)), (ids,), labels
    if name == "bert":
        config = hf.BertConfig(**sizes, intermediate_size=64, max_position_embeddings=32)
        return hf.BertForMaskedLM(config), (ids,), {**labels, "attention_mask": torch.ones_like(ids)}
    if name == "t5":
        config = hf.T5Config(
            vocab_size=64,
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=1,
            num_heads=4,
            decoder_start_token_id=0,
        )
        return hf.T5ForConditionalGeneration(config), (ids,), labels
    if name == "mixtral":
        config = hf.MixtralConfig(**llama, num_local_experts=4, experts_implementation="grouped_mm")
        return hf.MixtralForCausalLM(config), (ids,), labels
    config = hf.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64,
        image_size=16, patch_size=4, num_labels=5,
    )  # fmt: skip
    pixels = {"pixel_values": torch.randn(4, 3, 16, 16), "labels": torch.randint(0, 5, (4,))}
    return hf.ViTForImageClassification(config), (), pixels


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "t5", "mixtral", "vit"])
def test_stock_models(name: str) -> None:
    model, args, kwargs = stock(name)
    prepared = prepare(model, args, kwargs, TRAINING)
    graph = one_stage(prepared.graph)
    for parts in ((0.5, 0.5), (0.4, 0.2, 0.2, 0.2)):
        choice = planned(prepared, gpus(len(parts), FREE, parts))
        assert sum(isinstance(layout, Split) for layout in choice.weights.values()) >= 4
        check(model, prepared, choice, len(parts), args, kwargs, again=len(parts) == 2)
    for seed, shared in enumerate(((0.6, 0.4), (0.2, 0.5, 0.3))):
        choice = at_random(graph, shared, seed)
        check(model, prepared, choice, len(shared), args, kwargs, again=seed == 1)
    mesh_of_both = at_random(graph, (0.6, 0.4), 0, inner=(0.5, 0.5))
    assert sum(mesh_of_both.shares_along_both(name) for name in mesh_of_both.chosen) >= 5
    check(model, prepared, mesh_of_both, 4, args, kwargs, mesh=(2, 2))
