"""What training needs to know besides the model."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer


@dataclass(frozen=True, kw_only=True)
class Training:
    """How to train.

    Attributes:
        optimizer: Called on every rank with the rank's parameters; makes the optimiser.
        loss: None when the model returns its loss (a scalar, or `.loss`); otherwise
            `loss(output, target)`, the target being the last positional argument of `step`.
        max_grad_norm: Clip gradients by their global norm.
        microbatches: Number of microbatches, or "auto".
        schedule: "gpipe", "1f1b", or "auto".
        seed: Seed of the random streams (dropout); the same for every plan.

    >>> import torch
    >>> training = Training(optimizer=lambda p: torch.optim.SGD(p, lr=0.1), max_grad_norm=1.0)
    >>> training.schedule
    'auto'
    """

    optimizer: "Callable[[Iterable[nn.Parameter]], Optimizer]"
    loss: Callable[[Any, Any], Any] | None = None
    max_grad_norm: float | None = None
    microbatches: int | Literal["auto"] = "auto"
    schedule: Literal["auto", "gpipe", "1f1b"] = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if not callable(self.optimizer):
            raise ValueError(
                f"Training(optimizer=...) must be a callable that makes an optimiser from parameters, "
                f"such as lambda p: torch.optim.AdamW(p, lr=3e-4); got {self.optimizer!r}."
            )
        if self.microbatches != "auto" and self.microbatches < 1:
            raise ValueError(f"Training(microbatches=...) must be at least 1, not {self.microbatches}.")
        if self.schedule not in ("auto", "gpipe", "1f1b"):
            raise ValueError(
                f"Training(schedule=...) must be 'auto', 'gpipe' or '1f1b', not {self.schedule!r}."
            )
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(f"Training(max_grad_norm=...) must be positive, not {self.max_grad_norm}.")
