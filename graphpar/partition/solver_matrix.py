"""Programmes as arrays, HiGHS without a modelling layer, and the judgement of what a solver says.

Three rules that the solvers themselves do not keep:

* An answer is `optimal` only with a proof: the status is derived from the dual bound, never taken
  over from a solver that merely ran into its time limit.
* A point is an answer only if it satisfies the rows. Every point is checked against bounds, rows
  and integrality before it leaves this file; one that fails is dropped (`unknown`).
* The objective is scaled to a fixed magnitude before the solver sees it, so that its absolute
  tolerances mean the same for seconds and for nanoseconds.
"""

import functools
import os
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import highspy
import numpy as np
import numpy.typing as npt
from scipy import sparse

from graphpar.partition.answers import OPTIMALITY_TOLERANCE
from graphpar.partition.clock import note_work_elsewhere

FloatArray: TypeAlias = npt.NDArray[np.float64]
Status: TypeAlias = Literal["optimal", "feasible", "infeasible", "unbounded", "unknown"]
Truncation: TypeAlias = Literal["time limit", "gap"]
Verdict: TypeAlias = Literal["finished", "time limit", "infeasible", "unbounded", "failed"]

FEASIBILITY_TOLERANCE = 1e-6
"""Largest violation of a row, relative to its own magnitude, that still counts as rounding."""

INTEGRALITY_TOLERANCE = 1e-5
"""Largest distance from an integer that still counts as that integer."""

_SCALED_OBJECTIVE = 1e4
"""The magnitude of the largest objective coefficient as the solver sees it."""

_LATE_S, _LATE_SHARE = 0.3, 0.05
"""So much later than its time limit, in seconds and as a share of it, HiGHS is not waited for."""

_BUSIEST = 20.0
"""So many seconds may pass for one of processor time."""

_left_behind: list[threading.Thread] = []
"""Where HiGHS did not end. While one of them runs there is no presolve, which might cost another core."""


@dataclass(frozen=True)
class Variable:
    """A handle on one column of a `Program`; `index` is its place in `Outcome.values`."""

    index: int
    name: str


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a solver found, and how sure it is.

    Attributes:
        status: `optimal` (gap within `OPTIMALITY_TOLERANCE`), `feasible` (a point, not proven),
            `infeasible`, `unbounded`, or `unknown` (no usable point).
        objective: Value of the returned point under the unscaled objective, or None.
        bound: A valid lower bound on every feasible point, or None where the solver gave none.
        gap: `(objective - bound) / max(|objective|, 1e-12)`, or None where either is missing.
        seconds: Wall-clock time spent in building and solving.
        truncated_by: `time limit`, `gap` (the asked-for gap was reached first), or None.
        values: One value per variable, integers exactly integral; empty where there is no point.
        duals: One multiplier per row of a continuous programme solved to optimality, else empty.
    """

    status: Status
    objective: float | None
    bound: float | None
    gap: float | None
    seconds: float
    truncated_by: Truncation | None
    values: FloatArray = field(repr=False)
    duals: FloatArray = field(repr=False)

    @property
    def has_point(self) -> bool:
        """Whether `values` holds a feasible point."""
        return self.objective is not None

    def value(self, variable: Variable) -> float:
        """The value of one variable; ValueError where the outcome holds no point."""
        if self.objective is None:
            raise ValueError(f"the programme is {self.status}: {variable.name} has no value")
        return float(self.values[variable.index])

    def chosen(self, variable: Variable) -> bool:
        """Whether a binary variable is one."""
        return self.value(variable) > 0.5


@dataclass(frozen=True, eq=False)
class RawResult:
    """What a solver said, in the scaled objective and before any check; `left` where it goes on alone."""

    verdict: Verdict
    values: FloatArray | None
    bound: float | None
    duals: FloatArray
    left: bool = False


@dataclass(frozen=True)
class Patience:
    """When to give up on an integer programme: after so much work, or when time is up.

    Work is processor time, so that an answer depends less on what else a machine does. HiGHS's own limit
    counts seconds of a clock on the wall.

    Attributes:
        processor_s: Seconds of processor time.
        deadline_s: `time.monotonic()` at which to stop in any case.
    """

    processor_s: float
    deadline_s: float = float("inf")

    @property
    def is_over(self) -> bool:
        """Whether nothing can be done in it."""
        return self.processor_s <= 0 or time.monotonic() >= self.deadline_s

    @property
    def wall_s(self) -> float:
        """When it is over in any case, by the clock on the wall."""
        return max(0.0, min(self.deadline_s - time.monotonic(), _BUSIEST * self.processor_s))


def solve_highs(
    highs: Any, integer: bool, limit_s: float | None = None, work_s: float = np.inf
) -> RawResult:
    """Let HiGHS run, for so long and so much processor time at most, and read what it says.

    Its presolve may look for better coefficients of one row without end and without a look at a clock
    (`strengthenInequalities` of 1.16, over rows of memory). So it runs in a thread of its own, which is
    left behind where it does not end. Signals are handled at once, and end it.
    """
    given_up, began_s = threading.Event(), time.monotonic()
    bounds, worked_s, failures = [-np.inf], [0.0], list[BaseException]()

    def look(_kind: Any, _words: str, told: Any, answer: Any, _own: Any) -> None:
        if integer:
            bounds[0] = max(bounds[0], told.mip_dual_bound)  # in this order nan is passed over
        answer.user_interrupt = given_up.is_set() or time.thread_time() > work_s

    def run() -> None:
        try:
            highs.run()
        except BaseException as error:
            failures.append(error)
        worked_s[0] = time.thread_time()

    if limit_s is not None:
        highs.setOptionValue("time_limit", limit_s)
        limit_s = min(limit_s + _LATE_SHARE * limit_s + _LATE_S, threading.TIMEOUT_MAX)
    if any(each.is_alive() for each in _left_behind):
        highs.setOptionValue("presolve", "off")
    highs.setCallback(look, None)
    for kind in ("kCallbackMipInterrupt", "kCallbackSimplexInterrupt"):
        highs.startCallback(getattr(highspy.cb.HighsCallbackType, kind))
    running = threading.Thread(target=run, name="graphpar-highs", daemon=True)
    running.start()
    try:
        running.join(limit_s)
    finally:
        given_up.set()
        left = running.is_alive()
        _left_behind[:] = [each for each in (*_left_behind, running) if each.is_alive()]
    if left:
        note_work_elsewhere(time.monotonic() - began_s)
        return RawResult("time limit", None, bounds[0], np.zeros(0), left=True)
    note_work_elsewhere(worked_s[0])
    if failures:
        raise failures[0]
    return read_highs(highs, integer)


@dataclass(frozen=True, eq=False)
class MatrixProgram:
    """A programme as arrays: minimise `cost x + constant` over `row_lower <= A x <= row_upper`."""

    cost: FloatArray
    lower: FloatArray
    upper: FloatArray
    integer: npt.NDArray[np.bool_]
    matrix: sparse.csr_matrix
    row_lower: FloatArray
    row_upper: FloatArray
    constant: float = 0.0

    def solve(
        self,
        *,
        time_limit_s: float | None = None,
        relative_gap: float = 0.0,
        threads: int = 1,
        start: FloatArray | None = None,
        options: dict[str, Any] | None = None,
        patience: Patience | None = None,
    ) -> Outcome:
        """Minimise with HiGHS; arguments as in `Program.solve`, `options` are HiGHS's own."""
        check_limits(time_limit_s, relative_gap, threads)
        began_s = time.perf_counter()
        scale = objective_scale(self.cost)
        highs = new_highs(relative_gap, threads)
        for key, value in (options or {}).items():
            highs.setOptionValue(key, value)
        highs.passModel(self._to_highs(scale))
        if start is not None:
            set_start(highs, start)
        integer = bool(self.integer.any())
        if patience is None:
            raw = solve_highs(highs, integer, time_limit_s)
        else:
            raw = solve_highs(highs, integer, patience.wall_s, patience.processor_s)
        return judge(raw, self, self.constant, scale, time.perf_counter() - began_s)

    def _to_highs(self, scale: float) -> Any:
        matrix = self.matrix.tocsr()
        lp = highspy.HighsLp()
        lp.num_col_, lp.num_row_ = len(self.cost), matrix.shape[0]
        lp.col_cost_ = self.cost * scale
        lp.col_lower_, lp.col_upper_ = self.lower, self.upper
        lp.row_lower_, lp.row_upper_ = self.row_lower, self.row_upper
        lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
        lp.a_matrix_.start_ = matrix.indptr.astype(np.int32)
        lp.a_matrix_.index_ = matrix.indices.astype(np.int32)
        lp.a_matrix_.value_ = matrix.data.astype(np.float64)
        if self.integer.any():
            kinds = (highspy.HighsVarType.kContinuous, highspy.HighsVarType.kInteger)
            lp.integrality_ = [kinds[flag] for flag in self.integer.tolist()]
        return lp


def check_limits(time_limit_s: float | None, relative_gap: float, threads: int) -> None:
    if time_limit_s is not None and not time_limit_s > 0:
        raise ValueError(f"time_limit_s must be positive, got {time_limit_s}")
    if not relative_gap >= 0:
        raise ValueError(f"relative_gap must not be negative, got {relative_gap}")
    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")


def objective_scale(cost: FloatArray) -> float:
    """A power of two that brings the largest coefficient near `_SCALED_OBJECTIVE`."""
    largest = float(np.abs(cost).max(initial=0.0))
    if largest == 0.0:
        return 1.0
    return float(2.0 ** np.round(np.log2(_SCALED_OBJECTIVE / largest)))


def new_highs(relative_gap: float, threads: int) -> Any:
    _spend_banner()
    highs = highspy.Highs()
    highs.setOptionValue("output_flag", False)
    highs.setOptionValue("log_to_console", False)
    _configure(highs, relative_gap, threads)
    return highs


@functools.cache
def _spend_banner() -> None:
    """Let the process's first HiGHS object print its banner to nowhere.

    The constructor writes to file descriptor 1 before any option can be set, which would corrupt
    JSON on stdout; later objects are silent.
    """
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        highspy.Highs()
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _configure(highs: Any, relative_gap: float, threads: int) -> None:
    # The scheduler is process-wide and keeps the thread count of its first user.
    highspy.Highs.resetGlobalScheduler(True)
    highs.setOptionValue("threads", threads)
    highs.setOptionValue("mip_rel_gap", relative_gap)
    highs.setOptionValue("mip_abs_gap", 1e-9)


def set_start(highs: Any, start: Sequence[float] | FloatArray) -> None:
    solution = highspy.HighsSolution()
    solution.col_value = np.asarray(start, dtype=np.float64)
    solution.value_valid = True
    highs.setSolution(solution)


def read_highs(highs: Any, integer: bool) -> RawResult:
    status, info = highs.getModelStatus(), highs.getInfo()
    verdicts: dict[Any, Verdict] = {
        highspy.HighsModelStatus.kOptimal: "finished",
        highspy.HighsModelStatus.kModelEmpty: "finished",
        highspy.HighsModelStatus.kInfeasible: "infeasible",
        highspy.HighsModelStatus.kUnbounded: "unbounded",
        highspy.HighsModelStatus.kTimeLimit: "time limit",
        highspy.HighsModelStatus.kInterrupt: "time limit",
        highspy.HighsModelStatus.kIterationLimit: "time limit",
        highspy.HighsModelStatus.kSolutionLimit: "time limit",
        highspy.HighsModelStatus.kObjectiveBound: "time limit",
    }
    verdict: Verdict = verdicts.get(status, "failed")
    solution = highs.getSolution()
    has_point = info.primal_solution_status == highspy.SolutionStatus.kSolutionStatusFeasible
    if status == highspy.HighsModelStatus.kModelEmpty:
        has_point = True
    values = np.array(solution.col_value, dtype=np.float64) if has_point else None
    bound: float | None = None
    if integer:
        bound = float(info.mip_dual_bound)
    elif verdict == "finished":
        bound = float(info.objective_function_value)
    duals = np.zeros(0)
    if not integer and verdict == "finished" and solution.dual_valid:
        duals = np.array(solution.row_dual, dtype=np.float64)
    return RawResult(verdict, values, bound, duals)


def judge(
    raw: RawResult, program: MatrixProgram, constant: float, scale: float, seconds: float
) -> Outcome:
    """Turn a solver's word into an `Outcome`: check the point, derive the status from the bound."""
    nothing = np.zeros(0)
    if raw.verdict in ("infeasible", "unbounded"):
        status: Status = "infeasible" if raw.verdict == "infeasible" else "unbounded"
        return Outcome(status, None, None, None, seconds, None, nothing, nothing)
    limit: Truncation | None = "time limit" if raw.verdict == "time limit" else None
    bound = None
    if raw.bound is not None and np.isfinite(raw.bound):
        bound = raw.bound / scale + constant
    values = None if raw.values is None else _checked_point(raw.values, program)
    if values is None:
        return Outcome("unknown", None, bound, None, seconds, limit, nothing, nothing)
    objective = float(program.cost @ values) + constant
    gap = None
    if bound is not None:
        bound = min(bound, objective)
        gap = (objective - bound) / max(abs(objective), 1e-12)
    proven = gap is not None and gap <= OPTIMALITY_TOLERANCE
    if not proven and limit is None and raw.verdict == "finished":
        limit = "gap"
    return Outcome(
        "optimal" if proven else "feasible",
        objective,
        bound,
        gap,
        seconds,
        None if proven else limit,
        values,
        raw.duals / scale,
    )


def _checked_point(values: FloatArray, program: MatrixProgram) -> FloatArray | None:
    """The point with its integers made exact, or None where it breaks a bound or a row."""
    point = values.copy()
    rounded = np.round(point[program.integer])
    if np.any(np.abs(rounded - point[program.integer]) > INTEGRALITY_TOLERANCE):
        return None
    point[program.integer] = rounded
    slack = FEASIBILITY_TOLERANCE * np.maximum(1.0, np.abs(point))
    if np.any(point < program.lower - slack) or np.any(point > program.upper + slack):
        return None
    point = np.clip(point, program.lower, program.upper)
    activity = program.matrix @ point
    magnitude = abs(program.matrix) @ np.abs(point)
    tolerance = FEASIBILITY_TOLERANCE * np.maximum(1.0, magnitude)
    if np.any(activity < program.row_lower - tolerance):
        return None
    if np.any(activity > program.row_upper + tolerance):
        return None
    return point
