"""A job that really ran, drawn: the runtime's own report fits what the views ask for."""

import json
from pathlib import Path

import pytest
import torch
from test_trace import check_trace

import graphpar
from graphpar.examples.gpt import GPT, example_inputs
from graphpar.training import Training
from graphpar.view.build import view_of

CPUS = {"devices": [{"kind": "cpu", "slowdown": s} for s in (1.0, 2.0)]}


@pytest.mark.distributed
def test_a_jobs_last_step_is_drawn_beside_its_prediction(tmp_path: Path) -> None:
    model = GPT(width=192, layers=4, heads=4, length=64)
    inputs = example_inputs(8, 64)
    training = Training(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    with graphpar.compile(model, CPUS, inputs, train=training) as job:
        graphpar.visualize(job, tmp_path / "before.json")
        job.step(*inputs)
        graphpar.visualize(job, tmp_path / "after.json")
        step = job.last_step
        assert step is not None
        measured = view_of(job.plan, step).measured
    before, after = (
        json.loads((tmp_path / f"{name}.json").read_text())["traceEvents"] for name in ("before", "after")
    )
    assert {e["pid"] for e in before} == {1} and {e["pid"] for e in after} == {1, 2}
    check_trace(after)
    assert measured is not None and not measured.stopped
    assert measured.step_s == pytest.approx(step.seconds)
    assert [len(lane.actions) for lane in measured.lanes] == [len(r.events) for r in step.reports]
