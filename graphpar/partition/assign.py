"""From counts of interchangeable devices to devices with names."""

from collections import Counter
from collections.abc import Collection, Sequence
from itertools import pairwise

from graphpar.cost import CostTable
from graphpar.partition.cells import Cells, StageOption
from graphpar.partition.chains.limits import Stage
from graphpar.partition.gradient_sums import modes_of
from graphpar.partition.pipeline_price import pairs, share_microbatches
from graphpar.partition.search import Found
from graphpar.partition.types import PipelineChoice, Replica, StageChoice
from graphpar.partition.zones import Zone, closeness


def name_devices(table: CostTable, cells: Cells, found: Sequence[Found]) -> tuple[PipelineChoice, ...]:
    """Give each stage devices of its cells, whole stages inside a node where a node has room.

    Stages wider than a node choose first, then those with larger groups, then the others in the order
    of the pipeline: the node of the stage before them if it has room, else the emptiest node where a
    like stage follows, else the fullest one that has room, else what is left, fewest nodes first. Where
    pairs of nodes have links of their own, only the closest nodes with room are considered, and a stage
    beyond a node stays in the smallest zone that has room (`zones`). Stages that are to share a node
    choose one together, which has room for all, those that need most first.
    """
    pools = [_Pool(table, c.devices, cells.zone) for c in cells.cells]
    runs = [(p, run) for p, one in enumerate(found) for run in _runs(one.answer.stages)]
    names: dict[tuple[int, int], list[str]] = {}
    for p, run in sorted(runs, key=lambda at: _urgency(pools, found[at[0]].answer.stages, at[1])):
        line = found[p].answer.stages
        for s in run:
            before = names.get((p, s - 1), [])
            follows = s + 1 < len(line) and line[s + 1].option == line[s].option
            room = sum(line[i].option.num_devices for i in run) if s == run[0] < run[-1] else 0
            names[p, s] = _draw(pools, line[s].option, before, follows, room)
    return tuple(
        _pipeline(table, one, [names[p, s] for s in range(len(one.answer.stages))])
        for p, one in enumerate(found)
    )


def _runs(stages: Sequence[Stage]) -> list[range]:
    """Stages one after another that are to share a node."""
    begins = [i for i, stage in enumerate(stages) if not stage.joined]
    return [range(a, b) for a, b in pairwise([*begins, len(stages)])]


def _draw(
    pools: Sequence["_Pool"], option: StageOption, before: Sequence[str], follows: bool, room: int
) -> list[str]:
    """Devices of a stage, replica by replica; its groups each in a node if that is possible.

    `room` is what the stages that are to stand in the same node need with it, nothing for one alone.
    """
    wide = any(n > pool.most_free for pool, n in zip(pools, option.take, strict=True))
    if len(option.groups[0]) == 1 or not wide:
        drawn = [
            iter(pool.draw(number, before, follows, room))
            for pool, number in zip(pools, option.take, strict=True)
        ]
        return [next(drawn[cell]) for group in option.groups for cell in group]
    found: list[str] = []
    near = [pool.zone_for(len(option.groups[0]), option.width, before) for pool in pools]
    for group in option.groups:
        # One group after another, in the node of the last while it has room.
        taken = {
            i: iter(pools[i].draw(n, found or before, True, within=near[i]))
            for i, n in Counter(group).items()
        }
        found += [next(taken[cell]) for cell in group]
    return found


def groups_hold(table: CostTable, pipelines: Sequence[PipelineChoice]) -> bool:
    """Whether the members of every tensor group are joined by links that its price holds for."""
    for pipeline in pipelines:
        for stage in pipeline.stages:
            for replica, number in zip(stage.replicas, modes_of(table, stage), strict=True):
                link = table.every_mode[number].link
                joined = pairs(table, replica.devices, replica.devices)
                if link is not None and not all(k.at_least(link) for k in joined):
                    return False
    return True


class _Pool:
    """The free devices of a cell, by node."""

    def __init__(self, table: CostTable, devices: Sequence[str], zone: Zone | None) -> None:
        self._topology = table.topology
        self._node_of = table.topology.node_of
        self._zone = zone
        self._free: dict[str, list[str]] = {}
        for device in devices:
            self._free.setdefault(self._node_of[device], []).append(device)
        self.node_size = max(map(len, self._free.values()), default=0)

    @property
    def most_free(self) -> int:
        """Free devices in the node that has most."""
        return max(map(len, self._free.values()), default=0)

    def draw(
        self,
        number: int,
        before: Sequence[str],
        follows: bool,
        room: int = 0,
        within: Collection[str] | None = None,
    ) -> list[str]:
        """Take some devices, if possible of one node, and of one that has `room` where others follow.

        Nodes `within` a set come first.
        """
        if number and (wide := [n for n, free in self._free.items() if len(free) >= room > 0]):
            return self._take(min(self._closest(wide, before), key=lambda n: len(self._free[n])), number)
        enough = [n for n, free in self._free.items() if len(free) >= number]
        enough = [n for n in enough if within is None or n in within] or enough
        roomy = self._closest(enough, before)
        homes = {self._node_of[d] for d in before}
        near = [n for n in roomy if n in homes]
        if near:
            return self._take(near[0], number)
        if roomy:
            choose = max if follows else min
            return self._take(choose(roomy, key=lambda n: len(self._free[n])), number)
        if self._zone is not None:
            return self._spread(self._zone, number, before)
        taken: list[str] = []
        for node in sorted(self._free, key=lambda n: -len(self._free[n])):
            taken += self._take(node, min(number - len(taken), len(self._free[node])))
        return taken

    def zone_for(self, size: int, number: int, before: Sequence[str]) -> Collection[str] | None:
        """Nodes of the smallest zone with room for so many groups of a size; None where all are alike."""
        zone = self._zone
        while zone is not None and (inner := self._roomy(zone, size, number, before)) is not None:
            zone = inner
        return None if zone is None else frozenset(zone.nodes)

    def _spread(self, zone: Zone, number: int, before: Sequence[str]) -> list[str]:
        """Devices of several nodes of a zone that are as close to each other as can be."""
        if not zone.parts:
            return self._take(zone.nodes[0], number)
        inner = self._roomy(zone, 1, number, before)
        if inner is not None:
            return self._spread(inner, number, before)
        fullest = max(zone.parts, key=lambda part: self._room(part, 1))
        taken = self._spread(fullest, self._room(fullest, 1), before)
        if not taken:
            return []
        return taken + self._spread(zone, number - len(taken), taken)

    def _roomy(self, zone: Zone, size: int, number: int, before: Sequence[str]) -> Zone | None:
        """The closest part of a zone with room for so many groups, of several the one with least."""
        fitting = [part for part in zone.parts if self._room(part, size) >= number]
        ahead = {self._node_of[d] for d in before}

        def order(part: Zone) -> tuple[tuple[float, float], int]:
            nearest = min(self._worst(node, ahead) for node in part.nodes)
            return nearest, self._room(part, size)

        return min(fitting, key=order, default=None)

    def _room(self, zone: Zone, size: int) -> int:
        """Groups of a size that the free devices of a zone make."""
        return sum(len(self._free.get(node, ())) // size for node in zone.nodes)

    def _closest(self, nodes: list[str], before: Sequence[str]) -> list[str]:
        """Of some nodes those with the fastest links to the devices of the stage before."""
        if not self._topology.between or not before or len(nodes) < 2:
            return nodes
        ahead = {self._node_of[d] for d in before}
        distance = {node: self._worst(node, ahead) for node in nodes}
        least = min(distance.values())
        return [node for node in nodes if distance[node] == least]

    def _worst(self, node: str, others: set[str]) -> tuple[float, float]:
        """The slowest link of a node to others; its inside link counts for itself: nothing is closer."""
        links = self._topology.between_nodes((node,), others - {node})
        return max((closeness(k) for k in links), default=(0.0, 0.0))

    def _take(self, node: str, number: int) -> list[str]:
        taken, self._free[node] = self._free[node][:number], self._free[node][number:]
        return taken


def _urgency(pools: Sequence[_Pool], line: Sequence[Stage], run: range) -> tuple[int, int, int]:
    """Stages beyond a node first, then those with large groups, then those that stand together."""
    beyond = group = devices = 0
    for stage in (line[i] for i in run):
        take = stage.option.take
        short = max(max(0, n - pool.node_size) for pool, n in zip(pools, take, strict=True))
        beyond, group = max(beyond, short), max(group, len(stage.option.groups[0]))
        devices += stage.option.num_devices
    return -beyond, -group, -devices if len(run) > 1 else 0


def _pipeline(table: CostTable, one: Found, names: Sequence[Sequence[str]]) -> PipelineChoice:
    stages = tuple(
        _stage(table, stage, devices) for stage, devices in zip(one.answer.stages, names, strict=True)
    )
    setting = one.setting
    whole = PipelineChoice(setting.samples, setting.microbatches, stages)
    return share_microbatches(table, whole, setting.schedule)


def _stage(table: CostTable, stage: Stage, devices: Sequence[str]) -> StageChoice:
    names = iter(devices)
    mode = table.every_mode[stage.option.staff[0]]
    replicas = []
    for number in stage.option.staff:
        members = [next(names) for _ in table.every_mode[number].members]
        own = table.every_mode[number]
        replicas.append(Replica(members[0], 0, tuple(members[1:]), own.shares, own.mesh, own.lean))
    return StageChoice(
        stage.first, stage.last, tuple(replicas), mode.precision, mode.recompute, mode.zero
    )
