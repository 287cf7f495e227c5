"""Fits of published runs: how they leave runs out, and that they find what made their data."""

import math
from dataclasses import replace

import pytest
from test_published import GPT, ROWS, SHARDED  # it puts the benchmarks on the path

import fit_published  # isort: skip
import published_memory  # isort: skip
from fit_published import fit, samples  # isort: skip
from published_clean import cleaned  # isort: skip
from published_folds import folds  # isort: skip
from published_rows import run_of  # isort: skip
from published_sense import CHANGES, Change, changed, costs, longer, sense  # isort: skip

from graphpar.cost_models.training import step_time
from graphpar.cost_models.training_run import Run, parameters


def test_folds_split_runs_into_seen_and_left_out() -> None:
    sets = samples(list(ROWS))
    found = folds(sets)
    assert {fold.kind for fold in found} >= {"set", "models", "size", "devices", "kind"}
    for fold in found:
        seen, left = fold.split(sets)
        counts = [sum(len(rows) for rows in part.values()) for part in (seen, left, sets)]
        assert counts[0] + counts[1] == counts[2]
        assert all(fold.left_out(name, run) for name, rows in left.items() for run, _ in rows)


def test_a_fit_finds_the_constants_that_made_its_data(monkeypatch: pytest.MonkeyPatch) -> None:
    # Few rows against a guess of one's own: the data alone have to lead to what made them.
    monkeypatch.setattr(fit_published, "PULL", 0.001)
    truth = replace(parameters(), host_kernel_s=20e-6, unfused_traffic=3.5)
    rows = [
        {**row, "batch": {"global_batch": 64, "micro_batch": size}}
        for row in (GPT, SHARDED)
        for size in (1, 2, 4, 8)
    ]
    runs = [run for made in samples(rows).values() for run, _ in made]
    made = {"made": [(run, step_time(run, truth).total_s) for run in runs]}
    found = fit(parameters(), ["host_kernel_s", "unfused_traffic"], made)
    assert found.host_kernel_s == pytest.approx(20e-6, rel=0.03)
    assert found.unfused_traffic == pytest.approx(3.5, rel=0.03)


def test_constants_of_memory_are_found_from_the_peaks_that_they_make() -> None:
    truth = (0.5e9, 0.1e9, 0.2)
    made: dict[str, list[tuple[Run, float]]] = {"one": [], "other": []}
    for i, (row, devices) in enumerate((row, count) for row in (GPT, SHARDED) for count in (8, 16, 64)):
        run = run_of(cleaned({**row, "hardware": {**row["hardware"], "count": devices}})[0])
        assert not isinstance(run, str)
        tensors, factors = published_memory.terms(run)
        peak = tensors + sum(f * c for f, c in zip(factors, truth, strict=True))
        made["one" if i % 2 else "other"].append((run, peak))
    assert published_memory.fit(made) == pytest.approx(truth, rel=1e-3)
    report = published_memory.left_out(made)
    assert [line["fitted_pct"] for line in report["sets"]] == pytest.approx([0, 0], abs=1e-3)
    assert all(line["kept_pct"] > 1 for line in report["sets"])
    with pytest.raises(SystemExit, match="at least two"):
        published_memory.left_out({"one": made["one"]})


def test_what_changes_of_rows_do_is_told_and_held_against_limits() -> None:
    report = sense(list(ROWS))
    assert len(report["changes"]) == len(CHANGES)
    assert [line["outside"] for line in report["changes"]] == [[]] * len(CHANGES)
    fields = {line.pop("field"): line for line in report["fields"]}
    assert fields["model.layers"] == {"n": 3, "refused": 3, "moved": 0, "unsaid": 0}
    assert fields["parallel.framework"] == {"n": 3, "refused": 0, "moved": 2, "unsaid": 0}
    run = run_of(cleaned(GPT)[0])
    assert not isinstance(run, str)
    strict = Change("no longer", longer, (0.0, 1.0), (0.0, math.inf))
    assert changed(strict, [("gpt", run, *costs(run))])["outside"] == ["gpt"]


def test_no_constant_lies_at_its_limit() -> None:
    for name, (low, high) in fit_published.BOUNDS.items():
        margin = (high - low) / 100
        assert low + margin < getattr(parameters(), name) < high - margin, name
