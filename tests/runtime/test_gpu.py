"""Jobs on a CUDA device, alone and beside this machine's processor, against one device.

`make gpu` runs these, and then the tests of the runtime with a GPU as the first of their workers.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TRAINING, Line, check_inference, check_training, compare_states, force, straight
from test_equality import Language, sentences
from torch import nn

import graphpar
from graphpar.cluster import Cluster
from graphpar.cluster_build import cuda_devices
from graphpar.cost import CostTable
from graphpar.errors import CaptureError, RunError
from graphpar.local.timing import Example, Timings
from graphpar.planner import price
from graphpar.precision.formats import Formats
from graphpar.preparation import prepare

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
]


def gpu() -> Cluster:
    return Cluster.from_dict({"devices": cuda_devices()[:1]})


def gpu_and_cpu() -> Cluster:
    return Cluster.from_dict({"devices": [*cuda_devices()[:1], {"kind": "cpu", "threads": 1}]})


ALONE: dict[str, dict[str, Any]] = {
    "whole": {"lines": straight(1)},
    "microbatches": {"lines": straight(1, 4)},
    "recompute": {"lines": straight(1, 2), "recompute": True},
}
TOGETHER: dict[str, dict[str, Any]] = {
    "stages": {"lines": straight(2, 4)},
    "zero-bubble": {"lines": straight(2, 4), "schedule": "zero-bubble"},
    "replicas": {"lines": (Line(((3, 1),), 4),)},
    "divided state": {"lines": (Line((2,), 2),), "zero": 1},
    "group": {"lines": (Line((1,), 2, groups=((0.7, 0.3),)),)},
    "pipelines": {"lines": (Line((1,), 2, 6), Line((1,), 1, 2))},
}


@pytest.mark.parametrize("how", ALONE)
def test_training_alone(how: str) -> None:
    check_training(Language(drop=0.2), sentences(8), cluster=gpu(), **ALONE[how])


@pytest.mark.parametrize("how", TOGETHER)
def test_training_beside_the_processor(how: str) -> None:
    check_training(Language(drop=0.2), sentences(8), cluster=gpu_and_cpu(), **TOGETHER[how])


def test_inference() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(128, 5))
    check_inference(model, (torch.randn(4, 3, 6, 6),), lines=straight(2, 2), cluster=gpu_and_cpu())


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_lower_formats(precision: str) -> None:
    """The first step's loss and gradients are compared with float32 on one device; it warns where far."""
    model, data = Language(width=64), sentences(8)
    with graphpar.compile(
        model, gpu(), data, train=TRAINING, precision=precision, verify_first_step=True
    ) as job:
        losses = [float(job.step(*data)) for _ in range(6)]
    assert losses[-1] < losses[0]
    assert job.plan.partition.pipelines[0].stages[0].precision == precision


def test_actions_follow_each_other_on_the_device() -> None:
    """The host is far ahead of the device; what it reports is when the device did the work."""
    model, data = Language(width=256, layers=4), sentences(16)
    with force(model, data, lines=straight(1, 4), cluster=gpu()).start() as job:
        for _ in range(2):
            job.step(*data)
        assert job.last_step is not None
        (report,) = job.last_step.reports
    ends = [event.end_s for event in report.events]
    assert ends == sorted(ends)
    assert report.start_s <= report.events[0].start_s and ends[-1] <= report.end_s
    assert all(a.end_s <= b.start_s for a, b in zip(report.events, report.events[1:], strict=False))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_units_are_timed_on_the_device(precision: str) -> None:
    model, data = Language(width=64), sentences(8)
    prepared = prepare(model, data, {}, TRAINING)

    def curves(alone: Cluster, formats: Formats) -> CostTable:
        return price(prepared, alone, train=TRAINING, calibration=None, formats=formats)

    wanted = Timings(prepared, Example(model, data, {}), TRAINING, precision, 2.0, 1.0, curves)
    timings, untimed = wanted.of(gpu(), None)
    ((kind, timing),) = timings.items()
    assert not untimed
    assert kind == gpu().devices[0].kind and timing.precision == precision
    assert all(min(unit.forward_s + unit.backward_s) >= 0 for unit in timing.units.values())
    assert timing.optimizer_s > 0
    timed, curved = (
        graphpar.plan(model, gpu(), data, train=TRAINING, precision=precision, measure_s=s)
        for s in (2.0, 0.0)
    )
    assert timed.predicted_step_s != curved.predicted_step_s


def test_a_checkpoint_moves_to_the_processor(tmp_path: Path) -> None:
    model, data = Language(), sentences(8)
    with force(model, data, lines=straight(1, 2), cluster=gpu()).start() as job:
        job.step(*data)
        job.save(tmp_path / "kept")
        job.step(*data)
        wanted = job.state_dict()
    cpu = Cluster.from_dict({"devices": [{"kind": "cpu", "count": 2, "threads": 1}]})
    with force(model, data, lines=straight(2, 2), cluster=cpu).start() as job:
        job.load(tmp_path / "kept")
        job.step(*data)
        got = job.state_dict()
    compare_states(got, wanted, model.state_dict())


def test_a_model_on_the_device() -> None:
    model, data = Language(), sentences(8)
    with graphpar.compile(model, gpu(), data, train=TRAINING) as job:
        wanted = float(job.step(*data))
    there = tuple(tensor.cuda() for tensor in data)
    with graphpar.compile(model.cuda(), gpu(), there, train=TRAINING) as job:
        assert float(job.step(*there)) == pytest.approx(wanted, rel=1e-5)
    with pytest.raises(CaptureError, match="another device"):
        graphpar.compile(model, gpu(), data, train=TRAINING)


def test_an_assertion_on_the_device_ends_the_job() -> None:
    words, labels = sentences(8)
    with graphpar.compile(Language(), gpu(), (words, labels), train=TRAINING) as job:
        wrong = words.clone()
        wrong[0, 0] = 10**6
        with pytest.raises(RunError, match="CUDA_LAUNCH_BLOCKING"):
            job.step(wrong, labels)


def test_the_local_cluster_is_the_gpu() -> None:
    devices = Cluster.local().devices
    assert len(devices) == torch.cuda.device_count() and not any(d.is_cpu for d in devices)
