"""What a solved problem file looks like, for both formats, and how progress is told."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Literal, TypeAlias, TypeVar

AnswerStatus: TypeAlias = Literal["optimal", "feasible", "infeasible", "unknown"]
AnswerT = TypeVar("AnswerT")

OPTIMALITY_TOLERANCE = 1e-6
"""A relative gap at or below this is a proof of optimality in floating point."""

INTERRUPT = "interrupt"
"""What cut a search short that Ctrl-C ended, where that is asked to keep the answer."""


@dataclass(frozen=True)
class Progress:
    """A moment of a search: best answer and best bound so far, where there are any."""

    phase: str
    seconds: float
    incumbent: float | None
    bound: float | None


ProgressCallback: TypeAlias = Callable[[Progress], None]


def ignore_progress(_: Progress) -> None:
    """The callback of a caller who does not watch."""


@dataclass(frozen=True)
class Solved(Generic[AnswerT]):
    """An answer with its certificate.

    Attributes:
        status: `optimal` only if the bound proves it; `unknown` where the search found nothing.
        objective: Value of the answer as the independent checker computes it, or None.
        bound: A true lower bound on every answer, or None.
        gap: `(objective - bound) / |objective|`, or None where either is missing.
        seconds: Wall-clock time.
        truncated_by: `time limit`, `gap`, `search space`, `rounding` or `interrupt` (see
            `docs/solver.md`), or None where nothing was cut short.
        answer: The answer, or None.
    """

    status: AnswerStatus
    objective: float | None
    bound: float | None
    gap: float | None
    seconds: float
    truncated_by: str | None
    answer: AnswerT | None
    note: str = ""


def relative_gap(objective: float, bound: float) -> float:
    """Distance from the bound as a share of the objective; zero where both are the same.

    >>> relative_gap(200.0, 190.0)
    0.05
    """
    if bound >= objective:
        return 0.0
    return (objective - bound) / max(abs(objective), 1e-12)
