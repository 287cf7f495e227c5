"""Column generation for the counting programme: a linear relaxation, then few columns as integers.

    minimise  cost x   such that   row_lower <= rows x <= row_upper,   0 <= x <= most,   x whole
              sum_{due_j <= d} load_j x_j + (last column's load, at most d)  <=  d     for all d

The rows of the second line, one per distinct due, are added when a solution breaks them.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from scipy import sparse

from graphpar.partition.chains.limits import NotSolvedError
from graphpar.partition.clock import OutOfTimeError, work_s
from graphpar.partition.counting.rows import AlikeRows
from graphpar.partition.solver import Backend, MatrixProgram, Outcome, Program
from graphpar.partition.solver_growing import Basis, GrowingProgram
from graphpar.partition.solver_matrix import Patience
from graphpar.partition.unit_arrays import FloatArray, IntArray

BoolArray = npt.NDArray[np.bool_]

_PRICED_AT_ONCE = 250
"""Columns that join the linear programme in one round."""

_TOLERANCE = 1e-9
"""Reduced costs above minus this share of the objective count as not negative."""

_FIRST_DELTA = 2e-3
"""The first integer programme takes columns within this share of the LP value, ..."""

_MOST_FIRST_DELTA = 2e-2
"""... or within twice the slack, up to this share."""


_SLACKS = 3
"""The first rows, which have to be met, may be missed at a price."""

_LEAST_SLACK = 1e-7
"""Rows broken by less than this are kept."""

_LONGEST_LINEAR_S = 3600.0
"""A linear programme takes milliseconds; solvers want a finite limit."""


@dataclass(frozen=True, eq=False)
class Solution:
    """Columns with how often each is used, the value, and a lower bound on every solution."""

    columns: IntArray
    counts: IntArray
    value: float
    bound: float


@dataclass(frozen=True, eq=False)
class _Relaxed:
    value: float
    reduced: FloatArray


class Master:
    """One counting programme; `active` are the columns its linear relaxation came to use."""

    def __init__(
        self,
        *,
        cost: FloatArray,
        rows: AlikeRows,
        row_lower: FloatArray,
        row_upper: FloatArray,
        most: IntArray,
        due: FloatArray,
        load: FloatArray,
        is_last: npt.NDArray[np.bool_],
        num_devices: int,
        slack: float,
        cutoff: float,
        backend: Backend,
    ) -> None:
        self._cost = cost
        self._rows = rows
        self._row_lower = row_lower
        self._row_upper = row_upper
        self._most = most.astype(np.float64)
        self._due = due
        self._load = load
        self._is_last = is_last
        self._num_devices = num_devices
        self._slack = slack
        self._cutoff = cutoff
        self._backend: Backend = backend
        self.active: IntArray = np.zeros(0, dtype=np.intp)
        self.dues: tuple[float, ...] = ()
        self.duals: FloatArray = np.zeros(0)
        """Of the last relaxation that was solved: of the fixed rows, then of those of `dues`."""
        self.values: FloatArray = np.zeros(0)
        """How often that takes the active columns."""
        self.basic: Basis | None = None
        """Which active columns and which rows are basic then."""
        self._begin: Basis | None = None

    def solve(self, warm: IntArray, dues: Sequence[float], patience: Patience) -> Solution | None:
        """A whole solution below the cutoff that is within the slack of the best; None without one.

        Raises:
            OutOfTimeError: The deadline passed before a solution was found; where a bound is known, it
                is a NotSolvedError.
        """
        self.dues = tuple(dues)
        self.active = np.union1d(warm, self._first_guess())
        until_s = work_s() + patience.processor_s
        relaxed = self._relax(patience.deadline_s)
        if relaxed is None or relaxed.value >= self._cutoff:
            return None
        best: Solution | None = None
        # Whoever uses a column beyond this is not below the cutoff.
        most = self._cutoff - relaxed.value
        size = abs(relaxed.value)
        delta = max(_FIRST_DELTA * size, min(2 * self._slack, _MOST_FIRST_DELTA * size))
        while True:
            delta = min(delta, most)
            chosen = np.flatnonzero(relaxed.reduced <= delta)
            everything = len(chosen) == len(self._cost) or delta >= most
            left = replace(patience, processor_s=until_s - work_s())
            found, bound, cut = self._integer(chosen, relaxed.value, left)
            if found is not None and (best is None or found.value < best.value):
                best = found
            outside = np.inf if everything else relaxed.value + delta
            bound = max(relaxed.value, min(bound, outside))
            if best is None and everything and not cut:
                return None
            if best is None and cut:
                raise NotSolvedError(bound)
            if best is None:
                delta *= 8
                continue
            best = Solution(best.columns, best.counts, best.value, min(bound, best.value))
            if everything or cut or best.value - bound <= self._slack + 1e-12 * abs(best.value):
                return best
            delta = min(max(best.value - relaxed.value, delta * 2), most)

    def relax(
        self,
        warm: IntArray,
        dues: Sequence[float],
        deadline_s: float,
        basic: IntArray | None = None,
        basic_rows: BoolArray | None = None,
    ) -> float | None:
        """The value of the linear relaxation, None where it has no solution.

        It begins with the columns `warm`, and where it is given with a basis of another relaxation: its
        basic columns and whether rows were, in the same order; others joined since.

        Raises:
            OutOfTimeError: The deadline passed.
        """
        self.dues = tuple(dues)
        self.active = np.union1d(warm, self._first_guess())
        if basic is not None and basic_rows is not None:
            rows = np.ones(len(self._row_lower) + len(self.dues), dtype=np.bool_)
            rows[: len(basic_rows)] = basic_rows
            self._begin = Basis(np.isin(self.active, basic), rows)
        relaxed = self._relax(deadline_s)
        return None if relaxed is None else relaxed.value

    # --- the linear relaxation ---

    def _first_guess(self) -> IntArray:
        """For every set of equal coefficients in rows that must be met, the cheapest column."""
        usable = self._most > 0
        ratio = np.where(usable, self._cost / np.maximum(self._rows.blocks, 0.5), np.inf)
        cheapest = np.argsort(ratio, kind="stable")[:_PRICED_AT_ONCE]
        ends = [np.flatnonzero(usable & (self._rows.row(r) > 0)) for r in (1, 2)]
        some = [e[np.argsort(self._cost[e], kind="stable")[:_PRICED_AT_ONCE]] for e in ends]
        found: IntArray = np.unique(np.concatenate([cheapest[np.isfinite(ratio[cheapest])], *some]))
        return found

    def _relax(self, deadline_s: float) -> _Relaxed | None:
        """Solve over all columns and all dues, which join as needed; None where nothing is possible."""
        penalty = 10 * float(np.abs(self._cost).max(initial=0.0)) + 1.0
        program = self._growing(self._cost, penalty, self._begin)
        while True:
            outcome = self._solved(program, deadline_s)
            if outcome is None:
                # A due that joined leaves nothing among the active columns.
                before = len(self.active)
                if not self._reach(deadline_s):
                    return None
                self._let_join(program, self._cost, self.active[before:])
                continue
            value = outcome.objective
            assert value is not None
            reduced = self._reduced(self._cost, outcome.duals)
            joining = self._joining(reduced, _TOLERANCE * max(abs(value), 1e-30))
            if len(joining):
                self.active = np.append(self.active, joining)
                self._let_join(program, self._cost, joining)
                continue
            points = outcome.values[_SLACKS:]
            if np.any(outcome.values[:_SLACKS] > _LEAST_SLACK):
                before = len(self.active)
                if not self._reach(deadline_s):
                    return None
                self._let_join(program, self._cost, self.active[before:])
                for slack in range(_SLACKS):
                    program.limit(slack, 0.0)
                continue
            broken = self._broken(self.active, points)
            if broken:
                self.dues = (*self.dues, *broken)
                rows = np.concatenate(
                    [np.zeros((len(broken), _SLACKS)), self._memory(self.active, broken)], axis=1
                )
                program.add_rows(rows, np.full(len(broken), -np.inf), np.array(broken))
                continue
            self.duals, self.values = outcome.duals, points
            basis = program.basis
            self.basic = Basis(basis.columns[_SLACKS:], basis.rows)
            # At its upper limit a column may have a negative reduced cost: that is part of the value.
            return _Relaxed(value, np.maximum(reduced, 0.0))

    def _reach(self, deadline_s: float) -> bool:
        """Let columns join until all rows can be met; False where all columns together cannot."""
        free = np.zeros(len(self._cost))
        program = self._growing(free, 1.0, None)
        while True:
            outcome = self._solved(program, deadline_s)
            assert outcome is not None and outcome.objective is not None
            if outcome.objective <= _LEAST_SLACK:
                return True
            joining = self._joining(self._reduced(free, outcome.duals), _LEAST_SLACK)
            if len(joining) == 0:
                return False
            self.active = np.append(self.active, joining)
            self._let_join(program, free, joining)

    def _joining(self, reduced: FloatArray, least: float) -> IntArray:
        """The columns that join: those whose reduced costs are most negative."""
        candidates = np.flatnonzero((reduced < -least) & (self._most > 0))
        candidates = np.setdiff1d(candidates, self.active, assume_unique=True)
        found: IntArray = candidates[np.argsort(reduced[candidates], kind="stable")[:_PRICED_AT_ONCE]]
        return found

    def _growing(self, cost: FloatArray, penalty: float, begin: Basis | None) -> GrowingProgram:
        """The relaxation over active columns, with slack at a price before them."""
        rows = np.concatenate([self._rows.of(self.active), self._memory(self.active)])
        slack = np.zeros((len(rows), _SLACKS))
        slack[range(_SLACKS), range(_SLACKS)] = 1.0
        lower, upper = self._limits()
        if begin is not None:
            begin = Basis(np.append(np.zeros(_SLACKS, dtype=np.bool_), begin.columns), begin.rows)
        return GrowingProgram(
            np.append(np.full(_SLACKS, penalty), cost[self.active]),
            np.append(np.full(_SLACKS, np.inf), self._most[self.active]),
            np.concatenate([slack, rows], axis=1),
            lower,
            upper,
            begin,
        )

    def _let_join(self, program: GrowingProgram, cost: FloatArray, index: IntArray) -> None:
        """Columns join the relaxation."""
        rows = np.concatenate([self._rows.of(index), self._memory(index)])
        program.add_columns(cost[index], self._most[index], rows)

    def _solved(self, program: GrowingProgram, deadline_s: float) -> Outcome | None:
        """The best point of a relaxation; None where it has none.

        Raises:
            OutOfTimeError: The deadline passed, or the solver gave up.
        """
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            raise OutOfTimeError
        outcome = program.solve(min(left_s, _LONGEST_LINEAR_S))
        if outcome.status == "infeasible":
            return None
        if not outcome.has_point or len(outcome.duals) != len(self._row_lower) + len(self.dues):
            raise OutOfTimeError
        return outcome

    def _limits(self) -> tuple[FloatArray, FloatArray]:
        lower = np.concatenate([self._row_lower, np.full(len(self.dues), -np.inf)])
        return lower, np.concatenate([self._row_upper, np.array(self.dues, dtype=np.float64)])

    def _memory(self, index: IntArray, dues: Sequence[float] | None = None) -> FloatArray:
        """Coefficients [due, column] of the memory rows, of all dues by default."""
        due, load, last = self._due[index], self._load[index], self._is_last[index]
        rows = [self._memory_row(d, due, load, last) for d in (self.dues if dues is None else dues)]
        return np.stack(rows) if rows else np.zeros((0, len(index)))

    def _memory_row(
        self, limit: float, due: FloatArray, load: FloatArray, last: npt.NDArray[np.bool_]
    ) -> FloatArray:
        # The last stage is below all others; one as wide as `limit` leaves no room at all.
        found: FloatArray = np.where(last, np.minimum(load, limit), np.where(due <= limit, load, 0.0))
        return found

    def reduced(self, duals: FloatArray) -> FloatArray:
        """Reduced costs of all columns, with the duals of a relaxation with the same `dues`."""
        return self._reduced(self._cost, duals)

    def _reduced(self, cost: FloatArray, duals: FloatArray) -> FloatArray:
        fixed = len(self._row_lower)
        reduced: FloatArray = cost - self._rows.priced(duals[:fixed])
        for price, limit in zip(duals[fixed:], self.dues, strict=True):
            if price != 0:
                reduced -= price * self._memory_row(limit, self._due, self._load, self._is_last)
        return reduced

    def _broken(self, index: IntArray, values: FloatArray) -> list[float]:
        """Dues whose rows a solution breaks, the worst few."""
        used = values > 1e-9
        due, load = self._due[index][used], self._load[index][used]
        last, amount = self._is_last[index][used], values[used]
        limits = np.unique(due[np.isfinite(due) & (due < self._num_devices) & ~last])
        if len(limits) == 0:
            return []
        excess = np.array([self._memory_row(d, due, load, last) @ amount - d for d in limits.tolist()])
        worst = np.argsort(-excess, kind="stable")[:8]
        return [float(limits[i]) for i in worst if excess[i] > 1e-6 * max(1.0, limits[i])]

    # --- whole numbers ---

    def _integer(
        self, chosen: IntArray, least: float, patience: Patience
    ) -> tuple[Solution | None, float, bool]:
        """The best whole solution over some columns, a bound on all of those, whether time ended."""
        if len(chosen) == 0:
            return None, np.inf, False
        until_s = work_s() + patience.processor_s
        while True:
            left = replace(patience, processor_s=until_s - work_s())
            if left.is_over:
                return None, -np.inf, True
            outcome = self._run(chosen, self._slack / max(1.05 * least, 1e-30), left)
            if outcome.status == "infeasible":
                return None, np.inf, False
            bound = outcome.bound if outcome.bound is not None else -np.inf
            if not outcome.has_point:
                return None, bound, True
            counts = np.round(outcome.values).astype(np.intp)
            broken = self._broken(chosen, outcome.values)
            if broken:
                self.dues = (*self.dues, *broken)
                continue
            used = np.flatnonzero(counts)
            assert outcome.objective is not None
            found = Solution(chosen[used], counts[used], outcome.objective, bound)
            return found, bound, outcome.truncated_by == "time limit"

    def _run(self, chosen: IntArray, gap: float, patience: Patience) -> Outcome:
        matrix = np.concatenate([self._rows.of(chosen), self._memory(chosen)])
        lower, upper = self._limits()
        if self._backend == "cbc":
            # Another program's processor time is not at hand.
            left_s = max(1e-3, min(patience.processor_s, patience.deadline_s - time.monotonic()))
            return self._through_program(matrix, chosen, lower, upper, gap, left_s)
        program = MatrixProgram(
            cost=self._cost[chosen],
            lower=np.zeros(len(chosen)),
            upper=self._most[chosen],
            integer=np.ones(len(chosen), dtype=np.bool_),
            matrix=sparse.csr_matrix(matrix),
            row_lower=lower,
            row_upper=upper,
        )
        return program.solve(relative_gap=gap, patience=patience)

    def _through_program(
        self,
        matrix: FloatArray,
        chosen: IntArray,
        lower: FloatArray,
        upper: FloatArray,
        gap: float,
        left_s: float,
    ) -> Outcome:
        program = Program("counting")
        pool = [program.integer(f"x{i}", 0, float(self._most[j])) for i, j in enumerate(chosen)]
        for row, low, high in zip(matrix, lower, upper, strict=True):
            terms = [(float(row[i]), pool[i]) for i in np.flatnonzero(row)]
            if low == high:
                program.constrain(terms, "==", float(low))
            elif np.isfinite(high):
                program.constrain(terms, "<=", float(high))
            else:
                program.constrain(terms, ">=", float(low))
        program.minimize([(float(self._cost[j]), pool[i]) for i, j in enumerate(chosen)])
        return program.solve(time_limit_s=left_s, relative_gap=gap, backend=self._backend)
