"""Ways to compute a graph for tests: at random, or as the sharding programme says when links are free."""

import random
from collections.abc import Callable, Sequence

from threads import Choice, one_stage

from graphpar.cluster import Cluster
from graphpar.cost import LinkCost
from graphpar.cost_models.group_times import ShardingOptions, TensorGroup
from graphpar.cost_models.sharding import choose_sharding
from graphpar.ir.conversions import conversion
from graphpar.ir.graph import Graph
from graphpar.ir.ops import SOURCES
from graphpar.ir.shards import Layout, Split
from graphpar.ir.strategies import Strategy, carries_gradient, layout_of, strategies_of
from graphpar.preparation import Prepared

FREE = LinkCost(0.0, 1e15)
NVLINK = LinkCost(3e-6, 400e9)
PCIE = LinkCost(10e-6, 12e9)
ETHERNET = LinkCost(50e-6, 1e9)


def gpus(count: int, link: LinkCost, shares: tuple[float, ...] = ()) -> TensorGroup:
    """So many H100 joined by a link."""
    cluster = Cluster.from_dict({"devices": [{"kind": "h100-sxm-80gb", "count": count}]})
    return TensorGroup(cluster.devices, shares or (1 / count,) * count, link)


def planned(prepared: Prepared, group: TensorGroup, options: ShardingOptions | None = None) -> Choice:
    """What the programme chooses for the whole model as one stage; as many slices as there can be.

    Kernels of tiny models take equally long whole or cut, so that what members hold has to decide.
    """
    options = options or ShardingOptions(samples=prepared.graph.batch, hold_factor=1e6)
    found = choose_sharding(one_stage(prepared.graph), 0, prepared.chain, group, options)
    return Choice(found.chosen, found.forms, found.weights)


def at_random(
    graph: Graph,
    shares: Sequence[float],
    seed: int,
    prefers: Callable[[Strategy], bool] = lambda strategy: False,
) -> Choice:
    """Any strategy for each op that its operands can be brought to; mostly not the whole one."""
    rng = random.Random(seed)
    table = strategies_of(graph, shares)
    weights = {op.name: rng.choice(_slices(graph, table, op.name)) for op in graph.sources("parameter")}
    for copies in (True, False):
        chosen = _chosen(graph, table, weights, rng, copies, prefers)
        if chosen is not None:
            return Choice(chosen, {}, weights)
    raise AssertionError("whole everywhere is always possible")


def _slices(graph: Graph, table: dict[str, tuple[Strategy, ...]], name: str) -> list[Layout]:
    found: list[Layout] = ["whole"]
    for user in graph.users(name):
        for strategy in table.get(user.name, ()):
            for operand, layout in zip(user.operands(), strategy.operands, strict=True):
                if operand == name and isinstance(layout, Split):
                    found.append(layout)
    return found


def _chosen(
    graph: Graph,
    table: dict[str, tuple[Strategy, ...]],
    weights: dict[str, Layout],
    rng: random.Random,
    copies: bool,
    prefers: Callable[[Strategy], bool],
) -> dict[str, Strategy] | None:
    """A copy cannot become whole again; where that leads nowhere there are none."""
    chosen: dict[str, Strategy] = {}
    for op in graph.ops:
        possible = []
        for strategy in table.get(op.name, ()):
            ways = [
                conversion(
                    _made(graph, chosen, weights, name),
                    wanted,
                    carries_gradient(graph, name),
                    graph[name].target == "parameter",
                )
                for name, wanted in zip(op.operands(), strategy.operands, strict=True)
            ]
            if all(way is not None for way in ways) and (copies or "copied" not in strategy.results):
                possible.append(strategy)
        if op.name in table and not possible:
            return None
        possible = [s for s in possible if prefers(s)] or possible
        if possible:
            chosen[op.name] = rng.choice(possible[1:] or possible if rng.random() < 0.8 else possible)
    return chosen


def _made(graph: Graph, chosen: dict[str, Strategy], weights: dict[str, Layout], name: str) -> Layout:
    return weights.get(name, "whole") if graph[name].target in SOURCES else layout_of(graph, chosen, name)
