"""What copies of the same units tell each other in a step, and how long it takes.

    ring(g, w)  = 2 (w - 1) * (seconds(g / w) + sum_s_per_byte * g / w)
    half(g, w)  = half of that: a reduce-scatter or an all-gather

on the slowest link between two of the `w` holders (Patarasuk and Yuan, "Bandwidth optimal all-reduce
algorithms for clusters of workstations", 2009); `sum_s_per_byte` is what holders that sum on their own
processors spend on it.

After the last backward the gradients of a unit are summed over all its copies, in whichever pipelines
they are. Units whose copies are on the same devices go together, in one ring; the members of tensor
groups exchange with their likes, all at once, and the member with most bytes counts. A device's sums
follow one another in the order of the units, and each begins when the last of those that take part has
come to it. The replicas of a stage under ZeRO exchange among themselves first; then one of them speaks
for the others to other pipelines.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from graphpar.cost import CostTable, LinkCost, ModeCost
from graphpar.partition.types import PipelineChoice, Replica, StageChoice


@dataclass(frozen=True)
class GradientSum:
    """Devices that sum the gradients of the units they all hold, or exchange what ZeRO divides.

    `num_bytes` are the gradients that are summed; none where ZeRO has summed them in the backwards.
    `by_rows` says that each device gets its part of the sum alone, as ZeRO has it.
    """

    devices: tuple[str, ...]
    num_bytes: float
    seconds: float
    by_rows: bool = False


def slowest(links: Iterable[LinkCost], num_bytes: float) -> float:
    """Seconds of one message over the slowest of some links."""
    return max((link.seconds(num_bytes) for link in links), default=0.0)


def ring_s(
    links: Iterable[LinkCost], num_bytes: float, copies: int, sum_s_per_byte: float = 0.0
) -> float:
    """Seconds of a ring all-reduce of `num_bytes` over `copies` holders.

    >>> ring_s([LinkCost(0.0, 1e9)], 1e9, 2), ring_s([LinkCost(0.0, 1e9)], 1e9, 2, 2e-9)
    (1.0, 3.0)
    """
    return 2 * half_ring_s(links, num_bytes, copies, sum_s_per_byte)


def half_ring_s(
    links: Iterable[LinkCost], num_bytes: float, copies: int, sum_s_per_byte: float = 0.0
) -> float:
    """Seconds of a reduce-scatter or an all-gather of `num_bytes` over `copies` holders."""
    if copies < 2 or num_bytes <= 0:
        return 0.0
    message = num_bytes / copies
    return (copies - 1) * (slowest(links, message) + sum_s_per_byte * message)


def modes_of(table: CostTable, stage: StageChoice) -> list[int]:
    """The mode of each replica; ValueError where the table does not price it."""
    found = []
    for replica in stage.replicas:
        mode = table.mode_number(stage, replica)
        if mode is None:
            raise ValueError(
                f"the cost table has no mode for units {stage.first} to {stage.last} on "
                f"{', '.join(replica.devices)} with shares {replica.shares}, "
                f"precision {stage.precision}, recompute {stage.recompute}, zero {stage.zero}"
            )
        found.append(mode)
    return found


def unit_costs(table: CostTable, stage: StageChoice, mode: int) -> list[ModeCost]:
    """The costs of the units of a stage in a mode."""
    costs = table.every_mode[mode].costs
    return [costs[table.units[u]] for u in range(stage.first, stage.last)]


def most_bytes(table: CostTable, stage: StageChoice, name: str) -> float:
    """Bytes of the member that holds most, over all replicas."""
    return _most_bytes_of(table, set(modes_of(table, stage)), stage.first, stage.last, name)


def _most_bytes_of(table: CostTable, modes: set[int], first: int, last: int, name: str) -> float:
    largest, kinds = 0.0, table.units[first:last]
    for mode in modes:
        costs = table.every_mode[mode].costs
        rows = (getattr(costs[kind], name) for kind in kinds)
        largest = max(largest, *map(sum, zip(*rows, strict=True)))
    return largest


def links_between_replicas(table: CostTable, replicas: Sequence[Replica]) -> list[LinkCost]:
    """The links between devices of unlike replicas."""
    topology = table.topology
    holders: dict[str, set[int]] = {}
    for number, replica in enumerate(replicas):
        for device in replica.devices:
            holders.setdefault(topology.node_of[device], set()).add(number)
    found = {topology.inside[node] for node, own in holders.items() if len(own) > 1}
    lone = [node for node, own in holders.items() if len(own) == 1]
    shared = [node for node, own in holders.items() if len(own) > 1]
    found |= topology.between_nodes(shared, holders)
    if len({next(iter(holders[node])) for node in lone}) > 1:
        found |= (
            {
                k
                for a, b in combinations(lone, 2)
                if holders[a] != holders[b]
                for k in topology.between_nodes((a,), (b,))
            }
            if topology.between
            else {topology.network}
        )
    return list(found)


def stage_sync_s(table: CostTable, stage: StageChoice) -> float:
    """Gradients summed over the replicas of a stage alone, or what ZeRO does instead."""
    links, width = links_between_replicas(table, stage.replicas), len(stage.replicas)
    gradients = most_bytes(table, stage, "gradient_bytes")
    if stage.zero == 0:
        return ring_s(links, gradients, width, table.sum_s_per_byte)
    scattered = half_ring_s(links, gradients, width, table.sum_s_per_byte) if stage.zero == 1 else 0.0
    gathered = most_bytes(table, stage, "weight_bytes") if stage.zero < 3 else 0.0
    return scattered + half_ring_s(links, gathered, width, table.sum_s_per_byte)


def gradient_sums(table: CostTable, pipelines: Sequence[PipelineChoice]) -> list[GradientSum]:
    """Who sums with whom after the last backward, in the order in which it is done."""
    found = [s for p in pipelines for stage in p.stages for s in _divided(table, stage)]
    held: dict[tuple[str, ...], tuple[list[Replica], float]] = {}
    for first, last, stages in _runs(pipelines):
        modes = {mode for stage in stages for mode in modes_of(table, stage)}
        num_bytes = _most_bytes_of(table, modes, first, last, "gradient_bytes")
        if num_bytes <= 0:
            continue
        replicas = [r for s in stages for r in (s.replicas[:1] if s.zero else s.replicas)]
        for member in range(max(len(r.devices) for r in replicas)):
            own = [r for r in replicas if member < len(r.devices)]
            devices = tuple(r.devices[member] for r in own)
            if len(devices) > 1:
                held[devices] = own, num_bytes + held.get(devices, (own, 0.0))[1]
    each, known = table.sum_s_per_byte, dict[tuple[Replica, ...], list[LinkCost]]()
    for devices, (own, num_bytes) in held.items():
        links = known.setdefault(tuple(own), [])
        links = links or links_between_replicas(table, own)
        known[tuple(own)] = links
        found.append(GradientSum(devices, num_bytes, ring_s(links, num_bytes, len(devices), each)))
    return found


def _divided(table: CostTable, stage: StageChoice) -> list[GradientSum]:
    """What the replicas of a stage under ZeRO exchange among themselves."""
    seconds = stage_sync_s(table, stage) if stage.zero else 0.0
    if seconds <= 0:
        return []
    num_bytes = most_bytes(table, stage, "gradient_bytes") if stage.zero < 2 else 0.0
    members = zip(*(r.devices for r in stage.replicas), strict=True)
    return [GradientSum(own, num_bytes, seconds, by_rows=True) for own in members if len(own) > 1]


def _runs(pipelines: Sequence[PipelineChoice]) -> Iterator[tuple[int, int, list[StageChoice]]]:
    """The runs of units that no pipeline cuts, with the stage of each pipeline that holds them."""
    lines = [list(p.stages) for p in pipelines]
    first = 0
    while lines and lines[0]:
        last = min(line[0].last for line in lines)
        yield first, last, [line[0] for line in lines]
        for line in lines:
            if line[0].last == last:
                del line[0]
        first = last


def worst_finish_s(table: CostTable, pipelines: Sequence[PipelineChoice]) -> tuple[float, float]:
    """Until its sums are done, and then its optimiser: of the device on which the two take longest.

    All devices are taken to begin with their sums at the same time.
    """
    if not table.training:
        return 0.0, 0.0
    done_s: dict[str, float] = {}
    for one in gradient_sums(table, pipelines):
        end_s = max(done_s.get(d, 0.0) for d in one.devices) + one.seconds
        done_s.update(dict.fromkeys(one.devices, end_s))
    worst = (0.0, 0.0)
    for pipeline in pipelines:
        for stage in pipeline.stages:
            share = len(stage.replicas) if stage.zero else 1
            steps: dict[int, float] = {}
            for replica, mode in zip(stage.replicas, modes_of(table, stage), strict=True):
                if mode not in steps:
                    steps[mode] = sum(c.optimizer_s for c in unit_costs(table, stage, mode)) / share
                sync_s = max(done_s.get(d, 0.0) for d in replica.devices)
                worst = max(worst, (sync_s, steps[mode]), key=sum)
    return worst
