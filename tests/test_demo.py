"""The demo, with few steps."""

import json
from pathlib import Path

import pytest

from graphpar.demo import run_demo
from graphpar.plans.plan import Plan


@pytest.mark.distributed
@pytest.mark.slow
def test_demo_gives_one_devices_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without measuring the machine, which has tests of its own and takes a while."""
    monkeypatch.setattr("graphpar.demo.calibrate", lambda **_: None)
    report = run_demo(3, tmp_path / "out")
    assert report.same_numbers
    assert report.loss_difference <= 1e-4
    assert report.losses[1] < report.losses[0]
    plan = Plan.load(report.plan_file)
    assert plan.predicted_step_s == report.predicted_step_s
    page = Path(report.report_file).read_text(encoding="utf-8")
    assert "even split" in page
    assert "gap" in page
    json.loads(Path(report.plan_file).read_text())
