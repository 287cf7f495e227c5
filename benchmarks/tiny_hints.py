"""What refuses a configuration says of it: fields named in the error, or empty in the line that raised.

A class or a model that refuses the sizes it is given mostly names those that do not fit each other
(`index_topk (2) must be divisible by index_kpool (16)`). Left as they are by default they do; and where
it says which number a field must have (`hidden_size_per_layer_input must be 0`), the field gets that.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from tiny_blanks import guessed
from tiny_defaults import names_of_parts, parts_of, read

from graphpar.hf.refusal import blamed_fields, blamed_names, words_of

Hints = Mapping[str, int | None]
"""Fields that must be a number, or stay as they are by default (None).

`SomeConfig.name` is one that a class of configurations lacks though its models read it, or that must be
as in one of its parts.
"""
_COMMON = frozenset({"dtype", "architectures", "vocab_size", "hidden_size"})
"""Fields that are everywhere in errors, and large."""
_LACKS = re.compile(r"'(\w+Config)' object has no attribute '([a-z]\w*)'")
_MUST_BE = re.compile(r"`?([a-z]\w+)`?(?: ?==? ?| must be | has to be | should be )(\d+)\b")
_EMPTY_LIST = re.compile(r"non-?empty (list|tuple|sequence)")
_CHANNELS = re.compile(r"to have \d+ channels, but got \d+ channels")
_MUST_MATCH = re.compile(
    r"`?(?:\w+\.)?(\w+)`? \(\d+\) must (?:match|equal|be equal to) `?(?:\w+\.)?\w+`? \((\d+)\)"
)


def numbers_demanded(error: Exception) -> dict[str, int]:
    """Numbers that an error says fields must have.

    >>> numbers_demanded(ValueError("size_per_layer must be 0, got 256"))
    {'size_per_layer': 0}
    >>> numbers_demanded(ValueError("`audio.out_size` (1024) must match `text.hidden_size` (64)"))
    {'out_size': 64}
    """
    said = str(error)
    found = [*_MUST_BE.findall(said), *_MUST_MATCH.findall(said)]
    return {name: int(number) for name, number in found}


def fields_named(error: Exception, config: Any) -> dict[str, int | None]:
    """Fields of a configuration or of one inside it that an error names, and empty ones in its line.

    >>> from transformers import BertConfig
    >>> fields_named(ValueError("num_attention_heads does not divide hidden_size"), BertConfig())
    {'num_attention_heads': None}
    >>> fields_named(AttributeError("'BertConfig' object has no attribute 'ratio'"), BertConfig())
    {'BertConfig.ratio': None}
    """
    if lacks := _LACKS.search(str(error)):
        return {f"{lacks[1]}.{lacks[2]}": None}
    if _CHANNELS.search(str(error)) and (unlike := _widths_unlike_those_of_parts(config)):
        return unlike
    if _EMPTY_LIST.search(str(error)) and (empty := _empty_factors(config)):
        return empty
    said, blamed = set(words_of(error)), {*blamed_names(error), *blamed_fields(error)}
    demanded = numbers_demanded(error)
    found: dict[str, int | None] = {}
    for _, part in parts_of(config):
        for name in sorted(spec.name for spec in dataclasses.fields(part)):
            if name not in _COMMON and (name in said or (name in blamed and read(part, name) is None)):
                found[name] = demanded.get(name)
    return found


def _widths_unlike_those_of_parts(config: Any) -> dict[str, int | None]:
    """Wholes without heads of their own whose width by default is not that of the part they read."""
    found: dict[str, int | None] = {}
    for _, whole in parts_of(config):
        inner = [read(read(whole, name), "hidden_size") for name in names_of_parts(whole)]
        own = read(whole, "hidden_size")
        if (
            own
            and read(whole, "num_attention_heads") is None
            and [n for n in inner if n not in (None, own)]
        ):
            found[f"{type(whole).__name__}.hidden_size"] = None
    return found


def _empty_factors(config: Any) -> dict[str, int | None]:
    """Lists of factors, one for each of several parts of a model, that a default leaves empty."""
    return {
        spec.name: None
        for _, part in parts_of(config)
        for spec in dataclasses.fields(part)
        if read(part, spec.name) in ((), []) and guessed(spec.name, str(spec.type), part) is not None
    }
