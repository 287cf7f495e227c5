"""Random modules, cut anywhere, dealt to any workers, compute what one device computes."""

from dataclasses import dataclass
from typing import Any

import torch
from helpers import TRAINING, Line, check_inference, check_training, finest_chain
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn

from graphpar.preparation import prepare

WIDTH = 4


@dataclass(frozen=True)
class Step:
    """One layer of a random module: what it reads, which weights it has, how it bends."""

    reads: tuple[int, ...]
    weight: int
    bend: str


class Drawn(nn.Module):
    """A random directed graph of layers with shared weights; every loose end reaches the loss."""

    def __init__(self, steps: tuple[Step, ...], drop: bool) -> None:
        super().__init__()
        self.steps = steps
        self.weights = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.norm = nn.LayerNorm(WIDTH)
        self.drop = nn.Dropout(0.25 if drop else 0.0)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        values = [x]
        for step in self.steps:
            total = values[step.reads[0]]
            for place in step.reads[1:]:
                total = total + values[place]
            values.append(self.bend(self.weights[step.weight](total), step.bend))
        read = {place for step in self.steps for place in step.reads}
        ends = [value for place, value in enumerate(values) if place not in read]
        loss = sum((nn.functional.mse_loss(end, y) for end in ends), torch.zeros(()))
        assert isinstance(loss, torch.Tensor)
        return {"loss": loss, "first": values[1], "signs": values[-1] > 0, "best": values[-1].argmax(-1)}

    def bend(self, value: torch.Tensor, how: str) -> torch.Tensor:
        """A nonlinear function of a layer's result."""
        if how == "norm":
            value = self.norm(value)
        elif how == "where":
            value = torch.where(value > 0, value, value * 0.5)
        elif how == "wide":
            value = (value.double() * 1.5).float()
        elif how == "narrow":
            value = value + value.to(torch.bfloat16).float().detach()
        elif how == "whole":
            value = value * (1 + (value > 0).sum(-1, keepdim=True).to(torch.int32))
        elif how == "drop":
            value = self.drop(value)
        return value.tanh()


@st.composite
def modules(draw: st.DrawFn) -> Drawn:
    steps = []
    for number in range(draw(st.integers(2, 5))):
        reads = draw(st.sets(st.integers(0, number), min_size=1, max_size=3))
        bend = draw(st.sampled_from(["tanh", "norm", "where", "drop", "wide", "narrow", "whole"]))
        steps.append(Step(tuple(sorted(reads)), draw(st.integers(0, 2)), bend))
    return Drawn(tuple(steps), drop=draw(st.booleans()))


@st.composite
def lines(draw: st.DrawFn, units: int, samples: int, workers: int) -> Line:
    """A pipeline of at most so many workers over random cuts."""
    count = draw(st.integers(1, min(workers, units)))
    places = st.integers(1, max(1, units - 1))
    cuts = draw(st.sets(places, min_size=count - 1, max_size=count - 1))
    microbatches = draw(st.integers(1, min(4, samples)))
    stages: list[int | tuple[int, ...]] = [1] * count
    if count < workers and microbatches > 1 and draw(st.booleans()):
        share = draw(st.integers(1, microbatches - 1))
        stages[draw(st.integers(0, count - 1))] = (share, microbatches - share)
    return Line(tuple(stages), microbatches, samples, tuple(sorted(cuts)))


@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(st.data())
def test_random_modules_on_random_workers(data: st.DataObject) -> None:
    torch.manual_seed(0)
    model = data.draw(modules())
    batch = torch.randn(7, WIDTH), torch.randn(7, WIDTH)
    training = data.draw(st.booleans())
    train = TRAINING if training else None
    prepared = prepare(model, batch, {}, train)
    assume(not prepared.batch_reason)
    units = len(finest_chain(prepared.graph).units)
    first = data.draw(st.sampled_from([7, 5, 3]))
    chosen = [data.draw(lines(units, first, 4 if first == 7 else 2))]
    if first < 7:
        chosen.append(data.draw(lines(units, 7 - first, 2)))
    schedule = data.draw(st.sampled_from(["gpipe", "1f1b"]))
    how: dict[str, Any] = {"train": train, "schedule": schedule, "by_op": True, "prepared": prepared}
    if not training:
        check_inference(model, batch, lines=chosen, **how)
        return
    check_training(model, batch, lines=chosen, zero=data.draw(st.sampled_from([0, 2])), **how)
