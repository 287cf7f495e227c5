"""The sharding programme of a mesh once more, with memory as a limit, replicas and ZeRO beside it.

Each op has one strategy for each axis, each value one layout for each axis. For a mesh of a x b, minimise
over a pair of strategies s_v = (s1, s2) for every op, a pair of layouts f_x for every value that is read
several times and w_p for every weight

    sum_v  t_v(s1, s2)      its time with the share of s1 times the share of s2
  + sum_p  u_p(w1, w2)      the optimiser's time for the slice of the slice
  + sum_e  c_e              the cheapest order of converting axis by axis, each over what the other axis
                            leaves of the value, or over all members at once where both axes do the same

with weights, gradients and optimiser state of a member within a limit. With one axis it is the programme
of `cost_models/sharding.py`; `tests/tensor/test_two_axes.py` compares the two.

The mesh is given the benefit of every doubt: any two dimensions may be cut together, and collectives
along an axis use the links as if those along the other did not exist.
"""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations, product
from math import inf, prod

import numpy as np
import numpy.typing as npt

from graphpar.cluster import Cluster
from graphpar.cost import LinkCost
from graphpar.cost_models.group_times import OpTimes, ShardingOptions, TensorGroup
from graphpar.groups.sharing import as_one_stage
from graphpar.ir.chain import Chain
from graphpar.ir.conversions import conversion
from graphpar.ir.graph import Graph
from graphpar.ir.ops import SOURCES, Op
from graphpar.ir.shards import Layout, Split
from graphpar.ir.strategies import Strategy, carries_gradient, strategies_of, value_of
from graphpar.partition.problems import IMPOSSIBLE_COST, ShardingProblem
from graphpar.partition.sharding.solve import solve_sharding
from graphpar.preparation import Prepared

STATE_RATIO = 6.0
"""Adam's moments and the master weight in float32 beside a weight in bfloat16."""
Layouts = tuple[Layout, ...]
"""A value's layout along each axis."""
_WHOLE: Layout = "whole"
Matrix = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Mesh:
    """How members are arranged.

    Attributes:
        axes: Members along each axis of the group.
        replicas: Groups of this kind that share the samples.
        zero: ZeRO level of the replicas: they divide the optimiser's state at 1, gradients too at 2.
        divides: Whether members of a group do so with weights that they hold alike; no group does yet.
    """

    axes: tuple[int, ...]
    replicas: int = 1
    zero: int = 0
    divides: bool = False

    def __str__(self) -> str:
        shape = "x".join(map(str, self.axes))
        beside = f"{self.replicas} replicas of " if self.replicas > 1 else ""
        return f"{beside}{shape}" + (f", ZeRO {self.zero}" if self.zero else "")


@dataclass(frozen=True)
class Ways:
    """One way to compute an op: a strategy along each axis."""

    along: tuple[Strategy, ...]

    def operand(self, slot: int) -> Layouts:
        """The layouts wanted of an operand."""
        return tuple(s.operands[slot] for s in self.along)

    def result(self, index: int) -> Layouts:
        """The layouts of a result."""
        return tuple(s.results[index] for s in self.along)


def gpus(count: int, link: LinkCost) -> TensorGroup:
    """So many H100 joined by a link."""
    cluster = Cluster.from_dict({"devices": [{"kind": "h100-sxm-80gb", "count": count}]})
    return TensorGroup(cluster.devices, (1 / count,) * count, link)


class MeshPrices:
    """Seconds and bytes of ops, weights and conversions over a mesh of equal members.

    Args:
        graph: The graph, lowered as one stage.
        mesh: How members are arranged.
        link: The link between any two of them.
        options: Samples of a microbatch of one replica and the like.
    """

    def __init__(self, graph: Graph, mesh: Mesh, link: LinkCost, options: ShardingOptions) -> None:
        self.graph, self.mesh, self.options, self.link = graph, mesh, options, link
        self.groups = [gpus(size, link) for size in mesh.axes]
        self.everybody = gpus(prod(mesh.axes), link)
        self.times = OpTimes(graph, self.everybody, options)

    def op_seconds(self, op: Op, ways: Ways) -> float:
        """Both directions, with what a loss over cut classes sends."""
        share = prod(1 / n for n, s in zip(self.mesh.axes, ways.along, strict=True) if s.shares)
        even = Strategy((), (), shares=(share,) * self.everybody.size)
        total = sum(self.times.parts(op, even))
        for axis, strategy in enumerate(ways.along):
            if strategy.special == "classes":
                rows = self.graph[op.operands()[1]].type.bytes(self.options.samples) / 8
                rows *= self.left(ways.operand(1), axis)
                total += 2 * self.groups[axis].seconds("all_reduce", 8.0 * rows)
        return total + (1e-9 if any(s.samples for s in ways.along) else 0.0)

    def left(self, layouts: Layouts, without: int = -1) -> float:
        """The part of a value that a member has; as if one axis had all of it."""
        return prod(
            1 / n
            for axis, (n, layout) in enumerate(zip(self.mesh.axes, layouts, strict=True))
            if axis != without and isinstance(layout, Split)
        )

    def held_bytes(self, op: Op, layouts: Layouts) -> float:
        """Weight, gradient and optimiser state."""
        left = self.left(layouts)
        if not op.attr("grad"):
            return op.type.bytes(1) * left
        gradient = left / self.mesh.replicas if self.mesh.zero > 1 else left
        return op.type.bytes(1) * (left + gradient + STATE_RATIO * self._stepped(layouts))

    def _stepped(self, layouts: Layouts) -> float:
        """The part of a weight whose state a member keeps."""
        left = 1 / self.everybody.size if self.mesh.divides else self.left(layouts)
        return left / (self.mesh.replicas if self.mesh.zero else 1)

    def step_seconds(self, op: Op, layouts: Layouts) -> float:
        """A microbatch's part of the optimiser's time, and of summing gradients over replicas."""
        if not op.attr("grad"):
            return 0.0
        replicas = self.mesh.replicas
        parts = round(1 / self._stepped(layouts))
        step = self.times.step_seconds(op, (1 / parts,) * self.everybody.size)
        once = (replicas - 1) / replicas * op.type.bytes(1) * self.left(layouts) / self.link.bytes_per_s
        # Gradients are scattered, and sums or weights gathered; at level 2 the first for each microbatch.
        each = self.options.microbatches
        return step + once / each + once / (1 if self.mesh.zero > 1 else each)

    def conversion_seconds(self, op: Op, made: Layouts, wanted: Layouts) -> float:
        """The cheapest order of axes, or all at once; endless where there is no way."""
        orders = permutations(range(len(made)))
        found = min(self._in_order(op, made, wanted, order) for order in orders)
        if len(made) > 1 and _alike(made) and _alike(wanted):
            found = min(found, self._along(op, self.everybody, made[0], wanted[0], 1.0))
        return min(found, float(IMPOSSIBLE_COST))

    def _in_order(self, op: Op, made: Layouts, wanted: Layouts, order: Iterable[int]) -> float:
        now, total = list(made), 0.0
        for axis in order:
            if now[axis] == wanted[axis]:
                continue
            if any(_inside(now[other], {now[axis], wanted[axis]}) for other in range(axis + 1, len(now))):
                return inf  # slices within its slices have to come together first
            left = self.left(tuple(now), axis)
            total += self._along(op, self.groups[axis], now[axis], wanted[axis], left)
            now[axis] = wanted[axis]
        return total

    def _along(self, op: Op, group: TensorGroup, made: Layout, wanted: Layout, left: float) -> float:
        gradient = carries_gradient(self.graph, op.name)
        how = conversion(made, wanted, gradient, op.target == "parameter")
        if how is None or (how.target and not all(t is not None for t in op.types)):
            return inf
        num_bytes = left * sum(t.bytes(self.options.samples) for t in op.types if t is not None)
        ahead, behind = (group.seconds(name, num_bytes) for name in (how.forward, how.backward))
        once = op.target == "parameter" and how.target == "gp.copy_to_group"
        return ahead + behind / (self.options.microbatches if once else 1)


def _inside(inner: Layout, outer: set[Layout]) -> bool:
    return isinstance(inner, Split) and any(isinstance(o, Split) and o.dim == inner.dim for o in outer)


def _place(layout: Layout) -> Hashable:
    """A layout but for the units of each member."""
    if isinstance(layout, Split):
        return layout.dim, layout.outer, layout.inner, layout.of_batch
    return layout


def _alike(layouts: Layouts) -> bool:
    return len({_place(layout) for layout in layouts}) == 1


def _fit(layouts: Layouts, axes: Sequence[int]) -> bool:
    """Whether axes that cut the same units have enough of them."""
    cuts = [(n, x) for n, x in zip(axes, layouts, strict=True) if isinstance(x, Split)]
    return all(
        x.of_batch or x.units % prod(m for m, y in cuts if _place(x) == _place(y)) == 0 for _, x in cuts
    )


class MeshProgramme:
    """The sharding programme over a mesh; equal ops of equal blocks share a variable.

    Args:
        prepared: A captured model.
        mesh: How members are arranged.
        link: The link between any two.
        options: Samples of a microbatch of one replica and the like.
    """

    def __init__(self, prepared: Prepared, mesh: Mesh, link: LinkCost, options: ShardingOptions) -> None:
        chain: Chain = prepared.chain
        self.graph = as_one_stage(prepared.graph, len(chain.units))
        self.mesh, self.prices = mesh, MeshPrices(self.graph, mesh, link, options)
        self.unit = {name: (u.kind, i) for u in chain.units for i, name in enumerate(u.ops)}
        self.ways = self._ways()
        self.keys: dict[Hashable, int] = {}
        self.costs: list[list[float]] = []
        self.bytes: list[list[float]] = []
        self.key_of: dict[str, int] = {}
        self.edges: dict[tuple[int, int], Matrix] = {}
        self.tables: dict[Hashable, Matrix] = {}
        self.weights: dict[str, list[Layouts]] = {}
        self._build()

    def solve(self, limit_bytes: float, time_limit_s: float = 30.0) -> tuple[float, float]:
        """Least seconds of a microbatch and their bound; endless where weights do not fit."""
        found = solve_sharding(self._problem(limit_bytes), time_limit_s=time_limit_s)
        if found.objective is None:
            return inf, inf
        return found.objective * 1e-9, (found.bound or 0.0) * 1e-9

    def weight_bytes(self) -> float:
        """Weights, gradients and state of the whole model."""
        return sum(op.type.bytes(1) * (2 + STATE_RATIO) for op in self.graph.sources("parameter"))

    def _ways(self) -> dict[str, list[Ways]]:
        tables = [strategies_of(self.graph, (1 / n,) * n) for n in self.mesh.axes]
        samples, members = self.prices.options.samples, prod(self.mesh.axes)
        done: dict[Hashable, list[Ways]] = {}
        ways = {}
        for op in self.graph.ops:
            if op.name not in tables[0]:
                continue
            rows = tuple(table[op.name] for table in tables)
            if rows not in done:
                done[rows] = [
                    Ways(along)
                    for along in product(*rows)
                    if all(map(self._fits, _by_value(along)))
                    and (samples % members == 0 or not any(s.samples for s in along))
                ]
            ways[op.name] = done[rows]
        return ways

    def _fits(self, layouts: Layouts) -> bool:
        return _fit(layouts, self.mesh.axes)

    def _build(self) -> None:
        readers: dict[str, list[tuple[Op, int]]] = defaultdict(list)
        for op in self.graph.ops:
            if op.name in self.ways:
                rows = self.ways[op.name]
                key = (self.unit.get(op.name, op.name), len(rows))
                costs = [self.prices.op_seconds(op, way) for way in rows] if _computes(op) else []
                self._add(op.name, key, costs or [0.0] * len(rows), [0.0] * len(rows))
                for slot, name in enumerate(op.operands()):
                    readers[name].append((op, slot))
        for op in self.graph.ops:
            if op.target in ("parameter", "buffer") and readers[op.name]:
                self._add_weight(op, readers[op.name])
        for name, users in readers.items():
            self._connect(name, users)

    def _add(self, name: str, key: Hashable, costs: list[float], held: list[float]) -> None:
        number = self.key_of[name] = self.keys.setdefault(key, len(self.keys))
        if number == len(self.costs):
            self.costs.append([0.0] * len(costs))
            self.bytes.append([0.0] * len(costs))
        self.costs[number] = [a + b for a, b in zip(self.costs[number], costs, strict=True)]
        self.bytes[number] = [a + b for a, b in zip(self.bytes[number], held, strict=True)]

    def _add_weight(self, op: Op, readers: Sequence[tuple[Op, int]]) -> None:
        along: list[dict[Layout, None]] = [{"whole": None} for _ in self.mesh.axes]
        if op.target == "parameter":
            for reader, slot in readers:
                for way in self.ways[reader.name]:
                    for axis, layout in enumerate(way.operand(slot)):
                        if isinstance(layout, Split):
                            along[axis][layout] = None
        layouts = [each for each in product(*along) if self._fits(each)]
        self.weights[op.name] = layouts
        reader, slot = readers[0]
        key = ("weight", self.unit.get(reader.name, reader.name), slot, tuple(layouts))
        costs = [self.prices.step_seconds(op, each) for each in layouts]
        self._add(op.name, key, costs, [self.prices.held_bytes(op, each) for each in layouts])

    def _connect(self, name: str, readers: Sequence[tuple[Op, int]]) -> None:
        source, index = value_of(self.graph, name)
        if source in self.ways:
            made = [way.result(index) for way in self.ways[source]]
        else:
            whole: Layouts = tuple(_WHOLE for _ in self.mesh.axes)
            made = self.weights.get(source, [whole])
        start: str = source
        if len(readers) > 1 and self.graph[name].target not in SOURCES:
            wanted = (w.operand(slot) for r, slot in readers for w in self.ways[r.name])
            forms = list(dict.fromkeys((*made, *wanted)))
            start, nothing = f"{name} form", [0.0] * len(forms)
            key = ("form", self.key_of.get(source, source), index, tuple(forms))
            self._add(start, key, nothing, nothing)
            self._edge(source, start, self._table(name, made, forms))
            made = forms
        for reader, slot in readers:
            wanted_there = [way.operand(slot) for way in self.ways[reader.name]]
            self._edge(start, reader.name, self._table(name, made, wanted_there))

    def _table(self, name: str, made: Sequence[Layouts], wanted: Sequence[Layouts]) -> Matrix:
        """What it costs from each layout to each; priced once for each two that differ."""
        op = self.graph[name]
        rows, columns = (list(dict.fromkeys(side)) for side in (made, wanted))
        key = (op.types, op.target == "parameter", bool(op.attr("grad")), tuple(rows), tuple(columns))
        if key not in self.tables:
            self.tables[key] = np.array(
                [[self.prices.conversion_seconds(op, a, b) for b in columns] for a in rows]
            )
        row_of, column_of = ({each: i for i, each in enumerate(side)} for side in (rows, columns))
        return self.tables[key][np.ix_([row_of[a] for a in made], [column_of[b] for b in wanted])]

    def _edge(self, left: str, right: str, table: Matrix) -> None:
        b = self.key_of[right]
        a = self.key_of.get(left, b)
        if a == b:
            own = table[0] if left not in self.key_of else table.diagonal()
            self.costs[b] = [x + float(y) for x, y in zip(self.costs[b], own, strict=True)]
        else:
            self.edges[a, b] = self.edges[a, b] + table if (a, b) in self.edges else table

    def _problem(self, limit_bytes: float) -> ShardingProblem:
        return ShardingProblem(
            name=f"{self.graph.name} on {self.mesh}",
            intervals=tuple((0, 1) for _ in self.costs),
            node_costs=tuple(tuple(map(_nanoseconds, costs)) for costs in self.costs),
            usages=tuple(tuple(map(round, held)) for held in self.bytes),
            edge_nodes=tuple(self.edges),
            edge_costs=tuple(tuple(map(_nanoseconds, t.ravel().tolist())) for t in self.edges.values()),
            usage_limit=None if limit_bytes == inf else limit_bytes,
        )


def _computes(op: Op) -> bool:
    return op.target not in ("gp.send", "gp.recv", "output")


def _by_value(along: Sequence[Strategy]) -> Iterator[Layouts]:
    yield from zip(*(s.operands for s in along), strict=True)
    yield from zip(*(s.results for s in along), strict=True)


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9) if seconds < IMPOSSIBLE_COST else IMPOSSIBLE_COST
