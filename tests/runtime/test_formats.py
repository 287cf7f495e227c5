"""Jobs whose stages compute in lower formats: their numbers, and steps that overflow."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import TRAINING, Forced, Line, force
from torch import nn

import graphpar
from graphpar.cost_models.modes import with_modes
from graphpar.cost_options import StageOptions
from graphpar.partition.types import StageChoice
from graphpar.planner import plan_of, price
from graphpar.precision.formats import Formats, labelled
from graphpar.runtime.casts import LowerWeights
from graphpar.runtime.scaling import GROWTH_INTERVAL, LossScaler
from graphpar.verify import reference_for, train_on_one_device

pytestmark = pytest.mark.distributed


class Steep(nn.Module):
    """Two layers; the loss is steep, so that scaled gradients overflow float16."""

    def __init__(self, steepness: float = 1.0) -> None:
        super().__init__()
        self.steepness = steepness
        self.one, self.two = nn.Linear(6, 4), nn.Linear(4, 8)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        hidden = self.one(x).relu()
        result: torch.Tensor = nn.functional.mse_loss(self.two(hidden), y) * self.steepness
        return result


BATCH = (torch.randn(6, 6), torch.randn(6, 8))


def in_formats(forced: Forced, *formats: str) -> Forced:
    """The same job with a format for each stage of its pipelines."""
    pipelines = tuple(
        replace(p, stages=tuple(replace(s, precision=f) for s, f in zip(p.stages, formats, strict=True)))
        for p in forced.plan.partition.pipelines
    )
    found = replace(forced.plan.partition, pipelines=pipelines)
    units = len(forced.prepared.chain.units)
    stages = [stage for pipeline in pipelines for stage in pipeline.stages]
    whole = Formats({d: (s.precision,) * units for s in stages for d in _devices(s)})
    table = price(forced.prepared, forced.cluster, train=forced.training, calibration=None, formats=whole)
    table = with_modes(table, StageOptions(recompute=True, zero=(1, 2)))
    made = plan_of(forced.prepared, forced.cluster, labelled(table, whole), found)
    return replace(forced, plan=made)


def _devices(stage: StageChoice) -> list[str]:
    return [replica.device for replica in stage.replicas]


@pytest.mark.parametrize("formats", [("bfloat16", "bfloat16"), ("float32", "float16")])
def test_training_is_that_of_float32_but_for_rounding(formats: tuple[str, str]) -> None:
    torch.manual_seed(0)
    model = Steep()
    forced = in_formats(force(model, BATCH, lines=(Line((1, 2), 3, cuts=(1,)),)), *formats)
    with forced.start() as job:
        losses = [float(job.step(*BATCH)) for _ in range(4)]
        inferred = job(*BATCH)
    reference = reference_for(model, forced.prepared, TRAINING)
    expected = list(train_on_one_device(reference, TRAINING, BATCH, {}, 5))
    assert [*losses, float(inferred)] == pytest.approx(expected, rel=0.02)
    assert losses != expected[:4]


ZERO = {"lines": (Line(((1, 1), 2), 2, cuts=(1,)),), "zero": 2}
LATE = {"lines": (Line((1, 1), 2, cuts=(1,)),), "schedule": "zero-bubble"}
SIDE = {"lines": (Line((1, 1), 1, 4, cuts=(1,)), Line((1, 1), 1, 2, cuts=(1,)))}


@pytest.mark.parametrize(
    "how",
    [
        pytest.param({"lines": (Line((1, 1), 2, cuts=(1,)),)}, id="pipeline"),
        pytest.param(ZERO, id="zero", marks=pytest.mark.slow),
        pytest.param(LATE, id="zero-bubble", marks=pytest.mark.slow),
        pytest.param(SIDE, id="pipelines", marks=pytest.mark.slow),
    ],
)
def test_an_overflow_on_one_rank_skips_the_step_on_all(how: dict[str, Any]) -> None:
    """Only the first stages are float16 and overflow; gradients of the second ones are finite."""
    torch.manual_seed(0)
    model = Steep(1e3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train = replace(TRAINING, optimizer=lambda p: torch.optim.SGD(p, lr=1e-5), max_grad_norm=10.0)
    forced = force(model, BATCH, train=train, **how)
    with in_formats(forced, "float16", "float32").start() as job:
        scales: list[float | None] = []
        while not scales or job.last_step is None or job.last_step.skipped:
            loss = float(job.step(*BATCH))
            assert job.last_step is not None
            assert len({(r.skipped, r.loss_scale) for r in job.last_step.reports}) == 1
            scales.append(job.last_step.loss_scale)
            moved = {n: not torch.equal(t, before[n]) for n, t in job.state_dict().items()}
            assert set(moved.values()) == {not job.last_step.skipped}
            assert len(scales) < 20, "the scale never came down far enough"
    assert len(scales) > 1, "nothing overflowed, so nothing was tested"
    assert scales == [2.0 ** (16 - n) for n in range(len(scales))]
    (first,) = train_on_one_device(reference_for(model, forced.prepared, train), train, BATCH, {}, 1)
    assert loss == pytest.approx(first, rel=0.01)


def test_compile_runs_a_precision_and_says_who_stays_behind() -> None:
    model = Steep()
    mixed = {
        "nodes": [
            {"name": "a", "devices": {"kind": "v100-sxm2-32gb", "count": 1}},
            {"name": "b", "devices": {"kind": "t4", "count": 1}},
            {"name": "c", "devices": {"kind": "h100-sxm-80gb", "count": 1}},
        ]
    }
    plan = graphpar.plan(model, mixed, BATCH, train=TRAINING, precision="bfloat16")
    used = {r.device: s.precision for p in plan.partition.pipelines for s in p.stages for r in s.replicas}
    assert all(precision == ("bfloat16" if d == "c/0" else "float32") for d, precision in used.items())
    assert any("v100" in note and "t4" in note and "float32" in note for note in plan.notes)
    assert plan.precision == "bfloat16"
    cpu = {"devices": [{"kind": "cpu"}]}
    with graphpar.compile(model, cpu, BATCH, train=TRAINING, precision="bfloat16") as job:
        assert torch.isfinite(job.step(*BATCH))
        assert job.plan.partition.pipelines[0].stages[0].precision == "bfloat16"


def test_lower_copies_follow_their_weight() -> None:
    weights = LowerWeights()
    weight = nn.Parameter(torch.ones(3))
    first = weights.cast(weight, torch.bfloat16)
    first.sum().backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None and weight.grad.dtype == torch.float32
    kept = weights.cast(weight, torch.bfloat16)
    assert kept.data_ptr() == first.data_ptr()
    with torch.no_grad():
        weight.mul_(2)
    assert float(weights.cast(weight, torch.bfloat16).detach()[0]) == 2
    weight.data.mul_(2)  # leaves no trace; workers say so after each optimiser step
    weights.forget()
    assert float(weights.cast(weight, torch.bfloat16).detach()[0]) == 4


def test_the_scale_grows_after_many_good_steps() -> None:
    scaler = LossScaler(scale=8.0)
    for _ in range(GROWTH_INTERVAL):
        scaler.update(overflowed=False)
    assert scaler.scale == 16
    scaler.update(overflowed=True)
    assert scaler.scale == 8
    gradient = torch.tensor([16.0])
    scaler.unscale([gradient])
    assert float(gradient) == 2
