"""Stages that compute their units again: the same numbers, less kept, and chosen where memory binds."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import TRAINING, check_training, cpus, force, straight
from test_equality import Block, Language, sentences
from torch import nn

from graphpar.partition.types import Partition
from graphpar.planner import plan_prepared
from graphpar.preparation import lower, prepare
from graphpar.runtime.lower import StageBuilder
from graphpar.runtime.random import StepContext
from graphpar.runtime.recompute import Recomputed


class Normed(nn.Module):
    """Running statistics of one unit; the others may run twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(6, 8), nn.BatchNorm1d(8)
        self.last = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return nn.functional.mse_loss(self.last(self.norm(self.first(x)).relu()), y)


@pytest.mark.parametrize("stages", [1, 2])
def test_dropout_ties_and_microbatches_give_the_same_numbers(stages: int) -> None:
    torch.manual_seed(1)
    model = Language(drop=0.2)
    check_training(model, sentences(), lines=straight(stages, 4), recompute=True)


def test_a_unit_that_writes_statistics_runs_once() -> None:
    torch.manual_seed(2)
    data = torch.randn(4, 6), torch.randn(4, 3)
    check_training(Normed(), data, lines=straight(1), recompute=True)


class Stack(nn.Module):
    """Equal blocks and a loss."""

    def __init__(self, width: int = 32, layers: int = 6) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return nn.functional.mse_loss(x, y)


def kept_bytes(stage: StageBuilder, inputs: tuple[torch.Tensor, ...]) -> int:
    """Bytes that autograd keeps outside the parts computed again, weights left out."""
    sizes: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, nn.Parameter):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        stage.module(8, 8)(*inputs)
    return sum(sizes.values())


def stages_of(recompute: bool) -> tuple[StageBuilder, tuple[torch.Tensor, ...]]:
    """The whole model as one stage, built in this process."""
    torch.manual_seed(3)
    model, data = Stack(), (torch.randn(8, 32), torch.randn(8, 32))
    forced = force(model, data, lines=straight(1), recompute=recompute)
    lowered = lower(forced.prepared.graph, forced.plan.partition, True)
    graph, (placement,) = lowered.graphs[0], lowered.placements
    held: dict[str, Any] = dict(model.state_dict(keep_vars=True))
    tensors = {label: held[label] for label in placement.labels if label in held}
    tensors |= {la: v for la, v in forced.prepared.captured.constants.items() if la in placement.labels}
    context = StepContext(seed=0, batch=8, samples=8)
    builder = StageBuilder(graph, 0, tensors, torch.device("cpu"), context, recompute=placement.recompute)
    return builder, data


def test_less_is_kept() -> None:
    plain, inputs = stages_of(recompute=False)
    again, _ = stages_of(recompute=True)
    assert any(isinstance(m, Recomputed) for m in again.module(8, 8).modules())
    assert kept_bytes(again, inputs) < 0.6 * kept_bytes(plain, inputs)


def recomputes(found: Partition) -> set[bool]:
    """Whether stages recompute."""
    return {s.recompute for p in found.pipelines for s in p.stages}


def test_it_is_chosen_where_memory_binds() -> None:
    model, data = Language(words=50, width=64, layers=8), sentences(batch=32, length=64)
    prepared = prepare(model, data, {}, TRAINING)

    def chosen(memory_bytes: float) -> Partition:
        cluster = cpus(1, memory_bytes=int(memory_bytes))
        train = replace(TRAINING, microbatches=1)
        return plan_prepared(
            prepared,
            cluster,
            train=train,
            precision="float32",
            calibration=None,
            time_limit_s=60.0,
            gap=0.01,
        ).partition

    ample = chosen(64e9)
    assert recomputes(ample) == {False}
    (peak,) = ample.peak_bytes.values()
    tight = chosen(peak * 0.97)
    assert recomputes(tight) == {True}
    assert max(tight.peak_bytes.values()) <= peak * 0.97
