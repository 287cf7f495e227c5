"""The compiled loops of the sharding search against plain arithmetic."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_problems import best_sharding, ring, sharding_problems

from graphpar.errors import GraphparError
from graphpar.partition import jit
from graphpar.partition.clock import OutOfTimeError
from graphpar.partition.jit import COMPILED
from graphpar.partition.problems import ShardingProblem
from graphpar.partition.sharding import reduce_loops
from graphpar.partition.sharding import start as shard_start
from graphpar.partition.sharding import warm as shard_warm
from graphpar.partition.sharding import whole as shard_whole
from graphpar.partition.sharding.check import check_sharding
from graphpar.partition.sharding.dual import DualAscent
from graphpar.partition.sharding.flat import flat_cost, flatten
from graphpar.partition.sharding.fuse import fuse
from graphpar.partition.sharding.graph import ShardingGraph
from graphpar.partition.sharding.local import LocalSearch
from graphpar.partition.sharding.memory import MemoryMatrix, memory_rows
from graphpar.partition.sharding.moves import add_range, excess_tree, max_range
from graphpar.partition.sharding.plain import plain_choice
from graphpar.partition.sharding.reduce import reduce_graph, reduce_problem
from graphpar.partition.sharding.reduce_loops import add_largest_increase, determined, is_separable
from graphpar.partition.sharding.solve import solve_sharding
from graphpar.partition.sharding.state import State
from graphpar.partition.sharding.warm import Stage
from graphpar.partition.sharding.windows import sort_up


@st.composite
def range_updates(draw: st.DrawFn) -> tuple[int, list[tuple[int, int, int]]]:
    rows = draw(st.integers(1, 40))
    ends = st.integers(0, rows - 1)
    updates = draw(st.lists(st.tuples(ends, ends, st.integers(-9, 9)), max_size=12))
    return rows, [(min(a, b), max(a, b) + 1, amount) for a, b, amount in updates]


@settings(deadline=None)
@given(range_updates())
def test_the_segment_tree_knows_the_largest_excess(case: tuple[int, list[tuple[int, int, int]]]) -> None:
    rows, updates = case
    plain = np.array([7.0 * row % 5 for row in range(rows)], dtype=np.float64)
    top, lazy = excess_tree(plain)
    for first, last, amount in updates:
        plain[first:last] += amount
        add_range(top, lazy, first, last, float(amount))
        assert top[1] == plain.max()
        assert max_range(top, lazy, first, last) == plain[first:last].max()
        assert max_range(top, lazy, 0, rows) == plain.max()


tables = st.lists(
    st.lists(st.sampled_from([0.0, 1.0, 2.0, np.inf]), min_size=3, max_size=3), min_size=1, max_size=4
).map(np.array)


@settings(deadline=None)
@given(tables)
def test_questions_about_tables_agree_with_arrays(table: np.ndarray) -> None:
    possible = np.isfinite(table)
    expected = (possible.sum(axis=1) == 1).all() + 2 * (possible.sum(axis=0) == 1).all()
    assert determined(table) == expected
    sums = table[:, :1] + (table[:1] - table[0, 0]) if possible.all() else np.full(table.shape, np.nan)
    assert is_separable(table) == np.array_equal(table, sums)
    worse = np.zeros((len(table), len(table)))
    add_largest_increase(worse, table)
    for a, present in enumerate(table):
        for b, other in enumerate(table):
            asked = [y - x for x, y in zip(present, other, strict=True) if x < np.inf]
            assert worse[a, b] == max(asked, default=-np.inf)


@settings(deadline=None)
@given(sharding_problems())
def test_equal_tables_lie_there_once(problem: ShardingProblem) -> None:
    graph = ShardingGraph.of(problem)
    if graph.infeasible:
        return
    memory = MemoryMatrix(graph, memory_rows(problem))
    flat = flatten(graph, memory)
    tables = [table for u in memory.vertices for table in graph.tables[u].values()]
    for table, at in zip(tables, flat.edge_table, strict=True):
        entries = flat.pairs[at : at + table.size].reshape(table.shape)
        assert np.array_equal(entries[np.isfinite(table)], table[np.isfinite(table)])
    assert len(flat.pairs) == sum(map(len, {tuple(table.ravel()) for table in tables}))


@settings(max_examples=60, deadline=None)
@given(sharding_problems(), st.integers(0, 3))
def test_local_search_keeps_its_books(problem: ShardingProblem, seed: int) -> None:
    """Cost, memory and feasibility are what the graph says, and the choice never gets worse."""
    graph, rows = reduce_problem(problem)
    if graph.infeasible or not graph.costs:
        return
    dual = DualAscent(graph, rows)
    dual.ascend(2)
    search = LocalSearch(dual, dual.round_within_memory(), seed)
    best = best_sharding(problem)
    cost = np.inf
    for _ in range(6):
        search.step(1e-3)
        assert search.cost <= cost
        cost = search.cost
    if cost == np.inf:
        return
    assert dual.memory.excess(search.best) <= 0
    choice = {u: int(i) for u, i in zip(dual.vertices, search.best, strict=True)}
    value = graph.value(choice)
    if np.isfinite(value):
        assert cost == pytest.approx(value)
        assert flat_cost(dual.flat, search.best) + graph.constant == pytest.approx(value)
        assert best is not None
        assert value >= best


@settings(max_examples=60, deadline=None)
@given(sharding_problems(), st.integers(0, 99))
def test_of_two_choices_the_better_parts_are_taken(problem: ShardingProblem, seed: int) -> None:
    graph, rows = reduce_problem(problem, lambda: True)
    if graph.infeasible or not graph.costs:
        return
    dual = DualAscent(graph, rows)
    memory, flat = dual.memory, dual.flat
    own, other = (np.random.default_rng([seed, k]).integers(0, np.diff(flat.start)) for k in range(2))
    fits = memory.excess(own) <= 0
    # A choice that does not fit may stand for any that does, were there more memory.
    room = memory.limit if fits else memory.usage(own)
    x = own.copy()
    top, lazy = excess_tree(memory.usage(x) - room)
    fused = fuse(flat, x, other, top, lazy)
    assert ((x == own) | (x == other)).all()
    assert (memory.usage(x) - room).max(initial=0.0) <= 1e-9 * room.max(initial=1.0)
    assert fused == bool((x != own).any())
    before, after = flat_cost(flat, own), flat_cost(flat, x)
    assert after <= before + 1e-9 * abs(before)
    if not rows.num_rows:
        assert after <= flat_cost(flat, other) + 1e-9 * abs(before)


@settings(max_examples=60, deadline=None)
@given(sharding_problems())
def test_a_copy_is_reduced_without_touching_the_graph(problem: ShardingProblem) -> None:
    graph, rows = reduce_problem(problem, lambda: True)
    if graph.infeasible or not graph.costs:
        return
    before = repr(graph), {u: costs.copy() for u, costs in graph.costs.items()}
    members = {u: len(held) for u, held in graph.members.items()}
    reduce_graph(graph.copy(), rows)
    assert repr(graph) == before[0]
    assert {u: len(held) for u, held in graph.members.items()} == members
    for u, costs in graph.costs.items():
        np.testing.assert_array_equal(costs, before[1][u])


@settings(max_examples=100, deadline=None)
@given(sharding_problems())
def test_a_plain_choice_is_an_answer(problem: ShardingProblem) -> None:
    graph, rows = reduce_problem(problem, lambda: True)
    if graph.infeasible:
        return
    memory = MemoryMatrix(graph, rows)
    chosen = plain_choice(graph, memory)
    if chosen is not None:
        assert memory.excess(chosen) == 0
        choice = {u: int(i) for u, i in zip(memory.vertices, chosen, strict=True)}
        verdict = check_sharding(problem, graph.expand(choice, problem.num_nodes))
        assert verdict.feasible
        assert verdict.cost == graph.value(choice)


@settings(deadline=None)
@given(st.lists(st.integers(-9, 9), max_size=30))
def test_sorting_sorts(values: list[int]) -> None:
    array = np.array(values, dtype=np.int64)
    sort_up(array)
    assert array.tolist() == sorted(values)


def line(length: int) -> ShardingProblem:
    return ShardingProblem(
        "line",
        tuple((i, i + 2) for i in range(length)),
        tuple((3, i % 5) for i in range(length)),
        ((1, 2),) * length,
        tuple((i, i + 1) for i in range(length - 1)),
        ((0, 4, 2, 1),) * (length - 1),
        4,
    )


def test_many_edges_are_not_done_in_no_time() -> None:
    """Where all was done whatever the clock said, 120,000 edges took three times a limit of a second."""
    nodes, pairs = 120, tuple((i, j) for i in range(120) for j in range(i))
    none = ((0, 1),) * nodes, ((0, 0),) * nodes, ((0, 0),) * nodes
    few = ShardingProblem("few", *none, pairs[:5000], ((0, 1, 1, 0),) * 5000, None)
    many = ShardingProblem("many", *none, pairs, ((0, 1, 1, 0),) * len(pairs), None)
    assert few.num_pairs == 20_000 and shard_start.is_instant(few)
    assert not shard_start.is_instant(many)


def test_out_of_time_before_anything_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(State, "out_of_time", lambda _: True)
    for module in (shard_start, shard_whole):
        monkeypatch.setattr(module, "is_instant", lambda _: False)
    solved = solve_sharding(line(9))
    assert (solved.status, solved.truncated_by, solved.answer) == ("unknown", "time limit", None)


@pytest.mark.skipif(not COMPILED, reason="numba is not installed")
def test_a_limit_shorter_than_the_compiler_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """The array operations alone still give an answer, and what was missing is said."""
    compiler = shard_warm._Compiler()
    monkeypatch.setattr(compiler, "run", compiler.ready[Stage.REDUCE].set)
    monkeypatch.setattr(shard_warm, "_COMPILER", compiler)
    solved = solve_sharding(ring(60, 0), time_limit_s=1.0)
    assert (solved.status, solved.truncated_by) == ("feasible", "time limit")
    assert "compiled" in solved.note


@pytest.mark.skipif(not COMPILED, reason="numba is not installed")
def test_a_compiler_that_fails_is_an_error_and_no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise OSError("No space left on device")

    compiler = shard_warm._Compiler()

    def at_once(*stages: Stage) -> None:
        compiler._queue.put(stages[0])
        compiler.run()

    monkeypatch.setattr(compiler, "ask", at_once)  # a busy machine may be slow to start a thread
    monkeypatch.setattr(shard_warm, "_COMPILER", compiler)
    monkeypatch.setattr(reduce_loops, "compile_all", fail)
    with pytest.raises(GraphparError, match=r"No space left on device.*NUMBA_CACHE_DIR"):
        solve_sharding(line(9), time_limit_s=60)


@pytest.mark.skipif(not COMPILED, reason="numba is not installed")
def test_compiling_needs_no_folder_to_write_to(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, cache: bool = False, **__: object) -> object:
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return lambda function: function

    monkeypatch.setattr(jit, "njit", refuse)
    assert jit.compiled(len) is len


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not COMPILED, reason="numba is not installed")
def test_models_are_traced_while_the_search_is_compiled(tmp_path: Path) -> None:
    """torch.export replaces built-in functions while it traces; the compiler must not meet them."""
    code = (
        "import torch\n"
        "from graphpar.frontend.capture import capture\n"
        "from graphpar.partition.sharding import warm as shard_warm\n"
        "shard_warm.go_on_warming()\n"
        "shard_warm.warm_up(shard_warm.Stage.REDUCE, 0.0)\n"
        "while not shard_warm.warm_up(shard_warm.Stage.SEARCH, 0.0):\n"
        "    capture(torch.nn.Linear(4, 4), (torch.randn(2, 4),), {})\n"
    )
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


@pytest.mark.parametrize("is_there", [False, True])
def test_without_numba_the_answer_is_the_same_and_the_loss_is_said(
    is_there: bool, tmp_path: Path
) -> None:
    # One that is there may refuse a numpy that is newer than it.
    (tmp_path / "numba.py").write_text("raise ImportError('needs another numpy')")
    gone = f"sys.path.insert(0, {str(tmp_path)!r})" if is_there else "sys.modules['numba'] = None"
    code = (
        f"import sys; {gone}\n"
        "from graphpar.partition.problems import ShardingProblem\n"
        "from graphpar.partition.sharding.solve import NOT_COMPILED, solve_sharding\n"
        f"problem = ShardingProblem(*{_fields(line(9))!r})\n"
        "solved = solve_sharding(problem, time_limit_s=20)\n"
        "assert solved.note == NOT_COMPILED\n"
        "print(solved.status, solved.objective)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["optimal", str(float(best_sharding(line(9)) or 0))]


def _fields(problem: ShardingProblem) -> tuple[object, ...]:
    return (
        problem.name,
        problem.intervals,
        problem.node_costs,
        problem.usages,
        problem.edge_nodes,
        problem.edge_costs,
        problem.usage_limit,
    )


def test_the_graph_of_a_problem_can_be_cut_short() -> None:
    with pytest.raises(OutOfTimeError):
        ShardingGraph.of(line(4), lambda: True)
