"""The integer programme of a reduced sharding problem, with lazy memory rows.

With x[u, i] = 1 if vertex u takes strategy i and y[e, r, c] the joint choice at edge e = (u, v):

    minimise    sum c[u, i] x[u, i] + sum C[e, r, c] y[e, r, c]
    subject to  sum_i x[u, i] = 1                                   for every vertex
                sum_c y[e, r, c] = sum of x[u, i] over class r      for every edge and row class
                sum_r y[e, r, c] = sum of x[v, j] over class c      for every edge and column class
                sum use[u, i, t] x[u, i] <= limit[t]                for every memory row found violated
                x binary, y >= 0

Rows of C equal up to a constant form one class (the constant moves into c), then columns likewise:
y is the joint distribution of the classes, so merging loses nothing. An impossible pair gets no
variable. y needs no integrality: with x integral, the marginals pin it.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import sparse

from graphpar.partition.clock import ShouldStop, in_time, never
from graphpar.partition.sharding.graph import FloatArray, IntArray, MemoryRows, ShardingGraph
from graphpar.partition.sharding.memory import vertex_profile
from graphpar.partition.solver import MatrixProgram


@dataclass(frozen=True, eq=False)
class TableClasses:
    """`table[i, j] = row_constant[i] + column_constant[j] + core[row_class[i], column_class[j]]`."""

    row_class: IntArray
    column_class: IntArray
    row_constant: FloatArray
    column_constant: FloatArray
    core: FloatArray


def merge_classes(table: FloatArray) -> TableClasses:
    """Group the rows, then the columns, of a table that are equal up to a constant."""
    row_constant, row_class, fewer_rows = _merge_rows(table)
    column_constant, column_class, core = _merge_rows(fewer_rows.T)
    return TableClasses(row_class, column_class, row_constant, column_constant, core.T)


def _merge_rows(table: FloatArray) -> tuple[FloatArray, IntArray, FloatArray]:
    least = table.min(axis=1, initial=np.inf)
    # a row without any possible entry keeps its infinities
    constant = np.where(np.isfinite(least), least, 0.0)
    normal = np.ascontiguousarray(table - constant[:, None])
    as_bytes = normal.view(np.dtype((np.void, normal.dtype.itemsize * normal.shape[1])))[:, 0]
    _, index, inverse = np.unique(as_bytes, return_index=True, return_inverse=True)
    return constant, inverse.reshape(-1).astype(np.intp), normal[index]


@dataclass(frozen=True, eq=False)
class ShardingProgram:
    """A sharding ILP and the meaning of its first columns.

    `offset[u]` is the column of x[u, 0]; columns of one vertex are adjacent.
    """

    program: MatrixProgram
    offset: dict[int, int]

    def choice(self, values: FloatArray, graph: ShardingGraph) -> dict[int, int]:
        """The strategy of each vertex in a solution."""
        return {
            u: int(values[begin : begin + len(graph.costs[u])].argmax())
            for u, begin in self.offset.items()
        }

    def start(self, choice: dict[int, int]) -> FloatArray:
        """A column vector holding only the x of a choice; the solver completes the y."""
        start = np.zeros(len(self.program.cost))
        for u, begin in self.offset.items():
            start[begin + choice[u]] = 1.0
        return start


class _Builder:
    """Collects triplets of the constraint matrix."""

    def __init__(self) -> None:
        self.rows: list[npt.NDArray[np.intp]] = []
        self.columns: list[npt.NDArray[np.intp]] = []
        self.values: list[FloatArray] = []
        self.row_lower: list[FloatArray] = []
        self.row_upper: list[FloatArray] = []
        self.num_rows = 0

    def add(self, rows: IntArray, columns: IntArray, value: float | FloatArray) -> None:
        """Add entries; `rows` count from the next free row."""
        self.rows.append(rows + self.num_rows)
        self.columns.append(columns)
        self.values.append(np.broadcast_to(np.asarray(value, np.float64), rows.shape))

    def close(self, count: int, lower: float, upper: float) -> None:
        """Make the last `count` rows count as written."""
        self.row_lower.append(np.full(count, lower))
        self.row_upper.append(np.full(count, upper))
        self.num_rows += count


def count_pairs(graph: ShardingGraph) -> int:
    """Number of pair entries of all tables."""
    return sum(t.size for u, row in graph.tables.items() for v, t in row.items() if u < v)


def build_program(
    graph: ShardingGraph,
    rows: MemoryRows,
    active_rows: Iterable[int],
    *,
    should_stop: ShouldStop = never,
) -> ShardingProgram:
    """The programme of a graph with the given memory rows only.

    Args:
        graph: The problem without its memory limit.
        rows: All memory rows.
        active_rows: Which of them to write down.
        should_stop: Looked at all the time.

    Raises:
        OutOfTimeError: It was time to stop.
    """
    offset, builder = {}, _Builder()
    costs = [np.zeros(0)]
    position = 0
    for u, cost in in_time(graph.costs.items(), should_stop):
        offset[u] = position
        here = np.arange(position, position + len(cost))
        builder.add(np.zeros(len(cost), np.intp), here, 1.0)
        builder.close(1, 1.0, 1.0)
        costs.append(cost.copy())
        position += len(cost)
    cost_of = np.concatenate(costs)
    pair_costs = [np.zeros(0)]
    num_strategies = position
    for u, tables in in_time(graph.tables.items(), should_stop):
        for v, table in tables.items():
            if u < v:
                merged = merge_classes(table)
                cost_of[offset[u] : offset[u] + len(table)] += merged.row_constant
                cost_of[offset[v] : offset[v] + table.shape[1]] += merged.column_constant
                position += _add_edge(builder, merged, offset[u], offset[v], position)
                pair_costs.append(merged.core[np.isfinite(merged.core)])
    _add_memory(builder, graph, rows, sorted(active_rows), offset, should_stop)
    integer = np.zeros(position, dtype=np.bool_)
    integer[:num_strategies] = True
    upper = np.full(position, np.inf)
    upper[:num_strategies] = 1.0
    return ShardingProgram(
        MatrixProgram(
            cost=np.concatenate([cost_of, *pair_costs]),
            lower=np.zeros(position),
            upper=upper,
            integer=integer,
            matrix=sparse.csr_matrix(
                (
                    np.concatenate(builder.values),
                    (np.concatenate(builder.rows), np.concatenate(builder.columns)),
                ),
                shape=(builder.num_rows, position),
            ),
            row_lower=np.concatenate(builder.row_lower),
            row_upper=np.concatenate(builder.row_upper),
            constant=graph.constant,
        ),
        offset,
    )


def _add_edge(builder: _Builder, merged: TableClasses, first_u: int, first_v: int, position: int) -> int:
    num_rows, num_columns = merged.core.shape
    row, column = np.nonzero(np.isfinite(merged.core))
    pairs = np.arange(position, position + len(row))
    builder.add(row, pairs, 1.0)
    builder.add(merged.row_class, np.arange(first_u, first_u + len(merged.row_class)), -1.0)
    builder.close(num_rows, 0.0, 0.0)
    builder.add(column, pairs, 1.0)
    builder.add(merged.column_class, np.arange(first_v, first_v + len(merged.column_class)), -1.0)
    builder.close(num_columns, 0.0, 0.0)
    return len(row)


def _add_memory(
    builder: _Builder,
    graph: ShardingGraph,
    rows: MemoryRows,
    active_rows: list[int],
    offset: dict[int, int],
    should_stop: ShouldStop,
) -> None:
    if not active_rows:
        return
    active = np.array(active_rows, dtype=np.intp)
    limit = rows.limit[active]
    # Rows are scaled to a limit of one, so that the solver's tolerances mean a share of memory.
    scale = 1.0 / np.maximum(1.0, np.abs(limit))
    for u, begin in in_time(offset.items(), should_stop):
        profile = vertex_profile(graph.members[u], rows)
        if profile is None:
            continue
        boundaries, use = profile
        segment = np.searchsorted(boundaries, active, side="right") - 1
        inside = np.flatnonzero((segment >= 0) & (segment < use.shape[1]))
        if inside.size == 0:
            continue
        amounts = use[:, segment[inside]]
        strategy, place = np.nonzero(amounts)
        target = inside[place]
        builder.add(target, begin + strategy, amounts[strategy, place] * scale[target])
    builder.num_rows += len(active)
    builder.row_lower.append(np.full(len(active), -np.inf))
    builder.row_upper.append(limit * scale)
