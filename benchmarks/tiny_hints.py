"""What refuses a configuration says of it: fields named in the error, or empty in the line that raised.

A class or a model that refuses the sizes it is given mostly names those that do not fit each other
(`index_topk (2) must be divisible by index_kpool (16)`). Left as they are by default they do; and where
it says which number a field must have (`hidden_size_per_layer_input must be 0`), the field gets that.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from tiny_defaults import parts_of, read

from graphpar.hf_refusal import blamed_fields, blamed_names, words_of

Hints = Mapping[str, int | None]
"""Fields that must be a number, or stay as they are by default (None).

`SomeConfig.name` is one that a class of configurations lacks though its models read it.
"""
_COMMON = frozenset({"dtype", "architectures", "vocab_size", "hidden_size"})
"""Fields that are everywhere in errors, and large."""
_LACKS = re.compile(r"'(\w+Config)' object has no attribute '([a-z]\w*)'")
_MUST_BE = re.compile(r"`?([a-z]\w+)`?(?: ?==? ?| must be | has to be | should be )(\d+)\b")
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
    said, blamed = set(words_of(error)), {*blamed_names(error), *blamed_fields(error)}
    demanded = numbers_demanded(error)
    found: dict[str, int | None] = {}
    for _, part in parts_of(config):
        for name in sorted(spec.name for spec in dataclasses.fields(part)):
            if name not in _COMMON and (name in said or (name in blamed and read(part, name) is None)):
                found[name] = demanded.get(name)
    return found
