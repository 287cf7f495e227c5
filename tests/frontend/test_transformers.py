"""Stock models of transformers: captured, as eager computes, and split over microbatches."""

from typing import Any

import pytest
import torch
from one_device import assert_close, eagerly, in_parts, ready
from torch import nn

transformers = pytest.importorskip("transformers")

IDS = torch.arange(48).view(6, 8) % 57 + 3
LABELS = IDS.clone()
LABELS[0, 2:] = -100
LABELS[3, :3] = -100
MASK = torch.ones(6, 8, dtype=torch.long)
MASK[1, 5:] = 0
CLASSES = torch.tensor([0, 1, 0, 1, 1, 0])


def build(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A tiny model without dropout, and its batch with unequal numbers of labels."""
    t = transformers
    text = {"input_ids": IDS, "labels": LABELS}
    small = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16}
    if name == "gpt2":
        config = t.GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=64, n_positions=16)
        model, batch = t.GPT2LMHeadModel(config), {**text, "attention_mask": MASK}
    elif name == "llama":
        config = t.LlamaConfig(**small, num_key_value_heads=1, intermediate_size=32, vocab_size=64)
        model, batch = t.LlamaForCausalLM(config), text
    elif name == "bert":
        config = t.BertConfig(**small, intermediate_size=32, vocab_size=64)
        model, batch = t.BertForSequenceClassification(config), {"input_ids": IDS, "labels": CLASSES}
    else:
        config = t.T5Config(
            num_layers=1, d_model=16, d_kv=8, d_ff=32, num_heads=2, vocab_size=64,
            decoder_start_token_id=0,
        )  # fmt: skip
        model, batch = t.T5ForConditionalGeneration(config), {**text, "attention_mask": MASK}
    return model.eval(), batch


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "t5"])
def test_the_batch_may_be_split_and_the_numbers_are_eagers(name: str) -> None:
    model, batch = build(name)
    made = ready(model, (), batch)
    assert made.reason == ""
    wanted = eagerly(model, (), batch)
    assert_close(in_parts(made, (), (6,), batch), wanted, 2e-5)
    assert_close(in_parts(made, (), (1, 3, 2), batch), wanted, 2e-5)
