"""The running job: the only stateful object users meet."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import cloudpickle
import torch
from torch import nn

from graphpar.cluster import Cluster
from graphpar.errors import ClusterError
from graphpar.frontend.capture import Captured
from graphpar.ir.graph import Graph
from graphpar.partition.types import Partition
from graphpar.plans import Plan
from graphpar.runtime.assemble import Lowered
from graphpar.runtime.infer import lower_inference
from graphpar.runtime.local import LocalWorkers
from graphpar.runtime.merge import check_inputs, inputs_of_rank, merge_results
from graphpar.runtime.program import EmulatedLink, StepReport, WorkerSetup
from graphpar.runtime.prologue import Prologue
from graphpar.runtime.torchrun import TorchrunWorkers, under_torchrun
from graphpar.runtime.workers import RankStart, Workers
from graphpar.schedule import Schedule
from graphpar.training import Training


@dataclass(frozen=True)
class Subject:
    """What a job is made of.

    Attributes:
        model: The user's model; its weights are read at the start and whenever asked for state.
        captured: How calls become inputs and results become the user's structure.
        graph: The captured graph after the first passes.
        whole_batch_only: Whether the batch must stay whole and of the example's size.
        cluster: The devices.
        training: How to train, None for inference.
        lower: Lowers a graph for a partition.
        prepare_inference: Captures the model for inference with given arguments, passes included.
    """

    model: nn.Module
    captured: Captured
    graph: Graph
    whole_batch_only: bool
    cluster: Cluster
    training: Training | None
    lower: Callable[[Graph, Partition], Lowered]
    prepare_inference: Callable[[Sequence[Any], Mapping[str, Any]], Captured]


@dataclass(frozen=True)
class LastStep:
    """The last step as it was measured.

    Attributes:
        seconds: From the first rank's start to the last rank's end.
        predicted_s: What the plan predicted, None for another batch size than planned.
        reports: What each rank did when, and its peak memory.
    """

    seconds: float
    predicted_s: float | None
    reports: tuple[StepReport, ...]


@dataclass(frozen=True)
class _Loaded:
    """A captured graph made runnable: lowered, with its prologue, and programs by batch size."""

    name: str
    captured: Captured
    lowered: Lowered
    prologue: Prologue | None
    fixed_batch: bool
    schedules: dict[int, Schedule]


class CompiledModel:
    """A model that runs on many devices; use it as a context manager, or call `close`.

    Made by `graphpar.compile`. `step` trains, calling it infers (in evaluation mode).
    """

    def __init__(self, subject: Subject, plan: Plan, workers: Workers, lowered: Lowered) -> None:
        self.plan = plan
        self.last_step: LastStep | None = None
        self._subject = subject
        self._workers = workers
        self._devices = lowered.partition.used_devices
        self._steps = 0
        self._held = [set(p.labels) for p in lowered.placements]
        main = _Loaded(
            "train" if subject.training else "infer",
            subject.captured,
            lowered,
            Prologue.of(subject.graph, _constants(subject.captured, subject.model)),
            subject.whole_batch_only,
            {},
        )
        self._training = main if subject.training else None
        self._inference: _Loaded | None = None if subject.training else main
        self._trained_on = lowered

    @classmethod
    def start(cls, subject: Subject, decide: Callable[[], Plan]) -> "CompiledModel":
        """Decide on a plan, start workers, hand out weights."""
        if under_torchrun():
            session = TorchrunWorkers.join(subject.cluster)
            plan = session.agree(decide)
            lowered = subject.lower(subject.graph, plan.partition)
            starts = _starts(subject, lowered)
            tensors = session.same_everywhere(_all_tensors(subject.model, subject.captured))
            session.begin(starts, tensors, lowered.trained, _factory(subject))
            return cls(subject, plan, session, lowered)
        plan = decide()
        lowered = subject.lower(subject.graph, plan.partition)
        _refuse_foreign_devices(subject.cluster, lowered)
        pickled = cloudpickle.dumps(_factory(subject)) if subject.training else b""
        workers = LocalWorkers(_starts(subject, lowered), lowered.trained, pickled)
        return cls(subject, plan, workers, lowered)

    # --- running ---

    def step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One optimiser step on a global batch; returns the loss over all of it.

        Raises:
            ValueError: The job was compiled without `train=`, or the batch does not fit the model.
            RunError: A worker failed; names the rank at the root of it. The job is over then.
        """
        if self._training is None:
            raise ValueError("This job only infers; pass train=Training(...) to graphpar.compile.")
        (loss,) = self._run(self._training, args, kwargs)
        self._steps += 1
        return loss

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the model returns for a global batch in evaluation mode, with today's weights.

        Raises:
            ValueError: The batch does not fit the model.
            RunError: A worker failed; names the rank at the root of it. The job is over then.
        """
        loaded = self._inference
        if loaded is None or self._subject.training is not None:
            loaded = self._loaded_for(args, kwargs)
        values = self._run(loaded, args, kwargs)
        names = [r for r in loaded.captured.signature.results if isinstance(r, str)]
        return loaded.captured.signature.assemble(dict(zip(names, values, strict=True)))

    def _loaded_for(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> _Loaded:
        """The inference graph of a training job; captured on first use."""
        if self._inference is None:
            captured = self._subject.prepare_inference(args, kwargs)
            lowered = lower_inference(captured.graph, self._trained_on, self._subject.lower)
            constants = _constants(captured, self._subject.model)
            self._inference = _Loaded(
                "infer",
                captured,
                lowered,
                Prologue.of(captured.graph, constants),
                bool(captured.unsplittable),
                {},
            )
            self._hand_out_missing(self._inference)
        return self._inference

    def _hand_out_missing(self, loaded: _Loaded) -> None:
        """Give ranks tensors that only this graph reads."""
        tensors = _all_tensors(self._subject.model, loaded.captured)
        missing = []
        for rank, placement in enumerate(loaded.lowered.placements):
            new = [label for label in placement.labels if label not in self._held[rank]]
            self._held[rank].update(new)
            missing.append({label: tensors[label] for label in new})
        self._workers.write(missing)

    def _run(
        self, loaded: _Loaded, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> list[torch.Tensor]:
        signature = loaded.captured.signature
        inputs = signature.bind(args, kwargs)
        graph = loaded.captured.graph
        samples = check_inputs(graph, inputs, signature.batched)
        if loaded.fixed_batch and samples != graph.batch:
            raise ValueError(
                f"The batch has {samples} samples; this model's batch must stay at the example's "
                f"{graph.batch}: {self.plan.batch_reason or loaded.captured.unsplittable}."
            )
        schedule = self._schedule(loaded, samples)
        if loaded.prologue is not None:
            inputs = {**inputs, **loaded.prologue.run(inputs, samples)}
        per_rank = [
            inputs_of_rank(placement.interface, rank, schedule, inputs, signature.batched)
            for rank, placement in enumerate(loaded.lowered.placements)
        ]
        results = self._workers.step(f"{loaded.name}:{samples}", per_rank, self._steps)
        self._note([r.report for r in results], loaded, samples)
        return merge_results(loaded.lowered.graphs[0], results)

    def _schedule(self, loaded: _Loaded, samples: int) -> Schedule:
        if samples not in loaded.schedules:
            schedule = loaded.lowered.schedule(samples)
            programs = loaded.lowered.programs(schedule, samples)
            self._workers.install(f"{loaded.name}:{samples}", programs)
            loaded.schedules[samples] = schedule
        return loaded.schedules[samples]

    def _note(self, reports: Sequence[StepReport], loaded: _Loaded, samples: int) -> None:
        planned = samples == self.plan.batch and loaded.lowered is self._trained_on
        self.last_step = LastStep(
            seconds=max(r.end_s for r in reports) - min(r.start_s for r in reports),
            predicted_s=self.plan.predicted_step_s if planned else None,
            reports=tuple(reports),
        )

    # --- state ---

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Whole tensors under the model's own names, tied and unused ones included."""
        wanted = self._owners()
        read = self._workers.read([sorted(labels) for labels in wanted])
        current = {label: tensor for part in read for label, tensor in part.items()}
        for label, others in self._subject.graph.aliases.items():
            if label in current:
                current.update(dict.fromkeys(others, current[label]))
        original = self._subject.model.state_dict()
        return {name: current.get(name, tensor) for name, tensor in original.items()}

    def gradients(self) -> dict[str, torch.Tensor]:
        """Gradients by name that the optimiser left in place; summed over the whole batch.

        The usual optimisers' gradients are cleared after each step, so this is empty then.
        """
        read = self._workers.gradients([sorted(labels) for labels in self._owners()])
        current = {label: tensor for part in read for label, tensor in part.items()}
        for label, others in self._subject.graph.aliases.items():
            if label in current:
                current.update(dict.fromkeys(others, current[label]))
        return current

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Overwrite parameters and buffers on all workers; optimiser state is kept as it is.

        Raises:
            ValueError: A tensor that a worker holds is missing.
        """
        persistent = set(self._subject.model.state_dict())
        per_rank = []
        for held in self._held:
            labels = sorted(held & persistent)
            absent = [label for label in labels if label not in state]
            if absent:
                raise ValueError(f"The state has no tensor for {', '.join(absent)}.")
            per_rank.append({label: state[label] for label in labels})
        self._workers.write(per_rank)

    def _owners(self) -> list[set[str]]:
        """For each rank the tensors that are read from it: each label from its first holder."""
        seen: set[str] = set()
        owners = []
        for held in self._held:
            owners.append(held - seen)
            seen |= held
        return owners

    def close(self) -> None:
        """End all workers; safe to call again."""
        self._workers.close()

    def __enter__(self) -> "CompiledModel":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"CompiledModel({self._subject.graph.name}, {len(self._devices)} ranks, step {self._steps})"


def _factory(subject: Subject) -> Callable[..., torch.optim.Optimizer] | None:
    return subject.training.optimizer if subject.training else None


def _all_tensors(model: nn.Module, captured: Captured) -> dict[str, torch.Tensor]:
    """Every parameter, buffer and constant by label."""
    tensors: dict[str, torch.Tensor] = dict(captured.constants)
    tensors.update(model.named_buffers(remove_duplicate=False))
    tensors.update(model.named_parameters(remove_duplicate=False))
    meta = [name for name, tensor in tensors.items() if tensor.device.type == "meta"]
    if meta:
        raise ValueError(
            f"The model has no weights: {meta[0]} (and {len(meta) - 1} more) are on the meta device. "
            "Load weights before compile; graphpar.plan needs none."
        )
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _constants(captured: Captured, model: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(model.named_buffers(remove_duplicate=False)), **captured.constants}


def _starts(subject: Subject, lowered: Lowered) -> list[RankStart]:
    tensors = _all_tensors(subject.model, subject.captured)
    names = lowered.partition.used_devices
    training = subject.training
    starts = []
    for rank, (name, placement) in enumerate(zip(names, lowered.placements, strict=True)):
        device = subject.cluster.device(name)
        setup = WorkerSetup(
            rank=rank,
            world_size=len(names),
            device=torch_device(subject.cluster, name),
            threads=device.threads,
            slowdown=device.slowdown,
            links=_emulated_links(subject.cluster, names, rank),
            groups=lowered.groups,
            seed=training.seed if training else 0,
            max_grad_norm=training.max_grad_norm if training else None,
        )
        starts.append(RankStart(name, setup, {la: tensors[la] for la in placement.labels}))
    return starts


def gpu_index(cluster: Cluster, name: str) -> int:
    """Place of a device among its node's devices that are no CPUs."""
    node = cluster.device(name).node
    return [d.name for d in cluster.devices if d.node == node and not d.is_cpu].index(name)


def torch_device(cluster: Cluster, name: str) -> str:
    """The torch device that a device of the cluster is on its own machine."""
    return "cpu" if cluster.device(name).is_cpu else f"cuda:{gpu_index(cluster, name)}"


def _emulated_links(cluster: Cluster, names: Sequence[str], rank: int) -> tuple[EmulatedLink, ...]:
    links = []
    for other, name in enumerate(names):
        link = cluster.link(names[rank], name) if other != rank else None
        if link is not None and link.emulated:
            links.append(EmulatedLink(other, link.latency_s, link.bytes_per_s))
    return tuple(links)


def _refuse_foreign_devices(cluster: Cluster, lowered: Lowered) -> None:
    """A local job runs on this machine: its CPU, and its CUDA devices."""
    gpus = torch.cuda.device_count()
    for name in lowered.partition.used_devices:
        device = cluster.device(name)
        here = device.is_local_cpu or (not device.is_cpu and gpu_index(cluster, name) < gpus)
        if not here:
            raise ClusterError(
                f"Device {name} ({device.kind}) is not on this machine, so the job cannot be started "
                "from here. Start the script with torchrun on the machines of the cluster, or use "
                "graphpar.plan, which needs no devices."
            )

