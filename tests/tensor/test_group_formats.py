"""Tensor groups in lower formats: the numbers of float32 but for rounding, one loss scale for all."""

from dataclasses import replace

import pytest
import torch
from helpers import TRAINING, Line, force
from torch import nn

import graphpar
from graphpar.cost_models.group_times import OpTimes, TensorGroup
from graphpar.groups.modes import with_group_modes
from graphpar.planner import plan_of, price
from graphpar.precision.formats import Formats, labelled, rewritten_by_device
from graphpar.runtime.job import CompiledModel
from graphpar.verify import reference_for, train_on_one_device


@pytest.fixture(autouse=True)
def free_links(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TensorGroup, "seconds", lambda self, name, num_bytes: 0.0)
    monkeypatch.setattr(OpTimes, "host_seconds", lambda self, name, num_bytes: 0.0)


class Mlp(nn.Module):
    """A residual perceptron with a norm and a loss over classes."""

    def __init__(self, steepness: float = 1.0, width: int = 12, inner: int = 20) -> None:
        super().__init__()
        self.steepness = steepness
        self.norm, self.up = nn.LayerNorm(width), nn.Linear(width, inner)
        self.down, self.out = nn.Linear(inner, width), nn.Linear(width, 6)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        h = x + self.down(torch.relu(self.up(self.norm(x))))
        result: torch.Tensor = nn.functional.cross_entropy(self.out(h), y) * self.steepness
        return result


BATCH = (torch.randn(8, 12), torch.randint(0, 6, (8,)))
PAIR = (Line((1,), 2, groups=((0.5, 0.5),)),)


def grouped_job(model: nn.Module, precision: str) -> CompiledModel:
    """A group of two, then one device, all in one format."""
    lines = (Line((1, 1), 2, cuts=(1,), groups=((0.6, 0.4), ())),)
    forced = force(model, BATCH, lines=lines)
    units = len(forced.prepared.chain.units)
    formats = Formats({d.name: (precision,) * units for d in forced.cluster.devices})
    (pipeline,) = forced.plan.partition.pipelines
    stages = tuple(replace(s, precision=precision) for s in pipeline.stages)
    table = price(forced.prepared, forced.cluster, train=TRAINING, calibration=None, formats=formats)
    table = with_group_modes(
        table, forced.prepared.graph, forced.cluster, stages[0].replicas, None, TRAINING,
        rewritten_by_device(forced.prepared.graph, forced.prepared.chain, formats),
    )  # fmt: skip
    found = replace(forced.plan.partition, pipelines=(replace(pipeline, stages=stages),), shardings=())
    plan = plan_of(forced.prepared, forced.cluster, labelled(table, formats), found, train=TRAINING)
    return replace(forced, plan=plan).start()


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_training_is_that_of_float32_but_for_rounding(precision: str) -> None:
    torch.manual_seed(0)
    model = Mlp()
    with grouped_job(model, precision) as job:
        assert any(p.slices for p in job._trained_on.placements)
        losses = [float(job.step(*BATCH)) for _ in range(4)]
        state = job.state_dict()
    reference = reference_for(model, force(model, BATCH, lines=(Line((1,)),)).prepared, TRAINING)
    expected = list(train_on_one_device(reference, TRAINING, BATCH, {}, 4))
    assert losses == pytest.approx(expected, rel=0.02)
    assert losses != expected
    assert all(t.dtype == torch.float32 for t in state.values())


@pytest.mark.distributed
def test_an_overflow_on_one_member_skips_the_step_on_all() -> None:
    torch.manual_seed(0)
    model = Mlp(steepness=1e3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with grouped_job(model, "float16") as job:
        job.step(*BATCH)
        assert job.last_step is not None and job.last_step.skipped
        assert len({(r.skipped, r.loss_scale) for r in job.last_step.reports}) == 1
        assert all(torch.equal(t, before[n]) for n, t in job.state_dict().items())


def test_members_hold_copies_in_the_lower_format() -> None:
    """A group that cuts every weight holds each weight and its copy once among them all."""
    batch = torch.randn(8, 64), torch.randint(0, 6, (8,))
    forced = force(Mlp(width=64, inner=256), batch, lines=PAIR)
    graph, units = forced.prepared.graph, len(forced.prepared.chain.units)
    formats = Formats({d.name: ("bfloat16",) * units for d in forced.cluster.devices})
    table = price(forced.prepared, forced.cluster, train=TRAINING, calibration=None, formats=formats)
    groups = forced.plan.partition.pipelines[0].stages[0].replicas
    lower = rewritten_by_device(graph, forced.prepared.chain, formats)
    (mode,) = with_group_modes(table, graph, forced.cluster, groups, None, TRAINING, lower).modes
    alone = sum(cost.weight_bytes[0] for cost in table.every_mode[0].costs)
    together = sum(sum(cost.weight_bytes) for cost in mode.costs)
    weights = sum(op.type.bytes(1) for op in graph.sources("parameter"))
    assert alone == pytest.approx(1.5 * weights, rel=0.01)
    assert alone <= together <= 1.05 * alone  # biases are held by both


@pytest.mark.parametrize("precision", ["bfloat16", "auto"])
def test_groups_are_planned_in_lower_formats(precision: str) -> None:
    """Of two devices that hold half the model each, in whatever format."""
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
    nodes = [{"name": "a", "devices": {"kind": "h100-sxm-80gb", "count": 2}, "link": "nvlink4"}]
    plan = graphpar.plan(model, {"nodes": nodes}, (torch.randn(8, 64),), precision=precision, tensor=2)
    assert graphpar.Plan.from_json(plan.to_json()) == plan
