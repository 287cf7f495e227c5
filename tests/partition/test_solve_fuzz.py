"""Problem files with one amount out of the ordinary: refused by name, or solved right."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_problems import (
    best_placement,
    best_sharding,
    placement_file,
    placement_problems,
    sharding_file,
    sharding_problems,
)

from graphpar.partition.placement.solve import solve_placement
from graphpar.partition.problems import PlacementProblem, ProblemError, ShardingProblem, parse_problem
from graphpar.partition.sharding.solve import solve_sharding

ODD = [
    0,
    1,
    0.5,
    -3,
    10**17,
    10**18 - 1,
    10**18,
    10**18 + 1,
    2**63,
    10**30,
    1e300,
    10**400,
    1e-300,
    -(10**18),
    None,
    "x",
]


def numbers(part: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where the numbers of a JSON object are."""
    if isinstance(part, dict):
        return [place for key, value in part.items() for place in numbers(value, (*path, key))]
    if isinstance(part, list):
        return [place for key, value in enumerate(part) for place in numbers(value, (*path, key))]
    return [path] if isinstance(part, int | float) else []


def changed(data: st.DataObject, file: bytes) -> bytes:
    """The file with one number replaced."""
    whole = json.loads(file)
    *path, last = data.draw(st.sampled_from(numbers(whole)))
    place = whole
    for key in path:
        place = place[key]
    place[last] = data.draw(st.sampled_from(ODD))
    return json.dumps(whole).encode()


@settings(max_examples=40, deadline=None)
@given(st.data(), sharding_problems())
def test_odd_amounts_in_sharding_files(data: st.DataObject, problem: ShardingProblem) -> None:
    try:
        read = parse_problem(changed(data, sharding_file(problem)))
    except ProblemError:
        return
    assert isinstance(read, ShardingProblem)
    best = best_sharding(read)
    solved = solve_sharding(read, time_limit_s=300)
    if best is None:
        assert solved.status == "infeasible"
        return
    assert solved.status == "optimal" or solved.truncated_by == "rounding"
    assert solved.bound is not None
    assert solved.bound <= best + 1e-6 * abs(best)
    if solved.status == "optimal":
        assert solved.objective == pytest.approx(best, rel=2e-6, abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(st.data(), placement_problems())
def test_odd_amounts_in_placement_files(data: st.DataObject, problem: PlacementProblem) -> None:
    try:
        read = parse_problem(changed(data, placement_file(problem)))
    except ProblemError:
        return
    assert isinstance(read, PlacementProblem)
    solved = solve_placement(read, time_limit_s=300)
    if read.num_accelerators > 2:
        assert solved.status in ("optimal", "infeasible")
        return
    best = best_placement(read, "throughput")
    assert (solved.answer is None) == (solved.status == "infeasible")
    if solved.objective is not None:
        assert best is not None
        assert solved.objective >= best - 1e-9 * abs(best)


@settings(max_examples=40, deadline=None)
@given(st.data(), placement_problems())
def test_odd_amounts_in_placement_files_for_latency(
    data: st.DataObject, problem: PlacementProblem
) -> None:
    try:
        read = parse_problem(changed(data, placement_file(problem)))
    except ProblemError:
        return
    assert isinstance(read, PlacementProblem)
    solved = solve_placement(read, objective="latency", time_limit_s=20)
    if read.num_accelerators > 2:
        assert solved.status in ("optimal", "feasible", "infeasible")
        return
    best = best_placement(read, "latency")
    if solved.status == "infeasible" or best is None:
        assert solved.answer is None
        assert best is None
    else:
        assert solved.objective is not None
        assert solved.objective >= best - 1e-9 * abs(best)
        assert solved.bound is not None
        assert solved.bound <= best + 1e-6 * abs(best)
