"""`graphpar solve`: formats recognised, JSON and nothing else on stdout, exit codes, no torch."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

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


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own that fails if torch gets imported."""
    script = (
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "from graphpar.solve_command import solve\n"
        "from graphpar.errors import GraphparError\n"
        "try:\n"
        "    solve.main(sys.argv[1:], 'graphpar solve', standalone_mode=False)\n"
        "except GraphparError as error:\n"
        "    print(error, file=sys.stderr)\n"
        "    sys.exit(error.exit_code)\n"
    )
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )


def test_sharding_as_json(tmp_path: Path) -> None:
    file, answer = tmp_path / "p.json", tmp_path / "answer.json"
    file.write_bytes(sharding_file(SHARDING))
    done = run(file, "--json", "-o", answer)
    record = json.loads(done.stdout)
    assert done.returncode == 0
    assert list(record) == KEYS
    assert (record["format"], record["status"], record["objective"]) == ("sharding", "optimal", 3)
    assert record["answer"] == json.loads(answer.read_text()) == [1, 1]


def test_a_search_cut_short_says_so(tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    file.write_bytes(sharding_file(ring(60, 0)))
    record = json.loads(run(file, "--json", "--time-limit", 5).stdout)
    assert (record["status"], record["truncated_by"]) == ("feasible", "time limit")
    assert record["bound"] < record["objective"]
    page = run(file, "--gap", 5).stdout
    assert "cut short by" in page
    assert "feasible" in page


def test_placement_as_json_and_table(tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    file.write_bytes(placement_file(PLACEMENT))
    record = json.loads(run(file, "--json").stdout)
    assert list(record) == KEYS
    assert (record["format"], record["objective"]) == ("placement", 5.0)
    assert sorted(record["answer"].values()) == [1, 2]
    latency = json.loads(run(file, "--json", "--objective", "latency").stdout)
    assert latency["objective"] == 8.0
    page = run(file).stdout
    assert "optimal" in page
    assert "lower bound" in page


def test_a_limit_that_reading_uses_up_is_no_error(tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    file.write_bytes(sharding_file(ring(60, 0)))
    done = run(file, "--json", "--time-limit", 1e-6)
    record = json.loads(done.stdout)
    assert done.returncode == 0
    assert (record["status"], record["truncated_by"]) == ("unknown", "time limit")
    assert "no time to read" in done.stderr
    placement = tmp_path / "p.json.gz"
    placement.write_bytes(gzip.compress(placement_file(PLACEMENT)))
    record = json.loads(run(placement, "--json", "--objective", "latency", "--time-limit", 1e-6).stdout)
    assert record["format"] == "placement"


def test_infeasible_ends_with_three(tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    impossible = ShardingProblem("none", ((0, 1),), ((IMPOSSIBLE_COST, 4),), ((0, 9),), (), (), 8)
    file.write_bytes(sharding_file(impossible))
    done = run(file, "--json")
    assert done.returncode == 3
    assert json.loads(done.stdout)["status"] == "infeasible"
    page = run(file)
    assert page.returncode == 3
    assert "memory limit" in page.stderr


def test_a_damaged_file_ends_with_two(tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    file.write_bytes(sharding_file(SHARDING)[:-20])
    done = run(file, "--json")
    assert (done.returncode, done.stdout) == (2, "")
    assert "whole" in done.stderr
