"""The best cluster within a budget is the best of all clusters within it."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from graphpar.catalogue import instances
from graphpar.cluster import Cluster
from graphpar.partition.physical_bound import physical_bound_s
from graphpar.scenarios import budget
from graphpar.scenarios.cache import AnswerCache
from graphpar.scenarios.pricing import PriceBook
from graphpar.scenarios.study import Limits, Solver, fair_limit_s
from graphpar.scenarios.types import Answer, Setting

TYPES = ("g4dn.xlarge", "g5.xlarge", "g6.xlarge", "p3.2xlarge", "g5.12xlarge")
BASE = Setting(Cluster.of("g5.xlarge", 1), batch=16, training=True)


def prices_of(types: Sequence[str]) -> dict[str, float]:
    return {name: float(instances()[name].usd_per_h or 0.0) for name in types}


def prices_of_some(name: str, number: int) -> float:
    """A budget to the cent."""
    return min(9.0, prices_of((name,))[name] * number)


def affordable(prices: dict[str, float], usd_per_h: float) -> list[dict[str, int]]:
    most = [int((usd_per_h + 1e-9) / price) for price in prices.values()]
    counted = (
        dict(zip(prices, counts, strict=True)) for counts in product(*(range(n + 1) for n in most))
    )
    return [c for c in counted if any(c.values()) and cost(c, prices) <= usd_per_h + 1e-9]


def cost(counts: dict[str, int], prices: dict[str, float]) -> float:
    return sum(prices[name] * count for name, count in counts.items())


class Oracle:
    """A solver that knows the step of every cluster: a sum of speeds, less what each node costs."""

    def __init__(self, speeds: dict[str, float], friction: float) -> None:
        self.speeds, self.friction = speeds, friction
        self.asked: list[dict[str, int]] = []
        self.limits_s: list[float | None] = []

    def part(self, counts: dict[str, int]) -> dict[str, int]:
        """The best of all parts of the cluster, the fewest nodes of several: idle nodes cost nothing."""
        parts = product(*(range(n + 1) for n in counts.values()))
        named = (dict(zip(counts, part, strict=True)) for part in parts if any(part))
        least = min(named, key=lambda p: (self.whole_s(p), sum(p.values())))
        return {name: n for name, n in least.items() if n}

    def whole_s(self, counts: dict[str, int]) -> float:
        speed = sum(self.speeds[t] * n for t, n in counts.items())
        return (1 + self.friction * (sum(counts.values()) - 1)) / speed

    def step_s(self, counts: dict[str, int]) -> float:
        return self.whole_s(self.part(counts))

    def bound_s(self, counts: dict[str, int]) -> float:
        return 1 / sum(self.speeds[t] * n for t, n in counts.items())

    limits = Limits(processes=1)

    def answers(self, asked: Sequence[Any], time_limit_s: float | None = None) -> list[Answer]:
        self.limits_s.append(time_limit_s)
        self.asked += [s.counts for s in asked]
        return [Answer("", status="ok", step_s=self.step_s(s.counts), batch=16) for s in asked]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from(TYPES), min_size=1, max_size=3, unique=True),
    st.floats(0.6, 9.0) | st.builds(prices_of_some, st.sampled_from(TYPES), st.integers(1, 7)),
    st.lists(st.floats(0.1, 10.0), min_size=5, max_size=5),
    st.sampled_from([0.0, 0.2, 1.0]),
    st.booleans(),
)
def test_no_cluster_within_the_budget_is_faster(
    types: list[str], usd_per_h: float, speeds: list[float], friction: float, share_time: bool
) -> None:
    prices = prices_of(types)
    oracle = Oracle(dict(zip(TYPES, speeds, strict=True)), friction)
    everything = affordable(prices, usd_per_h)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(budget, "BATCH_OF_SOLVES", 1)
        patch.setattr(budget, "_setting", lambda _, counts: SimpleNamespace(counts=counts))
        patch.setattr(budget, "_in_use", lambda setting, _: oracle.part(setting.counts))
        patch.setattr(budget, "_bounds", lambda _, asked, __: [oracle.bound_s(s.counts) for s in asked])
        if not everything:
            with pytest.raises(ValueError, match="below the cheapest"):
                budget.best_within(oracle, BASE, usd_per_h, types)  # type: ignore[arg-type]
            return
        found = budget.best_within(oracle, BASE, usd_per_h, types, share_time=share_time)  # type: ignore[arg-type]
    best_s = min(oracle.step_s(counts) for counts in everything)
    assert found.best is not None and found.best.step_s == pytest.approx(best_s)
    assert found.usd_per_h == pytest.approx(cost(dict(found.counts), prices))
    assert found.usd_per_h <= usd_per_h + 1e-6
    assert found.proven
    assert found.bound_s <= best_s * (1 + 1e-9)
    assert all(prices[name] > usd_per_h for name in found.too_dear)
    assert dict(found.counts) == oracle.part(dict(found.counts)), "nothing idle is rented"
    if share_time:
        each_s = fair_limit_s(found.considered, 1)
        assert oracle.limits_s == [each_s] * (len(oracle.limits_s) - 1) + [None], "the best has more time"
    else:
        assert set(oracle.limits_s) == {None}
    assert len(oracle.asked) - 1 <= found.solved <= min(len(oracle.asked), found.considered)
    mixes = used_up(everything, prices, usd_per_h)
    assert found.considered == len(mixes)
    planned = [{name: n for name, n in counts.items() if n} for counts in oracle.asked]
    for counts in mixes:
        known = {name: n for name, n in counts.items() if n} in planned
        assert known or oracle.bound_s(counts) >= best_s * (1 - 1e-9), "nothing is ruled out untried"


def used_up(
    everything: list[dict[str, int]], prices: dict[str, float], usd_per_h: float
) -> list[dict[str, int]]:
    """Mixes that no instance more could be paid for."""
    left = [(counts, usd_per_h + 1e-9 - cost(counts, prices)) for counts in everything]
    return [counts for counts, rest in left if rest < min(prices.values())]


def test_the_bound_of_a_budget_is_the_least_of_its_mixes_and_no_mix_is_faster() -> None:
    types, usd_per_h = ("g6.xlarge", "g5.xlarge", "p3.2xlarge"), 3.3
    prices = prices_of(types)
    mixes = used_up(affordable(prices, usd_per_h), prices, usd_per_h)
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(2048, 2048) for _ in range(6)))
    inputs = (torch.empty(16, 2048, device="meta"),)
    solver = Solver(PriceBook(model, inputs, {}, None), Limits(0.1, 0.05, 1), AnswerCache(None))
    base = replace(BASE, training=False)
    found = budget.best_within(solver, base, usd_per_h, types)
    assert found.best is not None and found.best.step_s is not None and found.proven
    assert len(mixes) == found.considered > 3
    steps, bounds = {}, {}
    clusters = [Cluster.of(*(x for pair in counts.items() if pair[1] for x in pair)) for counts in mixes]
    asked = [replace(base, cluster=cluster) for cluster in clusters]
    for counts, setting in zip(mixes, asked, strict=True):
        (answer,) = solver.answers([setting])
        assert answer.step_s is not None
        mix = tuple(sorted((name, n) for name, n in counts.items() if n))
        steps[mix], bounds[mix] = answer.step_s, physical_bound_s(solver.book.table(setting))
        assert answer.step_s >= bounds[mix] * (1 - 1e-9)
    assert budget._bounds(solver, asked, prices) == pytest.approx(list(bounds.values()))
    assert found.best.step_s == pytest.approx(min(steps.values()))
    assert found.bound_s == pytest.approx(min(bounds.values())) and found.bound_s < found.best.step_s
    nodes = {name.rpartition("/")[0] for name in found.best.used}
    assert len(nodes) == sum(n for _, n in found.counts), "no node is rented to stay idle"
    assert found.usd_per_h <= usd_per_h and found.usd_per_h == pytest.approx(
        cost(dict(found.counts), prices)
    )
    assert found.best.usd_per_h == pytest.approx(found.usd_per_h)


def test_a_budget_for_more_devices_than_are_planned_is_refused() -> None:
    with pytest.raises(ValueError, match="at most 1024"):
        budget.best_within(Oracle({}, 0.0), BASE, 1e4, ["g4dn.xlarge"])  # type: ignore[arg-type]
