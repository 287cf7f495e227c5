"""The account of an error budget, as a plan's page prints it."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from graphpar.partition.types import StageChoice
from graphpar.plans.records import PlanPrecision, PlanUnitFormat
from graphpar.units import format_bytes, format_seconds

_MOST_ROWS = 24


def stage_format(choice: StageChoice) -> str:
    """The format of a stage, in how many of its units where they differ.

    >>> stage_format(StageChoice(0, 3, (), "bfloat16", unit_formats=("float32", "bfloat16", "bfloat16")))
    'bfloat16 in 2 of 3 units'
    """
    lower = [f for f in choice.formats if f != "float32"]
    if not lower or len(set(choice.formats)) == 1:
        return choice.formats[0] if choice.formats else choice.precision
    return f"{choice.precision} in {len(lower)} of {len(choice.formats)} units"


def precision_lines(report: PlanPrecision, units: Sequence[str]) -> list[str]:
    """Errors against the budget, every run of units in a lower format, and other budgets."""
    lines = [
        f"error budget {report.budget:g}: estimated {report.output_error:.2g} of the result, "
        f"{report.gradient_error:.2g} of the gradient; {_measured(report)}",
        f"  {report.note}",
    ]
    rows = list(_rows(report.units, units))
    lines += rows[:_MOST_ROWS] + ([f"  and {len(rows) - _MOST_ROWS} more"] if rows[_MOST_ROWS:] else [])
    return [*lines, *_others(report)]


def _measured(report: PlanPrecision) -> str:
    output, gradient = report.measured_output_error, report.measured_gradient_error
    if output is None or gradient is None:
        return "not measured"
    return f"measured {output:.2g} and {gradient:.2g}"


@dataclass(frozen=True)
class FormatRun:
    """Units `first` to `last`, all in one lower format: their errors together, and what they save."""

    first: int
    last: int
    format: str
    output_error: float
    gradient_error: float
    sources: tuple[str, ...]
    saved_s: float
    saved_bytes: float


def format_runs(formats: Sequence[PlanUnitFormat]) -> Iterator[FormatRun]:
    """Neighbouring units of one format taken together."""
    for _, group in groupby(
        enumerate(formats), key=lambda item: (item[1].format, item[1].unit - item[0])
    ):
        run = [row for _, row in group]
        yield FormatRun(
            first=run[0].unit,
            last=run[-1].unit,
            format=run[0].format,
            output_error=math.hypot(*(r.output_error for r in run)),
            gradient_error=math.hypot(*(r.gradient_error for r in run)),
            sources=tuple(dict.fromkeys(r.source for r in run)),
            saved_s=sum(r.saved_s for r in run),
            saved_bytes=sum(r.saved_bytes for r in run),
        )


def _rows(formats: Sequence[PlanUnitFormat], units: Sequence[str]) -> Iterator[str]:
    for run in format_runs(formats):
        first, last = units[run.first], units[run.last]
        yield (
            f"  {first if first == last else f'{first} .. {last}'}: {run.format}, errors "
            f"{run.output_error:.2g} and {run.gradient_error:.2g} ({', '.join(run.sources)}), saves "
            f"{format_seconds(run.saved_s)} and {_signed_bytes(run.saved_bytes)}"
        )


def _signed_bytes(num_bytes: float) -> str:
    return f"-{format_bytes(-num_bytes)}" if num_bytes < 0 else format_bytes(num_bytes)


def _others(report: PlanPrecision) -> Iterator[str]:
    for word, other in (("looser", report.looser), ("tighter", report.tighter)):
        if other is None:
            continue
        change = other.step_s - report.step_s
        side = "longer" if change > 0 else "shorter"
        yield (
            f"  the next {word} budget, {other.budget:.2g}, makes the step {format_seconds(abs(change))} "
            f"{side} (of {format_seconds(report.step_s)})"
        )
    if report.looser is None:
        yield "  no looser budget makes the step shorter"
