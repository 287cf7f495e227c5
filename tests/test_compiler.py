"""The public face: plan and compile with what users give them."""

import copy
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import graphpar
from graphpar.examples.gpt import GPT, example_inputs
from graphpar.preparation import lower, prepare
from graphpar.training import Training


def sgd(lr: float = 0.1) -> Training:
    return Training(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=lr))


def small_gpt() -> GPT:
    torch.manual_seed(0)
    return GPT(width=32, layers=2, heads=2, length=16)


def broken_factory(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    raise RuntimeError("no such optimiser")


CPUS = {"devices": [{"kind": "cpu", "slowdown": s} for s in (1.0, 2.0, 3.0)]}
H100_V100 = {
    "nodes": [
        {"name": "a", "devices": {"kind": "h100-sxm-80gb", "count": 2}, "link": "nvlink4"},
        {"name": "b", "devices": {"kind": "v100-sxm2-32gb", "count": 4}, "link": "nvlink2"},
    ],
    "network": {"bytes_per_s": 12.5e9, "latency_s": 10e-6},
}


def test_compile_trains_like_one_device() -> None:
    model = small_gpt()
    ids, targets = example_inputs(6, 16)
    targets[0] = -100
    alone = copy.deepcopy(model)
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.1)
    with graphpar.compile(model, CPUS, (ids, targets), train=sgd()) as job:
        for _ in range(3):
            loss = job.step(ids, targets)
            expected = alone(ids, targets)
            expected.backward()
            optimizer.step()
            optimizer.zero_grad()
            torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-6)
        state = job.state_dict()
    for name, tensor in alone.state_dict().items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-4, atol=1e-6)
    before = small_gpt().state_dict()
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items()), "model was changed"


def test_faster_devices_get_more(tmp_path: Path) -> None:
    """Over slowdowns 1, 2, 3 the work is uneven and in the order of speed."""
    model = GPT(width=192, layers=4, heads=6, length=64)
    plan = graphpar.plan(model, CPUS, example_inputs(16, 64), train=sgd())
    seconds = {r.device: r.forward_s for s in plan.stages for r in s.replicas}
    sped = {"local/0": 1.0, "local/1": 2.0, "local/2": 3.0}
    work = {device: busy / sped[device] for device, busy in seconds.items()}
    assert work["local/0"] == max(work.values())
    assert len(work) > 1
    assert plan.gap <= 0.01 + 1e-9
    path = plan.save(tmp_path / "plan.json")
    assert graphpar.Plan.load(path) == plan


def test_plan_needs_no_weights_and_no_gpu() -> None:
    with torch.device("meta"):
        model = GPT(width=1024, layers=4, heads=16, length=512)
        batch = example_inputs(16, 512)
    plan = graphpar.plan(model, H100_V100, batch, train=sgd())
    assert set(plan.predicted_peak_bytes) <= {"a/0", "a/1", "b/0", "b/1", "b/2", "b/3"}
    assert plan.predicted_step_s > 0
    assert str(plan).startswith("plan for GPT")


def test_impossible_memory_says_what_would_fit() -> None:
    cluster = {"devices": [{"kind": "cpu", "memory_bytes": 2**20}]}
    with pytest.raises(graphpar.InfeasibleError, match="memory") as caught:
        graphpar.plan(small_gpt(), cluster, example_inputs(4, 16), train=sgd())
    assert caught.value.need is not None
    assert caught.value.have is not None
    assert caught.value.need > caught.value.have
    assert caught.value.remedy


def test_unknown_device_names_the_nearest() -> None:
    cluster = {"nodes": [{"name": "a", "devices": {"kind": "h100-sxm-80g", "count": 1}}]}
    with pytest.raises(graphpar.ClusterError, match="h100-sxm-80gb"):
        graphpar.plan(small_gpt(), cluster, example_inputs(4, 16))


def test_plan_for_another_model_cluster_or_mode_is_refused() -> None:
    batch = example_inputs(4, 16)
    plan = graphpar.plan(small_gpt(), CPUS, batch, train=sgd())
    other = GPT(width=32, layers=1, heads=2, length=16)
    with pytest.raises(graphpar.PlanError, match="model"):
        graphpar.compile(other, CPUS, batch, train=sgd(), plan=plan)
    with pytest.raises(graphpar.PlanError, match="cluster"):
        graphpar.compile(small_gpt(), {"devices": [{"kind": "cpu"}]}, batch, train=sgd(), plan=plan)
    with pytest.raises(graphpar.GraphparError):
        graphpar.compile(small_gpt(), CPUS, batch, plan=plan)


def test_wrong_arguments_are_value_errors() -> None:
    batch = example_inputs(4, 16)
    with pytest.raises(ValueError, match="float32"):
        graphpar.plan(small_gpt(), CPUS, batch, precision="int3")
    with pytest.raises(ValueError, match=r"nn\.Module"):
        graphpar.plan(lambda x: x, CPUS, batch)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="optimiser"):
        graphpar.plan(small_gpt(), CPUS, batch, train=Training(optimizer=broken_factory))
    senseless: dict[str, Any] = {"gap": None, "time_limit_s": "60", "measure_s": -1, "calibration": 1.0}
    for name, value in senseless.items():
        with pytest.raises(ValueError, match=rf"{name}.* (got {value!r}|not a float)"):
            graphpar.compile(small_gpt(), CPUS, batch, **{name: value})
    wrong: dict[str, list[Any]] = {
        "microbatches": [b"2", 2.0, 0],
        "max_grad_norm": [float("nan")],
        "seed": [1.0, 2**64],
        "zero": [1.0, True, 3],
    }
    for name, values in wrong.items():
        for value in values:
            with pytest.raises(ValueError, match=rf"Training\({name}=...\) must be .*, got {value!r}"):
                Training(optimizer=torch.optim.SGD, **{name: value})
    two: Any = np.int64(2)
    kept = Training(optimizer=torch.optim.SGD, seed=two, microbatches=two, zero=two)
    assert type(kept.seed) is type(kept.microbatches) is type(kept.zero) is int


@pytest.mark.parametrize("given", [None, [{"kind": "cpu"}]])
def test_what_is_no_cluster_is_told(given: Any) -> None:
    with pytest.raises(graphpar.ClusterError, match=r"cluster= takes .*Cluster.local"):
        graphpar.plan(torch.nn.Linear(2, 2), given, (torch.randn(2, 2),))


def test_what_is_no_training_is_told() -> None:
    given: Any = True
    with pytest.raises(ValueError, match=r"train= takes graphpar.Training\(optimizer=...\), not True"):
        graphpar.plan(
            torch.nn.Linear(2, 2), {"devices": [{"kind": "cpu"}]}, (torch.randn(2, 2),), train=given
        )


def test_devices_elsewhere_need_torchrun() -> None:
    with pytest.raises(graphpar.ClusterError, match="torchrun"):
        graphpar.compile(small_gpt(), H100_V100, example_inputs(4, 16), train=sgd())


class RunningSum(nn.Module):
    """Adds up samples before or after its second layer: samples mix."""

    def __init__(self, early: bool) -> None:
        super().__init__()
        self.early = early
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.first(x)
        y = self.second(y.cumsum(0)) if self.early else self.second(y).cumsum(0)
        return y.square().mean()


def test_mixed_samples_in_a_tail_are_told() -> None:
    wish = replace(sgd(), schedule="1f1b", microbatches=3)
    with pytest.warns(UserWarning, match="1f1b.*ignored.*cumsum at"):
        plan = graphpar.plan(RunningSum(early=False), CPUS, (torch.randn(6, 4),), train=wish)
    assert plan.partition.schedule == "gpipe" and plan.partition.pipelines[0].microbatches == 3
    assert "all forwards come before the backwards" in " ".join(str(plan).split())
    assert not plan.batch_reason


def test_mixed_samples_keep_the_batch_whole_and_say_so() -> None:
    plan = graphpar.plan(RunningSum(early=True), CPUS, (torch.randn(6, 4),), train=sgd())
    assert all(p.microbatches == 1 for p in plan.partition.pipelines)
    assert "test_compiler.py" in plan.batch_reason
    assert plan.batch_reason in " ".join(str(plan).split())


def test_truncated_search_is_said() -> None:
    """A search without time still plans, and says what it did not do."""
    with torch.device("meta"):
        model = GPT(width=256, layers=8, heads=8, length=128)
        batch = example_inputs(64, 128)
    plan = graphpar.plan(model, H100_V100, batch, train=sgd(), time_limit_s=1e-3, gap=0.0)
    assert plan.partition.truncated_by
    assert plan.status == "feasible"
    assert plan.partition.truncated_by[0] in " ".join(str(plan).split())


def test_every_level_of_the_line_is_checked() -> None:
    prepared = prepare(small_gpt(), example_inputs(4, 16), {}, sgd())
    plan = graphpar.plan(small_gpt(), CPUS, example_inputs(4, 16), train=sgd())
    lowered = lower(prepared.graph, plan.partition, True)
    assert {g.level for g in lowered.graphs} == {"lowered"}
    assert prepared.graph.level == "captured"


class Normed(nn.Module):
    """Batch normalisation between wide layers: pipelines side by side go in step."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(64, 2048), nn.BatchNorm1d(2048), nn.Linear(2048, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.down(self.norm(self.up(x)).relu()).square().mean())


def test_pipelines_in_step_are_planned_and_their_exchanges_priced() -> None:
    batch = (torch.randn(2048, 64),)
    plans = {}
    for latency in (1e-6, 1.0):
        nodes = [{"name": n, "devices": {"kind": "h100-sxm-80gb", "count": 1}} for n in "ab"]
        network = {"bytes_per_s": 1e11, "latency_s": latency}
        cluster = {"nodes": nodes, "network": network}
        plans[latency] = graphpar.plan(Normed(), cluster, batch, train=sgd())
    near, far = plans.values()
    assert len(near.partition.pipelines) == 2 and "go in step" in " ".join(str(near).split())
    assert len(far.partition.pipelines) == 1 and len(far.stages) == 1
    assert all(p.microbatches == 1 for p in near.partition.pipelines)
