"""Solve a sharding problem: reduce, bound, search, prove; stop at any time with what there is.

1. Exact reductions (`reduce`).
2. Dual ascent (`dual`): a lower bound, memory prices, and roundings that are first answers.
3. Local search (`local`) from the best rounding: windows solved by message passing, and tree
   moves; in a thread of its own where there is a second core, while
4. strategies whose reduced cost passes the gap are dropped, the rest is reduced again, and if it
   became small one ILP closes the gap (`exact`); and
5. windows are solved exactly (`search`), the dual goes on rising.

Everything an answer's cost and memory depend on is recomputed from the file by `check`, for every
answer that is taken (`State.take`, the one way in).
"""

import math
import os
import time

from graphpar.partition.answers import (
    INTERRUPT,
    OPTIMALITY_TOLERANCE,
    AnswerStatus,
    ProgressCallback,
    Solved,
    ignore_progress,
    relative_gap,
)
from graphpar.partition.clock import OutOfTimeError
from graphpar.partition.jit import COMPILED
from graphpar.partition.problems import ShardingProblem
from graphpar.partition.sharding.start import instant_answer, raw_arrays
from graphpar.partition.sharding.state import State
from graphpar.partition.sharding.warm import is_compiling

_NOT_WARM = (
    "the search was still being compiled, as happens once for each installation; "
    "run again for a better answer"
)

_LONGEST_S = 1e6
"""Longer limits, of which shares would never end, count as this one."""

NOT_COMPILED = "numba cannot be imported, so the search ran some hundred times slower than it could"


def solve_sharding(
    problem: ShardingProblem,
    *,
    time_limit_s: float = 60.0,
    gap: float = 0.0,
    threads: int | None = None,
    seed: int = 0,
    progress: ProgressCallback = ignore_progress,
    keep_on_interrupt: bool = False,
) -> Solved[list[int]]:
    """The best strategies found within the time limit, with a true lower bound.

    Args:
        problem: What to solve.
        time_limit_s: Wall-clock limit; the answer comes back within a tenth more.
        gap: Stop once the proven relative gap is this small.
        threads: Threads to search with; None for two where the machine has as many cores.
        seed: Seed of the search's random choices.
        progress: Called whenever the incumbent or the bound improves.
        keep_on_interrupt: Whether Ctrl-C ends the search as the time limit does, instead of being raised.

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
        min(time_limit_s, _LONGEST_S),
        max(gap, OPTIMALITY_TOLERANCE),
        progress,
    )
    infeasible = interrupted = False
    try:
        infeasible = _search(state, threads, seed)
    except OutOfTimeError:
        pass
    except KeyboardInterrupt:
        if not keep_on_interrupt:
            raise
        interrupted = True
        state.settle()
    return _conclude(state, infeasible, INTERRUPT if interrupted else "time limit")


def _search(state: State, threads: int, seed: int) -> bool:
    """All phases; returns whether infeasibility was proven. Raises OutOfTimeError at any point."""
    raw = raw_arrays(state)
    instant_answer(state, raw)
    # Loaded late: a first answer needs none of the reductions, the search and the solver.
    from graphpar.partition.sharding.whole import search_whole

    return search_whole(state, raw, threads, seed)


def _conclude(state: State, infeasible: bool, ended_by: str) -> Solved[list[int]]:
    note = "" if COMPILED else NOT_COMPILED
    seconds = state.elapsed_s()
    if infeasible:
        from graphpar.partition.why_impossible import why_no_strategies

        note = why_no_strategies(state.problem)
        return Solved("infeasible", None, None, None, seconds, None, None, note)
    bound = state.bound if math.isfinite(state.bound) else None
    if is_compiling() and not state.closed():
        note = _NOT_WARM
    if state.answer is None:
        return Solved("unknown", None, bound, None, seconds, ended_by, None, note)
    if bound is not None:
        bound = min(bound, state.objective)
    gap = None if bound is None else relative_gap(state.objective, bound)
    status: AnswerStatus = "feasible"
    truncated_by: str | None = ended_by
    if gap is not None and gap <= OPTIMALITY_TOLERANCE:
        status, truncated_by = "optimal", None
    elif gap is not None and gap <= state.gap:
        truncated_by = "gap"
    elif state.left_s() > 0 and ended_by != INTERRUPT:
        truncated_by = "rounding"
    seconds = state.elapsed_s()
    return Solved(status, state.objective, bound, gap, seconds, truncated_by, state.answer, note)
