"""How published configurations shrink: what fits together before does so afterwards."""

import dataclasses
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers")

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from tiny_blanks import filled, guessed
from tiny_configs import tiny_config
from tiny_hints import fields_named, numbers_demanded
from tiny_scale import STYLES, VOCABULARY, Scale


def made_up(**fields: Any) -> Any:
    """A configuration of no architecture."""
    return dataclasses.make_dataclass("MadeUp", [(k, type(v)) for k, v in fields.items()])(**fields)


def shrunk(style: int = 0, **fields: Any) -> dict[str, Any]:
    """What becomes of the fields of a configuration."""
    scale = Scale.of(made_up(**fields), STYLES[style])
    tokens: dict[int, int] = {}
    return {name: scale.value(name, value, tokens) for name, value in fields.items()}


@settings(max_examples=25)
@given(
    heads=st.integers(1, 96),
    size=st.sampled_from([16, 24, 32, 64, 80, 96, 128, 256]),
    shared=st.sampled_from([1, 2, 3, 4, 8]),
    groups=st.sampled_from([1, 2, 4, 8, 16, 32]),
    style=st.sampled_from([0, 1, 3]),
)
def test_widths_heads_and_groups_divide(
    heads: int, size: int, shared: int, groups: int, style: int
) -> None:
    keys = heads // shared if heads % shared == 0 else heads
    made = shrunk(
        style,
        hidden_size=heads * size,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        head_dim=size,
        num_conv_groups=groups,
    )
    assert made["hidden_size"] == made["num_attention_heads"] * made["head_dim"]
    assert made["num_attention_heads"] % made["num_key_value_heads"] == 0
    assert made["hidden_size"] % made["num_conv_groups"] == 0
    assert made["hidden_size"] <= heads * size


@settings(max_examples=25)
@given(patch=st.integers(1, 32), patches=st.integers(1, 64), style=st.sampled_from(range(len(STYLES))))
def test_pictures_stay_whole_patches(patch: int, patches: int, style: int) -> None:
    made = shrunk(style, image_size=patch * patches, patch_size=patch, hidden_size=64)
    assert made["patch_size"] == patch and made["image_size"] % patch == 0
    assert 0 < made["image_size"] <= patch * patches


def test_maps_and_borders_shrink_with_their_picture() -> None:
    made = shrunk(
        image_size=512,
        patch_size=16,
        hidden_size=64,
        backbone_feature_sizes=[[128, 128], [64, 64], [2, 2]],
        visual_prompt_size=128,
        image_seq_length=1024,
    )
    assert made["image_size"] == 64
    assert made["backbone_feature_sizes"] == [[16, 16], [8, 8], [1, 1]]
    assert made["visual_prompt_size"] == 16 and made["image_seq_length"] == 16


@settings(max_examples=25)
@given(st.lists(st.integers(1, 40), min_size=2, max_size=4), st.sampled_from([64, 128, 256]))
def test_sections_of_rotary_angles_add_up(sections: list[int], size: int) -> None:
    scale = Scale.of(made_up(hidden_size=4 * size, num_attention_heads=4, head_dim=size), STYLES[0])
    rope = scale.value("rope_parameters", {"mrope_section": sections, "rope_theta": 1e4}, {})
    assert sum(rope["mrope_section"]) == sum(sections) // scale.smaller
    assert min(rope["mrope_section"]) >= 0 and rope["rope_theta"] == 1e4


@settings(max_examples=25)
@given(layers=st.integers(3, 48), places=st.data(), style=st.sampled_from([0, 1, 3]))
def test_indices_of_layers_stay_apart_and_in_range(
    layers: int, places: st.DataObject, style: int
) -> None:
    few = min(layers, STYLES[style].layers)
    chosen = sorted(places.draw(st.sets(st.integers(0, layers - 1), min_size=1, max_size=few)))
    made = shrunk(style, num_hidden_layers=layers, hidden_size=64, out_indices=chosen)
    assert made["num_hidden_layers"] == few
    assert sorted(set(made["out_indices"])) == made["out_indices"] and len(chosen) == len(
        made["out_indices"]
    )
    assert all(0 <= index < few for index in made["out_indices"])


def test_special_tokens_keep_apart_beyond_the_words() -> None:
    scale = Scale.of(made_up(vocab_size=50_000, hidden_size=64), STYLES[0])
    tokens: dict[int, int] = {}
    ids = [
        scale.value(name, number, tokens)
        for name, number in [
            ("bos_token_id", 49_000),
            ("image_token_id", 49_001),
            ("eos_token_id", 49_000),
        ]
    ]
    assert ids[0] == ids[2] != ids[1] and max(ids) < VOCABULARY
    assert scale.value("pad_token_id", 3, tokens) == 3
    placeholder = filled("video_token_id", made_up(hidden_size=64), scale, tokens)
    assert placeholder not in tokens and placeholder >= VOCABULARY


@pytest.mark.parametrize(
    ("name", "kind", "wanted"),
    [
        ("rope_theta", "float | None", 1e4),
        ("sliding_window", "int | None", 4),
        ("num_heads", "int | None", 4),
        ("kv_channels", "int | None", 16),
        ("inner_dim", "int | None", 64),
        ("start_token_id", "int | None", 0),
        ("scores", "dict | None", {}),
        ("layer_types", "list[str] | None", ["full_attention"] * 2),
        ("names", "list[str] | None", None),
        ("level_scale_factors", "list[float] | tuple[float, ...]", [1.0]),
        ("window_indices", "list[int] | tuple[int, ...]", None),
    ],
)
def test_empty_fields_get_what_their_names_tell(name: str, kind: str, wanted: Any) -> None:
    base = made_up(hidden_size=64, num_attention_heads=4, head_dim=16, num_hidden_layers=2)
    assert guessed(name, kind, base) == wanted


def test_fields_that_a_refusal_names_are_hints_and_common_ones_are_not() -> None:
    config = made_up(hidden_size=64, index_topk=2, index_pool=16)
    said = ValueError("index_topk (2) must be divisible by index_pool (16) for hidden_size")
    assert fields_named(said, config) == {"index_pool": None, "index_topk": None}
    lacks = AttributeError("'MadeUpConfig' object has no attribute 'ratio'")
    assert fields_named(lacks, config) == {"MadeUpConfig.ratio": None}
    assert fields_named(ValueError("index_topk must be 8"), config) == {"index_topk": 8}
    assert numbers_demanded(ValueError("nothing is said of numbers")) == {}


@dataclasses.dataclass
class PartConfig:
    """A part that reads pictures."""

    hidden_size: int = 768
    num_attention_heads: int = 12


@dataclasses.dataclass
class WholeConfig:
    """A composite that takes another width of its part than that has, and no level of a pyramid."""

    backbone: Any = dataclasses.field(default_factory=PartConfig)
    hidden_size: int = 384
    level_factors: list[float] | tuple[float, ...] = ()
    window_indices: list[int] | tuple[int, ...] = ()
    sub_configs: ClassVar[dict[str, Any]] = {"backbone": PartConfig}
    attribute_map: ClassVar[dict[str, str]] = {}


CHANNELS = RuntimeError(
    "Given groups=1, weight of size [64, 144, 3, 3], expected input[4, 112, 8, 8] to have 144 channels, "
    "but got 112 channels instead"
)
EMPTY = ValueError("torch.cat(): expected a non-empty list of Tensors")


def test_a_whole_gets_the_width_of_its_part_where_channels_do_not_fit() -> None:
    hints = fields_named(CHANNELS, WholeConfig())
    assert hints == {"WholeConfig.hidden_size": None}
    before, made = tiny_config(WholeConfig, STYLES[0]), tiny_config(WholeConfig, STYLES[0], hints)
    assert before.hidden_size != before.backbone.hidden_size
    assert made.hidden_size == made.backbone.hidden_size == before.backbone.hidden_size < 768
    assert fields_named(CHANNELS, WholeConfig(hidden_size=768)) == {}


def test_an_empty_list_of_factors_is_filled_where_a_model_makes_nothing_of_it() -> None:
    hints = fields_named(EMPTY, WholeConfig())
    assert hints == {"level_factors": None}
    assert not tiny_config(WholeConfig, STYLES[0]).level_factors
    made = tiny_config(WholeConfig, STYLES[0], hints)
    assert made.level_factors == [1.0] and not made.window_indices
