"""A whole model in every node: groups side by side, each with as much of the batch as it is fast.

Where a node's devices hold the model together, nothing but gradients crosses the network. A search that
is cut short may not come to unlike shares of the batch.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from graphpar.cost import CostTable, Mode
from graphpar.ir.ops import apportion
from graphpar.partition.check import check_partition
from graphpar.partition.handmade import excess_bytes, priced_plan
from graphpar.partition.settings import microbatch_counts
from graphpar.partition.types import Partition, PipelineChoice, Replica, ScheduleName, StageChoice

_ROUNDS = 4
"""How often shares of the batch follow from how fast each node was with the last ones."""

_Counts = npt.NDArray[np.intp]


def nodes_beside(table: CostTable, schedule: ScheduleName) -> Partition | None:
    """The best plan met of one stage in each node; None where there is none, or one node alone."""
    nodes: dict[str, list[str]] = {}
    for name in table.class_of:
        nodes.setdefault(table.topology.node_of[name], []).append(name)
    lanes = [lane for own in nodes.values() if (lane := _Lane(table, own)).ways]
    if len(lanes) < 2 or len(lanes) > min(table.batch, table.max_replicas):
        return None
    most = table.max_replicas // len(lanes)
    best: Partition | None = None
    rates, before = [1.0] * len(lanes), tuple[int, ...]()
    for _ in range(_ROUNDS):
        samples = tuple(apportion(table.batch, tuple(rate / sum(rates) for rate in rates)))
        if samples == before:
            break
        before = samples
        made = [lane.fastest(own, most) for lane, own in zip(lanes, samples, strict=True)]
        chosen = [each for each in made if each is not None]
        if len(chosen) < len(lanes):
            return best
        found = priced_plan(table, [pipeline for _, pipeline in chosen], schedule)
        if excess_bytes(table, found) <= 0 and (best is None or found.objective_s < best.objective_s):
            check_partition(table, found)
            best = found
        rates = [own / max(seconds, 1e-30) for own, (seconds, _) in zip(samples, chosen, strict=True)]
    return best


@dataclass(frozen=True)
class _Way:
    """A mode in which groups of a node run the whole model.

    Attributes:
        step_s: About what an update takes, gradients summed with those of other nodes.
        seconds: Of a microbatch, by its size.
        free_bytes: Beside a microbatch, by its size.
    """

    mode: Mode
    step_s: float
    replicas: tuple[Replica, ...]
    seconds: tuple[float, ...]
    free_bytes: tuple[float, ...]


@dataclass(frozen=True)
class _Lane:
    """The devices of a node."""

    table: CostTable
    devices: Sequence[str]

    @cached_property
    def ways(self) -> list[_Way]:
        """What holds the whole model with microbatches of the smallest size."""
        made = (self._way(mode) for mode in self.table.every_mode)
        return [way for way in made if way is not None and way.free_bytes[0] >= 0]

    def _way(self, mode: Mode) -> _Way | None:
        table = self.table
        link = table.topology.inside[table.topology.node_of[self.devices[0]]]
        if mode.zero or (mode.link is not None and mode.link != link):
            return None
        replicas = tuple(self._groups(mode))
        if not replicas:
            return None
        costs = [(mode.costs[kind], count) for kind, count in Counter(table.units).items()]
        seconds = sum(n * (np.array(c.forward_s) + np.array(c.backward_s)) for c, n in costs)
        sent = max(sum(n * c.gradient_bytes[k] for c, n in costs) for k in range(len(mode.members)))
        step_s = sum(n * c.optimizer_s for c, n in costs) + 2 * sent / table.topology.network.bytes_per_s
        free = np.full(len(table.sizes), np.inf)
        for k, number in enumerate(mode.members):
            held = sum(
                n * (c.weight_bytes[k] + c.gradient_bytes[k] + c.optimizer_bytes[k]) for c, n in costs
            )
            kept = sum(n * np.array(c.saved_bytes[k]) for c, n in costs)
            room = table.device_classes[number].memory_bytes - table.reserved_bytes
            free = np.minimum(free, room - held - kept)
        return _Way(mode, step_s, replicas, tuple(np.asarray(seconds).tolist()), tuple(free.tolist()))

    def _groups(self, mode: Mode) -> Iterator[Replica]:
        """As many groups as the node has devices for."""
        waiting: dict[int, list[str]] = {}
        for name in self.devices:
            waiting.setdefault(self.table.class_of[name], []).append(name)
        while all(len(waiting.get(k, ())) >= mode.members.count(k) for k in mode.members):
            first, *others = [waiting[k].pop(0) for k in mode.members]
            yield Replica(first, 0, tuple(others), mode.shares, mode.mesh, mode.lean)

    def fastest(self, samples: int, most: int) -> tuple[float, PipelineChoice] | None:
        """Seconds and the pipeline that takes fewest for so many samples, over `most` groups or fewer."""
        counts = np.array(microbatch_counts(self.table, samples, "auto") if samples else (), dtype=int)
        tried = (self._timed(way, samples, counts, most) for way in self.ways)
        found = [each for each in tried if each is not None]
        return min(found, key=lambda each: each[0], default=None)

    def _timed(
        self, way: _Way, samples: int, counts: _Counts, most: int
    ) -> tuple[float, PipelineChoice] | None:
        """The best number of microbatches, of those that fit."""
        replicas = way.replicas[:most]
        sizes, known = -(-samples // counts), self.table.sizes
        each_s, turns = np.interp(sizes, known, way.seconds), -(-counts // len(replicas))
        seconds = np.where(np.interp(sizes, known, way.free_bytes) < 0, np.inf, turns * each_s)
        best = int(seconds.argmin()) if len(seconds) else 0
        if not len(seconds) or seconds[best] == np.inf:
            return None
        count, mode = int(counts[best]), way.mode
        stage = StageChoice(0, self.table.num_units, replicas[:count], mode.precision, mode.recompute)
        return way.step_s + float(seconds[best]), PipelineChoice(samples, count, (stage,))
