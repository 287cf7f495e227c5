"""One device: the user's own model where it draws nothing at random, else its captured graph.

Random ops (dropout) of eager PyTorch draw from a stream that depends on how the batch is cut, so that
no plan could repeat them. The captured graph on one device with the job's seed is the reference then.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from graphpar.frontend.capture import Captured
from graphpar.frontend.export import find_loss
from graphpar.frontend.objects import opened
from graphpar.frontend.torch_private import flatten
from graphpar.ir.chain import RANDOM_TARGETS, build_chain
from graphpar.ir.graph import Graph
from graphpar.partition.types import Partition, PipelineChoice, Replica, StageChoice
from graphpar.runtime.lower import StageBuilder
from graphpar.runtime.merge import check_inputs
from graphpar.runtime.prologue import Prologue
from graphpar.runtime.random import StepContext
from graphpar.training import Training


def draws_at_random(graph: Graph) -> bool:
    """Whether the graph has ops that draw random numbers."""
    return any(op.target in RANDOM_TARGETS for op in graph.ops)


def whole_on_one_device(graph: Graph) -> Partition:
    """The partition that leaves everything on a single device."""
    units = len(build_chain(graph).units)
    stage = StageChoice(0, units, (Replica("one/0", 1),))
    return Partition(
        pipelines=(PipelineChoice(graph.batch, 1, (stage,)),),
        schedule="gpipe",
        status="feasible",
        objective_s=0.0,
        parts={},
        bound_s=0.0,
        gap=0.0,
        physical_bound_s=0.0,
        seconds=0.0,
        truncated_by=(),
        family="one device",
        peak_bytes={},
    )


class OneDevice:
    """Runs a captured graph on one device, on a copy of the model's tensors.

    Args:
        model: The user's model; left as it is.
        captured: The captured model.
        graph: Its graph, lowered as a single stage.
        source: The captured graph after the first passes.
        seed: Seed of the random streams.
    """

    def __init__(
        self, model: nn.Module, captured: Captured, graph: Graph, source: Graph, seed: int
    ) -> None:
        self._captured, self._graph = captured, graph
        trained = {str(op.args[0]) for op in graph.sources("parameter") if op.attr("grad")}
        self.tensors: dict[str, torch.Tensor] = {**captured.constants}
        for name, tensor in (*model.named_buffers(), *model.named_parameters(remove_duplicate=False)):
            copied = tensor.detach().clone()
            self.tensors[name] = nn.Parameter(copied) if name in trained else copied
        self.trained = {n: p for n, p in self.tensors.items() if isinstance(p, nn.Parameter)}
        self.parameters = list(self.trained.values())
        self._context = StepContext(seed=seed)
        cpu = torch.device("cpu")
        self._builder = StageBuilder(graph, 0, self.tensors, cpu, self._context)
        self._prologue = Prologue.of(source, self.tensors)

    def forward(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], step: int = 0
    ) -> list[torch.Tensor]:
        """The graph's results for a batch."""
        return self.run(self._captured.signature.bind(args, kwargs), step)

    def run(self, inputs: Mapping[str, torch.Tensor], step: int = 0) -> list[torch.Tensor]:
        """The graph's results for inputs by name."""
        samples = check_inputs(self._graph, inputs, self._captured.signature.batched)
        if self._prologue is not None:
            inputs = {**inputs, **self._prologue.run(inputs, samples)}
        context = self._context
        context.step, context.batch, context.first_sample, context.samples = step, samples, 0, samples
        return self._builder.whole(inputs, samples)

    def on(self, graph: Graph) -> "OneDevice":
        """Another lowered graph of the same model, on the same tensors."""
        other = copy.copy(self)
        other._graph = graph
        other._builder = StageBuilder(graph, 0, self.tensors, torch.device("cpu"), self._context)
        return other

    def gradients(self) -> dict[str, torch.Tensor]:
        """Gradients by label since they were last cleared."""
        return {k: t.grad for k, t in self.tensors.items() if t.grad is not None}


def copied(model: nn.Module) -> nn.Module:
    """A copy of a model that shares no memory with it.

    What a module computes and keeps as a plain attribute (`nn.utils.weight_norm` its weight) cannot be
    copied by torch with its history; it is copied without.

    >>> layer = nn.Linear(2, 2)
    >>> layer.twice = layer.weight * 2
    >>> copied(layer).twice.requires_grad
    False
    """
    held = (value for module in model.modules() for value in vars(module).values())
    made = [v for v in held if isinstance(v, torch.Tensor) and not v.is_leaf]
    return copy.deepcopy(model, {id(value): value.detach().clone() for value in made})


class EagerModel:
    """The user's model on one device, on a copy of its weights."""

    def __init__(self, model: nn.Module, training: Training | None) -> None:
        self.model = copied(model)
        self._loss = training.loss if training else None
        self._training = training is not None
        self.trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.parameters = list(self.trained.values())
        if training is None:
            self.model.eval()

    def forward(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], step: int = 0
    ) -> list[torch.Tensor]:
        """The loss when training, else the model's result as flat tensors."""
        if not self._training:
            leaves, _ = flatten(opened(self.model(*args, **kwargs)))
            return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        if self._loss is not None:
            return [self._loss(self.model(*args[:-1], **kwargs), args[-1])]
        return [find_loss(self.model(*args, **kwargs))]

    def gradients(self) -> dict[str, torch.Tensor]:
        """Gradients by name since they were last cleared."""
        named = self.model.named_parameters()
        return {name: p.grad.to_dense() for name, p in named if p.grad is not None}
