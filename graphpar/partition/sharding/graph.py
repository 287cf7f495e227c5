"""The working form of a sharding problem: numpy tables on a graph that reductions shrink.

A *vertex* starts as one node of the file. Reductions drop strategies from it and let it swallow
other nodes, so a vertex keeps its *members*: for each original node, the original strategy that each
of the vertex's present strategies stands for. A vertex can also be eliminated by dynamic
programming; its best strategy, as a table over its neighbours' strategies, is kept for the way
back. Because those strategies may be renumbered later, a *tag* remembers, just as a member does,
which strategy of that moment each present one stands for.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from graphpar.partition.clock import ShouldStop, in_time, never
from graphpar.partition.problems import ShardingProblem

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.intp]
BoolArray = npt.NDArray[np.bool_]

ScalarT = TypeVar("ScalarT", bound=np.generic)


@dataclass(frozen=True, eq=False)
class Elimination:
    """A vertex removed by dynamic programming: `best[value of each neighbour's tag]` is its choice."""

    neighbour_tags: tuple[int, ...]
    best: IntArray
    members: tuple[tuple[int, IntArray], ...]
    tags: tuple[tuple[int, IntArray], ...]


@dataclass(eq=False)
class MemoryRows:
    """Moments at which memory can be short, in order of time.

    Attributes:
        first, last: For each node of the file, the half-open range of rows in which it is live.
        limit: Memory left at each row; see `tighten` in `memory`.
        usage: Use of each original strategy, node after node, less what `limit` has paid for.
        usage_start: Where each node's begins in `usage`, and the length of all.
        matters: For each node, whether its choice can make a difference at some row.
    """

    first: IntArray
    last: IntArray
    limit: FloatArray
    usage: FloatArray = field(repr=False)
    usage_start: IntArray = field(repr=False)
    matters: list[bool] = field(repr=False)

    @property
    def num_rows(self) -> int:
        """Number of moments."""
        return len(self.limit)

    def use_of(self, members: Sequence[tuple[int, IntArray]]) -> tuple[FloatArray, IntArray]:
        """Use of members' strategies, member after member, and where each member's begin."""
        sizes = np.fromiter((len(map_) for _, map_ in members), np.intp, len(members))
        nodes = np.fromiter((node for node, _ in members), np.intp, len(members))
        numbers = np.concatenate([np.zeros(0, np.intp), *(map_ for _, map_ in members)])
        return self.usage[numbers + np.repeat(self.usage_start[nodes], sizes)], np.cumsum(sizes) - sizes


@dataclass(eq=False)
class ShardingGraph:
    """A pairwise cost function over the strategies of the remaining vertices.

    Attributes:
        costs: Cost per strategy of each remaining vertex; all finite.
        tables: `tables[u][v][i, j]`, cost of strategies i and j together, infinite where
            impossible; `tables[v][u]` is the transposed view of the same memory.
        members, tags: What each vertex stands for; see the module's text.
        constant: Cost already decided.
        eliminated: Vertices removed by dynamic programming, in order of removal.
        infeasible: Set once some node is proven to have no possible strategy left.
    """

    costs: dict[int, FloatArray]
    tables: dict[int, dict[int, FloatArray]]
    members: dict[int, list[tuple[int, IntArray]]]
    tags: dict[int, list[tuple[int, IntArray]]] = field(default_factory=dict)
    constant: float = 0.0
    eliminated: list[Elimination] = field(default_factory=list)
    infeasible: bool = False
    _num_tags: int = 0
    _fresh_tag: dict[int, int] = field(default_factory=dict)

    @classmethod
    def of(cls, problem: ShardingProblem, should_stop: ShouldStop = never) -> "ShardingGraph":
        """The graph of a problem: impossible strategies dropped, parallel edges added up.

        Raises:
            OutOfTimeError: It was time to stop.
        """
        raw = _pieces(*problem.flat_node_costs)
        arities = [len(costs) for costs in raw]
        pairs: list[tuple[int, int, FloatArray]] = []
        edges = zip(problem.edge_nodes, _pieces(*problem.flat_edge_costs), strict=True)
        for ends, table in in_time(edges, should_stop):
            u, v = ends[0], ends[-1]
            if len(ends) == 1:
                raw[u] = raw[u] + table
            elif u == v:
                raw[u] = raw[u] + table.reshape(arities[u], arities[u]).diagonal()
            else:
                pairs.append((u, v, table.reshape(arities[u], arities[v])))
        kept = [np.flatnonzero(np.isfinite(costs)) for costs in raw]
        graph = cls(
            costs={v: costs[kept[v]] for v, costs in enumerate(raw)},
            tables={v: {} for v in range(len(raw))},
            members={v: [(v, keep)] for v, keep in enumerate(kept)},
            infeasible=any(keep.size == 0 for keep in kept),
        )
        for u, v, table in in_time(pairs, should_stop):
            if table.shape != (kept[u].size, kept[v].size):
                table = table[np.ix_(kept[u], kept[v])]
            graph.add_table(u, v, table)
        return graph

    def copy(self) -> "ShardingGraph":
        """A graph that can be reduced without touching this one; the arrays are shared."""
        return ShardingGraph(
            dict(self.costs),
            {u: dict(row) for u, row in self.tables.items()},
            {u: list(members) for u, members in self.members.items()},
            {u: list(tags) for u, tags in self.tags.items()},
            self.constant,
            list(self.eliminated),
            self.infeasible,
            self._num_tags,
            dict(self._fresh_tag),
        )

    @property
    def num_edges(self) -> int:
        """Number of remaining edges."""
        return sum(map(len, self.tables.values())) // 2

    def __repr__(self) -> str:
        strategies = sum(map(len, self.costs.values()))
        pairs = sum(t.size for row in self.tables.values() for t in row.values()) // 2
        return (
            f"ShardingGraph({len(self.costs)} vertices, {self.num_edges} edges, "
            f"{strategies} strategies, {pairs} pairs)"
        )

    def is_possible(self) -> bool:
        """Whether every vertex still has a strategy."""
        return not self.infeasible

    def add_table(self, u: int, v: int, table: FloatArray) -> None:
        """Add a cost table between two vertices, on top of one that is there."""
        present = self.tables[u].get(v)
        total = table if present is None else present + table
        self.tables[u][v], self.tables[v][u] = total, total.T

    def remove_table(self, u: int, v: int) -> None:
        """Take the edge between two vertices away."""
        del self.tables[u][v], self.tables[v][u]

    def keep(self, vertex: int, chosen: IntArray) -> None:
        """Keep only the chosen strategies of a vertex, in the order given."""
        self.costs[vertex] = self.costs[vertex][chosen]
        self.members[vertex] = [(node, map_[chosen]) for node, map_ in self.members[vertex]]
        self.tags[vertex] = [(tag, map_[chosen]) for tag, map_ in self.tags.get(vertex, ())]
        self._fresh_tag.pop(vertex, None)
        for other, table in self.tables[vertex].items():
            cut = np.ascontiguousarray(table[chosen])
            self.tables[vertex][other], self.tables[other][vertex] = cut, cut.T
        if chosen.size == 0:
            self.infeasible = True

    def tag(self, vertex: int) -> int:
        """A name for the present numbering of a vertex's strategies, see `expand`."""
        if vertex not in self._fresh_tag:
            identity = np.arange(len(self.costs[vertex]))
            self.tags.setdefault(vertex, []).append((self._num_tags, identity))
            self._fresh_tag[vertex] = self._num_tags
            self._num_tags += 1
        return self._fresh_tag[vertex]

    def swallow(self, winner: int, loser: int, partner: IntArray) -> list[int]:
        """Make `loser` part of `winner`, strategy `partner[i]` for i; returns the edges moved."""
        own = np.arange(len(partner))
        link = self.tables[winner][loser][own, partner]
        self.costs[winner] = self.costs[winner] + link + self.costs[loser][partner]
        self.members[winner].extend((node, map_[partner]) for node, map_ in self.members[loser])
        inherited = [(tag, map_[partner]) for tag, map_ in self.tags.get(loser, ())]
        self.tags.setdefault(winner, []).extend(inherited)
        tables = {v: table for v, table in self.tables[loser].items() if v != winner}
        self._remove_vertex(loser)
        for other, table in tables.items():
            self.add_table(winner, other, table[partner])
        return list(tables)

    def eliminate(self, vertex: int, neighbours: tuple[int, ...], best: IntArray) -> None:
        """Record the vertex's choice as a function of its neighbours' and remove it."""
        self.eliminated.append(
            Elimination(
                tuple(self.tag(v) for v in neighbours),
                best,
                tuple(self.members[vertex]),
                tuple(self.tags.get(vertex, ())),
            )
        )
        self._remove_vertex(vertex)

    def _remove_vertex(self, vertex: int) -> None:
        for other in self.tables[vertex]:
            del self.tables[other][vertex]
        del self.tables[vertex], self.costs[vertex], self.members[vertex]
        self.tags.pop(vertex, None)
        self._fresh_tag.pop(vertex, None)

    def value(self, choice: dict[int, int]) -> float:
        """Cost of a choice of strategy for every remaining vertex, the constant included."""
        total = self.constant
        for u, costs in self.costs.items():
            total += float(costs[choice[u]])
            for v, table in self.tables[u].items():
                if u < v:
                    total += float(table[choice[u], choice[v]])
        return total

    def expand(self, choice: dict[int, int], num_nodes: int) -> list[int]:
        """The strategy of every node of the file, given one for every remaining vertex."""
        nodes, _ = self.expand_all(choice)
        return [nodes[node] for node in range(num_nodes)]

    def expand_all(self, choice: dict[int, int]) -> tuple[dict[int, int], dict[int, int]]:
        """Strategies by node of the file, and by tag, given one for every remaining vertex."""
        nodes: dict[int, int] = {}
        tags: dict[int, int] = {}
        for vertex, index in choice.items():
            nodes.update((node, int(map_[index])) for node, map_ in self.members[vertex])
            tags.update((tag, int(map_[index])) for tag, map_ in self.tags.get(vertex, ()))
        for step in reversed(self.eliminated):
            index = int(step.best[tuple(tags[tag] for tag in step.neighbour_tags)])
            nodes.update((node, int(map_[index])) for node, map_ in step.members)
            tags.update((tag, int(map_[index])) for tag, map_ in step.tags)
        return nodes, tags


def _pieces(start: npt.NDArray[np.int64], values: npt.NDArray[ScalarT]) -> list[npt.NDArray[ScalarT]]:
    return [values[begin:end] for begin, end in pairwise(start.tolist())]
