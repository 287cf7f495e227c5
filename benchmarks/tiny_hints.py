"""What refuses a configuration says of it: fields named in the error, or empty in the line that raised.

A class or a model that refuses the sizes it is given mostly names those that do not fit each other
(`index_topk (2) must be divisible by index_kpool (16)`). Left as they are by default they do.
"""

import dataclasses
from typing import Any

from tiny_defaults import parts_of, read

from graphpar.hf_refusal import blamed_names, words_of

_COMMON = frozenset({"dtype", "architectures", "vocab_size", "hidden_size"})
"""Fields that are everywhere in errors, and large."""


def fields_named(error: Exception, config: Any) -> frozenset[str]:
    """Fields of a configuration or of one inside it that an error names, and empty ones in its line.

    >>> from transformers import BertConfig
    >>> sorted(fields_named(ValueError("num_attention_heads does not divide hidden_size"), BertConfig()))
    ['num_attention_heads']
    """
    said, blamed = set(words_of(error)), set(blamed_names(error))
    found = set()
    for _, part in parts_of(config):
        for spec in dataclasses.fields(part):
            if spec.name in said or (spec.name in blamed and read(part, spec.name) is None):
                found.add(spec.name)
    return frozenset(found - _COMMON)
