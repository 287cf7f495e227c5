"""Rows of whole numbers from JSON text, without a Python object for each number.

A large file holds ten million of them. Read as lists they cost more processor time than finding a first
answer, and again as much to turn into arrays.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate, chain
from typing import TypeAlias, overload

import numpy as np
import numpy.typing as npt

from graphpar.partition.clock import OutOfTimeError, ShouldStop, never
from graphpar.partition.jit import compiled_exactly

Int64Array: TypeAlias = npt.NDArray[np.int64]
FloatArray: TypeAlias = npt.NDArray[np.float64]
Number: TypeAlias = int | float
Rows: TypeAlias = Sequence[Sequence[Number]]

_BYTES_AT_A_TIME = 4_000_000
"""Text read between two looks at the clock: some ten milliseconds."""

_MORE, _ALL, _NOT_PLAIN = 0, 1, 2


class NumberRows(Sequence[Sequence[int]]):
    """Lists of whole numbers of 64 bits, lying one after the other in one array.

    Attributes:
        start: First number of each row, and how many there are at the end.
        values: All numbers.

    >>> rows = NumberRows(np.array([0, 2, 3]), np.array([5, 1, 7]))
    >>> len(rows), list(rows[0]), rows[1][0]
    (2, [5, 1], 7)
    """

    def __init__(self, start: Int64Array, values: Int64Array) -> None:
        self.start, self.values = start, values
        # Entries of a memory view are Python's integers, whose sums cannot overflow.
        self._view = memoryview(values.data)
        self._start: list[int] = start.tolist()

    def __len__(self) -> int:
        return len(self._start) - 1

    @overload
    def __getitem__(self, row: int) -> Sequence[int]: ...

    @overload
    def __getitem__(self, row: slice) -> Sequence[Sequence[int]]: ...

    def __getitem__(self, row: int | slice) -> Sequence[int] | Sequence[Sequence[int]]:
        if isinstance(row, slice):
            return [self[k] for k in range(*row.indices(len(self)))]
        if not 0 <= row < len(self):
            raise IndexError(row)
        return self._view[self._start[row] : self._start[row + 1]]

    def __iter__(self) -> Iterator[Sequence[int]]:
        return map(self.__getitem__, range(len(self)))

    def __repr__(self) -> str:
        return f"NumberRows({len(self)} rows, {len(self.values)} numbers)"


def sizes_of(rows: Rows) -> Int64Array:
    """Numbers in each row."""
    if isinstance(rows, NumberRows):
        return np.diff(rows.start)
    return np.fromiter(map(len, rows), np.int64, len(rows))


def flat(rows: Rows) -> tuple[Int64Array, FloatArray]:
    """Where each row begins, the number of entries at the end, and all entries.

    >>> flat(((5, 1), (7,)))
    (array([0, 2, 3]), array([5., 1., 7.]))
    """
    if isinstance(rows, NumberRows):
        return rows.start, rows.values.astype(np.float64)
    start = np.fromiter(accumulate(map(len, rows), initial=0), np.int64, len(rows) + 1)
    return start, np.fromiter(chain.from_iterable(rows), np.float64, int(start[-1]))


def at_least(rows: Rows, limit: int) -> npt.NDArray[np.bool_]:
    """Which entries reach a limit, compared as read: not rounded.

    >>> at_least(((10**18 - 1, 10**18),), 10**18)
    array([False,  True])
    """
    if isinstance(rows, NumberRows):
        return rows.values >= limit
    return np.fromiter((number >= limit for row in rows for number in row), np.bool_)


def are_whole(rows: Rows) -> bool:
    """Whether all numbers are whole, as read."""
    return isinstance(rows, NumberRows) or all(float not in set(map(type, row)) for row in rows)


def parse_rows(text: bytes | memoryview, should_stop: ShouldStop = never) -> NumberRows | None:
    """The rows in the text of a JSON array of arrays, or None if not all are whole numbers of 64 bits.

    Empty rows count as that too: what is wrong with a text is for a slower reader to say.

    Raises:
        OutOfTimeError: It was time to stop.

    >>> parse_rows(b"[[1, -2],[30]]").values.tolist()
    [1, -2, 30]
    >>> parse_rows(b"[[1, 2.5]]") is None
    True
    """
    letters = np.frombuffer(text, np.uint8)
    if letters[:1].tobytes() != b"[" or letters[-1:].tobytes() != b"]":
        return None
    most = 1 + sum(
        int(np.count_nonzero(letters[at : at + _BYTES_AT_A_TIME] == ord(",")))
        for at in range(0, len(letters), _BYTES_AT_A_TIME)
    )
    # Pages that are never written to take no memory.
    values, ends = np.empty(most, np.int64), np.empty(most + 1, np.int64)
    ends[0] = 0
    state = np.array([1, 0, 0], np.int64)
    verdict = _MORE
    while verdict == _MORE:
        if should_stop():
            raise OutOfTimeError
        verdict = scan_rows(letters, state, int(state[0]) + _BYTES_AT_A_TIME, values, ends)
    if verdict != _ALL:
        return None
    return NumberRows(ends[: state[2] + 1].copy(), values[: state[1]])


@compiled_exactly
def scan_rows(
    text: npt.NDArray[np.uint8], state: Int64Array, stop: int, values: Int64Array, ends: Int64Array
) -> int:
    """Read rows up to about the position `stop`; 0 for more to come, 1 at the end, 2 for other text.

    `state` is the position in the text, the numbers read and the rows read.
    """
    at, count, rows, size = state[0], state[1], state[2], len(text)
    while at < stop:
        while at < size and (text[at] == 32 or (9 <= text[at] <= 13)):
            at += 1
        if at >= size or text[at] != 91:  # [
            return 2
        at += 1
        inside = True
        while inside:
            while at < size and (text[at] == 32 or (9 <= text[at] <= 13)):
                at += 1
            negative = at < size and text[at] == 45  # -
            if negative:
                at += 1
            first, value = at, np.uint64(0)
            while at < size and 48 <= text[at] <= 57:
                value = value * np.uint64(10) + np.uint64(text[at] - 48)
                at += 1
            digits = at - first
            # Nineteen digits fit 64 bits without a sign.
            if digits == 0 or digits > 19 or value > np.uint64(2**63 - 1):
                return 2
            if digits > 1 and text[first] == 48:
                return 2
            values[count] = -np.int64(value) if negative else np.int64(value)
            count += 1
            while at < size and (text[at] == 32 or (9 <= text[at] <= 13)):
                at += 1
            if at < size and text[at] == 44:  # ,
                at += 1
            elif at < size and text[at] == 93:  # ]
                at += 1
                inside = False
            else:
                return 2
        rows += 1
        ends[rows] = count
        while at < size and (text[at] == 32 or (9 <= text[at] <= 13)):
            at += 1
        if at < size and text[at] == 93:
            state[0], state[1], state[2] = at + 1, count, rows
            return 1 if at + 1 == size else 2
        if at >= size or text[at] != 44:
            return 2
        at += 1
    state[0], state[1], state[2] = at, count, rows
    return 0
