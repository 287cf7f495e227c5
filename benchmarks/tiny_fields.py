"""What a field of a configuration holds, by its name; the same for every architecture."""

import re

LAYERS = re.compile(r"(^|_)(n_?|num_)?\w*(layers?|blocks|depth|repeats)$")
NOT_LAYERS = re.compile(
    r"dense_replace|window_layers|shared_layers|feature_layer|adapter_layers|step$|_blocks$(?<!num_blocks)"
    r"|proj_layers|shared|max_depth|per_"
)
HEADS = re.compile(r"(^|_)n?_?(num_)?\w*heads?(_kv)?$|num_\w*attention_heads")
KEY_HEADS = re.compile(r"key_value|kv_heads|heads_kv|kv$")
HEAD_SIZE = re.compile(r"head_dim|head_size|d_kv$|kv_channels|qk_(rope|nope)|rotary_dim|query_pre_attn")
WIDTH = re.compile(
    r"hidden|d_model|latents|n_embd|embed|intermediate|ffn|d_ff|inner|(^|_)dims?$|width|projection|lora_rank"
    r"|_dim(ensions?)?$|n_inner|d_inner|channels$|channel_list$|_dim_per_stage|conv_dim|filters|classifier_proj_size"
)
NOT_WIDTH = re.compile(
    r"num_channels|num_latents|max_|position|type_vocab|layers?$|num_conv|kernel|stride|ratio|in_channels$(?<!_in_channels)"
    r"|audio_channels|^embed_(?!dim)|per_(?!stage)|token|groups|num_embeddings"
)
NO_SIZES = frozenset({"transformers_version", "id2label", "label2id", "architectures", "dtype"})
NOT_BROAD = re.compile(r"_id$|window|rate|bins|frames|kernel|stride|max_|patch|theta|samples|length")
EXPERTS = re.compile(r"experts?$|routed_experts")
PER_TOKEN = re.compile(r"experts_per_tok|moe_(topk|k)$|top_?k(_group)?$")
POSITIONS = re.compile(r"(max|n|num)_\w*positions?(_embeddings)?$|n_ctx|max_seq_len|max_length")
TOKEN = re.compile(r"token_(id|index|ids)$|^(pad|bos|eos|sep|cls|mask|unk)_index$")
PICTURE = re.compile(r"image_size|img_size|input_size$|pretrain_image_size")
PICTURE_BORDER = re.compile(r"visual_prompt_size$")
"""Parts of a side of a picture, which shrink with it."""
PICTURE_TOKENS = re.compile(r"mm_tokens_per_image|image_seq_length|num_patches$")
INDICES = re.compile(r"indices|indexe?s?$|layer_ids?$|layer_idx|feature_layers?$")
QUERIES = re.compile(
    r"num_quer(y_tokens|ies)$|num_latents|num_denoising|train_num_points|resampler_n_latents"
)


def is_drop(name: str) -> bool:
    """Whether a field is a probability of dropping or masking.

    >>> [is_drop(n) for n in ("attn_pdrop", "hidden_dropout_prob", "mask_time_prob", "norm_topk_prob")]
    [True, True, True, False]
    """
    return "drop" in name or (name.startswith("mask_") and name.endswith("_prob"))


def number_kind(name: str) -> str:
    """What a number in a configuration is, by the name of its field.

    >>> [number_kind(n) for n in ("num_hidden_layers", "bos_token_id", "vocab_size", "d_model")]
    ['layers', 'other', 'vocabulary', 'width']
    """
    if TOKEN.search(name) or (NOT_BROAD.search(name) and not POSITIONS.search(name)):
        return "other"
    kinds = (("vocabulary", "vocab"), ("positions", POSITIONS), ("picture", PICTURE),
             ("experts", EXPERTS), ("queries", QUERIES))  # fmt: skip
    for kind, pattern in kinds:
        if re.search(pattern, name):
            return kind
    if LAYERS.search(name) and not NOT_LAYERS.search(name):
        return "layers"
    return "width"
