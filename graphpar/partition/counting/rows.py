"""Rows over very many columns, most of which are alike: a coefficient for each sort is enough."""

from dataclasses import dataclass

from graphpar.partition.unit_arrays import FloatArray, IntArray


@dataclass(frozen=True, eq=False)
class AlikeRows:
    """Coefficients of rows: the blocks of a column in the first one, in all others those of its sort.

    >>> import numpy as np
    >>> table = np.array([[0.0, 0.0], [3.0, 4.0]])
    >>> rows = AlikeRows(np.array([2.0, 5.0, 5.0]), np.array([0, 1, 0]), table)
    >>> rows.of(np.array([1, 2])).tolist(), rows.priced(np.array([1.0, 10.0])).tolist()
    ([[5.0, 5.0], [4.0, 3.0]], [32.0, 45.0, 35.0])
    """

    blocks: FloatArray
    sort: IntArray
    table: FloatArray
    """[row, sort], nothing in the first row."""

    def pick(self, index: IntArray) -> "AlikeRows":
        """Only some columns."""
        return AlikeRows(self.blocks[index], self.sort[index], self.table)

    def of(self, index: IntArray) -> FloatArray:
        """[row, column] of some columns."""
        found: FloatArray = self.table[:, self.sort[index]]
        found[0] = self.blocks[index]
        return found

    def row(self, number: int) -> FloatArray:
        """One row over all columns, not the first."""
        found: FloatArray = self.table[number][self.sort]
        return found

    def priced(self, duals: FloatArray) -> FloatArray:
        """What rows at some prices come to for every column."""
        found: FloatArray = duals[0] * self.blocks + (duals @ self.table)[self.sort]
        return found
