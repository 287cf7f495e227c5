"""What pictures of studies show: every answer, what is none, and the best within a budget."""

from typing import Any

import pytest

from graphpar.scenarios import plots
from graphpar.scenarios.sweeps import Sweep
from graphpar.scenarios.types import Answer

pytest.importorskip("matplotlib")

BASELINE = Answer("baseline", step_s=2.0, batch=8)
BEST = Answer("2 x g5.12xlarge", step_s=0.5, batch=8)
# A plan that lacks memory has a step, but is no answer.
FULL = Answer("too full", status="infeasible", step_s=0.1, batch=8)


def at(rate: float) -> Answer:
    return Answer(f"{rate}", step_s=8 / rate, batch=8)


def drawn(
    answers: list[Answer],
    sweeps: tuple[Sweep, ...] = (),
    best: Answer | None = BEST,
    baseline: Answer = BASELINE,
) -> Any:
    figure = plots._drawn(baseline, answers, sweeps, best)
    figure.canvas.draw()
    return figure


def test_bars_show_every_scenario_and_the_best_within_a_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    figure = drawn([Answer("other", step_s=1.0, batch=8), FULL, Answer("wrong", status="invalid")])
    (axes,) = figure.axes
    labels = [" ".join(label.get_text().split()) for label in axes.get_yticklabels()]
    assert labels == [
        "baseline", "other", "too full", "wrong", "best within the budget: 2 x g5.12xlarge",
    ]  # fmt: skip
    assert [bar.get_width() for bar in axes.patches] == [2.0, 1.0, 0.0, 0.0, 0.5]
    assert [text.get_text().strip() for text in axes.texts] == ["infeasible", "invalid"]
    many = drawn([at(n) for n in range(1, 60)])
    assert many.get_figheight() > 3 * figure.get_figheight(), "names do not run into one another"
    monkeypatch.setattr(plots, "MOST_HEIGHT", 10.0)
    assert drawn([at(n) for n in range(1, 60)]).get_figheight() == 10


def test_bars_of_unlike_batches_are_rates() -> None:
    (axes,) = drawn([Answer("twice", step_s=2.0, batch=16)], best=None).axes
    assert [bar.get_width() for bar in axes.patches] == [4.0, 8.0]
    assert "samples per second" in axes.get_xlabel()


def test_a_curve_has_its_points_in_order_and_lines_beside_it() -> None:
    sweep = Sweep("a.count", ("4", "1", "2", "8"))
    (axes,) = drawn([at(4.0), at(1.0), at(2.0), FULL], (sweep,)).axes
    line = axes.containers[0].lines[0]
    assert list(line.get_xdata()) == [1, 2, 4] and list(line.get_ydata()) == [1.0, 2.0, 4.0]
    told = [text.get_text() for text in axes.get_legend().get_texts()]
    assert told == ["baseline", "best within the budget: 2 x g5.12xlarge"]
    (axes,) = drawn([at(4.0), at(1.0)], (Sweep("a.count", ("4", "1")),), None, FULL).axes
    assert axes.get_legend() is None, "a baseline that does not fit has no rate"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("a.count", "samples per second")


def test_a_map_leaves_out_what_does_not_fit() -> None:
    sweeps = Sweep("tp", ("1", "2")), Sweep("pp", ("1", "2", "4"))
    figure = drawn([at(1), at(2), at(3), at(4), FULL, at(6)], sweeps)
    axes = figure.axes[0]
    cells = {
        (round(t.get_position()[0]), round(t.get_position()[1])): t.get_text() for t in axes.texts[:6]
    }
    assert cells == {(0, 0): "1", (1, 0): "2", (2, 0): "3", (0, 1): "4", (1, 1): "-", (2, 1): "6"}
    assert axes.texts[6].get_text() == "- : no plan"
    assert "best within the budget: 2 x g5.12xlarge: 16 samples/s" in axes.get_title()
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("pp", "tp")
