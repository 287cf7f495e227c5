"""The best cluster for the money: which mix of instance types, and how much better any could be."""

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import get_args

import numpy as np

from graphpar import catalogue
from graphpar.cluster import Cluster
from graphpar.cost import CostTable
from graphpar.errors import ClusterError
from graphpar.partition.unit_arrays import BoolArray, FloatArray
from graphpar.scenarios.mix_search import Found, MixSearch
from graphpar.scenarios.mixes import MixBounds, Mixes, Objective, mixes_within
from graphpar.scenarios.prices import instance_of, instance_price, known_prices
from graphpar.scenarios.study import Solver
from graphpar.scenarios.types import Answer, Setting, renamed

BUDGET_S = 30.0
"""Wall-clock time that a budget may take where nobody says otherwise, ..."""

FINAL_SHARE = 0.3
"""... of which this share is kept for the best mix alone."""


@dataclass(frozen=True)
class BudgetAnswer:
    """The best cluster within a budget.

    Attributes:
        best: Its plan; None when nothing within the budget is known to run the model.
        counts: Instances of each type in it, without those that its plan leaves idle.
        usd_per_h: Their price.
        considered: Clusters that use up the budget; all within it where the cost counts.
        solved: Of them, how many were planned.
        unplanned: Of them, how many were neither planned nor ruled out by their bounds, for want of time.
        unable: Of them, how many cannot be planned as asked; `problem` says why.
        bound_s: No plan on any cluster within the budget has a shorter step.
        too_dear: Types of which a single instance costs more than the budget.
        problem: Why clusters cannot be planned as asked.
        objective: What it is best in.
        bound_usd: Where that is the cost: no plan within the budget has a lower one, in dollars per
            million samples.
    """

    best: Answer | None
    counts: tuple[tuple[str, int], ...]
    usd_per_h: float
    considered: int
    solved: int
    unplanned: int = 0
    unable: int = 0
    bound_s: float = 0.0
    too_dear: tuple[str, ...] = ()
    problem: str = ""
    objective: Objective = "time"
    bound_usd: float | None = None

    @property
    def proven(self) -> bool:
        """Whether every cluster was planned or ruled out, of those that can be planned as asked."""
        return not self.unplanned

    @property
    def ruled_out(self) -> int:
        """Clusters that no plan can make better than the best, by their bounds."""
        return self.considered - self.solved - self.unplanned - self.unable

    @property
    def gap(self) -> float | None:
        """How much shorter a step, or how much cheaper it, could be at most; None without a plan."""
        if self.best is None:
            return None
        found, bound = self.best.step_s, self.bound_s
        if self.objective == "cost":
            found, bound = self.best.usd_per_million_samples, self.bound_usd or 0.0
        return 1 - bound / found if found else None


def best_within(
    solver: Solver,
    baseline: Setting,
    usd_per_h: float,
    types: Sequence[str],
    time_limit_s: float | None = None,
    objective: Objective = "time",
) -> BudgetAnswer:
    """The fastest cluster of these instance types within a budget, or the cheapest per sample.

    Args:
        solver: Prices and plans settings.
        baseline: What to plan, on another cluster.
        usd_per_h: The budget.
        types: Names of instance types.
        time_limit_s: Wall-clock seconds for all clusters together; by default 30. Prices of tensor groups
            come before.
        objective: What is to be least.

    Raises:
        ValueError: A type is unknown or has no price, or none fits the budget.
    """
    began_s = time.monotonic()
    prices, mixes = affordable_mixes(usd_per_h, types, objective)
    limit_s = BUDGET_S if time_limit_s is None else time_limit_s
    key = solver.key(baseline, limit_s, budget=[usd_per_h, sorted(prices.items()), objective])
    kept = solver.kept.get_as(BudgetAnswer, key)
    if kept is not None:
        return kept
    dear = tuple(name for name, price in prices.items() if price > usd_per_h)
    bounds = bounds_of(solver, mixes, baseline)
    search = MixSearch(solver, mixes, bounds, partial(_setting, baseline), objective)
    # Prices of tensor groups may take minutes, and nothing is known before they are there.
    began_s = began_s if baseline.tensor == 1 else time.monotonic()
    search.run((1 - FINAL_SHARE) * (began_s + limit_s - time.monotonic()))
    answer = replace(_counted(search), too_dear=dear)
    if search.best is not None:
        found = _again(search, baseline, search.best, began_s + limit_s - time.monotonic())
        best = renamed(found.answer, " + ".join(f"{n} x {t}" for t, n in found.counts.items()), ())
        answer = replace(
            answer,
            best=best,
            counts=tuple(found.counts.items()),
            usd_per_h=sum(prices[t] * n for t, n in found.counts.items()),
            bound_s=min(answer.bound_s, found.step_s),
            bound_usd=_usd(min(float(search.least.min()), found.score), baseline.batch)
            if objective == "cost"
            else None,
        )
    solver.kept.put(key, answer)
    return answer


def _usd(score: float, batch: int) -> float:
    """Dollars per million samples of dollars per hour times seconds of a step."""
    return score / 3600 / batch * 1e6


def affordable_mixes(
    usd_per_h: float, types: Sequence[str], objective: Objective = "time"
) -> tuple[dict[str, float], Mixes]:
    """The prices of instance types, and the mixes of them that are looked at within a budget.

    Raises:
        ValueError: See `best_within`.
    """
    prices = _prices(types)
    _check_money(usd_per_h, prices)
    if objective not in get_args(Objective):
        raise ValueError(f"objective is {objective!r}; give {' or '.join(get_args(Objective))}")
    return prices, mixes_within({t: p for t, p in prices.items() if p <= usd_per_h}, usd_per_h, objective)


def _check_money(usd_per_h: float, prices: Mapping[str, float]) -> None:
    if not 0 < usd_per_h < math.inf:
        raise ValueError(f"the budget is {usd_per_h:g} $/h; it must be a positive number")
    cheapest = min(prices, key=prices.__getitem__)
    if prices[cheapest] > usd_per_h:
        raise ValueError(
            f"the budget of {usd_per_h:g} $/h is below the cheapest type: {cheapest} costs "
            f"{prices[cheapest]:g} $/h"
        )


def _counted(search: MixSearch) -> BudgetAnswer:
    """What became of all mixes; no answer yet."""
    return BudgetAnswer(
        best=None,
        counts=(),
        usd_per_h=0.0,
        considered=len(search.mixes.counts),
        solved=len(search.planned),
        unplanned=search.open,
        unable=int(search.bounds.excluded.sum()),
        bound_s=float(search.bounds.least_s.min()),
        problem=search.bounds.problem,
        objective=search.objective,
    )


def _again(search: MixSearch, baseline: Setting, best: Found, time_limit_s: float) -> Found:
    """The best planned once more and told in full, without the instances that its plan leaves idle."""
    solver = search.solver
    used = _in_use(best.setting, best.answer) or dict(best.counts)
    setting = _setting(baseline, used)
    before = replace(best, answer=solver.learn(best.setting, best.answer))
    (answer,) = solver.answers([setting], max(time_limit_s, _LEAST_S))
    again = Found(used, setting, answer, search.weight(used))
    return again if again.score <= before.score * (1 + 1e-9) else before


_LEAST_S = 0.1
"""The answer that is told needs some time to be worked out."""


def _in_use(setting: Setting, answer: Answer) -> dict[str, int]:
    """Instances of each type that hold a device with work."""
    busy = {setting.cluster.device(name).node for name in answer.used}
    types = (instance_of(node) for node in setting.cluster.nodes if node.name in busy)
    return dict(Counter(name for name in types if name is not None))


def _prices(types: Sequence[str]) -> dict[str, float]:
    if not types:
        raise ValueError(
            "a budget needs instance types to choose from: give instances=, or --instances TYPE,TYPE"
        )
    prices = {}
    for name in types:
        key = catalogue.find_instance(name)
        price = instance_price(key)
        if price is None:
            raise ValueError(f"the catalogue has no price of {key}; leave it out")
        prices[key] = price
    return prices


def _setting(baseline: Setting, counts: Mapping[str, int]) -> Setting:
    cluster = Cluster.of(*(x for pair in counts.items() for x in pair))
    return replace(baseline, cluster=cluster, usd_per_h=known_prices(cluster))


def bounds_of(solver: Solver, mixes: Mixes, baseline: Setting) -> MixBounds:
    """Lower bounds of the mixes, from one table of all kinds of devices for all mixes that price alike.

    What stages send each other, and what of a backward may come later, is as the formats of the devices
    allow that are there. So mixes whose devices all have the format asked for have a table of such
    devices. Tensor groups take the links that nodes have; types that differ in those alone are not
    mixed where there may be groups.
    """
    bounds = MixBounds(mixes)
    alone = [_setting(baseline, {name: 1}) for name in mixes.types]
    having = np.array([_has_format(solver, setting) for setting in alone])
    there = mixes.counts > 0
    lacking = np.logical_not(np.logical_or.reduce(there[:, having], axis=1))
    bounds.exclude(lacking, f"no device computes in {baseline.precision}")
    apart = _apart(alone) if baseline.tensor != 1 else np.zeros_like(having)
    marks = np.column_stack([there[:, ~having].any(axis=1), there[:, apart]])
    for mark in np.unique(marks, axis=0):
        rows = (marks == mark).all(axis=1) & (bounds.least_s < np.inf)
        wanted = (having | mark[0]) & (~apart | (there[rows] > 0).any(axis=0))
        if rows.any():
            names = [t for t, wants in zip(mixes.types, wanted, strict=True) if wants]
            setting = _setting(baseline, dict.fromkeys(names, 1))
            table = solver.book.table(setting)
            bounds.cover(rows, table, _devices(mixes, setting, table))
    return bounds


def _apart(alone: Sequence[Setting]) -> BoolArray:
    """[type]: whether another type has the same kind of device over other links."""
    links: dict[str, set[str]] = {}
    kinds = [setting.cluster.devices[0].kind for setting in alone]
    for kind, setting in zip(kinds, alone, strict=True):
        links.setdefault(kind, set()).add(str(setting.cluster.nodes[0].link.cost))
    return np.array([len(links[kind]) > 1 for kind in kinds])


def _has_format(solver: Solver, setting: Setting) -> bool:
    """Whether an instance computes in the format asked for; others stay in float32 beside it."""
    try:
        solver.book.formats(setting)
    except ClusterError:
        return False
    return True


def _devices(mixes: Mixes, setting: Setting, table: CostTable) -> FloatArray:
    """[type, class of the table]: devices of each class in an instance of each type."""
    node_of = table.topology.node_of
    types = [instance_of(node) for node in setting.cluster.nodes]
    row = {
        node.name: mixes.types.index(t) for node, t in zip(setting.cluster.nodes, types, strict=True) if t
    }
    found = np.zeros((len(mixes.types), len(table.device_classes)))
    for number, own in enumerate(table.device_classes):
        for device in own.devices:
            found[row[node_of[device]], number] += 1
    return found
