"""Branching on memory: parts that lose no answer, and bounds that are true."""

from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from amounts import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from small_problems import best_sharding, ring, sharding_problems

from graphpar.partition.problems import ShardingProblem
from graphpar.partition.sharding.branch import Branching, tighten
from graphpar.partition.sharding.dual import DualAscent
from graphpar.partition.sharding.exact import solve_exactly
from graphpar.partition.sharding.reduce import reduce_problem
from graphpar.partition.sharding.run import Run


@settings(max_examples=examples(40), deadline=None)
@given(sharding_problems(), st.sampled_from([0.5, 4.0]), st.booleans())
def test_parts_bound_the_whole_until_the_optimum_is_found(
    problem: ShardingProblem, room: float, is_hasty: bool
) -> None:
    best = best_sharding(problem)
    graph, rows = reduce_problem(problem)
    if best is None or graph.infeasible or not graph.costs:
        return
    dual = DualAscent(graph, rows)
    dual.sweep()
    parts, found = Branching(dual), np.inf
    while parts.bound < np.inf:
        assert min(parts.bound, found) <= best + 1e-6
        useful = parts.alive()
        for chosen in parts.split(min(best + room, found - 0.5), lambda: is_hasty):
            assert found <= best or useful[dual.flat.start[:-1] + chosen].any()
            if dual.memory.excess(chosen) <= 0:
                choice = {u: int(i) for u, i in zip(dual.vertices, chosen, strict=True)}
                found = min(found, graph.value(choice))
    assert found == pytest.approx(best)


@settings(max_examples=examples(40), deadline=None)
@given(sharding_problems())
def test_only_what_cannot_fit_is_dropped(problem: ShardingProblem) -> None:
    graph, rows = reduce_problem(problem)
    if graph.infeasible or not graph.costs:
        return
    dual = DualAscent(graph, rows)
    sizes, start = np.diff(dual.flat.start), dual.flat.start[:-1]
    alive = np.random.default_rng(len(sizes)).random(sizes.sum()) < 0.7
    before = alive.copy()
    fits = tighten(dual.flat, alive)
    for chosen in np.ndindex(*sizes):
        taken = start + np.array(chosen)
        if before[taken].all() and dual.memory.excess(np.array(chosen)) <= 0:
            assert fits
            assert alive[taken].all()


def test_a_gap_that_prices_leave_is_closed_by_branching() -> None:
    """Each of a few vertices holds much memory or none; what fits is a knapsack."""
    count = 7
    problem = ring(count, seed=3, steps=(1,))
    large = tuple(tuple((97 + 13 * v) * (i % 2) for i in range(6)) for v in range(count))
    costs = tuple(tuple(c + 900 * (1 - i % 2) for i, c in enumerate(row)) for row in problem.node_costs)
    knapsack = replace(problem, node_costs=costs, usages=large, usage_limit=400)
    graph, rows = reduce_problem(knapsack)
    dual = DualAscent(graph, rows)
    for _ in range(100):
        dual.ascend(2)
    exact = solve_exactly(
        graph, rows, dual.memory, active=set(), deadline_s=float("inf"), relative_gap=0.0
    )
    assert exact.chosen is not None
    best = graph.value({u: int(i) for u, i in zip(dual.vertices, exact.chosen, strict=True)})
    parts = Branching(dual)
    while parts.bound < best - 1e-6:
        parts.split(best)
    assert dual.bound < 0.99 * best


@pytest.mark.parametrize("is_full", [False, True])
def test_message_passing_goes_on_where_parts_have_no_room(is_full: bool) -> None:
    state = SimpleNamespace(objective=2.0, bound=1.0, time_limit_s=10.0, left_s=lambda: 5.0)
    dual = SimpleNamespace(multipliers=np.ones(1))
    run = SimpleNamespace(
        state=state,
        dual=dual,
        parts=SimpleNamespace(is_full=is_full),
        passing_per_s=0.0,
        branching_s=0.0,
        branched=0.0,
    )
    assert Run.should_branch(cast(Run, run)) is not is_full


def test_prices_soon_reach_what_an_answer_is_known_to_cost() -> None:
    count, price = 20, 10.0**9
    problem = ShardingProblem(
        "memory costs all",
        ((0, 1),) * count,
        ((0, price),) * count,
        ((2, 1),) * count,
        tuple((u, u + 1) for u in range(count - 1)),
        ((0, 1, 1, 0),) * (count - 1),
        3 * count // 2,
    )

    def bound_after(steps: int, known: float | None) -> float:
        dual = DualAscent(*reduce_problem(problem))
        if known is not None:
            dual.expect(known)
        for _ in range(steps):
            dual.ascend(2)
        return dual.bound

    best = 0.5 * count * price
    assert 0.3 * best < bound_after(60, 2.0 * best) <= best + 1
    assert bound_after(60, None) < 0.1 * best


def test_no_step_of_the_prices_goes_beyond_what_an_answer_costs() -> None:
    """All that is cheapest takes forty times the limit, and a small price is enough to change that."""
    count = 20
    problem = ShardingProblem(
        "far over",
        ((0, 1),) * count,
        tuple((900, 1000 + u) for u in range(count)),
        ((80, 1),) * count,
        tuple((u, u + 1) for u in range(count - 1)),
        ((0, 1, 1, 0),) * (count - 1),
        2 * count,
    )
    best = sum(1000 + u for u in range(count))
    dual = DualAscent(*reduce_problem(problem))
    dual.expect(best)
    for _ in range(15):
        dual.ascend(2)
    assert 0.99 * best < dual.bound <= best
