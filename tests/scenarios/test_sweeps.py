"""The benchmark of sweeps, on a tiny model."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import what_if as sweeps

PAIR = {"nodes": [{"name": "a", "devices": {"kind": "a100-sxm-80gb", "count": 2}, "link": "nvlink3"}]}


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_sweep_counts_what_its_answers_took(processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeps, "MODEL", "scenarios.tiny_model:make")
    over = {"a.count": (1, 2), "batch": (8, 16)}
    monkeypatch.setitem(sweeps.SWEEPS, "tiny", sweeps.Sweep(PAIR, over, {"tensor": "auto"}))
    row, study = sweeps.run("tiny", processes)
    assert row.scenarios == 4 and row.statuses == {"ok": 4}
    assert (row.searches_s > 0) == (processes == 1)
    assert row.cores_2_s == row.processor_s - row.searches_s / 2 and row.wall_s > 0
    assert row.largest_gap == max(answer.gap or 0.0 for answer in study.answers)
