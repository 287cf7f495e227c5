"""Compiled questions about one cost table; infinite entries are impossible pairs."""

import numpy as np

from graphpar.partition.jit import compiled_exactly
from graphpar.partition.shard_graph import FloatArray

ROWS_DETERMINE, COLUMNS_DETERMINE = 1, 2
"""Bits of `determined`."""


@compiled_exactly
def any_impossible(table: FloatArray) -> bool:
    """Whether some pair is impossible."""
    for i in range(table.shape[0]):
        for j in range(table.shape[1]):
            if table[i, j] == np.inf:
                return True
    return False


@compiled_exactly
def is_separable(table: FloatArray) -> bool:
    """Whether `table[i, j] = table[i, 0] + (table[0, j] - table[0, 0])` everywhere, all finite."""
    for i in range(table.shape[0]):
        if table[i, 0] == np.inf:
            return False
    for j in range(table.shape[1]):
        if table[0, j] == np.inf:
            return False
    for i in range(table.shape[0]):
        for j in range(table.shape[1]):
            if table[i, j] != table[i, 0] + (table[0, j] - table[0, 0]):
                return False
    return True


@compiled_exactly
def determined(table: FloatArray) -> int:
    """Whether every row, and whether every column, has exactly one possible entry."""
    in_columns = np.zeros(table.shape[1], np.int64)
    answer = ROWS_DETERMINE | COLUMNS_DETERMINE
    for i in range(table.shape[0]):
        in_row = 0
        for j in range(table.shape[1]):
            if table[i, j] < np.inf:
                in_row += 1
                in_columns[j] += 1
                if in_columns[j] > 1:
                    answer &= ~COLUMNS_DETERMINE
        if in_row != 1:
            answer &= ~ROWS_DETERMINE
        if answer == 0:
            return 0
    for j in range(table.shape[1]):
        if in_columns[j] != 1:
            answer &= ~COLUMNS_DETERMINE
    return answer


@compiled_exactly
def add_largest_increase(worse: FloatArray, table: FloatArray) -> None:
    """Add max over j of `table[b, j] - table[a, j]` to `worse[a, b]`, where that is finite.

    An impossible `table[a, j]` asks nothing of b.
    """
    count, width = table.shape
    for a in range(count):
        for b in range(count):
            if worse[a, b] == np.inf:
                continue
            most = -np.inf
            for j in range(width):
                present = table[a, j]
                if present < np.inf:
                    most = max(most, table[b, j] - present)
                    if most == np.inf:
                        break
            worse[a, b] += most
