"""Compiled questions about one cost table; infinite entries are impossible pairs.

Each has a twin in array operations, which takes over until `compile_all` has run: the first run of an
installation cannot wait for the compiler, and a call would block until the whole compilation is over.
"""

import threading

import numpy as np
import numpy.typing as npt

from graphpar.partition.jit import COMPILED, compiled_exactly
from graphpar.partition.sharding.graph import BoolArray, FloatArray

ROWS_DETERMINE, COLUMNS_DETERMINE = 1, 2
"""Bits of `determined`."""


@compiled_exactly
def _any_impossible_loop(table: FloatArray) -> bool:
    for i in range(table.shape[0]):
        for j in range(table.shape[1]):
            if table[i, j] == np.inf:
                return True
    return False


@compiled_exactly
def _is_separable_loop(table: FloatArray) -> bool:
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
def _determined_loop(table: FloatArray) -> int:
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
def _add_largest_increase_loop(worse: FloatArray, table: FloatArray) -> None:
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


@compiled_exactly
def _forbid_more_memory_loop(worse: FloatArray, use: FloatArray) -> None:
    count, width = use.shape
    for a in range(count):
        for b in range(count):
            for k in range(width):
                if use[b, k] > use[a, k]:
                    worse[a, b] = np.inf
                    break


@compiled_exactly
def _replaceable_loop(worse: FloatArray, result: BoolArray) -> None:
    count = len(worse)
    for a in range(count - 1, -1, -1):
        for b in range(count):
            if a != b and worse[a, b] <= 0.0 and not result[b]:
                result[a] = True
                break


@compiled_exactly
def _least_sums_loop(
    first: FloatArray, second: FloatArray, gain: FloatArray, best: npt.NDArray[np.intp]
) -> None:
    width = first.shape[1]
    for i in range(first.shape[0]):
        for j in range(second.shape[0]):
            least, at = second[j, 0] + first[i, 0], 0
            for k in range(1, width):
                total = second[j, k] + first[i, k]
                if total < least:
                    least, at = total, k
            gain[i, j], best[i, j] = least, at


_READY = threading.Event()
"""Set once the loops are compiled."""


def compile_all() -> None:
    """Compile every loop, or load it from disk; from then on they are used."""
    if not COMPILED:
        return
    by_rows = np.zeros((2, 2))
    for table in (by_rows, by_rows.T):
        _any_impossible_loop(table)
        _is_separable_loop(table)
        _determined_loop(table)
    _add_largest_increase_loop(by_rows.copy(), by_rows)
    _forbid_more_memory_loop(by_rows.copy(), by_rows)
    _forbid_more_memory_loop(by_rows.copy(), by_rows.T)
    _forbid_more_memory_loop(by_rows.copy(), np.zeros((3, 2))[:, :1])
    _replaceable_loop(by_rows, np.zeros(2, dtype=np.bool_))
    _least_sums_loop(by_rows, by_rows, by_rows.copy(), np.zeros((2, 2), dtype=np.intp))
    _READY.set()


def any_impossible(table: FloatArray) -> bool:
    """Whether some pair is impossible."""
    if _READY.is_set():
        return _any_impossible_loop(table)
    return bool((table == np.inf).any())


def is_separable(table: FloatArray) -> bool:
    """Whether `table[i, j] = table[i, 0] + (table[0, j] - table[0, 0])` everywhere, all finite."""
    if _READY.is_set():
        return _is_separable_loop(table)
    if not (np.isfinite(table[:, 0]).all() and np.isfinite(table[0]).all()):
        return False
    return bool((table == table[:, :1] + (table[0] - table[0, 0])).all())


def determined(table: FloatArray) -> int:
    """Whether every row, and whether every column, has exactly one possible entry."""
    if _READY.is_set():
        return _determined_loop(table)
    possible = np.isfinite(table)
    by_rows = bool((possible.sum(axis=1) == 1).all())
    by_columns = bool((possible.sum(axis=0) == 1).all())
    return ROWS_DETERMINE * by_rows + COLUMNS_DETERMINE * by_columns


def add_largest_increase(worse: FloatArray, table: FloatArray) -> None:
    """Add max over j of `table[b, j] - table[a, j]` to `worse[a, b]`, where that is finite.

    An impossible `table[a, j]` asks nothing of b.
    """
    if _READY.is_set():
        _add_largest_increase_loop(worse, table)
        return
    for increase, row in zip(worse, table, strict=True):
        asked = np.isfinite(row)
        most = (table[:, asked] - row[asked]).max(axis=1, initial=-np.inf)
        finite = increase < np.inf
        increase[finite] += most[finite]


def forbid_more_memory(worse: FloatArray, use: FloatArray) -> None:
    """Make `worse[a, b]` infinite where b uses more memory than a in some segment."""
    if _READY.is_set():
        _forbid_more_memory_loop(worse, use)
        return
    for column in use.T:
        worse[column[None, :] > column[:, None]] = np.inf


def replaceable(worse: FloatArray) -> BoolArray:
    """Which a another b replaces, `worse[a, b] <= 0`; of some that replace each other the first stays.

    Only one that stays so far replaces another: as numbers are rounded each of a circle may seem no
    worse than the next one, and one must stay.
    """
    if _READY.is_set():
        result = np.zeros(len(worse), dtype=np.bool_)
        _replaceable_loop(worse, result)
        return result
    by = np.asarray(worse <= 0.0)
    np.fill_diagonal(by, False)
    found = np.zeros(len(by), dtype=np.bool_)
    for a in range(len(by) - 1, -1, -1):
        found[a] = (by[a] & ~found).any()
    return found


def least_sums(first: FloatArray, second: FloatArray) -> tuple[FloatArray, npt.NDArray[np.intp]]:
    """Of every row of one table with every row of the other the least sum, and where it is first.

    >>> least_sums(np.array([[1.0, 5.0]]), np.array([[0.0, 0.0], [9.0, 2.0]]))
    (array([[1., 7.]]), array([[0, 1]]))
    """
    gain = np.empty((len(first), len(second)))
    best = np.empty(gain.shape, dtype=np.intp)
    if _READY.is_set():
        _least_sums_loop(np.ascontiguousarray(first), np.ascontiguousarray(second), gain, best)
        return gain, best
    for i, row in enumerate(first):
        total = second + row[None, :]
        best[i] = total.argmin(axis=1)
        gain[i] = total[np.arange(len(second)), best[i]]
    return gain, best
