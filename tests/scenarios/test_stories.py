"""The worked what-if stories: what they print is what their texts say."""

import pytest

from graphpar.examples import what_if_mixed_lab, what_if_old_card, what_if_rent


def test_mixed_lab(capsys: pytest.CaptureFixture[str]) -> None:
    study = what_if_mixed_lab.main(cache=False, processes=1, time_limit_s=1.0)
    page = capsys.readouterr().out
    assert all(name in page for name in what_if_mixed_lab.QUESTIONS)
    for name in ("without the old machine", "without the new machine", "one card fails"):
        change = study[name].change(study.baseline)
        assert change is not None
        assert change <= 1e-9, name
    faster = study["float16"].change(study.baseline)
    assert faster is not None
    assert faster > 0
    assert "baseline" in page


def test_rent_a_or_b(capsys: pytest.CaptureFixture[str]) -> None:
    study = what_if_rent.main(cache=False, processes=1, time_limit_s=1.0)
    page = capsys.readouterr().out
    assert study.baseline.usd_per_million_samples is not None
    assert study.answers[0].usd_per_million_samples is not None
    assert study.budget is not None
    assert study.budget.best is not None
    assert study.budget.usd_per_h <= what_if_rent.BUDGET_USD_PER_H
    best, base = study.budget.best.samples_per_s, study.baseline.samples_per_s
    assert best is not None
    assert base is not None
    assert best > 0
    assert base > 0
    assert "best within the budget" in page


def test_old_card(capsys: pytest.CaptureFixture[str]) -> None:
    study = what_if_old_card.main(cache=False, processes=1, time_limit_s=1.0)
    page = capsys.readouterr().out
    assert study.baseline.left_out == ("desk/1",)
    assert "leave desk/1 out: nothing is lost" in page
    assert "no gain: use one device; desk/0" in page
    second = study["a second RTX 4090"].change(study.baseline)
    assert second is not None
    assert second > 0.1
