"""By how much the sizes of a configuration shrink, so that their relations survive.

Widths shrink by the product of the factors by which the number of heads and the size of a head shrink, so
that heads times head size stays the width; layers fall to a few; vocabularies, experts, positions and
pictures become small. Where a model still refuses, a milder scaling is tried: see `STYLES`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Any

from tiny_defaults import parts_of, read
from tiny_fields import (
    EXPERTS,
    HEAD_SIZE,
    HEADS,
    INDICES,
    KEY_HEADS,
    LAYERS,
    NOT_BROAD,
    NOT_LAYERS,
    NOT_WIDTH,
    PER_TOKEN,
    PICTURE,
    PICTURE_BORDER,
    PICTURE_TOKENS,
    POSITIONS,
    QUERIES,
    TOKEN,
    WIDTH,
)

VOCABULARY = 160
"""Words; the ids of special tokens that lie beyond it are moved to its end, one by one."""
FIRST_WORD, LAST_WORD = 10, 110
"""Ids of ordinary words: below and above lie those of special tokens."""
MAX_POSITIONS = 96
PICTURE_SIZES = ("image_size", "img_size", "max_img_size", "crop_size")
"""Fields that tell how many points a side of a picture has."""
LARGE_PICTURE = 512
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


@dataclass(frozen=True)
class Scale:
    """By how much the sizes of one configuration shrink.

    Attributes:
        style: What is wanted.
        heads: Number of heads before.
        width: Width before.
        fewer: Factor by which the number of heads shrinks.
        smaller: Factor by which the size of a head shrinks.
        patches: Places of a picture before and after.
        points: Points along a side of a picture before and after.
        patch: Size of a patch.
        layers: Number of layers before.
    """

    style: Style
    heads: int
    width: int
    fewer: int
    smaller: int
    patches: tuple[int, int]
    points: tuple[int, int]
    patch: int
    layers: int

    @classmethod
    def of(cls, config: Any, style: Style) -> "Scale":
        """The factors for one configuration."""
        others = [s.name for s in dataclasses.fields(config) if HEADS.search(s.name)]
        heads = first_int(config, ("num_attention_heads", "n_head", "num_heads", "n_heads",
                                    "encoder_attention_heads", "attention_heads", *others))  # fmt: skip
        width = first_int(
            config, ("hidden_size", "d_model", "n_embd", "embed_dim", "dim", "embedding_size")
        )
        size = first_int(config, ("head_dim", "d_kv", "attention_head_size"))
        if not size and heads and width:
            size = width // heads
        fewer = _factor(heads, style.heads) if heads and style.head_size else 1
        smaller = 1
        if style.head_size:
            smaller = _factor(size, style.head_size) if size else _power(_widest(config) // 64)
        if style.uniform:
            fewer, smaller = 1, style.uniform
        patch, before = _picture(config)
        after = _small_picture(before, patch) if style.pictures else before
        layers = first_int(config, ("num_hidden_layers", "n_layer", "num_layers", "encoder_layers",
                                     "n_layers", "depth"))  # fmt: skip
        places = (max(before // patch, 1) ** 2, max(after // patch, 1) ** 2)
        sides = (before, after)
        return cls(style, heads or 1, width, fewer, smaller, places, sides, patch, layers or 0)

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
        if name.endswith("feature_sizes") and isinstance(value, (list, tuple)):
            return [self._places(size) for size in value]
        if isinstance(value, tuple):
            return list(value)  # as in a configuration that is read from a file
        if name == "rope_parameters" and isinstance(value, Mapping):
            return self._rope(value)
        return value

    def _places(self, size: Any) -> Any:
        """Sides of a map of features, which shrink with the picture."""
        if isinstance(size, (list, tuple)):
            return [self._places(side) for side in size]
        return max(1, size * self.points[1] // self.points[0])

    def _number(self, name: str, value: int, tokens: dict[int, int]) -> int:
        if value <= 1:
            return value
        if TOKEN.search(name):
            if value < FIRST_WORD:
                return value
            return tokens.setdefault(value, VOCABULARY - 1 - len(tokens))
        if "vocab" in name:
            return min(value, VOCABULARY)
        if POSITIONS.search(name):
            return min(value, MAX_POSITIONS)
        if PICTURE_TOKENS.search(name):
            return max(1, value * self.patches[1] // self.patches[0])
        if name == "image_embedding_size":  # places of a picture along one side
            return max(1, value * isqrt(self.patches[1]) // isqrt(self.patches[0]))
        if PICTURE_BORDER.search(name):
            return max(1, value * self.points[1] // self.points[0])
        if PICTURE.search(name):
            return _small_picture(value, self.patch) if self.style.pictures else value
        if name == "first_k_dense_replace":
            return 1
        if PER_TOKEN.search(name):
            return min(value, 1 if "group" in name else 2)
        if EXPERTS.search(name):
            return min(value, 1 if "shared" in name else 8)
        if name in ("n_group", "num_expert_group"):
            return 2
        if QUERIES.search(name):
            return min(value, 16)
        if name.endswith("groups"):
            return self._groups(value)
        if LAYERS.search(name) and not NOT_LAYERS.search(name):
            return min(value, self.style.layers)
        return self._width(name, value)

    def _groups(self, value: int) -> int:
        """Groups of channels: one for each stays so, others are a part of them."""
        width = _divided(self.width, self.smaller * self.fewer)
        if value == self.width:
            return width
        by = self.fewer if self.heads > 1 else self.smaller
        fewer = value if value <= 4 else max(1, value // by)
        return next(n for n in range(fewer, 0, -1) if width % n == 0)

    def _width(self, name: str, value: int) -> int:
        if not self.style.head_size:
            return value
        if HEAD_SIZE.search(name):
            return _divided(value, self.smaller)
        if HEADS.search(name):
            if KEY_HEADS.search(name):
                return self._key_heads(value)
            return value // self.fewer if value % self.fewer == 0 else value
        if WIDTH.search(name) and not NOT_WIDTH.search(name) and value > 8:
            return _divided(value, self.smaller * self.fewer)
        if self.style.broad and value >= BROAD and not NOT_BROAD.search(name):
            return _divided(value, self.smaller * self.fewer)
        return value

    def _key_heads(self, value: int) -> int:
        left = self.heads // self.fewer
        if value >= self.heads:
            return left
        return 2 if left % 2 == 0 and left > 2 else 1

    def _list(self, name: str, value: Sequence[int], tokens: dict[int, int]) -> list[int]:
        if name == "depths" or (LAYERS.search(name) and not NOT_LAYERS.search(name)):
            if self.style.layers > 2:
                return [min(v, self.style.layers) for v in value]
            return [min(v, 2 if i == 0 else 1) for i, v in enumerate(value)]
        if INDICES.search(name) and (self.layers or name.endswith(("feature_layer", "feature_layers"))):
            return self._indices(value)
        if HEADS.search(name):
            return list(value)
        return [self._number(name, v, tokens) for v in value]

    def _indices(self, value: Sequence[int]) -> list[int]:
        """Numbers of layers: in proportion, or the last ones where those would fall together."""
        layers = self.layers or max(value) + 1
        last = min(layers, self.style.layers)
        scaled = [v if v < 0 else v * last // layers for v in value]
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


def first_int(config: Any, names: Sequence[str]) -> int:
    for name in names:
        value = read(config, name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return 0


def _widest(config: Any) -> int:
    """The largest width of a configuration without heads, mostly one of convolutions.

    Where a list tells by how much each of several stages samples down, each doubles the filters.
    """
    found = [64]
    stages = [read(config, name) for name in ("downsampling_ratios", "upsampling_ratios")]
    doublings = max((len(s) for s in stages if isinstance(s, (list, tuple))), default=0)
    found += [first_int(config, ("num_filters",)) << doublings]
    for spec in dataclasses.fields(config):
        if WIDTH.search(spec.name) and not NOT_WIDTH.search(spec.name):
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


def _picture(config: Any) -> tuple[int, int]:
    """Points of a patch and of a picture along a side, in the configuration or else in one inside it."""
    for _, part in parts_of(config):
        side = next((n for name in PICTURE_SIZES if (n := _side(read(part, name), 0))), 0)
        if side:
            return _side(read(part, "patch_size"), -1) or 1, side
    return _side(read(config, "patch_size"), -1) or 1, 224


def _side(value: Any, place: int) -> int:
    """One number of a size along both sides; 0 where it is none."""
    if isinstance(value, (list, tuple)) and value:
        value = value[place]
    return value if isinstance(value, int) and value > 0 else 0


def _small_picture(size: int, patch: int) -> int:
    """A picture of few patches, of at least 32 points, or 64 where nothing tells a large one's patches.

    >>> [_small_picture(*sizes) for sizes in ((224, 16), (224, 14), (224, 4), (28, 4), (1024, 1))]
    [64, 56, 32, 28, 64]
    """
    least = 64 if patch == 1 and size >= LARGE_PICTURE else 32
    return min(size, -(-max(4 * patch, least) // patch) * patch)
