"""An optimiser for looking at gradients; in a file of its own, so that workers import little for it."""

from collections.abc import Callable, Iterable

import torch
from torch import nn


class HoldStill(torch.optim.Optimizer):
    """An optimiser that changes nothing, so that gradients can be read after a step."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__(parameters, {})

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Leave everything as it is."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Keep gradients."""
