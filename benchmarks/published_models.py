"""Shapes of models from rows of published tables, and what their families are known for."""

import re
from dataclasses import replace
from typing import Any

from graphpar.cost_models.transformer import ModelShape, MoeShape

BERT = {
    "bert_base_squad": ModelShape(12, 768, 12, 12, 3072, 30522, 384, tied=True, causal=False, labels=2),
    "bert_large_squad": ModelShape(24, 1024, 16, 16, 4096, 30522, 384, tied=True, causal=False, labels=2),
}

HEAD_SIZES = ((r"qwen-?3(?!\d)", 128), (r"gpt-?oss", 64))
"""Attention head sizes of families whose heads do not divide the hidden size."""

LATENT_HEAD = 160
"""Mean of the query-key and value sizes of latent attention's heads."""

LATENT_FAMILIES = r"deepseek-?(v[23]|[23](?![\db])|r1(?!-distill))|kimi-?k2|moonlight"
LATENT_RANKS = (1536, 512)
"""Families with latent attention, and the ranks of its queries and of its keys and values where a row
states neither (DeepSeek-V2, https://arxiv.org/abs/2405.04434, and all that followed it in that size).
Their mixtures have a shared expert at least."""

BIASED_EXPERTS = r"gpt-?oss"
"""Families whose experts have biases and clamped activations (https://arxiv.org/abs/2508.10925)."""

GATED_FAMILIES = r"llama|mistral|mixtral|qwen|gemma|deepseek|yi-|phi-?[34]|olmo|palm"
"""Dense families whose feed-forward is gated."""


def family_name(model: dict[str, Any]) -> str:
    """A model's name as families are looked for in it.

    >>> family_name({"name": "DeepSeek V3"}), family_name({"name": "GPT_OSS 120B"}), family_name({})
    ('deepseek-v3', 'gpt-oss-120b', '')
    """
    return re.sub(r"[\s_/]+", "-", str(model.get("name") or "").lower())


def shape_of(model: dict[str, Any]) -> ModelShape | str:
    """The shape that a cleaned row's model has, or why there is none."""
    if model.get("name") in BERT:
        return replace(BERT[model["name"]], seq_len=model.get("seq_len", 384))
    if not all(model.get(k) for k in ("layers", "hidden", "heads", "ffn", "seq_len")):
        return "no model shape"
    if model["heads"] > model["hidden"]:
        return "more heads than elements"
    name = family_name(model)
    query_rank, value_rank = _latent_ranks(model, name)
    moe = _moe(model, name, value_rank > 0)
    known = (size for pattern, size in HEAD_SIZES if re.search(pattern, name))
    return ModelShape(
        layers=model["layers"],
        hidden=model["hidden"],
        heads=model["heads"],
        kv_heads=model.get("kv_heads") or model["heads"],
        ffn=model["ffn"],
        vocab=model.get("vocab") or 128256,
        seq_len=model["seq_len"],
        gated=is_gated(model),
        tied=bool(model.get("tied_embeddings", False)),
        head_size=LATENT_HEAD if value_rank else next(known, 0),
        moe=moe,
        query_rank=query_rank,
        value_rank=value_rank,
    )


def is_gated(model: dict[str, Any]) -> bool:
    """Whether feed-forward blocks are gated: as stated, else in mixtures and in families known for it."""
    stated = model.get("gated_mlp")
    if stated is not None:
        return bool(stated)
    return bool(model.get("moe")) or re.search(GATED_FAMILIES, family_name(model)) is not None


def _latent_ranks(model: dict[str, Any], name: str) -> tuple[int, int]:
    """Ranks of queries and of keys and values in latent attention; zeros of any other."""
    moe = model.get("moe") or {}
    if moe.get("kv_lora"):
        return moe.get("q_lora") or 0, moe["kv_lora"]
    latent = "mla" in str(moe.get("attention") or model.get("attention")).lower()
    return LATENT_RANKS if latent or re.search(LATENT_FAMILIES, name) else (0, 0)


def _moe(model: dict[str, Any], name: str, latent: bool) -> MoeShape | None:
    moe = model.get("moe")
    if not moe or not moe.get("experts") or not moe.get("topk"):
        return None
    return MoeShape(
        moe["experts"],
        moe["topk"],
        moe.get("moe_ffn") or moe.get("ffn") or model["ffn"],
        moe.get("dense_layers") or 0,
        moe.get("shared_experts") or int(latent),
        re.search(BIASED_EXPERTS, name) is not None,
    )
