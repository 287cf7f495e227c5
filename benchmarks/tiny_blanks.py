"""What fields hold that a default configuration leaves empty though its models cannot be without."""

import re
from typing import Any

from tiny_defaults import read
from tiny_fields import EXPERTS, HEAD_SIZE, HEADS, KEY_HEADS, NOT_WIDTH, PER_TOKEN, WIDTH
from tiny_scale import VOCABULARY, Scale, first_int

_PLACEHOLDER = re.compile(r"(image|video|audio|vision|speech)_token_(id|index)$")
"""Words that stand in the text for what is no text."""
_FACTORS = re.compile(r"(scales?|factors?|ratios?)$")
_WINDOW = 4


def filled(name: str, base: Any, scale: Scale, tokens: dict[int, int]) -> Any:
    """A value for an empty field, as large as in a default configuration; None where it may be empty.

    Args:
        name: The field.
        base: Its configuration.
        scale: How that shrinks.
        tokens: Words that have a meaning, by their number before; a new one is added.
    """
    if PER_TOKEN.search(name):
        return None if "group" in name else 2
    if EXPERTS.search(name):
        return None if "shared" in name else 8
    if KEY_HEADS.search(name) and HEADS.search(name):
        return scale.heads
    if name == "head_dim":  # neither given nor derived from the others
        return first_int(base, ("hidden_size",)) // scale.heads or None
    if name == "vocab_size":
        return VOCABULARY
    if name.endswith(("prediction_length", "context_length")):
        return 8
    if name == "sliding_window" and "sliding_attention" in (read(base, "layer_types") or ()):
        return _WINDOW
    if _PLACEHOLDER.search(name) and name not in getattr(base, "attribute_map", {}):
        number = VOCABULARY + len(tokens)
        while number in tokens:
            number += 1
        return number
    return None


def guessed(name: str, annotation: str, base: Any) -> Any:
    """A value for an empty field without which a model refused to run; None where nothing is likely."""
    layers = first_int(base, ("num_hidden_layers", "n_layer", "num_layers"))
    if name == "mlp_layer_types":
        return ["dense", *["sparse"] * (layers - 1)]
    if name == "layer_types":
        return ["full_attention"] * layers
    if "dict" in annotation:
        return {}
    if _FACTORS.search(name) and "list[float" in annotation:  # one part, as large as what it is made of
        return [1.0]
    if name.endswith("theta"):
        return 1e4
    if "int" not in annotation or "list" in annotation:
        return 1.0 if "float" in annotation and "list" not in annotation else None
    if "window" in name:
        return _WINDOW
    if HEADS.search(name):
        return first_int(base, ("num_attention_heads",)) or 1
    if HEAD_SIZE.search(name):
        return first_int(base, ("head_dim",)) or None
    if WIDTH.search(name) and not NOT_WIDTH.search(name):
        return first_int(base, ("hidden_size", "d_model")) or None
    return 0 if name.endswith("_id") else 2
