"""What the sharding programme of a stage decides, whatever it costs.

Variables and what joins two of them follow from the graph, from how members share and from the
strategies that training and the batch allow. Seconds and bytes do not belong here: programmes for
microbatches of other sizes, and at other prices of memory, have one structure.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from graphpar.cost_models.group_times import ShardingOptions, TensorGroup
from graphpar.cost_models.mesh_times import MeshTimes
from graphpar.cost_models.sending import Sent, largest_part
from graphpar.ir.chain import Chain
from graphpar.ir.graph import Graph
from graphpar.ir.mesh import Layouts, Ways, fit, ways_of, whole_along
from graphpar.ir.ops import SOURCES, Op, TensorType
from graphpar.ir.shards import Layout, Split
from graphpar.ir.strategies import Strategy, StrategyTables, value_of
from graphpar.partition.sharding.graph import ShardingGraph
from graphpar.partition.sharding.reduce import drop_unsupported

Key = Hashable
Numbers = npt.NDArray[np.intp]
_Rows = tuple[Layouts, ...]


@dataclass(eq=False)
class Computed:
    """An op, the ways to compute it, and how many equal ops are decided together."""

    op: Op
    ways: tuple[Ways, ...]
    count: int = 0

    @cached_property
    def kinds(self) -> tuple[list[Ways], Numbers]:
        """Of the ways one of each kind that takes equally long, and the kind of each."""
        return MeshTimes.alike(self.ways)


@dataclass(eq=False)
class Held:
    """A weight, the layouts in which it may be held, and how many equal ones are decided together."""

    op: Op
    layouts: tuple[Layouts, ...]
    count: int = 0


@dataclass(frozen=True, eq=False)
class Converted:
    """A value from the alternatives of one variable to those of another.

    Attributes:
        op: The value.
        ways: The ways in which it is sent.
        numbers: By the alternatives of both ends which of these ways; one past the last for none.
    """

    op: Op
    ways: tuple[Sent | None, ...]
    numbers: Numbers


class OverEdges(NamedTuple):
    """Of pairs of alternatives the way in which a value is sent, and how often.

    Ways are numbered through all conversions, none being the last of each.
    """

    pairs: Numbers
    ways: Numbers
    counts: npt.NDArray[np.float64]


class Structure:
    """The variables of one stage and what joins them; numbered in the order in which they are met.

    Args:
        graph: A lowered graph.
        stage: Which stage of it.
        chain: Units of the captured graph; ops of equal kinds are decided together.
        times: Of the group, for microbatches of any size.
        strategies: Those of the graph.

    Attributes:
        sizes: Alternatives of each variable.
        computed: By variable what it computes.
        held: By variable the weights it holds.
        converted: Every conversion of which some edge is made.
        alone: By variable, conversion, and whether both of its ends are that variable, how often; if not,
            the other end has no choice.
        joined: By two variables how often each conversion joins them.
    """

    def __init__(
        self, graph: Graph, stage: int, chain: Chain, times: MeshTimes, strategies: StrategyTables
    ) -> None:
        self.graph, self.stage = graph, stage
        self.group: TensorGroup = times.group
        self.options: ShardingOptions = times.options
        self.ops = [
            op
            for op in graph.ops
            if (op.attr("stage") == stage and op.target != "getitem") or op.target == "output"
        ]
        tables = allowed_strategies(strategies, self.group, self.options)
        self.table = ways_of(tables, self.group.axes, {op.name for op in self.ops})
        self.whole = whole_along(len(self.group.axes))
        self.weights: dict[str, tuple[Layouts, ...]] = {}
        self.forms: dict[str, tuple[Layouts, ...]] = {}
        self.number_of: dict[str, int] = {}
        self.sizes: list[int] = []
        self.computed: dict[int, Computed] = {}
        self.held: dict[int, list[Held]] = {}
        self.converted: list[Converted] = []
        self.alone: Counter[tuple[int, int, bool]] = Counter()
        self.joined: dict[tuple[int, int], Counter[int]] = {}
        self._times, self._place = times, places(chain)
        self._numbers: dict[Key, int] = {}
        self._conversions: dict[Key, int] = {}
        self._rows: dict[Key, _Rows] = {}
        self._kinds_of_weights: dict[Key, Held] = {}
        self._parts: dict[int, npt.NDArray[np.float64]] = {}
        self._build()

    @cached_property
    def possible(self) -> list[Numbers]:
        """Of each variable the alternatives that have a possible partner across every edge."""
        every = {number: np.arange(size) for number, size in enumerate(self.sizes)}
        costs = {number: np.zeros(size) for number, size in enumerate(self.sizes)}
        members = {number: [(number, own)] for number, own in every.items()}
        graph = ShardingGraph(costs, {number: {} for number in every}, members)
        for number, conversion, is_own in self.alone:
            lacking = self._lacking(conversion)
            costs[number][lacking.diagonal() if is_own else lacking[0]] = np.inf
        for (a, b), conversions in self.joined.items():
            lacking = np.logical_or.reduce([self._lacking(conversion) for conversion in conversions])
            graph.add_table(a, b, np.where(lacking, np.inf, 0.0))
        for number, own in costs.items():
            graph.keep(number, np.flatnonzero(np.isfinite(own)))
        if graph.is_possible():
            drop_unsupported(graph, set(every))
        if not graph.is_possible():
            return list(every.values())
        return [graph.members[number][0][1] for number in every]

    @cached_property
    def first_of_edges(self) -> npt.NDArray[np.int64]:
        """Where the pairs of possible alternatives of each edge begin, one edge's after the other's."""
        sizes = [len(self.possible[a]) * len(self.possible[b]) for a, b in self.joined]
        return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)

    @cached_property
    def sent_over_edges(self) -> "list[OverEdges]":
        """What is sent over edges: the first conversion of each, then what further ones there are."""
        firsts = np.cumsum([0, *(len(converted.ways) + 1 for converted in self.converted)])
        turns: dict[int, list[OverEdges]] = defaultdict(list)
        for first, ((a, b), conversions) in zip(self.first_of_edges, self.joined.items(), strict=False):
            between = np.ix_(self.possible[a], self.possible[b])
            for turn, (conversion, count) in enumerate(conversions.items()):
                ways = firsts[conversion] + np.ravel(self.converted[conversion].numbers[between])
                ends = np.arange(first, first + len(ways))
                turns[turn].append(OverEdges(ends, ways, np.full(len(ways), float(count))))
        return [OverEdges(*map(np.concatenate, zip(*some, strict=True))) for some in turns.values()]

    def _lacking(self, conversion: int) -> npt.NDArray[np.bool_]:
        """Between which alternatives there is no way to bring the value."""
        converted = self.converted[conversion]
        is_tensor = all(t is not None for t in converted.op.types)
        none = [way is None or (bool(way) and not is_tensor) for way in converted.ways]
        found: npt.NDArray[np.bool_] = np.array([*none, True])[converted.numbers]
        return found

    def largest_parts(self, number: int, slot: int | None) -> npt.NDArray[np.float64]:
        """By the ways to compute an op the largest part of an operand or its result at a member."""
        computed = self.computed[number]
        rows = self._wanted(computed.op, slot) if slot is not None else self._made(computed.ways, 0)
        if id(rows) not in self._parts:
            self._parts[id(rows)] = np.array([largest_part(layouts) for layouts in rows])
        return self._parts[id(rows)]

    def _build(self) -> None:
        every: dict[str, list[tuple[Op, int]]] = defaultdict(list)
        for op in self.ops:
            rows = self.table[op.name]
            # `ways_of` gives equal ops the same rows.
            number = self._add(op.name, (self._placed(op), id(rows)), len(rows))
            self.computed.setdefault(number, Computed(op, rows)).count += 1
            for slot, name in enumerate(op.operands()):
                every[name].append((op, slot))
        for op in self.graph.ops:
            readers = every.get(op.name, [])
            if op.target in ("parameter", "buffer") and readers:
                self._add_weight(op, readers)
        for name, readers in every.items():
            self._connect(name, readers)

    def _placed(self, op: Op) -> Key:
        return self._place.get(op.name, op.name)

    def _add(self, name: str, key: Key, size: int) -> int:
        """The variable of a name; of one key there is one."""
        number = self._numbers.setdefault(key, len(self.sizes))
        if number == len(self.sizes):
            self.sizes.append(size)
        self.number_of[name] = number
        return number

    def _add_weight(self, op: Op, readers: Sequence[tuple[Op, int]]) -> None:
        label = str(op.args[0])
        cuts = self.options.cuts_weights and op.target == "parameter"
        wanted = tuple(dict.fromkeys(id(self._wanted(*reader)) for reader in readers))
        layouts = self._once(("held", cuts, wanted), lambda: self._held(readers if cuts else ()))
        if label in self.options.fixed:
            layouts = self._once(("fixed", label), lambda: (self.options.fixed[label],))
        self.weights[op.name] = layouts
        first, slot = readers[0]
        key = ("weight", self._placed(first), slot, id(layouts))
        number = self._add(op.name, key, len(layouts))
        alike = number, op.types, bool(op.attr("grad"))
        if alike not in self._kinds_of_weights:
            self._kinds_of_weights[alike] = Held(op, layouts)
            self.held.setdefault(number, []).append(self._kinds_of_weights[alike])
        self._kinds_of_weights[alike].count += 1

    def _held(self, readers: Sequence[tuple[Op, int]]) -> _Rows:
        """How a weight may be held: whole, and in the slices that its readers want."""
        wanted: list[list[Layout]] = [["whole"] for _ in self.whole]
        for along in range(len(self.whole)):
            every = (layouts[along] for reader in readers for layouts in self._wanted(*reader))
            wanted[along] += dict.fromkeys(layout for layout in every if isinstance(layout, Split))
        return tuple(held for held in product(*wanted) if fit(held, self.group.axes))

    def _once(self, key: Key, make: Callable[[], _Rows]) -> _Rows:
        """Rows of layouts, made once for a key; equal ones are one object."""
        if key not in self._rows:
            made = make()
            self._rows[key] = self._rows.setdefault(made, made)
        return self._rows[key]

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
        form, of = f"{name} form", self.number_of.get(source, source)
        self._add(form, ("form", of, index, id(forms)), len(forms))
        self._join(source, form, self._converting(name, made, forms))
        for reader, slot in readers:
            self._edge(form, forms, reader, slot, name)

    def _layouts(self, source: str, index: int) -> _Rows:
        """How a value is made, by the ways of its op, or held."""
        if source in self.table:
            return self._made(self.table[source], index)
        return self.weights.get(source) or self._once("whole", lambda: (self.whole,))

    def _made(self, rows: tuple[Ways, ...], index: int) -> _Rows:
        return self._once(("made", id(rows), index), lambda: tuple(ways.results[index] for ways in rows))

    def _wanted(self, reader: Op, slot: int) -> _Rows:
        """How a reader wants an operand, by its ways."""
        rows = self.table[reader.name]
        return self._once(("read", id(rows), slot), lambda: tuple(ways.operands[slot] for ways in rows))

    def _edge(self, source: str, made: _Rows, reader: Op, slot: int, name: str) -> None:
        as_held = reader.target == "gp.cast_weight"
        self._join(source, reader.name, self._converting(name, made, self._wanted(reader, slot), as_held))

    def _converting(self, name: str, made: _Rows, wanted: _Rows, as_held: bool = False) -> int:
        """The conversion from each of some layouts to each of others; one for each two that differ."""
        op = self.graph[name]
        alike: tuple[tuple[TensorType | None, ...], bool, bool] = (
            op.types, op.target == "parameter", bool(op.attr("grad"))
        )  # fmt: skip
        key = (*alike, id(made), id(wanted), as_held)
        if key not in self._conversions:
            rows, columns = tuple(dict.fromkeys(made)), tuple(dict.fromkeys(wanted))
            ways, numbers = self._times.conversions(op, rows, columns)
            place, other = ({held: i for i, held in enumerate(side)} for side in (rows, columns))
            numbers = numbers[np.ix_([place[a] for a in made], [other[b] for b in wanted])]
            if as_held:
                lies = np.array([[_cast_as_held(a, b) for b in wanted] for a in made])
                numbers = np.where(lies, numbers, len(ways))
            self._conversions[key] = len(self.converted)
            self.converted.append(Converted(op, ways, numbers))
        return self._conversions[key]

    def _join(self, left: str, right: str, conversion: int) -> None:
        b = self.number_of[right]
        a = self.number_of.get(left)
        if a is None or a == b:
            self.alone[b, conversion, a == b] += 1
        else:
            self.joined.setdefault((a, b), Counter())[conversion] += 1


def places(chain: Chain) -> dict[str, Key]:
    """For each op what it shares with the equal ops of equal units."""
    return {name: (unit.kind, index) for unit in chain.units for index, name in enumerate(unit.ops)}


def allowed_strategies(
    strategies: StrategyTables, group: TensorGroup, options: ShardingOptions
) -> list[dict[str, tuple[Strategy, ...]]]:
    """For each axis of a group the strategies along it that training and the batch allow."""
    along = [group.along(axis) for axis in range(len(group.axes))]
    cuts = cut_batches(group, options)
    return [
        _allowed(strategies.of(each.shares), cut, options) for each, cut in zip(along, cuts, strict=True)
    ]


def cut_batches(group: TensorGroup, options: ShardingOptions) -> tuple[bool, ...]:
    """Along each axis of a group, whether there are samples enough to be cut."""
    return tuple(options.cuts_batch and options.samples >= size for size in group.axes)


def _allowed(
    table: Mapping[str, tuple[Strategy, ...]], cuts_batch: bool, options: ShardingOptions
) -> dict[str, tuple[Strategy, ...]]:
    """The strategies along an axis; equal rows stay one object."""
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


def _cast_as_held(held: Layouts, wanted: Layouts) -> bool:
    """Whether a weight is cast as it lies, and sent only afterwards, in the lower format.

    A bias that the first member alone reads is read through its cast; the others then take no part in
    whatever collective stood before.
    """
    return all(a == b or (a == "whole" and b == "copied") for a, b in zip(held, wanted, strict=True))
