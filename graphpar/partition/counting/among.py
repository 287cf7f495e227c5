"""A pipeline of few columns, put together by an integer programme with every row there is.

Lines keep memory by position but not devices, patterns of kinds devices but not memory, and where both
bind what is met mostly keeps neither. Their columns are good ones, though, some hundred of many thousand;
so are those with the least reduced costs. How often to take each is a small integer programme:

    minimise  sum_j cost_j x_j
    such that all blocks are run, one first and one last stage; devices, whole groups, nodes
              sum_{due_j <= d} width_j x_j <= d  for all d    (the last stage counts for every d)

With runs as columns (`runs`) a solution is a pipeline, in the order of `due`.
"""

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
    matrix, low, high = _rows(own, packed)
    program = MatrixProgram(
        cost=own.cost,
        lower=np.zeros(len(own.cost)),
        upper=np.floor(own.blocks / np.maximum(own.columns.blocks, 1)),
        integer=np.ones(len(own.cost), dtype=np.bool_),
        matrix=sparse.csr_matrix(np.concatenate([matrix, own.cost[None]])),
        row_lower=np.append(low, -np.inf),
        row_upper=np.append(high, spend),
    )
    outcome = program.solve(relative_gap=gap, patience=patience)
    if outcome.status == "infeasible":
        return Among(None, spend)
    cost = -np.inf if outcome.bound is None else min(outcome.bound, spend)
    if not outcome.has_point:
        return Among(None, cost)
    used = np.repeat(several, np.round(outcome.values).astype(np.intp))
    order = used[np.lexsort((lines.due[used], -lines.columns.role[used]))]
    line = lines.line_of(tuple(order.tolist()))
    return Among(line if line.cost < spend and lines.holds(line) else None, cost)


def _rows(lines: Lines, packed: bool) -> tuple[FloatArray, FloatArray, FloatArray]:
    """[row, column] with what sums over the columns of a pipeline are at least and at most."""
    role, width = lines.columns.role, lines.width
    first, last = role == FIRST, role == LAST
    rows: list[FloatArray] = [lines.columns.blocks.astype(np.float64), first * 1.0, last * 1.0]
    low, high = [float(lines.blocks), 1.0, 1.0], [float(lines.blocks), 1.0, 1.0]
    for row, constant in zip(lines.sums, lines.constant.tolist(), strict=True):
        rows.append(row)
        low.append(-np.inf)
        high.append(1.0 - constant)
    for held, leasts in (lines.nodes, lines.packed) if packed else (lines.nodes,):
        binding = (held < 0).any(axis=1)
        rows += list(held[binding])
        low += leasts[binding].tolist()
        high += [np.inf] * int(binding.sum())
    for due in np.unique(lines.due[~first & (lines.due < lines.devices)]).tolist():
        rows.append(memory_row(lines, due))
        low.append(-np.inf)
        high.append(float(due))
    for due in np.unique(lines.due[first & (lines.due < lines.devices)]).tolist():
        # All replicas are behind a first stage; one with a later due may have more.
        rows.append(np.where(first & (lines.due > due), width - lines.devices, width) * 1.0)
        low.append(-np.inf)
        high.append(float(due))
    return np.stack(rows), np.array(low), np.array(high)
