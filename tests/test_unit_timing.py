"""Timing a model's own units in a worker: every unit gets times, and the user's model stays as it is."""

import time

import pytest
import torch
from torch import nn

import graphpar
from graphpar.cluster import Cluster
from graphpar.local.kept import NotTimedError
from graphpar.local.trial_worker import WHOLE, TrialModel
from graphpar.local.unit_timing import time_model
from graphpar.partition.types import Partition
from graphpar.planner import price
from graphpar.preparation import prepare
from graphpar.runtime.local import LocalWorkers

pytestmark = pytest.mark.distributed

TRAINING = graphpar.Training(optimizer=torch.optim.AdamW, loss=nn.functional.mse_loss)


def stack(norm: bool) -> nn.Module:
    layers = [m for _ in range(2) for m in (nn.Linear(16, 16), nn.ReLU())]
    return nn.Sequential(*([nn.BatchNorm1d(16)] if norm else []), *layers, nn.Linear(16, 4))


@pytest.mark.parametrize(
    ("norm", "train", "at_once"),
    [(False, TRAINING, False), (True, TRAINING, True), (False, None, False)],
)
def test_units_are_timed_and_the_model_is_left_alone(
    norm: bool, train: graphpar.Training | None, at_once: bool
) -> None:
    model = stack(norm)
    args = (torch.randn(8, 16), torch.randn(8, 4)) if train else (torch.randn(8, 16),)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    prepared = prepare(model, args, {}, train)
    cluster = Cluster.from_dict({"devices": [{"kind": "cpu"}]})
    table = price(prepared, cluster, train=train, calibration=None)
    timing = time_model(TrialModel(model, prepared, args, {}, train), table, 1.0, (2.0,), at_once)
    assert (timing.halves is not None) == (train is not None and not at_once)
    assert all(s > 0 for unit in timing.units.values() for s in unit.forward_s)
    (pause,) = timing.pauses
    assert pause.slowdown == 2.0 and pause.action_s >= 0 and pause.longer >= 1
    assert (timing.optimizer_s > 0) == (train is not None)
    assert any(s > 0 for unit in timing.units.values() for s in unit.backward_s) == (train is not None)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_of_which_one_sample_takes_too_long_is_not_timed() -> None:
    model, args = stack(False), (torch.randn(8, 16),)
    prepared = prepare(model, args, {}, None)
    cluster = Cluster.from_dict({"devices": [{"kind": "cpu"}]})
    table = price(prepared, cluster, train=None, calibration=None)
    with pytest.raises(NotTimedError, match="longer than the 1e-09 s"):
        time_model(TrialModel(model, prepared, args, {}, None), table, 1e-9, (1.0,))


def test_twins_are_ready_before_anything_is_measured_beside_them(monkeypatch: pytest.MonkeyPatch) -> None:
    ready, install = [], TrialModel.install

    def slowly(self: TrialModel, workers: LocalWorkers, name: str, cut: Partition | None) -> None:
        time.sleep(0.05)
        install(self, workers, name, cut)
        ready.append(name)

    monkeypatch.setattr(TrialModel, "install", slowly)
    model, args = stack(False), (torch.randn(8, 16),)
    with TrialModel(model, prepare(model, args, {}, None), args, {}, None).twins([1.0, 2.0], 4):
        assert ready == [WHOLE, WHOLE]
