"""Small configurations of any transformers architecture, made by scaling its published sizes.

Nothing is known here of any architecture. A size is recognised by its field's name and scaled so that
the relations that configurations have among each other survive: widths shrink by the product of the
factors by which the number of heads and the size of a head shrink, so that heads times head size stays
the width; layers fall to a few; vocabularies, experts, positions and pictures become small. Where a
model still refuses, a milder scaling is tried: see `STYLES`.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Any

from tiny_defaults import default_config, parts_of, read

VOCABULARY = 160
"""Words; the ids of special tokens that lie beyond it are moved to its end, one by one."""
FIRST_WORD, LAST_WORD = 10, 110
"""Ids of ordinary words: below and above lie those of special tokens."""
POSITIONS = 96
BROAD = 48
"""Numbers from here on are sizes rather than counts, whatever they are called."""


@dataclass(frozen=True)
class Style:
    """How strongly to scale.

    Attributes:
        head_size: What the size of a head should become; 0 leaves widths and heads alone.
        heads: What the number of heads should at most become.
        layers: What the number of layers should become.
        pictures: Whether pictures shrink too.
        uniform: Divide all widths of all parts by this alone; for parts that share widths.
        broad: Whether every large number that is not known to be something else counts as a width.
    """

    head_size: int = 16
    heads: int = 4
    layers: int = 2
    pictures: bool = True
    uniform: int = 0
    broad: bool = False


STYLES = (
    Style(),
    Style(layers=4),
    Style(uniform=4, broad=True),
    Style(layers=8),
    Style(heads=10**6),
    Style(uniform=4),
    Style(uniform=2, broad=True, layers=4),
    Style(head_size=10**6, heads=2),
    Style(pictures=False),
    Style(head_size=32, heads=10**6, layers=4, pictures=False),
    Style(head_size=0),
    Style(head_size=0, pictures=False),
    Style(head_size=0, layers=10**6, pictures=False),
)
"""Tried in this order until one builds a model that runs."""

_LAYERS = re.compile(r"(^|_)(n_?|num_)?\w*(layers?|blocks|depth|repeats)$")
_NOT_LAYERS = re.compile(
    r"dense_replace|window_layers|shared_layers|feature_layer|adapter_layers|step$|_blocks$(?<!num_blocks)"
    r"|proj_layers|shared|max_depth|per_"
)
_HEADS = re.compile(r"(^|_)n?_?(num_)?\w*heads?(_kv)?$|num_\w*attention_heads")
_KEY_HEADS = re.compile(r"key_value|kv_heads|heads_kv|kv$")
_HEAD_SIZE = re.compile(r"head_dim|head_size|d_kv$|kv_channels|qk_(rope|nope)|rotary_dim|query_pre_attn")
_WIDTH = re.compile(
    r"hidden|d_model|latents|n_embd|embed|intermediate|ffn|d_ff|inner|(^|_)dims?$|width|projection|lora_rank"
    r"|_dim(ensions?)?$|n_inner|d_inner|channels$|conv_dim|filters|classifier_proj_size"
)
_NOT_WIDTH = re.compile(
    r"num_channels|num_latents|max_|position|type_vocab|layers?$|num_conv|kernel|stride|ratio|in_channels$(?<!_in_channels)"
    r"|audio_channels|^embed_(?!dim)|per_|token|groups|num_embeddings"
)
_NO_SIZES = frozenset({"transformers_version", "id2label", "label2id", "architectures", "dtype"})
_NOT_BROAD = re.compile(r"_id$|window|rate|bins|frames|kernel|stride|max_|patch|theta|samples|length")
_EXPERTS = re.compile(r"experts?$|routed_experts")
_PER_TOKEN = re.compile(r"experts_per_tok|moe_(topk|k)$|top_?k(_group)?$")
_POSITIONS = re.compile(r"(max|n|num)_\w*positions?(_embeddings)?$|n_ctx|max_seq_len|max_length")
_TOKEN = re.compile(r"token_(id|index|ids)$|^(pad|bos|eos|sep|cls|mask|unk)_index$")
_PICTURE = re.compile(r"image_size|img_size|input_size$|pretrain_image_size")
_PICTURE_TOKENS = re.compile(r"mm_tokens_per_image|image_seq_length|num_patches$")
_INDICES = re.compile(r"indices|indexe?s?$|layer_ids?$|layer_idx")
_QUERIES = re.compile(
    r"num_quer(y_tokens|ies)$|num_latents|num_denoising|train_num_points|resampler_n_latents"
)


def tiny_config(config_class: Any, style: Style) -> Any:
    """A small configuration of a class of transformers.

    Raises:
        Exception: Whatever the class raises at values it does not accept.
    """
    base = default_config(config_class)
    tokens: dict[int, int] = {}
    config = _shrunk(base, style, tokens)
    return without_cache(config)


def without_cache(config: Any) -> Any:
    """The configuration set for whole sequences at once."""
    for _, part in parts_of(config):
        if getattr(part, "use_cache", None):
            part.use_cache = False
    if config.is_encoder_decoder and read(config, "decoder_start_token_id") is None:
        config.decoder_start_token_id = read(config, "pad_token_id") or 0
    return config


def without_randomness(config: Any) -> Any:
    """The configuration with all its probabilities of dropping or masking set to zero."""
    for _, part in parts_of(config):
        for name, value in _plain_fields(part):
            if is_drop(name) and isinstance(value, float):
                setattr(part, name, 0.0)
    return config


def with_dropout(config: Any, probability: float = 0.1) -> Any:
    """The configuration with dropout where the architecture has it.

    Layers that are skipped at random and input spans that are masked at random are switched off: both
    are decided on the host, by NumPy or by a branch, so that no graph can hold them.
    """
    for _, part in parts_of(config):
        for name, value in _plain_fields(part):
            if is_drop(name) and isinstance(value, float):
                host = "layer" in name or "path" in name or "mask" in name
                setattr(part, name, 0.0 if host else probability)
    return config


def is_drop(name: str) -> bool:
    """Whether a field is a probability of dropping or masking.

    >>> [is_drop(n) for n in ("attn_pdrop", "hidden_dropout_prob", "mask_time_prob", "norm_topk_prob")]
    [True, True, True, False]
    """
    return "drop" in name or (name.startswith("mask_") and name.endswith("_prob"))


def _plain_fields(config: Any) -> list[tuple[str, Any]]:
    return [(k, v) for k, v in vars(config).items() if not k.startswith("_")]


def _shrunk(base: Any, style: Style, tokens: dict[int, int]) -> Any:
    """A scaled copy; fields that the class derives from others are left for it to derive."""
    usual = type(base)()
    values: dict[str, Any] = {}
    inner = set(getattr(base, "sub_configs", {}))
    scale = _Scale.of(base, style)
    for spec in dataclasses.fields(base):
        name, value = spec.name, read(base, spec.name)
        if name in inner:
            if value is not None:
                values[name] = _shrunk(value, style, tokens)
            continue
        derived = _is_derived(spec)
        if value is None and _PER_TOKEN.search(name) and "group" not in name:
            value = 2
        if value is None and _EXPERTS.search(name) and "shared" not in name:
            value = 8
        if value is None and _KEY_HEADS.search(name) and _HEADS.search(name):
            value = scale.heads
        if value is None and name == "head_dim":  # neither given nor derived from the others
            value = _first_int(base, ("hidden_size",)) // scale.heads or None
        if value is None and name == "vocab_size":
            value = VOCABULARY
            values["pad_token_id"] = 1
        if value is None and name.endswith(("prediction_length", "context_length")):
            value = 8
        if value is None or name in _NO_SIZES:
            continue
        if derived and _same(value, read(usual, name)) and name != "head_dim":
            continue
        made = scale.value(name, value, tokens)
        if isinstance(made, list) and len(made) == scale.layers > scale.few > 0:
            made = _one_for_each_layer(made, scale.few)
        if not derived and _same(made, _default(spec)):
            continue
        values[name] = made
    indices = read(base, "out_indices")
    if isinstance(indices, (list, tuple)) and not _same(indices, read(usual, "out_indices")):
        values["out_indices"] = scale.value("out_indices", list(indices), tokens)
    return type(base)(**_divisible(base, values))


def rebuilt(base: Any, changes: Mapping[tuple[str, ...], int], path: tuple[str, ...] = ()) -> Any:
    """A copy with numbers changed, named by the fields that lead to them; derived fields follow."""
    usual = type(base)()
    inner = set(getattr(base, "sub_configs", {}))
    layers = _Scale.of(base, Style()).layers
    few = next(
        (v for k, v in changes.items() if k[:-1] == path and number_kind(k[-1]) == "layers"), layers
    )
    values: dict[str, Any] = {}
    for spec in dataclasses.fields(base):
        name, value = spec.name, read(base, spec.name)
        if name in inner and value is not None and not isinstance(value, Mapping):
            values[name] = rebuilt(value, changes, (*path, name))
        elif (*path, name) in changes:
            values[name] = changes[*path, name]
        elif (
            value is not None
            and name not in _NO_SIZES
            and not (_is_derived(spec) and _same(value, read(usual, name)))
        ):
            made = list(value) if isinstance(value, tuple) else value
            if isinstance(made, list):
                made = [changes.get((*path, name, str(i)), v) for i, v in enumerate(made)]
            if isinstance(made, list) and len(made) == layers > few > 0:
                made = _one_for_each_layer(made, few)
            if not _same(made, _default(spec)):
                values[name] = made
    return type(base)(**values)


def number_kind(name: str) -> str:
    """What a number in a configuration is, by the name of its field.

    >>> [number_kind(n) for n in ("num_hidden_layers", "bos_token_id", "vocab_size", "d_model")]
    ['layers', 'other', 'vocabulary', 'width']
    """
    if _TOKEN.search(name) or (_NOT_BROAD.search(name) and not _POSITIONS.search(name)):
        return "other"
    kinds = (("vocabulary", "vocab"), ("positions", _POSITIONS), ("picture", _PICTURE),
             ("experts", _EXPERTS), ("queries", _QUERIES))  # fmt: skip
    for kind, pattern in kinds:
        if re.search(pattern, name):
            return kind
    if _LAYERS.search(name) and not _NOT_LAYERS.search(name):
        return "layers"
    return "width"


def _is_derived(spec: "dataclasses.Field[Any]") -> bool:
    """Whether a class works a field out where it is not given."""
    return spec.default is None and spec.default_factory is dataclasses.MISSING


def _one_for_each_layer(values: list[Any], layers: int) -> list[Any]:
    """What fewer layers get of a list with an entry for each: its beginning, every kind among it.

    >>> _one_for_each_layer(["a", "a", "a", "b", "a", "a", "a", "b"], 2)
    ['a', 'b']
    """
    kept = values[:layers]
    missing = [v for i, v in enumerate(values) if v not in kept and v not in values[:i]]
    for place, value in zip(range(layers - 1, 0, -1), missing, strict=False):
        kept[place] = value
    return kept


def _divisible(base: Any, values: dict[str, Any]) -> dict[str, Any]:
    """Values whose number of heads divides the width; not even all published ones do."""
    for width, heads in (("hidden_size", "num_attention_heads"), ("d_model", "num_heads")):
        broad, count = (values.get(n, read(base, n)) for n in (width, heads))
        if (
            type(broad) is int
            and type(count) is int
            and count
            and broad % count
            and not read(base, "head_dim")
        ):
            values[heads] = next(n for n in (4, 3, 2, 1) if broad % n == 0)
    return values


def _default(spec: "dataclasses.Field[Any]") -> Any:
    if spec.default is not dataclasses.MISSING:
        return spec.default
    return spec.default_factory() if spec.default_factory is not dataclasses.MISSING else None


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and bool(a == b)


@dataclass(frozen=True)
class _Scale:
    """By how much the sizes of one configuration shrink.

    Attributes:
        style: What is wanted.
        heads: Number of heads before.
        fewer: Factor by which the number of heads shrinks.
        smaller: Factor by which the size of a head shrinks.
        patches: Places of a picture before and after.
        patch: Size of a patch.
        layers: Number of layers before.
    """

    style: Style
    heads: int
    fewer: int
    smaller: int
    patches: tuple[int, int]
    patch: int
    layers: int

    @classmethod
    def of(cls, config: Any, style: Style) -> "_Scale":
        """The factors for one configuration."""
        others = [s.name for s in dataclasses.fields(config) if _HEADS.search(s.name)]
        heads = _first_int(config, ("num_attention_heads", "n_head", "num_heads", "n_heads",
                                    "encoder_attention_heads", "attention_heads", *others))  # fmt: skip
        width = _first_int(
            config, ("hidden_size", "d_model", "n_embd", "embed_dim", "dim", "embedding_size")
        )
        size = _first_int(config, ("head_dim", "d_kv", "attention_head_size"))
        if not size and heads and width:
            size = width // heads
        fewer = _factor(heads, style.heads) if heads and style.head_size else 1
        smaller = 1
        if style.head_size:
            smaller = _factor(size, style.head_size) if size else _power(_widest(config) // 64)
        if style.uniform:
            fewer, smaller = 1, style.uniform
        patch = _patch(config)
        before = _picture(config)
        after = _small_picture(before, patch) if style.pictures else before
        layers = _first_int(config, ("num_hidden_layers", "n_layer", "num_layers", "encoder_layers",
                                     "n_layers", "depth"))  # fmt: skip
        places = (max(before // patch, 1) ** 2, max(after // patch, 1) ** 2)
        return cls(style, heads or 1, fewer, smaller, places, patch, layers or 0)

    @property
    def few(self) -> int:
        """Number of layers afterwards."""
        return min(self.layers, self.style.layers)

    def value(self, name: str, value: Any, tokens: dict[int, int]) -> Any:
        """What a field becomes."""
        if isinstance(value, bool):
            return value
        if isinstance(value, int):
            return self._number(name, value, tokens)
        if isinstance(value, float) and name.endswith("depth_coefficient"):
            return min(value, 1.0)
        if isinstance(value, float) and name.endswith("width_coefficient") and self.style.head_size:
            return min(value, 1.0)
        if isinstance(value, (list, tuple)) and value and all(type(v) is int for v in value):
            return self._list(name, value, tokens)
        if isinstance(value, tuple):
            return list(value)  # as in a configuration that is read from a file
        if name == "rope_parameters" and isinstance(value, Mapping):
            return self._rope(value)
        return value

    def _number(self, name: str, value: int, tokens: dict[int, int]) -> int:
        if value <= 1:
            return value
        if _TOKEN.search(name):
            if value < FIRST_WORD:
                return value
            return tokens.setdefault(value, VOCABULARY - 1 - len(tokens))
        if "vocab" in name:
            return min(value, VOCABULARY)
        if _POSITIONS.search(name):
            return min(value, POSITIONS)
        if _PICTURE_TOKENS.search(name):
            return max(1, value * self.patches[1] // self.patches[0])
        if name == "image_embedding_size":  # places of a picture along one side
            return max(1, value * isqrt(self.patches[1]) // isqrt(self.patches[0]))
        if _PICTURE.search(name):
            return _small_picture(value, self.patch) if self.style.pictures else value
        if name == "first_k_dense_replace":
            return 1
        if _PER_TOKEN.search(name):
            return min(value, 1 if "group" in name else 2)
        if _EXPERTS.search(name):
            return min(value, 1 if "shared" in name else 8)
        if name in ("n_group", "num_expert_group"):
            return 2
        if _QUERIES.search(name):
            return min(value, 16)
        if name.endswith("groups"):
            by = self.fewer if self.heads > 1 else self.smaller
            return value if value <= 4 else max(1, value // by)
        if _LAYERS.search(name) and not _NOT_LAYERS.search(name):
            return min(value, self.style.layers)
        return self._width(name, value)

    def _width(self, name: str, value: int) -> int:
        if not self.style.head_size:
            return value
        if _HEAD_SIZE.search(name):
            return _divided(value, self.smaller)
        if _HEADS.search(name):
            if _KEY_HEADS.search(name):
                return self._key_heads(value)
            return value // self.fewer if value % self.fewer == 0 else value
        if _WIDTH.search(name) and not _NOT_WIDTH.search(name) and value > 8:
            return _divided(value, self.smaller * self.fewer)
        if self.style.broad and value >= BROAD and not _NOT_BROAD.search(name):
            return _divided(value, self.smaller * self.fewer)
        return value

    def _key_heads(self, value: int) -> int:
        left = self.heads // self.fewer
        if value >= self.heads:
            return left
        return 2 if left % 2 == 0 and left > 2 else 1

    def _list(self, name: str, value: Sequence[int], tokens: dict[int, int]) -> list[int]:
        if name == "depths" or (_LAYERS.search(name) and not _NOT_LAYERS.search(name)):
            if self.style.layers > 2:
                return [min(v, self.style.layers) for v in value]
            return [min(v, 2 if i == 0 else 1) for i, v in enumerate(value)]
        if _INDICES.search(name) and self.layers:
            return self._indices(value)
        if _HEADS.search(name):
            return list(value)
        return [self._number(name, v, tokens) for v in value]

    def _indices(self, value: Sequence[int]) -> list[int]:
        """Numbers of layers: in proportion, or the last ones where those would fall together."""
        last = self.few
        scaled = [v if v < 0 else v * last // self.layers for v in value]
        if len(set(scaled)) == len(scaled):
            return scaled
        top = max(max(scaled), len(scaled) - 1)
        return [top - len(scaled) + 1 + i for i in range(len(scaled))]

    def _rope(self, value: Mapping[str, Any]) -> dict[str, Any]:
        """Sections of rotary dimensions add up to half a head."""
        made = dict(value)
        for key, given in value.items():
            if key.endswith("section") and isinstance(given, (list, tuple)):
                parts = [v // self.smaller for v in given]
                parts[-1] += sum(given) // self.smaller - sum(parts)
                made[key] = parts
        return made


def _first_int(config: Any, names: Sequence[str]) -> int:
    for name in names:
        value = read(config, name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return 0


def _widest(config: Any) -> int:
    """The largest width of a configuration without heads, mostly one of convolutions."""
    found = [64]
    for spec in dataclasses.fields(config):
        if _WIDTH.search(spec.name) and not _NOT_WIDTH.search(spec.name):
            value = read(config, spec.name)
            found += [
                v for v in (value if isinstance(value, (list, tuple)) else [value]) if type(v) is int
            ]
    return max(found)


def _power(value: int) -> int:
    """The largest power of two up to a number, at most 8, so that narrow layers stay."""
    return min(8, 1 << max(value.bit_length() - 1, 0))


def _factor(value: int, wanted: int) -> int:
    """The largest divisor of `value` that leaves at least `wanted`, or less where nothing does.

    >>> _factor(64, 16), _factor(12, 4), _factor(71, 4), _factor(5, 4)
    (4, 3, 71, 1)
    """
    if value <= wanted:
        return 1
    exact = [d for d in range(1, value + 1) if value % d == 0 and value // d >= wanted]
    best = max(exact)
    return best if value // best <= 2 * wanted else value if value <= 100 else best


def _divided(value: int, by: int) -> int:
    if value % by == 0:
        return value // by
    return max(8, round(value / by / 8) * 8)


def _patch(config: Any) -> int:
    value = read(config, "patch_size")
    if isinstance(value, (list, tuple)) and value:
        value = value[-1]
    return value if isinstance(value, int) and value > 0 else 1


def _picture(config: Any) -> int:
    value = read(config, "image_size")
    if isinstance(value, (list, tuple)) and value:
        value = value[0]
    return value if isinstance(value, int) and value > 0 else 224


def _small_picture(size: int, patch: int) -> int:
    """A picture of few patches, and of at least 32 points.

    >>> _small_picture(224, 16), _small_picture(224, 14), _small_picture(224, 4), _small_picture(28, 4)
    (64, 56, 32, 28)
    """
    return min(size, -(-max(4 * patch, 32) // patch) * patch)
