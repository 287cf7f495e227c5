"""Values that JSON can hold."""

from collections.abc import Mapping
from typing import Any

import torch

Plain = bool | int | float | str | None | list[Any]


def plain(values: Mapping[str, Any]) -> dict[str, Plain]:
    """What JSON can hold; a single number in a tensor is that number, anything else is left out.

    >>> plain({"lr": torch.tensor(0.5), "betas": (0.9, 0.99), "hook": print})
    {'lr': 0.5, 'betas': [0.9, 0.99]}
    """
    kept: dict[str, Plain] = {}
    for key, value in values.items():
        if isinstance(value, torch.Tensor) and value.numel() == 1:
            value = value.item()
        if value is None or isinstance(value, (bool, int, float, str)):
            kept[key] = value
        elif isinstance(value, (tuple, list)) and all(isinstance(v, (bool, int, float)) for v in value):
            kept[key] = list(value)
    return kept
