"""A backward in two halves gives the very numbers of one backward, whatever the weights are like."""

from functools import partial

import pytest
import torch
from helpers import Forced, force, straight
from torch import nn

import graphpar
from graphpar.ir.graph import Graph
from graphpar.partition.settings import ScheduleWish
from graphpar.partition.types import ScheduleName
from graphpar.preparation import lower
from graphpar.training import Training


class Mixed(nn.Module):
    """Convolution, products by transposed, frozen, shared and derived weights, a bias alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 12)
        self.convolution = nn.Conv1d(3, 3, 3, padding=1)
        self.turned = nn.Parameter(torch.randn(12, 12) / 4)
        self.shared, self.frozen = nn.Linear(12, 12), nn.Linear(12, 12)
        self.frozen.weight.requires_grad_(False)
        self.derived = nn.utils.parametrizations.weight_norm(nn.Linear(12, 12))
        self.norm = nn.LayerNorm(12)

    def forward(self, x: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        x = self.first(x).tanh()
        x = self.convolution(x.view(-1, 3, 4)).reshape(-1, 12)
        x = x + torch.addmm(self.shared.bias, x, self.turned.t())
        x = self.shared(self.shared(x).relu())
        x = self.norm(self.derived(x) + self.frozen(x) @ self.turned)
        return nn.functional.mse_loss(x, wanted)


def trained(
    forced: Forced, batch: tuple[torch.Tensor, ...]
) -> tuple[list[float], dict[str, torch.Tensor]]:
    with forced.start() as job:
        losses = [float(job.step(*batch)) for _ in range(2)]
        return losses, job.state_dict()


def test_halves_are_equal_to_the_bit() -> None:
    model, batch = Mixed(), (torch.randn(6, 6), torch.randn(6, 12))
    names: tuple[ScheduleName, ...] = ("1f1b", "zero-bubble")
    whole, halves = (force(model, batch, lines=straight(2, 3), schedule=name) for name in names)
    late = [op.target for graph in lowered(halves) for op in graph.ops if op.attr("late")]
    assert {"aten.linear.default", "aten.addmm.default"} <= set(late)
    assert "I" in {action.kind for row in halves.plan.schedule().actions for action in row}
    losses, state = trained(whole, batch)
    split_losses, split_state = trained(halves, batch)
    assert split_losses == losses
    for name, tensor in state.items():
        torch.testing.assert_close(split_state[name], tensor, rtol=1e-6, atol=1e-7, msg=name)


def lowered(forced: Forced) -> tuple[Graph, ...]:
    return lower(forced.prepared.graph, forced.plan.partition, training=True).graphs


@pytest.mark.slow
def test_halves_in_bfloat16_round_like_one_backward() -> None:
    model, batch = Mixed(), (torch.randn(8, 6), torch.randn(8, 12))
    cluster = {"devices": [{"kind": "cpu", "count": 2, "threads": 1}]}
    found = {}
    wishes: tuple[ScheduleWish, ...] = ("1f1b", "zero-bubble")
    for wish in wishes:
        sgd = partial(torch.optim.SGD, lr=0.1)
        training = Training(optimizer=sgd, schedule=wish, microbatches=4)
        with graphpar.compile(model, cluster, batch, train=training, precision="bfloat16") as job:
            found[job.plan.partition.schedule] = float(job.step(*batch)), float(job.step(*batch))
    assert found["zero-bubble"] == pytest.approx(found["1f1b"], rel=1e-2)
