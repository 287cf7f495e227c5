"""Small stock models of every sort, without dropout, and batches for them."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
import transformers
from amounts import exhaustive
from torch import nn

SMALL = {
    "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32,
    "vocab_size": 64,
}  # fmt: skip
GROUPED = SMALL | {"num_key_value_heads": 1, "head_dim": 8}
SIDES = {
    "d_model": 16, "encoder_layers": 3, "decoder_layers": 3, "encoder_attention_heads": 2,
    "vocab_size": 64, "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
}  # fmt: skip
EXPERTS = {"num_experts_per_tok": 2, "experts_implementation": "batched_mm"}
PICTURE = {"image_size": 8, "patch_size": 4}
STOCK: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("ForCausalLM", GROUPED),
    "gpt2": ("ForCausalLM", {"n_embd": 16, "n_layer": 3, "n_head": 2, "vocab_size": 64}),
    "t5": (
        "ForSeq2SeqLM",
        {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 3, "num_heads": 2, "vocab_size": 64},
    ),
    "gemma2": ("ForCausalLM", GROUPED | {"num_hidden_layers": 6}),
    "bert": ("ForMaskedLM", SMALL),
    "bart": ("ForSeq2SeqLM", SIDES),
    "mixtral": ("ForCausalLM", GROUPED | EXPERTS | {"num_local_experts": 4}),
    "qwen3_moe": ("ForCausalLM", GROUPED | EXPERTS | {"num_experts": 4, "moe_intermediate_size": 8}),
    "deepseek_v3": (
        "ForCausalLM",
        SMALL | EXPERTS
        | {
            "num_hidden_layers": 4, "num_key_value_heads": 2, "first_k_dense_replace": 1,
            "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 8,
            "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
            "v_head_dim": 8,
        },
    ),
    "mamba": ("ForCausalLM", SMALL | {"state_size": 4}),
    "vit": ("ForImageClassification", SMALL | PICTURE),
    "swin": (
        "ForImageClassification",
        {
            "image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [4, 4], "num_heads": [2, 2],
            "window_size": 4, "drop_path_rate": 0.0,
        },
    ),
    "resnet": (
        "ForImageClassification", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [3, 1]},
    ),
    "whisper": (
        "ForSpeechSeq2Seq", SIDES | {"num_mel_bins": 8, "max_source_positions": 8, "pad_token_id": 0},
    ),
    "wav2vec2": (
        "ForCTC",
        SMALL
        | {
            "conv_dim": [8, 8], "conv_stride": [4, 2], "conv_kernel": [8, 4], "mask_time_prob": 0.0,
            "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4, "layerdrop": 0.0,
            "num_conv_pos_embedding_groups": 2, "ctc_loss_reduction": "mean",
        },
    ),
    "clip": (
        "",
        {
            "text_config": SMALL | {"projection_dim": 8, "eos_token_id": 2},
            "vision_config": SMALL | PICTURE | {"projection_dim": 8}, "projection_dim": 8,
        },
    ),
}  # fmt: skip
"""The class of each model after `AutoModel`, and its sizes."""
ANY_PICTURE = ("swin", "resnet")
"""Models that take pictures of another size than the one they were made for."""


def in_turn(ways: Iterable[str], among: Iterable[str] = ()) -> list[Any]:
    """Every stock model in one of some ways, the ways by turns; in the others where all are asked for.

    With `among` only cases of these ways are given; another test has the others.
    """
    ways, given = tuple(ways), set(among)
    return [
        (pytest.param if place % len(ways) == turn else exhaustive)(name, way, id=f"{name}-{way}")
        for place, name in enumerate(STOCK)
        for turn, way in enumerate(ways)
        if not given or way in given
    ]


def two_deep(sizes: Any) -> Any:
    """The same with two layers at most in every part: with their number grows what a capture takes."""
    return {
        key: two_deep(value)
        if isinstance(value, dict)
        else min(value, 2)
        if "layer" in key
        else [min(depth, 2) for depth in value]
        if key == "depths"
        else value
        for key, value in sizes.items()
    }


def build(name: str, device: str = "cpu", *, shallow: bool = False) -> nn.Module:
    """A small model without dropout; a shallow one has two layers."""
    head, sizes = STOCK[name]
    sizes = two_deep(sizes) if shallow else sizes
    config = transformers.AutoConfig.for_model(name, **sizes, decoder_start_token_id=0)
    for part in (config, *(getattr(config, key, None) for key in ("text_config", "vision_config"))):
        for key, value in list(vars(part).items()) if part is not None else ():
            if "drop" in key and isinstance(value, float):
                setattr(part, key, 0.0)
    config.use_cache = False
    torch.manual_seed(0)
    with torch.device(device):
        model: nn.Module = getattr(transformers, f"AutoModel{head}").from_config(config)
    return model


def batch_of(name: str, samples: int = 4, length: int = 8) -> dict[str, torch.Tensor]:
    """Keyword arguments with labels; `length` in tokens, or what makes pictures and sounds larger."""
    head, _ = STOCK[name]
    generator = torch.Generator().manual_seed(samples + 100 * length)
    ids = torch.randint(3, 61, (samples, length), generator=generator)
    if head == "ForImageClassification":
        side = {"swin": 32, "resnet": 32}.get(name, 8) * (length // 4) // 2
        pixels = torch.randn(samples, 3, side, side, generator=generator)
        return {"pixel_values": pixels, "labels": ids[:, 0] % 2}
    if name == "whisper":
        return {"input_features": torch.randn(samples, 8, 16, generator=generator), "labels": ids}
    if name == "wav2vec2":
        labels = torch.where(torch.arange(3) < 1 + ids[:, :1] % 3, ids[:, :3], -100)
        sound = torch.randn(samples, 40 * length, generator=generator)
        return {"input_values": sound, "labels": labels}
    if name == "clip":
        ids[:, -1] = 2
        pixels = torch.randn(samples, 3, 8, 8, generator=generator)
        return {"input_ids": ids, "pixel_values": pixels, "return_loss": True}  # type: ignore[dict-item]
    labels = ids.clone()
    labels[::2, 0] = -100
    return {"input_ids": ids, "labels": labels}
