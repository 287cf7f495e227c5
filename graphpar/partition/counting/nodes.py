"""Rows of the counting programme that say how many boundaries between stages leave a node.

Neighbouring stages in one node form a run with two boundaries to the outside. What is in a run fits into
a node. So whatever `f` is that says of the devices of stages that fit into a node together at most one in
sum (a dual feasible function),

    sum_j outside_j x_j >= 2 sum_j f(devices_j) x_j       over all j with a boundary inside

holds; all others are runs of their own. A stage with a boundary inside stands in one node as a whole, and
`f` of all a node has is the most that its stages come to, for these functions are superadditive:

    sum_{j with a boundary inside} f(devices_j) x_j <= sum_nodes f(size)

The share of a node, `d / s`, is one such function. Of a node of `s` devices others are (Fekete and
Schepers, "New classes of fast lower bounds for bin packing problems", Math. Programming 91, 2001)

    f_k(d) = floor((k + 1) d / s) / k,   or d / s where (k + 1) d / s is a whole number:

three devices of eight count as half a node, for no more than two such stages fit. Where the nodes of a
kind hold no others, runs are of one kind, and the rows hold for each kind alone.
"""

from collections.abc import Sequence

import numpy as np

from graphpar.partition.cells import Cells
from graphpar.partition.counting.columns import BoolArray, Columns
from graphpar.partition.unit_arrays import FloatArray, IntArray

_MOST_PARTS = 3
"""The functions `f_k` up to this k are tried."""


def node_rows(
    cells: Cells, outside: IntArray, take: IntArray, runs: BoolArray | None = None
) -> tuple[FloatArray, FloatArray]:
    """[row, column], and what sums over the columns of a pipeline are at least.

    The first row is the boundaries of all kinds together less twice their shares; `outside` are the
    boundaries of each column that leave a node, `take` is [column, cell]. Columns that are `runs` stand
    in a node as a whole, too.
    """
    sizes = np.array(cells.node_sizes, dtype=np.float64)
    share = np.minimum((take / sizes).sum(axis=1), 1.0)
    inside = outside < 2 if runs is None else (outside < 2) | runs
    rows, least = [np.where(inside, outside - 2 * share, 0.0)], [0.0]
    for cell, size in enumerate(cells.node_sizes):
        if not cells.alone[cell] or size == 1:
            continue
        mine, devices = take[:, cell] > 0, np.minimum(take[:, cell], size)
        for filled in node_shares(size):
            rows.append(np.where(mine & inside, outside - 2 * filled[devices], 0.0))
            rows.append(np.where(mine & inside, -filled[devices], 0.0))
            least += [0.0, -float(filled[list(cells.rooms[cell])].sum())]
    return np.stack(rows), np.array(least)


def packed_rows(cells: Cells, take: IntArray) -> tuple[FloatArray, FloatArray]:
    """[row, column] and least sums that hold where every stage stands in as few nodes as it can.

    They need not: two of its replicas may exchange over the network. `take` is [column, cell].
    """
    rows, least = [np.zeros(len(take))], [0.0]
    for cell, size in enumerate(cells.node_sizes):
        if cells.alone[cell] and size > 1:
            whole, rest = np.divmod(take[:, cell], size)
            for filled in node_shares(size):
                rows.append(-(whole + filled[rest]))
                least.append(-float(filled[list(cells.rooms[cell])].sum()))
    return np.stack(rows), np.array(least)


def odd_columns(cells: Cells, columns: Columns, take: IntArray) -> IntArray:
    """[cell, column]: 1 where one boundary of a column is inside a node that holds no other kind.

    A boundary inside a node is one of two stages, so that in a pipeline these are even for each kind.
    """
    one = (take.T > 0) & np.array(cells.alone)[:, None] & (columns.outside == 1)
    found: IntArray = one.astype(np.intp)
    return found


def node_shares(size: int) -> list[FloatArray]:
    """Dual feasible functions of a node of a size, each over 0 to `size` devices, the share first.

    >>> [f.tolist() for f in node_shares(4)]
    [[0.0, 0.25, 0.5, 0.75, 1.0], [0.0, 0.0, 0.5, 1.0, 1.0]]
    """
    devices = np.arange(size + 1)
    found: list[FloatArray] = [devices / size]
    for parts in range(1, _MOST_PARTS + 1):
        whole, rest = np.divmod((parts + 1) * devices, size)
        own = np.where(rest == 0, devices / size, whole / parts)
        if not any((own <= other).all() for other in found):
            found = [found[0], *(f for f in found[1:] if not (f <= own).all()), own]
    return found


def filled(size: int, groups: Sequence[int]) -> int:
    """The most devices of a node of a size that groups of some sizes take together.

    >>> filled(6, [4, 6]), filled(8, [3, 4]), filled(5, [3, 4])
    (6, 8, 4)
    """
    sums = {0}
    for _ in range(size // min(groups)):
        sums |= {held + group for held in sums for group in groups if held + group <= size}
    return max(sums)


def filling_alike(rooms: Sequence[int], groups: Sequence[int]) -> list[int]:
    """The first of some sizes of groups, and those beside which groups fill no more of any node.

    >>> filling_alike([7, 6], [2, 4, 7]), filling_alike([6], [4, 6]), filling_alike([9], [2, 4, 8])
    ([2, 4], [4], [2, 4, 8])
    """
    found = [groups[0]]
    for group in groups[1:]:
        if all(filled(room, [*found, group]) == filled(room, found) for room in set(rooms)):
            found.append(group)
    return found
