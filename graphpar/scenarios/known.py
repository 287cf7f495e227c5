"""What scenarios that differ in their links alone know of each other: plans, and bounds."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import chain

from graphpar.cost import CostTable, LinkCost, Topology
from graphpar.partition.certificate import BEYOND, certificate
from graphpar.partition.handmade import priced_plan
from graphpar.partition.physical_bound import physical_bound_s
from graphpar.partition.types import Partition, PipelineChoice, ScheduleName
from graphpar.scenarios.types import KnownPlan

MOST_PLANS = 6
"""Plans tried in other scenarios: the latest found that are unlike each other."""

MOST_PLAYED = 4
"""Plans played through in other scenarios, which takes longer than pricing them."""


@dataclass
class Known:
    """Plans and bounds found so far, and what was asked once for all.

    Attributes:
        plans: The latest plans.
        bounds: Links, how fast no plan of some family over them can be, and that family.
        memory_binds: Whether memory without end would help.
        schedule: The schedule that was best under the fastest links.
        played: Plans to be played through elsewhere: the best of equal pipelines, and those that were
            best in a schedule without a formula.
        looked: In how many scenarios equal pipelines were looked for.
        tried: Stages that were tried under other schedules.
        physical_s: The physical bound, which no link changes.
    """

    plans: list[Partition] = field(default_factory=list)
    bounds: list[tuple[Topology, float, str]] = field(default_factory=list)
    memory_binds: bool | None = None
    schedule: ScheduleName | None = None
    played: tuple[KnownPlan, ...] = ()
    looked: int = 0
    tried: set[tuple[PipelineChoice, ...]] = field(default_factory=set)
    physical_s: float | None = None
    _priced: dict[tuple[int, int], tuple[Partition, Topology, Partition | None]] = field(
        default_factory=dict
    )

    def note(self, table: CostTable, found: Partition) -> None:
        """Keep a plan and what is proven with it."""
        same = [p for p in self.plans if p.pipelines == found.pipelines and p.schedule == found.schedule]
        if not same:
            self.plans = [*self.plans, found][-MOST_PLANS:]
        self.bounds.append((table.topology, found.bound_s, found.family))

    def seed(self, plans: Iterable[Partition]) -> None:
        """Plans of other scenarios, of which nothing is proven here."""
        new = (p for p in plans if all(p.pipelines != q.pipelines for q in self.plans))
        self.plans = [*new, *self.plans][:MOST_PLANS]

    def keep(self, plan: KnownPlan) -> None:
        """A plan to be played through in the scenarios that follow."""
        if plan not in self.played:
            self.played = (*self.played, plan)[-MOST_PLAYED:]

    def bound_s(self, topology: Topology) -> float:
        """No plan is faster: it would be so over links that are at least as fast, too."""
        return self._bound(topology)[0]

    def _bound(self, topology: Topology) -> tuple[float, str]:
        """The best bound, and which plans it is about."""
        there = ((b, family) for other, b, family in self.bounds if at_least(other, topology))
        return max(there, default=(0.0, ""))

    def best(self, table: CostTable) -> Partition | None:
        """The best of the plans here, with the bound known; None where none fits."""
        priced = (self._price(table, plan) for plan in self.plans)
        fitting = [p for p in priced if p is not None]
        if not fitting:
            return None
        best = min(fitting, key=lambda p: p.objective_s)
        source = next(p for p in self.plans if p.pipelines == best.pipelines)
        known_s, family = self._bound(table.topology)
        proven = certificate(best.objective_s, known_s, best.physical_bound_s)
        return replace(
            best,
            bound_s=proven.bound_s,
            gap=proven.gap,
            family=family or source.family,
            truncated_by=(BEYOND,) if proven.beyond else (),
            notes=source.notes,
        )

    def _price(self, table: CostTable, plan: Partition) -> Partition | None:
        """The plan over these links, priced once; None where it does not fit."""
        key = id(table.topology), id(plan)
        if key not in self._priced:
            if self.physical_s is None:
                self.physical_s = physical_bound_s(table)
            priced = priced_plan(table, plan.pipelines, plan.schedule, self.physical_s)
            # Both are held, so that no other object gets the number of one that is gone.
            self._priced[key] = plan, table.topology, priced if _fits(table, priced) else None
        return self._priced[key][2]

    def gap(self, table: CostTable) -> float:
        """How far the best plan known may be from the best there is; 1 where none fits."""
        best = self.best(table)
        return best.gap if best is not None else 1.0

    def improved(self, table: CostTable, found: Partition) -> Partition:
        """The better of a plan found here and the plans found elsewhere, with the better bound.

        What the bound is about, its family of plans, goes with it.
        """
        before = self.best(table)
        bound_s, family = max((found.bound_s, found.family), self._bound(table.topology))
        better = found
        if before is not None and before.objective_s < found.objective_s:
            better = replace(before, truncated_by=found.truncated_by)
        proven = certificate(better.objective_s, bound_s, better.physical_bound_s)
        cut = better.truncated_by
        if proven.beyond and BEYOND not in cut:
            cut = (*cut, BEYOND)
        return replace(better, bound_s=proven.bound_s, gap=proven.gap, family=family, truncated_by=cut)


def _fits(table: CostTable, found: Partition) -> bool:
    return all(
        peak <= table.device_classes[table.class_of[device]].memory_bytes
        for device, peak in found.peak_bytes.items()
    )


def speed_of(topology: Topology) -> float:
    """Larger for faster links, to put topologies into an order."""
    return sum(link.bytes_per_s for link in _links(topology)) - sum(
        link.latency_s for link in _links(topology)
    )


def at_least(fast: Topology, slow: Topology) -> bool:
    """Whether no link of the first is slower than that of the second in its place."""
    if fast.node_of != slow.node_of or fast.inside.keys() != slow.inside.keys():
        return False
    if fast.between.keys() != slow.between.keys():
        return False
    pairs = zip(_links(fast), _links(slow), strict=True)
    return all(mine.at_least(other) for mine, other in pairs)


def _links(topology: Topology) -> Iterable[LinkCost]:
    inside = (topology.inside[name] for name in sorted(topology.inside))
    between = (topology.between[pair] for pair in sorted(topology.between))
    return chain(inside, between, (topology.network,))
