"""The best cluster for the money: a search over counts of instance types, pruned by bounds.

Whatever is left idle costs nothing in time, so more instances never make the best plan slower: only
budgets that are used up are looked at. Each such cluster has a lower bound on its step time (all work
over all devices, fractional), which needs no search; clusters are solved in the order of their bounds
until a bound exceeds the best step found.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from graphpar import catalogue
from graphpar.cluster import Cluster
from graphpar.cost import CostTable
from graphpar.partition.physical_bound import physical_bound_s
from graphpar.scenarios.prices import instance_of, instance_price, known_prices
from graphpar.scenarios.study import Solver, fair_limit_s
from graphpar.scenarios.types import Answer, Setting, renamed

MOST_CLUSTERS = 2000
BATCH_OF_SOLVES = 4
"""Clusters planned at first before bounds are looked at again; twice as many each time, since processes
have to start for each."""

MOST_DEVICES = 1024


@dataclass(frozen=True)
class BudgetAnswer:
    """The best cluster within a budget.

    Attributes:
        best: Its plan; None when nothing within the budget can run the model.
        counts: Instances of each type in it, without those that its plan leaves idle.
        usd_per_h: Their price.
        considered: Clusters that use up the budget.
        solved: Of them, how many were planned; the others were ruled out by their bounds.
        proven: Whether every cluster not planned was ruled out.
        bound_s: No plan on any cluster within the budget has a shorter step.
        too_dear: Types of which a single instance costs more than the budget.
    """

    best: Answer | None
    counts: tuple[tuple[str, int], ...]
    usd_per_h: float
    considered: int
    solved: int
    proven: bool
    bound_s: float = 0.0
    too_dear: tuple[str, ...] = ()

    @property
    def gap(self) -> float | None:
        """How much shorter a step within the budget could be at most; None without a plan."""
        step_s = self.best.step_s if self.best is not None else None
        return 1 - self.bound_s / step_s if step_s else None


def best_within(
    solver: Solver, baseline: Setting, usd_per_h: float, types: Sequence[str], *, share_time: bool = False
) -> BudgetAnswer:
    """The cluster of these instance types with the shortest step that costs no more.

    With `share_time` each of many clusters is searched for a part of the time that all may take together,
    and the best again for as long as a scenario.

    Raises:
        ValueError: A type is unknown or has no price, or none fits the budget.
    """
    if not 0 < usd_per_h < math.inf:
        raise ValueError(f"the budget is {usd_per_h:g} $/h; it must be a positive number")
    prices = _prices(types)
    if min(prices.values()) > usd_per_h:
        cheapest = min(prices, key=prices.__getitem__)
        raise ValueError(
            f"the budget of {usd_per_h:g} $/h is below the cheapest type: {cheapest} costs "
            f"{prices[cheapest]:g} $/h"
        )
    counted = _maximal_counts(prices, usd_per_h)
    settings = [_setting(baseline, counts) for counts in counted]
    bounds = _bounds(solver, settings, prices)
    order = sorted(range(len(settings)), key=bounds.__getitem__)
    limit_s = fair_limit_s(len(settings), solver.limits.processes) if share_time else None
    best, best_index, solved, proven = None, -1, 0, True
    start, many = 0, BATCH_OF_SOLVES
    while start < len(order):
        hopeful = [
            i
            for i in order[start : start + many]
            if best is None or best.step_s is None or bounds[i] < best.step_s
        ]
        if not hopeful:
            break
        start, many = start + many, 2 * many
        answers = solver.answers([settings[i] for i in hopeful], limit_s)
        for i, answer in zip(hopeful, answers, strict=True):
            solved += 1
            # What was proven of any plan holds whatever schedule a plan has.
            bounds[i] = max(bounds[i], answer.any_bound_s or 0.0)
            proven = proven and answer.status != "invalid"
            if answer.status != "ok" or answer.step_s is None:
                continue
            if best is None or best.step_s is None or answer.step_s < best.step_s:
                best, best_index = answer, i
    dear = tuple(name for name, price in prices.items() if price > usd_per_h)
    if best is None:
        return BudgetAnswer(None, (), 0.0, len(settings), solved, proven, min(bounds), dear)
    counts = counted[best_index]
    used = _in_use(settings[best_index], best) or counts
    if used != counts or limit_s is not None:
        best, counts = _again(solver, baseline, used, best, counts)
    price = sum(prices[t] * n for t, n in counts.items())
    named = renamed(best, " + ".join(f"{n} x {t}" for t, n in counts.items()), ())
    bound_s = min(*bounds, best.step_s or 0.0)
    return BudgetAnswer(named, tuple(counts.items()), price, len(settings), solved, proven, bound_s, dear)


def _again(
    solver: Solver, baseline: Setting, used: dict[str, int], best: Answer, counts: dict[str, int]
) -> tuple[Answer, dict[str, int]]:
    """The best answer planned once more, without the instances that its plan leaves idle."""
    (answer,) = solver.answers([_setting(baseline, used)])
    least_s = (best.step_s or 0.0) * (1 + 1e-9)
    if answer.status == "ok" and answer.step_s is not None and answer.step_s <= least_s:
        return answer, used
    return best, counts


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


def _maximal_counts(prices: dict[str, float], usd_per_h: float) -> list[dict[str, int]]:
    """Counts of each type such that no instance more could be paid."""
    found: list[dict[str, int]] = []
    names = sorted(prices, key=prices.__getitem__, reverse=True)

    def extend(index: int, left: float, counts: dict[str, int]) -> None:
        name = names[index]
        # A price list's cents must not make the last instance too dear.
        most = int((left + 1e-9) / prices[name])
        if index == len(names) - 1:
            full = {**counts, name: most} if most else counts
            if _devices(full) > MOST_DEVICES:
                raise ValueError(
                    f"{usd_per_h:g} $/h pay for {_devices(full)} devices, of which at most "
                    f"{MOST_DEVICES} are planned; give a smaller budget, or leave out the cheapest types"
                )
            if full:
                found.append(full)
            return
        for count in range(most, -1, -1):
            if len(found) > MOST_CLUSTERS:
                raise ValueError(
                    f"more than {MOST_CLUSTERS} clusters cost up to {usd_per_h:g} $/h; give fewer types "
                    "or a smaller budget"
                )
            more = {**counts, name: count} if count else counts
            extend(index + 1, left - count * prices[name], more)

    extend(0, usd_per_h, {})
    return found


def _devices(counts: dict[str, int]) -> int:
    return sum(catalogue.instances()[t].count * n for t, n in counts.items())


def _setting(baseline: Setting, counts: dict[str, int]) -> Setting:
    cluster = Cluster.of(*(x for pair in counts.items() for x in pair))
    return replace(baseline, cluster=cluster, usd_per_h=known_prices(cluster))


def _bounds(solver: Solver, settings: Sequence[Setting], prices: dict[str, float]) -> list[float]:
    """A lower bound on the step of each cluster, from one table of all kinds of devices."""
    everyone = Cluster.of(*(x for name in prices for x in (name, 1)))
    table = solver.book.table(replace(settings[0], cluster=everyone))
    return [physical_bound_s(_with_counts(table, setting.cluster)) for setting in settings]


def _with_counts(table: CostTable, cluster: Cluster) -> CostTable:
    """The table with as many devices per class as a cluster has; names do not matter to bounds."""
    kinds = [device.kind for device in cluster.devices]
    classes = tuple(
        replace(c, devices=tuple(f"{c.name}/{i}" for i in range(kinds.count(c.name))))
        for c in table.device_classes
    )
    return replace(table, device_classes=classes)
