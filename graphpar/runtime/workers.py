"""What the driver needs of its workers, whether they are local processes or ranks of torchrun."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from graphpar.runtime.checkpoint import Part, Restored
from graphpar.runtime.executor import StepResult
from graphpar.runtime.program import RankProgram, WorkerSetup
from graphpar.runtime.weights import Weights


@dataclass(frozen=True)
class RankStart:
    """What one rank starts with: its setup and its tensors by label, some perhaps not read yet."""

    device_name: str
    setup: WorkerSetup
    tensors: Weights


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

    @property
    def is_first(self) -> bool:
        """Whether this process does what only one of several may do."""

    def meet(self) -> None:
        """Wait until all processes that drive the job are here."""

    def save(
        self, folder: str, labels: Sequence[Sequence[str]], apart: Sequence[Collection[str]]
    ) -> list[Part]:
        """Let every rank write tensors, with what its optimiser keeps of them, into a folder.

        Of tensors `apart` it tells only what its optimiser is set to.
        """

    def kept(self, labels: Sequence[str]) -> list[dict[str, torch.Tensor]]:
        """From every rank one tensor, under the empty key, and what its optimiser keeps of it by key.

        A rank whose label is empty gives none.
        """

    def load(self, restored: Sequence[Restored]) -> None:
        """Let every rank read what it is told from a checkpoint."""

    def close(self) -> None:
        """End all workers; safe to call again."""
