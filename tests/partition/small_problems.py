"""Small problems for the sharding and placement tests: strategies for hypothesis, and brute force."""

import itertools
import json
from collections.abc import Callable

import numpy as np
from hypothesis import strategies as st

from graphpar.partition.placement.check import Objective, check_placement
from graphpar.partition.problems import (
    IMPOSSIBLE_COST,
    NodeId,
    Operator,
    PlacementProblem,
    ShardingProblem,
    Transfer,
)
from graphpar.partition.sharding.check import check_sharding

_COST = st.one_of(st.integers(0, 12), st.just(IMPOSSIBLE_COST))


@st.composite
def sharding_problems(draw: st.DrawFn) -> ShardingProblem:
    """Up to six nodes with up to four strategies, parallel edges, self-loops and tight memory."""
    num_nodes = draw(st.integers(1, 6))
    arity = [draw(st.integers(1, 4)) for _ in range(num_nodes)]
    intervals = [(begin := draw(st.integers(0, 6)), begin + draw(st.integers(0, 5))) for _ in arity]
    costs = [tuple(draw(_COST) for _ in range(n)) for n in arity]
    usages = [tuple(draw(st.integers(0, 9)) for _ in range(n)) for n in arity]
    node = st.integers(0, num_nodes - 1)
    edges = draw(st.lists(st.one_of(st.tuples(node, node), st.tuples(node)), max_size=2 * num_nodes))
    tables = [_table(draw, arity, ends) for ends in edges]
    limit = draw(st.one_of(st.none(), st.integers(0, 30)))
    return ShardingProblem(
        "drawn", tuple(intervals), tuple(costs), tuple(usages), tuple(edges), tuple(tables), limit
    )


def _table(draw: st.DrawFn, arity: list[int], ends: tuple[int, ...]) -> tuple[int, ...]:
    """Free tables, and the structured ones that reductions look for."""
    rows, columns = arity[ends[0]], arity[ends[-1]] if len(ends) == 2 else 1
    kind = draw(st.sampled_from(["free", "separable", "matching"]))
    if kind == "separable":
        left = [draw(st.integers(0, 9)) for _ in range(rows)]
        right = [draw(st.integers(0, 9)) for _ in range(columns)]
        return tuple(a + b for a in left for b in right)
    if kind == "matching":
        partner = [draw(st.integers(0, columns - 1)) for _ in range(rows)]
        return tuple(
            draw(st.integers(0, 5)) if partner[i] == j else IMPOSSIBLE_COST
            for i in range(rows)
            for j in range(columns)
        )
    return tuple(draw(_COST) for _ in range(rows * columns))


def best_sharding(problem: ShardingProblem) -> float | None:
    """The optimum by trying everything, or None where nothing is possible."""
    choices = itertools.product(*(range(len(costs)) for costs in problem.node_costs))
    verdicts = (check_sharding(problem, choice) for choice in choices)
    return min((v.cost for v in verdicts if v.feasible), default=None)


@st.composite
def placement_problems(draw: st.DrawFn) -> PlacementProblem:
    """Up to six operators, two accelerators, colour classes, backward operators, tight memory."""
    count = draw(st.integers(1, 6))
    latency = st.integers(0, 8).map(float)
    # Neighbours, or the ends from outside in as forward and backward operators of layers are.
    shared = draw(st.sampled_from([lambda v: (v // 2,), lambda v: (min(v, count - 1 - v),) * 4]))
    operators = tuple(
        Operator(
            node_id=v,
            cpu_latency=draw(latency),
            accelerator_latency=draw(latency),
            on_accelerator=draw(st.integers(0, 5)) > 0,
            size=draw(st.integers(0, 3).map(float)),
            colour=str(draw(st.sampled_from([v, v, *shared(v)]))),
            backward=draw(st.integers(0, 2)) == 0,
        )
        for v in range(count)
    )
    cost = [draw(latency) for _ in range(count)]
    pairs = draw(st.sets(st.tuples(st.integers(0, count - 1), st.integers(0, count - 1)), max_size=9))
    transfers = tuple(Transfer(a, b, cost[a]) for a, b in sorted(pairs) if a < b)
    return PlacementProblem(
        "drawn",
        operators,
        transfers,
        num_accelerators=draw(st.integers(0, 2)),
        num_cpus=draw(st.integers(0, 2)),
        memory_limit=float(draw(st.integers(0, 8))),
    )


def best_placement(
    problem: PlacementProblem,
    objective: Objective,
    keep: Callable[[dict[NodeId, int]], bool] = lambda _: True,
) -> float | None:
    """The optimum by trying everything that `keep` accepts, or None where nothing is possible."""
    ids: list[NodeId] = [op.node_id for op in problem.operators]
    devices = range(problem.num_accelerators + 1)
    found = None
    for choice in itertools.product(devices, repeat=len(ids)):
        answer = dict(zip(ids, choice, strict=True))
        verdict = check_placement(problem, answer, objective)
        if verdict.feasible and verdict.value is not None and keep(answer):
            found = verdict.value if found is None else min(found, verdict.value)
    return found


def sharding_file(problem: ShardingProblem) -> bytes:
    """The problem in its public file format."""
    return json.dumps(
        {
            "problem": {
                "name": problem.name,
                "nodes": {
                    "intervals": problem.intervals,
                    "costs": problem.node_costs,
                    "usages": problem.usages,
                },
                "edges": {"nodes": problem.edge_nodes, "costs": problem.edge_costs},
                "usage_limit": problem.usage_limit,
            }
        }
    ).encode()


def placement_file(problem: PlacementProblem) -> bytes:
    """The problem in its public file format."""
    return json.dumps(
        {
            "maxSizePerFPGA": problem.memory_limit,
            "maxFPGAs": problem.num_accelerators,
            "maxCPUs": problem.num_cpus,
            "nodes": [
                {
                    "id": op.node_id,
                    "cpuLatency": op.cpu_latency,
                    "fpgaLatency": op.accelerator_latency,
                    "supportedOnFpga": int(op.on_accelerator),
                    "isBackwardNode": int(op.backward),
                    "size": op.size,
                    "colorClass": op.colour,
                }
                for op in problem.operators
            ],
            "edges": [
                {
                    "sourceId": problem.operators[t.source].node_id,
                    "destId": problem.operators[t.target].node_id,
                    "cost": t.cost,
                }
                for t in problem.transfers
            ],
        }
    ).encode()


def ring(length: int, seed: int, steps: tuple[int, ...] = (1, 2, 5)) -> ShardingProblem:
    """A dense random instance whose bound does not close by itself."""
    random = np.random.default_rng(seed)
    arity = 6
    pairs = [(i, (i + step) % length) for i in range(length) for step in steps]
    return ShardingProblem(
        "ring",
        tuple((i, i + 4) for i in range(length)),
        tuple(tuple(random.integers(0, 50, arity).tolist()) for _ in range(length)),
        tuple(tuple(random.integers(1, 20, arity).tolist()) for _ in range(length)),
        tuple(pairs),
        tuple(tuple(random.integers(0, 100, arity * arity).tolist()) for _ in pairs),
        30,
    )
