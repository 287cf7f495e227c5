"""All ideals of an order, from small to large, and the steps between them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from graphpar.partition.clock import ShouldStop, never
from graphpar.partition.jit import compiled_exactly
from graphpar.partition.placement.graph import IntArray

WordArray = npt.NDArray[np.uint64]
"""Sets of items as bits, 64 to a word."""


class Steps(NamedTuple):
    """For each ideal its maximal items, and the ideals without them.

    Attributes:
        start: Where each ideal's steps begin, and their number at the end.
        item, to: The item that a step leaves out, and the ideal that it leads to.
    """

    start: IntArray
    item: IntArray
    to: IntArray


@dataclass(frozen=True, eq=False)
class AllIdeals:
    """Every ideal.

    Attributes:
        found: Each as bits, the smaller ones first.
        number: The place of each.
        levels: Where the ideals of 0, 1, ... items begin, and the number of all at the end.
        steps: The steps between them.
    """

    found: list[int]
    number: dict[int, int]
    levels: list[int]
    steps: Steps


def all_ideals_of(before: Sequence[int], most: int, should_stop: ShouldStop = never) -> AllIdeals | None:
    """The ideals of items that wait for the items in `before`, as bits; None where there are too many.

    >>> all_ideals_of([0b00, 0b00, 0b11], most=9).found
    [0, 1, 2, 3, 7]
    """
    after: list[list[int]] = [[] for _ in before]
    for i, mask in enumerate(before):
        for j in range(mask.bit_length()):
            if mask >> j & 1:
                after[j].append(i)
    found, number, levels = [0], {0: 0}, [0, 1]
    taken: list[tuple[int, int, int]] = []
    available = [[i for i, mask in enumerate(before) if not mask]]
    while available:
        following: list[list[int]] = []
        for place, ready in enumerate(available, start=levels[-2]):
            ideal = found[place]
            for i in ready:
                larger = ideal | 1 << i
                if larger not in number:
                    number[larger] = len(found)
                    found.append(larger)
                    more = [j for j in after[i] if before[j] & ~larger == 0]
                    following.append([j for j in ready if j != i] + more)
                taken.append((number[larger], i, place))
        if len(found) > most or should_stop():
            return None
        available = following
        if following:
            levels.append(len(found))
    table = np.array(taken, dtype=np.int64).reshape(-1, 3)
    table = table[np.argsort(table[:, 0], kind="stable")]
    start = np.searchsorted(table[:, 0], np.arange(len(found) + 1)).astype(np.int64)
    return AllIdeals(found, number, levels, Steps(start, table[:, 1].copy(), table[:, 2].copy()))


def words_of(masks: Sequence[int], count: int) -> WordArray:
    """Sets of `count` items as rows of words."""
    width = 1 + count // 64
    rows = [[mask >> 64 * w & (2**64 - 1) for w in range(width)] for mask in masks]
    return np.array(rows, dtype=np.uint64).reshape(len(masks), width)


def lists_of(rows: Sequence[Sequence[int]]) -> tuple[IntArray, IntArray]:
    """Where each row begins, and all entries.

    >>> lists_of([[3], [], [1, 2]])
    (array([0, 1, 1, 3]), array([3, 1, 2]))
    """
    start = np.cumsum([0, *map(len, rows)])
    return start.astype(np.int64), np.array([i for row in rows for i in row], np.int64)


@compiled_exactly
def has(sets: WordArray, k: int, item: int) -> bool:
    """Whether an item is in a set."""
    return bool(sets[k, item // 64] >> np.uint64(item % 64) & np.uint64(1))
