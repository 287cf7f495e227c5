"""A job takes batches of other sizes and shapes than its example's, and computes what one device does."""

import copy
import logging
from collections.abc import Sequence

import pytest
import torch
from helpers import Forced, Line, compare_states, force, handmade, sgd, straight
from hypothesis import given, settings
from hypothesis import strategies as st
from test_equality import Language, sentences
from torch import nn

from graphpar.partition.types import PipelineChoice, Replica, ScheduleName, StageChoice
from graphpar.runtime.other_batches import rescale, whole_batch
from graphpar.schedule import build_schedule
from graphpar.schedule.check import validate
from graphpar.training import Training

Batch = tuple[torch.Tensor, ...]


def follow(forced: Forced, batches: Sequence[Batch]) -> None:
    """Train on all batches, here and on one device, and compare losses and states."""
    training = forced.training
    assert training is not None
    model = copy.deepcopy(forced.model)
    optimizer = sgd(model.parameters())
    with forced.start() as job:
        for batch in batches:
            got = job.step(*batch)
            loss = training.loss(model(*batch[:-1]), batch[-1]) if training.loss else model(*batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            torch.testing.assert_close(got, loss.detach(), rtol=2e-5, atol=1e-6)
        compare_states(job.state_dict(), model.state_dict(), forced.model.state_dict())


@pytest.mark.distributed
def test_any_number_of_samples_and_words(caplog: pytest.LogCaptureFixture) -> None:
    model = Language()
    forced = force(model, sentences(8), lines=(Line((1, 2), 4, 6), Line((1,), 1, 2)))
    sizes = [(8, 5), (3, 5), (1, 5), (2, 5), (13, 5), (8, 7), (1, 7), (5, 7), (8, 5)]
    batches = [sentences(batch, length) for batch, length in sizes]
    for _, labels in batches:
        labels[-1, -1] = 3  # without any label eager's loss is no number
    with caplog.at_level(logging.WARNING, "graphpar.job"):
        follow(forced, batches)
    said = [r.message for r in caplog.records if r.name == "graphpar.job"]
    assert len(said) == 1 and "captured again" in said[0], "once, for seven words"


class Normal(nn.Module):
    """Batch statistics in training: samples mix."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.last(self.norm(self.first(x)).relu())
        return result


class Branching(nn.Module):
    """Another graph for many samples than for few."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x).sin() if max(len(x), 14) > 14 else layer(x).relu()  # export has 6 and 13
        return x


@pytest.mark.distributed
@pytest.mark.parametrize("model", [Normal(), Branching()], ids=lambda model: type(model).__name__)
def test_batches_with_graphs_of_their_own(model: nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    training = Training(optimizer=sgd, loss=nn.functional.cross_entropy)

    def batch(size: int) -> Batch:
        return torch.randn(size, 4), torch.randint(0, 2, (size,))

    forced = force(model, batch(6), lines=straight(2), train=training)
    with caplog.at_level(logging.WARNING, "graphpar.job"):
        follow(forced, [batch(size) for size in (6, 5, 3, 16, 6)])
    if isinstance(model, Branching):
        assert "it was captured with: samples < 14 at test_batch_sizes.py" in caplog.text


@pytest.mark.distributed
def test_inference_takes_other_shapes() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    forced = force(model, (torch.randn(6, 4),), lines=(Line((2,), 4, 4), Line((1,), 2, 2)), train=None)
    with forced.start() as job, torch.no_grad():
        for shape in ((6, 4), (1, 4), (7, 4), (3, 5, 4), (2, 5, 4)):
            if len(shape) == 3:
                with pytest.raises(ValueError, match="captured for"):
                    job(torch.randn(shape))
                continue
            x = torch.randn(shape)
            torch.testing.assert_close(job(x), model(x))
        with pytest.raises(ValueError, match=r"captured for .* Capturing the model again failed"):
            job(torch.randn(6, 3))
        torch.testing.assert_close(job(x), model(x))


SCHEDULES: list[ScheduleName] = ["gpipe", "1f1b"]
stages = st.lists(st.integers(1, 3), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(stages, st.integers(0, 4), st.integers(0, 6)), min_size=1, max_size=4),
    st.integers(1, 20),
    st.booleans(),
    st.sampled_from(SCHEDULES),
)
def test_every_batch_size_has_a_valid_schedule(
    lines: list[tuple[list[int], int, int]], batch: int, whole: bool, schedule: ScheduleName
) -> None:
    pipelines = []
    for p, (widths, more_microbatches, more_samples) in enumerate(lines):
        microbatches = max(widths) + more_microbatches
        choices = [
            StageChoice(s, s + 1, tuple(
                Replica(f"{p}.{s}.{r}", microbatches // width + (r < microbatches % width))
                for r in range(width)
            ))
            for s, width in enumerate(widths)
        ]  # fmt: skip
        pipelines.append(PipelineChoice(microbatches + more_samples, microbatches, tuple(choices)))
    found = handmade(tuple(pipelines), schedule)
    other = whole_batch(found, batch) if whole else rescale(found, batch)
    made = build_schedule(other, (), True, idle_allowed=True)
    validate(made)
    assert sum(made.microbatch_sizes) == batch and min(made.microbatch_sizes) > 0
    assert len(made.microbatch_sizes) == 1 or not whole
