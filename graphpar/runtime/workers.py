"""What the driver needs of its workers, whether they are local processes or ranks of torchrun."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from graphpar.runtime.executor import StepResult
from graphpar.runtime.program import RankProgram, WorkerSetup


@dataclass(frozen=True)
class RankStart:
    """What one rank starts with: its setup and its tensors by label."""

    device_name: str
    setup: WorkerSetup
    tensors: Mapping[str, torch.Tensor]


class Workers(Protocol):
    """The ranks of a job; every list has one entry per rank."""

    def same_everywhere(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The same tensors for all processes that take part; the first one's where they differ."""

    def install(self, name: str, programs: Sequence[RankProgram]) -> None:
        """Make a program ready on every rank."""

    def step(
        self,
        name: str,
        inputs: Sequence[Mapping[str, torch.Tensor]],
        number: int,
        profile: bool = False,
    ) -> list[StepResult]:
        """Run a program once on every rank, under torch.profiler if asked; all results come back.

        Raises:
            RunError: A rank failed or died; names the one at the root of it.
        """

    def read(self, labels: Sequence[Sequence[str]]) -> list[dict[str, torch.Tensor]]:
        """Tensors by label from every rank."""

    def gradients(self, labels: Sequence[Sequence[str]]) -> list[dict[str, torch.Tensor]]:
        """Gradients by label from every rank."""

    def write(self, tensors: Sequence[Mapping[str, torch.Tensor]]) -> None:
        """Overwrite tensors by label on every rank."""

    def close(self) -> None:
        """End all workers; safe to call again."""
