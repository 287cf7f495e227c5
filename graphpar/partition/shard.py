"""Solve a sharding problem: reduce, bound, search, prove; stop at any time with what there is.

1. Exact reductions (`reduce`).
2. Dual ascent (`shard_dual`): a lower bound, memory prices, and roundings that are first answers.
3. Local search (`shard_local`) from the best rounding: windows solved by message passing, and tree
   moves; in a thread of its own where there is a second core, while
4. strategies whose reduced cost passes the gap are dropped, the rest is reduced again, and if it
   became small one ILP closes the gap (`shard_exact`); and
5. windows are solved exactly (`shard_search`), the dual goes on rising.

Everything an answer's cost and memory depend on is recomputed from the file by `shard_check`, for every
answer that is taken (`State.take`, the one way in).
"""

import contextlib
import math
import os
import time

import numpy as np

from graphpar.partition.answers import (
    AnswerStatus,
    ProgressCallback,
    Solved,
    ignore_progress,
    relative_gap,
)
from graphpar.partition.clock import OutOfTimeError, ShouldStop, never
from graphpar.partition.jit import COMPILED
from graphpar.partition.number_rows import are_whole
from graphpar.partition.problems import ShardingProblem
from graphpar.partition.reduce import reduce_problem
from graphpar.partition.shard_ahead import better_choice
from graphpar.partition.shard_first import first_choice
from graphpar.partition.shard_graph import IntArray, MemoryRows, ShardingGraph
from graphpar.partition.shard_memory import MemoryMatrix
from graphpar.partition.shard_plain import plain_bound, plain_choice
from graphpar.partition.shard_raw import RawProblem, raw_problem
from graphpar.partition.shard_run import Run
from graphpar.partition.shard_state import Candidate, State
from graphpar.partition.shard_trim import Trimmed, trim
from graphpar.partition.shard_warm import (
    Stage,
    begin_warming,
    go_on_warming,
    is_compiling,
    warm_up,
)
from graphpar.partition.solver import OPTIMALITY_TOLERANCE
from graphpar.partition.why_impossible import why_no_strategies

_REDUCTIONS_SHARE = 0.5
"""Share of the time limit after which the reductions are cut short."""

_COMPILER_SHARE, _COMPILER_S = 0.05, 0.5
"""Share of the time limit that a step waits for its compiled loops. Those of large problems are asked for
while the file is read, and waited for so many seconds at most."""

_FIRST_SHARE, _LARGEST_SHARE = 0.2, 0.7
"""Shares of the time limit that a first answer to a large problem waits for its compiled loops."""

_BETTER_SHARE = 0.1
"""Share of the time limit in which better ones are looked for before the reductions."""

_LARGEST_PAIRS = 1_000_000
"""Pairs from which compiling them takes less time than the reductions before any other answer."""

_INSTANT_PAIRS = 20_000
"""Pairs up to which reductions, a first answer and a first bound take well under a second."""

_NOT_WARM = (
    "the search was still being compiled, as happens once for each installation; "
    "run again for a better answer"
)

NOT_COMPILED = "numba is not installed, so the search ran some hundred times slower than it could"


def solve_sharding(
    problem: ShardingProblem,
    *,
    time_limit_s: float = 60.0,
    gap: float = 0.0,
    threads: int | None = None,
    seed: int = 0,
    progress: ProgressCallback = ignore_progress,
) -> Solved[list[int]]:
    """The best strategies found within the time limit, with a true lower bound.

    Args:
        problem: What to solve.
        time_limit_s: Wall-clock limit; the answer comes back within a tenth more.
        gap: Stop once the proven relative gap is this small.
        threads: Threads to search with; None for two where the machine has as many cores.
        seed: Seed of the search's random choices.
        progress: Called whenever the incumbent or the bound improves.

    Raises:
        ValueError: A limit is out of range.
    """
    if not time_limit_s > 0:
        raise ValueError(f"time_limit_s must be positive, got {time_limit_s}")
    if not gap >= 0:
        raise ValueError(f"gap must not be negative, got {gap}")
    if threads is None:
        threads = min(2, os.cpu_count() or 1)
    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    state = State(
        problem,
        time.perf_counter(),
        time_limit_s,
        max(gap, OPTIMALITY_TOLERANCE),
        progress,
    )
    infeasible = False
    with contextlib.suppress(OutOfTimeError):
        infeasible = _search(state, threads, seed)
    return _conclude(state, infeasible)


def _search(state: State, threads: int, seed: int) -> bool:
    """All phases; returns whether infeasibility was proven. Raises OutOfTimeError at any point."""
    raw = _raw(state)
    _instant_answer(state, raw)
    _wait_for(Stage.REDUCE, state, raw)
    state.integral = are_whole(state.problem.node_costs) and are_whole(state.problem.edge_costs)
    # What takes no time is done even if the clock says otherwise: the machine may have stood still.
    clock = never if state.problem.num_pairs <= _INSTANT_PAIRS else state.out_of_time
    graph, rows = reduce_problem(
        state.problem,
        lambda: state.left_s() < (1.0 - _REDUCTIONS_SHARE) * state.time_limit_s,
        clock,
        _trimmed(state, raw),
    )
    if graph.infeasible:
        return True
    if not graph.costs:
        state.offer(Candidate(graph, [], np.zeros(0, dtype=np.intp), graph.constant), at_once=True)
        state.raise_bound(graph.constant)
        return False
    first = None
    if state.answer is None or not _wait_for(Stage.BOUND, state, raw):
        first = _plain_answer(state, graph, rows, clock)
    if state.answer is None:
        _instant_answer(state, raw)  # its loops may be compiled by now
    go_on_warming()
    if not warm_up(Stage.BOUND, state.left_s()):
        return False
    run = Run(state, graph, rows, threads, seed)
    run.take_answer()
    if first is not None:
        run.take_rounding(first)
    try:
        return run.improve()
    finally:
        run.stop()


def _raw(state: State) -> RawProblem | None:
    """The arrays of a problem large enough for loops over them to pay."""
    if state.problem.num_pairs <= _INSTANT_PAIRS or not COMPILED or state.out_of_time():
        return None
    begin_warming()
    return raw_problem(state.problem, state.out_of_time)


def _wait_for(stage: Stage, state: State, raw: RawProblem | None) -> bool:
    """Wait a little for a stage to be compiled; returns whether it is."""
    most_s = _COMPILER_SHARE * state.time_limit_s
    if raw is not None:
        most_s = min(most_s, _COMPILER_S)
    return warm_up(stage, min(most_s, state.left_s()))


def _instant_answer(state: State, raw: RawProblem | None) -> None:
    """An answer to a large problem before anything long begins, if the compiler is there in time."""
    if raw is None:
        return
    share = _LARGEST_SHARE if state.problem.num_pairs >= _LARGEST_PAIRS else _FIRST_SHARE
    if warm_up(Stage.FIRST, min(share * state.time_limit_s, state.left_s())):
        state.phase = "first answer"
        answer = first_choice(raw, state.out_of_time)
        if answer is not None:
            state.take(answer)
        most_s = (_FIRST_SHARE if answer is None else _BETTER_SHARE) * state.time_limit_s
        end_s = state.elapsed_s() + min(most_s, 0.5 * state.left_s())
        better = better_choice(raw, answer, lambda: state.elapsed_s() > end_s)
        if better is not None:
            state.take(better)


def _trimmed(state: State, raw: RawProblem | None) -> Trimmed | None:
    """What is left of a large problem without looking at its graph, if the compiler is there in time."""
    if raw is None or not _wait_for(Stage.TRIM, state, raw):
        return None
    state.phase = "reduce"
    return trim(raw, state.out_of_time)


def _plain_answer(
    state: State, graph: ShardingGraph, rows: MemoryRows, clock: ShouldStop
) -> IntArray | None:
    """A first answer, if there is none, and bound; at first the better ones wait for the compiler."""
    state.phase = "first answer"
    if state.answer is not None:
        state.raise_bound(plain_bound(graph, clock))
        return None
    memory = MemoryMatrix(graph, rows, clock)
    chosen = plain_choice(graph, memory, clock)
    if chosen is not None:
        choice = {u: int(i) for u, i in zip(memory.vertices, chosen, strict=True)}
        state.offer(Candidate(graph, memory.vertices, chosen, graph.value(choice)), at_once=True)
    state.raise_bound(plain_bound(graph, clock))
    return chosen


def _conclude(state: State, infeasible: bool) -> Solved[list[int]]:
    note = "" if COMPILED else NOT_COMPILED
    seconds = state.elapsed_s()
    if infeasible:
        note = why_no_strategies(state.problem)
        return Solved("infeasible", None, None, None, seconds, None, None, note)
    bound = state.bound if math.isfinite(state.bound) else None
    if is_compiling() and not state.closed():
        note = _NOT_WARM
    if state.answer is None:
        return Solved("unknown", None, bound, None, seconds, "time limit", None, note)
    if bound is not None:
        bound = min(bound, state.objective)
    gap = None if bound is None else relative_gap(state.objective, bound)
    status: AnswerStatus = "feasible"
    truncated_by: str | None = "time limit"
    if gap is not None and gap <= OPTIMALITY_TOLERANCE:
        status, truncated_by = "optimal", None
    elif gap is not None and gap <= state.gap:
        truncated_by = "gap"
    elif state.left_s() > 0:
        truncated_by = "rounding"
    seconds = state.elapsed_s()
    return Solved(status, state.objective, bound, gap, seconds, truncated_by, state.answer, note)
