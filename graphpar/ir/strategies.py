"""The ways in which a tensor group can compute each op of a graph.

A strategy says in which layout the op wants its operands and in which it leaves its results (see
`shards`). For every factor that an op runs over there is one; beside these, computing it whole,
passing parts through an op that is linear, and passing a copy through.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from graphpar.ir.chain import writes_buffer
from graphpar.ir.factors import Factors, Loop, taken, type_at
from graphpar.ir.graph import Graph
from graphpar.ir.ops import SOURCES, Op
from graphpar.ir.optable import packet
from graphpar.ir.shards import Layout, Split, apportion_units, whole_shares


@dataclass(frozen=True)
class Strategy:
    """One way to compute an op.

    Attributes:
        operands: The layout wanted of each operand.
        results: The layout of each result.
        special: Empty, or how the member computes its part (see `links.Link`).
        first_only: Operands that only the first member takes into account; wanted as `first`.
        shares: Each member's part of the work; empty where every member does all of it.
    """

    operands: tuple[Layout, ...]
    results: tuple[Layout, ...]
    special: str = ""
    first_only: tuple[int, ...] = ()
    shares: tuple[float, ...] = ()

    @cached_property
    def samples(self) -> tuple[int, ...]:
        """The proportions in which members share the samples; empty where the batch is not cut."""
        layouts = (*self.results, *self.operands)
        return next((x.counts for x in layouts if isinstance(x, Split) and x.of_batch), ())

    def __str__(self) -> str:
        ends = (", ".join(map(str, side)) for side in (self.operands, self.results))
        return " -> ".join(ends) + (f" ({self.special})" if self.special else "")


_MOVES = frozenset(
    """view reshape _unsafe_view flatten unflatten unsqueeze squeeze transpose t permute expand split
    chunk split_with_sizes unsafe_split slice select clone contiguous alias unbind flip roll""".split()
)
"""Ops that only move numbers: linear, and zeros stay zeros."""
_LINEAR = _MOVES | {"neg", "sum", "mean", "to", "_to_copy"}
_ZERO_STAYS = _MOVES | frozenset(
    "neg silu gelu relu tanh abs sin square leaky_relu elu selu mish hardswish to _to_copy".split()
)
_WHOLE: Layout = "whole"
_COPIED: Layout = "copied"
_PARTIAL: Layout = "partial"


def strategies_of(graph: Graph, shares: Sequence[float]) -> dict[str, tuple[Strategy, ...]]:
    """For every op but sources, sends, receives, `getitem` and the output, the ways to compute it.

    Args:
        graph: A graph; of a lowered one, messages and results stay whole.
        shares: Each member's share of what is cut.
    """
    return StrategyTables(graph).of(shares)


class StrategyTables:
    """`strategies_of` for several groups: what a graph's ops run over is found once, each table once.

    Equal rows are one object, in all tables.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._tables: dict[tuple[float, ...], dict[str, tuple[Strategy, ...]]] = {}
        self._rows: dict[tuple[Strategy, ...], tuple[Strategy, ...]] = {}

    @cached_property
    def _rules(self) -> dict[str, "_Rule"]:
        """By op what its ways follow from; equal ones, of equal blocks, are one object."""
        factors, same = Factors(self._graph), dict[_Rule, _Rule]()
        rules = {
            op.name: _rule(op, self._graph, tuple(factors.loops(op)))
            for op in self._graph.ops
            if op.target not in (*SOURCES, "getitem")
        }
        return {name: same.setdefault(rule, rule) for name, rule in rules.items()}

    def of(self, shares: Sequence[float]) -> dict[str, tuple[Strategy, ...]]:
        """The table for these shares; not to be changed."""
        key = tuple(shares)
        if key not in self._tables:
            made: dict[int, tuple[Strategy, ...]] = {}
            for rule in self._rules.values():
                if id(rule) not in made:
                    row = tuple(dict.fromkeys(rule.strategies(shares)))
                    made[id(rule)] = self._rows.setdefault(row, row)
            self._tables[key] = {name: made[id(rule)] for name, rule in self._rules.items()}
        return self._tables[key]


@dataclass(frozen=True)
class _Rule:
    """What the ways to compute an op follow from, whoever shares it.

    Attributes:
        uncut: Ways in which no dimension is cut.
        loops: The factors it may be cut along.
        copied: The layouts of operands that are not cut.
        results: How many results it has.
    """

    uncut: tuple[Strategy, ...]
    loops: tuple[Loop, ...] = ()
    copied: tuple[Layout, ...] = ()
    results: int = 0

    def strategies(self, shares: Sequence[float]) -> Iterator[Strategy]:
        """The ways for members with these shares."""
        yield from self.uncut
        for loop in self.loops:
            found = _by_loop(loop, shares, self.copied, self.results)
            if found is not None:
                yield found


def carries_gradient(graph: Graph, name: str) -> bool:
    """Whether a gradient flows back through a value."""
    return bool(graph[name].attr("grad"))


def _rule(op: Op, graph: Graph, loops: Sequence[Loop]) -> _Rule:
    operands, results = op.operands(), op.types
    uncut = [Strategy((_WHOLE,) * len(operands), (_WHOLE,) * len(results))]
    fixed = op.target in ("output", "gp.send", "gp.recv") or writes_buffer(op) or "rand" in op.target
    fixed = fixed or bool(op.attr("tail"))  # small, and it already runs once in each replica
    if fixed or not any(t is not None for t in results) or op.target in ("gp.share",):
        return _Rule(tuple(uncut))
    copied = _copies(op, graph)
    has_gradient = any(layout == "copied" for layout in copied)
    if has_gradient:
        uncut.append(Strategy(copied, (_COPIED,) * len(results)))
    uncut += _passing(op, graph, copied)
    usable = tuple(loop for loop in loops if _can_be_first(op, graph, loop))
    return _Rule(tuple(uncut), usable, copied, len(results))


def _copies(op: Op, graph: Graph) -> tuple[Layout, ...]:
    """Operands whole with a part of the gradient each; those without gradient simply whole."""
    return tuple("copied" if carries_gradient(graph, name) else "whole" for name in op.operands())


def _can_be_first(op: Op, graph: Graph, loop: Loop) -> bool:
    """Whether the first member alone may take those operands into account that the loop says.

    The others do without them, so they may take part in nothing else that has to be in step.
    """
    for slot in loop.link.first_only:
        source = graph[op.operands()[slot]]
        if source.target == "gp.cast_weight" and len(graph.users(source.name)) == 1:
            source = graph[source.operands()[0]]
        if source.target != "parameter" or len(graph.users(source.name)) != 1:
            return False
    return True


def _by_loop(
    loop: Loop, shares: Sequence[float], copied: tuple[Layout, ...], num_results: int
) -> Strategy | None:
    of_batch = not loop.units
    counts = whole_shares(shares) if of_batch else apportion_units(loop.units, shares)
    if counts is None:
        return None
    places = {slot: Split(p.dim, counts, p.outer, p.inner, of_batch) for slot, p in loop.places}
    if loop.link.special and any(split.outer != 1 for split in places.values()):
        return None  # those ops know a member's slice by where it begins
    results: list[Layout] = []
    for index in range(num_results):
        if -1 - index in places:
            results.append(places[-1 - index])
        elif loop.link.reduces:
            results.append("disjoint" if loop.link.special == "experts" else "partial")
        elif loop.link.special == "classes":
            results.append("whole")
        else:
            return None
    once: dict[int, Layout] = dict.fromkeys(loop.link.first_only, "first")
    wanted = tuple(places.get(slot, once.get(slot, layout)) for slot, layout in enumerate(copied))
    if loop.link.special == "classes":
        wanted = (wanted[0], *(_WHOLE for _ in wanted[1:]))
    parts = tuple(count / sum(counts) for count in counts)
    return Strategy(wanted, tuple(results), loop.link.special, loop.link.first_only, parts)


def _passing(op: Op, graph: Graph, copied: tuple[Layout, ...]) -> Iterator[Strategy]:
    """Parts go through linear ops as they are."""
    name = packet(op)
    floating = [type_at(graph, op, s) for s in range(len(op.operands()))]
    if not all(t is not None and t.is_floating for t in op.types):
        return
    main = [s for s, t in enumerate(floating) if t is not None and t.is_floating]
    if not main:
        return
    kinds: tuple[Layout, ...] = ("partial", "disjoint")
    for kind in kinds:
        unary = _LINEAR if kind == "partial" else _ZERO_STAYS
        results = (kind,) * len(op.types)
        if name in unary and main[0] == 0:
            yield Strategy((kind, *copied[1:]), results)
        elif name == "index" and main == [0]:
            yield Strategy((kind, *copied[1:]), (_PARTIAL,) * len(op.types))
        elif name in ("mul", "div") and len(op.operands()) == 1 and main == [0]:
            yield Strategy((kind,), results)
        elif name == "mul":
            for slot in main:
                wanted = tuple(kind if s == slot else layout for s, layout in enumerate(copied))
                yield Strategy(wanted, results)
            if kind == "disjoint" and len(main) == 2 and _same_support(graph, *op.operands()):
                yield Strategy((kind, kind), results)
        elif name == "div" and main[0] == 0:
            yield Strategy((kind, *copied[1:]), results)
        elif name in ("add", "sub") and len(main) == 2 and kind == "partial":
            yield Strategy((kind, kind), results)
        elif name in ("cat", "stack") and kind == "partial":
            yield Strategy((kind,) * len(op.operands()), results)


def _same_support(graph: Graph, a: str, b: str) -> bool:
    """Whether two values have their numbers in the same places: rows of the same experts."""
    return _support(graph, a) is not None and _support(graph, a) == _support(graph, b)


def _support(graph: Graph, name: str) -> str | None:
    """What decides where a value has numbers: the ends of the experts' rows; None if unknown."""
    while graph[name].target not in SOURCES and graph[name].operands():
        op = graph[name]
        if packet(op) in _ZERO_STAYS or op.target == "getitem":
            name = op.operands()[0]
        elif packet(op) in ("_grouped_mm", "transformers.grouped_mm_fallback.default"):
            return op.operands()[2]
        else:
            return None
    return None


def value_of(graph: Graph, name: str) -> tuple[str, int]:
    """The op and the number of its result that a name stands for, `getitem` looked through."""
    op = graph[name]
    return taken(op, graph) if op.target == "getitem" else (name, 0)


def layout_of(graph: Graph, chosen: Mapping[str, Strategy], name: str) -> Layout:
    """The layout in which a value is made; sources are whole where nothing else is chosen."""
    source, index = value_of(graph, name)
    return chosen[source].results[index] if source in chosen else "whole"
