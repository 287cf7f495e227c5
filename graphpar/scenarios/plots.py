"""A picture of a study: bars of step times, the curve of a sweep, or the map of a double sweep.

The best cluster within a budget is one more bar, a line beside a curve, or told above a map.

Needs matplotlib (the extra `viz`); the ending of the file decides between PNG and SVG.
"""

import importlib.util
import io
import math
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from graphpar.files import check_writable, write_whole
from graphpar.scenarios.sweeps import Sweep, knee
from graphpar.scenarios.types import Answer, renamed
from graphpar.view.palette import OKABE_ITO

ENDINGS = (".png", ".svg", ".pdf")
WITHOUT_MATPLOTLIB = "plots need matplotlib: pip install 'graphpar[viz]'"


def plot(
    path: str | os.PathLike[str],
    baseline: Answer,
    answers: Sequence[Answer],
    sweeps: Sequence[Sweep],
    best: Answer | None = None,
) -> Path:
    """Draw the study into a file; `best` is the best within its budget.

    Raises:
        ValueError: As `check_plot` says.
        OSError: The file could not be written after all.
    """
    target = Path(path)
    check_plot(target)
    buffer = io.BytesIO()
    kind = target.suffix.lower().removeprefix(".")
    _drawn(baseline, answers, sweeps, best).savefig(buffer, dpi=150, format=kind)
    write_whole(target, buffer.getvalue())
    return target


def check_plot(path: str | os.PathLike[str]) -> None:
    """Refuse what could not be drawn, before anything is worked out.

    Raises:
        ValueError: The ending is none of `ENDINGS`, matplotlib is not installed, or the file cannot be
            written.
    """
    if Path(path).suffix.lower() not in ENDINGS:
        raise ValueError(f"plot {path}: the file must end in one of {', '.join(ENDINGS)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(WITHOUT_MATPLOTLIB)
    check_writable(path)


def plot_svg(
    baseline: Answer, answers: Sequence[Answer], sweeps: Sequence[Sweep], best: Answer | None = None
) -> str:
    """The picture as the text of an `svg` element, for a notebook.

    Raises:
        ValueError: matplotlib is not installed.
    """
    buffer = io.StringIO()
    _drawn(baseline, answers, sweeps, best).savefig(buffer, format="svg")
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _drawn(
    baseline: Answer, answers: Sequence[Answer], sweeps: Sequence[Sweep], best: Answer | None
) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(WITHOUT_MATPLOTLIB) from error
    figure = Figure(figsize=(8, HEIGHT), layout="constrained")
    swept = answers[: _points(sweeps)]
    numeric = bool(sweeps) and all(_number(v) is not None for v in sweeps[0].values)
    if len(sweeps) == 2:
        axes = _map(figure, swept, sweeps)
        if best is not None and best.samples_per_s:
            axes.set_title(f"{_titled(best)}: {best.samples_per_s:.3g} samples/s", parse_math=False)
    elif sweeps and numeric:
        _curve(figure, baseline, swept, sweeps[0], best)
    else:
        also = () if best is None else (renamed(best, _titled(best), ()),)
        _bars(figure, baseline, (*answers, *also))
    return figure


def _titled(best: Answer) -> str:
    return f"best within the budget: {best.title}"


MOST_LABELS = 100
"""Cells of a map that are still told in numbers."""

HEIGHT, BAR_HEIGHT, MOST_HEIGHT = 4.5, 0.4, 400.0
"""Inches: of a picture, at least of each of its bars, and of a picture that a PNG can hold."""

LABEL_LETTERS = 32
"""A longer name of a scenario takes several lines."""


def _points(sweeps: Sequence[Sweep]) -> int:
    count = 1
    for sweep in sweeps:
        count *= len(sweep.values)
    return count if sweeps else 0


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _bars(figure: Any, baseline: Answer, answers: Sequence[Answer]) -> None:
    rows = (baseline, *answers)
    figure.set_figheight(min(max(HEIGHT, BAR_HEIGHT * len(rows)), MOST_HEIGHT))
    axes = figure.subplots()
    positions = range(len(rows))
    # Steps of unlike batches say nothing beside each other.
    unlike = len({a.batch for a in rows if a.status == "ok"}) > 1
    lengths = [(a.samples_per_s if unlike else a.step_s) if a.status == "ok" else None for a in rows]
    errors = [(length or 0.0) * a.error_bar for length, a in zip(lengths, rows, strict=True)]
    bars = [length or 0.0 for length in lengths]
    axes.barh(positions, bars, xerr=errors, color=OKABE_ITO[0], ecolor="grey", capsize=3)
    for position, answer in enumerate(rows):
        if lengths[position] is None:
            axes.text(0, position, f" {answer.status}", va="center", color="grey")
    titles = [textwrap.fill(a.title, LABEL_LETTERS) for a in rows]
    axes.set_yticks(positions, titles, parse_math=False)
    axes.invert_yaxis()
    axes.set_xlabel("predicted samples per second" if unlike else "predicted step, s")


def _curve(
    figure: Any, baseline: Answer, answers: Sequence[Answer], sweep: Sweep, best: Answer | None
) -> None:
    axes = figure.subplots()
    points = sorted(
        (float(v), a.samples_per_s, a.error_bar)
        for v, a in zip(sweep.values, answers, strict=True)
        if a.samples_per_s and a.status == "ok"
    )
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    errors = [rate * bar for _, rate, bar in points]
    axes.errorbar(xs, ys, yerr=errors, marker="o", color=OKABE_ITO[0], ecolor="grey", capsize=3)
    if baseline.samples_per_s and baseline.status == "ok":
        axes.axhline(baseline.samples_per_s, linestyle="--", color="grey", label="baseline")
    if best is not None and best.samples_per_s:
        axes.axhline(best.samples_per_s, linestyle="-.", color=OKABE_ITO[2], label=_titled(best))
    bend = knee([float(v) for v in sweep.values], answers)
    if bend is not None:
        axes.axvline(bend, linestyle=":", color=OKABE_ITO[1], label="knee")
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    if len(xs) > 2 and xs[0] > 0 and xs[-1] / xs[0] > 20:
        axes.set_xscale("log")
    axes.set_xlabel(sweep.path)
    axes.set_ylabel("samples per second")


def _map(figure: Any, answers: Sequence[Answer], sweeps: Sequence[Sweep]) -> Any:
    axes = figure.subplots()
    rows, columns = (s.values for s in sweeps)
    # What does not fit has a rate, too, were there more memory: it is no answer.
    rates = [(a.samples_per_s if a.status == "ok" else None) or math.nan for a in answers]
    grid = [rates[i * len(columns) : (i + 1) * len(columns)] for i in range(len(rows))]
    image = axes.imshow(grid, aspect="auto", origin="lower")
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xlabel(sweeps[1].path)
    axes.set_ylabel(sweeps[0].path)
    if len(rows) * len(columns) <= MOST_LABELS:
        for i, row in enumerate(grid):
            for j, rate in enumerate(row):
                told = "-" if math.isnan(rate) else f"{rate:.3g}"
                box = {"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 1.5}
                axes.text(j, i, told, ha="center", va="center", bbox=box)
        if any(map(math.isnan, rates)):
            axes.annotate("- : no plan", (1, 1.01), xycoords="axes fraction", ha="right", color="grey")
    figure.colorbar(image, label="samples per second")
    return axes
