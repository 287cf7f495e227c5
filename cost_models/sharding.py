"""The sharding programme of a stage: how a tensor group computes each op, at the least time.

Minimise, over one strategy s_v for every op v, one form f_x for every value x that is read several
times, and one slice w_p for every weight p (on a mesh of two axes each is a pair, one along each axis):

    sum_v  t_v(s_v)                     the op's time at the member that takes longest
  + sum_p  u_p(w_p)                     the optimiser's time for the slice, and what holding it costs
  + sum_e  c_e(layout made, layout wanted)    what is sent where the two do not meet, forward and back

Repeated blocks are folded: equal ops of equal blocks share a variable, so that 32 layers cost what one
does, and the edge from a block to its successor becomes an edge of the block to itself. Everything is
in whole nanoseconds, so that bounds round up and the solver's proof is exact.
"""

from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import prod

import numpy as np
import numpy.typing as npt

from graphpar.cost_models.group_times import ShardingOptions, TensorGroup
from graphpar.cost_models.mesh_times import MeshTimes
from graphpar.cost_models.whole_ops import whole_ops
from graphpar.errors import VerifyError
from graphpar.ir.chain import Chain
from graphpar.ir.graph import Graph
from graphpar.ir.mesh import Layouts, Ways, fit, ways_of, whole_along
from graphpar.ir.ops import SOURCES, Op
from graphpar.ir.shards import Layout, Split
from graphpar.ir.strategies import Strategy, strategies_of, value_of
from graphpar.partition.problems import IMPOSSIBLE_COST, ShardingProblem
from graphpar.partition.shard import solve_sharding
from graphpar.partition.types import WholeOp

_SOLVE_LIMITS_S = (20.0, 120.0)
"""Folded blocks take a fraction of a second; on a busy machine the first call may need longer."""


@dataclass(frozen=True)
class Sharding:
    """How a group computes a stage: the arguments of the pass that rewrites it, and the certificate.

    Attributes:
        chosen: For each op its strategy.
        forms: For each value that is read several times the layout it is brought into first.
        weights: For each weight the slice that members hold, or "whole".
        objective_s: Seconds of one microbatch, both directions, its part of the optimiser's, and the
            price of memory.
        bound_s: No choice is faster under the same costs; None where the search was cut short.
        whole: What every member computes whole, and why.
        inner: The same along the second axis of a mesh; None for a group of one axis.
    """

    chosen: Mapping[str, Strategy]
    forms: Mapping[str, Layout]
    weights: Mapping[str, Layout]
    objective_s: float = 0.0
    bound_s: float | None = None
    whole: tuple[WholeOp, ...] = ()
    inner: "Sharding | None" = None

    @property
    def axes(self) -> "tuple[Sharding, ...]":
        """What it says along each axis, the outer one first."""
        return (self, *(self.inner.axes if self.inner is not None else ()))

    def ways(self, name: str) -> Ways | None:
        """How an op of the stage is computed."""
        if name not in self.chosen:
            return None
        return Ways(tuple(axis.chosen[name] for axis in self.axes))

    def held(self, name: str) -> Layouts:
        """How a weight is held."""
        return tuple(axis.weights.get(name, "whole") for axis in self.axes)

    def form(self, name: str, made: Layouts) -> Layouts:
        """The layouts into which a value is brought for all its readers, where it is made in some."""
        axes = zip(self.axes, made, strict=True)
        return tuple(axis.forms.get(name, layout) for axis, layout in axes)


def choose_sharding(
    graph: Graph, stage: int, chain: Chain, group: TensorGroup, options: ShardingOptions
) -> Sharding:
    """The fastest way for a group to compute one stage of a lowered graph.

    Args:
        graph: A lowered graph.
        stage: Which stage of it.
        chain: Units of the captured graph; ops of equal kinds are decided together.
        group: Who computes it.
        options: Microbatch size and the like.
    """
    return ShardingProgramme(graph, stage, chain, group, options).solve(options)


def least_seconds(graph: Graph, stage: int, group: TensorGroup, options: ShardingOptions) -> float:
    """No sharding has a lower objective, whatever it sends: every op and weight alone at its cheapest.

    Args:
        graph: A lowered graph.
        stage: Which stage of it.
        group: Who computes it.
        options: Microbatch size and the like.
    """
    times = MeshTimes(graph, group, options)
    along = [group.along(axis) for axis in range(len(group.axes))]
    tables = [_allowed(strategies_of(graph, each.shares), each.size, options) for each in along]
    ops = [op for op in graph.ops if op.attr("stage") == stage and op.target != "getitem"]
    read = {name for op in ops for name in op.operands()}
    hold_s = options.hold_factor / group.link.bytes_per_s
    hold_s *= prod(max(each.shares) for each in along) if options.cuts_weights else 1.0
    total = 0.0
    for op in ops:
        # Strategies with equal shares take equally long; of samples there are only whole ones.
        rows = [list({times.alone.shares_of(s): s for s in table[op.name]}.values()) for table in tables]
        total += min(sum(times.parts(op, Ways(ways))) for ways in product(*rows))
    for op in graph.sources("parameter"):
        if op.name in read:
            total += hold_s * times.alone.weight_bytes(op, 1.0)
    return total


Key = Hashable
Matrix = npt.NDArray[np.float64]


@dataclass
class _Variable:
    """One decision: of each alternative the seconds, and the bytes that are held and kept.

    `priced` are the bytes held as they are priced (see `MeshTimes.priced_bytes`).
    """

    number: int
    costs: list[float]
    held: list[float]
    kept: list[float]
    priced: list[float]


class ShardingProgramme:
    """The programme of one stage, which may be solved at several prices of memory.

    Args:
        graph: A lowered graph.
        stage: Which stage of it.
        chain: Units of the captured graph.
        group: Who computes it.
        options: Those of `solve` may differ in the price and limit of memory alone.
    """

    def __init__(
        self, graph: Graph, stage: int, chain: Chain, group: TensorGroup, options: ShardingOptions
    ) -> None:
        self.graph, self.stage, self.group, self.options = graph, stage, group, options
        self.keeps = False
        self.ops = [
            op
            for op in graph.ops
            if (op.attr("stage") == stage and op.target != "getitem") or op.target == "output"
        ]
        inside = {op.name for op in self.ops}
        along = [group.along(axis) for axis in range(len(group.axes))]
        tables = [_allowed(strategies_of(graph, each.shares), each.size, options) for each in along]
        self.table = ways_of(tables, group.axes, inside)
        self.whole = whole_along(len(along))
        self.place = {
            name: (unit.kind, index) for unit in chain.units for index, name in enumerate(unit.ops)
        }
        self.times = MeshTimes(graph, group, options)
        self.variables: dict[Key, _Variable] = {}
        self.matrices: dict[tuple[int, int], Matrix] = {}
        self.tables: dict[Key, Matrix] = {}
        self.key_of: dict[str, Key] = {}
        self.weights: dict[str, tuple[Layouts, ...]] = {}
        self.forms: dict[str, tuple[Layouts, ...]] = {}
        self.readers: dict[str, list[tuple[Op, int]]] = defaultdict(list)
        self._build()

    # --- building ---

    def _build(self) -> None:
        priced: dict[Key, list[float]] = {}
        for op in self.ops:
            rows = self.table[op.name]
            key = self._place(op), id(rows)  # `ways_of` gives equal ops the same rows
            if key not in priced:
                priced[key] = [self.times.seconds(op, s) for s in rows]
            self._add(op.name, key, priced[key])
            for slot, name in enumerate(op.operands()):
                self.readers[name].append((op, slot))
        for op in self.graph.ops:
            readers = self.readers.get(op.name, [])
            if op.target in ("parameter", "buffer") and readers:
                self._add_weight(op, readers)
        for name, readers in self.readers.items():
            self._connect(name, readers)

    def _count_kept(self) -> None:
        """What every way keeps for backward; most programmes are solved without."""
        kept: dict[Key, list[float]] = {}
        for op in self.ops:
            key = self.key_of[op.name]
            if key not in kept:
                kept[key] = [self.times.kept_bytes(op, s) for s in self.table[op.name]]
            found = self.variables[key]
            found.kept = [a + b for a, b in zip(found.kept, kept[key], strict=True)]
        self.keeps = True

    def _place(self, op: Op) -> Key:
        return self.place.get(op.name, op.name)

    def _add(
        self,
        name: str,
        key: Key,
        costs: Sequence[float],
        held: Sequence[float] = (),
        priced: Sequence[float] = (),
    ) -> None:
        """Costs of all that share a variable add up; so do their bytes."""
        self.key_of[name] = key
        found = self.variables.get(key)
        if found is None:
            none = [0.0] * len(costs)
            found = self.variables[key] = _Variable(len(self.variables), none, none, none, none)
        found.costs = [a + b for a, b in zip(found.costs, costs, strict=True)]
        if held:
            found.held = [a + b for a, b in zip(found.held, held, strict=True)]
            found.priced = [a + b for a, b in zip(found.priced, priced, strict=True)]

    def _add_weight(self, op: Op, readers: Sequence[tuple[Op, int]]) -> None:
        label = str(op.args[0])
        wanted: list[list[Layout]] = [["whole"] for _ in self.whole]
        if self.options.cuts_weights and op.target == "parameter":
            for along in range(len(self.whole)):
                every = (ways.operands[slot][along] for r, slot in readers for ways in self.table[r.name])
                wanted[along] += dict.fromkeys(layout for layout in every if isinstance(layout, Split))
        layouts = tuple(held for held in product(*wanted) if fit(held, self.group.axes))
        if label in self.options.fixed:
            layouts = (self.options.fixed[label],)
        self.weights[op.name] = layouts
        first, slot = readers[0]
        key = ("weight", self._place(first), slot, layouts)
        self._add(
            op.name,
            key,
            [self.times.optimizer_seconds(op, layout) for layout in layouts],
            held=[self.times.weight_bytes(op, layout) for layout in layouts],
            priced=[self.times.priced_bytes(op, layout) for layout in layouts],
        )

    def _connect(self, name: str, readers: Sequence[tuple[Op, int]]) -> None:
        source, index = value_of(self.graph, name)
        made = self._layouts(source, index)
        if len(readers) == 1 or self.graph[name].target in SOURCES:
            for reader, slot in readers:
                self._edge(source, made, reader, slot, name)
            return
        wanted = [s.operands[slot] for r, slot in readers for s in self.table[r.name]]
        forms = tuple(dict.fromkeys((*made, *wanted)))
        self.forms[name] = forms
        form = f"{name} form"
        self._add(form, ("form", self.key_of.get(source, source), index, forms), [0.0] * len(forms))
        self._matrix(source, form, self._converting(name, made, forms))
        for reader, slot in readers:
            self._edge(form, forms, reader, slot, name)

    def _layouts(self, source: str, index: int) -> tuple[Layouts, ...]:
        if source in self.table:
            return tuple(s.results[index] for s in self.table[source])
        return self.weights.get(source, (self.whole,))

    def _edge(self, source: str, made: Sequence[Layouts], reader: Op, slot: int, name: str) -> None:
        wanted = [ways.operands[slot] for ways in self.table[reader.name]]
        matrix = self._converting(name, made, wanted)
        if reader.target == "gp.cast_weight":
            as_held = [[_cast_as_held(a, b) for b in wanted] for a in made]
            matrix = np.where(as_held, matrix, float(IMPOSSIBLE_COST))
        self._matrix(source, reader.name, matrix)

    def _converting(self, name: str, made: Sequence[Layouts], wanted: Sequence[Layouts]) -> Matrix:
        """Seconds from each of some layouts to each of others; priced once for each two that differ."""
        op = self.graph[name]
        rows, columns = tuple(dict.fromkeys(made)), tuple(dict.fromkeys(wanted))
        key = (op.types, op.target == "parameter", bool(op.attr("grad")), rows, columns)
        if key not in self.tables:
            self.tables[key] = self.times.conversion_table(op, rows, columns)
        place, other = ({held: i for i, held in enumerate(side)} for side in (rows, columns))
        return self.tables[key][np.ix_([place[a] for a in made], [other[b] for b in wanted])]

    def _matrix(self, left: str, right: str, matrix: Matrix) -> None:
        if left not in self.key_of:
            found = self.variables[self.key_of[right]]
            found.costs = [a + b for a, b in zip(found.costs, matrix[0].tolist(), strict=True)]
            return
        a, b = (self.variables[self.key_of[side]] for side in (left, right))
        if a is b:
            own = matrix.diagonal().tolist()
            a.costs = [cost + more for cost, more in zip(a.costs, own, strict=True)]
            return
        key = (a.number, b.number)
        self.matrices[key] = self.matrices[key] + matrix if key in self.matrices else matrix

    # --- solving ---

    def problem(self, options: ShardingOptions) -> ShardingProblem:
        """The problem in the terms of the solver, in nanoseconds."""
        hold_s, keep_s = (
            factor / self.group.link.bytes_per_s for factor in (options.hold_factor, options.keep_factor)
        )
        rows = [
            [c + hold_s * h + keep_s * k for c, h, k in zip(v.costs, v.priced, v.kept, strict=True)]
            for v in self.variables.values()
        ]
        return ShardingProblem(
            name=f"stage {self.stage} of {self.graph.name}",
            intervals=tuple((0, 1) for _ in self.variables),
            node_costs=tuple(tuple(map(_nanoseconds, row)) for row in rows),
            usages=tuple(
                tuple(round(h + k) for h, k in zip(v.held, v.kept, strict=True))
                for v in self.variables.values()
            ),
            edge_nodes=tuple(self.matrices),
            edge_costs=tuple(
                tuple(map(_nanoseconds, m.ravel().tolist())) for m in self.matrices.values()
            ),
            usage_limit=options.memory_bytes,
        )

    def solve(self, options: ShardingOptions) -> Sharding:
        """The best sharding at the prices of some options."""
        if not self.variables:
            return Sharding({}, {}, {})
        if not self.keeps and (options.keep_factor or options.memory_bytes is not None):
            self._count_kept()
        for limit_s in _SOLVE_LIMITS_S:
            found = solve_sharding(self.problem(options), time_limit_s=limit_s)
            if found.status != "unknown":
                break
        if found.answer is None or found.objective is None:
            raise VerifyError(
                f"The sharding programme of stage {self.stage} of {self.graph.name} has no answer "
                f"({found.status}); whole everywhere is one unless memory_bytes forbids it; "
                "on a machine that is busy with other things, try again."
            )
        pick = {key: found.answer[v.number] for key, v in self.variables.items()}
        chosen = {name: rows[pick[self.key_of[name]]] for name, rows in self.table.items()}
        forms = {name: rows[pick[self.key_of[f"{name} form"]]] for name, rows in self.forms.items()}
        weights = {name: rows[pick[self.key_of[name]]] for name, rows in self.weights.items()}
        along: Sharding | None = None
        for axis in reversed(range(len(self.whole))):
            along = Sharding(
                {name: ways.along[axis] for name, ways in chosen.items()},
                {name: layouts[axis] for name, layouts in forms.items()},
                {name: layouts[axis] for name, layouts in weights.items()},
                inner=along,
            )
        assert along is not None
        return replace(
            along,
            objective_s=found.objective * 1e-9,
            bound_s=found.bound * 1e-9 if found.bound is not None else None,
            whole=whole_ops(self.ops, self.graph, self.table, chosen, self.times),
        )


def _allowed(
    table: Mapping[str, Sequence[Strategy]], size: int, options: ShardingOptions
) -> dict[str, tuple[Strategy, ...]]:
    """The strategies along an axis of so many members that training and the batch allow."""
    cuts_batch = options.cuts_batch and options.samples >= size
    return {
        name: tuple(
            s
            for s in rows
            if (options.training or "copied" not in s.results) and (cuts_batch or not s.samples)
        )
        for name, rows in table.items()
    }


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9) if seconds < IMPOSSIBLE_COST else IMPOSSIBLE_COST


def _cast_as_held(held: Layouts, wanted: Layouts) -> bool:
    """Whether a weight is cast as it lies, and sent only afterwards, in the lower format.

    A bias that the first member alone reads is read through its cast; the others then take no part in
    whatever collective stood before.
    """
    return all(a == b or (a == "whole" and b == "copied") for a, b in zip(held, wanted, strict=True))


def conversions_of(sharding: Sharding, graph: Graph, op: Op) -> Iterator[tuple[str, Layouts, Layouts]]:
    """What has to be converted for an op to run: value, layouts it is in, layouts it is wanted in."""
    ways = sharding.ways(op.name)
    assert ways is not None
    for name, wanted in zip(op.operands(), ways.operands, strict=True):
        source, index = value_of(graph, name)
        maker = sharding.ways(source)
        made = maker.results[index] if maker is not None else sharding.held(name)
        yield name, sharding.form(name, made), wanted
