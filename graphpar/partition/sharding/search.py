"""Large-neighbourhood search: improve a feasible choice one window at a time, each an exact ILP.

A window is a connected set of vertices; everybody outside keeps its strategy, whose costs and memory
become constants. The window's optimum is never worse than the present choice, so the incumbent only
improves. Windows grow from the vertices that the dual bound blames for the gap: with reduced costs
`theta` and `rest`, cost - bound is the sum over vertices and edges of what each pays above its
minimum, and a vertex paying much is one whose neighbourhood is worth solving again.

A window may also be all vertices on which a few good choices differ, each with the strategies that it has
in them (`combine`): the best mixture of the choices, memory counted exactly. Local optima differ in one
large piece more often than not, and are better in different parts of it.
"""

import time
from collections.abc import Container, Iterable, Mapping
from dataclasses import replace

import numpy as np

from graphpar.partition.clock import OutOfTimeError, ShouldStop, in_time
from graphpar.partition.sharding.graph import FloatArray, IntArray, MemoryRows, ShardingGraph
from graphpar.partition.sharding.ilp import build_program
from graphpar.partition.sharding.memory import MemoryMatrix
from graphpar.partition.sharding.reduce import reduce_graph

_FIRST_PAIRS, _FEWEST_PAIRS, _MOST_PAIRS = 12_000, 500, 100_000
"""Pairs of strategies in a window: at first, at least, at most."""

_MIXED_PAIRS = 30_000
"""Pairs at first in a window that mixes two choices, most of which solve at once."""

_LEAST_SOLVING_S = 0.05
"""Time below which no ILP is begun."""

_MIXTURE = 0
"""Stands for the width of windows that mix two choices."""


class WindowSearch:
    """The incumbent of a sharding search and the moves that improve it.

    Attributes:
        chosen: Strategy per position (see `MemoryMatrix.vertices`).
        cost: Its cost.
    """

    def __init__(
        self,
        graph: ShardingGraph,
        rows: MemoryRows,
        memory: MemoryMatrix,
        chosen: IntArray,
        seed: int = 0,
    ) -> None:
        self.graph, self.rows, self.memory = graph, rows, memory
        self.position = {u: p for p, u in enumerate(memory.vertices)}
        self.chosen = chosen.copy()
        self.cost = self.evaluate(chosen)
        self._random = np.random.default_rng(seed)
        self._budgets: dict[int, int] = {}
        self._excess = [np.zeros(len(graph.costs[u])) for u in memory.vertices]

    def evaluate(self, chosen: IntArray) -> float:
        """Cost of a choice, memory aside."""
        return self.graph.value({u: int(chosen[p]) for u, p in self.position.items()})

    def adopt(self, chosen: IntArray, cost: float) -> None:
        """Go on from somebody else's choice that fits, if it is cheaper."""
        if cost < self.cost:
            self.chosen, self.cost = chosen.copy(), cost

    def offer(self, chosen: IntArray) -> None:
        """Take a choice as incumbent if it fits and is cheaper."""
        if self.memory.excess(chosen) <= 0:
            self.adopt(chosen, self.evaluate(chosen))

    def guide(self, excess: list[FloatArray]) -> None:
        """Rank strategies and blame vertices by reduced costs from the dual bound."""
        self._excess = excess

    def blame(self) -> FloatArray:
        """How much each position's present strategy pays above the cheapest promise."""
        return np.array([row[i] for row, i in zip(self._excess, self.chosen, strict=True)])

    def grow(self, pairs: int, width: int, num_seeds: int = 1) -> dict[int, IntArray]:
        """A window of about so many pairs: vertices and the strategies they may take.

        At most `width` strategies a vertex are allowed, those of least reduced cost, and always the
        present one. The window grows around vertices drawn by blame and prefers blamed neighbours.
        With several seeds, the later ones hold memory when the least is free: far-apart vertices
        that compete for memory can only be improved together.
        """
        blame = self.blame()
        blame += 0.1 * blame.mean() + 1e-9
        window: dict[int, IntArray] = {}
        frontier: dict[int, None] = {}
        for seed in self._seeds(blame, num_seeds):
            frontier[seed] = None
            share = pairs // num_seeds
            while frontier and share > 0:
                vertex = self._draw(list(frontier), blame)
                del frontier[vertex]
                window[vertex] = self._allowed(vertex, width)
                ends = sum(len(window[v]) for v in self.graph.tables[vertex] if v in window)
                share -= len(window[vertex]) * (1 + ends)
                frontier.update(dict.fromkeys(self._frontier_of(vertex, window)))
            frontier.clear()
        return window

    def combine(self, other: IntArray, time_limit_s: float) -> float:
        """Take over the best mixture with another choice that fits; returns the improvement."""
        differing = np.flatnonzero(self.chosen != other)
        if not differing.size:
            return 0.0
        window = self._mixture(differing, other)
        began_s = time.perf_counter()
        gain = self.solve_window(window, time_limit_s)
        if len(window) < differing.size or time.perf_counter() - began_s > 0.8 * time_limit_s:
            self.note(_MIXTURE, time.perf_counter() - began_s, time_limit_s)
        return gain

    def _mixture(self, differing: IntArray, other: IntArray) -> dict[int, IntArray]:
        """A window of differing vertices with both of their strategies, connected ones first."""
        waiting = {self.memory.vertices[p]: p for p in self._random.permutation(differing)}
        pairs = self._budgets.setdefault(_MIXTURE, _MIXED_PAIRS)
        window: dict[int, IntArray] = {}
        frontier: list[int] = []
        while waiting and pairs > 0:
            vertex = frontier.pop() if frontier else next(iter(waiting))
            if vertex in waiting:
                p = waiting.pop(vertex)
                window[vertex] = np.sort(np.array([self.chosen[p], other[p]], dtype=np.intp))
                around = self.graph.tables[vertex]
                pairs -= 2 + 4 * sum(v in window for v in around)
                frontier.extend(v for v in around if v in waiting)
        return window

    def _seeds(self, blame: FloatArray, count: int) -> list[int]:
        seeds = [int(self._random.choice(len(blame), p=blame / blame.sum()))]
        if count > 1 and self.rows.num_rows:
            free = self.memory.limit - self.memory.usage(self.chosen)
            competing = self._live_at(int(free.argmin()))
            if competing.size:
                weights = blame[competing] + blame.mean()
                draws = min(count - 1, len(competing))
                seeds += self._random.choice(
                    competing, draws, replace=False, p=weights / weights.sum()
                ).tolist()
        return [self.memory.vertices[p] for p in dict.fromkeys(seeds)]

    def _live_at(self, row: int) -> IntArray:
        """Positions whose strategies differ in memory at a row."""
        live = []
        for p, profile in enumerate(self.memory.profiles):
            if profile is not None and profile[0][0] <= row < profile[0][-1]:
                use = profile[1][:, int(np.searchsorted(profile[0], row, side="right")) - 1]
                if use.max() > use.min():
                    live.append(p)
        return np.array(live, dtype=np.intp)

    def _draw(self, candidates: list[int], blame: FloatArray) -> int:
        weights = blame[[self.position[v] for v in candidates]]
        noisy = (weights + 0.3 * weights.mean()) * self._random.random(len(candidates))
        return candidates[int(noisy.argmax())]

    def budget(self, width: int) -> int:
        """Pairs for the next window of a width: up to the limit that `note` moves, often less.

        Many small windows find other improvements than few large ones.
        """
        limit = self._budgets.setdefault(width, _FIRST_PAIRS)
        return max(_FEWEST_PAIRS, int(limit * 0.5 ** self._random.integers(0, 3)))

    def note(self, width: int, seconds: float, patience_s: float) -> None:
        """Let windows of a width grow while they solve quickly and shrink when they do not."""
        budget = self._budgets[width]
        if seconds < 0.25 * patience_s:
            self._budgets[width] = min(_MOST_PAIRS, int(budget * 1.1) + 1)
        elif seconds > 0.8 * patience_s:
            self._budgets[width] = max(_FEWEST_PAIRS, int(budget * 0.7))

    def _allowed(self, vertex: int, width: int) -> IntArray:
        p = self.position[vertex]
        excess = self._excess[p]
        if len(excess) <= width:
            return np.arange(len(excess))
        best = np.argpartition(excess, width)[:width]
        return np.union1d(best, self.chosen[p : p + 1])

    def _frontier_of(self, vertex: int, inside: Container[int]) -> list[int]:
        around = [v for v in self.graph.tables[vertex] if v not in inside]
        if len(around) > 40:
            # A hub would fill the window with its own leaves.
            around = [around[i] for i in self._random.choice(len(around), 40, replace=False)]
        return around

    def solve_window(self, window: Mapping[int, IntArray], time_limit_s: float) -> float:
        """Re-optimise a window; returns how much the incumbent improved."""
        deadline_s = time.perf_counter() + time_limit_s
        try:
            proposal = self._solved(window, deadline_s)
        except OutOfTimeError:
            return 0.0
        if proposal is None:
            return 0.0
        before = self.cost
        self.offer(proposal)
        return before - self.cost

    def _solved(self, window: Mapping[int, IntArray], deadline_s: float) -> IntArray | None:
        """The choice with the best that was found for a window, if that is better."""

        def is_over() -> bool:
            return time.perf_counter() >= deadline_s

        sub, tags = self._subgraph(window, is_over)
        rows = reduce_graph(sub, self._window_rows(window), out_of_time=is_over)
        if sub.infeasible:
            return None
        choice: dict[int, int] | None = {}
        if sub.costs:
            choice = solve_small(sub, rows, deadline_s, self.cost)
        if choice is None:
            return None
        _, numbers = sub.expand_all(choice)
        proposal = self.chosen.copy()
        for u, tag in tags.items():
            proposal[self.position[u]] = numbers[tag]
        return proposal

    def _window_rows(self, window: Iterable[int]) -> MemoryRows:
        """Memory rows of a window: of the rows with the same live window vertices, the tightest."""
        nodes = [node for u in window for node, _ in self.graph.members[u]]
        own = self._usage_of(window)
        room = self.memory.limit - self.memory.usage(self.chosen) + own
        cuts = np.unique(np.concatenate([self.rows.first[nodes], self.rows.last[nodes], [0, len(room)]]))
        cuts = cuts[cuts < len(room)]
        if not cuts.size:
            return replace(
                self.rows, first=self.rows.first * 0, last=self.rows.last * 0, limit=np.zeros(0)
            )
        tightest = np.array(
            [
                begin + int(room[begin:end].argmin())
                for begin, end in zip(cuts, np.append(cuts[1:], len(room)), strict=True)
            ]
        )
        return replace(
            self.rows,
            first=np.searchsorted(tightest, self.rows.first).astype(np.intp),
            last=np.searchsorted(tightest, self.rows.last).astype(np.intp),
            limit=room[tightest],
        )

    def _usage_of(self, window: Iterable[int]) -> FloatArray:
        change = np.zeros(self.rows.num_rows + 1)
        for u in window:
            p = self.position[u]
            profile = self.memory.profiles[p]
            if profile is not None:
                boundaries, use = profile
                change[boundaries] += np.diff(use[self.chosen[p]], prepend=0.0, append=0.0)
        usage: FloatArray = np.cumsum(change)[:-1]
        return usage

    def _subgraph(
        self, window: Mapping[int, IntArray], should_stop: ShouldStop
    ) -> tuple[ShardingGraph, dict[int, int]]:
        """The window with its surroundings frozen, and a tag per vertex to read the answer back.

        The graph's cost is that of the whole choice.
        """
        tables: dict[int, dict[int, FloatArray]] = {}
        costs: dict[int, FloatArray] = {}
        own = {u: int(self.chosen[self.position[u]]) for u in window}
        present = 0.0
        for u in in_time(window, should_stop):
            cost = self.graph.costs[u].copy()
            tables[u] = {}
            for v, table in self.graph.tables[u].items():
                if v in window:
                    tables[u][v] = table
                    if u < v:
                        present += float(table[own[u], own[v]])
                else:
                    cost += table[:, self.chosen[self.position[v]]]
            present += float(cost[own[u]])
            costs[u] = cost
        members = {u: list(self.graph.members[u]) for u in window}
        sub = ShardingGraph(costs, tables, members, constant=self.cost - present)
        tags = {u: sub.tag(u) for u in window}
        for u, allowed in window.items():
            possible = allowed[np.isfinite(sub.costs[u][allowed])]
            if len(possible) < len(sub.costs[u]):
                sub.keep(u, possible)
        return sub, tags


def solve_small(
    graph: ShardingGraph, rows: MemoryRows, deadline_s: float, cutoff: float
) -> dict[int, int] | None:
    """The best choice for a reduced graph found by a `time.perf_counter` moment, if it beats `cutoff`.

    Raises:
        OutOfTimeError: There was no time to begin.
    """

    def is_over() -> bool:
        return time.perf_counter() > deadline_s - _LEAST_SOLVING_S

    built = build_program(graph, rows, range(rows.num_rows), should_stop=is_over)
    left_s = deadline_s - time.perf_counter()
    if left_s < 0.5 * _LEAST_SOLVING_S:
        raise OutOfTimeError
    outcome = built.program.solve(time_limit_s=left_s, relative_gap=1e-6)
    if not outcome.has_point:
        return None
    choice = built.choice(outcome.values, graph)
    return choice if graph.value(choice) < cutoff else None
