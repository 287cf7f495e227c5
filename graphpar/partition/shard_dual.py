"""Lower bounds and roundings of a sharding problem by sequential message passing.

The bound is Lagrangian. Every split of the costs into vertex parts `theta` and edge parts bounds the
optimum from below by the sum of the parts' minima, and memory rows enter through multipliers
`lam >= 0`:

    bound = constant - lam . limit + sum_u min_i theta[u](i) + sum_e min_ij rest[e](i, j)
    theta[u] = c[u] + sum_t lam[t] use[u, t] + sum_e message[e -> u]
    rest[e](i, j) = C[e](i, j) - message[e -> u](i) - message[e -> v](j)

so any messages and multipliers give a true bound. One pass visits the vertices in order: a vertex
collects the min-marginal of every edge to an earlier vertex and hands an equal share to every edge to
a later one (TRW-S: Kolmogorov, "Convergent tree-reweighted message passing for energy minimization",
2006); the bound never falls while the multipliers rest. Passes alternate in direction. While it
walks, a pass also rounds: each vertex takes the strategy that is cheapest given the earlier
vertices' choices and what the later ones promise. Multipliers follow a deflected subgradient, the
smoothed excess of memory over the roundings.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import sparse

from graphpar.partition.shard_graph import FloatArray, IntArray, MemoryRows, ShardingGraph
from graphpar.partition.shard_memory import vertex_profile

BoolArray = npt.NDArray[np.bool_]


class Room:
    """Memory still free while vertices take their strategies one after the other."""

    def __init__(self, memory: "MemoryMatrix") -> None:
        self._profiles = memory.profiles
        self._free = memory.limit.copy()
        for profile in self._profiles:
            if profile is not None:
                self._spend(profile[0], profile[1].min(axis=0))

    def fitting(self, position: int) -> BoolArray | None:
        """Which strategies fit with the rest at their smallest; None where all do."""
        profile = self._profiles[position]
        if profile is None:
            return None
        boundaries, use = profile
        free = np.array([self._free[a:b].min() for a, b in itertools.pairwise(boundaries)])
        fits = (use - use.min(axis=0) <= free).all(axis=1)
        return None if fits.all() else fits

    def take(self, position: int, strategy: int) -> None:
        """Let the vertex take a strategy for good."""
        profile = self._profiles[position]
        if profile is not None:
            self._spend(profile[0], profile[1][strategy] - profile[1].min(axis=0))

    def _spend(self, boundaries: IntArray, amounts: FloatArray) -> None:
        for k, amount in enumerate(amounts):
            if amount:
                self._free[boundaries[k] : boundaries[k + 1]] -= amount


class MemoryMatrix:
    """Memory of every (vertex, strategy), as changes along the memory rows.

    `vertices[p]` sits at position p; its strategies are the entries `start[p]` to `start[p + 1] - 1`.
    """

    def __init__(self, graph: ShardingGraph, rows: MemoryRows) -> None:
        self.vertices = list(graph.costs)
        sizes = [len(graph.costs[u]) for u in self.vertices]
        self.start: IntArray = np.concatenate([[0], np.cumsum(sizes)]).astype(np.intp)
        self.limit = rows.limit
        self.profiles = [vertex_profile(graph.members[u], rows) for u in self.vertices]
        entries: list[tuple[FloatArray, IntArray, IntArray]] = []
        for p in range(len(self.vertices)):
            profile = self.profiles[p]
            if profile is None:
                continue
            boundaries, use = profile
            change = np.zeros((len(use), len(boundaries)))
            change[:, :-1] = use
            change[:, 1:] -= use
            strategy, place = np.nonzero(change)
            entries.append((change[strategy, place], self.start[p] + strategy, boundaries[place]))
        shape = (int(self.start[-1]), rows.num_rows + 1)
        self._change = sparse.csr_matrix(shape, dtype=np.float64)
        if entries:
            values, where, when = (np.concatenate(part) for part in zip(*entries, strict=True))
            self._change = sparse.csr_matrix((values, (where, when)), shape=shape)

    def usage(self, chosen: IntArray) -> FloatArray:
        """Memory at each row when the vertex at position p takes strategy `chosen[p]`."""
        total = np.asarray(self._change[self.start[:-1] + chosen].sum(axis=0)).reshape(-1)
        usage: FloatArray = np.cumsum(total)[:-1]
        return usage

    def excess(self, chosen: IntArray) -> float:
        """The largest amount by which some row is over its limit; zero where none is."""
        return float((self.usage(chosen) - self.limit).max(initial=0.0))

    def price(self, multipliers: FloatArray) -> FloatArray:
        """Cost of memory of every (vertex, strategy) at the given price per row."""
        cumulated = np.concatenate([[0.0], np.cumsum(multipliers)])
        priced: FloatArray = -(self._change @ cumulated)
        return priced


_VERTICES_PER_LOOK = 256
"""A pass looks at the clock this often."""

_FIRST_STEP = 0.03
"""First change of a multiplier, as a share of the bound per unit of the row's limit."""


_TOLERATED_FALL = 0.05
"""A bound this far below the best one means that the multipliers overshot."""


@dataclass(eq=False)
class _Edge:
    """An edge between positions; `low` is visited before `high` in a forward pass."""

    low: int
    high: int
    table: FloatArray
    transposed: FloatArray
    to_low: FloatArray
    to_high: FloatArray


class OutOfTimeError(Exception):
    """A pass was cut short: the messages are valid, but no bound or rounding came of it."""


class DualAscent:
    """Message passing with memory multipliers on one graph; `bound` only grows.

    Attributes:
        bound: The best lower bound so far.
        multipliers: The current price of memory at each row.
    """

    def __init__(
        self,
        graph: ShardingGraph,
        rows: MemoryRows,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.memory = MemoryMatrix(graph, rows)
        self._should_stop = should_stop
        self.vertices = self.memory.vertices
        position = {u: p for p, u in enumerate(self.vertices)}
        self._constant = graph.constant
        self._theta = [graph.costs[u].copy() for u in self.vertices]
        self._after: list[list[_Edge]] = [[] for _ in self.vertices]
        self._before: list[list[_Edge]] = [[] for _ in self.vertices]
        for u, tables in graph.tables.items():
            for v, table in tables.items():
                if position[u] < position[v]:
                    self._connect(position[u], position[v], table)
        self.multipliers = np.zeros(rows.num_rows)
        self.bound = -np.inf
        self._best_multipliers = self.multipliers
        self._best_value = -np.inf
        self._row_scale = np.maximum(1.0, np.abs(rows.limit))
        self._step: FloatArray = np.zeros(rows.num_rows)
        self._sign: FloatArray = np.zeros(rows.num_rows)

    def _connect(self, low: int, high: int, table: FloatArray) -> None:
        edge = _Edge(
            low,
            high,
            np.ascontiguousarray(table),
            np.ascontiguousarray(table.T),
            np.zeros(table.shape[0]),
            np.zeros(table.shape[1]),
        )
        self._after[low].append(edge)
        self._before[high].append(edge)

    def sweep(self) -> IntArray:
        """A forward and a backward pass; returns the strategies the backward pass rounded to."""
        self._forward()
        chosen = self._backward()
        self.bound = max(self.bound, self.current_bound())
        return chosen

    def current_bound(self) -> float:
        """The bound at the present messages and multipliers, right after a pass."""
        priced = float(self.multipliers @ self.memory.limit)
        return self._constant - priced + float(sum(theta.min() for theta in self._theta))

    def _check_time(self, position: int) -> None:
        if position % _VERTICES_PER_LOOK == 0 and self._should_stop():
            raise OutOfTimeError

    def _forward(self) -> None:
        for p, theta in enumerate(self._theta):
            self._check_time(p)
            before, after = self._before[p], self._after[p]
            for edge in before:
                gain = (edge.transposed - edge.to_low).min(axis=1) - edge.to_high
                edge.to_high += gain
                theta += gain
            if after:
                share = theta / max(len(before), len(after))
                for edge in after:
                    edge.to_low -= share
                theta -= share * len(after)

    def round_within_memory(self) -> IntArray:
        """A pass whose rounding takes no strategy that the memory left over cannot hold."""
        self._forward()
        return self._backward(room=Room(self.memory))

    def _backward(self, excess: list[FloatArray] | None = None, room: Room | None = None) -> IntArray:
        chosen = np.zeros(len(self._theta), dtype=np.intp)
        for p in range(len(self._theta) - 1, -1, -1):
            self._check_time(p)
            theta, before, after = self._theta[p], self._before[p], self._after[p]
            view = theta.copy()
            for edge in after:
                rest = edge.table - edge.to_high
                gain = rest.min(axis=1) - edge.to_low
                view += rest[:, chosen[edge.high]] - edge.to_low
                edge.to_low += gain
                theta += gain
            if room is not None:
                fits = room.fitting(p)
                if fits is not None and fits.any():
                    view[~fits] = np.inf
            chosen[p] = view.argmin()
            if room is not None:
                room.take(p, int(chosen[p]))
            if excess is not None:
                excess[p] = theta - theta.min()
            if before:
                share = theta / max(len(before), len(after))
                for edge in before:
                    edge.to_high -= share
                theta -= share * len(before)
        return chosen

    def set_multipliers(self, multipliers: FloatArray) -> None:
        """Change the price of memory; messages stay as they are."""
        change = self.memory.price(multipliers - self.multipliers)
        start = self.memory.start
        for p in np.flatnonzero(np.add.reduceat(np.abs(change), start[:-1])):
            self._theta[p] += change[start[p] : start[p + 1]]
        self.multipliers = multipliers

    def ascend(self, sweeps: int) -> list[IntArray]:
        """A few passes, then one step of the multipliers; returns the roundings met on the way.

        The row most over its limit joins the priced rows. Each priced row has a step length of its
        own: it grows while the sign of the row's excess stays and is halved when it turns (Riedmiller
        and Braun's Rprop, 1993), which suits the kinks of a Lagrangian.
        """
        roundings = [self.sweep() for _ in range(sweeps)]
        if not self.memory.limit.size:
            return roundings
        usage = np.mean([self.memory.usage(x) for x in roundings], axis=0)
        excess = (usage - self.memory.limit) / self._row_scale
        value = self.current_bound()
        if value > self._best_value:
            self._best_value, self._best_multipliers = value, self.multipliers
        elif value < self._best_value - _TOLERATED_FALL * abs(self._best_value):
            self.restore_best()
            self._step *= 0.5
            self._sign[:] = 0.0
            return roundings
        worst = int(excess.argmax())
        if excess[worst] > 0 and self._step[worst] == 0.0:
            self._step[worst] = _FIRST_STEP * max(abs(self._best_value), 1.0) / self._row_scale[worst]
        sign = np.sign(excess)
        agreement = sign * self._sign
        self._step *= np.where(agreement > 0, 1.2, np.where(agreement < 0, 0.5, 1.0))
        self._sign = sign
        self.set_multipliers(np.maximum(0.0, self.multipliers + sign * self._step))
        return roundings

    def restore_best(self) -> None:
        """Go back to the multipliers that gave the best bound."""
        self.set_multipliers(self._best_multipliers)

    def excess_costs(self) -> tuple[float, list[FloatArray]]:
        """`(bound, excess)`: any answer with strategy i at position p costs `bound + excess[p][i]`.

        The min-marginals are read off during a backward pass, where each vertex holds all that its
        edges can promise; no step of the pass lowers the bound it started from.
        """
        self._forward()
        bound = self.current_bound()
        excess: list[FloatArray] = [theta * 0.0 for theta in self._theta]
        self._backward(excess)
        return bound, excess
