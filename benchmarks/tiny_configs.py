"""Small configurations of any transformers architecture, made by scaling its published sizes.

Nothing is known here of any architecture: `tiny_fields` recognises a size by its field's name, and
`tiny_scale` tells what becomes of it.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from tiny_blanks import filled, guessed
from tiny_defaults import default_config, names_of_parts, parts_of, read
from tiny_fields import NO_SIZES, NOT_WIDTH, WIDTH, is_drop, number_kind
from tiny_hints import Hints
from tiny_scale import PICTURE_SIZES, Scale, Style, first_int


def tiny_config(config_class: Any, style: Style, hints: Hints = MappingProxyType({})) -> Any:
    """A small configuration of a class of transformers.

    Args:
        config_class: The class.
        style: How strongly to scale.
        hints: Fields that must be a number or stay as they are by default; empty ones are filled in.

    Raises:
        Exception: Whatever the class raises at values it does not accept.
    """
    base = default_config(config_class, hints)
    tokens: dict[int, int] = {}
    config = _shrunk(base, style, tokens, hints)
    return without_cache(config)


def without_cache(config: Any) -> Any:
    """The configuration set for whole sequences at once."""
    for path, part in parts_of(config):
        if getattr(part, "use_cache", None):
            part.use_cache = False
        decodes = getattr(part, "is_encoder_decoder", False) or "decoder" in "".join(path[-1:])
        if decodes and read(part, "decoder_start_token_id") is None:
            part.decoder_start_token_id = read(part, "pad_token_id") or 0
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


def _plain_fields(config: Any) -> list[tuple[str, Any]]:
    return [(k, v) for k, v in vars(config).items() if not k.startswith("_")]


def _shrunk(base: Any, style: Style, tokens: dict[int, int], hints: Hints) -> Any:
    """A scaled copy; fields that the class derives from others are left for it to derive."""
    usual = type(base)()
    values: dict[str, Any] = {}
    inner = set(names_of_parts(base))
    scale = Scale.of(base, style)
    for spec in dataclasses.fields(base):
        name, value = spec.name, read(base, spec.name)
        if name in inner:
            if value is not None:
                values[name] = _shrunk(value, style, tokens, hints)
            continue
        if hints.get(name) is not None:
            values[name] = hints[name]
            continue
        derived = _is_derived(spec)
        if value in ((), []) and name in hints:
            value = guessed(name, str(spec.type), base)
        if value is None:
            value = filled(name, base, scale, tokens)
            if value is None and name in hints:
                value = guessed(name, str(spec.type), base)
            if name == "vocab_size" and value is not None:
                values["pad_token_id"] = 1
        if value is None or name in NO_SIZES:
            continue
        if derived and _same(value, read(usual, name)) and not _is_size_of_its_own(name, value):
            continue
        made = scale.value(name, value, tokens) if name not in hints else value
        if isinstance(made, list) and len(made) == scale.layers > scale.few > 0:
            made = _one_for_each_layer(made, scale.few)
        if not derived and _same(made, _default(spec)):
            continue
        values[name] = made
    indices = read(base, "out_indices")
    if isinstance(indices, (list, tuple)) and not _same(indices, read(usual, "out_indices")):
        values["out_indices"] = scale.value("out_indices", list(indices), tokens)
    made = type(base)(**_settings_beside(base, usual), **_divisible(base, values))
    for name in (key.partition(".")[2] for key in hints if key.startswith(f"{type(base).__name__}.")):
        of_part = next((n for part in inner if (n := read(read(made, part), name))), None)
        value = filled(name, base, scale, tokens) or guessed(name, "int | float", base)
        setattr(made, name, of_part or scale.value(name, value, tokens))
    return _with_rotary_parameters(made)


def _with_rotary_parameters(config: Any) -> Any:
    """The configuration with what rotary angles are made of, where a default leaves that empty.

    That is one entry for each type of layer, and the dimensions shared out among places of pictures.
    """
    rope = read(config, "rope_parameters")
    types = sorted(set(read(config, "layer_types") or ()))
    if rope == {} and types:
        config.rope_parameters = {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in types}
        return config
    known = getattr(config, "ignore_keys_at_rope_validation", None) or ()
    if "mrope_section" not in known or not isinstance(rope, dict) or "mrope_section" in rope:
        return config
    size = first_int(config, ("head_dim",))
    size = size or first_int(config, ("hidden_size",)) // first_int(config, ("num_attention_heads",))
    half = (int(size * rope.get("partial_rotary_factor", 1.0)) + 1) // 2
    third = -(-half // 3)  # the first two alike, which some pair up
    rope["mrope_section"] = [third, third, half - 2 * third]
    return config


def _settings_beside(base: Any, usual: Any) -> dict[str, Any]:
    """Switches that a composite gives one of its parts though that has no field for them."""
    fields = {spec.name for spec in dataclasses.fields(base)}
    before = vars(usual)
    return {
        name: value
        for name, value in _plain_fields(base)
        if name not in fields
        and name not in type(base).attribute_map
        and isinstance(value, (bool, str, float))
        and not _same(value, before.get(name))
    }


def rebuilt(base: Any, changes: Mapping[tuple[str, ...], int], path: tuple[str, ...] = ()) -> Any:
    """A copy with numbers changed, named by the fields that lead to them; derived fields follow."""
    usual = type(base)()
    inner = set(names_of_parts(base))
    layers = Scale.of(base, Style()).layers
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
            and name not in NO_SIZES
            and not (_is_derived(spec) and _same(value, read(usual, name)))
        ):
            made = list(value) if isinstance(value, tuple) else value
            if isinstance(made, list):
                made = [changes.get((*path, name, str(i)), v) for i, v in enumerate(made)]
            if isinstance(made, list) and len(made) == layers > few > 0:
                made = _one_for_each_layer(made, few)
            if not _same(made, _default(spec)):
                values[name] = made
    return type(base)(**_settings_beside(base, usual), **values)


def _is_derived(spec: "dataclasses.Field[Any]") -> bool:
    """Whether a class works a field out where it is not given."""
    return spec.default is None and spec.default_factory is dataclasses.MISSING


def _is_size_of_its_own(name: str, value: Any) -> bool:
    """Whether a class that fills a field in does so without looking at others, mostly."""
    if name in ("head_dim", *PICTURE_SIZES) or name.endswith(("feature_sizes", "feature_layer")):
        return True
    return isinstance(value, (list, tuple)) and bool(WIDTH.search(name)) and not NOT_WIDTH.search(name)


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
