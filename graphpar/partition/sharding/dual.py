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
smoothed excess of the memory that the cheapest strategies by the vertices' min-marginals would use.
"""

import copy

import numpy as np

from graphpar.partition.clock import OutOfTimeError, ShouldStop, never
from graphpar.partition.sharding.flat import FlatGraph, Int64Array, flatten
from graphpar.partition.sharding.graph import FloatArray, IntArray, MemoryRows, ShardingGraph
from graphpar.partition.sharding.memory import MemoryMatrix, spread_peaks
from graphpar.partition.sharding.messages import (
    message_starts,
    pass_backward,
    pass_forward,
    pass_within_memory,
    shrink,
)
from graphpar.partition.sharding.moves import excess_tree

_VERTICES_PER_LOOK = 512
"""A pass looks at the clock this often."""

_FIRST_RATE, _LAST_RATE = 0.05, 1e-5
"""Largest change of the prices in one step, all rows together, as a share of the bound."""

_TWINS_RATE, _TWINS_PATIENCE = 0.02, 8
"""What a twin begins with: less than at first, since its prices are good ones already."""

_SMOOTHING = 0.15
"""Weight of the newest excess in the direction of the prices."""

_PATIENCE = 15
"""Steps without a better bound after which the rate falls."""

_STEADY_RISES, _GROWTH, _LARGEST_REGROWN = 6, 1.15, 2e-4
"""After so many rises in a row a small rate grows by this factor a step, up to this."""

_TOLERATED_FALL = 0.05
"""A bound this far below the best one means that the multipliers overshot."""

_EXPECTED_SHARE = 0.03
"""A bound below this share of an answer's cost counts as that share where prices move by shares of it:
where all that an answer costs comes from memory, the first bounds are next to nothing."""

_ROWS_PER_STEP = 4
"""Overfilled rows that get a price at a time."""

_NOTHING = np.zeros(0)


class DualAscent:
    """Message passing with memory multipliers on one graph; `bound` only grows.

    Attributes:
        bound: The best lower bound so far.
        multipliers: The current price of memory at each row.
        flat: The graph as arrays.
        constant: Cost that no choice changes.
        theta, to, to_start: The messages, see `messages`.
    """

    def __init__(
        self,
        graph: ShardingGraph,
        rows: MemoryRows,
        should_stop: ShouldStop = never,
    ) -> None:
        self.memory = MemoryMatrix(graph, rows, should_stop)
        self._should_stop = should_stop
        self.vertices = self.memory.vertices
        self.constant = graph.constant
        self._least_level, self._expected = 1.0, np.inf
        self.flat: FlatGraph = flatten(graph, self.memory, should_stop)
        self.theta: FloatArray = self.flat.cost.copy()
        self.to_start: Int64Array = message_starts(self.flat)
        self.to: FloatArray = np.zeros(self.to_start[-1])
        self.rank: Int64Array = np.arange(self.flat.num_vertices)
        self._blocks = [
            self.rank[begin : begin + _VERTICES_PER_LOOK]
            for begin in range(0, self.flat.num_vertices, _VERTICES_PER_LOOK)
        ]
        self.multipliers = np.zeros(rows.num_rows)
        self.bound = -np.inf
        self._best_multipliers = self.multipliers
        self._best_value = -np.inf
        self._row_scale = np.maximum(1.0, np.abs(rows.limit))
        self._priced = np.zeros(rows.num_rows, dtype=np.bool_)
        self._direction: FloatArray = np.zeros(rows.num_rows)
        self._rate, self._patience = _FIRST_RATE, _PATIENCE
        self._last_value, self._rises = -np.inf, 0

    def twin(self) -> "DualAscent":
        """A copy that goes on by itself from here."""
        twin = copy.copy(self)
        twin.theta, twin.to, twin._priced = self.theta.copy(), self.to.copy(), self._priced.copy()
        twin.bound = twin._best_value = twin._last_value = -np.inf
        twin._best_multipliers, twin._direction = self.multipliers, np.zeros_like(self._direction)
        twin._rate, twin._patience, twin._rises = _TWINS_RATE, _TWINS_PATIENCE, 0
        return twin

    def sweep(self, excess: FloatArray = _NOTHING) -> IntArray:
        """A forward and a backward pass; returns the strategies the backward pass rounded to.

        `excess`, unless empty, receives every strategy's min-marginal less the least of its vertex.
        """
        self._forward()
        chosen = self._backward(excess)
        self.bound = max(self.bound, self.current_bound())
        return chosen

    def current_bound(self) -> float:
        """The bound at the present messages and multipliers, right after a pass."""
        priced = float(self.multipliers @ self.memory.limit)
        least = np.minimum.reduceat(self.theta, self.flat.start[:-1])
        return self.constant - priced + float(least.sum())

    def _check_time(self) -> None:
        if self._should_stop():
            raise OutOfTimeError

    def _forward(self) -> None:
        for block in self._blocks:
            self._check_time()
            pass_forward(self.flat, self.theta, self.to, self.to_start, self.rank, block)

    def _backward(self, excess: FloatArray) -> IntArray:
        chosen = np.zeros(self.flat.num_vertices, dtype=np.int64)
        for block in reversed(self._blocks):
            self._check_time()
            pass_backward(self.flat, self.theta, self.to, self.to_start, self.rank, block, chosen, excess)
        return chosen

    def round_within_memory(self) -> IntArray:
        """A pass whose rounding takes no strategy that the memory left over cannot hold."""
        self._forward()
        chosen = np.zeros(self.flat.num_vertices, dtype=np.int64)
        top, lazy = excess_tree(self.memory.usage(chosen) - self.memory.limit)
        shrink(self.flat, chosen, top, lazy, self.rank)
        for block in reversed(self._blocks):
            self._check_time()
            pass_within_memory(
                self.flat, self.theta, self.to, self.to_start, self.rank, block, chosen, top, lazy
            )
        return chosen

    def set_multipliers(self, multipliers: FloatArray) -> None:
        """Change the price of memory; messages stay as they are."""
        self.theta += self.memory.price(multipliers - self.multipliers)
        self.multipliers = multipliers

    def ascend(self, sweeps: int) -> list[IntArray]:
        """A few passes, then one step of the multipliers; returns the roundings met on the way.

        The peaks of the roundings most over the limit join the priced rows. Prices follow the excess of
        what the bound is made of, each vertex's cheapest strategies by its min-marginals (at fixed
        messages that is the bound's own slope, which roundings miss where many strategies cost the same),
        smoothed over the steps and clipped (a deflected subgradient: Camerini, Fratta and Maffioli,
        1975); the rate falls whenever the bound has not risen for a while, and grows again, not far, once
        it rises all the time.
        """
        dearer = np.zeros(len(self.theta))
        roundings = [self.sweep() for _ in range(sweeps - 1)] + [self.sweep(dearer)]
        if not self.memory.limit.size:
            return roundings
        rounded = np.mean([self.memory.usage(x) for x in roundings], axis=0)
        excess = (self._cheapest_usage(dearer) - self.memory.limit) / self._row_scale
        value = self.current_bound()
        self._patience -= 1
        if value > self._best_value + 1e-6 * abs(self._best_value):
            self._patience = _PATIENCE
        if value > self._best_value:
            self._best_value, self._best_multipliers = value, self.multipliers
        elif value < self._best_value - _TOLERATED_FALL * self._level():
            self.restore_best()
            self._slow_down()
            return roundings
        self._rises = self._rises + 1 if value > self._last_value else 0
        self._last_value = value
        if self._patience <= 0:
            self._slow_down()
        elif self._rises >= _STEADY_RISES:
            self._rate = max(self._rate, min(_LARGEST_REGROWN, _GROWTH * self._rate))
        over = np.where(self._priced, 0.0, (rounded - self.memory.limit) / self._row_scale)
        for row in spread_peaks(over, _ROWS_PER_STEP):
            self._priced[row] = True
        self._direction += _SMOOTHING * (excess - self._direction)
        count = max(1, int(np.count_nonzero(self._priced)))
        rate = self._rate * self._level() / np.sqrt(count)
        step = np.where(self._priced, np.clip(10.0 * self._direction, -1.0, 1.0), 0.0)
        self._move(np.maximum(0.0, self.multipliers + rate * step / self._row_scale), value, excess)
        return roundings

    def _move(self, wanted: FloatArray, value: float, excess: FloatArray) -> None:
        """Change the prices, by no more than would raise the bound to what an answer costs."""
        step = wanted - self.multipliers
        promised = float(step @ (excess * self._row_scale))
        if promised > (hoped := self._expected - value) > 0.0:
            step *= hoped / promised
        self.set_multipliers(self.multipliers + step)

    def _cheapest_usage(self, dearer: FloatArray) -> FloatArray:
        """Memory at each row of the strategies that no other is cheaper than; ties share a vertex."""
        cheapest = (dearer == 0.0).astype(np.float64)
        start = self.flat.start
        cheapest /= np.repeat(np.add.reduceat(cheapest, start[:-1]), np.diff(start))
        return self.memory.mean_usage(cheapest)

    def expect(self, cost: float) -> None:
        """Learn what an answer costs: the optimum may be about that, however low the bound is now."""
        self._expected, self._least_level = cost, max(1.0, _EXPECTED_SHARE * abs(cost))

    def _level(self) -> float:
        return max(abs(self._best_value), self._least_level)

    def _slow_down(self) -> None:
        self._rate = max(_LAST_RATE, 0.7 * self._rate)
        self._patience = _PATIENCE

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
        excess = np.zeros(len(self.theta))
        self._backward(excess)
        return bound, np.split(excess, self.flat.start[1:-1])
