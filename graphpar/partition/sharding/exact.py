"""The whole reduced sharding problem as one ILP, with memory rows added when broken.

Leaving rows out relaxes the problem, so every round's dual bound holds for the whole problem; an
answer that breaks no row is an answer to the whole problem.
"""

import time
from dataclasses import dataclass

import numpy as np

from graphpar.partition.clock import OutOfTimeError
from graphpar.partition.sharding.graph import IntArray, MemoryRows, ShardingGraph
from graphpar.partition.sharding.ilp import build_program
from graphpar.partition.sharding.memory import MemoryMatrix, spread_peaks

_ROWS_PER_ROUND = 8
"""Violated rows added at a time, spread over the peaks of the memory profile."""

_LEAST_SOLVING_S = 0.1
"""Time below which no ILP is begun."""


@dataclass(frozen=True, eq=False)
class ExactResult:
    """The best choice that fits (None if none was found), the best bound, and infeasibility."""

    chosen: IntArray | None
    bound: float
    infeasible: bool


def solve_exactly(
    graph: ShardingGraph,
    rows: MemoryRows,
    memory: MemoryMatrix,
    *,
    active: set[int],
    deadline_s: float,
    relative_gap: float,
    threads: int = 1,
) -> ExactResult:
    """Solve to the gap asked for or until the deadline (a `time.perf_counter` moment)."""
    if not graph.costs:  # the reductions left no choice
        chosen = np.zeros(0, dtype=np.intp)
        fits = (memory.usage(chosen) - rows.limit).max(initial=0.0) <= 0
        return ExactResult(chosen if fits else None, float(graph.constant), not fits)

    def is_over() -> bool:
        return time.perf_counter() > deadline_s - _LEAST_SOLVING_S

    active, bound = set(active), -np.inf
    while not is_over():
        try:
            built = build_program(graph, rows, active, should_stop=is_over)
        except OutOfTimeError:
            break
        left_s = max(0.5 * _LEAST_SOLVING_S, deadline_s - time.perf_counter())
        outcome = built.program.solve(time_limit_s=left_s, relative_gap=relative_gap, threads=threads)
        if outcome.status == "infeasible":
            return ExactResult(None, bound, True)
        if outcome.bound is not None:
            bound = max(bound, outcome.bound)
        if not outcome.has_point:
            break
        choice = built.choice(outcome.values, graph)
        chosen = np.array([choice[u] for u in memory.vertices], dtype=np.intp)
        over = memory.usage(chosen) - rows.limit
        if over.max(initial=0.0) <= 0:
            return ExactResult(chosen, bound, False)
        fresh = spread_peaks(over, _ROWS_PER_ROUND) - active
        if not fresh:
            break
        active |= fresh
    return ExactResult(None, bound, False)
