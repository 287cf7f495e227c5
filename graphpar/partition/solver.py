"""Integer and linear programmes: the one file that knows the modelling layer.

A `Program` is written down term by term and solved through PuLP, by HiGHS or, where that is
missing, by CBC. A `MatrixProgram` (see `solver_matrix`) holds arrays instead of terms and goes to
HiGHS directly: the large neighbourhood windows of the sharding search have 10^5 columns, and
building them one Python object at a time would cost more than solving them. Both give an `Outcome`
whose status is derived from the dual bound; PuLP itself reports "Optimal" at a time limit.
"""

import contextlib
import re
import tempfile
import time
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import pulp
from scipy import sparse

from graphpar.partition.answers import OPTIMALITY_TOLERANCE
from graphpar.partition.solver_matrix import (
    FEASIBILITY_TOLERANCE,
    INTEGRALITY_TOLERANCE,
    FloatArray,
    MatrixProgram,
    Outcome,
    RawResult,
    Status,
    Truncation,
    Variable,
    Verdict,
    check_limits,
    judge,
    new_highs,
    objective_scale,
    set_start,
    solve_highs,
)

__all__ = [
    "FEASIBILITY_TOLERANCE",
    "INTEGRALITY_TOLERANCE",
    "OPTIMALITY_TOLERANCE",
    "Backend",
    "FloatArray",
    "MatrixProgram",
    "Outcome",
    "Program",
    "Sense",
    "Status",
    "Term",
    "Truncation",
    "Variable",
]

Backend: TypeAlias = Literal["highs", "cbc"]
Sense: TypeAlias = Literal["<=", ">=", "=="]

_INFINITY = float("inf")


Term: TypeAlias = tuple[float, Variable]


class Program:
    """A linear or integer programme, minimised.

    >>> program = Program("knapsack")
    >>> a, b = program.binary("a"), program.binary("b")
    >>> row = program.constrain([(2, a), (3, b)], "<=", 4, "weight")
    >>> program.minimize([(-3, a), (-4, b)])
    >>> outcome = program.solve(time_limit_s=10)
    >>> outcome.status, outcome.objective, outcome.chosen(b)
    ('optimal', -4.0, True)
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._names: list[str] = []
        self._lower: list[float] = []
        self._upper: list[float] = []
        self._integer: list[bool] = []
        self._rows: list[tuple[npt.NDArray[np.intp], FloatArray, Sense, float, str]] = []
        self._objective: dict[int, float] = {}
        self._constant = 0.0

    def __repr__(self) -> str:
        integers = sum(self._integer)
        return (
            f"Program({self.name!r}: {self.num_variables} variables, {integers} integer, "
            f"{self.num_rows} rows)"
        )

    @property
    def num_variables(self) -> int:
        """Number of columns."""
        return len(self._names)

    @property
    def num_rows(self) -> int:
        """Number of constraints."""
        return len(self._rows)

    def binary(self, name: str) -> Variable:
        """A variable that is zero or one."""
        return self._variable(name, 0.0, 1.0, True)

    def integer(self, name: str, low: float = 0.0, high: float = _INFINITY) -> Variable:
        """A whole number between `low` and `high`."""
        return self._variable(name, low, high, True)

    def continuous(self, name: str, low: float = 0.0, high: float = _INFINITY) -> Variable:
        """A real number between `low` and `high`; either may be infinite."""
        return self._variable(name, low, high, False)

    def fix(self, variable: Variable, value: float) -> None:
        """Pin a variable to one value by its bounds."""
        self._lower[variable.index] = self._upper[variable.index] = float(value)

    def constrain(self, terms: Iterable[Term], sense: Sense, rhs: float, name: str = "") -> int:
        """Add the row `sum of coefficient * variable  sense  rhs`; returns the row's number.

        Repeated variables are added up. ValueError where a coefficient or `rhs` is not finite.
        """
        merged = _merge(terms)
        if not np.isfinite(rhs):
            raise ValueError(f"row {name or len(self._rows)}: right-hand side is {rhs}")
        indices = np.fromiter(merged.keys(), dtype=np.intp, count=len(merged))
        weights = np.fromiter(merged.values(), dtype=np.float64, count=len(merged))
        self._rows.append((indices, weights, sense, float(rhs), name or f"row{len(self._rows)}"))
        return len(self._rows) - 1

    def minimize(self, terms: Iterable[Term], constant: float = 0.0) -> None:
        """Set the objective: the sum of coefficient times variable, plus a constant."""
        self._objective = _merge(terms)
        self._constant = float(constant)

    def solve(
        self,
        *,
        time_limit_s: float | None = None,
        relative_gap: float = 0.0,
        threads: int = 1,
        backend: Backend = "highs",
        start: Sequence[float] | FloatArray | None = None,
    ) -> Outcome:
        """Minimise; falls back to CBC where HiGHS cannot be used.

        Args:
            time_limit_s: Wall-clock limit, or None for none.
            relative_gap: Stop once the proven gap is this small.
            threads: Solver threads.
            backend: `highs` or `cbc`.
            start: A feasible point to start from, one value per variable; HiGHS only.

        Raises:
            ValueError: The arguments are out of range.
        """
        check_limits(time_limit_s, relative_gap, threads)
        began_s = time.perf_counter()
        scale = objective_scale(np.fromiter(self._objective.values(), dtype=np.float64))
        with warnings.catch_warnings():
            # PuLP 3.3 announces the names of version 4 at every call of its own.
            warnings.simplefilter("ignore", DeprecationWarning)
            raw = self._run(scale, time_limit_s, relative_gap, threads, backend, start)
        return judge(raw, self.arrays(), self._constant, scale, time.perf_counter() - began_s)

    def _run(
        self,
        scale: float,
        time_limit_s: float | None,
        relative_gap: float,
        threads: int,
        backend: Backend,
        start: Sequence[float] | FloatArray | None,
    ) -> RawResult:
        problem, variables = self._to_pulp(scale)
        if backend == "highs" and pulp.HiGHS(msg=False).available():
            return _run_highs_through_pulp(problem, time_limit_s, relative_gap, threads, start)
        return _run_cbc(problem, variables, time_limit_s, relative_gap, threads)

    def arrays(self) -> "MatrixProgram":
        """The same programme as arrays."""
        counts = [len(indices) for indices, *_ in self._rows]
        starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int32)
        flat = [indices for indices, *_ in self._rows]
        weights = [row[1] for row in self._rows]
        matrix = sparse.csr_matrix(
            (
                np.concatenate(weights) if weights else np.zeros(0),
                np.concatenate(flat) if flat else np.zeros(0, np.int32),
                starts,
            ),
            shape=(self.num_rows, self.num_variables),
        )
        senses = np.array([row[2] for row in self._rows], dtype="<U2")
        rhs = np.array([row[3] for row in self._rows], dtype=np.float64)
        cost = np.zeros(self.num_variables)
        cost[list(self._objective)] = list(self._objective.values())
        return MatrixProgram(
            cost=cost,
            lower=np.array(self._lower, dtype=np.float64),
            upper=np.array(self._upper, dtype=np.float64),
            integer=np.array(self._integer, dtype=np.bool_),
            matrix=matrix,
            row_lower=np.where(senses == "<=", -_INFINITY, rhs),
            row_upper=np.where(senses == ">=", _INFINITY, rhs),
            constant=self._constant,
        )

    def _variable(self, name: str, low: float, high: float, integer: bool) -> Variable:
        if not low <= high:
            raise ValueError(f"variable {name}: lower bound {low} is above upper bound {high}")
        self._names.append(name)
        self._lower.append(float(low))
        self._upper.append(float(high))
        self._integer.append(integer)
        return Variable(len(self._names) - 1, name)

    def _to_pulp(self, scale: float) -> tuple[Any, list[Any]]:
        problem = pulp.LpProblem("program", pulp.LpMinimize)
        # Solver-side names are positions: user names may clash or hold characters CBC refuses.
        variables = [
            pulp.LpVariable(
                f"x{i:08d}",
                None if low == -_INFINITY else low,
                None if high == _INFINITY else high,
                pulp.LpInteger if integer else pulp.LpContinuous,
            )
            for i, (low, high, integer) in enumerate(
                zip(self._lower, self._upper, self._integer, strict=True)
            )
        ]
        problem.addVariables(variables)
        objective = [(variables[i], weight * scale) for i, weight in self._objective.items()]
        problem.setObjective(pulp.LpAffineExpression(objective))
        senses = {"<=": pulp.LpConstraintLE, ">=": pulp.LpConstraintGE, "==": pulp.LpConstraintEQ}
        for number, (indices, weights, sense, rhs, _) in enumerate(self._rows):
            terms = [(variables[i], w) for i, w in zip(indices.tolist(), weights.tolist(), strict=True)]
            problem.addConstraint(
                pulp.LpConstraint(pulp.LpAffineExpression(terms), senses[sense], f"r{number:08d}", rhs)
            )
        return problem, variables


def _merge(terms: Iterable[Term]) -> dict[int, float]:
    merged: dict[int, float] = {}
    for weight, variable in terms:
        merged[variable.index] = merged.get(variable.index, 0.0) + float(weight)
    for index, weight in merged.items():
        if not np.isfinite(weight):
            raise ValueError(f"variable number {index} has the coefficient {weight}")
    return merged


class _QuietHighs(pulp.HiGHS):  # type: ignore[misc]
    """PuLP's HiGHS with a silent banner, an optional start, and the raw result kept."""

    def __init__(
        self,
        time_limit_s: float | None,
        relative_gap: float,
        threads: int,
        start: Sequence[float] | FloatArray | None,
    ) -> None:
        super().__init__(msg=False)
        self._time_limit_s, self._settings = time_limit_s, (relative_gap, threads)
        self._start = start
        self.raw: RawResult | None = None

    def createAndConfigureSolver(self, lp: Any) -> None:  # noqa: N802 - PuLP's name
        lp.solverModel = new_highs(*self._settings)

    def callSolver(self, lp: Any) -> None:  # noqa: N802 - PuLP's name
        if self._start is not None:
            set_start(lp.solverModel, self._start)
        integer = any(variable.cat == pulp.LpInteger for variable in lp.variables())
        self.raw = solve_highs(lp.solverModel, integer, self._time_limit_s)
        if self.raw.left:
            raise pulp.PulpSolverError("HiGHS does not end")  # nothing is to be read while it runs


def _run_highs_through_pulp(
    problem: Any,
    time_limit_s: float | None,
    relative_gap: float,
    threads: int,
    start: Sequence[float] | FloatArray | None,
) -> RawResult:
    solver = _QuietHighs(time_limit_s, relative_gap, threads, start)
    # PuLP copies values from a solution that an infeasible model does not have.
    with contextlib.suppress(IndexError, pulp.PulpSolverError):
        problem.solve(solver)
    assert solver.raw is not None, "HiGHS was never started"
    return solver.raw


def _run_cbc(
    problem: Any, variables: list[Any], time_limit_s: float | None, gap: float, threads: int
) -> RawResult:
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "cbc.log"
        problem.solve(
            pulp.PULP_CBC_CMD(
                msg=False, timeLimit=time_limit_s, gapRel=gap, threads=threads, logPath=str(log)
            )
        )
        text = log.read_text(errors="replace")
    return _read_cbc(problem, variables, text, gap)


def _read_cbc(problem: Any, variables: list[Any], log: str, gap: float) -> RawResult:
    no_duals = np.zeros(0)
    verdict: Verdict = "finished"
    if "Stopped on time" in log:
        verdict = "time limit"
    elif problem.status == pulp.LpStatusInfeasible:
        return RawResult("infeasible", None, None, no_duals)
    elif problem.status == pulp.LpStatusUnbounded:
        return RawResult("unbounded", None, None, no_duals)
    elif problem.status != pulp.LpStatusOptimal:
        return RawResult("failed", None, None, no_duals)
    has_point = problem.sol_status in (
        pulp.LpSolutionOptimal,
        pulp.LpSolutionIntegerFeasible,
    ) and all(variable.varValue is not None for variable in variables)
    values = np.array([v.varValue for v in variables], dtype=np.float64) if has_point else None
    integer = any(variable.cat == pulp.LpInteger for variable in variables)
    if verdict == "finished" and not integer:
        duals = np.array([row.pi or 0.0 for row in problem.constraints.values()])
        return RawResult(verdict, values, float(pulp.value(problem.objective)), duals)
    return RawResult(verdict, values, _cbc_bound(log, verdict, problem, gap), no_duals)


def _cbc_bound(log: str, verdict: str, problem: Any, gap: float) -> float | None:
    """CBC's final lower bound: PuLP does not hand it on, the log has it unless it is closed."""
    reported = re.search(r"^Lower bound:\s+(\S+)", log, re.MULTILINE)
    if reported:
        return float(reported.group(1))
    if verdict == "finished" and gap == 0.0:
        return float(pulp.value(problem.objective) or 0.0)
    return None
