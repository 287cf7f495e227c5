"""Reading problem files: round trips, and every kind of damage named."""

import contextlib
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_problems import (
    placement_file,
    placement_problems,
    sharding_file,
    sharding_problems,
)

from graphpar.partition import problems
from graphpar.partition.clock import OutOfTimeError
from graphpar.partition.jit import COMPILED
from graphpar.partition.number_rows import NumberRows, flat, parse_rows
from graphpar.partition.problems import (
    PlacementProblem,
    ProblemError,
    ShardingProblem,
    parse_problem,
    read_problem,
)

SHARDING: dict[str, Any] = {
    "problem": {
        "name": "two",
        "nodes": {
            "intervals": [[0, 2], [1, 3]],
            "costs": [[5, 1], [2, 2]],
            "usages": [[0, 8], [4, 0]],
        },
        "edges": {"nodes": [[0, 1]], "costs": [[0, 9, 3, 0]]},
        "usage_limit": 8,
    }
}
PLACEMENT: dict[str, Any] = {
    "maxSizePerFPGA": 10.0,
    "maxFPGAs": 2,
    "maxCPUs": 1,
    "nodes": [
        {"id": "a", "cpuLatency": 2.0, "fpgaLatency": 1.0},
        {"id": "b", "cpuLatency": 2.0, "fpgaLatency": 1.0},
    ],
    "edges": [{"sourceId": "a", "destId": "b", "cost": 0.5}],
}


@settings(max_examples=30, deadline=None)
@given(sharding_problems())
def test_sharding_round_trip(problem: ShardingProblem) -> None:
    read = parse_problem(sharding_file(problem))
    assert isinstance(read, ShardingProblem)
    assert (read.node_costs, read.usages, read.edge_costs, read.intervals) == (
        problem.node_costs,
        problem.usages,
        problem.edge_costs,
        problem.intervals,
    )


@settings(max_examples=30, deadline=None)
@given(placement_problems())
def test_placement_round_trip(problem: PlacementProblem) -> None:
    read = parse_problem(placement_file(problem))
    assert isinstance(read, PlacementProblem)
    assert read.transfers == problem.transfers
    assert [op.accelerator_latency for op in read.operators] == [
        op.accelerator_latency for op in problem.operators
    ]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.integers(-(2**64), 2**64), max_size=4), max_size=4),
    st.sampled_from([",", " ,\n", ", "]),
    st.data(),
)
def test_rows_of_whole_numbers_are_read_as_json_has_them(
    rows: list[list[int]], comma: str, data: st.DataObject
) -> None:
    text = json.dumps(rows, separators=(comma, ":"))
    at = data.draw(st.integers(0, len(text)))
    text = (
        text[:at]
        + data.draw(st.sampled_from(["", "0", "-", " ", ".5", "e2", "]", "[1]", "1", ",", "x"]))
        + text[at:]
    )
    read = parse_rows(text.encode())
    try:
        expected = json.loads(text)
    except json.JSONDecodeError:
        assert read is None
        return
    if read is not None:
        assert [list(row) for row in read] == expected
        return
    # What stands around a value is not part of it where files are read.
    around = text != text.strip()
    assert (
        around
        or not expected
        or any(
            not isinstance(row, list)
            or not row
            or any(type(n) is not int or abs(n) >= 2**63 for n in row)
            for row in expected
        )
    )


@pytest.mark.skipif(not COMPILED, reason="numba is not installed")
@settings(max_examples=30, deadline=None)
@given(sharding_problems())
def test_large_files_read_the_same(problem: ShardingProblem) -> None:
    file = sharding_file(problem)
    begun: list[bool] = []
    slowly = parse_problem(file, begin=lambda: begun.append(False))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(problems, "_LARGE_BYTES", 0)
        fast = parse_problem(file, begin=lambda: begun.append(True))
    assert begun == [True]  # what large files need is begun with while they are read
    assert isinstance(slowly, ShardingProblem)
    assert isinstance(fast, ShardingProblem)
    for name in ("node_costs", "usages", "edge_costs"):
        rows, expected = getattr(fast, name), getattr(slowly, name)
        assert isinstance(rows, NumberRows) or not expected or not isinstance(expected[0][0], int)
        assert [tuple(row) for row in rows] == [tuple(row) for row in expected]
        assert all((a == b).all() for a, b in zip(flat(rows), flat(expected), strict=True))
    assert (fast.num_strategies, fast.num_pairs) == (slowly.num_strategies, slowly.num_pairs)


def damaged(problem: dict[str, Any], *path: Any, value: Any) -> bytes:
    """The file with one value replaced."""
    copied = json.loads(json.dumps(problem))
    place = copied
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return json.dumps(copied).encode()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "JSON"),
        (b"[1, 2]", "JSON object"),
        (b"{}", "neither"),
        (b'{"problem": ' + b"[" * 10**5 + b"]" * 10**5 + b"}", "recursion"),
        (json.dumps(SHARDING).encode()[:-9], "whole"),
        (damaged(SHARDING, "problem", "nodes", "costs", value=[[5, 1]]), "must agree"),
        (damaged(SHARDING, "problem", "nodes", "costs", 0, value=[]), "no strategy"),
        (damaged(SHARDING, "problem", "nodes", "costs", 0, value=[1]), "1 costs but 2"),
        (damaged(SHARDING, "problem", "nodes", "costs", 0, 0, value="x"), "costs"),
        (damaged(SHARDING, "problem", "nodes", "usages", 1, 0, value=-4), "negative memory"),
        (damaged(SHARDING, "problem", "edges", "nodes", 0, value=[0, 7]), "nodes are 0..1"),
        (
            damaged(SHARDING, "problem", "nodes", value={"intervals": [], "costs": [], "usages": []}),
            "there are none",
        ),
        (damaged(SHARDING, "problem", "edges", "nodes", 0, value=[0, 1, 1]), "3 nodes"),
        (damaged(SHARDING, "problem", "edges", "costs", 0, value=[1]), "4 combinations"),
        (damaged(SHARDING, "problem", "edges", "costs", 0, 0, value=None), "edge 0 costs: Expected"),
        (damaged(SHARDING, "problem", "edges", "costs", 0, value=3), "edge 0 costs: Expected"),
        (damaged(SHARDING, "problem", "usage_limit", value=-1), "usage_limit"),
        (damaged(SHARDING, "problem", "usage_limit", value=10**400), "too large"),
        (damaged(SHARDING, "problem", "nodes", "usages", 0, 0, value=10**400), "too large"),
        (damaged(SHARDING, "problem", "nodes", "intervals", 0, 1, value=10**30), "intervals"),
        (damaged(SHARDING, "problem", "nodes", "intervals", 1, value=[5, 3]), "node 1 .* ends before"),
        (damaged(PLACEMENT, "nodes", 1, "id", value="a"), "two nodes"),
        (damaged(PLACEMENT, "nodes", 1, "cpuLatency", value=-1.0), "cpuLatency"),
        (damaged(PLACEMENT, "edges", 0, "destId", value="z"), "unknown node"),
        (damaged(PLACEMENT, "edges", 0, "destId", value="a"), "itself"),
        (damaged(PLACEMENT, "edges", 0, "cost", value=-1), "cost of edge"),
        (damaged(PLACEMENT, "maxFPGAs", value=-1), "maxFPGAs"),
        (json.dumps(PLACEMENT).replace("0.5", "NaN").encode(), "JSON"),
    ],
)
def test_damage_is_named(data: bytes, words: str) -> None:
    with pytest.raises(ProblemError, match=words):
        parse_problem(data)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_damage_passes_as_another_error(data: st.DataObject) -> None:
    whole = json.dumps(data.draw(st.sampled_from([SHARDING, PLACEMENT]))).encode()
    at = data.draw(st.integers(0, len(whole) - 1))
    noise = data.draw(st.binary(max_size=3))
    broken = whole[:at] + noise + whole[at + data.draw(st.integers(0, 4)) :]
    with contextlib.suppress(ProblemError):
        parse_problem(broken)


def test_reading_can_be_cut_short() -> None:
    with pytest.raises(OutOfTimeError):
        parse_problem(json.dumps(SHARDING).encode(), should_stop=lambda: True)


def test_truncated_gzip_and_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "p.json.gz"
    path.write_bytes(gzip.compress(json.dumps(SHARDING).encode()))
    assert isinstance(read_problem(path), ShardingProblem)
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(ProblemError, match="damaged gzip"):
        read_problem(path)
    with pytest.raises(ProblemError, match="cannot be read"):
        read_problem(tmp_path / "nothing.json")
