"""A job that compares its first step with one device."""

import logging
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from helpers import TRAINING, Forced, Line, force, sgd, straight
from torch import nn

import graphpar
from graphpar.compiler import subject_of
from graphpar.errors import NumbersDifferError
from graphpar.ir.graph import Graph
from graphpar.partition.types import Partition
from graphpar.preparation import lower
from graphpar.runtime.assemble import Lowered
from graphpar.runtime.first_step import FirstStepCheck
from graphpar.runtime.job import CompiledModel
from graphpar.training import Training


class Net(nn.Module):
    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 4)) for _ in range(3)
        )
        self.drop = nn.Dropout(drop)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = self.drop(layer(x))
        return nn.functional.cross_entropy(x, y)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.randint(0, 4, (8,))
    labels[:3] = -100
    return torch.randn(8, 4), labels


def losses(forced: Forced, given: tuple[torch.Tensor, torch.Tensor], check: bool) -> Iterator[float]:
    with graphpar.compile(
        forced.model,
        forced.cluster,
        given,
        train=forced.training,
        plan=forced.plan,
        verify_first_step=check,
    ) as job:
        for _ in range(3):
            yield float(job.step(*given))


@pytest.mark.parametrize("drop", [0.0, 0.3])
def test_training_goes_on_as_without_the_check(drop: float, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "graphpar.verify")
    training = Training(optimizer=lambda p: torch.optim.AdamW(p, lr=0.1), max_grad_norm=0.1)
    given = batch()
    lines = (Line((1, 1), 2, 5), Line((1,), 1, 3))
    forced = force(Net(drop), given, lines=lines, train=training)
    assert list(losses(forced, given, check=True)) == list(losses(forced, given, check=False))
    assert "The first step agrees with one device: the loss is" in caplog.text


def test_a_difference_is_told_with_numbers_before_weights_change() -> None:
    model, given = Net(), batch()
    forced = force(model, given, lines=straight(2, 2))

    def wrong(graph: Graph, found: Partition, like: Lowered | None) -> Lowered:
        ops = [
            replace(op, target="aten.sigmoid.default") if op.target == "aten.relu.default" else op
            for op in graph.ops
        ]
        return lower(graph.with_ops(ops), found, training=True, like=like)

    subject = subject_of(model, forced.prepared, forced.cluster, TRAINING)
    check = FirstStepCheck(model, subject.captured, subject.graph, TRAINING, subject.lower)
    broken = replace(subject, lower=wrong, check=check)
    with CompiledModel.start(broken, lambda: forced.plan) as job:
        with pytest.raises(NumbersDifferError, match=r"loss is \d.*on one device.*gradient is \d.*\("):
            job.step(*given)
        state = job.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_a_step_that_overflows_is_skipped_and_the_next_one_checked(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The format is the plan's, of which the call says nothing."""
    caplog.set_level(logging.INFO, "graphpar.verify")
    model, given, one = Net(), batch(), {"devices": [{"kind": "cpu", "threads": 1}]}
    training = Training(optimizer=sgd, loss=lambda x, y: 50.0 * nn.functional.mse_loss(x, y))
    layers, wanted = nn.Sequential(*model.layers), torch.randn(8, 4) * 40
    plan = graphpar.plan(
        layers, one, (given[0], wanted), train=training, precision="float16", measure_s=0
    )
    with graphpar.compile(
        layers, one, (given[0], wanted), train=training, plan=plan, verify_first_step=True
    ) as job:
        skipped = True
        for number in range(20):
            job.step(given[0], wanted)
            assert job.last_step is not None
            skipped = job.last_step.skipped
            assert skipped or number > 0
            assert skipped == ("The first step" not in caplog.text)
            if not skipped:
                break
    assert not skipped


@pytest.mark.parametrize("bad", [0.0, float("nan")])
def test_numbers_that_are_none_are_no_proof(bad: float, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "graphpar.verify")
    model, given = Net(), batch()
    given[0][-1] = bad
    forced = force(model, given, lines=straight(2, 2))
    subject = subject_of(model, forced.prepared, forced.cluster, TRAINING)
    check = FirstStepCheck(model, subject.captured, subject.graph, TRAINING, subject.lower)
    loss = model(*given)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    check.compare(loss.detach(), gradients, model.state_dict(), given, {})
    (told,) = caplog.records
    assert (told.levelname, "100 % of its numbers" in told.message) == (
        ("INFO", False) if bad == 0 else ("WARNING", True)
    )


def test_inference_has_no_first_step() -> None:
    with pytest.raises(ValueError, match="checks a training step"):
        graphpar.compile(Net(), {"devices": [{"kind": "cpu"}]}, batch(), verify_first_step=True)
