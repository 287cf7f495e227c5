"""One model of the collection: how it is built, what it takes, and what it is trained on."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

Batch = Callable[[int], tuple[Any, ...]]
"""Positional arguments for so many samples; the last is the target where there is a loss."""


@dataclass(frozen=True)
class Case:
    """A model and what it takes.

    Attributes:
        model: The module, with small random weights.
        batch: Arguments for a number of samples, always the same for the same number.
        loss: The loss of its result and the last argument; None: the model returns it.
        kwargs: Keyword arguments for a number of samples.
        trains: Whether it can be trained.
        name: Its name in the collection.
    """

    model: nn.Module
    batch: Batch
    loss: Callable[[Any, Any], Any] | None = None
    kwargs: Callable[[int], dict[str, Any]] = field(default=lambda samples: {})
    trains: bool = True
    name: str = ""


CASES: dict[str, Callable[[], Case]] = {}


def case(function: Callable[[], Case]) -> Callable[[], Case]:
    """Add a model to the collection under its function's name."""
    CASES[function.__name__] = function
    return function


def build(name: str) -> Case:
    """A model of the collection, the same at every call."""
    torch.manual_seed(0)
    return replace(CASES[name](), name=name)


def seeded(samples: int) -> torch.Generator:
    """A generator for a batch of so many samples."""
    return torch.Generator().manual_seed(100 + samples)


def normal(samples: int, *shape: int) -> torch.Tensor:
    """Normal numbers [samples, *shape]."""
    return torch.randn(samples, *shape, generator=seeded(samples))


def ids(samples: int, *shape: int, high: int = 20, low: int = 0) -> torch.Tensor:
    """Integers [samples, *shape] in [low, high)."""
    return torch.randint(low, high, (samples, *shape), generator=seeded(samples))
