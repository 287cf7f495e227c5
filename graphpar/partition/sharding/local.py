"""Local search on a feasible choice, in compiled chunks, alone or in a thread of its own.

Most chunks try message windows (`windows`) of a random size, noise and tolerance; some try tree
moves (`moves`) at a low temperature. A chunk that walked uphill goes on from there or from the best
choice, which has taken over what the walk did better in places (`fuse`). The loops release the
interpreter lock, so a `Walker` searches on one core while bounds, exact windows and proofs run on the
other.
"""

import threading
import time
from typing import NamedTuple

import numpy as np

from graphpar.partition.jit import COMPILED
from graphpar.partition.sharding.dual import DualAscent
from graphpar.partition.sharding.flat import FlatGraph, Int64Array, flat_cost
from graphpar.partition.sharding.fuse import fuse
from graphpar.partition.sharding.graph import FloatArray, IntArray
from graphpar.partition.sharding.moves import BEST, COST, WEIGHT, anneal, excess_tree, rises
from graphpar.partition.sharding.windows import search_windows

_NO_ANSWER = 1e300
"""Cost of a choice that is not there; compiled code must not see infinities."""

_CHUNK_S = 0.2
"""Seconds between two looks at the clock."""

_FIRST_VISITS = 500
"""Vertices visited in the first chunk, before its speed is known."""

_LARGEST_WINDOW = 1_000 if COMPILED else 12
"""Most vertices of a message window."""

_LARGEST_TREE = 60 if COMPILED else 4
"""Most vertices of a tree move."""

_TREE_SHARE = 0.1
"""Share of the chunks that try tree moves."""

_TOLERANT_SHARE = 0.5
"""Share of the window chunks in which the choice may get worse on the way."""

_LEAST_CHARGE, _MOST_CHARGE = 0.3, 1.2
"""What chunks that pay for memory pay, and get for what they free, in prices of the bound."""

_BLAMED_SHARE = 0.5
"""Share of the window chunks whose windows grow around vertices that pay more than the bound promises."""

_NUM_STARTS = 1_000
"""Vertices drawn for such a chunk."""

_RETURN_SHARE = 0.03
"""Share of the window chunks that begin at the best choice."""

_NEAREST, _FURTHEST = 0.02, 0.2
"""A walk that is worse than the best choice by a share between these, relatively, goes back to it."""


class Promises(NamedTuple):
    """A moment of the dual ascent.

    Attributes:
        theta, to: Its messages.
        priced: What they hold for memory, per strategy.
        excess: How much more than the bound any answer with a strategy costs, at least.
    """

    theta: FloatArray
    to: FloatArray
    priced: FloatArray
    excess: FloatArray


def promises(dual: DualAscent) -> Promises:
    """Copies of the dual's messages, which windows start from."""
    excess = dual.excess_costs()[1]
    priced = dual.memory.price(dual.multipliers)
    return Promises(dual.theta.copy(), dual.to.copy(), priced, np.concatenate(excess))


class LocalSearch:
    """A choice and the moves that improve it.

    Attributes:
        best: The best choice that fits, by position; meaningless while `cost` is infinite.
        cost: Its cost, the graph's constant included, or infinity.
    """

    def __init__(self, dual: DualAscent, chosen: IntArray, seed: int) -> None:
        self._flat: FlatGraph = dual.flat
        self._to_start = dual.to_start
        self._constant = dual.constant
        self._memory = dual.memory
        self._rise = rises(dual.flat)
        self._random = np.random.default_rng(seed)
        self._gumbel = self._random.gumbel(size=4096 + int(np.diff(dual.flat.start).max()))
        self._state = np.array([self._random.integers(1, 2**62)], dtype=np.uint64)
        self._numbers = np.array([0.0, _NO_ANSWER, 1.0])
        self._set_out()
        self._visits_per_s = _FIRST_VISITS / _CHUNK_S
        self.best: Int64Array = chosen.astype(np.int64)
        self._numbers[BEST] = _NO_ANSWER
        self.promises = promises(dual)
        self._restart(chosen)

    @property
    def cost(self) -> float:
        """Cost of the best choice."""
        best = float(self._numbers[BEST])
        return best + self._constant if best < _NO_ANSWER else np.inf

    def _restart(self, chosen: IntArray) -> None:
        self._x = chosen.astype(np.int64)
        usage = self._memory.usage(self._x)
        self._top, self._lazy = excess_tree(usage - self._memory.limit)
        self._numbers[COST] = flat_cost(self._flat, self._x)
        if self._top[1] <= 0.0 and self._numbers[COST] < self._numbers[BEST]:
            self._numbers[BEST] = self._numbers[COST]
            self.best = self._x.copy()
        self._scale = max(1e-12, abs(self._numbers[COST])) / self._flat.num_vertices
        largest = float(self._memory.limit.max(initial=1.0))
        self._stiff = 1e3 * self._scale * self._flat.num_vertices / max(largest, 1.0)
        self._numbers[WEIGHT] = 100.0 * self._scale / max(largest, 1.0)
        if self._numbers[BEST] >= _NO_ANSWER:
            self._numbers[WEIGHT] = 0.1 * self._stiff

    def adopt(self, chosen: IntArray, cost: float) -> None:
        """Take over what somebody else's choice does better; go on from there if that is anything."""
        before, other = self._numbers[BEST], chosen
        if cost < self.cost:
            other, self.best = self.best, chosen.astype(np.int64)
            self._numbers[BEST] = flat_cost(self._flat, self.best)
        if before < _NO_ANSWER and not np.array_equal(other, self.best):
            self._fuse(other)
        if self._numbers[BEST] < before:
            self._restart(self.best)

    def _fuse(self, other: IntArray) -> None:
        """Let the best choice take over what another one does better."""
        x = self.best.copy()
        top, lazy = excess_tree(self._memory.usage(x) - self._memory.limit)
        if fuse(self._flat, x, other.astype(np.int64), top, lazy):
            cost = flat_cost(self._flat, x)
            if cost < self._numbers[BEST]:
                self._numbers[BEST], self.best = cost, x

    def step(self, most_s: float) -> bool:
        """One chunk of at most about the given time; returns whether the best choice improved."""
        before, began_s = self._numbers[BEST], time.perf_counter()
        visits = max(1, int(self._visits_per_s * min(_CHUNK_S, most_s)))
        if before >= _NO_ANSWER or self._random.random() < _TREE_SHARE:
            self._tree_moves(visits)
        else:
            self._windows(visits)
            if self._numbers[COST] > self._numbers[BEST]:
                self._fuse(self._x)
        seconds = time.perf_counter() - began_s
        speed = visits / max(seconds, 1e-6)
        self._visits_per_s = min(1.5 * self._visits_per_s, max(0.3 * self._visits_per_s, speed))
        return bool(self._numbers[BEST] < before)

    def rehearse(self) -> None:
        """Run every kind of move once, so that all is compiled."""
        self._tree_moves(1)
        self._windows(1)
        self._fuse(self.best)

    def _windows(self, visits: int) -> None:
        largest = min(_LARGEST_WINDOW, self._flat.num_vertices, max(2, visits // 4))
        size = max(2, int(largest ** self._random.uniform(0.4, 1.0)))
        tolerance = 0.0
        if self._random.random() < _TOLERANT_SHARE:
            tolerance = self._scale * 10.0 ** self._random.uniform(-2.5, -0.5)
        charge = 0.0
        if self._random.random() < self._charged_share:
            charge = self._random.uniform(_LEAST_CHARGE, _MOST_CHARGE)
        if self._is_far() or self._random.random() < _RETURN_SHARE:
            self._restart(self.best)
            self._set_out()
        theta, to, priced, _ = self.promises
        search_windows(
            self._flat,
            self._rise,
            self._gumbel,
            theta,
            to,
            self._to_start,
            priced,
            self._starts(),
            self._x,
            self.best,
            self._top,
            self._lazy,
            self._numbers,
            self._state,
            visits,
            size,
            self._scale * 10.0 ** self._random.uniform(-1.5, 0.5),
            self._stiff,
            tolerance,
            charge,
        )

    def _set_out(self) -> None:
        """Draw how far the next walk may go, and how often it pays for memory: no one way suits all."""
        self._leash = _NEAREST * (_FURTHEST / _NEAREST) ** self._random.random()
        self._charged_share = 1.0 - self._random.random() ** 2

    def _starts(self) -> Int64Array:
        """Vertices around which windows grow: any, or more often those that pay much."""
        count = self._flat.num_vertices
        if self._random.random() < _BLAMED_SHARE:
            paid = self.promises.excess[self._flat.start[:-1] + self.best]
            if (total := float(paid.sum())) > 0.0:
                return self._random.choice(count, _NUM_STARTS, p=paid / total)
        return np.arange(count)

    def _is_far(self) -> bool:
        best, now = self._numbers[BEST], self._numbers[COST]
        return bool(self._top[1] > 0.0 or now > best + self._leash * abs(best))

    def _tree_moves(self, visits: int) -> None:
        lost = self._numbers[BEST] >= _NO_ANSWER
        anneal(
            self._flat,
            self._rise,
            self._gumbel,
            self._x,
            self.best,
            self._top,
            self._lazy,
            self._numbers,
            self._state,
            self._scale * 10.0 ** self._random.uniform(-4.0 if lost else -3.0, -1.5),
            visits,
            min(_LARGEST_TREE, self._flat.num_vertices),
            0.5,
        )


class Walker:
    """A local search in a thread of its own; `exchange` trades answers with it."""

    def __init__(self, search: LocalSearch) -> None:
        self._search = search
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._found: tuple[float, IntArray] = (search.cost, search.best.copy())
        self._offered: tuple[float, IntArray] | None = None
        self._thread = threading.Thread(target=self._run, name="graphpar-walker", daemon=True)
        self._thread.start()

    def exchange(self, chosen: IntArray, cost: float, dual: Promises | None) -> tuple[float, IntArray]:
        """Give an answer (and newer messages) to the walker and get its best one."""
        with self._lock:
            self._offered = (cost, chosen)
            if dual is not None:
                self._search.promises = dual
            return self._found

    def stop(self) -> tuple[float, IntArray]:
        """End the thread and take its best answer."""
        self._stop.set()
        self._thread.join()
        return self._found

    def _run(self) -> None:
        while not self._stop.is_set():
            improved = self._search.step(_CHUNK_S)
            with self._lock:
                if improved:
                    self._found = (self._search.cost, self._search.best.copy())
                offered, self._offered = self._offered, None
            if offered is not None:
                self._search.adopt(offered[1], offered[0])
