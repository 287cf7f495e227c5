"""Run every public problem file of a folder and print what came out.

    python benchmarks/solve.py FOLDER --time-limit 60 --reference best.json --json

The reference file maps a file's name (or its part before the first dot) to the value to beat; files
whose name starts with `latency` are solved for latency, other placements for throughput. Ratios
above one are worse than the reference.
"""

import argparse
import json
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from graphpar.partition.answers import Progress, Solved
from graphpar.partition.placement.check import Objective
from graphpar.partition.placement.solve import solve_placement
from graphpar.partition.problems import ShardingProblem, read_problem
from graphpar.partition.sharding.solve import solve_sharding

_MARKS_CPU_S = (5, 10, 20, 30, 60, 90, 120)


@dataclass(frozen=True)
class Row:
    """One solved file."""

    instance: str
    status: str
    objective: float | None
    bound: float | None
    gap: float | None
    seconds: float
    truncated_by: str | None
    ratio: float | None
    first_answer_s: float | None
    """From the start of reading the file."""
    objective_at: dict[int, float]
    """Best objective by so many CPU seconds of the process: what a busy machine does not change much."""


def run(path: Path, time_limit_s: float, gap: float, reference: dict[str, float]) -> Row:
    """Solve one file and compare it with its reference."""
    began_s, began_cpu_s = time.perf_counter(), time.process_time()
    answers_s: list[float] = []
    objective_at: dict[int, float] = {}

    def watch(moment: Progress) -> None:
        if moment.incumbent is not None:
            answers_s.append(time.perf_counter() - began_s)
            cpu_s = time.process_time() - began_cpu_s
            objective_at.update((mark, moment.incumbent) for mark in _MARKS_CPU_S if cpu_s <= mark)

    problem = read_problem(path)
    if isinstance(problem, ShardingProblem):
        solved: Solved[Any] = solve_sharding(problem, time_limit_s=time_limit_s, gap=gap, progress=watch)
    else:
        objective: Objective = "latency" if path.name.startswith("latency") else "throughput"
        solved = solve_placement(
            problem, objective=objective, time_limit_s=time_limit_s, gap=gap, progress=watch
        )
    known = reference.get(path.name, reference.get(path.name.split(".")[0]))
    ratio = solved.objective / known if known and solved.objective is not None else None
    return Row(
        path.name,
        solved.status,
        solved.objective,
        solved.bound,
        solved.gap,
        solved.seconds,
        solved.truncated_by,
        ratio,
        answers_s[0] if answers_s else None,
        _passed(objective_at, time.process_time() - began_cpu_s),
    )


def _passed(objective_at: dict[int, float], spent_cpu_s: float) -> dict[int, float]:
    """The marks that the run got to; an answer holds until a better one comes."""
    return {mark: value for mark, value in objective_at.items() if mark <= spent_cpu_s}


def show(rows: Iterable[Row]) -> None:
    """Print the rows as a table."""
    table = Table()
    for heading in (
        "instance",
        "status",
        "objective",
        "bound",
        "gap",
        "seconds",
        "cut short by",
        "ratio",
    ):
        table.add_column(heading, justify="left" if heading == "instance" else "right")
    for row in rows:
        table.add_row(
            row.instance,
            row.status,
            "-" if row.objective is None else f"{row.objective:,.6g}",
            "-" if row.bound is None else f"{row.bound:,.6g}",
            "-" if row.gap is None else f"{100 * row.gap:.4f} %",
            f"{row.seconds:.1f}",
            row.truncated_by or "-",
            "-" if row.ratio is None else f"{row.ratio:.6f}",
        )
    console = Console()
    console.width = max(console.width, 120)
    console.print(table)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--time-limit", type=float, default=60.0, help="seconds for each file")
    parser.add_argument("--gap", type=float, default=0.0, help="relative gap that is good enough")
    parser.add_argument("--reference", type=Path, help="JSON: file name to the value to beat")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    options = parser.parse_args()
    reference = json.loads(options.reference.read_text()) if options.reference else {}
    files = sorted(p for p in options.folder.rglob("*.json*") if p != options.reference)
    rows = [run(path, options.time_limit, options.gap, reference) for path in files]
    if options.json:
        print(json.dumps([asdict(row) for row in rows]))
    else:
        show(rows)


if __name__ == "__main__":
    main()
