"""The baseline of a study is the plan that `plan` makes of the same job."""

import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from plan_samples import calibration
from test_schedule_choice import blocks
from torch import nn

import graphpar
from graphpar import planner
from graphpar.calibration import Fingerprint
from graphpar.choice import final
from graphpar.cost import LinkCost
from graphpar.partition.types import TensorWidth
from graphpar.scenarios import solve
from graphpar.scenarios.task import Task
from graphpar.training import Training


def loss(out: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return ((out - target) ** 2).mean()


class _Joined(torch.optim.SGD):
    """A step size that all parameters share: the model may not be cut."""

    def step(self, closure: Any = None) -> Any:
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([g.norm() for g in grads]).norm()
        for grad in grads:
            grad /= 1 + norm
        return super().step(closure)


ADAM = Training(optimizer=torch.optim.AdamW, loss=loss)
CASES: dict[str, tuple[Training | None, str, TensorWidth, float]] = {
    "inference": (None, "float32", "auto", 16e9),
    "little memory": (ADAM, "float32", 1, 1.2035e9),
    "groups that recompute": (replace(ADAM, zero=1), "float32", 2, 1.2125e9),
    "ZeRO under zero-bubble": (replace(ADAM, zero=2, schedule="zero-bubble"), "float32", 1, 16e9),
    "two formats": (replace(ADAM, microbatches=4), "bfloat16", 1, 16e9),
    "a model that is not cut": (
        Training(optimizer=lambda p: _Joined(p, lr=0.1), loss=loss), "float32", 2, 16e9,
    ),
}  # fmt: skip


@pytest.mark.parametrize("limit_s", [0.3, 1.0, 3.0, 60.0])
def test_a_scenario_is_given_the_time_that_a_plan_is(
    limit_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[tuple[str, float]] = []

    def noting(module: Any, name: str) -> None:
        work = getattr(module, name)

        def noted(*args: Any, time_limit_s: float, **options: Any) -> Any:
            given.append((work.__name__, time_limit_s))
            return work(*args, time_limit_s=time_limit_s, **options)

        monkeypatch.setattr(module, name, noted)

    for module, name in ((planner, "partition_chain"), (final, "choose_plan")):
        noting(module, name)
    for name in ("partition", "choose_plan"):
        noting(solve, name)
    monkeypatch.setattr(time, "monotonic", lambda: 0.0)
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
    args = (torch.randn(8, 64), torch.randn(8, 64))
    graphpar.plan(
        model, {"devices": [{"kind": "t4", "count": 2}]}, args, train=ADAM, time_limit_s=limit_s
    )
    planned, given[:] = list(given), []
    assert solve.solve(Task(blocks(), time_limit_s=limit_s)).status == "ok"
    assert [name for name, _ in planned] == ["partition", "choose_plan"] and given == planned


@pytest.mark.filterwarnings("ignore:Training")
@pytest.mark.parametrize("case", CASES)
def test_the_baseline_is_the_plan(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # A search that other work cuts short may end elsewhere than one that is not cut.
    monkeypatch.setattr(time, "monotonic", time.process_time)
    train, precision, tensor, memory_bytes = CASES[case]
    kinds = ("v100-sxm2-16gb", "a100-sxm-40gb")
    nodes = [
        {"name": k[0], "devices": {"kind": k, "count": 2, "memory_bytes": memory_bytes}} for k in kinds
    ]
    network = {"bytes_per_s": 12.5e9, "latency_s": 5e-6}
    cluster = graphpar.Cluster.from_dict({"nodes": nodes, "network": network})
    with torch.device("meta"):
        model = nn.Sequential(*(part for _ in range(3) for part in (nn.Linear(256, 256), nn.GELU())))
        batch = torch.empty(8, 32, 256)
    args = (batch,) if train is None else (batch, batch)
    how: dict[str, Any] = {"train": train, "precision": precision, "tensor": tensor, "time_limit_s": 60.0}
    plan = graphpar.plan(model, cluster, args, **how)
    told = graphpar.what_if(model, cluster, (), args, cache=False, processes=1, **how).baseline
    assert told.step_s == pytest.approx(plan.predicted_step_s, rel=1e-9), told.shape
    assert told.gap == pytest.approx(plan.partition.gap, abs=1e-9)
    free = {d: memory_bytes - peak for d, peak in plan.predicted_peak_bytes.items()}
    assert told.headroom_bytes == pytest.approx(free)


def test_workers_that_are_in_each_others_way_leave_the_job_to_one_of_them() -> None:
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
    args = (torch.randn(8, 64), torch.randn(8, 64))
    fast, alone = LinkCost(1e-6, 1e10), Fingerprint("one core", 1, torch.__version__, 1)
    measured = replace(calibration(), loopback=fast, fingerprint=alone)
    how: dict[str, Any] = {"train": ADAM, "calibration": measured}
    cluster = {"devices": [{"kind": "cpu", "count": 4}]}
    plan = graphpar.plan(model, cluster, args, measure_s=0, **how)
    told = graphpar.what_if(model, cluster, (), args, cache=False, processes=1, **how).baseline
    assert plan.devices == told.used == (told.one_device,)
    assert told.step_s == told.one_device_s == pytest.approx(plan.predicted_step_s)
    (why,) = (note for note in plan.partition.notes if "alone was taken" in note)
    assert why in told.remarks and why in " ".join(str(plan).split())


def test_what_only_the_update_lacks_is_no_limit_here_nor_in_a_plan() -> None:
    model = nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 65536, bias=False))
    args = (torch.randn(1, 8), torch.randn(1, 65536))
    how: dict[str, Any] = {"train": ADAM, "calibration": calibration()}

    def plan(memory_bytes: float) -> tuple[dict[str, Any], graphpar.Plan]:
        cluster = {"devices": [{"kind": "cpu", "memory_bytes": int(memory_bytes)}]}
        return cluster, graphpar.plan(model, cluster, args, measure_s=0, **how)

    _, free = plan(8e9)
    limit, expected = (
        next(iter(x.values())) for x in (free.partition.peak_bytes, free.predicted_peak_bytes)
    )
    assert limit < expected
    cluster, tight = plan((limit + expected) / 2)
    told = graphpar.what_if(model, cluster, (), args, cache=False, processes=1, **how).baseline
    assert told.status == "ok" and told.step_s == pytest.approx(tight.predicted_step_s)
    (why,) = (note for note in tight.notes if "expected to lack" in note)
    assert why in told.remarks
