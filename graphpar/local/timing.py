"""Time a model's units on what this machine has of a cluster: its processor, and its CUDA devices."""

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from graphpar.calibration import Calibration
from graphpar.cluster import Cluster
from graphpar.cluster_build import cuda_devices, system_memory_bytes
from graphpar.cost import CostTable
from graphpar.cost_models.measured import ModelTiming
from graphpar.device import LOCAL_KIND, Device
from graphpar.errors import ClusterError
from graphpar.local.kept import NotTimedError
from graphpar.local.stage_timing import retimed, timed_stages
from graphpar.local.trial_worker import MOST_TWINS, TrialModel
from graphpar.local.unit_timing import time_gpu, timed
from graphpar.partition.types import Partition
from graphpar.precision.formats import Formats, formats_of, uniform_formats
from graphpar.preparation import Prepared
from graphpar.schedule.timing import Timing
from graphpar.training import Training


@dataclass(frozen=True)
class Example:
    """A model with an example batch, to run on this machine while planning."""

    model: nn.Module
    args: Sequence[Any]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True)
class Timings:
    """What is to be timed, and for how long.

    Args:
        prepared: The captured model.
        example: The model, with its weights, and the example batch.
        train: How it is trained; None to run forwards alone.
        precision: The number format of the plan.
        budget_s: Seconds that may be spent on each kind of device.
        state_ratio: Bytes of optimiser state per byte of parameters.
        price: What the cost model says of a cluster whose devices compute in these formats.
    """

    prepared: Prepared
    example: Example
    train: Training | None
    precision: str
    budget_s: float
    state_ratio: float
    price: Callable[[Cluster, Formats], CostTable]

    def of(
        self, cluster: Cluster, calibration: Calibration | None
    ) -> tuple[dict[str, ModelTiming], tuple[str, ...]]:
        """Timings by the kind of the device, of the kinds that the cluster names and this machine has.

        And, of kinds that were to be timed and could not be, what a plan takes for granted instead.
        """
        if self.precision == "auto" or not self._weights_are_here():
            return {}, ()
        ways: dict[str, Callable[[], ModelTiming]] = {}
        here = _workers_here(cluster, calibration)
        if here and self.precision == "float32":
            ways[LOCAL_KIND] = partial(self._on_processor, here, self._runs_at_once(cluster))
        for kind, index in _cards_here(cluster).items():
            ways[kind] = partial(self._on_card, kind, index, cluster)
        found, untimed = {}, []
        for kind, time_it in ways.items():
            try:
                found[kind] = time_it()
            except NotTimedError as reason:
                untimed.append(f"the model was not timed on {kind} ({reason}): curves stand for it")
        return found, tuple(untimed)

    def _weights_are_here(self) -> bool:
        tensors = (*self.example.model.parameters(), *self.example.model.buffers())
        return all(tensor.device.type == "cpu" for tensor in tensors)

    def _runs_at_once(self, cluster: Cluster) -> bool:
        """Whether every backward is whole and follows on its own forward, as it does on one device."""
        wish = self.train.schedule if self.train else "auto"
        return len(cluster.devices) == 1 and wish in ("auto", "1f1b") and not self.prepared.tail_reason

    def _on_processor(self, here: Sequence[Device], at_once: bool) -> ModelTiming:
        self._refuse_many_copies(len(here))
        slowdowns = sorted(device.slowdown for device in here)
        alone = Cluster.from_dict({"devices": [{"kind": "cpu", "threads": here[0].threads}]})
        table = self.price(alone, Formats({}))
        model = self._trial(here[0].threads)
        about = self.prepared.model_hash
        return timed(model, about, table, self.budget_s, slowdowns, at_once)

    def retimed(
        self, cluster: Cluster, calibration: Calibration | None, found: Partition, timing: Timing
    ) -> tuple[Timing, str]:
        """The timing with stages on this machine's processor as they are when tried there.

        As it was, and why, where they cannot be tried. Nothing is said where no stage runs here in a
        worker that the calibration is of.
        """
        here = _workers_here(cluster, calibration)
        slowdowns = {device.name: device.slowdown for device in here}
        if not slowdowns.keys() & set(found.used_devices):
            return timing, ""
        try:
            if self.prepared.in_step_reason:
                raise NotTimedError("parts of the batch meet within a step")
            if not self._weights_are_here():
                raise NotTimedError("the model has no weights here")
            self._refuse_many_copies(len(here))
            model, about = self._trial(here[0].threads), self.prepared.model_hash
            measured = timed_stages(model, about, found, timing, slowdowns, self.budget_s)
        except NotTimedError as reason:
            return timing, str(reason)
        return retimed(timing, found, measured, slowdowns), measured.left_out

    def _on_card(self, kind: str, index: int, cluster: Cluster) -> ModelTiming:
        card = next(device for device in cluster.devices if device.kind == kind)
        if self._held_bytes() > card.memory_bytes / 2:
            raise NotTimedError("a copy of it would take more than half of the memory")
        precision = self.precision if self.precision in formats_of(card) else "float32"
        alone = Cluster.from_dict({"devices": [{"kind": kind, "memory_bytes": card.memory_bytes}]})
        formats = uniform_formats(alone, precision, len(self.prepared.chain.units))
        table = self.price(alone, formats)
        return time_gpu(self._trial(1, f"cuda:{index}", precision), table, self.budget_s)

    def _refuse_many_copies(self, workers: int) -> None:
        """Half of the memory has to hold the copies that are tried beside each other."""
        copies = min(workers, 1 + MOST_TWINS)
        if copies * self._held_bytes() > system_memory_bytes(math.inf) / 2:
            raise NotTimedError(f"{copies} copies of it would take more than half of the memory")

    def _held_bytes(self) -> float:
        """Weights, gradients and optimiser state of one copy."""
        tensors = (*self.example.model.parameters(), *self.example.model.buffers())
        return (2.0 + self.state_ratio) * sum(tensor.nbytes for tensor in tensors)

    def _trial(self, threads: int, device: str = "cpu", precision: str = "float32") -> TrialModel:
        model, args, kwargs = self.example.model, self.example.args, self.example.kwargs
        return TrialModel(model, self.prepared, args, kwargs, self.train, threads, device, precision)


def _workers_here(cluster: Cluster, calibration: Calibration | None) -> list[Device]:
    """Devices of the cluster that are processes on this machine, if its calibration is of such ones."""
    here = [device for device in cluster.devices if device.is_local_cpu]
    if calibration is None or {device.threads for device in here} != {calibration.fingerprint.threads}:
        return []
    return here


def _cards_here(cluster: Cluster) -> dict[str, int]:
    """Kinds of the cluster's GPUs that this machine has, with the place of the first of each."""
    wanted = {d.kind for d in cluster.devices if not d.is_cpu}
    if not wanted or not torch.cuda.is_available():
        return {}
    found: dict[str, int] = {}
    with contextlib.suppress(ClusterError):  # a card that the catalogue does not know
        for index, card in enumerate(cuda_devices()):
            if card["kind"] in wanted:
                found.setdefault(card["kind"], index)
    return found
