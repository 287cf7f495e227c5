"""The clock, the best answer and the bound of one run of the sharding solver, as the file counts."""

import math
import time
from dataclasses import dataclass, field

from graphpar.partition.answers import Progress, ProgressCallback, relative_gap
from graphpar.partition.problems import ShardingProblem
from graphpar.partition.sharding.check import check_sharding
from graphpar.partition.sharding.graph import IntArray, ShardingGraph

_RESERVE = 0.02
"""Share of the time limit kept for the last check of an answer."""

_CHECKS_SHARE = 0.04
"""At most about this share of the time goes into checking answers."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """A choice of strategies in a reduced graph, and what it costs there."""

    graph: ShardingGraph
    vertices: list[int]
    chosen: IntArray
    cost: float


@dataclass(eq=False)
class State:
    """What a run knows; all times in seconds since it began."""

    problem: ShardingProblem
    began_s: float
    time_limit_s: float
    gap: float
    progress: ProgressCallback
    integral: bool = False
    """Whether all costs are whole numbers, so that bounds may be rounded up."""
    objective: float = math.inf
    answer: list[int] | None = None
    bound: float = -math.inf
    phase: str = "reduce"
    last_told: tuple[float, float] = field(default=(math.inf, -math.inf))
    waiting: Candidate | None = None
    check_s: float = 0.0
    next_check_s: float = 0.0

    def elapsed_s(self) -> float:
        """Wall-clock time since the run began."""
        return time.perf_counter() - self.began_s

    def left_s(self) -> float:
        """Time left for searching; the last check of an answer is paid for."""
        return (1.0 - _RESERVE) * self.time_limit_s - 2.0 * self.check_s - self.elapsed_s()

    def out_of_time(self) -> bool:
        """Whether it is time to stop."""
        return self.left_s() <= 0

    def closed(self) -> bool:
        """Whether the gap asked for is reached."""
        return self.answer is not None and relative_gap(self.objective, self.bound) <= self.gap

    def done(self) -> bool:
        """Whether there is no reason to go on."""
        return self.closed() or self.out_of_time()

    def raise_bound(self, bound: float) -> None:
        """Take a bound, less what rounding errors may have added; whole costs round it up."""
        safe = bound - 1e-9 * abs(bound)
        if self.integral and math.isfinite(safe):
            safe = float(math.ceil(safe - 1e-6))
        self.bound = max(self.bound, safe)
        self.tell()
        self._settle_last()

    def offer(self, candidate: Candidate, *, at_once: bool = False) -> None:
        """Take a candidate as incumbent if the file itself says that it is feasible and better.

        Checking against the file takes a while on large problems, so a candidate that comes soon after
        another waits, and a better one takes its place.
        """
        best = self.objective if self.waiting is None else min(self.objective, self.waiting.cost)
        if candidate.cost < best:
            self.waiting = candidate
        if at_once or self.answer is None or self.elapsed_s() >= self.next_check_s:
            self.settle()
        self._settle_last()

    def settle(self) -> None:
        """Check the candidate that waits, if any."""
        candidate, self.waiting = self.waiting, None
        if candidate is None:
            return
        began_s = self.elapsed_s()
        choice = {u: int(i) for u, i in zip(candidate.vertices, candidate.chosen, strict=True)}
        self.take(candidate.graph.expand(choice, self.problem.num_nodes))
        self.check_s = max(self.check_s, self.elapsed_s() - began_s)
        self.next_check_s = self.elapsed_s() + self.check_s / _CHECKS_SHARE

    def _settle_last(self) -> None:
        """Check the candidate that waits if nothing better is left to be found."""
        if self.waiting is not None and relative_gap(self.waiting.cost, self.bound) <= self.gap:
            self.settle()

    def take(self, answer: list[int]) -> None:
        """Take an answer as incumbent if the file itself says that it is feasible and better."""
        began_s = self.elapsed_s()
        verdict = check_sharding(self.problem, answer)
        self.check_s = max(self.check_s, self.elapsed_s() - began_s)
        if verdict.feasible and verdict.cost < self.objective:
            self.objective, self.answer = float(verdict.cost), answer
            self.tell()

    def tell(self) -> None:
        """Report progress, if there is any."""
        now = (self.objective, self.bound)
        if now != self.last_told:
            self.last_told = now
            self.progress(
                Progress(
                    self.phase,
                    self.elapsed_s(),
                    self.objective if self.answer is not None else None,
                    self.bound if math.isfinite(self.bound) else None,
                )
            )
