"""`graphpar solve FILE`: answer a public sharding or placement problem, with a certificate."""

import contextlib
import importlib
import json
import os
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import click

from graphpar.errors import InfeasibleError
from graphpar.files import check_writable, write_whole
from graphpar.partition.answers import INTERRUPT, ProgressCallback, Solved, ignore_progress
from graphpar.partition.clock import OutOfTimeError
from graphpar.partition.placement.check import Objective
from graphpar.partition.problems import PlacementProblem, Problem, ShardingProblem, read_problem

_NOT_READ = "the time limit leaves no time to read the file and search; give more"

_LONGEST_START_S = 0.8
"""Starting the interpreter counts too; more CPU time than this was spent on something else."""

_BUSIEST = 20.0
"""On a busy machine the start may take so many times its CPU time; more is somebody's thinking."""

_LEAVING_CPU_S = 0.04
"""CPU time from the last look at the clock to the end of the process, which frees nothing (see `cli`)."""

_LOADING_CPU_S = 0.25
"""CPU time to a first answer; large files are not read to the end where that would come too late."""

_LARGE_BYTES = 100_000


class _Engine(Protocol):
    def __call__(
        self, problem: Problem, time_limit_s: float, gap: float, watch: ProgressCallback, /
    ) -> Solved[Any]: ...


@click.command(name="solve")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--objective",
    type=click.Choice(["throughput", "latency"]),
    help="What a placement minimises; throughput unless said otherwise.",
)
@click.option(
    "--time-limit",
    "time_limit_s",
    default=60.0,
    show_default=True,
    type=click.FloatRange(min=0, min_open=True),
    help="Seconds until the best answer so far is returned.",
)
@click.option(
    "--gap",
    default=0.0,
    show_default=True,
    type=click.FloatRange(min=0),
    help="Stop once the answer is proven within this relative distance of the best possible.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the answer alone to this file, as JSON.",
)
def solve(
    file: Path,
    objective: Objective | None,
    time_limit_s: float,
    gap: float,
    as_json: bool,
    output: Path | None,
) -> None:
    """Solve a partition problem given as a file.

    FILE is a sharding problem (google/iopddl) or a placement problem (msr-fiddle/dnn-partitioning),
    .json or .json.gz. Exit code 3 means that no answer exists.
    """
    began_s = time.perf_counter() - _started_s_ago()
    if output is not None:
        check_writable(output)

    is_large = file.is_file() and file.stat().st_size >= _LARGE_BYTES

    def is_over() -> bool:
        # What takes no time is read even if the clock says otherwise: the machine may have stood still.
        elapsed_s = time.perf_counter() - began_s
        rest_s = _busy(elapsed_s) * (_LEAVING_CPU_S + _LOADING_CPU_S)
        return is_large and elapsed_s + rest_s > time_limit_s

    try:
        problem = read_problem(file, is_over, _load_sharding)
    except OutOfTimeError:
        problem = None
    read_s = time.perf_counter() - began_s
    if objective is not None and isinstance(problem, ShardingProblem):
        raise click.UsageError("--objective is for placement problems; this is a sharding problem")
    if problem is None:
        solved: Solved[Any] = Solved("unknown", None, None, None, read_s, "time limit", None, _NOT_READ)
    else:
        with _watched() as watch:
            engine = _engine(problem, objective or "throughput")
            # The limit is the whole command's, so starting up and reading a large file count.
            began_solving_s = time.perf_counter() - began_s
            left_s = time_limit_s - began_solving_s - _busy(began_solving_s) * _LEAVING_CPU_S
            solved = engine(problem, max(0.05 * time_limit_s, left_s), gap, watch)
        solved = replace(solved, seconds=solved.seconds + began_solving_s)
    unwritten = _write(output, solved) if output is not None else None
    # What takes long to read is a sharding problem, unless the call says otherwise.
    is_placement = isinstance(problem, PlacementProblem) or (problem is None and objective is not None)
    kind = "placement" if is_placement else "sharding"
    if as_json:
        click.echo(json.dumps(_as_record(kind, solved)))
        if solved.note:
            click.echo(solved.note, err=True)
    else:
        # What is shown to people takes as long to load as a small file to read.
        from graphpar.solve_output import show_table

        show_table(problem, file.name, kind, objective or "throughput", solved)
    if unwritten is not None:
        # Told when the answer is out, which is what the time went for.
        raise unwritten
    if solved.truncated_by == INTERRUPT:
        # Told with its exit code, as everywhere, now that the answer is out.
        raise KeyboardInterrupt
    if solved.status == "infeasible":
        if as_json:
            # Not SystemExit: the interpreter's own end waits for the compiler.
            raise click.exceptions.Exit(InfeasibleError.exit_code)
        raise InfeasibleError(f"{file}: {solved.note}")


def _started_s_ago() -> float:
    """Seconds since this process began, if it began for this command."""
    cpu_s = min(time.process_time(), _LONGEST_START_S)
    if not sys.platform.startswith("linux") or cpu_s >= _LONGEST_START_S:
        return cpu_s
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return cpu_s
    wall_s = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return min(max(cpu_s, wall_s), _BUSIEST * cpu_s)


def _busy(elapsed_s: float) -> float:
    """Seconds that a second of CPU time takes, on a machine as busy as it has been so far."""
    return min(max(1.0, elapsed_s / max(time.process_time(), 1e-3)), _BUSIEST)


def _watched() -> contextlib.AbstractContextManager[ProgressCallback]:
    """Who is told of progress: a line on stderr, nobody off a terminal."""
    if not sys.stderr.isatty():
        return contextlib.nullcontext(ignore_progress)
    from graphpar.solve_output import ProgressLine

    return ProgressLine()


def _load_sharding() -> None:
    """Load that engine, and what it has compiled, while the rest of a file is read."""

    def load() -> None:
        importlib.import_module("graphpar.partition.sharding.warm").begin_warming()

    threading.Thread(target=load, name="graphpar-loader", daemon=True).start()


def _engine(problem: Problem, objective: Objective) -> _Engine:
    """What solves such a problem, loaded now: either engine takes longer to load than a small problem."""
    is_sharding = isinstance(problem, ShardingProblem)
    folder = "sharding" if is_sharding else "placement"
    module = importlib.import_module(f"graphpar.partition.{folder}.solve")

    def run(problem: Problem, time_limit_s: float, gap: float, watch: ProgressCallback) -> Solved[Any]:
        settings = {
            "time_limit_s": time_limit_s,
            "gap": gap,
            "progress": watch,
            "keep_on_interrupt": True,
        }
        if is_sharding:
            solved = module.solve_sharding(problem, **settings)
        else:
            solved = module.solve_placement(problem, objective=objective, **settings)
        assert isinstance(solved, Solved)
        return solved

    return run


def _write(output: Path, solved: Solved[Any]) -> OSError | None:
    """Write the answer, if there is one; what went wrong."""
    if solved.answer is None:
        return None
    try:
        write_whole(output, f"{json.dumps(solved.answer)}\n".encode())
    except OSError as error:
        return error
    return None


def _as_record(kind: str, solved: Solved[Any]) -> dict[str, object]:
    answer = solved.answer
    if isinstance(answer, dict):
        answer = {str(node): device for node, device in answer.items()}
    return {
        "format": kind,
        "status": solved.status,
        "objective": solved.objective,
        "bound": solved.bound,
        "gap": solved.gap,
        "seconds": solved.seconds,
        "truncated_by": solved.truncated_by,
        "answer": answer,
    }
