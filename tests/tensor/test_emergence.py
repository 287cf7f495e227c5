"""Known ways to share a transformer come out of costs alone: nothing in the programme names them."""

from functools import cache
from typing import Any

import pytest
import torch
from choices import ETHERNET, NVLINK, PCIE, gpus, planned
from threads import Choice, one_stage

from graphpar.cost import LinkCost
from graphpar.cost_models.group_times import ShardingOptions
from graphpar.ir.ops import Op
from graphpar.ir.shards import Split
from graphpar.preparation import Prepared, prepare
from graphpar.training import Training

hf = pytest.importorskip("transformers", reason="transformers is not installed")
SAMPLES = 4


@cache
def captured(name: str) -> Prepared:
    """Two blocks of GPT-2 XL or of Llama-8B, without weights."""
    with torch.device("meta"):
        ids = torch.zeros(SAMPLES, 1024, dtype=torch.long)
        model: Any
        if name == "gpt":
            off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
            model = hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=1600, n_head=25, n_layer=2, **off))
        else:
            config = hf.LlamaConfig(
                vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=2,
                num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=2048,
            )  # fmt: skip
            model = hf.LlamaForCausalLM(config)
    return prepare(model, (ids,), {"labels": ids}, Training(optimizer=torch.optim.SGD))


@cache
def chosen(
    name: str, link: LinkCost, size: int = 2, hold: float = 4.0, cuts_batch: bool = True
) -> Choice:
    """What a group of H100 does, holding hardly more weights than it must."""
    options = ShardingOptions(samples=SAMPLES, hold_factor=hold, cuts_batch=cuts_batch)
    return planned(captured(name), gpus(size, link), options)


def ops(name: str, weight: str) -> list[Op]:
    """The products with weights of that name, one in each block."""
    graph = one_stage(captured(name).graph)
    found = [op for op in graph.sources("parameter") if weight in str(op.args[0])]
    products = [user for op in found for user in graph.users(op.name)]
    assert len(products) == 2, weight
    return products


def num_cut(choice: Choice) -> int:
    """Ops whose results are slices."""
    return sum(any(isinstance(r, Split) for r in s.results) for s in choice.chosen.values())


COLUMNS = {
    "gpt": ("attn.c_attn.w", "c_fc.w"),
    "llama": ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"),
}
ROWS = {"gpt": ("mlp.c_proj.w",), "llama": ("o_proj", "down_proj")}
"""GPT's output projection is small beside its activations: gathering its weight sends less."""


@pytest.mark.parametrize("link", [NVLINK, PCIE], ids=["nvlink", "pcie"])
@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_columns_then_rows(name: str, link: LinkCost) -> None:
    choice = chosen(name, link)
    for weight in COLUMNS[name]:
        for op in ops(name, weight):
            assert isinstance(choice.chosen[op.name].results[0], Split), (weight, choice.chosen[op.name])
            assert "copied" in choice.chosen[op.name].operands, (weight, choice.chosen[op.name])
    for weight in ROWS[name]:
        for op in ops(name, weight):
            assert choice.chosen[op.name].results == ("partial",), (weight, choice.chosen[op.name])


@pytest.mark.parametrize("cuts_batch", [False, True])
@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_norms_along_the_sequence(name: str, cuts_batch: bool) -> None:
    """Or along the samples, where they may be cut: 25 heads cannot be halved, 4 samples can."""
    choice = chosen(name, NVLINK, cuts_batch=cuts_batch)
    graph = one_stage(captured(name).graph)
    norms = [op for op in graph.ops if op.target in ("aten.layer_norm.default", "aten.rsqrt.default")]
    assert norms
    for op in norms:
        (result,) = choice.chosen[op.name].results
        assert isinstance(result, Split), (op.name, result)
        assert result.dim == 1 or (cuts_batch and result.of_batch), (op.name, result)


@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_norms_on_a_slower_link(name: str) -> None:
    """Each norm is cut along the sequence or done by all whose gradients are parts; none is whole."""
    choice = chosen(name, PCIE, 4, cuts_batch=False)
    graph = one_stage(captured(name).graph)
    norms = [op for op in graph.ops if op.target in ("aten.layer_norm.default", "aten.rsqrt.default")]
    (*results,) = (choice.chosen[op.name].results[0] for op in norms)
    cut = [result for result in results if isinstance(result, Split)]
    assert len(results) == 5 and len(cut) >= 3 and all(result.dim == 1 for result in cut)
    assert all(result == "copied" for result in results if not isinstance(result, Split))


@pytest.mark.parametrize("link", [NVLINK, PCIE], ids=["nvlink", "pcie"])
@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_vocabulary(name: str, link: LinkCost) -> None:
    choice = chosen(name, link)
    graph = one_stage(captured(name).graph)
    (loss,) = (op for op in graph.ops if op.target == "aten.cross_entropy_loss.default")
    assert choice.chosen[loss.name].special == "classes"
    table = graph.sources("parameter")[0]
    assert isinstance(choice.weights[table.name], Split)
    if name == "gpt":  # tied to the head, so that the rows are cut
        assert "lookup" in {choice.chosen[u.name].special for u in graph.users(table.name)}


@pytest.mark.parametrize("hold", [0.0, 4.0])
@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_slow_links_mean_fewer_slices(name: str, hold: float) -> None:
    cut = [num_cut(chosen(name, link, 4, hold=hold)) for link in (NVLINK, PCIE, ETHERNET)]
    assert cut[0] >= cut[1] > 3 * cut[2] and cut[1] > 40
    assert hold or cut[2] <= 2  # at most the head and its loss


def test_images_by_samples() -> None:
    """Weights of convolutions are small beside what they make: each member takes some of the images."""
    with torch.device("meta"):
        first, second = (torch.nn.Conv2d(64, 64, 3, padding=1) for _ in range(2))
        model = torch.nn.Sequential(first, torch.nn.ReLU(), second)
        images = torch.zeros(16, 64, 56, 56)
    training = Training(optimizer=torch.optim.SGD, loss=torch.nn.functional.mse_loss)
    prepared = prepare(model, (images, images.clone()), {}, training)
    for count, by_samples in ((4, True), (32, False)):
        choice = planned(prepared, gpus(count, NVLINK), ShardingOptions(samples=16))
        found = {op.name for op in prepared.graph.ops if "conv" in op.target}
        assert found and all(bool(choice.chosen[name].samples) == by_samples for name in found)


def test_memory_forces_slices() -> None:
    whole = chosen("gpt", ETHERNET, hold=0.0)
    assert not any(isinstance(w, Split) for w in whole.weights.values())
    tight = chosen("gpt", ETHERNET)
    held = sum(
        w.share(0) if isinstance(w, Split) else 1.0
        for name, w in tight.weights.items()
        if "weight" in name
    )
    assert held < 0.75 * len([n for n in tight.weights if "weight" in n])
