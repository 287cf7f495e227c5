"""A worker that has a whole model to itself: to be timed, or to keep a core busy as others of a job will.

It is started, set up and fed as the workers of a job are, so that what is measured there holds for them:
the same allocator, the same tensors, the same optimiser.
"""

import contextlib
import hashlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from statistics import mean
from typing import Any

import msgspec
import torch
from torch import nn

from graphpar.cluster import Cluster
from graphpar.errors import RunError
from graphpar.ir.text import format_graph
from graphpar.partition.types import Partition, Replica, StageChoice
from graphpar.passes.deferral import DeferWeightGradients
from graphpar.preparation import Prepared, lower
from graphpar.rewrite import Pipeline
from graphpar.runtime import by_value
from graphpar.runtime.assemble import Lowered
from graphpar.runtime.local import LocalWorkers
from graphpar.runtime.optimizers import Recipe
from graphpar.runtime.passes import Spent
from graphpar.runtime.prologue import Prologue
from graphpar.runtime.reference import whole_on_one_device
from graphpar.runtime.starts import rank_starts
from graphpar.runtime.weights import Weights
from graphpar.training import Training

WHOLE, BY_UNIT, IN_HALVES = "whole", "by unit", "in halves"

MOST_TWINS = 3
"""More neighbours than this are not started to find what they cost."""


@dataclass
class TrialModel:
    """A captured model with what its workers need.

    Args:
        model: The user's model, with its weights; they are copied.
        prepared: The captured model.
        args: Positional arguments of the example batch.
        kwargs: Keyword arguments of it.
        train: How it is trained; None to run forwards alone.
        threads: Threads of a worker.
        device: The torch device that workers compute on.
        precision: Number format that all units compute in.
    """

    model: nn.Module
    prepared: Prepared
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    train: Training | None
    threads: int = 1
    device: str = "cpu"
    precision: str = "float32"
    _tensors: dict[str, torch.Tensor] = field(init=False)
    _inputs: Mapping[str, torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        captured = self.prepared.captured
        named = dict(self.model.named_buffers(remove_duplicate=False))
        named.update(self.model.named_parameters(remove_duplicate=False))
        self._tensors = {**captured.constants, **{name: t.detach() for name, t in named.items()}}
        inputs = captured.signature.bind(self.args, self.kwargs)
        prologue = Prologue.of(self.prepared.graph, self._tensors)
        if prologue is not None:
            inputs = {**inputs, **prologue.run(inputs, self.prepared.graph.batch)}
        self._inputs = inputs

    @cached_property
    def _lowered_whole(self) -> Lowered:
        return self._lowered(_alone(self.prepared, self.precision))

    @contextlib.contextmanager
    def worker(self, divided: Sequence[Partition] = ()) -> Iterator["TrialWorker"]:
        """A worker of its own beside the body; it is gone afterwards.

        Besides the whole model and its units it can pass through the stages of the partitions given, of
        one pipeline each. It is made ready for each way when that is first asked for.

        Raises:
            RunError: It could not be started.
        """
        # Where it computes does not matter to what it starts with.
        cluster = Cluster.from_dict({"devices": [{"kind": "cpu", "threads": self.threads}]})
        whole = self._lowered_whole
        (start,) = rank_starts(cluster, self.train, whole, Weights(self._tensors))
        starts = [replace(start, setup=msgspec.structs.replace(start.setup, device=self.device))]
        optimizer = by_value.dumps(Recipe.of(self.train)) if self.train else b""
        workers = LocalWorkers(starts, whole.trained, optimizer)
        with contextlib.closing(workers):
            yield TrialWorker(workers, self, {_by_stage(k): cut for k, cut in enumerate(divided)})

    def install(self, workers: LocalWorkers, name: str, cut: Partition | None) -> None:
        """Make workers ready to pass through the model in a way, which a partition may give."""
        whole = self._lowered_whole
        if name in (WHOLE, IN_HALVES):
            (program,) = whole.programs(whole.schedule(1), 1)
            if name == IN_HALVES:
                marked, _ = Pipeline((DeferWeightGradients(frozenset({0})),)).run(whole.graphs[0])
                program = msgspec.structs.replace(program, graph=format_graph(marked))
            workers.install_passes(name, program, 1, in_halves=name == IN_HALVES)
        else:
            stages = self._lowered(cut or _unit_by_unit(_alone(self.prepared, self.precision)))
            (program, *_) = stages.programs(stages.schedule(1), 1)
            workers.install_passes(name, program, len(stages.placements))

    def key(self, model_hash: str) -> list[str | bool | float | None]:
        """What its times depend on besides how it is tried: the model, whether it trains, and by what."""
        recipe = by_value.dumps(Recipe.of(self.train)) if self.train else b""
        clips = self.train.max_grad_norm if self.train else None
        return [model_hash, self.train is not None, hashlib.sha256(recipe).hexdigest(), clips]

    def _lowered(self, chosen: Partition) -> Lowered:
        return lower(self.prepared.graph, chosen, self.train is not None)

    def inputs(self, size: int) -> dict[str, torch.Tensor]:
        """The example batch's first samples."""
        batched = self.prepared.captured.signature.batched
        return {name: t[:size] if name in batched else t for name, t in self._inputs.items()}

    @contextlib.contextmanager
    def twins(self, slowdowns: Sequence[float], size: int) -> Iterator[list[int]]:
        """Workers that pass through the model over and over beside the body; their process numbers.

        There is one for each of `slowdowns`, so many times slower than it is by waiting.

        Raises:
            RunError: They could not be started.
        """
        over = threading.Event()
        with contextlib.ExitStack() as stack:
            workers = [stack.enter_context(self.worker()) for _ in slowdowns]
            for worker in workers:  # or the body would be measured beside what is not at work yet
                worker.make_ready(WHOLE)
            threads = [
                threading.Thread(target=worker.repeat, args=(size, slowdown, over), daemon=True)
                for worker, slowdown in zip(workers, slowdowns, strict=True)
            ]
            for thread in threads:
                thread.start()
            try:
                yield [pid for worker in workers for pid in worker.workers.pids]
            finally:
                over.set()
                for thread in threads:
                    thread.join()


@dataclass
class TrialWorker:
    """One worker with the whole model.

    Args:
        workers: The worker.
        model: What it holds.
        divided: Partitions that it may be asked to pass through, by the names of these ways.
    """

    workers: LocalWorkers
    model: TrialModel
    divided: Mapping[str, Partition]
    _ready: set[str] = field(default_factory=set)

    def whole(self, size: int, slowdown: float = 1.0, in_flight: int = 1) -> tuple[float, float]:
        """Forward and backward seconds of the model for one microbatch, with pauses after either."""
        forward_s, backward_s = self._passed(WHOLE, size, slowdown, in_flight)[0]
        return forward_s, backward_s

    def in_halves(self, size: int, in_flight: int = 1) -> tuple[float, float, float]:
        """Seconds of forward, backward of inputs, and of weights, each of all in flight in a row."""
        forward_s, inputs_s, weights_s = self._passed(IN_HALVES, size, 1.0, in_flight)[0]
        return forward_s, inputs_s, weights_s

    def by_unit(self, size: int, slowdown: float = 1.0) -> Spent:
        """Forward and backward seconds of every unit of the chain, in one pass over all of them."""
        return self._passed(BY_UNIT, size, slowdown)

    def by_stage(
        self, number: int, size: int, slowdowns: Sequence[float], in_flight: int
    ) -> tuple[Spent, Spent]:
        """Forward and backward seconds of every stage of a partition that the worker was given.

        It waits after each stage as a worker does that is slowed down by the stage's own number. Those of
        a step's first microbatch, and of the last in flight.
        """
        spent = self._pass(_by_stage(number), size, slowdowns, in_flight, whole_step=True)
        return spent[0], spent[-1]

    def update(self) -> float:
        """Seconds of the optimiser on the gradients at hand, which are gone afterwards."""
        return self.workers.time_update()

    def _passed(self, name: str, size: int, slowdown: float = 1.0, in_flight: int = 1) -> Spent:
        stages = len(self.model.prepared.chain.units) if name == BY_UNIT else 1
        spent = self._pass(name, size, [slowdown] * stages, in_flight)
        # The first microbatch of several comes after another stage's, or after a pause.
        counted = zip(*(spent[1:] or spent), strict=True)
        return [tuple(map(mean, zip(*of_stage, strict=True))) for of_stage in counted]

    def _pass(
        self, name: str, size: int, slowdowns: Sequence[float], in_flight: int, whole_step: bool = False
    ) -> list[Spent]:
        self.make_ready(name)
        inputs = self.model.inputs(size)
        return self.workers.time_pass(name, inputs, size, slowdowns, in_flight, whole_step)

    def make_ready(self, name: str) -> None:
        """Install a way to pass through the model, unless it is there."""
        if name not in self._ready:
            self.model.install(self.workers, name, self.divided.get(name))
            self._ready.add(name)

    def repeat(self, size: int, slowdown: float, over: threading.Event) -> None:
        """Pass through the model, with pauses, until it is over or the worker is gone."""
        with contextlib.suppress(RunError):
            while not over.is_set():
                self.whole(size, slowdown)


def _by_stage(number: int) -> str:
    return f"by stage {number}"


def _alone(prepared: Prepared, precision: str) -> Partition:
    alone = whole_on_one_device(prepared.graph)
    (pipeline,) = alone.pipelines
    (stage,) = pipeline.stages
    stage = replace(stage, replicas=(Replica("local/0", 1),), precision=precision)
    return replace(alone, pipelines=(replace(pipeline, stages=(stage,)),))


def _unit_by_unit(alone: Partition) -> Partition:
    """The same with a stage for every unit."""
    (pipeline,) = alone.pipelines
    units = pipeline.stages[-1].last
    precision = pipeline.stages[-1].precision
    stages = tuple(StageChoice(u, u + 1, (Replica(f"local/{u}", 1),), precision) for u in range(units))
    return replace(alone, pipelines=(replace(pipeline, stages=stages),))
