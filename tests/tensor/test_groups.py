"""Tensor groups in running jobs: the numbers of one device, whatever the widths and shares."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TRAINING, Forced, Line, check_inference, check_training, force, sgd, state_of
from torch import nn

from graphpar.cost_models.group_times import OpTimes, TensorGroup
from graphpar.partition.types import PipelineChoice, Replica, StageChoice
from graphpar.runtime.job import CompiledModel
from graphpar.runtime.zero import refuse_levels
from graphpar.training import Training
from graphpar.verify import reference_for, train_on_one_device, verify

pytestmark = pytest.mark.distributed


@pytest.fixture(autouse=True)
def free_links(monkeypatch: pytest.MonkeyPatch) -> None:
    """Links that cost nothing, so that small models are cut wherever they can be."""
    monkeypatch.setattr(TensorGroup, "seconds", lambda self, name, num_bytes: 0.0)
    monkeypatch.setattr(OpTimes, "host_seconds", lambda self, name, num_bytes: 0.0)


class Mlp(nn.Module):
    """Two layers, dropout and a loss."""

    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        self.up, self.down, self.out = nn.Linear(12, 20), nn.Linear(20, 12), nn.Linear(12, 6)
        self.drop = nn.Dropout(drop)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        h = x + self.drop(self.down(torch.relu(self.drop(self.up(x)))))
        result: torch.Tensor = nn.functional.cross_entropy(self.out(h), y)
        return result


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(8, 12), torch.randint(0, 6, (8,))


UNEVEN = (0.6, 0.4)
ALONE: tuple[float, ...] = ()
CASES = {
    "two": (Line((1,), 2, groups=(UNEVEN,)),),
    "three": (Line((1,), 1, groups=((0.5, 0.3, 0.2),)),),
    "group, then a slow device": (Line((1, 1), 2, cuts=(1,), groups=(UNEVEN, ALONE)),),
    "a slow device, then a group": (Line((1, 1), 2, cuts=(1,), groups=(ALONE, UNEVEN)),),
    "widths 2 and 3": (Line((1, 1), 2, cuts=(1,), groups=(UNEVEN, (0.4, 0.3, 0.3))),),
    "two groups take turns": (Line((2,), 3, groups=(UNEVEN,)),),
    "tensor x pipeline x data": (Line((2, 2), 4, cuts=(1,), groups=((0.5, 0.5), (0.5, 0.5))),),
    "side by side, unlike": (
        Line((1,), 1, samples=4, groups=(UNEVEN,)),
        Line((1,), 2, samples=4, groups=((0.3, 0.3, 0.4),)),
    ),
    "group beside one device": (Line((1,), 1, 4, groups=(UNEVEN,)), Line((1,), 2, 4)),
}


@pytest.mark.parametrize("lines", CASES.values(), ids=CASES.keys())
def test_training(lines: tuple[Line, ...]) -> None:
    check_training(Mlp(0.2), batch(), lines=lines)


class Deep(nn.Module):
    """Enough layers for two stages on each of two groups."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(12, 12) for _ in range(6))
        self.out = nn.Linear(12, 6)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + torch.relu(layer(x))
        result: torch.Tensor = nn.functional.cross_entropy(self.out(x), y)
        return result


@pytest.mark.slow
def test_other_schedules() -> None:
    even = (0.5, 0.5)
    late = (Line((1, 1), 4, cuts=(1,), groups=(UNEVEN, even)),)
    check_training(Mlp(0.2), batch(), lines=late, schedule="zero-bubble")
    in_turns = (Line((1, 1), 4, groups=(UNEVEN, even), chunks=2),)
    check_training(Deep(), batch(), lines=in_turns, schedule="interleaved", recompute=True)


class Words(nn.Module):
    """A table of words that is the head too, layers and dropout between."""

    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        self.table, self.drop = nn.Embedding(20, 8), nn.Dropout(drop)
        self.ups = nn.ModuleList(nn.Linear(8, 12) for _ in range(3))
        self.downs = nn.ModuleList(nn.Linear(12, 8) for _ in range(3))

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        for up, down in zip(self.ups, self.downs, strict=True):
            x = x + self.drop(down(torch.relu(up(x))))
        scores = x @ self.table.weight.t()
        result: torch.Tensor = nn.functional.cross_entropy(scores.flatten(0, 1), labels.flatten())
        return result


def sentences() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randint(0, 20, (6, 5)), torch.randint(0, 20, (6, 5))


def test_a_tied_weight_in_two_stages_of_one_group() -> None:
    """Table and head stand in unlike stages, but their common weight is held in one way."""
    lines = (Line((1,), 2, groups=((0.5, 0.5),), chunks=2),)
    check_training(Words(), sentences(), lines=lines, schedule="interleaved")


def test_computed_again_with_divided_state() -> None:
    """Two groups take turns; each member keeps state and gradients of half of its slices."""
    adam = Training(optimizer=partial(torch.optim.AdamW, lr=0.01, eps=1e-3), max_grad_norm=0.3)
    lines = (Line((2,), 3, groups=(UNEVEN,)),)
    check_training(Words(0.2), sentences(), lines=lines, train=adam, zero=2, recompute=True)


def check_saved(job: CompiledModel, forced: Forced, data: tuple[torch.Tensor, ...], folder: Path) -> None:
    """A step of the job, one of one device from its checkpoint, and one of the same plan from that."""
    train = forced.training
    assert train is not None
    losses = [float(job.step(*data))]
    job.save(folder / "cut")
    with force(forced.model, data, lines=(Line((1,)),), train=train).start() as alone:
        alone.load(folder / "cut")
        losses.append(float(alone.step(*data)))
        alone.save(folder / "whole")
    with forced.start() as again:
        again.load(folder / "whole")
        losses.append(float(again.step(*data)))
        state = again.state_dict()
        fewer = again.step(*(tensor[: len(tensor) - 2] for tensor in data))
        assert fewer.isfinite()
    reference = reference_for(forced.model, forced.prepared, train)
    assert losses == pytest.approx(list(train_on_one_device(reference, train, data, {}, 3)), rel=1e-5)
    for name, tensor in state_of(reference, forced).items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-4, atol=1e-6)


def test_divided_slices_are_saved_whole(tmp_path: Path) -> None:
    """Rows of slices go into a checkpoint that one device reads, and back."""
    adam = Training(optimizer=partial(torch.optim.AdamW, lr=0.01, eps=1e-3))
    model, data = Mlp(), batch()
    divided = force(model, data, lines=(Line((2,), 2, groups=(UNEVEN,)),), train=adam, zero=1)
    with divided.start() as job:
        cuts = [cut for cuts in job._trained_on.stepped for cut in cuts.values()]
        assert sum(cut.rows is not None for cut in cuts) >= 8
        check_saved(job, divided, data, tmp_path)


def test_groups_of_unlike_shares_do_not_divide() -> None:
    groups = Replica("a", 1, ("b",), (0.6, 0.4)), Replica("c", 1, ("d",), (0.7, 0.3))
    pipeline = PipelineChoice(8, 2, (StageChoice(0, 1, groups, zero=1),))
    with pytest.raises(ValueError, match="unlike widths or shares"):
        refuse_levels(pipeline, TRAINING)


class Normed(nn.Module):
    """Statistics of the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return nn.functional.mse_loss(self.last(self.norm(self.first(x)).relu()), y)


def test_groups_do_not_go_in_step_with_other_pipelines() -> None:
    data = torch.randn(5, 6), torch.randn(5, 3)
    check_training(Normed(), data, lines=(Line((1,), groups=(UNEVEN,)),))
    beside = (Line((1,), samples=2), Line((1,), samples=3, groups=(UNEVEN,)))
    with pytest.raises(ValueError, match=r"batch_norm.* tensor groups do not take part"):
        force(Normed(), data, lines=beside)


def test_inference_and_state_of_a_training_job() -> None:
    model, (x, y) = Mlp(), batch()
    lines = (Line((1, 1), 2, cuts=(1,), groups=(UNEVEN, (0.5, 0.3, 0.2))),)
    forced = force(model, (x, y), lines=lines)
    other = Mlp()
    with forced.start() as job:
        cut = [cut for placement in job._trained_on.placements for cut in placement.slices]
        assert len(cut) > 4
        for name, tensor in job.state_dict().items():
            torch.testing.assert_close(tensor, model.state_dict()[name], rtol=0, atol=0)
        job.load_state_dict(other.state_dict())
        for name, tensor in job.state_dict().items():
            torch.testing.assert_close(tensor, other.state_dict()[name], rtol=0, atol=0)
        torch.testing.assert_close(job(x, y), other(x, y))
        first = job.step(x, y)
        torch.testing.assert_close(first, other(x, y).detach())
        moved = Mlp()
        moved.load_state_dict(job.state_dict())
        torch.testing.assert_close(job(x, y), moved(x, y))


def test_inference_alone() -> None:
    check_inference(Mlp(), batch(), lines=(Line((1,), 2, groups=((0.5, 0.3, 0.2),)),))


def test_every_gradient_and_clipping() -> None:
    model, data = Mlp(0.1), batch()
    lines = (Line((1, 2), 2, cuts=(1,), groups=(UNEVEN, (0.7, 0.3))),)
    forced = force(model, data, lines=lines)
    report = verify(model, forced.cluster, data, train=TRAINING, plan=forced.plan)
    assert report.equal, str(report)
    clipped = Training(optimizer=sgd, max_grad_norm=0.05)
    check_training(model, data, lines=lines, train=clipped)


def test_adam_steps_on_slices_and_adafactor_on_whole_weights() -> None:
    lines = (Line((1,), 1, groups=(UNEVEN,)),)
    for optimizer, is_cut in ((torch.optim.AdamW, True), (torch.optim.Adafactor, False)):
        training = Training(optimizer=partial(optimizer, lr=0.01))
        forced = force(Mlp(), batch(), lines=lines, train=training)
        with forced.start() as job:
            cut = [label for p in job._trained_on.placements for label in p.slices]
            assert bool(cut) == is_cut
        check_training(Mlp(), batch(), lines=lines, train=training, steps=3, rounding=1e-4)


class Normalized(torch.optim.SGD):
    """Steps by the norm of all gradients together."""

    def step(self, closure: Any = None) -> Any:
        parameters = [p for g in self.param_groups for p in g["params"]]
        nn.utils.clip_grad_norm_(parameters, 0.1)
        return super().step(closure)


def test_an_optimizer_across_parameters_is_refused() -> None:
    training = Training(optimizer=lambda p: Normalized(p, lr=0.01))
    with pytest.raises(ValueError, match="Normalized cannot train"):
        force(Mlp(), batch(), lines=(Line((1,), 1, groups=(UNEVEN,)),), train=training)
