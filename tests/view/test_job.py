"""A job that really ran, drawn: the runtime's own report fits what the views ask for."""

import json
import os
import signal
import threading
from pathlib import Path

import pytest
import torch
from msgspec import structs
from test_trace import check_trace

import graphpar
from graphpar.errors import RunError
from graphpar.examples.gpt import GPT, example_inputs
from graphpar.training import Training
from graphpar.view.build import view_of

CPUS = {"devices": [{"kind": "cpu", "slowdown": s} for s in (1.0, 2.0)]}


@pytest.mark.distributed
def test_a_jobs_last_step_is_drawn_beside_its_prediction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = GPT(width=192, layers=4, heads=4, length=64)
    inputs = example_inputs(8, 64)
    training = Training(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    with graphpar.compile(model, CPUS, inputs, train=training) as job:
        graphpar.visualize(job, tmp_path / "before.json")
        job.step(*inputs)
        graphpar.visualize(job, tmp_path / "after.json")
        page = graphpar.visualize(job, tmp_path / "after.html").read_text(encoding="utf-8")
        step = job.last_step
        assert step is not None
        measured = view_of(job.plan, step).measured
        with job.profiling():
            job.step(*inputs)
        graphpar.visualize(job, tmp_path / "profiled.json")
        job.plan = structs.replace(job.plan, predicted_step_s=1.0)
        looked: list[object] = []
        monkeypatch.setattr("graphpar.runtime.job._machine", looked.append)
        for times in (1, 2):
            job.step(*inputs)
            assert job.comparison is not None and job.comparison.off
            assert str(job) and len(looked) == times, "the machine is looked at once after a step"
    before, after = (
        json.loads((tmp_path / f"{name}.json").read_text())["traceEvents"] for name in ("before", "after")
    )
    assert {e["pid"] for e in before} == {1} and {e["pid"] for e in after} == {1, 2}
    check_trace(after)
    profiled = json.loads((tmp_path / "profiled.json").read_text())["traceEvents"]
    check_trace(profiled)
    kernels = [e for e in profiled if e.get("cat") == "kernel"]
    assert any("addmm" in e["name"] or "linear" in e["name"] for e in kernels)
    forwards = [e for e in profiled if e.get("cat") == "F" and e["pid"] == 2 and e["tid"] == 1]
    first = min(forwards, key=lambda e: e["ts"])
    inside = [e for e in kernels if first["ts"] <= e["ts"] <= first["ts"] + first["dur"]]
    assert len(inside) > 5, "the profiler's clock is not the rank's"
    data = json.loads(page.partition('id="data">')[2].partition("</script>")[0])
    compared = data["plans"][0]["comparison"]
    assert [d["device"] for d in compared["devices"]] == list(job.plan.devices)
    assert all(d["compute_s"] > 0 and d["peak_bytes"] > 0 for d in compared["devices"])
    assert compared["off"] == bool(compared["reasons"])
    assert measured is not None and not measured.stopped
    assert measured.step_s == pytest.approx(step.seconds)
    assert [len(lane.actions) for lane in measured.lanes] == [len(r.events) for r in step.reports]


@pytest.mark.distributed
def test_a_job_that_lost_a_worker_is_drawn_up_to_there(tmp_path: Path) -> None:
    """The first stage goes on until it needs the second, which is killed in the middle of a step."""
    model = GPT(width=192, layers=4, heads=4, length=64)
    inputs = example_inputs(8, 64)
    training = Training(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    slow = {"devices": [{"kind": "cpu", "slowdown": s} for s in (30.0, 40.0)]}
    with graphpar.compile(model, slow, inputs, train=training) as job:
        victim = job._workers.pids[1]  # type: ignore[attr-defined]
        killer = threading.Timer(1.0, os.kill, (victim, signal.SIGKILL))
        killer.start()
        with pytest.raises(RunError, match="rank 1"):
            job.step(*inputs)
        step = job.last_step
        assert step is not None and "rank 1" in step.failure
        assert [report.rank for report in step.reports] == [0]
        assert 0 < len(step.reports[0].events) < len(job.plan.schedule().actions[0])
        measured = view_of(job.plan, step).measured
        assert measured is not None and [lane.stopped for lane in measured.lanes] == [True, True]
        assert "died: killed by SIGKILL" in measured.note
        page = graphpar.visualize(job, tmp_path / "failed.html").read_text(encoding="utf-8")
    assert "killed by SIGKILL" in page
    check_trace(json.loads(graphpar.visualize(job, tmp_path / "failed.json").read_text())["traceEvents"])
