"""Architectures of the transformers library by name, and their classes with a head.

An architecture is named by the prefix of its classes (`Llama`, `GPT2`, `T5`), by its model type (`llama`,
`gpt2`, `t5`), or by one of its classes (`LlamaForCausalLM`, `BarkCoarseConfig`); capitals, dashes and
underscores do not matter.
"""

import difflib
import functools
import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

_TASKS = (
    "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "MASKED_LM", "CAUSAL_LM", "IMAGE_TEXT_TO_TEXT",
    "MULTIMODAL_LM", "ZERO_SHOT_IMAGE_CLASSIFICATION", "IMAGE_CLASSIFICATION", "VIDEO_CLASSIFICATION",
    "AUDIO_CLASSIFICATION", "SEQUENCE_CLASSIFICATION", "TOKEN_CLASSIFICATION", "SEMANTIC_SEGMENTATION",
    "DEPTH_ESTIMATION", "TIME_SERIES_PREDICTION", "VISUAL_QUESTION_ANSWERING", "PRETRAINING",
    "RETRIEVAL", "CTC",
)  # fmt: skip
"""Tasks whose heads make a loss, those that architectures are best known for first."""


@dataclass(frozen=True)
class Architecture:
    """One entry of transformers.

    Attributes:
        name: The prefix of its classes, such as `GPT2`.
        model_type: Its key in transformers, such as `gpt2`.
        config_class: The class of its configuration.
        head: The model class that was named, where one was.
    """

    name: str
    model_type: str
    config_class: Any
    head: Any = None


def transformers_library() -> Any:
    """The module `transformers`.

    Raises:
        ValueError: It is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise ValueError(
            "hf: models need transformers; install it with `pip install graphpar[hf]`"
        ) from error
    return transformers


def find_architecture(name: str) -> Architecture:
    """The architecture that a prefix, a model type or a class names.

    Raises:
        ValueError: There is none; says which are nearest.
    """
    known = _by_key()
    model_type = known.get(_key(name)) or known.get(_key(name.removesuffix("Config")))
    if model_type is None and (named := _by_class(name)) is not None:
        return named
    if model_type is None:
        near = difflib.get_close_matches(_key(name), list(known), 3, 0.5)
        hint = f"; the nearest are {', '.join(known[k] for k in near)}" if near else ""
        version = transformers_library().__version__
        raise ValueError(f"transformers {version} has no architecture {name!r}{hint}")
    config_class = transformers_library().CONFIG_MAPPING[model_type]
    return Architecture(config_class.__name__.removesuffix("Config"), model_type, config_class)


def model_types() -> tuple[str, ...]:
    """Model types of all architectures, those of parts of models among them."""
    auto = transformers_library().models.auto
    return tuple(auto.configuration_auto.CONFIG_MAPPING_NAMES)


def head_classes(architecture: Architecture, is_encoder_decoder: bool) -> Iterator[Any]:
    """Model classes of an architecture: those with a head that makes a loss first, the bare one last."""
    if architecture.head is not None:
        yield architecture.head
        return
    library = transformers_library()
    known = library.models.auto.modeling_auto
    seen = set()
    for task in (*_TASKS, None):
        if task == "CAUSAL_LM" and is_encoder_decoder:
            continue
        mapping = getattr(known, f"MODEL_FOR_{task}_MAPPING_NAMES" if task else "MODEL_MAPPING_NAMES", {})
        given = mapping.get(architecture.model_type, ())
        for class_name in (given,) if isinstance(given, str) else given:
            made = getattr(library, class_name, None)
            if made is not None and made not in seen:
                seen.add(made)
                yield made
    yield from (c for c in _own_classes(architecture) if c not in seen)


def config_for(made: Any, config: Any) -> Any:
    """The configuration that a model class takes: the one given, or the part of it that is of its kind.

    Some mappings list, for a composite, the class of one of its parts.
    """
    wanted = getattr(made, "config_class", None)
    if wanted is None or isinstance(config, wanted):
        return config
    parts = (getattr(config, name, None) for name in getattr(config, "sub_configs", {}))
    return next((part for part in parts if isinstance(part, wanted)), config)


def _own_classes(architecture: Architecture) -> Iterator[Any]:
    """Model classes beside the configuration that no mapping mentions, the bare one first.

    Where none of a composite's own can be called, those of its parts.
    """
    config_class = architecture.config_class
    found = sorted(_classes_beside(config_class), key=lambda c: c.__name__)
    own = [c for c in found if c.config_class is config_class]
    usual = f"{architecture.name}Model"
    yield from sorted(own, key=lambda c: c.__name__ != usual)
    if own and not any(map(_can_be_called, own)):
        for part in getattr(config_class, "sub_configs", {}).values():
            theirs = [c for c in found if c.config_class is part and _can_be_called(c)]
            yield from sorted(theirs, key=lambda c: "For" not in c.__name__)


def _classes_beside(config_class: Any) -> set[Any]:
    """All classes of models in the package of a configuration."""
    library = transformers_library()
    package = config_class.__module__.rpartition(".")[0]
    found = set()
    for module_name in sorted(sys.modules[package].__dir__()) if package in sys.modules else ():
        if not module_name.startswith("modeling_"):
            continue
        found |= {
            value
            for name, value in vars(getattr(sys.modules[package], module_name)).items()
            if inspect.isclass(value)
            and issubclass(value, library.PreTrainedModel)
            and "PreTrainedModel" not in name
            and getattr(value, "config_class", None) is not None
        }
    return found


def _can_be_called(made: Any) -> bool:
    return made.forward is not nn.Module.forward


def _by_class(name: str) -> Architecture | None:
    """The architecture that a class of transformers belongs to, of a model or of a configuration."""
    library = transformers_library()
    exported = _classes_by_key().get(_key(name))
    found: Any = getattr(library, exported, None) if exported else None
    is_model = inspect.isclass(found) and issubclass(found, library.PreTrainedModel)
    config_class: Any = getattr(found, "config_class", None) if is_model else found
    if not isinstance(config_class, type) or not getattr(config_class, "model_type", ""):
        return None
    prefix = config_class.__name__.removesuffix("Config")
    head = found if is_model and _can_be_called(found) else None
    return Architecture(prefix, getattr(config_class, "model_type", ""), config_class, head)


@functools.cache
def _classes_by_key() -> dict[str, str]:
    return {_key(name): name for name in dir(transformers_library()) if name[:1].isupper()}


def _key(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())


@functools.cache
def _by_key() -> dict[str, str]:
    names = transformers_library().models.auto.configuration_auto.CONFIG_MAPPING_NAMES
    found = {_key(config.removesuffix("Config")): model_type for model_type, config in names.items()}
    return found | {_key(model_type): model_type for model_type in names}
