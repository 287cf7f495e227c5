"""The best cluster within a budget is the best of all clusters within it."""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from graphpar.catalogue import instances
from graphpar.cluster import Cluster
from graphpar.errors import ClusterError, GraphparError, RunError
from graphpar.partition.physical_bound import physical_bound_s
from graphpar.scenarios import budget, mix_search
from graphpar.scenarios.budget import BudgetAnswer
from graphpar.scenarios.budget_report import budget_lines, budget_plain
from graphpar.scenarios.cache import AnswerCache
from graphpar.scenarios.mixes import MixBounds, Mixes, Objective, mixes_within
from graphpar.scenarios.pricing import PriceBook
from graphpar.scenarios.study import Limits, Solver
from graphpar.scenarios.task import Task
from graphpar.scenarios.types import Answer, KnownPlan, Setting
from graphpar.training import Training

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
    """A solver that knows the step of every cluster: a sum of speeds, less what each node costs.

    Its clock goes on by `takes_s` with every cluster that it plans, and by `bounding_s` for all bounds.
    After so many plans as `killed_after` says a process is killed.
    """

    def __init__(
        self,
        speeds: dict[str, float],
        friction: float,
        takes_s: float = 0.0,
        bounding_s: float = 0.0,
        killed_after: int | None = None,
    ) -> None:
        self.killed_after = killed_after
        self.speeds, self.friction = speeds, friction
        self.takes_s, self.bounding_s = takes_s, bounding_s
        self.asked: list[dict[str, int]] = []
        self.limits_s: list[float] = []
        self.now_s = 0.0

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

    limits = Limits(gap=0.0, processes=1)
    kept = AnswerCache(None)

    def key(self, setting: Setting, time_limit_s: float, **others: object) -> str:
        return ""

    def answer(self, counts: dict[str, int]) -> Answer:
        self.asked.append(dict(counts))
        self.now_s += self.takes_s
        plan = KnownPlan((), "1f1b", 16)
        part = self.part(counts)
        usd_per_h = cost(part, prices_of([*part]))
        return Answer(
            "", status="ok", step_s=self.step_s(counts), batch=16, plan=plan, usd_per_h=usd_per_h
        )

    def answers(self, asked: Sequence[Any], time_limit_s: float) -> list[Answer]:
        return [self.answer(s.counts) for s in asked]

    def task(self, setting: Any, time_limit_s: float, hints: tuple[KnownPlan, ...]) -> Task:
        self.limits_s.append(time_limit_s)
        return Task(setting.counts, hints=hints)

    def learn(self, setting: Any, answer: Answer) -> Answer:
        return answer

    def tell(self, done: int, total: int) -> None:
        assert done <= total

    @contextmanager
    def solving(self, processes: int, tasks: int) -> Iterator[Any]:
        def submit(tasks: list[Task]) -> "Future[list[Answer]]":
            future: Future[list[Answer]] = Future()
            if self.killed_after is not None and len(self.asked) >= self.killed_after:
                self.killed_after = None
                future.set_exception(BrokenProcessPool())
            else:
                future.set_result([self.answer(task.table) for task in tasks])  # type: ignore[arg-type]
            return future

        try:
            yield submit
        except BrokenProcessPool as error:
            raise RunError("killed") from error

    def bounds(self, mixes: Mixes) -> MixBounds:
        """Nine tenths of the bound of each mix; all of it where it is sharpened."""
        oracle = self
        self.now_s += self.bounding_s

        class Bounds(MixBounds):
            def sharpen(self, mix: int) -> bool:
                before = self.least_s[mix]
                self.raise_to(mix, oracle.bound_s(mixes.named(mix)))
                return bool(self.least_s[mix] > before)

        found = Bounds(mixes)
        for mix in range(len(mixes.counts)):
            found.raise_to(mix, 0.9 * self.bound_s(mixes.named(mix)))
        return found

    def best_within(self, usd_per_h: float, types: Sequence[str], **options: Any) -> BudgetAnswer:
        def setting(_: Setting, counts: dict[str, int]) -> Any:
            nodes = [SimpleNamespace(devices=()) for _ in range(sum(counts.values()))]
            return SimpleNamespace(counts=dict(counts), cluster=SimpleNamespace(nodes=nodes))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(mix_search, "solving", self.solving)
            patch.setattr("time.monotonic", lambda: self.now_s)
            patch.setattr(budget, "_setting", setting)
            patch.setattr(budget, "_in_use", lambda setting, _: self.part(setting.counts))
            patch.setattr(budget, "bounds_of", lambda _, mixes, __: self.bounds(mixes))
            return budget.best_within(self, BASE, usd_per_h, types, **options)  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from(TYPES), min_size=1, max_size=3, unique=True),
    st.floats(0.6, 9.0) | st.builds(prices_of_some, st.sampled_from(TYPES), st.integers(1, 7)),
    st.lists(st.floats(0.1, 10.0), min_size=5, max_size=5),
    st.sampled_from([0.0, 0.2, 1.0]),
    st.sampled_from([0.0, 0.0, 1.0, 4.0]),
    st.sampled_from([None, None, 0, 1, 2, 4]),
    st.sampled_from(["time", "cost"]),
)
def test_no_cluster_within_the_budget_is_better(
    types: list[str],
    usd_per_h: float,
    speeds: list[float],
    friction: float,
    takes_s: float,
    killed_after: int | None,
    objective: Objective,
) -> None:
    prices = prices_of(types)
    speed = dict(zip(TYPES, speeds, strict=True))
    oracle = Oracle(speed, friction, takes_s, killed_after=killed_after)
    everything = affordable(prices, usd_per_h)
    if not everything:
        with pytest.raises(ValueError, match="below the cheapest"):
            oracle.best_within(usd_per_h, types)
        return

    def score(counts: dict[str, int], step_s: float) -> float:
        return step_s * (cost(counts, prices) if objective == "cost" else 1.0)

    found = oracle.best_within(usd_per_h, types, time_limit_s=20.0, objective=objective)
    best_s = min(oracle.step_s(counts) for counts in everything)
    best = min(score(oracle.part(counts), oracle.step_s(counts)) for counts in everything)
    assert found.best is not None and found.best.step_s is not None
    mine = score(dict(found.counts), found.best.step_s)
    if objective == "cost":
        assert found.bound_usd is not None and found.gap is not None
        assert found.bound_usd <= best / 3600 / 16 * 1e6 * (1 + 1e-9)
        assert found.gap == pytest.approx(1 - found.bound_usd / (mine / 3600 / 16 * 1e6), abs=1e-9)
    assert found.usd_per_h == pytest.approx(cost(dict(found.counts), prices))
    assert found.usd_per_h <= usd_per_h + 1e-6
    assert found.bound_s <= best_s * (1 + 1e-9), "what was not looked at counts with its bound"
    assert all(prices[name] > usd_per_h for name in found.too_dear)
    assert dict(found.counts) == oracle.part(dict(found.counts)), "nothing idle is rented"
    mixes = everything if objective == "cost" else used_up(everything, prices, usd_per_h)
    assert found.considered == len(mixes)
    assert found.considered == found.solved + found.ruled_out + found.unplanned
    assert oracle.now_s - takes_s <= 20.0 + 1e-9, "one more plan tells the answer"
    if len(mixes) == 1:
        assert len(oracle.asked) == 2, "one cluster, and once more without what it leaves idle"
    planned = [{name: n for name, n in counts.items() if n} for counts in oracle.asked]
    missed = [counts for counts in mixes if named(counts) not in planned]
    assert found.solved == len(mixes) - len(missed), "what was begun and not ended is not planned"
    hopeful = [c for c in missed if score(c, oracle.bound_s(c)) < mine * (1 - 1e-9)]
    assert found.unplanned >= len(hopeful), "nothing is ruled out untried"
    if not takes_s:
        assert found.proven and not hopeful
    if found.proven:
        assert mine == pytest.approx(best)


def named(counts: dict[str, int]) -> dict[str, int]:
    return {name: n for name, n in counts.items() if n}


def test_a_budget_whose_time_is_up_says_what_it_did_not_look_at() -> None:
    oracle = Oracle(dict.fromkeys(TYPES, 1.0), 0.5, takes_s=1.0)
    found = oracle.best_within(40.0, TYPES, time_limit_s=10.0)
    assert found.considered > 500 and not found.proven
    assert found.unplanned > found.considered - 10 - found.ruled_out
    assert found.bound_s == pytest.approx(min(found.bound_s, 1 / 70))
    told = "\n".join(budget_lines(found))
    assert f"the time was up before the other {found.unplanned}" in told
    assert budget_plain(found, found.best)["truncated_by"] == ["time limit"]  # type: ignore[arg-type, index]
    late = Oracle(dict.fromkeys(TYPES, 1.0), 0.5, takes_s=1.0, bounding_s=20.0)
    found = late.best_within(40.0, TYPES, time_limit_s=10.0)
    assert found.best is not None and found.solved == 1 and not found.unable
    assert min(late.limits_s) > 0, "one is planned in any case"


def used_up(
    everything: list[dict[str, int]], prices: dict[str, float], usd_per_h: float
) -> list[dict[str, int]]:
    """Mixes that no instance more could be paid for."""
    left = [(counts, usd_per_h + 1e-9 - cost(counts, prices)) for counts in everything]
    return [counts for counts, rest in left if rest < min(prices.values())]


def test_the_bound_of_a_budget_is_the_least_of_its_mixes_and_no_mix_is_faster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Whatever else the machine does.
    monkeypatch.setattr(time, "monotonic", time.process_time)
    types, usd_per_h = ("g6.xlarge", "g5.xlarge", "p3.2xlarge"), 3.3
    prices = prices_of(types)
    counted = used_up(affordable(prices, usd_per_h), prices, usd_per_h)
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(2048, 2048) for _ in range(6)))
    inputs = (torch.empty(16, 2048, device="meta"),)
    solver = Solver(PriceBook(model, inputs, {}, None), Limits(0.1, 0.05, 1), AnswerCache(None))
    base = replace(BASE, training=False)
    found = budget.best_within(solver, base, usd_per_h, types, 3.0)
    assert found.best is not None and found.best.step_s is not None and found.proven
    assert len(counted) == found.considered > 3
    steps, bounds = [], []
    for counts in counted:
        setting = budget._setting(base, named(counts))
        (answer,) = solver.answers([setting])
        assert answer.step_s is not None
        steps.append(answer.step_s)
        bounds.append(physical_bound_s(solver.book.table(setting)))
        assert answer.step_s >= bounds[-1] * (1 - 1e-9)
    assert found.best.step_s <= min(steps) / (1 - solver.limits.gap)
    assert found.bound_s <= min(steps)
    nodes = {name.rpartition("/")[0] for name in found.best.used}
    assert len(nodes) == sum(n for _, n in found.counts), "no node is rented to stay idle"
    assert found.usd_per_h <= usd_per_h and found.usd_per_h == pytest.approx(
        cost(dict(found.counts), prices)
    )
    assert found.best.usd_per_h == pytest.approx(found.usd_per_h)


FOUR = ("g5.xlarge", "g5.12xlarge", "g4dn.12xlarge", "g6.12xlarge")


def half_trained() -> Training:
    return Training(optimizer=torch.optim.AdamW, loss=nn.functional.mse_loss)


@pytest.mark.parametrize(
    ("precision", "tensor", "types", "usd_per_h"),
    [
        ("float32", 1, FOUR, 12.5),
        ("bfloat16", 1, FOUR, 12.5),
        # The same kind of device over two kinds of links.
        ("float16", 2, ("p3.2xlarge", "p3.8xlarge", "g4dn.xlarge"), 13.0),
    ],
)
def test_bounds_of_mixes_are_true_from_the_first_and_those_of_their_own_tables_in_the_end(
    precision: str, tensor: int, types: tuple[str, ...], usd_per_h: float
) -> None:
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(4096, 4096) for _ in range(4)))
    # So many samples that no bound is that of a single one's way.
    inputs = (torch.empty(1024, 4096, device="meta"),) * 2
    solver = Solver(PriceBook(model, inputs, {}, half_trained()), Limits(), AnswerCache(None))
    base = replace(BASE, batch=1024, precision=precision, tensor=tensor)
    mixes = mixes_within(prices_of(types), usd_per_h)
    # Devices without the format beside others: what stages send then is no measure for those without.
    solver.book.table(budget._setting(base, dict.fromkeys(types, 1)))
    bounds = budget.bounds_of(solver, mixes, base)
    first = bounds.least_s.copy()
    alone = Solver(PriceBook(model, inputs, {}, half_trained()), Limits(), AnswerCache(None))
    for mix in range(len(mixes.counts)):
        setting = budget._setting(base, mixes.named(mix))
        if bounds.excluded[mix]:
            assert not {"g5.xlarge", "g5.12xlarge", "g6.12xlarge"} & mixes.named(mix).keys()
            with pytest.raises(ClusterError):
                alone.task(setting)
            continue
        alone.book._by_kinds.clear()
        own = alone.book.table(setting)
        assert solver.book.table(setting) == own, "part of a table is the table of a part"
        exact_s = physical_bound_s(own)
        # Prices are found by steps: those of another mix may bound this one a little better than its own.
        assert 0 < first[mix] <= exact_s * 1.02
        bounds.sharpen(mix)
        assert exact_s * (1 - 1e-9) <= bounds.least_s[mix] <= exact_s * 1.02


def test_a_budget_for_devices_that_all_lack_the_format_is_answered_so() -> None:
    with torch.device("meta"):
        model, inputs = nn.Linear(8, 8), (torch.empty(16, 8),)
    solver = Solver(PriceBook(model, inputs, {}, None), Limits(), AnswerCache(None))
    base = replace(BASE, training=False, precision="bfloat16")
    found = budget.best_within(solver, base, 1.6, ("g4dn.xlarge", "p3.2xlarge"))
    assert found.best is None and found.unable == found.considered == 1
    assert "no device computes in bfloat16" in "\n".join(budget_lines(found))


def test_a_mix_that_cannot_hold_the_model_is_ruled_out() -> None:
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(32768, 32768, bias=False) for _ in range(10)))
    inputs = (torch.empty(16, 32768, device="meta"),)
    solver = Solver(PriceBook(model, inputs, {}, None), Limits(), AnswerCache(None))
    mixes = mixes_within(prices_of(("g4dn.xlarge", "g5.xlarge")), 1.6)
    bounds = budget.bounds_of(solver, mixes, replace(BASE, training=False))
    # 40 GiB of weights are more than cards of 24 GB and 16 GB hold, and less than three of 16 GB.
    held = [(mixes.named(mix), bool(bounds.least_s[mix] < np.inf)) for mix in range(len(mixes.counts))]
    assert held == [({"g4dn.xlarge": 3}, True), ({"g5.xlarge": 1, "g4dn.xlarge": 1}, False)]


@pytest.mark.parametrize("objective", ["time", "cost"])
def test_mixes_are_those_to_which_nothing_can_be_added_or_all_within(objective: Objective) -> None:
    prices = prices_of(TYPES)
    for usd_per_h in (0.6, 3.06, 6.12, 12.0):
        affordable_ones = {t: p for t, p in prices.items() if p <= usd_per_h}
        mixes = mixes_within(affordable_ones, usd_per_h, objective)
        found = [mixes.named(mix) for mix in range(len(mixes.counts))]
        every = affordable(prices, usd_per_h)
        kept = every if objective == "cost" else used_up(every, prices, usd_per_h)
        assert sorted(map(sorted_items, found)) == sorted(sorted_items(named(c)) for c in kept)
    with pytest.raises(ValueError, match="more than 1,000,000 clusters"):
        mixes_within({name: 0.01 + 0.001 * i for i, name in enumerate(TYPES)}, 3.0)


def sorted_items(counts: dict[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items())


def test_a_budget_for_more_devices_than_are_planned_is_refused() -> None:
    with pytest.raises(ValueError, match="at most 1024"):
        Oracle({}, 0.0).best_within(1e4, ["g4dn.xlarge"])


@pytest.mark.parametrize(
    ("usd_per_h", "types", "words"),
    [
        (0.0, ("g5.xlarge",), "must be a positive number"),
        (-1.0, ("g5.xlarge",), "must be a positive number"),
        (float("nan"), ("g5.xlarge",), "must be a positive number"),
        (float("inf"), ("g5.xlarge",), "must be a positive number"),
        (0.1, ("g5.xlarge", "g4dn.xlarge"), "below the cheapest type: g4dn.xlarge"),
        (9.0, (), "needs instance types"),
        (9.0, ("g5.xlarg",), "g5.xlarge"),
    ],
)
def test_senseless_budgets_are_refused(usd_per_h: float, types: tuple[str, ...], words: str) -> None:
    with pytest.raises((ValueError, GraphparError), match=words):
        Oracle({}, 0.0).best_within(usd_per_h, types)
