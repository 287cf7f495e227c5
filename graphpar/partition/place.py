"""Place operators on accelerators and CPUs: for throughput by ideals, for latency by search.

*Throughput*: contract what stays together (`place_graph`), enumerate the ideals, run the exact
dynamic programme (`place_ideals`). Where there are too many ideals, prefixes of a few topological
orders stand in for them and the bound comes from averages alone. The bound holds for contiguous
splits whose devices can be ordered so that no forward transfer goes backwards.
"""

import math
import time
from collections.abc import Callable

import networkx as nx

from graphpar.errors import VerifyError
from graphpar.partition.answers import (
    AnswerStatus,
    Progress,
    ProgressCallback,
    Solved,
    ignore_progress,
    relative_gap,
)
from graphpar.partition.place_check import Objective, check_placement
from graphpar.partition.place_free import improve_free, value_of
from graphpar.partition.place_graph import Blocks, contract, join_dominated, loose, without
from graphpar.partition.place_ideals import (
    Ideals,
    Split,
    all_ideals,
    best_split,
    chain_ideals,
    free_ideals,
    window_ideals,
)
from graphpar.partition.place_latency import search_latency
from graphpar.partition.problems import NodeId, PlacementProblem
from graphpar.partition.solver import OPTIMALITY_TOLERANCE

_MOST_IDEALS = 40_000
"""Ideals up to which all pairs are compared; memory grows with their number, time with its square."""

_MOST_FREELY = 3_000
"""Ideals up to which every one is tried with every choice of the blocks that contiguity leaves free."""

Placement = dict[NodeId, int]


def solve_placement(
    problem: PlacementProblem,
    *,
    objective: Objective = "throughput",
    time_limit_s: float = 60.0,
    gap: float = 0.0,
    threads: int = 1,
    progress: ProgressCallback = ignore_progress,
) -> Solved[Placement]:
    """The best placement found within the time limit, with a lower bound.

    Args:
        problem: What to solve.
        objective: `throughput` (load of the busiest device) or `latency` (time of one sample).
        time_limit_s: Wall-clock limit; the answer comes back within a tenth more.
        gap: Stop once the proven relative gap is this small.
        threads: Threads for integer programmes.
        progress: Called whenever the incumbent or the bound improves.

    Raises:
        ValueError: An argument is out of range.
        VerifyError: The checker disagrees with the search (a bug).
    """
    if not time_limit_s > 0:
        raise ValueError(f"time_limit_s must be positive, got {time_limit_s}")
    if not gap >= 0:
        raise ValueError(f"gap must not be negative, got {gap}")
    began_s = time.perf_counter()

    def left_s() -> float:
        return time_limit_s - (time.perf_counter() - began_s)

    def tell(phase: str, incumbent: float | None, bound: float | None) -> None:
        progress(Progress(phase, time.perf_counter() - began_s, incumbent, bound))

    if objective == "throughput":
        answer, bound, finished = _throughput(problem, left_s, tell)
    elif objective == "latency":
        answer, bound, finished = search_latency(problem, left_s, gap, threads, tell)
    else:
        raise ValueError(f"objective must be throughput or latency, got {objective!r}")
    seconds = time.perf_counter() - began_s
    return _conclude(problem, answer, bound, finished, objective, gap, seconds)


def _conclude(
    problem: PlacementProblem,
    answer: Placement | None,
    bound: float,
    finished: bool,
    objective: Objective,
    gap: float,
    seconds: float,
) -> Solved[Placement]:
    if answer is None:
        if finished:
            note = "no placement respects the memory limit, the colour classes and contiguity"
            return Solved("infeasible", None, None, None, seconds, None, None, note)
        finite = bound if math.isfinite(bound) else None
        return Solved("unknown", None, finite, None, seconds, "time limit", None)
    verdict = check_placement(problem, answer, objective)
    if not verdict.feasible or verdict.value is None:
        raise VerifyError(
            f"placement of {problem.name}: the checker found {list(verdict.errors)[:5]}; "
            "this is a bug, please report it"
        )
    bound = min(bound, verdict.value)
    distance = relative_gap(verdict.value, bound)
    status: AnswerStatus = "optimal" if distance <= OPTIMALITY_TOLERANCE else "feasible"
    truncated_by: str | None = None
    if status == "feasible":
        truncated_by = "gap" if distance <= gap else "time limit"
        if finished and truncated_by == "time limit":
            truncated_by = "search space"
    return Solved(status, verdict.value, bound, distance, seconds, truncated_by, answer)


def _throughput(
    problem: PlacementProblem,
    left_s: Callable[[], float],
    tell: Callable[[str, float | None, float | None], None],
) -> tuple[Placement | None, float, bool]:
    """Answer, bound, and whether nothing was left out for lack of time."""
    if not problem.operators:
        return {}, 0.0, True
    blocks = contract(problem, forward_only=True)
    pools = min(1, problem.num_cpus)

    def stop() -> bool:
        return left_s() <= 0

    def value(placement: Placement) -> float:
        return value_of(problem, placement)

    def run(
        of: Blocks, ideals: Ideals | None, cutoff: float, *, relaxed: bool = False
    ) -> tuple[Split | None, bool]:
        if ideals is None:
            return None, False
        split = best_split(
            of,
            ideals,
            num_accelerators=problem.num_accelerators,
            num_cpu_pools=pools,
            memory_limit=problem.memory_limit,
            cutoff=cutoff,
            should_stop=stop,
            relaxed=relaxed,
        )
        return split, ideals.complete and not stop()

    bound = _average_bound(problem)
    first, _ = run(blocks, chain_ideals(blocks, _orders(blocks)), math.inf)
    best = _assign(problem, blocks, first) if first else None
    load = first.load if first else math.inf
    tell("chain", load if first else None, bound)
    blocks = contract(problem, forward_only=True, cutoff=load)
    split, complete = run(blocks, all_ideals(blocks, _MOST_IDEALS), load)
    if split:
        best, load = _assign(problem, blocks, split), split.load
    tell("ideals", load if best else None, bound)
    kept = contract(problem, forward_only=True, free="keep", cutoff=load)
    if not kept.free:
        return best, max(bound, load) if complete else bound, complete
    if (anywhere := free_ideals(kept, _MOST_FREELY)) is not None:
        split, complete = run(kept, anywhere, load)
        if split:
            best, load = _assign(problem, kept, split), split.load
        return best, max(bound, load) if complete else bound, complete
    free = [v for f in kept.free for v in kept.operators[f]]
    joined = join_dominated(kept, charged=True)
    joined = without(joined, loose(joined))
    split, _ = run(joined, window_ideals(joined, _MOST_IDEALS), load)
    starts = [] if best is None else [best]
    if split:
        starts.append(_completed(problem, best, _assign(problem, joined, split)))
    if starts:
        best = min((improve_free(problem, start, free, stop) for start in starts), key=value)
        load = value(best)
    if not math.isfinite(load):
        best = None
    tell("windows", load if best else None, bound)
    core = join_dominated(kept, charged=False)
    core = without(core, loose(core))
    ideals = window_ideals(core, _MOST_IDEALS)
    if ideals is None:
        core = without(core, core.free)
        ideals = all_ideals(core, _MOST_IDEALS)
    relaxed, proven = run(core, ideals, load * (1 + 1e-9), relaxed=True)
    if proven:
        bound = max(bound, min(load, relaxed.load if relaxed else load))
    tell("bound", load if best else None, bound)
    return best, bound, proven and (best is not None or relaxed is None)


def _completed(problem: PlacementProblem, best: Placement | None, part: Placement) -> Placement:
    """A placement of some operators, with the others where they are known to do well."""
    default = 0 if problem.num_cpus else 1
    return {op.node_id: default for op in problem.operators} | (best or {}) | part


def _orders(blocks: Blocks) -> list[list[int]]:
    """A few unlike topological orders."""
    graph: nx.DiGraph[int] = nx.DiGraph()
    graph.add_nodes_from(range(blocks.num_blocks))
    graph.add_edges_from(blocks.edges)
    depth_first: list[int] = list(nx.dfs_postorder_nodes(graph))[::-1]
    backwards = list(nx.dfs_postorder_nodes(graph.reverse()))
    return [depth_first, backwards, list(nx.topological_sort(graph))]


def _average_bound(problem: PlacementProblem) -> float:
    """No split beats sharing everybody's least work evenly over all devices."""
    least = sum(
        min(
            op.accelerator_latency if op.on_accelerator and problem.num_accelerators else math.inf,
            op.cpu_latency if problem.num_cpus else math.inf,
        )
        for op in problem.operators
    )
    devices = problem.num_accelerators + min(1, problem.num_cpus)
    return least / devices if devices else math.inf


def _assign(problem: PlacementProblem, blocks: Blocks, split: Split) -> Placement:
    placement: Placement = {}
    used = 0
    for on_cpu, part in split.parts:
        used += not on_cpu
        for block in part:
            for v in blocks.operators[block]:
                placement[problem.operators[v].node_id] = 0 if on_cpu else used
    return placement
