"""A linear programme that columns and rows join: each solution begins where the last one ended.

Column generation solves nearly the same programme many times. HiGHS keeps its basis when columns or rows
are added, so that few steps of the simplex method are left. Points are judged like those of any other
programme (`solver_matrix`).
"""

import time
from dataclasses import dataclass
from typing import Any

import highspy
import numpy as np
import numpy.typing as npt
from scipy import sparse

from graphpar.partition.solver_matrix import (
    FloatArray,
    MatrixProgram,
    Outcome,
    judge,
    new_highs,
    objective_scale,
    read_highs,
)

_PRIMAL, _DUAL = 4, 1
"""HiGHS's numbers of the simplex methods: after columns joined the first, after rows the second."""

BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Basis:
    """Which columns and rows are basic."""

    columns: BoolArray
    rows: BoolArray


class GrowingProgram:
    """Minimise `cost x` over `row_lower <= matrix x <= row_upper`, `0 <= x <= upper`.

    Args:
        cost: Of every column.
        upper: The most of every column.
        matrix: [row, column], dense.
        row_lower: Least of every row.
        row_upper: Most of every row.
        basis: Where to begin; need not be one of this programme in every respect.
    """

    def __init__(
        self,
        cost: FloatArray,
        upper: FloatArray,
        matrix: FloatArray,
        row_lower: FloatArray,
        row_upper: FloatArray,
        basis: Basis | None = None,
    ) -> None:
        self._cost, self._upper, self._matrix = cost, upper, matrix
        self._row_lower, self._row_upper = row_lower, row_upper
        self._scale = objective_scale(cost)
        self._highs = new_highs(0.0, 1)
        none = np.zeros(0)
        self._add_rows_to(none[:, None][:0], row_lower, row_upper)
        self._add_columns_to(cost, upper, matrix)
        if basis is not None:
            self._highs.setBasis(_as_highs(basis))

    def add_columns(self, cost: FloatArray, upper: FloatArray, matrix: FloatArray) -> None:
        """Let columns join, `matrix` is [row, new column]."""
        self._cost, self._upper = np.append(self._cost, cost), np.append(self._upper, upper)
        self._matrix = np.concatenate([self._matrix, matrix], axis=1)
        self._add_columns_to(cost, upper, matrix)
        self._highs.setOptionValue("simplex_strategy", _PRIMAL)

    def add_rows(self, matrix: FloatArray, lower: FloatArray, upper: FloatArray) -> None:
        """Let rows join, `matrix` is [new row, column]."""
        self._row_lower, self._row_upper = (
            np.append(self._row_lower, lower),
            np.append(self._row_upper, upper),
        )
        self._matrix = np.concatenate([self._matrix, matrix])
        self._add_rows_to(matrix, lower, upper)
        self._highs.setOptionValue("simplex_strategy", _DUAL)

    def limit(self, column: int, most: float) -> None:
        """Let a column be no more than that."""
        self._upper[column] = most
        self._highs.changeColBounds(column, 0.0, most)
        self._highs.setOptionValue("simplex_strategy", _DUAL)

    @property
    def basis(self) -> Basis:
        """Of the last solution."""
        found, basic = self._highs.getBasis(), highspy.HighsBasisStatus.kBasic
        columns, rows = found.col_status, found.row_status
        return Basis(
            np.array([s == basic for s in columns], dtype=np.bool_),
            np.array([s == basic for s in rows], dtype=np.bool_),
        )

    def solve(self, time_limit_s: float) -> Outcome:
        """The best point, duals of the rows included."""
        began_s = time.perf_counter()
        # HiGHS counts the time of all runs of one programme.
        self._highs.setOptionValue("time_limit", self._highs.getRunTime() + time_limit_s)
        self._highs.run()
        raw, seconds = read_highs(self._highs, False), time.perf_counter() - began_s
        return judge(raw, self._program(), 0.0, self._scale, seconds)

    def _program(self) -> MatrixProgram:
        number = len(self._cost)
        return MatrixProgram(
            cost=self._cost,
            lower=np.zeros(number),
            upper=self._upper,
            integer=np.zeros(number, dtype=np.bool_),
            matrix=self._matrix,
            row_lower=self._row_lower,
            row_upper=self._row_upper,
        )

    def _add_columns_to(self, cost: FloatArray, upper: FloatArray, matrix: FloatArray) -> None:
        own = sparse.csc_matrix(matrix)
        self._highs.addCols(
            len(cost),
            cost * self._scale,
            np.zeros(len(cost)),
            upper,
            own.nnz,
            own.indptr[:-1].astype(np.int32),
            own.indices.astype(np.int32),
            own.data,
        )

    def _add_rows_to(self, matrix: FloatArray, lower: FloatArray, upper: FloatArray) -> None:
        own = sparse.csr_matrix(matrix) if matrix.size else sparse.csr_matrix((len(lower), 0))
        self._highs.addRows(
            len(lower),
            lower,
            upper,
            own.nnz,
            own.indptr[:-1].astype(np.int32),
            own.indices.astype(np.int32),
            own.data,
        )


def _as_highs(basis: Basis) -> Any:
    status = highspy.HighsBasisStatus
    found = highspy.HighsBasis()
    found.col_status = [status.kBasic if b else status.kLower for b in basis.columns.tolist()]
    found.row_status = [status.kBasic if b else status.kLower for b in basis.rows.tolist()]
    found.valid, found.alien = True, True
    return found
