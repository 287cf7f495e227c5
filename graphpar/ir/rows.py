"""The rows by which a weight is divided among replicas."""

from collections.abc import Sequence


def rows_in(shape: Sequence[int]) -> tuple[int, int]:
    """The first dimension of several, before which everything lies in one piece, and its size.

    Of a weight without elements there is nothing to divide.

    >>> rows_in((4, 0))
    (0, 0)
    >>> rows_in((5, 2)), rows_in((1, 197, 8)), rows_in((1, 1)), rows_in(())
    ((0, 5), (1, 197), (0, 1), (0, 0))
    """
    if 0 in shape:
        return 0, 0
    for dim, size in enumerate(shape):
        if size > 1:
            return dim, size
    return 0, shape[0] if shape else 0
