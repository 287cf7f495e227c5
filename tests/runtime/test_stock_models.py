"""Models of transformers over several workers equal one device."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from helpers import Line, check_training, straight

transformers = pytest.importorskip("transformers")

Case = tuple[Any, tuple[torch.Tensor, ...], Mapping[str, Any]]
SMALL = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 4}


def words(batch: int = 6, length: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    """Words, and labels of which unequally many are ignored."""
    ids = torch.randint(2, 40, (batch, length))
    labels = torch.randint(2, 40, (batch, length))
    labels[torch.rand(batch, length) < 0.4] = -100
    labels[0] = -100
    return ids, labels


def gpt2() -> Case:
    """Tied weights, dropout everywhere."""
    config = transformers.GPT2Config(n_layer=3, n_embd=16, n_head=4, vocab_size=40, n_positions=16)
    ids, labels = words()
    return transformers.GPT2LMHeadModel(config), (ids,), {"labels": labels, "use_cache": False}


def llama() -> Case:
    """Grouped queries, rotary positions."""
    config = transformers.LlamaConfig(num_hidden_layers=3, num_key_value_heads=2, **SMALL)
    ids, labels = words()
    return transformers.LlamaForCausalLM(config), (ids,), {"labels": labels, "use_cache": False}


def bert() -> Case:
    """A classifier whose mask is unlike for every sample."""
    config = transformers.BertConfig(num_hidden_layers=3, max_position_embeddings=16, **SMALL)
    mask = (torch.arange(7)[None] < torch.randint(3, 8, (6, 1))).long()
    kwargs = {"attention_mask": mask, "labels": torch.randint(0, 2, (6,))}
    return transformers.BertForSequenceClassification(config), (words()[0],), kwargs


def t5() -> Case:
    """The encoder's result and the position biases are read far away."""
    config = transformers.T5Config(
        vocab_size=40, d_model=16, d_ff=32, num_layers=2, num_heads=4, d_kv=4, decoder_start_token_id=0
    )
    ids, labels = words()
    return transformers.T5ForConditionalGeneration(config), (ids,), {"labels": labels, "use_cache": False}


def mixtral(balanced: bool = False) -> Case:
    """Experts that get the rows of all samples sorted."""
    config = transformers.MixtralConfig(
        num_hidden_layers=2,
        num_key_value_heads=2,
        num_local_experts=4,
        output_router_logits=balanced,
        # Of the two ways to run experts the other one needs transformers in each worker: seconds.
        experts_implementation="batched_mm" if balanced else None,
        **SMALL,
    )
    ids, labels = words()
    return transformers.MixtralForCausalLM(config), (ids,), {"labels": labels, "use_cache": False}


@pytest.mark.parametrize("make", [gpt2, llama, bert, t5])
@pytest.mark.parametrize(
    "lines",
    [
        pytest.param(straight(3, 3), id="three stages"),
        pytest.param((Line((1, 2), 2, 4), Line((1,), 1, 2)), id="replicas and unlike pipelines"),
    ],
)
def test_training_equals_one_device(make: Callable[[], Case], lines: tuple[Line, ...]) -> None:
    model, args, kwargs = make()
    model.train()
    check_training(model, args, kwargs, lines=lines)


def test_experts_take_rows_of_any_part_of_the_batch() -> None:
    model, args, kwargs = mixtral()
    check_training(model.train(), args, kwargs, lines=(Line((1, 2), 2, 4), Line((1,), 1, 2)))


def test_a_balancing_loss_is_exact_over_parts_of_the_batch() -> None:
    model, args, kwargs = mixtral(balanced=True)
    check_training(model.train(), args, kwargs, lines=(Line((1, 2), 2, 4), Line((1,), 1, 2)))


@pytest.mark.slow
@pytest.mark.parametrize("make", [gpt2, llama, bert, t5, mixtral])
def test_interleaved_stages_and_split_backwards(make: Callable[[], Case]) -> None:
    """Values skip from one stage of a device to another of its own."""
    model, args, kwargs = make()
    check_training(model, args, kwargs, lines=(Line((1, 1), 3, chunks=2),), schedule="zero-bubble")
