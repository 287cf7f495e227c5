"""Default configurations of transformers, also of composites and of those that need other libraries."""

import importlib.util
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import transformers

_MADE_BY = {"timm_backbone": "timm", "timm_wrapper": "timm"}
"""Model types whose layers another library makes."""
_USUAL_PARTS = {
    "vision": "vit", "image": "vit", "backbone": "resnet", "audio": "wav2vec2", "speech": "wav2vec2",
    "text": "bert", "decoder": "bert", "encoder": "bert",
}  # fmt: skip
"""Models for the parts of composites that hold any model, by words in the name of the part."""


def default_config(config_class: Any, demanded: Mapping[str, int | None] = MappingProxyType({})) -> Any:
    """The default configuration; where a composite has no default parts, one of parts that are usual.

    Args:
        config_class: Its class.
        demanded: Numbers that fields of the parts must have where the composite refuses others.

    Raises:
        Exception: Whatever the class raises where it has neither.
    """
    parts = dict(getattr(config_class, "sub_configs", {}))
    try:
        made = config_class()
        lacking = [n for n in parts if _lacks_library(read(made, n))]
        if not lacking:
            return made
        parts = {n: kind for n, kind in parts.items() if n in lacking}
    except Exception:
        if not parts:
            raise
    family = config_class.model_type
    made = {name: _usual_part(name, kind, family) for name, kind in parts.items()}
    for part in made.values():
        for name, number in demanded.items():
            if number is not None and read(part, name) is not None:
                setattr(part, name, number)
    try:
        return config_class(**made)
    except TypeError:  # parts given as dictionaries
        return config_class(**{name: part.to_dict() for name, part in made.items()})


def _lacks_library(part: Any) -> bool:
    """Whether a part of a configuration is made by another library that is not installed."""
    wanted = _MADE_BY.get(getattr(part, "model_type", ""))
    return wanted is not None and importlib.util.find_spec(wanted) is None


def _usual_part(name: str, kind: Any, family: str) -> Any:
    """The default of a part whose kind is told by its class, by its family, or by what it is called."""
    if kind.__name__ != "AutoConfig":
        return default_config(kind)
    known = list(transformers.CONFIG_MAPPING)
    word = name.removesuffix("_config").removesuffix("_model")
    stems = ["_".join(family.split("_")[:n]) for n in range(family.count("_") + 1, 0, -1)]
    relatives = [f"{stem}_{word}" for stem in stems if f"{stem}_{word}" in known]
    usual = next((t for part, t in _USUAL_PARTS.items() if part in name), "bert")
    made = default_config(transformers.CONFIG_MAPPING[relatives[0] if relatives else usual])
    if "decoder" in name:
        made.is_decoder = made.add_cross_attention = True
    return made


def read(config: Any, name: str) -> Any:
    """A field of a configuration; None where it has none, or one for each layer."""
    try:
        return getattr(config, name, None)
    except Exception:  # transformers has an error of its own for fields that differ between layers
        return None


def parts_of(config: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The configuration and those inside it, each with the fields that lead to it."""
    yield path, config
    for name in names_of_parts(config):
        inner = read(config, name)
        if inner is not None and not isinstance(inner, Mapping):
            yield from parts_of(inner, (*path, name))


def names_of_parts(config: Any) -> list[str]:
    """Fields that hold a configuration, declared as such or not."""
    declared = list(getattr(config, "sub_configs", {}))
    held = (k for k, v in vars(config).items() if isinstance(v, transformers.PreTrainedConfig))
    return [*declared, *(name for name in held if name not in declared and not name.startswith("_"))]
