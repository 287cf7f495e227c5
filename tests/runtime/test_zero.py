"""ZeRO: replicas divide optimiser state and gradients, and the numbers stay those of one device."""

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from helpers import Line, check_training, force, sent_whole, state_of
from test_equality import Language, sentences
from torch import nn

import graphpar
from graphpar.cost_models.modes import with_modes
from graphpar.cost_options import StageOptions
from graphpar.partition.types import PipelineChoice, Replica, ScheduleName, StageChoice
from graphpar.planner import price
from graphpar.runtime.zero import refuse_levels
from graphpar.training import Training
from graphpar.verify import reference_for, train_on_one_device

sent_whole(__name__)


def by_dimensions(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Weight decay for matrices only, told by their dimensions as many scripts do."""
    every = list(parameters)
    groups = [
        {"params": [p for p in every if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in every if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=0.01)


class Odd(nn.Module):
    """Weights that are hard to divide: no dimension, one row, rows behind a single one, frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.place = nn.Parameter(torch.randn(1, 5, 4))
        self.row = nn.Parameter(torch.randn(1, 4))
        self.pair = nn.Parameter(torch.randn(2, 4))
        self.fixed = nn.Parameter(torch.randn(4, 4), requires_grad=False)
        self.last = nn.Linear(4, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """A loss; x: [batch, 5, 4]."""
        x = torch.tanh((x + self.place) * self.scale + self.row) @ self.fixed
        loss: torch.Tensor = (self.last(x * self.pair.sum(0)) ** 2).mean()
        return loss


ADAM = Training(optimizer=by_dimensions)


UNEQUAL = (Line(((3, 1, 1),), 5),)
THREE = (Line(((2, 1, 1),), 4),)
TIED = (Line((1, 2), 4),)
BESIDE = (Line((2,), 2, 6), Line((1,), 1, 2))


@pytest.mark.parametrize(
    ("level", "lines"),
    [
        pytest.param(1, UNEQUAL, id="1, unequal replicas", marks=pytest.mark.slow),
        pytest.param(1, TIED, id="1, tied to another stage"),
        pytest.param(1, BESIDE, id="1, beside another pipeline", marks=pytest.mark.slow),
        pytest.param(2, UNEQUAL, id="2, unequal replicas", marks=pytest.mark.slow),
        pytest.param(2, TIED, id="2, tied to another stage"),
        pytest.param(2, BESIDE, id="2, beside another pipeline", marks=pytest.mark.slow),
    ],
)
def test_numbers_are_those_of_one_device(level: int, lines: tuple[Line, ...]) -> None:
    training = Training(optimizer=by_dimensions, max_grad_norm=0.3)
    check_training(Language(), sentences(), lines=lines, train=training, zero=level, steps=3)


def test_weights_that_are_hard_to_divide() -> None:
    """Three replicas; what has too few rows stays whole, and the price knows."""
    training = Training(optimizer=by_dimensions)
    check_training(Odd(), (torch.randn(8, 5, 4),), lines=THREE, train=training, zero=2)
    forced = force(Odd(), (torch.randn(8, 5, 4),), lines=THREE, train=training, zero=2)
    table = price(forced.prepared, forced.cluster, train=training, calibration=None)
    assert sum(table.few_row_bytes[kind] for kind in table.units) == 4.0 * (1 + 8)


def test_the_state_is_divided_and_saved_whole(tmp_path: Path) -> None:
    """A checkpoint of two replicas that divide the state goes on in one that does not, and back."""
    model, batch = Language(), sentences()
    divided = force(model, batch, lines=(Line((2,), 2),), train=ADAM, zero=2)
    with divided.start() as job:
        for _ in range(2):
            job.step(*batch)
        kept = job._workers.kept(["embed.weight", "embed.weight"])
        rows = [answer["exp_avg"].shape[0] for answer in kept]
        assert sum(rows) == 20 and max(rows) - min(rows) <= 1
        job.save(tmp_path / "divided")
    with force(model, batch, lines=(Line((1, 1), 2),), train=ADAM).start() as job:
        job.load(tmp_path / "divided")
        job.step(*batch)
        job.save(tmp_path / "whole")
    with divided.start() as job:
        job.load(tmp_path / "whole")
        losses = [float(job.step(*batch))]
        state = job.state_dict()
    reference = reference_for(model, divided.prepared, ADAM)
    expected = list(train_on_one_device(reference, ADAM, batch, {}, 4))
    assert losses == pytest.approx(expected[3:], rel=1e-5)
    for name, tensor in state_of(reference, divided).items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-4, atol=1e-6)


def test_what_needs_whole_parameters_is_refused_by_name() -> None:
    training = Training(optimizer=lambda p: torch.optim.Adafactor(p, lr=0.01), zero=1)
    with pytest.warns(UserWarning, match="Adafactor needs whole parameters"):
        graphpar.plan(Language(), {"devices": [{"kind": "cpu", "count": 2}]}, sentences(), train=training)


@pytest.mark.parametrize(
    ("level", "schedule", "text"),
    [
        (3, "1f1b", "level 3, which can be planned, not run"),
        (2, "zero-bubble", "level 2 under the schedule zero-bubble; from level 2 on gpipe and 1f1b run"),
    ],
)
def test_levels_that_do_not_run_are_refused(level: int, schedule: ScheduleName, text: str) -> None:
    stage = StageChoice(0, 1, (Replica("a", 1), Replica("b", 1)), zero=level)
    with pytest.raises(ValueError, match=text):
        refuse_levels(PipelineChoice(8, 2, (stage,)), ADAM, schedule)


def test_gradients_of_tied_weights_stay_whole_for_longer() -> None:
    """Those of the table are there from the head, where backward begins, to the table's own unit."""
    forced = force(Language(), sentences(), lines=(Line((2,), 2),), train=ADAM, zero=2)
    table = price(forced.prepared, forced.cluster, train=ADAM, calibration=None)
    modes = {m.zero: m for m in with_modes(table, StageOptions(zero=(1, 2))).every_mode}
    more = [
        modes[2].costs[kind].working_bytes[0][0] - modes[1].costs[kind].working_bytes[0][0]
        for kind in table.units
    ]
    assert more == pytest.approx([0.0] + [4.0 * 20 * 8] * (table.num_units - 1))
