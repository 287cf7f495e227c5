"""Models of the transformers library built from their configuration, with inputs to match.

Needs the extra `hf`; nothing is downloaded. Sizes are those of the published configurations
(`config.json` of each model on https://huggingface.co).
"""

import copy
import inspect
import itertools
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from graphpar.frontend.frames import being_built
from graphpar.hf.architectures import (
    Architecture,
    find_architecture,
    head_classes,
    transformers_library,
)
from graphpar.hf.inputs import Wanted, candidate_inputs, further_input
from graphpar.hf.repair import with_repairs

_LLAMA_3 = {"vocab_size": 128_256, "num_key_value_heads": 8, "max_position_embeddings": 8192}

PRESETS: dict[str, tuple[str, dict[str, int]]] = {
    "bert-base": ("bert", {}),
    "bert-large": (
        "bert",
        {
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
        },
    ),
    "gpt2": ("gpt2", {}),
    "gpt2-medium": ("gpt2", {"n_embd": 1024, "n_layer": 24, "n_head": 16}),
    "gpt2-large": ("gpt2", {"n_embd": 1280, "n_layer": 36, "n_head": 20}),
    "gpt2-xl": ("gpt2", {"n_embd": 1600, "n_layer": 48, "n_head": 25}),
    "llama-8b": (
        "llama",
        _LLAMA_3
        | {
            "hidden_size": 4096,
            "intermediate_size": 14_336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
        },
    ),
    "llama-70b": (
        "llama",
        _LLAMA_3
        | {
            "hidden_size": 8192,
            "intermediate_size": 28_672,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
        },
    ),
    "llama-405b": (
        "llama",
        _LLAMA_3
        | {
            "hidden_size": 16_384,
            "intermediate_size": 53_248,
            "num_hidden_layers": 126,
            "num_attention_heads": 128,
        },
    ),
    "t5-small": ("t5", {}),
    "t5-base": ("t5", {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12}),
    "vit-base": ("vit", {}),
    "vit-large": (
        "vit",
        {
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
        },
    ),
    "mixtral-8x7b": ("mixtral", {}),
    "mixtral-8x22b": (
        "mixtral",
        {
            "vocab_size": 32_768,
            "hidden_size": 6144,
            "intermediate_size": 16_384,
            "num_hidden_layers": 56,
            "num_attention_heads": 48,
            "max_position_embeddings": 65_536,
        },
    ),
    "deepseek-v3": ("deepseek_v3", {}),
}
"""Name to model type and what differs from that type's default configuration."""

_SEED = 0


def build_hf_model(name: str, seq_len: int) -> nn.Module:
    """A freshly initialised model by preset or architecture, on the current default device.

    Args:
        name: A key of `PRESETS`, or any architecture of transformers: its model type such as `bert`, the
            prefix of its classes such as `Bert`, or one of its model classes such as `BertForMaskedLM`.
        seq_len: Tokens per sample; learned position tables are widened to hold them.

    Raises:
        ValueError: The name is unknown, the model cannot be built, or transformers is not installed.
    """
    transformers_library()
    model_type, changes = PRESETS.get(name, (name, {}))
    try:
        architecture = find_architecture(model_type)
    except ValueError as error:
        raise ValueError(
            f"hf:{name} is not known; give one of {', '.join(PRESETS)}, or an architecture of "
            f"transformers such as bert, gpt2 or Llama ({error})"
        ) from error
    try:
        model = _built(architecture, changes, seq_len)
    except Exception as error:
        raise ValueError(_why_not_built(name, architecture, error)) from error
    if model is None:
        raise ValueError(f"hf:{name} is a part of models and has no model class of its own")
    return model


def _built(architecture: Architecture, changes: Mapping[str, Any], seq_len: int) -> nn.Module | None:
    """A model of the architecture's own configuration; None for one that is only a part of others."""
    transformers = transformers_library()
    model_type = architecture.model_type
    config = architecture.config_class(**changes)
    if hasattr(config, "use_cache"):
        config.use_cache = False
    positions = getattr(config, "max_position_embeddings", None)
    if isinstance(positions, int) and positions < seq_len:
        config.max_position_embeddings = seq_len
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = getattr(config, "pad_token_id", None)
    auto = _auto_class(transformers, model_type, bool(config.is_encoder_decoder))
    if auto is not None and architecture.head is None:
        made: nn.Module = auto.from_config(config)
        return made
    of_its_own = next(head_classes(architecture, bool(config.is_encoder_decoder)), None)
    return None if of_its_own is None else of_its_own(config)


def _why_not_built(name: str, architecture: Architecture, error: Exception) -> str:
    """Where and why a model could not be built, and what to do instead."""
    config = architecture.config_class.__name__
    remedy = (
        f"its default configuration may lack what it needs: build it with a {config} of your own in a "
        "function and give package.module:function"
    )
    if isinstance(error, ImportError):
        remedy = "install what it asks for"
    said = " ".join(str(error).split())[:300].rstrip(".")
    return (
        f"hf:{name} could not be built{being_built(error)}: {type(error).__name__}: {said}. "
        f"What to try: {remedy}."
    )


def is_hf_model(model: nn.Module) -> bool:
    """Whether the model's class comes from transformers, found without importing it."""
    return any(
        c.__module__.startswith("transformers.") and c.__name__ == "PreTrainedModel"
        for c in type(model).__mro__
    )


def hf_buffers(model: nn.Module, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Buffers of a transformers model that follow from its configuration, made on the CPU.

    No checkpoint holds them (rotary angles, position numbers). What the model's own initialisation does
    not set is left out, and so is everything for other models.
    """
    if not is_hf_model(model):
        return {}
    made: dict[str, torch.Tensor] = {}
    wanted = set(names)
    for path, module in model.named_modules():
        own = {n: b for n, b in module._buffers.items() if b is not None and _join(path, n) in wanted}
        if not own:
            continue
        first, second = (_initialised(model, module, own, fill) for fill in (0, 1))
        same = [n for n in own if torch.equal(first[n], second[n])]
        made.update({_join(path, n): first[n] for n in same})
    return made


def _initialised(
    model: Any, module: nn.Module, buffers: Mapping[str, torch.Tensor], fill: int
) -> dict[str, torch.Tensor]:
    """What the model's initialisation makes of a module's buffers; untouched ones stay filled."""
    fresh = copy.copy(module)
    fresh._parameters = {}
    fresh._buffers = {n: torch.full(b.shape, fill, dtype=b.dtype) for n, b in buffers.items()}
    with torch.random.fork_rng(devices=()), torch.no_grad():
        model._init_weights(fresh)
    return {n: b for n, b in fresh._buffers.items() if b is not None}


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def hf_inputs(model: nn.Module, batch_size: int, seq_len: int, train: bool) -> dict[str, Any]:
    """Random keyword arguments for a transformers model, on the model's device.

    Token models get `input_ids` (batch, seq) and no mask, for nothing is padded; image models get
    `pixel_values` (batch, channels, height, width). Training adds `labels`; encoder-decoders get
    `decoder_input_ids` otherwise.
    """
    config: Any = model.config
    accepted = inspect.signature(model.forward).parameters
    tensors = itertools.chain(model.parameters(), model.buffers())
    device = next(tensors, torch.empty(0)).device
    generator = None if device.type == "meta" else torch.Generator(device).manual_seed(_SEED)

    def integers(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, device=device, generator=generator)

    inputs: dict[str, Any] = {}
    if _is_unusual(model, accepted):
        return _tried_inputs(model, Wanted(batch_size, seq_len, labels=train, mask=False))
    if "pixel_values" in accepted and getattr(model, "main_input_name", "") == "pixel_values":
        vision = getattr(config, "vision_config", config)
        shape = (batch_size, vision.num_channels, vision.image_size, vision.image_size)
        inputs["pixel_values"] = torch.randn(shape, device=device, generator=generator)
    else:
        inputs["input_ids"] = integers(config.vocab_size, batch_size, seq_len)
    if train and "labels" in accepted:
        if _labels_are_classes(model):
            inputs["labels"] = integers(config.num_labels, batch_size)
        else:
            inputs["labels"] = inputs["input_ids"].clone()
    elif getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = integers(config.vocab_size, batch_size, seq_len)
    return inputs


def _is_unusual(model: nn.Module, accepted: Mapping[str, Any]) -> bool:
    """Whether a model takes more or other things than words or pictures."""
    config: Any = model.config
    if "pixel_values" in accepted and getattr(model, "main_input_name", "") == "pixel_values":
        vision = getattr(config, "vision_config", config)
        return not isinstance(getattr(vision, "image_size", None), int) or "input_ids" in accepted
    return "input_ids" not in accepted or not hasattr(config, "vocab_size")


def _tried_inputs(model: nn.Module, wanted: Wanted) -> dict[str, Any]:
    """The first inputs that the model accepts; nothing of the model changes.

    Raises:
        ValueError: It accepts none of those that its signature and configuration suggest.
    """
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    asks_for_values = None

    def attempt(inputs: dict[str, Any]) -> None:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            model(**inputs)

    for candidate in candidate_inputs(model, wanted):
        inputs = candidate
        try:
            inputs, _ = with_repairs(candidate, attempt, partial(further_input, model, wanted))
        except Exception as error:  # whatever shapes a model refuses
            # On the meta device a branch on values fails whatever the inputs' form.
            if asks_for_values is None and "cannot be called on meta tensors" in str(error):
                asks_for_values = inputs
            continue
        finally:
            for buffer, value in buffers:
                buffer.data.copy_(value)
        return inputs
    if asks_for_values is not None:
        return asks_for_values
    raise ValueError(
        f"No inputs are known for {type(model).__name__}; define a function "
        "example_inputs(batch_size, seq_len) beside a factory for it"
    )


def _labels_are_classes(model: nn.Module) -> bool:
    return type(model).__name__.endswith(("ForSequenceClassification", "ForImageClassification"))


def _auto_class(transformers: Any, model_type: str, is_encoder_decoder: bool) -> Any:
    """The class with the head that the architecture is best known for, so that it has a loss; or None."""
    known = transformers.models.auto.modeling_auto
    if model_type in known.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES:
        return transformers.AutoModelForImageClassification
    if model_type in known.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
        return transformers.AutoModelForSeq2SeqLM
    if model_type in known.MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return transformers.AutoModelForSequenceClassification
    if model_type in known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not is_encoder_decoder:
        return transformers.AutoModelForCausalLM
    return None
