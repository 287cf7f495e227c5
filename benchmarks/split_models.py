"""GPT-2 and Llama of transformers cut by hand into two stages, as one would for a pipeline by hand."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the usual name
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

VOCABULARY = 1024


@dataclass(frozen=True)
class Size:
    """How large a benchmark's model and batch are."""

    width: int = 256
    layers: int = 4
    length: int = 128
    batch: int = 8
    microbatches: int = 4

    @property
    def cut(self) -> int:
        """Layers of the first stage; the head makes the second one heavier."""
        return self.layers // 2


@dataclass(frozen=True)
class Family:
    """A model, the same model as two modules, and the name of the layer where the second begins."""

    build: Callable[[Size], Any]
    stages: Callable[[Any, int], tuple[nn.Module, nn.Module]]
    layer_name: str


class GPT2First(nn.Module):
    """Embeddings and the first blocks: (batch, time) to (batch, time, width)."""

    def __init__(self, model: Any, cut: int) -> None:
        super().__init__()
        body = model.transformer
        self.wte, self.wpe, self.blocks = body.wte, body.wpe, body.h[:cut]

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids to hidden states."""
        x: torch.Tensor = self.wte(ids) + self.wpe(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return x


class GPT2Second(nn.Module):
    """The other blocks and the head: (batch, time, width) to logits."""

    def __init__(self, model: Any, cut: int) -> None:
        super().__init__()
        body = model.transformer
        self.blocks, self.ln, self.head = body.h[cut:], body.ln_f, model.lm_head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Hidden states to logits."""
        for block in self.blocks:
            x = block(x)
        logits: torch.Tensor = self.head(self.ln(x))
        return logits


class LlamaFirst(nn.Module):
    """The embedding and the first layers; positions are made in each stage."""

    def __init__(self, model: Any, cut: int) -> None:
        super().__init__()
        body = model.model
        self.embed, self.rotary, self.layers = body.embed_tokens, body.rotary_emb, body.layers[:cut]

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids to hidden states."""
        return through_layers(self.layers, self.rotary, self.embed(ids))


class LlamaSecond(nn.Module):
    """The other layers and the head."""

    def __init__(self, model: Any, cut: int) -> None:
        super().__init__()
        body = model.model
        self.rotary, self.layers, self.norm = body.rotary_emb, body.layers[cut:], body.norm
        self.head = model.lm_head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Hidden states to logits."""
        logits: torch.Tensor = self.head(self.norm(through_layers(self.layers, self.rotary, x)))
        return logits


def through_layers(layers: nn.ModuleList, rotary: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Llama's layers one after another."""
    positions = torch.arange(x.shape[1]).unsqueeze(0)
    embeddings = rotary(x, position_ids=positions)
    for layer in layers:
        x = layer(x, position_embeddings=embeddings, position_ids=positions)
    return x


def causal_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """What transformers computes: each position predicts the next, the last one nothing."""
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]
    return F.cross_entropy(logits.view(-1, logits.shape[-1]), shifted.reshape(-1))


def _gpt2(size: Size) -> Any:
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=size.length, n_embd=size.width, n_layer=size.layers,
        n_head=size.width // 64, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        tie_word_embeddings=False, use_cache=False, bos_token_id=0, eos_token_id=0,
        loss_type="ForCausalLM",
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def _llama(size: Size) -> Any:
    heads = size.width // 64
    config = LlamaConfig(
        vocab_size=VOCABULARY, max_position_embeddings=size.length, hidden_size=size.width,
        intermediate_size=size.width * 11 // 4, num_hidden_layers=size.layers,
        num_attention_heads=heads, num_key_value_heads=max(1, heads // 2),
        tie_word_embeddings=False, use_cache=False, loss_type="ForCausalLM",
    )  # fmt: skip
    return LlamaForCausalLM(config)


FAMILIES = {
    "gpt2": Family(
        _gpt2, lambda model, cut: (GPT2First(model, cut), GPT2Second(model, cut)), "transformer.h"
    ),
    "llama": Family(
        _llama, lambda model, cut: (LlamaFirst(model, cut), LlamaSecond(model, cut)), "model.layers"
    ),
}
