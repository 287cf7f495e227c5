"""A pipeline of few columns, put together by an integer programme with every row there is.

Lines keep memory by position but not devices, patterns of kinds devices but not memory, and where both
bind what is met mostly keeps neither. Their columns are good ones, though, some hundred of many thousand;
so are those with the least reduced costs. How often to take each is a small integer programme:

    minimise  sum_j cost_j x_j
    such that all blocks are run, one first and one last stage; devices, whole groups, nodes
              sum_{due_j <= d} width_j x_j <= d  for all d    (the last stage counts for every d)

With runs as columns (`counting_runs`) a solution is a pipeline, in the order of `due`.
"""

import numpy as np
from scipy import sparse

from graphpar.partition.counting_columns import FIRST, LAST, WHOLE
from graphpar.partition.counting_kinds import memory_row
from graphpar.partition.counting_lines import Line, Lines
from graphpar.partition.solver_matrix import MatrixProgram
from graphpar.partition.unit_arrays import FloatArray, IntArray

_COLUMNS, _ENDS = 150, 15
"""Columns with the least reduced costs, and of these first and last stages at least."""


def cheapest(lines: Lines) -> IntArray:
    """The columns that add least to the least cost of lines."""
    order = np.argsort(lines.rise, kind="stable")
    role = lines.columns.role[order]
    ends = [order[role == end][:_ENDS] for end in (FIRST, LAST)]
    found: IntArray = np.unique(np.concatenate([order[:_COLUMNS], *ends]))
    return found


def best_among(lines: Lines, index: IntArray, spend: float, gap: float, patience_s: float) -> Line | None:
    """The cheapest line of several of some columns below `spend`, within a gap, as far as patience goes.

    None where there is none or the solver found none in time.
    """
    index = index[lines.columns.role[index] != WHOLE]
    own = lines.only(index)
    if len(own.cost) == 0 or patience_s <= 0:
        return None
    matrix, low, high = _rows(own)
    program = MatrixProgram(
        cost=own.cost,
        lower=np.zeros(len(own.cost)),
        upper=np.floor(own.blocks / np.maximum(own.columns.blocks, 1)),
        integer=np.ones(len(own.cost), dtype=np.bool_),
        matrix=sparse.csr_matrix(np.concatenate([matrix, own.cost[None]])),
        row_lower=np.append(low, -np.inf),
        row_upper=np.append(high, spend),
    )
    outcome = program.solve(time_limit_s=patience_s, relative_gap=gap)
    if not outcome.has_point:
        return None
    used = np.repeat(np.arange(len(own.cost)), np.round(outcome.values).astype(np.intp))
    order = used[np.lexsort((own.due[used], -own.columns.role[used]))]
    line = lines.line_of(tuple(index[order].tolist()))
    return line if line.cost < spend and lines.holds(line) else None


def _rows(lines: Lines) -> tuple[FloatArray, FloatArray, FloatArray]:
    """[row, column] with what sums over the columns of a pipeline are at least and at most."""
    role, width = lines.columns.role, lines.width
    first, last = role == FIRST, role == LAST
    rows: list[FloatArray] = [lines.columns.blocks.astype(np.float64), first * 1.0, last * 1.0]
    low, high = [float(lines.blocks), 1.0, 1.0], [float(lines.blocks), 1.0, 1.0]
    for row, constant in zip(lines.sums, lines.constant.tolist(), strict=True):
        rows.append(row)
        low.append(-np.inf)
        high.append(1.0 - constant)
    for row, least in zip(lines.nodes[0], lines.nodes[1].tolist(), strict=True):
        if (row < 0).any():
            rows.append(row)
            low.append(least)
            high.append(np.inf)
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
