"""From counts of interchangeable devices to devices with names."""

from collections.abc import Sequence

from graphpar.cost import CostTable
from graphpar.partition.cells import Cells
from graphpar.partition.chain import Stage
from graphpar.partition.pipeline_price import share_microbatches
from graphpar.partition.pipeline_search import Found
from graphpar.partition.types import PipelineChoice, Replica, StageChoice


def name_devices(table: CostTable, cells: Cells, found: Sequence[Found]) -> tuple[PipelineChoice, ...]:
    """Give each stage devices of its cells, whole stages inside a node where a node has room.

    Stages wider than a node choose first, then the others in the order of the pipeline: the node of
    the stage before them if it has room, else the emptiest node where a like stage follows, else the
    fullest one that has room, else what is left, fewest nodes first.
    """
    pools = [_Pool(table, c.devices) for c in cells.cells]
    stages = [(p, s) for p, one in enumerate(found) for s in range(len(one.answer.stages))]
    names: dict[tuple[int, int], list[str]] = {}
    for p, s in sorted(stages, key=lambda at: -_beyond_a_node(pools, found[at[0]].answer.stages[at[1]])):
        line = found[p].answer.stages
        before = names.get((p, s - 1), [])
        follows = s + 1 < len(line) and line[s + 1].option == line[s].option
        names[p, s] = [
            device
            for pool, number in zip(pools, line[s].option.take, strict=True)
            for device in pool.draw(number, before, follows)
        ]
    return tuple(
        _pipeline(table, one, [names[p, s] for s in range(len(one.answer.stages))])
        for p, one in enumerate(found)
    )


class _Pool:
    """The free devices of a cell, by node."""

    def __init__(self, table: CostTable, devices: Sequence[str]) -> None:
        self._node_of = table.topology.node_of
        self._free: dict[str, list[str]] = {}
        for device in devices:
            self._free.setdefault(self._node_of[device], []).append(device)
        self.node_size = max(map(len, self._free.values()), default=0)

    def draw(self, number: int, before: Sequence[str], follows: bool) -> list[str]:
        """Take some devices, if possible of one node."""
        roomy = [n for n, free in self._free.items() if len(free) >= number]
        near = [n for n in roomy if any(self._node_of[d] == n for d in before)]
        if near:
            return self._take(near[0], number)
        if roomy:
            choose = max if follows else min
            return self._take(choose(roomy, key=lambda n: len(self._free[n])), number)
        taken: list[str] = []
        for node in sorted(self._free, key=lambda n: -len(self._free[n])):
            taken += self._take(node, min(number - len(taken), len(self._free[node])))
        return taken

    def _take(self, node: str, number: int) -> list[str]:
        taken, self._free[node] = self._free[node][:number], self._free[node][number:]
        return taken


def _beyond_a_node(pools: Sequence[_Pool], stage: Stage) -> int:
    """Devices by which a stage is wider than a node; 0 where it is not."""
    return max(
        max(0, number - pool.node_size) for pool, number in zip(pools, stage.option.take, strict=True)
    )


def _pipeline(table: CostTable, one: Found, names: Sequence[Sequence[str]]) -> PipelineChoice:
    stages = tuple(
        StageChoice(stage.first, stage.last, tuple(Replica(d, 0) for d in devices))
        for stage, devices in zip(one.answer.stages, names, strict=True)
    )
    setting = one.setting
    whole = PipelineChoice(setting.samples, setting.microbatches, stages)
    return share_microbatches(table, whole, setting.schedule)
