"""Prices of tensor groups as work of its own, which any process can do."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass

from graphpar.calibration import Calibration
from graphpar.cluster import Cluster
from graphpar.cost import CostTable, Mode
from graphpar.cost_models.group_times import ShardingOptions
from graphpar.cost_models.roofline import Rewritten
from graphpar.groups.modes import KnownGroups, with_group_modes
from graphpar.ir.graph import Graph
from graphpar.loading import uncollected
from graphpar.partition.types import Replica
from graphpar.scenarios.workers import started, submitted

LEAST_TASKS = 12
"""For the prices of fewer groups no processes are started, which takes some seconds."""

MESH_WORK = 3
"""How many times longer the price of a group of two axes takes than of one; 3 to 4 for Llama-8B."""


@dataclass(frozen=True)
class GroupTask:
    """Groups of the same devices, in several shapes, and what their prices depend on.

    Args:
        table: Plain prices.
        graph: The captured graph at the batch that is asked for.
        cluster: The devices.
        groups: The same devices in one or more shapes.
        runs: By device the graph and units in its format, at any batch.
        usual: What strategies are chosen for.
        calibration: Measured rates of this machine's processor.
        least_gain: See `with_group_modes`.
        leaner: See there.
        alike: Whether what is found for one batch tells of others.
    """

    table: CostTable
    graph: Graph
    cluster: Cluster
    groups: tuple[Replica, ...]
    runs: Mapping[str, Rewritten]
    usual: ShardingOptions
    calibration: Calibration | None
    least_gain: float
    leaner: bool
    alike: bool

    @property
    def shapes(self) -> tuple[object, ...]:
        """What tells its programmes from those of other tasks, whatever the batch."""
        return tuple((group.shares, group.mesh) for group in self.groups)

    def priced(self, known: KnownGroups) -> tuple[Mode, ...]:
        """A mode for each group that is worth one; `known` is used and added to."""
        # Strategies are chosen for a part of the batch.
        at_batch = {id(g): (g.with_batch(self.graph.batch), units) for g, units in self.runs.values()}
        found = with_group_modes(
            self.table,
            self.graph,
            self.cluster,
            self.groups,
            self.calibration,
            rewritten={name: at_batch[id(g)] for name, (g, _) in self.runs.items()},
            least_gain=self.least_gain,
            leaner=self.leaner,
            known=known if self.alike else None,
            usual=self.usual,
        )
        return found.modes[len(self.table.modes) :]


def priced_together(tasks: Sequence[GroupTask]) -> list[tuple[Mode, ...]]:
    """The modes of each task; what one finds out is used by the others."""
    known = KnownGroups()
    return [_alone(task, known) for task in tasks]


def _alone(task: GroupTask, known: KnownGroups) -> tuple[Mode, ...]:
    with uncollected():
        return task.priced(known)


Priced = tuple[str, GroupTask, tuple[Mode, ...]]
"""A task with its name and modes."""


def priced_by_several(
    bundles: Iterable[Mapping[str, GroupTask]], processes: int, parts: int
) -> Iterator[Priced]:
    """The modes of each task, found by so many processes; of few tasks nothing.

    Args:
        bundles: Tasks by name; those of a bundle are worked on while the next one is made.
        processes: How many work.
        parts: Into how many parts each bundle is divided.

    Raises:
        RunError: One of them was killed; what was found before is given first.
    """
    waiting: list[tuple[list[tuple[str, GroupTask]], Future[list[tuple[Mode, ...]]]]] = []
    left: dict[str, GroupTask] = {}
    with ExitStack() as stack:
        pool = broken = None
        try:
            for bundle in bundles:
                left |= bundle
                if pool is None and len(left) >= LEAST_TASKS:
                    pool = stack.enter_context(started(processes))
                if pool is None:
                    continue
                for names in divided(left, parts):
                    some = [(name, left[name]) for name in names]
                    waiting.append((some, submitted(pool, priced_together, [t for _, t in some])))
                left = {}
        except BrokenProcessPool as error:
            broken = error
        for some, future in waiting:
            for task, modes in zip(some, future.result(), strict=True):
                yield *task, modes
        if broken is not None:
            raise broken


def divided(tasks: Mapping[str, GroupTask], parts: int) -> list[list[str]]:
    """The tasks' names in so many parts of like work; those of the same shapes stay together."""
    alike: dict[object, list[str]] = defaultdict(list)
    for name, task in tasks.items():
        alike[task.shapes].append(name)

    def work(names: Sequence[str]) -> int:
        return sum(MESH_WORK if group.mesh else 1 for name in names for group in tasks[name].groups)

    made: list[list[str]] = [[] for _ in range(parts)]
    for names in sorted(alike.values(), key=work, reverse=True):
        min(made, key=work).extend(names)
    return [part for part in made if part]
