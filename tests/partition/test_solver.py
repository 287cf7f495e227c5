"""The solver class: statuses with proofs, bounds, duals, both backends."""

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import get_args

import highspy
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from graphpar.partition.clock import work_s
from graphpar.partition.solver import Backend, MatrixProgram, Outcome, Program
from graphpar.partition.solver_growing import Basis, GrowingProgram
from graphpar.partition.solver_matrix import Patience

BACKENDS: tuple[Backend, ...] = get_args(Backend)


def balance(items: int, bins: int) -> Program:
    """A balancing problem too hard to close in a fraction of a second."""
    random = np.random.default_rng(1)
    program = Program("balance")
    load = program.continuous("load")
    put = [[program.binary(f"x{i}.{b}") for b in range(bins)] for i in range(items)]
    for row in put:
        program.constrain([(1.0, x) for x in row], "==", 1.0)
    for b in range(bins):
        sizes = random.uniform(1e3, 1e4, items)
        terms = [(float(size), row[b]) for size, row in zip(sizes, put, strict=True)]
        program.constrain([*terms, (-1.0, load)], "<=", 0.0)
    program.minimize([(1e-9, load)])
    return program


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_time_limit_is_never_called_an_optimum(backend: Backend) -> None:
    expect_cut(balance(60, 12).solve(time_limit_s=0.3, backend=backend))


def test_patience_counts_work_and_is_never_called_an_optimum() -> None:
    began_s = work_s()
    expect_cut(balance(60, 12).arrays().solve(patience=Patience(0.2)))
    assert 0.2 <= work_s() - began_s < 2.0
    began_s = time.monotonic()
    assert Patience(60.0, deadline_s=began_s).is_over
    expect_cut(balance(60, 12).arrays().solve(patience=Patience(60.0, deadline_s=began_s + 0.2)))
    assert time.monotonic() - began_s < 20.0


@pytest.mark.parametrize(
    "solve",
    [
        lambda: balance(60, 12).solve(time_limit_s=20.0),
        lambda: balance(60, 12).arrays().solve(time_limit_s=20.0),
        lambda: balance(60, 12).arrays().solve(patience=Patience(20.0)),
    ],
    ids=["terms", "arrays", "patience"],
)
def test_signals_end_an_integer_programme_and_are_handled(solve: Callable[[], Outcome]) -> None:
    """Ctrl-C is one. An error within a callback would be lost to HiGHS."""

    def interrupt(_number: int, _frame: object) -> None:
        raise InterruptedError

    before = signal.signal(signal.SIGUSR1, interrupt)
    began_s = work_s()
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGUSR1)).start()
    try:
        with pytest.raises(InterruptedError):
            solve()
        assert work_s() - began_s < 5.0
        assert signal.getsignal(signal.SIGUSR1) is interrupt
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize(
    "solve",
    [
        lambda: balance(4, 2).solve(time_limit_s=0.2),
        lambda: balance(4, 2).arrays().solve(time_limit_s=0.2),
        lambda: balance(4, 2).arrays().solve(patience=Patience(0.01)),
    ],
    ids=["terms", "arrays", "patience"],
)
def test_a_solver_that_never_ends_is_left_behind(
    solve: Callable[[], Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As within a presolve that asks nobody; nothing it holds is read while it runs, and none follows."""
    may_end, asked, ask = threading.Event(), [], highspy.Highs.setOptionValue

    def note(self: highspy.Highs, name: str, value: object) -> object:
        asked.append((name, value))
        return ask(self, name, value)

    monkeypatch.setattr(highspy.Highs, "setOptionValue", note)
    monkeypatch.setattr(highspy.Highs, "run", lambda _self: may_end.wait(60.0))
    for name in ("getModelStatus", "getSolution", "getInfo"):
        monkeypatch.setattr(highspy.Highs, name, None)
    try:
        outcome = solve()
        assert ("presolve", "off") not in asked
        solve()
        assert ("presolve", "off") in asked
    finally:
        may_end.set()
        for thread in threading.enumerate():
            if thread.name == "graphpar-highs":
                thread.join()
    assert (outcome.status, outcome.bound, outcome.truncated_by) == ("unknown", None, "time limit")


def test_what_a_solver_raises_reaches_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(_self: highspy.Highs) -> None:
        raise MemoryError

    monkeypatch.setattr(highspy.Highs, "run", run)
    with pytest.raises(MemoryError):
        balance(4, 2).arrays().solve()


def expect_cut(outcome: Outcome) -> None:
    assert outcome.status in ("feasible", "unknown")
    assert outcome.truncated_by == "time limit"
    if outcome.objective is not None and outcome.bound is not None:
        assert outcome.bound < outcome.objective


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_wide_gap_is_reported(backend: Backend) -> None:
    outcome = balance(30, 5).solve(relative_gap=0.5, time_limit_s=20, backend=backend)
    assert (outcome.status, outcome.truncated_by) == ("feasible", "gap")
    assert outcome.gap is not None
    assert 0 < outcome.gap <= 0.5


@pytest.mark.parametrize("backend", BACKENDS)
def test_infeasible_and_unbounded(backend: Backend) -> None:
    program = Program("infeasible")
    x = program.binary("x")
    program.constrain([(1.0, x)], ">=", 2.0)
    program.minimize([(1.0, x)])
    assert program.solve(backend=backend).status == "infeasible"
    program = Program("unbounded")
    y = program.continuous("y")
    program.constrain([(1.0, y)], ">=", 2.0)
    program.minimize([(-1.0, y)])
    assert program.solve(backend=backend).status == "unbounded"


@pytest.mark.parametrize("backend", BACKENDS)
def test_duals_price_the_rows(backend: Backend) -> None:
    program = Program("diet")
    x, y = program.continuous("x"), program.continuous("y", high=3.0)
    need = program.constrain([(1.0, x), (2.0, y)], ">=", 8.0)
    program.minimize([(2.0, x), (1.0, y)], constant=5.0)
    outcome = program.solve(backend=backend)
    assert outcome.objective == pytest.approx(12.0)
    assert outcome.duals[need] == pytest.approx(2.0)


weights = st.integers(-9, 9)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(weights, min_size=4, max_size=4),
    st.lists(st.tuples(st.lists(weights, min_size=4, max_size=4), st.integers(-9, 15)), max_size=3),
    st.sampled_from([1e-9, 1.0, 1e9]),
)
def test_binary_programmes_against_brute_force(
    cost: list[int], rows: list[tuple[list[int], int]], scale: float
) -> None:
    program = Program("drawn")
    xs = [program.binary(f"x{i}") for i in range(4)]
    for coefficients, rhs in rows:
        program.constrain(zip(map(float, coefficients), xs, strict=True), "<=", rhs)
    program.minimize([(scale * c, x) for c, x in zip(cost, xs, strict=True)])
    points = [
        point
        for point in itertools.product((0, 1), repeat=4)
        if all(np.dot(coefficients, point) <= rhs for coefficients, rhs in rows)
    ]
    for outcome in (program.solve(), program.arrays().solve()):
        if not points:
            assert outcome.status == "infeasible"
        else:
            best = min(float(np.dot(cost, point)) for point in points)
            assert outcome.status == "optimal"
            assert outcome.objective == pytest.approx(scale * best, abs=1e-6 * scale)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_programmes_that_grow_end_like_those_built_at_once(seed: int) -> None:
    rng = np.random.default_rng(seed)
    matrix, cost = rng.integers(0, 4, (5, 12)).astype(float), rng.integers(-5, 6, 12).astype(float)
    upper, most = rng.integers(1, 5, 12).astype(float), rng.integers(2, 12, 5).astype(float)
    least = np.full(5, -np.inf)
    program = GrowingProgram(cost[:6], upper[:6].copy(), matrix[:3, :6], least[:3], most[:3])
    begun = program.solve(10.0)
    # A basis of another programme is where to begin, no more.
    basis = Basis(rng.random(12) < 0.3, rng.random(5) < 0.5)
    again = GrowingProgram(cost, upper.copy(), matrix, least, most, basis).solve(10.0)
    program.add_columns(cost[6:], upper[6:], matrix[:3, 6:])
    program.solve(10.0)
    program.add_rows(matrix[3:], least[3:], most[3:])
    grown = program.solve(10.0)
    whole = MatrixProgram(
        cost=cost,
        lower=np.zeros(12),
        upper=upper,
        integer=np.zeros(12, dtype=np.bool_),
        matrix=sparse.csr_matrix(matrix),
        row_lower=least,
        row_upper=most,
    ).solve()
    assert begun.status == grown.status == again.status == whole.status == "optimal"
    assert grown.objective == pytest.approx(whole.objective, abs=1e-9)
    assert again.objective == pytest.approx(whole.objective, abs=1e-9)
    # Duals give a bound whatever the point is (Lagrange).
    reduced = cost - grown.duals @ matrix
    assert np.minimum(reduced * upper, 0).sum() + grown.duals @ most == pytest.approx(
        whole.objective, abs=1e-6
    )


def test_wrong_arguments_are_refused() -> None:
    program = Program("wrong")
    x = program.binary("x")
    with pytest.raises(ValueError, match="coefficient"):
        program.constrain([(float("nan"), x)], "<=", 1.0)
    with pytest.raises(ValueError, match="right-hand side"):
        program.constrain([(1.0, x)], "<=", float("inf"))
    with pytest.raises(ValueError, match="above"):
        program.continuous("y", 2.0, 1.0)
    with pytest.raises(ValueError, match="time_limit_s"):
        program.solve(time_limit_s=0.0)


def test_nothing_reaches_stdout() -> None:
    script = (
        "from graphpar.partition.solver import Program\n"
        "p = Program('p'); x = p.binary('x'); p.minimize([(1.0, x)])\n"
        "p.constrain([(1.0, x)], '>=', 1.0)\n"
        "import json; print(json.dumps([p.solve().objective, p.solve(backend='cbc').objective]))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert json.loads(done.stdout) == [1.0, 1.0]
