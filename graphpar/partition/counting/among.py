"""A pipeline of few columns, put together by an integer programme with every row there is.

Lines keep memory by position but not devices, patterns of kinds devices but not memory, and where both
bind what is met mostly keeps neither. Their columns are good ones, though, some hundred of many thousand;
so are those with the least reduced costs. How often to take each is a small integer programme:

    minimise  sum_j cost_j x_j
    such that all blocks are run, one first and one last stage; devices, whole groups, nodes
              sum_{due_j <= d} width_j x_j <= d  for all d    (the last stage counts for every d)

Rows of neighbouring dues differ in a few columns, so each is the one before and those: what is summed up
to a due is a variable of its own (`_chain`). Written out, some hundred dues make a dense matrix.

With runs as columns (`runs`) a solution is a pipeline, in the order of `due`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse

from graphpar.partition.counting.columns import FIRST, LAST, WHOLE
from graphpar.partition.counting.kinds import memory_row
from graphpar.partition.counting.lines import Line, Lines
from graphpar.partition.solver_matrix import MatrixProgram, Patience
from graphpar.partition.unit_arrays import FloatArray, IntArray

_COLUMNS, _ENDS, _SPREAD = 150, 15, 100
"""Columns with the least reduced costs, of these first and last stages at least, others beside, ..."""

_LIKE = 2
"""... the best few of each sort: of a role, kind, number of devices and of replicas."""

_AS_WRITTEN = {"presolve": "off"}
"""HiGHS's presolve puts sums into each other until every row holds all columns again."""


def cheapest(lines: Lines) -> IntArray:
    """The columns that add least to the least cost of lines, and with these some of each sort."""
    order = np.argsort(lines.rise, kind="stable")
    role = lines.columns.role[order]
    ends = [order[role == end][:_ENDS] for end in (FIRST, LAST)]
    kind, devices = lines.take.argmax(axis=1), lines.take.sum(axis=1)
    sorts = np.stack([lines.columns.role, kind, devices, lines.width])[:, order]
    _, sort = np.unique(sorts, axis=1, return_inverse=True)
    by_sort = np.argsort(sort.reshape(-1), kind="stable")
    begins = np.flatnonzero(np.diff(sort.reshape(-1)[by_sort], prepend=-1))
    some = by_sort[np.unique(np.minimum(begins[:, None] + np.arange(_LIKE), len(order) - 1))]
    spread = order[np.sort(some)[:_SPREAD]]
    found: IntArray = np.unique(np.concatenate([order[:_COLUMNS], spread, *ends]))
    return found


@dataclass(frozen=True, eq=False)
class Among:
    """The cheapest line that was found, if any, and what all lines of several columns cost at least."""

    line: Line | None
    cost: float


def best_among(
    lines: Lines, index: IntArray, spend: float, gap: float, patience: Patience, *, packed: bool = False
) -> Line | None:
    """The cheapest line of several of some columns below `spend`, within a gap, as far as patience goes.

    None where there is none or the solver found none in time. `packed` as in `solve_lines`.
    """
    return lines.among(index, solve_lines(lines.only(index), spend, gap, patience, packed=packed).line)


def solve_lines(
    lines: Lines, spend: float, gap: float, patience: Patience, *, packed: bool = False
) -> Among:
    """The cheapest line of several columns below `spend`, and a bound on all others or `spend`.

    Where they are `packed`, only lines whose stages may all be put into nodes count.
    """
    several = np.flatnonzero(lines.columns.role != WHOLE)
    own = lines.only(several)
    if len(own.cost) == 0 or patience.is_over:
        return Among(None, -np.inf if patience.is_over else spend)
    outcome = _program(own, packed, spend).solve(relative_gap=gap, patience=patience, options=_AS_WRITTEN)
    if outcome.status == "infeasible":
        return Among(None, spend)
    cost = -np.inf if outcome.bound is None else min(outcome.bound, spend)
    if not outcome.has_point:
        return Among(None, cost)
    used = np.repeat(several, np.round(outcome.values[: len(several)]).astype(np.intp))
    order = used[np.lexsort((lines.due[used], -lines.columns.role[used]))]
    line = lines.line_of(tuple(order.tolist()))
    return Among(line if line.cost < spend and lines.holds(line) else None, cost)


def _program(lines: Lines, packed: bool, spend: float) -> MatrixProgram:
    """How often to take each column, and after these what memory rows sum up to each due."""
    rows, low, high = _rows(lines, packed, spend)
    nests = [_memory_rows(lines), _memory_rows_of_first(lines)]
    dues = np.concatenate([due for _, due in nests])
    more = np.concatenate([np.diff(nest, axis=0, prepend=0.0) for nest, _ in nests])
    count, sums = len(lines.cost), len(dues)
    beside = sparse.csr_matrix((len(rows), sums))
    matrix = [[sparse.csr_matrix(rows), beside], [sparse.csr_matrix(more), _chain(nests)]]
    return MatrixProgram(
        cost=np.append(lines.cost, np.zeros(sums)),
        lower=np.append(np.zeros(count), np.full(sums, -np.inf)),
        upper=np.append(np.floor(lines.blocks / np.maximum(lines.columns.blocks, 1)), dues),
        integer=np.arange(count + sums) < count,
        matrix=sparse.vstack([sparse.hstack(row) for row in matrix], format="csr"),
        row_lower=np.append(low, np.zeros(sums)),
        row_upper=np.append(high, np.zeros(sums)),
    )


def _chain(nests: Sequence[tuple[FloatArray, FloatArray]]) -> sparse.csr_matrix:
    """What sums stand in rows that take each for the one before it in its nest and what is new."""
    length = [len(due) for _, due in nests]
    number = np.arange(sum(length))
    later = np.setdiff1d(number, np.cumsum([0, *length]))
    values = np.repeat([-1.0, 1.0], [len(number), len(later)])
    place = np.append(number, later), np.append(number, later - 1)
    return sparse.csr_matrix((values, place), shape=(len(number), len(number)))


def _rows(lines: Lines, packed: bool, spend: float) -> tuple[FloatArray, FloatArray, FloatArray]:
    """[row, column] with sums over the columns of a pipeline, their least and most; memory aside."""
    first, last = lines.columns.role == FIRST, lines.columns.role == LAST
    rows: list[FloatArray] = [*np.array([lines.columns.blocks, first, last]) * 1.0, lines.cost]
    low, high = [float(lines.blocks), 1.0, 1.0, -np.inf], [float(lines.blocks), 1.0, 1.0, spend]
    for row, constant in zip(lines.sums, lines.constant.tolist(), strict=True):
        rows.append(row)
        low.append(-np.inf)
        high.append(1.0 - constant)
    for held, leasts in (lines.nodes, lines.packed) if packed else (lines.nodes,):
        binding = (held < 0).any(axis=1)
        rows += list(held[binding])
        low += leasts[binding].tolist()
        high += [np.inf] * int(binding.sum())
    return np.stack(rows), np.array(low), np.array(high)


def _memory_rows(lines: Lines) -> tuple[FloatArray, FloatArray]:
    """[due, column] with the replicas that columns put among so many last ones for sure, and how many."""
    inner = lines.columns.role != FIRST
    dues = np.unique(lines.due[inner & (lines.due < lines.devices)])
    rows = [memory_row(lines, due) for due in dues.tolist()]
    return np.array(rows).reshape(len(dues), len(lines.cost)), dues.astype(np.float64)


def _memory_rows_of_first(lines: Lines) -> tuple[FloatArray, FloatArray]:
    """The same for first stages: all replicas are behind one; one with a later due may have more."""
    first, width = lines.columns.role == FIRST, lines.width
    dues = np.unique(lines.due[first & (lines.due < lines.devices)])
    late = first & (lines.due > dues[:, None])
    return np.where(late, width - lines.devices, width) * 1.0, dues.astype(np.float64)
