"""A sharding search from the reductions on; what comes before is `start`."""

import numpy as np

from graphpar.loading import uncollected
from graphpar.partition.clock import ShouldStop, never
from graphpar.partition.number_rows import are_whole
from graphpar.partition.sharding.condense import condense
from graphpar.partition.sharding.core import core_choice
from graphpar.partition.sharding.graph import IntArray, MemoryRows, ShardingGraph
from graphpar.partition.sharding.memory import MemoryMatrix
from graphpar.partition.sharding.plain import plain_bound, plain_choice
from graphpar.partition.sharding.raw import RawProblem
from graphpar.partition.sharding.reduce import reduce_problem
from graphpar.partition.sharding.run import Run
from graphpar.partition.sharding.start import instant_answer, is_instant, wait_for
from graphpar.partition.sharding.state import Candidate, State
from graphpar.partition.sharding.trim import trim
from graphpar.partition.sharding.warm import Stage, go_on_warming, warm_up

_REDUCTIONS_SHARE = 0.5
"""Share of the time limit after which the reductions are cut short."""


def search_whole(state: State, raw: RawProblem | None, threads: int, seed: int) -> bool:
    """All phases but the first; returns whether infeasibility was proven.

    Raises:
        OutOfTimeError: At any point.
    """
    wait_for(Stage.REDUCE, state, raw)
    state.integral = are_whole(state.problem.node_costs) and are_whole(state.problem.edge_costs)
    # What takes no time is done even if the clock says otherwise: the machine may have stood still.
    is_short = is_instant(state.problem)
    clock = never if is_short else state.out_of_time

    def is_late() -> bool:
        return not is_short and state.left_s() < (1.0 - _REDUCTIONS_SHARE) * state.time_limit_s

    with uncollected():
        begun = _condensed(state, raw)
        graph, rows = reduce_problem(state.problem, is_late, clock, begun)
    if graph.infeasible:
        return True
    core = {} if not graph.costs else core_choice(graph) if not rows.num_rows else None
    if core is not None:
        best, chosen = graph.value(core), np.array(list(core.values()), dtype=np.intp)
        state.offer(Candidate(graph, list(core), chosen, best), at_once=True)
        state.raise_bound(best)
        return False
    first = None
    if state.answer is None or not wait_for(Stage.BOUND, state, raw):
        first = _plain_answer(state, graph, rows, clock)
    if state.answer is None:
        instant_answer(state, raw)  # its loops may be compiled by now
    go_on_warming()
    if not warm_up(Stage.BOUND, state.left_s()):
        return False
    with uncollected():
        run = Run(state, graph, rows, threads, seed)
    run.take_answer()
    if first is not None:
        run.take_rounding(first)
    try:
        return run.improve()
    finally:
        run.stop()


def _condensed(state: State, raw: RawProblem | None) -> tuple[ShardingGraph, set[int]] | None:
    """What compiled loops leave of a large problem, if the compiler is there in time."""
    if raw is None or not wait_for(Stage.TRIM, state, raw):
        return None
    state.phase = "reduce"
    return condense(raw, trim(raw, state.out_of_time), state.out_of_time)


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
