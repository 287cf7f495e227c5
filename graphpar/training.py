"""What training needs to know besides the model."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from graphpar.arguments import check_number, whole_number
from graphpar.partition.settings import ScheduleWish

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler


@dataclass(frozen=True, kw_only=True)
class Training:
    """How to train.

    Attributes:
        optimizer: Called on every rank with the rank's parameters; makes the optimiser. What it makes of
            a parameter must follow from the parameter alone, for each rank holds other ones.
        scheduler: Called with that optimiser; makes a learning-rate scheduler, which steps after each
            step of the job. `load` brings it to the checkpoint's step.
        settings: Called with a parameter's name and the parameter, without its values; gives settings
            of the optimiser for this one, such as `{"weight_decay": 0.0}`, or nothing.
        loss: None when the model returns its loss (a scalar, or `.loss`); otherwise
            `loss(output, target)`, the target being the last positional argument of `step`.
        max_grad_norm: Clip gradients by their global norm.
        microbatches: Number of microbatches, or "auto".
        schedule: "gpipe", "1f1b", "interleaved" (1F1B with several stages on each device), "zero-bubble"
            (gradients of weights fill the gaps), or "auto" for the shortest step.
        zero: Highest ZeRO level that replicas of a stage may use where that is faster or fits: 1 lets
            them divide the optimiser's state, 2 the sums of gradients as well. Only for optimisers that
            work element by element; level 2 only under "1f1b" and "gpipe".
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
    schedule: ScheduleWish = "auto"
    zero: Literal[0, 1, 2] = 0
    seed: int = 0
    scheduler: "Callable[[Optimizer], LRScheduler] | None" = None
    settings: "Callable[[str, nn.Parameter], Mapping[str, Any] | None] | None" = None

    def __post_init__(self) -> None:
        if not callable(self.optimizer):
            raise ValueError(
                f"Training(optimizer=...) must be a callable that makes an optimiser from parameters, "
                f"such as lambda p: torch.optim.AdamW(p, lr=3e-4); got {self.optimizer!r}."
            )
        for name in ("loss", "scheduler", "settings"):
            given = getattr(self, name)
            if given is not None and not callable(given):
                raise ValueError(f"Training({name}=...) must be a function, not {given!r}.")
        if self.microbatches != "auto":
            whole = "a whole number of at least 1, or 'auto'"
            self._take("microbatches", whole, lambda n: n >= 1)
        if self.schedule not in get_args(ScheduleWish):
            raise ValueError(
                f"Training(schedule=...) must be one of {', '.join(get_args(ScheduleWish))}, "
                f"not {self.schedule!r}."
            )
        levels = "0, 1 or 2 (level 3 can be planned with graphpar.partition, not run)"
        self._take("zero", levels, lambda n: 0 <= n <= 2)
        if self.max_grad_norm is not None:
            check_number("Training(max_grad_norm=...)", self.max_grad_norm, "positive", lambda n: n > 0)
        self._take("seed", "a whole number that 64 bits hold", lambda n: -(2**63) <= n < 2**64)

    def _take(self, name: str, rule: str, holds: Callable[[int], bool]) -> None:
        """Keep a number as an int, whatever kind of whole number was given: workers are sent it."""
        number = whole_number(f"Training({name}=...)", getattr(self, name), rule, holds)
        object.__setattr__(self, name, number)
