"""The numbers a schedule is simulated with: seconds and bytes per rank, links, gradient groups.

`timing_of` takes them from the cost table that the partition was made from; a test writes them down
by hand.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from graphpar.cores import SharedCores
from graphpar.cost import CostTable, LinkCost, ModeCost, UnitCost
from graphpar.partition.gradient_sums import gradient_sums, links_between_replicas, modes_of, ring_s
from graphpar.partition.pipeline_price import meetings_s, member_bytes, update_bytes, zero_s
from graphpar.partition.types import Partition, PipelineChoice, Replica, StageChoice


@dataclass(frozen=True)
class SizeTiming:
    """What one microbatch of `size` samples costs a rank, in one of its stages if it has several.

    `saved_bytes` are held from its forward to its backward, in inference (what results take) to the end
    of the step, `working_bytes` while it computes. Of
    `backward_s`, `weight_s` are for gradients of weights that may be made later; until then
    `deferred_bytes` are held, and `split_s` is what doing it in two halves takes besides. Of both
    directions, `collective_s` are spent in collectives with the other members of a tensor group.

    `gradient_bytes` of the stage's weights come with its first backward: until then they are not there
    though they count among what stays, and while it goes there is `spared_bytes` less than there would be
    with all of them, as they come while what was saved goes.
    """

    size: int
    forward_s: float
    backward_s: float = 0.0
    saved_bytes: float = 0.0
    working_bytes: float = 0.0
    weight_s: float = 0.0
    deferred_bytes: float = 0.0
    split_s: float = 0.0
    stage: int | None = None
    collective_s: float = 0.0
    gradient_bytes: float = 0.0
    spared_bytes: float = 0.0

    def seconds(self, kind: str) -> float:
        """Time of a computing action: F, B, or a half of a backward (I, W)."""
        if kind == "F":
            return self.forward_s
        if kind == "W":
            return self.weight_s
        return self.backward_s + (self.split_s - self.weight_s if kind == "I" else 0.0)


@dataclass(frozen=True)
class RankTiming:
    """Seconds and bytes of one rank.

    `resident_bytes` stay for the whole step: weights, gradients once they are there, optimiser state,
    framework.
    `update_bytes` is what the optimiser's update takes besides, when activations are gone.
    """

    device: str
    node: str
    sizes: tuple[SizeTiming, ...]
    optimizer_s: float = 0.0
    resident_bytes: float = 0.0
    update_bytes: float = 0.0

    def at_size(self, size: int, stage: int | None = None) -> SizeTiming:
        """The numbers for one microbatch size (in a stage); ValueError if it is not among them."""
        for row in self.sizes:
            if row.size == size and (stage is None or row.stage is None or row.stage == stage):
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
    """Ranks that hold copies of the same units and sum their gradients in `seconds`.

    Those that sum `by_rows` (ZeRO) gather a few weights' at a time.
    """

    ranks: tuple[int, ...]
    num_bytes: float
    seconds: float
    by_rows: bool = False


@dataclass(frozen=True)
class Timing:
    """All the numbers a schedule needs to be simulated.

    `links` names pairs of nodes (in either order); pairs not named use `network`. Without `overlap`
    a rank stands still while it sends. Ranks on `shared` cores take longer while others compute.
    """

    ranks: tuple[RankTiming, ...]
    links: tuple[NodeLink, ...]
    network: LinkCost
    gradient_groups: tuple[GradientGroup, ...] = ()
    overlap: bool = True
    shared: SharedCores | None = None

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
    doi:10.1016/j.jpdc.2008.09.002). Weights that several stages read are summed over the ranks of all.
    """
    ranks = _rank_timings(table, partition)
    nodes = dict.fromkeys(r.node for r in ranks)
    topology = table.topology
    inside = [NodeLink(node, node, topology.inside[node]) for node in nodes]
    between = [
        NodeLink(a, b, cost)
        for (a, b), cost in sorted(topology.between.items())
        if a in nodes and b in nodes and a != b
    ]
    timing = Timing(
        ranks=ranks,
        links=tuple(inside + between),
        network=topology.network,
        gradient_groups=_gradient_groups(table, partition) if table.training else (),
        shared=table.shared,
    )
    return with_sums(timing, table, partition, _repeated_bytes(table, partition))


def with_sums(
    timing: Timing,
    table: CostTable,
    partition: Partition,
    summed_bytes: Mapping[tuple[int, ...], float],
) -> Timing:
    """The timing with the sums of ranks that it knows of none of: those of weights in several stages."""
    known = {group.ranks for group in timing.gradient_groups}
    more = tuple(
        GradientGroup(ranks, num_bytes, _ring_seconds(table, partition, ranks, num_bytes))
        for ranks, num_bytes in summed_bytes.items()
        if table.training and ranks not in known
    )
    return replace(timing, gradient_groups=(*timing.gradient_groups, *more))


def _rank_timings(table: CostTable, partition: Partition) -> tuple[RankTiming, ...]:
    """One for each device, with the numbers of each of its stages."""
    found: dict[str, list[RankTiming]] = {}
    one_by_one: dict[str, float] = {}
    number = 0
    for pipeline in partition.pipelines:
        for stage in pipeline.stages:
            for replica in stage.replicas:
                for member, device in enumerate(replica.devices):
                    apart = _apart(table, partition, pipeline, stage, replica)
                    own = _Member(table, pipeline, stage, replica, member, apart).timing()
                    met_s = meetings_s(table, partition.pipelines, stage.first, stage.last)
                    met_s /= 2 if table.training else 1
                    sizes = tuple(
                        replace(
                            row,
                            stage=number,
                            forward_s=row.forward_s + met_s,
                            backward_s=row.backward_s + met_s * table.training,
                        )
                        for row in own.sizes
                    )
                    found.setdefault(device, []).append(replace(own, sizes=sizes))
                    largest = _one_by_one_bytes(table, stage, replica, device)
                    one_by_one[device] = max(one_by_one.get(device, 0.0), largest)
            number += 1
    return tuple(
        replace(rank, update_bytes=max(rank.update_bytes, one_by_one[rank.device]))
        for rank in map(_of_all_stages, found.values())
    )


def _one_by_one_bytes(table: CostTable, stage: StageChoice, replica: Replica, device: str) -> float:
    """What an update that goes tensor by tensor takes: copies of the largest, or of its part."""
    if not table.training or not table.largest_gradient_bytes:
        return 0.0
    largest = max(table.largest_gradient_bytes[kind] for kind in table.units[stage.first : stage.last])
    parts = len(replica.devices) * (len(stage.replicas) if stage.zero else 1)
    return table.device_classes[table.class_of[device]].update_copies * largest / parts


def _of_all_stages(stages: Sequence[RankTiming]) -> RankTiming:
    first = stages[0]
    if len(stages) == 1:
        return replace(first, sizes=tuple(replace(row, stage=None) for row in first.sizes))
    return replace(
        first,
        sizes=tuple(row for stage in stages for row in stage.sizes),
        optimizer_s=sum(stage.optimizer_s for stage in stages),
        resident_bytes=sum(stage.resident_bytes for stage in stages),
        update_bytes=sum(stage.update_bytes for stage in stages),
    )


def _apart(
    table: CostTable,
    partition: Partition,
    pipeline: PipelineChoice,
    stage: StageChoice,
    replica: Replica,
) -> float:
    """How many times longer a replica's backwards take, which other forwards may come before."""
    at_once = partition.schedule == "1f1b" and stage is pipeline.stages[-1]
    if table.shared is None or replica.microbatches < 2 or at_once:
        return 1.0
    return table.shared.apart if replica.device in table.shared.workers else 1.0


@dataclass(frozen=True)
class _Member:
    """One member of a replica in a stage; the members of a tensor group work in step.

    `apart` is how many times longer its backwards take (`_apart`).
    """

    table: CostTable
    pipeline: PipelineChoice
    stage: StageChoice
    replica: Replica
    member: int
    apart: float

    def timing(self) -> RankTiming:
        """Its numbers."""
        table, stage = self.table, self.stage
        device, held = self.replica.devices[self.member], self._held
        own_stages = [s for s in self.pipeline.stages if s.replicas == stage.replicas]
        parts = len(stage.replicas) if stage.zero else 1
        return RankTiming(
            device=device,
            node=table.topology.node_of[device],
            sizes=tuple(self._trained(n) if table.training else self._inferred(n) for n in held),
            optimizer_s=sum(c.optimizer_s for c in self._costs) / parts if table.training else 0.0,
            resident_bytes=held[min(held)][0] + (table.reserved_bytes if stage is own_stages[0] else 0.0),
            update_bytes=update_bytes(table, stage, self._mode, self.member),
        )

    def _inferred(self, n: int) -> SizeTiming:
        return SizeTiming(
            size=n,
            forward_s=self._overhead_s + self._units_s(self.table.forward_s, n),
            saved_bytes=n * sum(self.table.result_bytes[self.stage.first : self.stage.last]),
            working_bytes=self._held[n][2],
            collective_s=self._units_s(self.table.collective_s, n),
        )

    def _trained(self, n: int) -> SizeTiming:
        table, stage = self.table, self.stage
        # Of what ZeRO moves for every microbatch, the gathers before the forward belong there.
        moved = zero_s(table, stage)
        ahead = moved / 3 if stage.zero > 2 else 0.0
        backward_s = self.apart * self._units_s(table.backward_s, n)
        deferred = (
            table.at_size(c.deferred_bytes[self.member], n) for c in self._costs if c.deferred_bytes
        )
        # The second half is an action of its own.
        again_s = self._overhead_s if any(c.weight_s for c in self._costs) else 0.0
        row = SizeTiming(
            size=n,
            forward_s=self._overhead_s + self._units_s(table.forward_s, n) + ahead,
            backward_s=self._overhead_s + backward_s + moved - ahead,
            saved_bytes=self._held[n][1],
            working_bytes=self._held[n][2],
            weight_s=self.apart * self._units_s(table.weight_s, n),
            deferred_bytes=sum(deferred),
            split_s=self._units_s(table.split_s, n) + again_s,
            collective_s=self._units_s(table.collective_s, n),
        )
        # From level 2 on gradients are divided as they come, and what is left of them is small.
        if stage.zero > 1 or not table.device_classes[self._mode_class].refills:
            return row
        repeated = [r.gradient_bytes for r in table.repeated if r.held_by(stage.first, stage.last)]
        return replace(
            row,
            gradient_bytes=sum(c.gradient_bytes[self.member] for c in self._costs) + sum(repeated),
            spared_bytes=_spared_bytes(table, stage, (self._costs, self._growing), self.member, n),
        )

    def _units_s(self, seconds: Callable[[int, int, int], float], n: int) -> float:
        return sum(seconds(unit, self._mode, n) for unit in range(self.stage.first, self.stage.last))

    @cached_property
    def _held(self) -> dict[int, tuple[float, float, float]]:
        """By size, bytes that stay, those saved for one microbatch, and those while it computes."""
        costs = self._growing if self.stage.zero > 1 else self._costs
        sizes = sorted(set(self.pipeline.sizes()))
        return {n: member_bytes(self.table, self.stage, costs, self.member, n) for n in sizes}

    @cached_property
    def _mode(self) -> int:
        (mode,) = modes_of(self.table, replace(self.stage, replicas=(self.replica,)))
        return mode

    @property
    def _mode_class(self) -> int:
        return self.table.every_mode[self._mode].members[self.member]

    @property
    def _overhead_s(self) -> float:
        return self.table.mode_overhead_s(self._mode)

    @cached_property
    def _costs(self) -> list[ModeCost]:
        kinds = self.table.units[self.stage.first : self.stage.last]
        return [self.table.every_mode[self._mode].costs[kind] for kind in kinds]

    @cached_property
    def _growing(self) -> list[ModeCost]:
        return _growing(self.table, self.stage, self._costs)


def _growing(table: CostTable, stage: StageChoice, costs: Sequence[ModeCost]) -> list[ModeCost]:
    """The costs of a stage's units where gradients come as they work, with what these then take besides.

    A member of a tensor group has its part of the weights, and of the difference.
    """
    kinds = [table.costs[kind] for kind in table.units[stage.first : stage.last]]
    return [
        replace(
            cost,
            working_bytes=tuple(
                _growing_row(kind, *of)
                for of in zip(cost.working_bytes, cost.gradient_bytes, strict=True)
            ),
        )
        if kind.growing_bytes
        else cost
        for cost, kind in zip(costs, kinds, strict=True)
    ]


def _growing_row(kind: UnitCost, working: Sequence[float], gradient: float) -> tuple[float, ...]:
    part = gradient / kind.gradient_bytes if kind.gradient_bytes else 1.0
    plain = zip(kind.growing_bytes, kind.working_bytes, strict=True)
    return tuple(
        w + part * (grown - w_plain) - gradient
        for w, (grown, w_plain) in zip(working, plain, strict=True)
    )


def _spared_bytes(
    table: CostTable,
    stage: StageChoice,
    costs: tuple[Sequence[ModeCost], Sequence[ModeCost]],
    member: int,
    size: int,
) -> float:
    """How far a first backward stays below all that is saved, the largest temporary and all gradients.

    A unit's backward needs what it and those before it saved, what it takes itself with the gradients of
    its weights, and the gradients of those behind it. Weights of several units have theirs from the last
    one of them on.
    """
    whole, growing = costs
    saved = [table.at_size(c.saved_bytes[member], size) for c in whole]
    working = max(table.at_size(c.working_bytes[member], size) for c in whole)
    gradients = [c.gradient_bytes[member] for c in whole]
    own = [
        table.at_size(c.working_bytes[member], size) + gradient
        for c, gradient in zip(growing, gradients, strict=True)
    ]
    made = list(gradients)
    for again in table.repeated:
        here = [unit for unit in again.again if unit < stage.last]
        if stage.first <= again.first < stage.last and here:
            made[again.first - stage.first] -= again.gradient_bytes
            made[max(here) - stage.first] += again.gradient_bytes
    left, behind, most = sum(saved), 0.0, 0.0
    for kept, taken, gradient in reversed(list(zip(saved, own, made, strict=True))):
        most = max(most, left + behind + taken)
        behind += gradient
        left -= kept
    return max(0.0, sum(saved) + working + sum(gradients) - most)


def _gradient_groups(table: CostTable, partition: Partition) -> tuple[GradientGroup, ...]:
    """Units held by the same ranks are reduced together (`graphpar.partition.gradient_sums`)."""
    rank_of = {device: rank for rank, device in enumerate(partition.used_devices)}
    return tuple(
        GradientGroup(tuple(rank_of[d] for d in one.devices), one.num_bytes, one.seconds, one.by_rows)
        for one in gradient_sums(table, partition.pipelines)
    )


def _repeated_bytes(table: CostTable, partition: Partition) -> dict[tuple[int, ...], float]:
    """Gradients of weights that several units read, by the ranks of all stages that have one of these.

    None in tensor groups, whose members hold parts of them.
    """
    stages = [stage for pipeline in partition.pipelines for stage in pipeline.stages]
    rank_of = {device: rank for rank, device in enumerate(partition.used_devices)}
    found: dict[tuple[int, ...], float] = {}
    if any(replica.others for stage in stages for replica in stage.replicas):
        return found
    for again in table.repeated:
        units = (again.first, *again.again)
        holders = [s for s in stages if any(s.first <= unit < s.last for unit in units)]
        ranks = tuple(sorted({rank_of[r.device] for s in holders for r in s.replicas}))
        if len(ranks) > 1 and again.gradient_bytes > 0:
            found[ranks] = found.get(ranks, 0.0) + again.gradient_bytes
    return found


def _ring_seconds(
    table: CostTable, partition: Partition, ranks: Sequence[int], num_bytes: float
) -> float:
    replicas = [Replica(partition.used_devices[rank], 0) for rank in ranks]
    links = links_between_replicas(table, replicas)
    return ring_s(links, num_bytes, len(ranks), table.sum_s_per_byte)
