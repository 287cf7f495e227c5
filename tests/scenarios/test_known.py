"""Scenarios that differ in their links alone share plans and bounds, and stay as good as alone."""

from dataclasses import replace

import pytest
from plan_samples import sample_partition, table_for

from graphpar.cost import CostTable, LinkCost
from graphpar.scenarios.known import Known, at_least
from graphpar.scenarios.solve import solve, solve_together
from graphpar.scenarios.task import Task


def tasks(rates: list[float], time_limit_s: float = 5.0) -> list[Task]:
    table = table_for(sample_partition())
    return [Task(_over(table, rate), gap=0.001, time_limit_s=time_limit_s) for rate in rates]


def _over(table: CostTable, bytes_per_s: float) -> CostTable:
    return replace(table, topology=replace(table.topology, network=LinkCost(1e-3, bytes_per_s)))


RATES = [1e8, 1e9, 1e11, 3e8]


def test_together_is_as_good_as_alone() -> None:
    # Searches take half a second of processor time; one that ends by its limit is no equal of the others.
    asked = tasks(RATES, time_limit_s=60.0)
    for answer, task in zip(solve_together(asked), asked, strict=True):
        alone = solve(task)
        assert answer.status == alone.status == "ok"
        assert answer.step_s == pytest.approx(alone.step_s, rel=0.01)
        assert alone.step_s is not None and answer.bound_s is not None
        assert alone.bound_s is not None and alone.gap is not None
        objective_s = alone.bound_s / (1 - alone.gap)
        assert answer.bound_s <= objective_s * (1 + 1e-9)


@pytest.mark.parametrize("limit_s", [0.15, 0.03, 0.015, 1e-3])
def test_without_time_for_all_the_others_plans_are_taken(limit_s: float) -> None:
    """Nor is any answer longer than a simple plan (see `simple_plans`), as far as searches get."""
    answers = solve_together(tasks(RATES, time_limit_s=limit_s))
    assert all(a.status == "ok" and a.gap is not None and 0 <= a.gap <= 1 for a in answers)
    by_rate = sorted(zip(RATES, answers, strict=True), key=lambda item: item[0])
    bounds = [a.bound_s for _, a in by_rate]
    assert all(b is not None for b in bounds)


def test_a_bound_holds_for_slower_links_only() -> None:
    known, (slow, fast) = Known(), tasks([1e8, 1e11])
    assert at_least(fast.table.topology, slow.table.topology)
    assert not at_least(slow.table.topology, fast.table.topology)
    known.bounds.append((slow.table.topology, 7.0, "some plans"))
    assert known.bound_s(slow.table.topology) == 7.0
    assert known.bound_s(fast.table.topology) == 0.0


def test_a_bound_goes_with_the_plans_that_it_is_about() -> None:
    known, (task,) = Known(), tasks([1e9])
    found = replace(sample_partition(), objective_s=9.0, bound_s=8.0, family="many plans")
    assert known.improved(task.table, found).family == "many plans"
    known.bounds.append((task.table.topology, 8.5, "few plans"))
    better = known.improved(task.table, found)
    assert (better.bound_s, better.family) == (8.5, "few plans")
