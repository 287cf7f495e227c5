"""`torch.autocast` in a model and `precision=` around it: what the model asks for itself stays."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from helpers import TRAINING, compare_states, cpus, sgd
from torch import Tensor, nn

import graphpar

pytestmark = pytest.mark.distributed


class Partly(nn.Module):
    """Layers in the job's format, under autocast, in an island without it, and after it."""

    def __init__(self, low: torch.dtype) -> None:
        super().__init__()
        self.low = low
        self.first, self.inner, self.island = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.first(x).tanh()
        with torch.autocast("cpu", self.low):
            low = self.inner(h)
            assert low.dtype == self.low
            with torch.autocast("cpu", enabled=False):
                h = h + self.island(low.float())
            mixed = self.norm(torch.softmax(low, -1) @ self.inner.weight + h)
            loss = F.cross_entropy(self.head(mixed), y)
        again: Tensor = self.inner(h).square().mean()
        return loss + 0.1 * again


QUICK = ("bfloat16", "float16")
BATCH = torch.randn(6, 8), torch.tensor([0, 1, 2, 3, 0, 1])


SETTINGS = [
    pytest.param(
        precision, low, marks=() if low != precision and precision in QUICK else pytest.mark.slow
    )
    for precision in ("float32", "bfloat16", "float16", "auto")
    for low in ("bfloat16", "float16")
]


@pytest.mark.parametrize(("precision", "low"), SETTINGS)
def test_training_is_eagers_but_for_rounding(precision: Any, low: str) -> None:
    torch.manual_seed(0)
    model = Partly(getattr(torch, low))
    alone = copy.deepcopy(model)
    optimizer = sgd(alone.parameters())
    with graphpar.compile(model, cpus(2), args=BATCH, train=TRAINING, precision=precision) as job:
        for _ in range(3):
            got = job.step(*BATCH)
            loss = alone(*BATCH)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            assert float(got) == pytest.approx(float(loss.detach()), rel=1e-2)
        compare_states(job.state_dict(), alone.state_dict(), model.state_dict(), 2e-3)


class Angles(nn.Module):
    """Angles of positions that only float32 tells apart, computed where autocast is switched off."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 4)
        self.rates = nn.Parameter(torch.linspace(0.1, 1.0, 16)[:, None])

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        h = self.first(x)
        with torch.autocast("cpu", enabled=False):
            angles = F.linear(positions, self.rates)
        result: Tensor = self.last(h.tanh() * angles.sin()).square().mean()
        return result


@pytest.mark.parametrize("precision", QUICK)
def test_islands_without_autocast_are_islands_for_the_jobs_format_too(precision: Any) -> None:
    torch.manual_seed(0)
    model = Angles()
    batch = torch.randn(6, 8), torch.linspace(1000.0, 1010.0, 6)[:, None]
    with graphpar.compile(model, cpus(2), args=batch, train=TRAINING, precision=precision) as job:
        losses = [float(job.step(*batch)) for _ in range(2)]
        assert {s.precision for p in job.plan.partition.pipelines for s in p.stages} == {precision}
    alone = copy.deepcopy(model)
    assert losses[0] == pytest.approx(float(alone(*batch).detach()), rel=1e-2)
