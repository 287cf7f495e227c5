"""The worked what-if stories: what they print is what their texts say."""

import re
from pathlib import Path

import pytest

import graphpar
from graphpar.examples import what_if_mixed_lab, what_if_old_card, what_if_rent
from graphpar.scenarios.types import Answer


def check_page(study: graphpar.Study, page: str) -> list[str]:
    """The table says of every answer what follows from its numbers; returns the lines below it."""
    assert page == f"{study}\n"
    told, *lines = page.splitlines()
    assert told == "what if, for GPT"
    heads = re.split(r"  +", lines[0])
    answers = (study.baseline, *study.answers)
    for line, answer in zip(lines[1:], answers, strict=False):
        cells = re.split(r"  +", line)
        assert len(cells) == len(heads), line
        check_row(dict(zip(heads, cells, strict=True)), answer, study.baseline)
    assert lines[len(answers) + 1] == ""
    return lines[len(answers) + 2 :]


def check_row(row: dict[str, str], answer: Answer, baseline: Answer) -> None:
    assert answer.status == "ok" and answer.step_s and baseline.step_s and answer.bound_s is not None
    number, unit, bar = row["step"].split()
    step_s = float(number) * {"s": 1.0, "ms": 1e-3, "us": 1e-6}[unit]
    assert (row["scenario"], bar) == (answer.title, f"±{100 * answer.error_bar:.0f}%")
    assert step_s == pytest.approx(answer.step_s, rel=0.005)
    rate = answer.batch / answer.step_s
    assert float(row["samples/s"]) == pytest.approx(rate, rel=1e-3)
    if answer is not baseline:
        change = rate / (baseline.batch / baseline.step_s) - 1
        assert float(row["change"].rstrip("%")) == pytest.approx(100 * change, abs=0.051)
    if answer.usd_per_h is not None:
        dollars = answer.usd_per_h / 3600 / rate * 1e6
        assert float(row["$/Msample"]) == pytest.approx(dollars, rel=1e-3)
    assert answer.watts is not None
    assert float(row["kWh/Msample"]) == pytest.approx(answer.watts / rate / 3600 * 1e3, rel=1e-3)
    assert row["free memory"].endswith("GiB") and min(answer.headroom_bytes.values()) > 0
    assert float(row["free memory"].split()[0]) == pytest.approx(
        min(answer.headroom_bytes.values()) / 2**30, rel=0.01
    )
    assert answer.bottleneck is not None and row["bottleneck"].startswith(answer.bottleneck.kind)
    assert row["bottleneck"].split()[1] in answer.used
    assert (row["gap"] == "-") == (answer.gap is None) and answer.bound_s <= answer.step_s
    if answer.gap is not None:
        assert float(row["gap"].rstrip(" %")) == pytest.approx(100 * answer.gap, abs=0.01, rel=0.01)
    assert row["plan"] == answer.shape
    assert set(answer.used).isdisjoint(answer.left_out)


def test_mixed_lab(capsys: pytest.CaptureFixture[str]) -> None:
    study = what_if_mixed_lab.main(cache=False, processes=1, time_limit_s=1.0)
    page = capsys.readouterr().out
    below = check_page(study, page)
    assert [a.title for a in study.answers] == list(what_if_mixed_lab.QUESTIONS)
    assert below[0].startswith("what would relieve the baseline: ")
    for name in ("without the old machine", "without the new machine", "one card fails"):
        change = study[name].change(study.baseline)
        assert change is not None
        assert change <= 1e-9, name
    faster = study["float16"].change(study.baseline)
    assert faster is not None
    assert faster > 0


def test_rent_a_or_b(capsys: pytest.CaptureFixture[str]) -> None:
    study = what_if_rent.main(cache=False, processes=1, time_limit_s=1.0)
    page = capsys.readouterr().out
    below = check_page(study, page)
    offers = [study.baseline, *study.answers]
    money = [offer.usd_per_million_samples for offer in offers]
    assert None not in money
    cheapest = min(offers, key=lambda offer: offer.usd_per_million_samples or 0.0)
    assert any("cheapest per sample: " + cheapest.title in line for line in below)
    assert study.budget is not None
    assert study.budget.best is not None
    assert study.budget.usd_per_h <= what_if_rent.BUDGET_USD_PER_H
    best, base = study.budget.best.samples_per_s, study.baseline.samples_per_s
    assert best is not None
    assert base is not None
    assert best > 0
    assert base > 0
    (line,) = [line for line in below if line.startswith("best within the budget: ")]
    price, rate = re.findall(r"([\d.]+) (?:\$/h|samples/s)", line)
    assert float(price) == pytest.approx(study.budget.usd_per_h, rel=1e-4)
    assert float(rate) == pytest.approx(best, rel=1e-3)
    rented = re.findall(r"(\d+) x ([\w.]+)", line)
    assert {name: int(n) for n, name in rented} == dict(study.budget.counts)


def test_old_card(capsys: pytest.CaptureFixture[str]) -> None:
    study = what_if_old_card.main(cache=False, processes=1, time_limit_s=1.0)
    page = capsys.readouterr().out
    assert study.baseline.left_out == ("desk/1",)
    below = check_page(study, page)
    assert "leave desk/1 out: nothing is lost" in below
    assert below[0].startswith("no gain: use one device; desk/0 alone takes ")
    shadow = [line for line in below if line.startswith("  ")]
    assert len(shadow) == len(study.worths) == 5 and any("10 % more speed of desk/0" in x for x in shadow)
    second = study["a second RTX 4090"].change(study.baseline)
    assert second is not None
    assert second > 0.1
    guide = (Path(__file__).parents[2] / "docs/what-if.md").read_text(encoding="utf-8")
    shown = re.findall(
        r"^(baseline|a second RTX 4090|an RTX 3090 instead) +([\d.]+) ms", guide, re.MULTILINE
    )
    assert len(shown) == 3
    for name, step_ms in shown:
        answer = study.baseline if name == "baseline" else study[name]
        if answer.gap is not None and answer.gap < 0.011:  # others ran out of time
            assert answer.step_s == pytest.approx(float(step_ms) / 1e3, rel=0.015)
