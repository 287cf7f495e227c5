"""The placement graph after what must stay together has been put together.

Operators of one colour class share a device. A cycle among the classes of the forward graph could
not be cut by a contiguous split, so it becomes one block. Classes without a forward operator
are free of the contiguity rule: they become blocks of their own (`keep`), or are attached to the block
they exchange most with. Many of those that are kept are sure to belong with a neighbour,
see `join_dominated`.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import networkx as nx
import numpy as np
import numpy.typing as npt

from graphpar.partition.problems import PlacementProblem

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


def product(left: npt.NDArray[Any], right: npt.NDArray[Any]) -> FloatArray:
    """The matrix product of finite amounts.

    BLAS works in blocks, and what its buffers hold beyond an array may raise the flag of an invalid
    operation, of which numpy then warns: now and then, with the same product.
    """
    with np.errstate(invalid="ignore"):
        found: FloatArray = left @ right
    return found


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
        free: Blocks that the contiguity rule does not concern; no edge touches them.
        optional: Memory of each block that `size` leaves out, since some of it may be elsewhere.
        price: What a device's load is higher for each unit of optional memory that it does not hold.
    """

    operators: tuple[tuple[int, ...], ...]
    edges: tuple[tuple[int, int], ...]
    cpu: FloatArray
    accelerator: FloatArray
    size: FloatArray
    bundles: tuple[tuple[frozenset[int], float], ...] = field(repr=False)
    dropped: tuple[int, ...] = ()
    free: tuple[int, ...] = ()
    optional: FloatArray = field(default_factory=lambda: np.zeros(0), repr=False)
    price: float = 0.0

    @property
    def num_blocks(self) -> int:
        """Number of blocks."""
        return len(self.operators)


def contract(
    problem: PlacementProblem,
    *,
    forward_only: bool,
    free: Literal["attach", "keep"] = "attach",
    cutoff: float = math.inf,
) -> Blocks:
    """Blocks of a problem.

    Args:
        problem: The problem.
        forward_only: Whether contiguity concerns forward operators only (throughput) or all.
        free: What becomes of classes free of the contiguity rule: see the module's text.
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
    count = len(set(joined.values()))
    if free == "attach":
        _attach_free(problem, block, place)
    elif free == "keep":
        alone = sorted({colour for colour, p in zip(block, place, strict=True) if p < 0})
        number_of = {colour: count + i for i, colour in enumerate(alone)}
        place = [number_of[colour] if p < 0 else p for colour, p in zip(block, place, strict=True)]
    blocks = _summarise(problem, place, ordered, count)
    return replace(blocks, free=tuple(range(count, blocks.num_blocks))) if free == "keep" else blocks


def join_dominated(blocks: Blocks, *, charged: bool) -> Blocks:
    """Put free blocks together with a neighbour b wherever they are sure to belong on b's accelerator.

    Say that b is on an accelerator and c on another device. Moving c to b adds c's work there and, at
    most, the transfers of c that b has no part in; it saves the transfers that only these two share.
    Where that is no loss for b's device, it is none for any other.

    Args:
        blocks: Blocks with free ones among them.
        charged: Whether b pays for c's memory and for c's time on the CPUs. Where it does not, the least
            busiest load of the result is a lower bound: c may have had reasons to stay elsewhere, but
            then b's accelerator missed the saving, which gives the memory a price.
    """
    place = list(range(blocks.num_blocks))
    accelerator, free = blocks.accelerator.copy(), set(blocks.free)
    bundles, size = dict(blocks.bundles), blocks.size.copy()
    price = math.inf
    waiting = list(blocks.free)
    while waiting:
        c = waiting.pop()
        if c not in free:
            continue
        own = {ends: cost for ends, cost in bundles.items() if c in ends}
        for b in {b for ends in own for b in ends if b != c}:
            shared = own.get(frozenset((b, c)), 0.0)
            added = accelerator[c] + sum(cost for ends, cost in own.items() if b not in ends)
            if added <= shared and math.isfinite(added):
                place = [b if p == c else p for p in place]
                if size[c] > 0:
                    price = min(price, (shared - added) / size[c])
                accelerator[b] += accelerator[c]
                size[b] += size[c]
                free.discard(c)
                bundles = _renumbered(bundles, {c: b})
                waiting.extend(f for ends in bundles if b in ends for f in ends if f in free)
                break
    joined = _regrouped(blocks, place, bundles, free, charged)
    return joined if charged else replace(joined, price=price if math.isfinite(price) else 0.0)


def _regrouped(
    blocks: Blocks,
    place: list[int],
    bundles: Mapping[frozenset[int], float],
    free: Iterable[int],
    charged: bool,
) -> Blocks:
    """Blocks after `place` says which one each went to."""
    left = sorted(set(place))
    number = {b: i for i, b in enumerate(left)}
    target = [number[p] for p in place]
    operators: list[tuple[int, ...]] = [()] * len(left)
    sums = {key: np.zeros(len(left)) for key in ("cpu", "accelerator", "size", "optional")}
    for b, t in enumerate(target):
        operators[t] += blocks.operators[b]
        sums["accelerator"][t] += blocks.accelerator[b]
        if charged or place[b] == b:
            sums["cpu"][t] += blocks.cpu[b]
            sums["size"][t] += blocks.size[b]
        else:
            sums["optional"][t] += blocks.size[b]
    return replace(
        blocks,
        operators=tuple(operators),
        edges=tuple(sorted((number[a], number[b]) for a, b in blocks.edges)),
        cpu=sums["cpu"],
        accelerator=sums["accelerator"],
        size=sums["size"],
        optional=sums["optional"],
        bundles=tuple(_renumbered(bundles, number).items()),
        free=tuple(sorted(number[f] for f in free)),
    )


def _renumbered(
    bundles: Mapping[frozenset[int], float], number: Mapping[int, int]
) -> dict[frozenset[int], float]:
    """Bundles with some blocks named otherwise; what lies in one block alone moves no more."""
    result: dict[frozenset[int], float] = {}
    for ends, cost in bundles.items():
        key = frozenset(number.get(b, b) for b in ends)
        if len(key) > 1:
            result[key] = result.get(key, 0.0) + cost
    return result


def loose(blocks: Blocks) -> tuple[int, ...]:
    """The free blocks that exchange nothing with anybody."""
    tied = {b for ends, _ in blocks.bundles for b in ends}
    return tuple(f for f in blocks.free if f not in tied)


def without(blocks: Blocks, gone: Iterable[int]) -> Blocks:
    """Leave free blocks out, and what they make or take; no load gets larger."""
    out = set(gone)
    kept = [b for b in range(blocks.num_blocks) if b not in out]
    number = {b: i for i, b in enumerate(kept)}
    bundles: dict[frozenset[int], float] = {}
    for ends, cost in blocks.bundles:
        bundles[ends - out] = bundles.get(ends - out, 0.0) + cost
    return replace(
        blocks,
        operators=tuple(blocks.operators[b] for b in kept),
        edges=tuple((number[a], number[b]) for a, b in blocks.edges),
        cpu=blocks.cpu[kept],
        accelerator=blocks.accelerator[kept],
        size=blocks.size[kept],
        optional=blocks.optional[kept],
        bundles=tuple(_renumbered(bundles, number).items()),
        dropped=tuple(sorted({*blocks.dropped, *(v for b in out for v in blocks.operators[b])})),
        free=tuple(number[f] for f in blocks.free if f in number),
    )


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
    # Amounts that can play no part must not drown the others in sums.
    accelerator[size > problem.memory_limit * (1 + 1e-12)] = np.inf
    size[~np.isfinite(accelerator)] = 0.0
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
