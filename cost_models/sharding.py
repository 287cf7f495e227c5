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
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
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
from graphpar.ir.strategies import Strategy, StrategyTables, value_of
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


def least_seconds(
    graph: Graph,
    stage: int,
    chain: Chain,
    group: TensorGroup,
    options: ShardingOptions,
    strategies: StrategyTables | None = None,
) -> float:
    """No sharding has a lower objective, whatever it sends: every op and weight alone at its cheapest.

    Args:
        graph: A lowered graph.
        stage: Which stage of it.
        chain: Units of the captured graph; ops of equal kinds take equally long.
        group: Who computes it.
        options: Microbatch size and the like.
        strategies: Those of the graph, where they were asked for before.
    """
    times = MeshTimes(graph, group, options)
    tables = _tables(strategies or StrategyTables(graph), group, options)
    places, least = _places(chain), dict[Key, float]()
    ops = [op for op in graph.ops if op.attr("stage") == stage and op.target != "getitem"]
    read = {name for op in ops for name in op.operands()}
    hold_s = options.hold_factor / group.link.bytes_per_s
    if options.cuts_weights:
        hold_s *= prod(max(group.along(axis).shares) for axis in range(len(group.axes)))
    total = 0.0
    for op in ops:
        rows = [table[op.name] for table in tables]
        key = places.get(op.name, op.name), tuple(map(id, rows))
        if key not in least:
            # Strategies with equal shares take equally long; of samples there are only whole ones.
            unlike = [list({times.alone.shares_of(s): s for s in row}.values()) for row in rows]
            least[key] = min(sum(times.parts(op, Ways(ways))) for ways in product(*unlike))
        total += least[key]
    for op in graph.sources("parameter"):
        if op.name in read:
            total += hold_s * times.alone.weight_bytes(op, 1.0)
    return total


Key = Hashable
Matrix = npt.NDArray[np.float64]
_Rows = tuple[Layouts, ...]


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
        strategies: Those of the graph, where they were asked for before.
    """

    def __init__(
        self,
        graph: Graph,
        stage: int,
        chain: Chain,
        group: TensorGroup,
        options: ShardingOptions,
        strategies: StrategyTables | None = None,
    ) -> None:
        self.graph, self.stage, self.group, self.options = graph, stage, group, options
        self.keeps = False
        self.ops = [
            op
            for op in graph.ops
            if (op.attr("stage") == stage and op.target != "getitem") or op.target == "output"
        ]
        inside = {op.name for op in self.ops}
        tables = _tables(strategies or StrategyTables(graph), group, options)
        self.table = ways_of(tables, group.axes, inside)
        self.whole = whole_along(len(group.axes))
        self.place = _places(chain)
        self.times = MeshTimes(graph, group, options)
        self.variables: dict[Key, _Variable] = {}
        self.matrices: dict[tuple[int, int], Matrix] = {}
        self.converted: dict[Key, Matrix] = {}
        self.rows: dict[Key, _Rows] = {}
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
        cuts = self.options.cuts_weights and op.target == "parameter"
        wanted = tuple(dict.fromkeys(id(self._wanted(*reader)) for reader in readers))
        layouts = self._once(("held", cuts, wanted), lambda: self._held(readers if cuts else ()))
        if label in self.options.fixed:
            layouts = self._once(("fixed", label), lambda: (self.options.fixed[label],))
        self.weights[op.name] = layouts
        first, slot = readers[0]
        key = ("weight", self._place(first), slot, id(layouts))
        self._add(
            op.name,
            key,
            [self.times.optimizer_seconds(op, layout) for layout in layouts],
            held=[self.times.weight_bytes(op, layout) for layout in layouts],
            priced=[self.times.priced_bytes(op, layout) for layout in layouts],
        )

    def _held(self, readers: Sequence[tuple[Op, int]]) -> "_Rows":
        """How a weight may be held: whole, and in the slices that its readers want."""
        wanted: list[list[Layout]] = [["whole"] for _ in self.whole]
        for along in range(len(self.whole)):
            every = (layouts[along] for reader in readers for layouts in self._wanted(*reader))
            wanted[along] += dict.fromkeys(layout for layout in every if isinstance(layout, Split))
        return tuple(held for held in product(*wanted) if fit(held, self.group.axes))

    def _once(self, key: Key, make: Callable[[], "_Rows"]) -> "_Rows":
        """Rows of layouts, made once for a key; equal ones are one object."""
        if key not in self.rows:
            made = make()
            self.rows[key] = self.rows.setdefault(made, made)
        return self.rows[key]

    def _connect(self, name: str, readers: Sequence[tuple[Op, int]]) -> None:
        source, index = value_of(self.graph, name)
        made = self._layouts(source, index)
        if len(readers) == 1 or self.graph[name].target in SOURCES:
            for reader, slot in readers:
                self._edge(source, made, reader, slot, name)
            return
        wanted = {id(rows): rows for rows in (self._wanted(*reader) for reader in readers)}
        every = (layouts for rows in (made, *wanted.values()) for layouts in rows)
        forms = self._once(("form", id(made), tuple(wanted)), lambda: tuple(dict.fromkeys(every)))
        self.forms[name] = forms
        form = f"{name} form"
        self._add(form, ("form", self.key_of.get(source, source), index, id(forms)), [0.0] * len(forms))
        self._matrix(source, form, self._converting(name, made, forms))
        for reader, slot in readers:
            self._edge(form, forms, reader, slot, name)

    def _layouts(self, source: str, index: int) -> "_Rows":
        """How a value is made, by the ways of its op, or held."""
        if source in self.table:
            rows = self.table[source]
            return self._once(
                ("made", id(rows), index), lambda: tuple(ways.results[index] for ways in rows)
            )
        return self.weights.get(source) or self._once("whole", lambda: (self.whole,))

    def _wanted(self, reader: Op, slot: int) -> "_Rows":
        """How a reader wants an operand, by its ways."""
        rows = self.table[reader.name]
        return self._once(("read", id(rows), slot), lambda: tuple(ways.operands[slot] for ways in rows))

    def _edge(self, source: str, made: "_Rows", reader: Op, slot: int, name: str) -> None:
        wanted = self._wanted(reader, slot)
        matrix = self._converting(name, made, wanted)
        if reader.target == "gp.cast_weight":
            key = "cast as held", id(made), id(wanted)
            if key not in self.converted:
                self.converted[key] = np.array([[_cast_as_held(a, b) for b in wanted] for a in made])
            matrix = np.where(self.converted[key], matrix, float(IMPOSSIBLE_COST))
        self._matrix(source, reader.name, matrix)

    def _converting(self, name: str, made: "_Rows", wanted: "_Rows") -> Matrix:
        """Seconds from each of some layouts to each of others; priced once for each two that differ."""
        op = self.graph[name]
        alike = op.types, op.target == "parameter", bool(op.attr("grad"))
        key = (*alike, id(made), id(wanted))
        if key not in self.converted:
            rows, columns = tuple(dict.fromkeys(made)), tuple(dict.fromkeys(wanted))
            unlike = (*alike, rows, columns)
            if unlike not in self.converted:
                self.converted[unlike] = self.times.conversion_table(op, rows, columns)
            place, other = ({held: i for i, held in enumerate(side)} for side in (rows, columns))
            picked = np.ix_([place[a] for a in made], [other[b] for b in wanted])
            self.converted[key] = self.converted[unlike][picked]
        return self.converted[key]

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
            edge_costs=self._edge_costs,
            usage_limit=options.memory_bytes,
        )

    @cached_property
    def _edge_costs(self) -> tuple[tuple[int, ...], ...]:
        """In whole nanoseconds; they do not depend on prices of memory."""
        whole = (np.minimum(np.rint(m * 1e9), IMPOSSIBLE_COST) for m in self.matrices.values())
        return tuple(tuple(m.astype(np.int64).ravel().tolist()) for m in whole)

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


def _places(chain: Chain) -> dict[str, Key]:
    """For each op what it shares with the equal ops of equal units."""
    return {name: (unit.kind, index) for unit in chain.units for index, name in enumerate(unit.ops)}


def _tables(
    strategies: StrategyTables, group: TensorGroup, options: ShardingOptions
) -> list[dict[str, tuple[Strategy, ...]]]:
    """For each axis of a group the strategies along it that training and the batch allow."""
    along = [group.along(axis) for axis in range(len(group.axes))]
    return [_allowed(strategies.of(each.shares), each.size, options) for each in along]


def _allowed(
    table: Mapping[str, tuple[Strategy, ...]], size: int, options: ShardingOptions
) -> dict[str, tuple[Strategy, ...]]:
    """The strategies along an axis of so many members; equal rows stay one object."""
    cuts_batch = options.cuts_batch and options.samples >= size
    kept: dict[int, tuple[Strategy, ...]] = {}
    same: dict[tuple[Strategy, ...], tuple[Strategy, ...]] = {}
    for rows in table.values():
        if id(rows) not in kept:
            left = tuple(
                s
                for s in rows
                if (options.training or "copied" not in s.results) and (cuts_batch or not s.samples)
            )
            kept[id(rows)] = same.setdefault(left, left)
    return {name: kept[id(rows)] for name, rows in table.items()}


def _nanoseconds(seconds: float) -> int:
    return min(round(seconds * 1e9), IMPOSSIBLE_COST)


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
