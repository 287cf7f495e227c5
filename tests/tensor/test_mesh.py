"""Tensor groups of two axes: planned, running, saved; their prices against an independent programme."""

import sys
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

import pytest
import torch
from choices import PCIE, gpus
from helpers import TRAINING, Line, check_training, force, state_of
from test_groups import Mlp, Words, batch, sentences
from test_two_axes import block
from threads import one_stage
from torch import nn

import graphpar
from graphpar.cluster import Cluster
from graphpar.cost_models.group_times import OpTimes, ShardingOptions, TensorGroup
from graphpar.cost_models.sharding import choose_sharding
from graphpar.errors import PlanError
from graphpar.partition.types import Replica, TensorWidth
from graphpar.plan_check import group_contradictions
from graphpar.plans import Plan
from graphpar.preparation import lower
from graphpar.tensor_groups import candidate_groups, widest_group
from graphpar.training import Training
from graphpar.verify import reference_for, train_on_one_device

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from mesh_programme import Mesh, MeshProgramme

EVEN, UNEVEN = (0.25,) * 4, (0.35, 0.35, 0.15, 0.15)
ADAM = Training(optimizer=partial(torch.optim.AdamW, lr=0.01, eps=1e-3), max_grad_norm=0.3)


@pytest.fixture
def free_links(monkeypatch: pytest.MonkeyPatch) -> None:
    """Links that cost nothing, so that small models are cut wherever they can be."""
    monkeypatch.setattr(TensorGroup, "seconds", lambda self, name, num_bytes: 0.0)
    monkeypatch.setattr(OpTimes, "host_seconds", lambda self, name, num_bytes: 0.0)


def test_its_programme_is_that_of_the_benchmark() -> None:
    """Six samples for four members: neither cuts samples."""
    prepared = block(False)
    options = ShardingOptions(samples=6, state_ratio=6.0, cuts_batch=False)
    group = gpus(4, PCIE, mesh=(2, 2))
    found = choose_sharding(one_stage(prepared.graph), 0, prepared.chain, group, options)
    seconds, _ = MeshProgramme(prepared, Mesh((2, 2)), PCIE, options).solve(inf)
    assert found.objective_s == pytest.approx(seconds, rel=1e-5)
    assert found.bound_s == pytest.approx(found.objective_s, rel=1e-5)


class Heads(nn.Module):
    """Attention of two heads, then a perceptron: four members have no four heads to share."""

    def __init__(self, width: int = 1024) -> None:
        super().__init__()
        self.mix, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = (t.view(batch, length, 2, -1).transpose(1, 2) for t in self.mix(x).chunk(3, -1))
        h = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(h.transpose(1, 2).reshape(batch, length, width))
        result: torch.Tensor = (x + self.down(nn.functional.gelu(self.up(x)))).square().mean()
        return result


def test_the_planner_takes_a_mesh_where_it_is_faster(tmp_path: Path) -> None:
    """With its bound, in the file and on the page; where it is not, the plan is that of one axis."""
    with torch.device("meta"):
        model, x = Heads(), torch.zeros(1, 2048, 1024)
    sgd = Training(optimizer=torch.optim.SGD)
    steps: dict[tuple[str, TensorWidth], tuple[float, tuple[int, ...]]] = {}
    wishes: tuple[TensorWidth, ...] = (4, (2, 2))
    for link in ("nvlink4", "pcie3"):
        node = {"name": "a", "devices": {"kind": "h100-sxm-80gb", "count": 4}, "link": link}
        for tensor in wishes:
            plan = graphpar.plan(model, {"nodes": [node]}, (x,), train=sgd, tensor=tensor)
            (stage, *_) = plan.partition.pipelines[0].stages
            steps[link, tensor] = plan.partition.objective_s, stage.replicas[0].mesh
            assert plan.partition.gap <= 0.0101
        if link == "nvlink4":
            assert "tensor group of 2 x 2 a/0 & a/1" in str(plan)
            plan.save(tmp_path / "plan.json")
            assert Plan.load(tmp_path / "plan.json") == plan
            assert plan.partition.shardings[0].inner is not None
        else:
            assert "tensor=(2, 2): groups of two axes were considered; none" in " ".join(plan.notes)
    assert steps["nvlink4", (2, 2)][0] < 0.95 * steps["nvlink4", 4][0]
    assert steps["nvlink4", (2, 2)][1] == (2, 2)
    assert steps["pcie3", (2, 2)] == steps["pcie3", 4]


def test_wishes_that_make_no_mesh() -> None:
    four = Cluster.from_dict({"devices": [{"kind": "h100-sxm-80gb", "count": 4}]})
    for wrong in ((1, 4), (2, 2, 2), (2,), (2, True)):
        with pytest.raises(ValueError, match="two numbers"):
            widest_group(four, wrong)  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="no node has more than 4"):
        assert widest_group(four, (2, 4)) == 4
    assert not any(group.mesh for group in candidate_groups(four, 4, (2, 4)))
    two_kinds = [{"kind": "a100-sxm-80gb", "count": 2}, {"kind": "h100-sxm-80gb", "count": 2}]
    unlike = Cluster.from_dict({"nodes": [{"name": "n", "devices": two_kinds, "link": "nvlink3"}]})
    (mesh_of_both,) = (group for group in candidate_groups(unlike, 4, (2, 2)) if group.mesh)
    fast, slow = mesh_of_both.shares[3], mesh_of_both.shares[0]
    assert mesh_of_both.shares == (slow, slow, fast, fast) and fast > 1.5 * slow
    for mesh, shares in (((2, 3), ()), ((4, 1), ()), ((2, 2), (0.4, 0.2, 0.2, 0.2))):
        replica = Replica("a", 1, ("b", "c", "d"), shares, mesh)
        assert list(group_contradictions("here", replica)), mesh


@pytest.mark.distributed
def test_training_and_checkpoints(tmp_path: Path, free_links: None) -> None:
    """Slices of slices with Adam, clipping and dropout; saved whole, read by one device and back."""
    model, data = Words(0.2), sentences()
    meshed = force(model, data, lines=(Line((1,), 2, groups=(UNEVEN,), meshes=((2, 2),)),), train=ADAM)
    with meshed.start() as job:
        cut = [c for p in job._trained_on.placements for c in p.slices.values() if c.rows is not None]
        assert len(cut) >= 4
        losses = [float(job.step(*data))]
        job.save(tmp_path / "mesh")
    with force(model, data, lines=(Line((1,)),), train=ADAM).start() as job:
        job.load(tmp_path / "mesh")
        losses.append(float(job.step(*data)))
        job.save(tmp_path / "whole")
    with meshed.start() as job:
        job.load(tmp_path / "whole")
        losses.append(float(job.step(*data)))
        state = job.state_dict()
        assert job.step(*(tensor[:4] for tensor in data)).isfinite()
    reference = reference_for(model, meshed.prepared, ADAM)
    assert losses == pytest.approx(list(train_on_one_device(reference, ADAM, data, {}, 3)), rel=1e-5)
    for name, tensor in state_of(reference, meshed).items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-4, atol=1e-6)


MESH = Line((1,), 2, groups=(EVEN,), meshes=((2, 2),))
CASES: dict[str, Mapping[str, Any]] = {
    "then a slow device": {"lines": (Line((1, 1), 2, None, (1,), (UNEVEN, ()), meshes=((2, 2), ())),)},
    "beside one axis": {"lines": (
        Line((1,), 1, 4, None, (EVEN,), meshes=((2, 2),)), Line((1,), 1, 4, None, ((0.6, 0.4),)))},
    "two by three": {"lines": (Line((1,), 1, None, None, ((1 / 6,) * 6,), meshes=((2, 3),)),)},
    "two meshes, divided state": {
        "lines": (Line((2,), 2, None, None, (EVEN,), meshes=((2, 2),)),), "train": ADAM, "zero": 2},
    "computed again": {"lines": (MESH,), "recompute": True},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("how", CASES.values(), ids=CASES.keys())
def test_with_others(how: Mapping[str, Any], free_links: None) -> None:
    check_training(Mlp(0.2), batch(), **how)


def test_a_plan_that_does_not_fit_is_refused(free_links: None) -> None:
    """Edited, or made for an optimiser that steps slices: either would train otherwise, in silence."""
    forced = force(Words(), sentences(), lines=(MESH,))
    found, (sharding,) = forced.plan.partition, forced.plan.partition.shardings
    ways = tuple(replace(w, results=("whole",) * len(w.results)) for w in sharding.strategies)
    needs_whole = Training(optimizer=partial(torch.optim.Adafactor, lr=0.01))
    for other, train, said in (
        (sharding, TRAINING, ""),
        (sharding, needs_whole, "Adafactor needs whole parameters"),
        (replace(sharding, strategies=ways), TRAINING, "a way for .* cannot take"),
        (replace(sharding, inner=None), TRAINING, "of the sharding 1, of the group 2"),
    ):
        edited, where = replace(found, shardings=(other,)), forced.cluster
        with pytest.raises((ValueError, PlanError), match=said) if said else nullcontext():
            lower(forced.prepared.graph, edited, True, cluster=where, train=train)
