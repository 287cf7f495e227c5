"""`graphpar solve`: formats recognised, JSON and nothing else on stdout, exit codes, no torch."""

import gzip
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from small_problems import placement_file, ring, sharding_file

from graphpar.partition.problems import (
    IMPOSSIBLE_COST,
    Operator,
    PlacementProblem,
    ShardingProblem,
    Transfer,
)

KEYS = ["format", "status", "objective", "bound", "gap", "seconds", "truncated_by", "answer"]
SHARDING = ShardingProblem(
    "two", ((0, 2), (1, 3)), ((5, 1), (2, 2)), ((0, 8), (4, 0)), ((0, 1),), ((0, 9, 3, 0),), 8
)
PLACEMENT = PlacementProblem(
    "pair",
    tuple(Operator(name, 40.0, 4.0, True, 1.0, name, False) for name in ("a", "b")),
    (Transfer(0, 1, 1.0),),
    2,
    1,
    10.0,
)


RUN = """
import contextlib, io, json, sys
sys.modules["torch"] = None
from graphpar.solve_command import solve
from graphpar.errors import GraphparError
import graphpar.partition.sharding.solve
late = {"rich", "scipy.sparse", "networkx", "pulp", "highspy"}.intersection(sys.modules)
assert not late, f"a first answer would wait for {late}"
done = []
for arguments in json.loads(sys.argv[1]):
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = solve.main(arguments, "graphpar solve", standalone_mode=False) or 0
        except (GraphparError, ValueError, OSError) as error:
            print(error, file=sys.stderr)
            code = getattr(error, "exit_code", 1)
    done.append((out.getvalue(), err.getvalue(), code))
json.dump(done, sys.stdout)
"""


INTERRUPTED = """
import contextlib, os, signal, sys
from graphpar import cli, solve_command
def interrupt(progress):
    if progress.incumbent is not None and not sent:
        sent.append(os.kill(os.getpid(), signal.SIGINT))
sent = []
signal.signal(signal.SIGINT, signal.default_int_handler)
solve_command._watched = lambda: contextlib.nullcontext(interrupt)
cli.main(["solve", *sys.argv[1:]])
"""


class Done(NamedTuple):
    """What a command wrote, and how it ended."""

    stdout: str
    stderr: str
    returncode: int


def run(*commands: Sequence[object]) -> list[Done]:
    """Commands one after another in a process of their own.

    It fails if torch gets imported, or too much before a first answer.
    """
    given = json.dumps([list(map(str, arguments)) for arguments in commands])
    ran = subprocess.run(
        [sys.executable, "-c", RUN, given], stdout=subprocess.PIPE, text=True, check=True
    )
    return [Done(*row) for row in json.loads(ran.stdout)]


def test_sharding_as_json(tmp_path: Path) -> None:
    file, answer = tmp_path / "p.json", tmp_path / "answer.json"
    file.write_bytes(sharding_file(SHARDING))
    began_s = time.perf_counter()
    (done,) = run((file, "--json", "-o", answer))
    took_s = time.perf_counter() - began_s
    record = json.loads(done.stdout)
    # The whole command's, but for its end; the system tells its beginning in hundredths of a second.
    assert 0.3 * took_s < record["seconds"] < took_s + 0.02
    assert done.returncode == 0
    assert list(record) == KEYS
    assert (record["format"], record["status"], record["objective"]) == ("sharding", "optimal", 3)
    assert record["answer"] == json.loads(answer.read_text()) == [1, 1]


def test_an_answer_file_is_checked_before_the_search_and_never_costs_the_answer(tmp_path: Path) -> None:
    file, deep = tmp_path / "p.json", tmp_path / "new" / "folder" / "answer.json"
    file.write_bytes(sharding_file(SHARDING))
    refused, full, made = run(
        (file, "--json", "-o", file / "answer.json"),
        (file, "--json", "-o", "/dev/full"),
        (file, "--json", "-o", deep),
    )
    assert refused.stdout == ""
    assert "is no folder" in refused.stderr
    assert json.loads(full.stdout)["answer"] == [1, 1]
    assert (refused.returncode, full.returncode) == (1, 1)
    assert "No space left" in full.stderr
    assert made.returncode == 0
    assert json.loads(deep.read_text()) == [1, 1]


def test_a_search_cut_short_says_so(tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    file.write_bytes(sharding_file(ring(60, 0)))
    cut, plain = run((file, "--json", "--time-limit", 5), (file, "--gap", 5))
    record = json.loads(cut.stdout)
    assert (record["status"], record["truncated_by"]) == ("feasible", "time limit")
    assert record["bound"] < record["objective"]
    assert "cut short by" in plain.stdout
    assert "feasible" in plain.stdout


def test_ctrl_c_tells_the_best_answer(tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    file.write_bytes(sharding_file(ring(60, 0)))
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, file, "--json"], stdout=subprocess.PIPE, text=True
    )
    assert done.returncode == 130
    record = json.loads(done.stdout)
    assert (record["status"], record["truncated_by"]) == ("feasible", "interrupt")
    assert len(record["answer"]) == 60


def test_placement_as_json_and_table(tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    file.write_bytes(placement_file(PLACEMENT))
    as_json = (file, "--json")
    throughput, latency, page = run(as_json, (*as_json, "--objective", "latency"), (file,))
    record = json.loads(throughput.stdout)
    assert list(record) == KEYS
    assert (record["format"], record["objective"]) == ("placement", 5.0)
    assert sorted(record["answer"].values()) == [1, 2]
    assert json.loads(latency.stdout)["objective"] == 8.0
    assert "optimal" in page.stdout
    assert "lower bound" in page.stdout


def test_a_limit_that_reading_uses_up_is_no_error(tmp_path: Path) -> None:
    """Small files are read and answered all the same."""
    small, file = tmp_path / "small.json", tmp_path / "p.json"
    small.write_bytes(sharding_file(ring(60, 0)))
    file.write_bytes(sharding_file(ring(60, 0)) + b" " * 100_000)
    placement = tmp_path / "p.json.gz"
    placement.write_bytes(gzip.compress(placement_file(PLACEMENT)))
    limit = ("--json", "--time-limit", 1e-6)
    sharding, quick, other = run(
        (file, *limit), (small, *limit), (placement, *limit, "--objective", "latency")
    )
    record = json.loads(sharding.stdout)
    assert sharding.returncode == 0
    assert (record["status"], record["truncated_by"]) == ("unknown", "time limit")
    assert "no time to read" in sharding.stderr
    assert json.loads(quick.stdout)["objective"] is not None
    assert json.loads(other.stdout)["format"] == "placement"


def test_infeasible_ends_with_three(tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    impossible = ShardingProblem("none", ((0, 1),), ((IMPOSSIBLE_COST, 4),), ((0, 9),), (), (), 8)
    file.write_bytes(sharding_file(impossible))
    done, page, unlimited = run((file, "--json"), (file,), (file, "--json", "--time-limit", "inf"))
    assert done.returncode == unlimited.returncode == 3
    assert json.loads(done.stdout)["status"] == json.loads(unlimited.stdout)["status"] == "infeasible"
    assert page.returncode == 3
    assert "memory limit" in page.stderr


def test_a_damaged_file_ends_with_two(tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    file.write_bytes(sharding_file(SHARDING)[:-20])
    (done,) = run((file, "--json"))
    assert (done.returncode, done.stdout) == (2, "")
    assert "whole" in done.stderr
