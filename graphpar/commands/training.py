"""How the command line trains: AdamW, and the model returns its own loss."""

from collections.abc import Iterable
from typing import Literal

import torch

from graphpar.partition.settings import ScheduleWish
from graphpar.training import Training

_LEARNING_RATE = 3e-4


def _adamw(parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=_LEARNING_RATE)


def default_training(schedule: ScheduleWish = "auto", zero: Literal[0, 1, 2] = 0) -> Training:
    """What `--train` means, with `--schedule` and `--zero`."""
    return Training(optimizer=_adamw, schedule=schedule, zero=zero)
