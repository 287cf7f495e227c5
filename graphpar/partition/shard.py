"""Solve a sharding problem: reduce, bound, search, prove; stop at any time with what there is.

1. Exact reductions (`reduce`).
2. Dual ascent (`shard_dual`): a lower bound, memory prices, and roundings that are first answers.
3. Large-neighbourhood search (`shard_search`) from the best rounding; when it stands still, again
   from another one.
4. Whenever the bound and the incumbent are close enough, strategies whose reduced cost passes the
   gap are dropped, the rest is reduced again, and if it became small one ILP closes the gap
   (`shard_exact`).

Everything an answer's cost and memory depend on is recomputed from the file by `shard_check`.
"""

import contextlib
import copy
import math
import time
from dataclasses import dataclass, field

import numpy as np

from graphpar.errors import VerifyError
from graphpar.partition.answers import (
    AnswerStatus,
    Progress,
    ProgressCallback,
    Solved,
    ignore_progress,
    relative_gap,
)
from graphpar.partition.problems import Number, ShardingProblem
from graphpar.partition.reduce import reduce_graph, reduce_problem
from graphpar.partition.shard_check import check_sharding
from graphpar.partition.shard_dual import DualAscent, OutOfTimeError
from graphpar.partition.shard_exact import solve_exactly
from graphpar.partition.shard_graph import IntArray, MemoryRows, ShardingGraph
from graphpar.partition.shard_ilp import count_pairs
from graphpar.partition.shard_memory import MemoryMatrix
from graphpar.partition.shard_search import WindowSearch
from graphpar.partition.solver import OPTIMALITY_TOLERANCE

_SMALL_PAIRS = 40_000
"""Pair variables up to which one ILP over everything left is worth its time."""

_WIDTHS = (2, 4, 8, 16, 1_000)
"""Strategies per vertex in the windows of the search, from wide and shallow to full."""

_NUM_SEEDS = (1, 3, 1, 5, 3)
"""Seeds of the windows in turn: mostly one region, sometimes several that share memory."""


@dataclass(eq=False)
class _State:
    """The search's clock, incumbent and bound, in the terms of the file."""

    problem: ShardingProblem
    began_s: float
    time_limit_s: float
    gap: float
    progress: ProgressCallback
    integral: bool
    objective: float = math.inf
    answer: list[int] | None = None
    bound: float = -math.inf
    roundings: list[IntArray] = field(default_factory=list)
    phase: str = "reduce"
    last_told: tuple[float, float] = field(default=(math.inf, -math.inf))

    def elapsed_s(self) -> float:
        return time.perf_counter() - self.began_s

    def left_s(self) -> float:
        return self.time_limit_s - self.elapsed_s()

    def out_of_time(self) -> bool:
        return self.left_s() <= 0

    def closed(self) -> bool:
        return self.answer is not None and relative_gap(self.objective, self.bound) <= self.gap

    def raise_bound(self, bound: float) -> None:
        """Take a bound, less what rounding errors may have added; whole costs round it up."""
        safe = bound - 1e-9 * abs(bound)
        if self.integral and math.isfinite(safe):
            safe = float(math.ceil(safe - 1e-6))
        self.bound = max(self.bound, safe)
        self.tell()

    def offer(self, graph: ShardingGraph, vertices: list[int], chosen: IntArray) -> None:
        """Take a choice as incumbent if the file itself says that it is feasible and better."""
        choice = {u: int(i) for u, i in zip(vertices, chosen, strict=True)}
        if graph.value(choice) >= self.objective:
            return
        answer = graph.expand(choice, self.problem.num_nodes)
        verdict = check_sharding(self.problem, answer)
        if verdict.feasible and verdict.cost < self.objective:
            self.objective, self.answer = float(verdict.cost), answer
            self.tell()

    def tell(self) -> None:
        now = (self.objective, self.bound)
        if now != self.last_told:
            self.last_told = now
            self.progress(
                Progress(
                    self.phase,
                    self.elapsed_s(),
                    self.objective if self.answer is not None else None,
                    self.bound if math.isfinite(self.bound) else None,
                )
            )


def solve_sharding(
    problem: ShardingProblem,
    *,
    time_limit_s: float = 60.0,
    gap: float = 0.0,
    threads: int = 1,
    seed: int = 0,
    progress: ProgressCallback = ignore_progress,
) -> Solved[list[int]]:
    """The best strategies found within the time limit, with a true lower bound.

    Args:
        problem: What to solve.
        time_limit_s: Wall-clock limit; the answer comes back within a tenth more.
        gap: Stop once the proven relative gap is this small.
        threads: Threads for the ILPs.
        seed: Seed of the search's random choices.
        progress: Called whenever the incumbent or the bound improves.

    Raises:
        ValueError: A limit is out of range.
        VerifyError: The checker disagrees with the search (a bug).
    """
    if not time_limit_s > 0:
        raise ValueError(f"time_limit_s must be positive, got {time_limit_s}")
    if not gap >= 0:
        raise ValueError(f"gap must not be negative, got {gap}")
    state = _State(
        problem,
        time.perf_counter(),
        time_limit_s,
        max(gap, OPTIMALITY_TOLERANCE),
        progress,
        _whole(problem.node_costs) and _whole(problem.edge_costs),
    )
    graph, rows = reduce_problem(problem, lambda: state.left_s() < 0.6 * time_limit_s)
    infeasible = graph.infeasible
    if not infeasible:
        infeasible = _search(state, graph, rows, threads, seed)
    return _conclude(state, infeasible)


def _whole(costs: tuple[tuple[Number, ...], ...]) -> bool:
    """Whether all costs are whole numbers, as read."""
    return all(float not in set(map(type, row)) for row in costs)


def _search(state: _State, graph: ShardingGraph, rows: MemoryRows, threads: int, seed: int) -> bool:
    """Phases 2 to 4; returns whether infeasibility was proven."""
    if not graph.costs:
        state.offer(graph, [], np.zeros(0, dtype=np.intp))
        state.raise_bound(graph.constant)
        return False
    if state.out_of_time():
        return False
    dual = DualAscent(graph, rows, state.out_of_time)
    with contextlib.suppress(OutOfTimeError):
        return _improve(state, graph, rows, dual, threads, seed)
    return False


def _improve(
    state: _State,
    graph: ShardingGraph,
    rows: MemoryRows,
    dual: DualAscent,
    threads: int,
    seed: int,
) -> bool:
    _bound_phase(state, graph, dual, share=0.15)
    if state.closed() or state.out_of_time():
        return False
    if count_pairs(graph) <= _SMALL_PAIRS and state.answer is None:
        return _proof_phase(state, graph, rows, dual, threads, share=1.0)
    while state.answer is None and not state.out_of_time():
        _bound_phase(state, graph, dual, share=0.2)
        if state.answer is None and state.left_s() < 0.6 * state.time_limit_s:
            _proof_phase(state, graph, rows, dual, threads, share=0.5, most_pairs=5 * _SMALL_PAIRS)
    if state.answer is None:
        return False
    proofs, is_small = 0, count_pairs(graph) <= _SMALL_PAIRS
    if is_small and not state.closed():
        _proof_phase(state, graph, rows, dual, threads, share=0.3)
        proofs += 1
    search = _start_search(state, graph, rows, dual, seed)
    while not state.closed() and not state.out_of_time():
        gained_at, before = state.objective, search.cost
        _window_phase(state, search, share=0.08)
        if state.closed() or state.out_of_time():
            break
        _bound_phase(state, graph, dual, share=0.04)
        if search.cost == before and state.roundings:
            seed += 1
            chosen = state.roundings[seed % len(state.roundings)]
            search = WindowSearch(graph, rows, dual.memory, chosen, seed)
        search.guide(dual.excess_costs()[1])
        if gained_at == state.objective and proofs < 3:
            _proof_phase(state, graph, rows, dual, threads, share=min(1.0, 0.3 * 2**proofs))
            proofs += 1
            if state.answer is not None and state.objective < search.cost:
                search.offer(_locate(graph, dual.vertices, state.answer))
    return False


def _bound_phase(state: _State, graph: ShardingGraph, dual: DualAscent, share: float) -> None:
    """Message passing for a share of the time limit, or until the bound stands still."""
    state.phase = "bound"
    end_s = min(state.time_limit_s, state.elapsed_s() + share * state.time_limit_s)
    steps, stood_still, last = 0, 0, -math.inf
    while state.elapsed_s() < end_s and not state.closed():
        if steps % 8 == 0 and state.answer is None:
            chosen = dual.round_within_memory()
            if dual.memory.excess(chosen) <= 0:
                state.offer(graph, dual.vertices, chosen)
        for chosen in dual.ascend(3):
            if dual.memory.excess(chosen) <= 0:
                state.offer(graph, dual.vertices, chosen)
                if math.isfinite(_value(graph, dual.vertices, chosen)):
                    state.roundings = [*state.roundings[-7:], chosen]
        steps += 1
        state.raise_bound(dual.bound)
        stood_still = 0 if dual.bound > last + 1e-7 * abs(last) else stood_still + 1
        last = max(last, dual.bound)
        if stood_still >= 60:
            break
    dual.restore_best()
    dual.sweep()


def _value(graph: ShardingGraph, vertices: list[int], chosen: IntArray) -> float:
    return graph.value({u: int(i) for u, i in zip(vertices, chosen, strict=True)})


def _start_search(
    state: _State, graph: ShardingGraph, rows: MemoryRows, dual: DualAscent, seed: int
) -> WindowSearch:
    assert state.answer is not None
    chosen = _locate(graph, dual.vertices, state.answer)
    search = WindowSearch(graph, rows, dual.memory, chosen, seed)
    search.guide(dual.excess_costs()[1])
    return search


def _locate(graph: ShardingGraph, vertices: list[int], answer: list[int]) -> IntArray:
    """The choice in `graph` that expands to `answer`."""
    chosen = np.zeros(len(vertices), dtype=np.intp)
    for p, u in enumerate(vertices):
        match = np.ones(len(graph.costs[u]), dtype=np.bool_)
        for node, map_ in graph.members[u]:
            match &= map_ == answer[node]
        assert match.any(), "an incumbent came from the graph itself"
        chosen[p] = match.argmax()
    return chosen


def _window_phase(state: _State, search: WindowSearch, share: float) -> None:
    """Windows for a share of the time limit, their size following how fast they solve."""
    state.phase = "search"
    end_s = min(state.time_limit_s, state.elapsed_s() + share * state.time_limit_s)
    turn = 0
    while (left_s := end_s - state.elapsed_s()) > 0 and not state.closed():
        width = _WIDTHS[turn % len(_WIDTHS)]
        turn += 1
        before_s = state.elapsed_s()
        patience_s = min(left_s, max(5.0, 0.02 * state.time_limit_s))
        window = search.grow(search.budget(width), width, _NUM_SEEDS[turn % len(_NUM_SEEDS)])
        gain = search.solve_window(window, patience_s)
        search.note(width, state.elapsed_s() - before_s, patience_s)
        if gain > 0:
            state.offer(search.graph, search.memory.vertices, search.chosen)


def _proof_phase(
    state: _State,
    graph: ShardingGraph,
    rows: MemoryRows,
    dual: DualAscent,
    threads: int,
    share: float,
    most_pairs: int = _SMALL_PAIRS,
) -> bool:
    """Drop what cannot be in a better answer, reduce, and close the rest by an ILP if small."""
    state.phase = "prove"
    deadline_s = time.perf_counter() + share * max(0.0, state.left_s())
    small = copy.deepcopy(graph)
    bound, excess = dual.excess_costs()
    if state.answer is not None:
        # Whole costs: only an answer cheaper by one is better. Rounding errors stay on the safe side.
        target = state.objective - (0.9 if state.integral else 0.0) + 1e-9 * abs(bound)
        for u, row in zip(dual.vertices, excess, strict=True):
            kept = np.flatnonzero(bound + row <= target)
            if len(kept) < len(row):
                small.keep(u, kept)
    small_rows = rows if small.infeasible else reduce_graph(small, rows, state.out_of_time)
    if small.infeasible:
        return _nothing_better(state)
    if count_pairs(small) > most_pairs:
        return False
    memory = MemoryMatrix(small, small_rows)
    result = solve_exactly(
        small,
        small_rows,
        memory,
        active=set(),
        deadline_s=deadline_s,
        relative_gap=state.gap,
        threads=threads,
    )
    if result.infeasible:
        return _nothing_better(state)
    if result.chosen is not None:
        state.offer(small, memory.vertices, result.chosen)
    # The pruned problem holds every answer better than the incumbent, and nothing else is promised.
    state.raise_bound(min(result.bound, state.objective))
    return False


def _nothing_better(state: _State) -> bool:
    """The pruned problem is empty: the incumbent is optimal, or there is no answer at all."""
    if state.answer is None:
        return True
    state.bound = state.objective
    state.tell()
    return False


def _conclude(state: _State, infeasible: bool) -> Solved[list[int]]:
    seconds = state.elapsed_s()
    if infeasible:
        note = "no choice of strategies is possible within the memory limit"
        return Solved("infeasible", None, None, None, seconds, None, None, note)
    bound = state.bound if math.isfinite(state.bound) else None
    if state.answer is None:
        return Solved("unknown", None, bound, None, seconds, "time limit", None)
    verdict = check_sharding(state.problem, state.answer)
    if not verdict.feasible or float(verdict.cost) != state.objective:
        raise VerifyError(
            f"sharding answer of {state.problem.name}: the search says {state.objective}, the "
            f"checker {verdict.cost} with {list(verdict.errors)}; this is a bug, please report it"
        )
    if bound is not None:
        bound = min(bound, state.objective)
    gap = None if bound is None else relative_gap(state.objective, bound)
    status: AnswerStatus = "feasible"
    truncated_by: str | None = "time limit"
    if gap is not None and gap <= OPTIMALITY_TOLERANCE:
        status, truncated_by = "optimal", None
    elif gap is not None and gap <= state.gap:
        truncated_by = "gap"
    return Solved(status, state.objective, bound, gap, seconds, truncated_by, state.answer)
