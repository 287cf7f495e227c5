"""Ways to compute a graph for tests: at random, or as the sharding programme says when links are free."""

import random
from collections.abc import Callable, Sequence
from itertools import product

from threads import Choice, one_stage

from graphpar.cluster import Cluster
from graphpar.cost import LinkCost
from graphpar.cost_models.group_times import ShardingOptions, TensorGroup
from graphpar.cost_models.sharding import Sharding, choose_sharding
from graphpar.ir.graph import Graph
from graphpar.ir.mesh import Layouts, fit, route, whole_along
from graphpar.ir.ops import SOURCES
from graphpar.ir.shards import Layout, Split
from graphpar.ir.strategies import Strategy, carries_gradient, strategies_of, value_of
from graphpar.preparation import Prepared

FREE = LinkCost(0.0, 1e15)
NVLINK = LinkCost(3e-6, 400e9)
PCIE = LinkCost(10e-6, 12e9)
ETHERNET = LinkCost(50e-6, 1e9)


def gpus(
    count: int, link: LinkCost, shares: tuple[float, ...] = (), mesh: tuple[int, ...] = ()
) -> TensorGroup:
    """So many H100 joined by a link; in a mesh if given."""
    cluster = Cluster.from_dict({"devices": [{"kind": "h100-sxm-80gb", "count": count}]})
    return TensorGroup(cluster.devices, shares or (1 / count,) * count, link, mesh)


def planned(prepared: Prepared, group: TensorGroup, options: ShardingOptions | None = None) -> Choice:
    """What the programme chooses for the whole model as one stage; as many slices as there can be.

    Kernels of tiny models take equally long whole or cut, so that what members hold has to decide.
    """
    options = options or ShardingOptions(samples=prepared.graph.batch, hold_factor=1e6)
    found = choose_sharding(one_stage(prepared.graph), 0, prepared.chain, group, options)
    return choice_of(found)


def choice_of(found: Sharding) -> Choice:
    """A sharding as what tests rewrite by."""
    inner = choice_of(found.inner) if found.inner is not None else None
    return Choice(found.chosen, found.forms, found.weights, inner)


def at_random(
    graph: Graph,
    shares: Sequence[float],
    seed: int,
    prefers: Callable[[str, Strategy], bool] = lambda name, strategy: False,
    inner: Sequence[float] = (),
) -> Choice:
    """Any strategy for each op that its operands can be brought to; mostly not the whole one.

    One that an op `prefers` comes before all that it does not.

    With `inner` members form a mesh, whose second axis has these shares.
    """
    rng = random.Random(seed)
    axes = [shares, inner] if inner else [shares]
    sizes = tuple(map(len, axes))
    tables = [strategies_of(graph, each) for each in axes]
    weights = {
        op.name: rng.choice(_slices(graph, tables, op.name, sizes)) for op in graph.sources("parameter")
    }
    for copies in (True, False):
        chosen = _chosen(graph, tables, weights, sizes, rng, copies, prefers)
        if chosen is not None:
            return _along_axes(chosen, weights, len(axes))
    raise AssertionError("whole everywhere is always possible")


Ways = tuple[Strategy, ...]
"""A strategy along each axis."""


def _along_axes(chosen: dict[str, Ways], weights: dict[str, Layouts], axes: int) -> Choice:
    found: Choice | None = None
    for axis in reversed(range(axes)):
        found = Choice(
            {name: ways[axis] for name, ways in chosen.items()},
            {},
            {name: layouts[axis] for name, layouts in weights.items()},
            found,
        )
    assert found is not None
    return found


def _slices(
    graph: Graph, tables: Sequence[dict[str, tuple[Strategy, ...]]], name: str, sizes: tuple[int, ...]
) -> list[Layouts]:
    found: list[list[Layout]] = [["whole"] for _ in tables]
    for along, table in zip(found, tables, strict=True):
        for user in graph.users(name):
            for strategy in table.get(user.name, ()):
                for operand, layout in zip(user.operands(), strategy.operands, strict=True):
                    if operand == name and isinstance(layout, Split):
                        along.append(layout)
    return [layouts for layouts in product(*found) if fit(layouts, sizes)]


def _chosen(
    graph: Graph,
    tables: Sequence[dict[str, tuple[Strategy, ...]]],
    weights: dict[str, Layouts],
    sizes: tuple[int, ...],
    rng: random.Random,
    copies: bool,
    prefers: Callable[[str, Strategy], bool],
) -> dict[str, Ways] | None:
    """A copy cannot become whole again; where that leads nowhere there are none."""
    chosen: dict[str, Ways] = {}
    for op in graph.ops:
        if op.name not in tables[0]:
            continue
        possible = []
        for ways in product(*(table[op.name] for table in tables)):
            operands = list(zip(*(way.operands for way in ways), strict=True))
            results = zip(*(way.results for way in ways), strict=True)
            moves = (
                route(
                    sizes,
                    _made(graph, chosen, weights, name, len(tables)),
                    wanted,
                    carries_gradient(graph, name),
                    graph[name].target == "parameter",
                )
                for name, wanted in zip(op.operands(), operands, strict=True)
            )
            if (
                all(fit(layouts, sizes) for layouts in (*operands, *results))
                and (copies or not any("copied" in way.results for way in ways))
                and all(way is not None for way in moves)
            ):
                possible.append(ways)
        if not possible:
            return None
        possible = [ways for ways in possible if any(prefers(op.name, way) for way in ways)] or possible
        chosen[op.name] = rng.choice(possible[1:] or possible if rng.random() < 0.8 else possible)
    return chosen


def _made(
    graph: Graph, chosen: dict[str, Ways], weights: dict[str, Layouts], name: str, axes: int
) -> Layouts:
    if graph[name].target in SOURCES:
        return weights.get(name, whole_along(axes))
    source, index = value_of(graph, name)
    return tuple(way.results[index] for way in chosen[source])
