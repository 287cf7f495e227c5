"""What an accelerator takes or leaves as a whole when latency counts, and how long a placement takes.

A colour class shares a device. On an accelerator all of it ends together, but on the CPUs each operator
runs as soon as its own inputs are there, so a class is no vertex of the order in which things happen:
classes may well wait for each other in turn (forward and backward operators of layers do). Operators
that wait for themselves in a circle are one *item*; it cannot run on the CPUs. Operators of a class that
may as well run in one go are one item, too (`items`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import networkx as nx
import numpy as np

from graphpar.partition.placement.graph import FloatArray
from graphpar.partition.placement.items import items_of
from graphpar.partition.problems import NodeId, PlacementProblem

Devices = list[int]
"""For each class its device."""


@dataclass(frozen=True, eq=False)
class Units:
    """Items in an order in which they can run, and the classes that share a device.

    Attributes:
        operators: For each item the positions of its operators.
        class_of: The class of each item.
        items: For each class its items.
        cpu: Time of each item on the CPUs, infinite where it cannot run there.
        work: Time of each item on an accelerator, its class's faults aside.
        held: Memory of each item.
        accelerator: For each class its time on an accelerator, infinite where it cannot run on one.
        size: Memory of each class.
        before, after: For each item the items that it waits for, and those that wait for it.
        bundles: Outputs that move together: the classes that make or take them, and their cost.
        sends: For each edge between items what its output costs to move.
        num_accelerators, memory_limit: As in the problem.
    """

    operators: tuple[tuple[int, ...], ...]
    class_of: tuple[int, ...]
    items: tuple[tuple[int, ...], ...]
    cpu: FloatArray
    work: FloatArray
    held: FloatArray
    accelerator: FloatArray
    size: FloatArray
    before: tuple[tuple[int, ...], ...] = field(repr=False)
    after: tuple[tuple[int, ...], ...] = field(repr=False)
    bundles: tuple[tuple[tuple[int, ...], float], ...] = field(repr=False)
    sends: dict[tuple[int, int], float] = field(repr=False)
    num_accelerators: int
    memory_limit: float

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.items)

    @property
    def num_items(self) -> int:
        """Number of items."""
        return len(self.operators)

    def latency(self, devices: Sequence[int]) -> float:
        """When the last item ends, infinite where a rule is broken.

        An accelerator whose set is not contiguous waits for what waits for it.
        """
        held = [0.0] * (self.num_accelerators + 1)
        loads = list(held)
        for c, d in enumerate(devices):
            if d:
                held[d] += float(self.size[c])
                loads[d] += float(self.accelerator[c])
        if max(held[1:], default=0.0) > self.memory_limit * (1 + 1e-12) or math.inf in loads:
            return math.inf
        for ends, cost in self.bundles:
            where = {devices[c] for c in ends}
            if len(where) > 1:
                for d in where:
                    loads[d] += cost
        return self._finish(devices, loads)

    def _finish(self, devices: Sequence[int], loads: list[float]) -> float:
        count, latest, done = self.num_items, 0.0, 0
        # An item on the CPUs is a vertex of its own, an accelerator one behind all items.
        vertex = [count + devices[c] if devices[c] else i for i, c in enumerate(self.class_of)]
        missing = [0] * (count + len(loads))
        members: list[list[int]] = [[] for _ in loads]
        for i, v in enumerate(vertex):
            missing[v] += sum(vertex[j] != v for j in self.before[i])
            if v >= count:
                members[v - count].append(i)
        start = [0.0] * len(missing)
        ready = [v for v in set(vertex) if not missing[v]]
        while ready:
            v = ready.pop()
            inside = members[v - count] if v >= count else [v]
            done += len(inside)
            end = start[v] + (loads[v - count] if v >= count else float(self.cpu[v]))
            latest = max(latest, end)
            for i in inside:
                for j in self.after[i]:
                    w = vertex[j]
                    if w != v:
                        start[w] = max(start[w], end)
                        missing[w] -= 1
                        if not missing[w]:
                            ready.append(w)
        return latest if done == count else math.inf

    def placement(self, problem: PlacementProblem, devices: Sequence[int]) -> dict[NodeId, int]:
        """The same as a mapping of the problem's operators."""
        return {
            problem.operators[v].node_id: devices[c]
            for i, c in enumerate(self.class_of)
            for v in self.operators[i]
        }


def units_of(problem: PlacementProblem) -> Units:
    """The items and classes of a problem."""
    found = items_of(problem)
    operators = tuple(item.operators for item in found)
    together: nx.Graph[object] = nx.Graph()
    together.add_nodes_from(range(len(operators)))
    for i, members in enumerate(operators):
        together.add_edges_from((i, ("colour", problem.operators[v].colour)) for v in members)
    classes = [
        tuple(sorted(i for i in part if isinstance(i, int))) for part in nx.connected_components(together)
    ]
    class_of = {i: c for c, items in enumerate(classes) for i in items}
    work = np.array([sum(problem.operators[v].accelerator_latency for v in part) for part in operators])
    held = np.array([sum(problem.operators[v].size for v in part) for part in operators])
    size = np.array([held[list(c)].sum() for c in classes])
    possible = [
        all(problem.operators[v].on_accelerator for i in items for v in operators[i])
        and size[c] <= problem.memory_limit * (1 + 1e-12)
        for c, items in enumerate(classes)
    ]
    place = {v: class_of[i] for i, part in enumerate(operators) for v in part}
    return Units(
        operators=operators,
        class_of=tuple(class_of[i] for i in range(len(operators))),
        items=tuple(classes),
        cpu=np.array([item.cpu_latency if problem.num_cpus else np.inf for item in found]),
        work=work,
        held=held,
        accelerator=np.array(
            [work[list(c)].sum() if ok else np.inf for c, ok in zip(classes, possible, strict=True)]
        ),
        size=size,
        before=tuple(item.before for item in found),
        after=tuple(item.after for item in found),
        bundles=_bundles(problem, place),
        sends=_sends(problem, {v: i for i, part in enumerate(operators) for v in part}),
        num_accelerators=problem.num_accelerators,
        memory_limit=problem.memory_limit,
    )


def _bundles(
    problem: PlacementProblem, place: dict[int, int]
) -> tuple[tuple[tuple[int, ...], float], ...]:
    touched: dict[int, set[int]] = {}
    cost_of: dict[int, float] = {}
    for t in problem.transfers:
        touched.setdefault(t.source, {place[t.source]}).add(place[t.target])
        cost_of[t.source] = t.cost
    bundles: dict[tuple[int, ...], float] = {}
    for source, ends in touched.items():
        if len(ends) > 1 and cost_of[source] > 0:
            key = tuple(sorted(ends))
            bundles[key] = bundles.get(key, 0.0) + cost_of[source]
    return tuple(bundles.items())


def _sends(problem: PlacementProblem, item_of: dict[int, int]) -> dict[tuple[int, int], float]:
    """For each edge between two items the dearest of its transfers."""
    sends: dict[tuple[int, int], float] = {}
    for t in problem.transfers:
        edge = item_of[t.source], item_of[t.target]
        if edge[0] != edge[1]:
            sends[edge] = max(sends.get(edge, 0.0), t.cost)
    return sends
