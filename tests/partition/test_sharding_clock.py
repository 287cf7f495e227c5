"""The clock decides nothing about a sharding problem that takes no time, as folded blocks do."""

import itertools
from types import SimpleNamespace

import pytest

from graphpar.partition.problems import ShardingProblem
from graphpar.partition.sharding import solve, state
from graphpar.partition.sharding.core import MOST_VERTICES


def test_a_folded_problem_is_solved_however_late_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    count, arity = 2 * MOST_VERTICES, 3
    pairs = tuple((u, u + 1) for u in range(count - 1))
    tables = tuple(
        tuple((7 * u + i * j * 5 + (i + u) % 3 * 4) % 11 for i in range(arity) for j in range(arity))
        for u in range(count - 1)
    )
    problem = ShardingProblem(
        "chain",
        ((0, 1),) * count,
        tuple(tuple((3 * u + 4 * i) % 7 for i in range(arity)) for u in range(count)),
        ((0,) * arity,) * count,
        pairs,
        tables,
        None,
    )
    in_time = solve.solve_sharding(problem, time_limit_s=60.0)
    hours = itertools.count(0.0, 3600.0)
    for module in (solve, state):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: next(hours)))
    late = solve.solve_sharding(problem, time_limit_s=60.0)
    assert (late.status, late.answer) == ("optimal", in_time.answer)
    assert in_time.status == "optimal"
