"""The placement graph after what must stay together has been put together.

Operators of one colour class share a device. A cycle among the classes of the forward graph could
not be cut by a contiguous split, so it becomes one block. Classes without a forward operator
are free of the contiguity rule; they are attached to the block they exchange most with, which can
cost optimality: the bound leaves them out instead.
"""

import math
from dataclasses import dataclass, field

import networkx as nx
import numpy as np
import numpy.typing as npt

from graphpar.partition.problems import PlacementProblem

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Blocks:
    """Blocks of operators that share a device, and what they exchange.

    Attributes:
        operators: For each block the positions of its operators.
        edges: Forward order between blocks, acyclic.
        cpu, accelerator, size: Sums over each block; `accelerator` is infinite where some operator
            cannot run on one.
        bundles: Outputs that move together: the blocks that make or take them, and their cost.
        dropped: Operators in no block.
    """

    operators: tuple[tuple[int, ...], ...]
    edges: tuple[tuple[int, int], ...]
    cpu: FloatArray
    accelerator: FloatArray
    size: FloatArray
    bundles: tuple[tuple[frozenset[int], float], ...] = field(repr=False)
    dropped: tuple[int, ...] = ()

    @property
    def num_blocks(self) -> int:
        """Number of blocks."""
        return len(self.operators)


def contract(
    problem: PlacementProblem,
    *,
    forward_only: bool,
    drop_free: bool = False,
    cutoff: float = math.inf,
) -> Blocks:
    """Blocks of a problem.

    Args:
        problem: The problem.
        forward_only: Whether contiguity concerns forward operators only (throughput) or all.
        drop_free: Leave operators free of the contiguity rule out instead of attaching them.
        cutoff: A load that an answer must beat. Of two devices at least one is an accelerator and
            pays for what moves between them, so ends of a dearer transfer stay together.
    """
    block = _colour_numbers(problem, cutoff)
    ordered = [not (forward_only and op.backward) for op in problem.operators]
    order: nx.DiGraph[int] = nx.DiGraph()
    order.add_nodes_from({block[v] for v, kept in enumerate(ordered) if kept})
    order.add_edges_from(
        (block[t.source], block[t.target])
        for t in problem.transfers
        if ordered[t.source] and ordered[t.target] and block[t.source] != block[t.target]
    )
    joined: dict[int, int] = {}
    for number, component in enumerate(nx.strongly_connected_components(order)):
        joined.update(dict.fromkeys(component, number))
    place = [joined.get(colour, -1) for colour in block]
    if not drop_free:
        _attach_free(problem, block, place)
    return _summarise(problem, place, ordered, len(set(joined.values())))


def _colour_numbers(problem: PlacementProblem, cutoff: float) -> list[int]:
    together: nx.Graph[str] = nx.Graph()
    together.add_nodes_from(op.colour for op in problem.operators)
    together.add_edges_from(
        (problem.operators[t.source].colour, problem.operators[t.target].colour)
        for t in problem.transfers
        if t.cost > cutoff
    )
    number = {colour: i for i, part in enumerate(nx.connected_components(together)) for colour in part}
    return [number[op.colour] for op in problem.operators]


def _attach_free(problem: PlacementProblem, colour: list[int], place: list[int]) -> None:
    """Give every operator without a block the block its colour class exchanges most with."""
    while -1 in place:
        exchange: dict[int, dict[int, float]] = {}
        for t in problem.transfers:
            for a, b in ((t.source, t.target), (t.target, t.source)):
                if place[a] == -1 and place[b] != -1:
                    row = exchange.setdefault(colour[a], {})
                    row[place[b]] = row.get(place[b], 0.0) + t.cost
        if not exchange:
            exchange = {colour[v]: {max(0, *place): 0.0} for v, p in enumerate(place) if p == -1}
        nearest = {c: max(row, key=lambda p: row[p]) for c, row in exchange.items()}
        for v, p in enumerate(place):
            if p == -1:
                place[v] = nearest.get(colour[v], -1)


def _summarise(problem: PlacementProblem, place: list[int], ordered: list[bool], count: int) -> Blocks:
    count = max(count, max(place, default=-1) + 1)
    operators: list[list[int]] = [[] for _ in range(count)]
    cpu, accelerator, size = np.zeros(count), np.zeros(count), np.zeros(count)
    for v, (op, p) in enumerate(zip(problem.operators, place, strict=True)):
        if p >= 0:
            operators[p].append(v)
            cpu[p] += op.cpu_latency
            accelerator[p] += op.accelerator_latency if op.on_accelerator else np.inf
            size[p] += op.size
    edges = {
        (place[t.source], place[t.target])
        for t in problem.transfers
        if ordered[t.source] and ordered[t.target] and place[t.source] != place[t.target]
    }
    touched: dict[int, set[int]] = {}
    cost_of: dict[int, float] = {}
    for t in problem.transfers:
        if place[t.source] >= 0 and place[t.target] >= 0:
            touched.setdefault(t.source, {place[t.source]}).add(place[t.target])
            cost_of[t.source] = t.cost
    bundles: dict[frozenset[int], float] = {}
    for source, ends in touched.items():
        if len(ends) > 1 and cost_of[source] > 0:
            key = frozenset(ends)
            bundles[key] = bundles.get(key, 0.0) + cost_of[source]
    return Blocks(
        operators=tuple(map(tuple, operators)),
        edges=tuple(sorted(edges)),
        cpu=cpu,
        accelerator=accelerator,
        size=size,
        bundles=tuple(bundles.items()),
        dropped=tuple(v for v, p in enumerate(place) if p < 0),
    )
