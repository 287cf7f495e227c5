"""Sharding against brute force: reductions, dual bounds, windows and the whole solver."""

import json
import pkgutil
import threading
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
from amounts import examples
from hypothesis import example, given, settings
from hypothesis import strategies as st
from small_problems import best_sharding, ring, sharding_problems

from graphpar.partition.answers import Progress
from graphpar.partition.jit import COMPILED
from graphpar.partition.number_rows import Rows, parse_rows
from graphpar.partition.problems import IMPOSSIBLE_COST as NO
from graphpar.partition.problems import ShardingProblem
from graphpar.partition.sharding import reduce_loops
from graphpar.partition.sharding import run as shard_run
from graphpar.partition.sharding import search as shard_search
from graphpar.partition.sharding import solve as shard
from graphpar.partition.sharding import start as shard_start
from graphpar.partition.sharding import whole as shard_whole
from graphpar.partition.sharding.ahead import better_choice
from graphpar.partition.sharding.check import check_sharding
from graphpar.partition.sharding.condense import condense
from graphpar.partition.sharding.core import core_choice
from graphpar.partition.sharding.dual import DualAscent
from graphpar.partition.sharding.exact import solve_exactly
from graphpar.partition.sharding.first import first_choice
from graphpar.partition.sharding.graph import ShardingGraph
from graphpar.partition.sharding.ilp import merge_classes
from graphpar.partition.sharding.memory import spread_peaks
from graphpar.partition.sharding.plain import plain_bound
from graphpar.partition.sharding.raw import raw_problem
from graphpar.partition.sharding.reduce import reduce_problem
from graphpar.partition.sharding.search import WindowSearch
from graphpar.partition.sharding.solve import solve_sharding
from graphpar.partition.sharding.state import State
from graphpar.partition.sharding.trim import trim
from graphpar.partition.sharding.warm import Stage


@settings(max_examples=examples(150), deadline=None)
@given(sharding_problems())
def test_the_solver_finds_the_optimum_and_proves_it(problem: ShardingProblem) -> None:
    best = best_sharding(problem)
    solved = solve_sharding(problem, time_limit_s=300)
    if best is None:
        assert (solved.status, solved.answer) == ("infeasible", None)
        return
    assert (solved.status, solved.objective, solved.truncated_by) == ("optimal", best, None)
    assert solved.answer is not None
    assert check_sharding(problem, solved.answer).feasible


@pytest.mark.parametrize(
    ("costs", "usages", "edges", "limit", "words"),
    [
        (((1, 2), (NO, NO)), ((0, 0), (0, 0)), {}, 8, "node 1 has nothing but impossible costs"),
        (((1, 2), (1, 2)), ((0, 0), (0, 0)), {(0, 1): (NO,) * 4}, 8, "edge 0 has nothing but impossible"),
        (((NO, 2), (1, 2)), ((0, 0), (0, 0)), {(0, 1): (0, 0, NO, NO)}, 8, "whatever memory there is"),
        (((NO, 2), (1, 2)), ((0, 0), (0, 0)), {(0, 1): (0, 0, NO, NO)}, None, "whatever memory there is"),
        (((NO, 2), (1, 2)), ((0, 6), (3, 4)), {}, 8, "hold 9 at time 1, above the memory limit 8"),
        (((1, 2), (1, 2)), ((0, 6), (0, 6)), {(0, 1): (NO, 0, 0, 0)}, 5, "within the memory limit 5 has"),
    ],
)
def test_why_nothing_is_possible_is_said(
    costs: Rows,
    usages: Rows,
    edges: dict[tuple[int, ...], tuple[int, ...]],
    limit: int | None,
    words: str,
) -> None:
    intervals = ((0, 2), (1, 3))
    problem = ShardingProblem(
        "none", intervals, costs, usages, tuple(edges), tuple(edges.values()), limit
    )
    solved = solve_sharding(problem)
    assert solved.status == "infeasible"
    assert words in solved.note


def test_a_ring_that_no_choice_closes_is_impossible() -> None:
    """Each goes on by one or two of seven, so that after three of them nobody is back."""
    table = tuple(0 if (j - i) % 7 in (1, 2) else NO for i in range(7) for j in range(7))
    rows = ((0,) * 7,) * 3
    edges = (0, 1), (1, 2), (2, 0)
    problem = ShardingProblem("ring", ((0, 1),) * 3, rows, rows, edges, (table,) * 3, None)
    assert solve_sharding(problem).status == "infeasible"


CHEAP_BUT_LARGE = ShardingProblem("memory", ((0, 1),) * 2, ((0, 1),) * 2, ((5, 0),) * 2, (), (), 5)
"""The cheaper strategies of both nodes do not fit together."""


NO_CHOICE_BUT_LARGE = ShardingProblem(
    "no choice",
    ((0, 1),) * 5,
    ((0, 0), (0, 0), (0, 1), (0, 2), (0, 3)),
    ((8, 0), (0, 2), (1, 0), (1, 0), (1, 0)),
    ((0, 1),),
    ((0, NO, NO, 0),),
    3,
)
"""The first two nodes go together, and only with more than each could do with: one is left."""


@settings(max_examples=examples(100), deadline=None)
@given(sharding_problems(), st.booleans())
@example(CHEAP_BUT_LARGE, True)
@example(NO_CHOICE_BUT_LARGE, True)
@example(NO_CHOICE_BUT_LARGE, False)
@example(CHEAP_BUT_LARGE, False)
def test_reductions_keep_the_optimum(problem: ShardingProblem, trims: bool) -> None:
    best = best_sharding(problem)
    begun = None
    if trims:
        raw = raw_problem(problem)
        begun = condense(raw, trim(raw))
    graph, rows = reduce_problem(problem, begun=begun)
    if graph.infeasible:
        assert best is None
        return
    dual = DualAscent(graph, rows)
    result = (
        solve_exactly(graph, rows, dual.memory, active=set(), deadline_s=float("inf"), relative_gap=0.0)
        if graph.costs
        else None
    )
    if result is None:
        answer = graph.expand({}, problem.num_nodes)
    elif result.chosen is None:
        assert result.infeasible
        assert best is None
        return
    else:
        choice = {u: int(i) for u, i in zip(dual.vertices, result.chosen, strict=True)}
        answer = graph.expand(choice, problem.num_nodes)
        assert graph.value(choice) == check_sharding(problem, answer).cost
    assert check_sharding(problem, answer).feasible
    assert check_sharding(problem, answer).cost == best


@settings(max_examples=examples(100), deadline=None)
@given(sharding_problems())
def test_dual_bounds_and_reduced_costs_are_true(problem: ShardingProblem) -> None:
    best = best_sharding(problem)
    graph, rows = reduce_problem(problem)
    if best is None or graph.infeasible or not graph.costs:
        return
    dual = DualAscent(graph, rows)
    for _ in range(6):
        dual.ascend(2)
        assert dual.current_bound() <= best + 1e-6
    bound, excess = dual.excess_costs()
    # a strategy whose reduced cost passes the optimum is in no optimal answer
    result = solve_exactly(
        graph, rows, dual.memory, active=set(), deadline_s=float("inf"), relative_gap=0.0
    )
    assert result.chosen is not None
    for row, strategy in zip(excess, result.chosen, strict=True):
        assert bound + row[strategy] <= best + 1e-6


@settings(max_examples=60, deadline=None)
@given(sharding_problems())
def test_windows_never_lose_and_a_full_one_is_optimal(problem: ShardingProblem) -> None:
    graph, rows = reduce_problem(problem)
    best = best_sharding(problem)
    if best is None or graph.infeasible or not graph.costs:
        return
    dual = DualAscent(graph, rows)
    chosen = dual.round_within_memory()
    if dual.memory.excess(chosen) > 0 or not np.isfinite(
        graph.value({u: int(i) for u, i in zip(dual.vertices, chosen, strict=True)})
    ):
        return
    search = WindowSearch(graph, rows, dual.memory, chosen)
    search.guide(dual.excess_costs()[1])
    draw = np.random.default_rng(1)
    for _ in range(3):
        before = search.cost
        gain = search.solve_window(search.grow(50, 2, 2), 5.0)
        assert search.cost == pytest.approx(before - gain)
        assert gain >= 0
    other = np.array([draw.integers(len(graph.costs[u])) for u in dual.vertices], dtype=np.intp)
    mixtures = [np.array(mixture) for mixture in product(*zip(search.chosen, other, strict=True))]
    fitting = [search.evaluate(mixture) for mixture in mixtures if dual.memory.excess(mixture) <= 0]
    search.combine(other, 10.0)
    assert search.cost == pytest.approx(min(fitting))
    everything = {u: np.arange(len(costs)) for u, costs in graph.costs.items()}
    search.solve_window(everything, 10.0)
    assert search.cost == best


@pytest.mark.parametrize(
    ("slow", "later"),
    [
        ("sharding.reduce.tighten", "sharding.reduce.split_separable"),
        ("sharding.ilp.merge_classes", "solver.MatrixProgram.solve"),
    ],
)
def test_a_window_ends_with_its_time_whatever_it_is_at(
    slow: str, later: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph, rows = reduce_problem(ring(8, seed=1))
    memory = DualAscent(graph, rows).memory
    search = WindowSearch(graph, rows, memory, np.zeros(len(memory.vertices), dtype=np.intp))
    partition, now_s = "graphpar.partition.", [0.0]
    monkeypatch.setattr(shard_search, "time", SimpleNamespace(perf_counter=lambda: now_s[0]))
    step = pkgutil.resolve_name(partition + slow)

    def take_long(*arguments: object) -> object:
        now_s[0] = 100.0
        return step(*arguments)

    def fail(*_: object, **__: object) -> None:
        pytest.fail(f"{later} came after the limit")

    monkeypatch.setattr(partition + slow, take_long)
    monkeypatch.setattr(partition + later, fail)
    everything = {u: np.arange(len(costs)) for u, costs in graph.costs.items()}
    assert search.solve_window(everything, 10.0) == 0.0
    assert now_s == [100.0]


def test_class_merging_rebuilds_the_table() -> None:
    table = np.array([[1.0, 2.0, 9.0], [3.0, 4.0, 11.0], [0.0, np.inf, 5.0]])
    merged = merge_classes(table)
    assert merged.core.shape[0] == 2
    rebuilt = (
        merged.core[np.ix_(merged.row_class, merged.column_class)]
        + merged.row_constant[:, None]
        + merged.column_constant[None, :]
    )
    np.testing.assert_array_equal(rebuilt, table)


def test_peaks_are_spread() -> None:
    assert spread_peaks(np.array([5.0, 6.0, 0.0, 1.0, -2.0, 3.0]), 2) == {1, 5}


def test_a_forced_truncation_is_reported() -> None:
    # The answer and the bound may be those from before the compiler is done, so any limit must do.
    moments: list[Progress] = []
    solved = solve_sharding(ring(60, 0), time_limit_s=1, progress=moments.append)
    assert (solved.status, solved.truncated_by) == ("feasible", "time limit")
    assert solved.objective is not None
    assert solved.bound is not None
    assert solved.bound < solved.objective
    incumbents = [m.incumbent for m in moments if m.incumbent is not None]
    assert incumbents == sorted(incumbents, reverse=True)
    bounds = [m.bound for m in moments if m.bound is not None]
    assert bounds == sorted(bounds)


def test_an_answer_and_a_bound_come_before_anything_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reduce_loops, "_READY", threading.Event())
    for module in (shard_start, shard_whole):
        monkeypatch.setattr(module, "warm_up", lambda stage, most_s: False)
    monkeypatch.setattr(shard, "is_compiling", lambda: True)
    solved = solve_sharding(ring(60, 0), time_limit_s=1e-6)
    assert (solved.status, solved.truncated_by) == ("feasible", "time limit")
    assert solved.objective is not None
    assert solved.bound is not None
    assert 0 < solved.bound < solved.objective
    assert "compiled" in solved.note


@pytest.mark.skipif(not COMPILED, reason="numba is not installed")
def test_no_wait_for_the_compiler_passes_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[tuple[Stage, float]] = []

    def never_ready(stage: Stage, most_s: float) -> bool:
        waited.append((stage, most_s))
        return False

    for module in (shard_start, shard_whole):
        monkeypatch.setattr(module, "warm_up", never_ready)
        monkeypatch.setattr(module, "is_instant", lambda _: False)
    monkeypatch.setattr(shard_start, "_LARGEST_PAIRS", 0)
    monkeypatch.setattr(State, "left_s", lambda self: 0.25 * self.time_limit_s)
    assert solve_sharding(ring(60, 0), time_limit_s=20.0).status == "feasible"
    stages, seconds = zip(*waited, strict=True)
    assert set(stages) == {Stage.FIRST, Stage.REDUCE, Stage.TRIM, Stage.BOUND}
    assert 0 < min(seconds) <= max(seconds) <= 5.0


@settings(max_examples=100, deadline=None)
@given(sharding_problems())
def test_a_small_core_without_limits_is_solved_exactly(problem: ShardingProblem) -> None:
    problem = replace(problem, usage_limit=None)
    best, graph = best_sharding(problem), ShardingGraph.of(problem)
    choice = core_choice(graph) if graph.is_possible() else None
    assert (choice is None) == (best is None)
    assert choice is None or graph.value(choice) == best


@settings(max_examples=50, deadline=None)
@given(sharding_problems())
def test_the_first_bound_is_true(problem: ShardingProblem) -> None:
    best = best_sharding(problem)
    graph, _ = reduce_problem(problem)
    if best is not None:
        assert plain_bound(graph) <= best + 1e-9


@settings(max_examples=examples(150), deadline=None)
@given(sharding_problems())
def test_the_answer_before_reductions_is_feasible(problem: ShardingProblem) -> None:
    raw = raw_problem(problem)
    answer = first_choice(raw)
    better = better_choice(raw, answer)
    if better is not None:
        verdict = check_sharding(problem, better)
        assert verdict.feasible
        assert answer is None or verdict.cost < check_sharding(problem, answer).cost
    if answer is None:
        # Without a memory limit only conflicts of edges can have stopped it, and one edge has none.
        assert (
            problem.usage_limit is not None
            or len(problem.edge_nodes) > 1
            or best_sharding(problem) is None
        )
        return
    assert check_sharding(problem, answer).feasible


@pytest.mark.parametrize("seed", range(3))
def test_a_line_is_answered_best_by_looking_ahead(seed: int) -> None:
    line = replace(ring(40, seed, steps=(1,)), usage_limit=None)
    line = replace(line, edge_nodes=line.edge_nodes[:-1], edge_costs=line.edge_costs[:-1])
    graph, _ = reduce_problem(line)
    answers = [first_choice(raw := raw_problem(line)), better_choice(raw, None)]
    costs = [check_sharding(line, answer).cost for answer in answers if answer is not None]
    assert graph.constant == costs[1] < costs[0]


def test_the_answer_before_reductions_takes_back_what_does_not_fit() -> None:
    # The cheap strategy of 0 leaves 1 only one that is too large, through the pairs possible with 2.
    same = (0, NO, NO, 0)
    problem = ShardingProblem(
        "forced",
        ((0, 1), (0, 1), (0, 1)),
        ((0, 5), (0, 0), (0, 0)),
        ((1, 1), (1, 1), (9, 1)),
        ((0, 1), (2, 1)),
        (same, same),
        3,
    )
    assert first_choice(raw_problem(problem)) == [1, 1, 1]
    assert first_choice(raw_problem(replace(problem, usage_limit=2))) is None


def test_array_operations_answer_as_the_loops_do() -> None:
    reduce_loops.compile_all()
    random = np.random.default_rng(0)
    for _ in range(300):
        table = random.integers(0, 3, random.integers(1, 4, 2)).astype(np.float64)
        if random.random() < 0.3:
            table = table[:, :1] + table[:1]
        table[table == 2] = random.choice([np.inf, 2.0])
        worse = random.choice([np.inf, 0.0, -1.0], (len(table), len(table)))
        answers = []
        for ready in (threading.Event(), reduce_loops._READY):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(reduce_loops, "_READY", ready)
                increased = worse.copy()
                reduce_loops.add_largest_increase(increased, table)
                fitting = worse.copy()
                reduce_loops.forbid_more_memory(fitting, table)
                answers.append(
                    (
                        reduce_loops.any_impossible(table),
                        reduce_loops.is_separable(table),
                        reduce_loops.determined(table),
                        increased.tolist(),
                        fitting.tolist(),
                        reduce_loops.replaceable(fitting).tolist(),
                        [part.tolist() for part in reduce_loops.least_sums(table.T, worse)],
                    )
                )
        assert answers[0] == answers[1]


def test_a_wide_gap_stops_the_search() -> None:
    solved = solve_sharding(ring(60, 0), time_limit_s=60, gap=5.0)
    assert (solved.status, solved.truncated_by) == ("feasible", "gap")


def test_large_costs_stay_exact() -> None:
    problem = ShardingProblem("large", ((0, 1),), ((10**15 + 1, 10**15),), ((1, 1),), (), (), None)
    assert solve_sharding(problem).objective == 10**15


def test_ctrl_c_ends_the_search_with_the_best_answer_if_asked_to() -> None:
    told: list[Progress] = []

    def interrupt(progress: Progress) -> None:
        told.append(progress)
        if progress.incumbent is not None and len(told) == 2:
            raise KeyboardInterrupt

    kept = solve_sharding(ring(60, 0), progress=interrupt, keep_on_interrupt=True)
    assert (kept.status, kept.truncated_by) == ("feasible", "interrupt")
    assert kept.answer is not None
    assert check_sharding(ring(60, 0), kept.answer).cost == kept.objective
    told.clear()
    with pytest.raises(KeyboardInterrupt):
        solve_sharding(ring(60, 0), progress=interrupt)


@pytest.mark.parametrize("limits", [{"time_limit_s": 0.0}, {"gap": -1.0}])
def test_wrong_limits_are_refused(limits: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must"):
        solve_sharding(ring(4, 0), **limits)  # type: ignore[arg-type]


def test_the_proof_phase_alone_closes_a_small_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_run, "_WIDTHS", (1,))
    solved = solve_sharding(ring(7, 3, (1, 2)), time_limit_s=60)
    assert solved.status == "optimal"


@pytest.mark.parametrize("read", [tuple, lambda rows: parse_rows(json.dumps(rows).encode())])
def test_costs_that_round_to_the_impossible_are_possible(read: Callable[..., Rows]) -> None:
    largest = NO - 1
    costs = [[largest, NO], [NO, largest]]
    rows, uses = read(costs), ((0, 0), (0, 0))
    problem = ShardingProblem("large", ((0, 1), (0, 1)), rows, uses, (), (), None)
    solved = solve_sharding(problem, time_limit_s=60)
    assert (solved.status, solved.answer) == ("optimal", [0, 1])


def test_memory_beyond_exact_sums_is_not_said_to_be_too_much() -> None:
    use = 2**53 + 3  # rounds up
    problem = ShardingProblem("large", ((0, 1),) * 3, ((1,),) * 3, ((use,),) * 3, (), (), 3 * use)
    assert solve_sharding(problem, time_limit_s=60).status == "optimal"


@pytest.mark.parametrize("more", [0, 64])
def test_of_costs_that_rounding_makes_alike_one_stays(more: int) -> None:
    """With 10^17 beside it 3 is nothing: each of three strategies seems no worse than the next one."""
    large = 10**17
    problem = ShardingProblem(
        "circle",
        ((0, 1),) * 3,
        ((0, 5), (3, 3, large, 0), (5, 0)),
        ((1, 2), (0, 0, 0, 0), (1, 2)),
        ((0, 1),),
        ((large, large, 0, large, large, large, 3, large + more),),
        3,
    )
    solved = solve_sharding(problem)
    assert (solved.status, solved.objective) == ("optimal", best_sharding(problem))
    worse = np.array([[np.inf, 0.0, 1.0], [1.0, np.inf, 0.0], [0.0, 1.0, np.inf]])
    assert not reduce_loops.replaceable(worse).all()
