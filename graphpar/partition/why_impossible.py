"""Why a problem file has no answer, once that is proven: the first reason that can be named."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import networkx as nx
import numpy as np

from graphpar.partition.number_rows import Number
from graphpar.partition.placement.check import MEMORY_TOLERANCE, Objective
from graphpar.partition.problems import IMPOSSIBLE_COST, PlacementProblem, ShardingProblem
from graphpar.partition.sharding.check import peak_usage
from graphpar.partition.sharding.reduce import reduce_problem

_FEW_PAIRS = 20_000
"""Pairs up to which reductions take well under a second."""

_MOST_NAMED = 6
"""Operators of a circle that are named."""


def why_no_strategies(problem: ShardingProblem) -> str:
    """What rules out every choice of strategies of a problem that has none.

    >>> problem = ShardingProblem("one", ((0, 1),), ((5, 1),), ((7, 9),), (), (), 6)
    >>> why_no_strategies(problem)
    'possible strategies that use least hold 7 at time 0, above the memory limit 6'
    """
    costs, limit = "impossible costs (1e18 and more)", problem.usage_limit
    parts = ("node", problem.flat_node_costs), ("edge", problem.flat_edge_costs)
    for what, (start, values) in parts:
        never = np.isinf(np.minimum.reduceat(values, start[:-1])) if len(values) else np.zeros(1)
        if never.any():
            return f"{what} {never.argmax()} has nothing but {costs}"
    few = problem.num_pairs <= _FEW_PAIRS
    if limit is None or (few and reduce_problem(replace(problem, usage_limit=None))[0].infeasible):
        return f"every choice has {costs}, whatever memory there is"
    rows = zip(problem.node_costs, problem.usages, strict=True)
    peak, when = peak_usage(problem, [_least_usage(*row) for row in rows])
    if peak > limit:
        return (
            f"possible strategies that use least hold {peak} at time {when}, "
            f"above the memory limit {limit}"
        )
    return f"every choice within the memory limit {limit} has {costs}"


def _least_usage(costs: Sequence[Number], usages: Sequence[Number]) -> int:
    """The strategy of a node that uses least, of those that are possible."""
    return min((i for i, c in enumerate(costs) if c < IMPOSSIBLE_COST), key=usages.__getitem__)


def why_no_placement(problem: PlacementProblem, objective: Objective) -> str:
    """What rules out every placement of a problem that has none."""
    reasons = [*_without_devices(problem), *_too_large(problem), *_circles(problem, objective)]
    if reasons:
        return reasons[0]
    return "no placement respects the memory limit, the colour classes and contiguity all at once"


def _without_devices(problem: PlacementProblem) -> Iterator[str]:
    if problem.num_cpus:
        return
    if not problem.num_accelerators:
        yield "there are no devices: maxFPGAs and maxCPUs are both 0"
    for op in problem.operators:
        if not op.on_accelerator:
            yield f"node {op.node_id!r} runs on CPUs only, and there are none (maxCPUs is 0)"


def _too_large(problem: PlacementProblem) -> Iterator[str]:
    """Without CPUs everything is held by accelerators."""
    if problem.num_cpus:
        return
    limit, sizes, of = problem.memory_limit, dict[str, float](), dict[str, object]()
    for op in problem.operators:
        sizes[op.colour] = sizes.get(op.colour, 0.0) + op.size
        of.setdefault(op.colour, op.node_id)
    for colour, size in sizes.items():
        if size > limit * (1 + MEMORY_TOLERANCE):
            yield (
                f"node {of[colour]!r} and its colour class hold {size:g}, above the memory limit "
                f"{limit:g} of an accelerator, and there are no CPUs"
            )
    whole, most = sum(sizes.values()), problem.num_accelerators * limit
    if whole > most * (1 + MEMORY_TOLERANCE):
        yield (
            f"all operators hold {whole:g}, above the {most:g} of {problem.num_accelerators} "
            f"accelerators (memory limit {limit:g} each), and there are no CPUs"
        )


def _circles(problem: PlacementProblem, objective: Objective) -> Iterator[str]:
    """Operators that wait for one another belong to one device, for latency to one accelerator."""
    forward_only = objective == "throughput"
    if forward_only and problem.num_cpus:
        return
    graph: nx.DiGraph[int] = nx.DiGraph(
        (t.source, t.target)
        for t in problem.transfers
        if not forward_only
        or not (problem.operators[t.source].backward or problem.operators[t.target].backward)
    )
    for members in nx.strongly_connected_components(graph):
        if len(members) < 2:
            continue
        colours = {problem.operators[v].colour for v in members}
        held = [op for op in problem.operators if op.colour in colours]
        size = sum(op.size for op in held)
        alone = next((op for op in held if not op.on_accelerator), None)
        if not problem.num_accelerators:
            why = "there is none"
        elif alone is not None:
            why = f"node {alone.node_id!r} cannot be there"
        elif size > problem.memory_limit * (1 + MEMORY_TOLERANCE):
            why = f"they hold {size:g}, above the memory limit {problem.memory_limit:g}"
        else:
            continue
        circle = [source for source, _ in nx.find_cycle(graph.subgraph(members))]
        names = [repr(problem.operators[v].node_id) for v in circle[:_MOST_NAMED]]
        names += ["..."] if len(circle) > _MOST_NAMED else names[:1]
        yield (
            f"nodes wait for one another in a circle ({' -> '.join(names)}); "
            f"only one accelerator could run all of them, and {why}"
        )
