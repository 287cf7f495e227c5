"""The beginning of a sharding search: a first answer from the file's numbers, before anything long.

It needs little of the engine. What else there is loads and compiles meanwhile or afterwards.
"""

from graphpar.partition.jit import COMPILED
from graphpar.partition.problems import ShardingProblem
from graphpar.partition.sharding.ahead import better_choice
from graphpar.partition.sharding.first import first_choice
from graphpar.partition.sharding.raw import RawProblem, raw_problem
from graphpar.partition.sharding.state import State
from graphpar.partition.sharding.warm import Stage, begin_warming, warm_up

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
_FOLDED_NODES, _FOLDED_EDGES, _FOLDED_PAIRS = 500, 5_000, 1_000_000
"""Most pairs of an instant problem, and of one of few nodes and edges without a limit of memory, as the
folded blocks of a model are. Each edge takes time as well, however few its pairs are."""


def is_instant(problem: ShardingProblem) -> bool:
    """Whether reductions, a first answer and a first bound take well under a second."""
    few = problem.num_nodes <= _FOLDED_NODES and len(problem.edge_nodes) <= _FOLDED_EDGES
    folded = problem.usage_limit is None and few
    return problem.num_pairs <= (_FOLDED_PAIRS if folded else _INSTANT_PAIRS)


def raw_arrays(state: State) -> RawProblem | None:
    """The arrays of a problem large enough for loops over them to pay."""
    if is_instant(state.problem) or not COMPILED or state.out_of_time():
        return None
    begin_warming()
    return raw_problem(state.problem, state.out_of_time)


def wait_for(stage: Stage, state: State, raw: RawProblem | None) -> bool:
    """Wait a little for a stage to be compiled; returns whether it is."""
    most_s = _COMPILER_SHARE * state.time_limit_s
    if raw is not None:
        most_s = min(most_s, _COMPILER_S)
    return warm_up(stage, min(most_s, state.left_s()))


def instant_answer(state: State, raw: RawProblem | None) -> None:
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
