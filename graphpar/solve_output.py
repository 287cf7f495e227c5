"""What `graphpar solve` shows people: a table of the answer, and a line while the search goes on."""

from types import TracebackType
from typing import Any

from rich.console import Console
from rich.table import Table

from graphpar.partition.answers import Progress, ProgressCallback, Solved
from graphpar.partition.placement.check import Objective
from graphpar.partition.problems import PlacementProblem, Problem


def show_table(
    problem: Problem | None, file_name: str, kind: str, objective: Objective, solved: Solved[Any]
) -> None:
    """Print what was found; `problem` is None where the file was not read to its end."""
    title = file_name if problem is None else problem.name
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(justify="right")
    if not isinstance(problem, PlacementProblem):
        table.add_row("format", kind)
        if problem is not None:
            table.add_row("nodes, strategies", f"{problem.num_nodes:,}, {problem.num_strategies:,}")
    else:
        table.add_row("format", f"{kind}, {objective}")
        table.add_row("operators", f"{len(problem.operators):,}")
        table.add_row("accelerators", f"{problem.num_accelerators}")
    table.add_row("status", solved.status)
    table.add_row("objective", _number(solved.objective))
    table.add_row("lower bound", _number(solved.bound))
    table.add_row("gap", "unknown" if solved.gap is None else f"{100 * solved.gap:.4f} %")
    table.add_row("seconds", f"{solved.seconds:.1f}")
    table.add_row("cut short by", solved.truncated_by or "nothing")
    if solved.note:
        table.add_row("note", solved.note)
    Console().print(table)


def _number(value: float | None) -> str:
    if value is None:
        return "none"
    return f"{value:,.0f}" if value == int(value) else f"{value:,.6f}"


class ProgressLine:
    """One line on stderr that is rewritten while the search goes on."""

    def __init__(self) -> None:
        self._status = Console(stderr=True).status("reading")

    def __enter__(self) -> ProgressCallback:
        self._status.start()
        return self._update

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._status.stop()

    def _update(self, moment: Progress) -> None:
        gap = ""
        if moment.incumbent is not None and moment.bound is not None:
            gap = f", gap {100 * (1 - moment.bound / max(abs(moment.incumbent), 1e-12)):.3f} %"
        self._status.update(
            f"{moment.phase}, {moment.seconds:.0f} s: best {_number(moment.incumbent)}, "
            f"bound {_number(moment.bound)}{gap}"
        )
