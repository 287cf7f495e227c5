"""The numbers a schedule is simulated with: seconds and bytes per rank, links, gradient groups.

`timing_of` takes them from the cost table that the partition was made from; a test writes them down
by hand.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from graphpar.cost import CostTable, LinkCost
from graphpar.partition.types import Partition, PipelineChoice, StageChoice


@dataclass(frozen=True)
class SizeTiming:
    """What one microbatch of `size` samples costs a rank.

    `saved_bytes` are held from its forward to its backward, `working_bytes` while it computes.
    """

    size: int
    forward_s: float
    backward_s: float = 0.0
    saved_bytes: float = 0.0
    working_bytes: float = 0.0


@dataclass(frozen=True)
class RankTiming:
    """Seconds and bytes of one rank.

    `resident_bytes` stay for the whole step: weights, gradients, optimiser state, framework.
    """

    device: str
    node: str
    sizes: tuple[SizeTiming, ...]
    optimizer_s: float = 0.0
    resident_bytes: float = 0.0

    def at_size(self, size: int) -> SizeTiming:
        """The numbers for one microbatch size; ValueError if it is not among them."""
        for row in self.sizes:
            if row.size == size:
                return row
        known = ", ".join(str(row.size) for row in self.sizes)
        raise ValueError(f"the timing of {self.device} has microbatch sizes {known}, not {size}")


@dataclass(frozen=True)
class NodeLink:
    """The link between devices of two nodes, or inside one node where both names are equal."""

    node: str
    other: str
    cost: LinkCost


@dataclass(frozen=True)
class GradientGroup:
    """Ranks that hold copies of the same units and sum their gradients in `seconds`."""

    ranks: tuple[int, ...]
    num_bytes: float
    seconds: float


@dataclass(frozen=True)
class Timing:
    """All the numbers a schedule needs to be simulated.

    `links` names pairs of nodes (in either order); pairs not named use `network`. Without `overlap`
    a rank stands still while it sends.
    """

    ranks: tuple[RankTiming, ...]
    links: tuple[NodeLink, ...]
    network: LinkCost
    gradient_groups: tuple[GradientGroup, ...] = ()
    overlap: bool = True

    @cached_property
    def _by_nodes(self) -> dict[tuple[str, str], LinkCost]:
        both = {(link.other, link.node): link.cost for link in self.links}
        return both | {(link.node, link.other): link.cost for link in self.links}

    def link(self, source: int, target: int) -> LinkCost:
        """The link from one rank to another."""
        nodes = self.ranks[source].node, self.ranks[target].node
        return self._by_nodes.get(nodes, self.network)


def timing_of(table: CostTable, partition: Partition) -> Timing:
    """The numbers of a partition's ranks, taken from the cost table it was made from.

    Gradients of units with several copies are summed by a ring all-reduce over the slowest link
    among them: 2 (n-1) / n of the bytes in 2 (n-1) messages (Patarasuk and Yuan, 2009,
    doi:10.1016/j.jpdc.2008.09.002).
    """
    ranks = tuple(
        _rank_timing(table, pipeline, stage, replica.device)
        for pipeline in partition.pipelines
        for stage in pipeline.stages
        for replica in stage.replicas
    )
    nodes = dict.fromkeys(r.node for r in ranks)
    topology = table.topology
    inside = [NodeLink(node, node, topology.inside[node]) for node in nodes]
    between = [
        NodeLink(a, b, cost)
        for (a, b), cost in sorted(topology.between.items())
        if a in nodes and b in nodes and a != b
    ]
    return Timing(
        ranks=ranks,
        links=tuple(inside + between),
        network=topology.network,
        gradient_groups=_gradient_groups(table, partition) if table.training else (),
    )


def _rank_timing(
    table: CostTable, pipeline: PipelineChoice, stage: StageChoice, device: str
) -> RankTiming:
    row = table.class_of[device]
    overhead = table.device_classes[row].stage_overhead_s
    units = range(stage.first, stage.last)
    costs = [table.costs[table.units[u]] for u in units]
    return RankTiming(
        device=device,
        node=table.topology.node_of[device],
        sizes=tuple(
            SizeTiming(
                size=n,
                forward_s=overhead + sum(table.forward_s(u, row, n) for u in units),
                backward_s=overhead + sum(table.backward_s(u, row, n) for u in units)
                if table.training
                else 0.0,
                saved_bytes=sum(table.at_size(c.saved_bytes, n) for c in costs),
                working_bytes=max(table.at_size(c.working_bytes, n) for c in costs),
            )
            for n in sorted(set(pipeline.sizes()))
        ),
        optimizer_s=sum(c.optimizer_s[row] for c in costs) if table.training else 0.0,
        resident_bytes=table.reserved_bytes
        + sum(c.weight_bytes + c.gradient_bytes + c.optimizer_bytes for c in costs),
    )


def _gradient_groups(table: CostTable, partition: Partition) -> tuple[GradientGroup, ...]:
    """Units held by the same ranks are reduced together."""
    holders: list[list[int]] = [[] for _ in range(table.num_units)]
    rank = 0
    for pipeline in partition.pipelines:
        for stage in pipeline.stages:
            for _ in stage.replicas:
                for unit in range(stage.first, stage.last):
                    holders[unit].append(rank)
                rank += 1
    num_bytes: dict[tuple[int, ...], float] = {}
    for unit, ranks in enumerate(holders):
        if len(ranks) > 1:
            key = tuple(ranks)
            num_bytes[key] = num_bytes.get(key, 0.0) + table.costs[table.units[unit]].gradient_bytes
    return tuple(
        GradientGroup(ranks, total, _ring_seconds(table, partition, ranks, total))
        for ranks, total in num_bytes.items()
        if total > 0
    )


def _ring_seconds(
    table: CostTable, partition: Partition, ranks: Sequence[int], num_bytes: float
) -> float:
    devices = [partition.used_devices[rank] for rank in ranks]
    hops = zip(devices, [*devices[1:], devices[0]], strict=True)
    message = num_bytes / len(ranks)
    slowest = max(table.topology.link(a, b).seconds(message) for a, b in hops)
    return 2 * (len(ranks) - 1) * (slowest + table.sum_s_per_byte * message)
