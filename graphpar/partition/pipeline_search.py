"""Best-first search over the two limits of a pipeline: what its busiest stage adds, and its post.

A chain programme gives the least fill f(X, Y) with every stage's extra at most X and post at most Y.
The plan sought minimises `f(X, Y) + X + Y`. f falls as X and Y grow, so over a box of limits
`[X0, X1] x [Y0, Y1]` no plan beats `f(X1, Y1) + X0 + Y0`. A solved box yields a plan with its own
extra x and post y, better than which nothing lies in `[x, X1] x [y, Y1]`; what is left of the box is
cut in up to three and goes back on the heap. Limits are values that some stage attains, hence the search
ends, and the least bound on the heap is at any time a bound on every plan.
"""

import heapq
import time
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from graphpar.partition.chains.limits import ChainAnswer, NotSolvedError
from graphpar.partition.clock import OutOfTimeError
from graphpar.partition.search import INFINITY, Asked, ChainSolver, Search, SearchResult, Task
from graphpar.partition.stage_costs import StageLimits
from graphpar.partition.unit_arrays import FloatArray

ROUNDING = 1e-12
"""Relative difference of two sums of the same numbers in another order."""


_SLACK = 0.1
"""Share of the asked-for gap that a single programme may leave open."""


_DIVES = 4
"""Tasks tried before the proper search."""

_GUESS = 1.4
"""A task is looked at for plans of up to this multiple of its bound, ..."""

_MOST_GUESS = 64.0
"""... raised up to this multiple of the least bound of all."""

_PLUNGE_FACTORS = (0.85, 0.9, 0.9, 0.95, 0.95)
"""From one programme to the next of a task that is met for the first time, extra falls by these."""

_DIVE_FACTORS = (1.05, 1.15, 1.4, 2.0, 3.0, 5.0, 9.0)
"""Limits on extra tried, in multiples of a task's bound."""


@dataclass(frozen=True)
class _Box:
    """Limits from and to; no plan of the box has less than `fill_s`."""

    task: int
    fill_s: float
    extra: tuple[float, float]
    post: tuple[float, float]


def search(tasks: Iterable[Task], asked: Asked, *, dive: bool = False) -> SearchResult:
    """The pipeline with the least step time over all tasks.

    Args:
        tasks: Settings to search.
        asked: What to find.
        dive: Whether to look for a good plan first, with limits guessed from the bounds; worth it where
            programmes without narrow limits are slow.
    """
    return _BoxSearch(tasks, asked, dive).run()


class _BoxSearch(Search[_Box]):
    def __init__(self, tasks: Iterable[Task], asked: Asked, dive: bool) -> None:
        super().__init__(tasks, asked)
        self._dives = dive
        self._solvers: dict[int, ChainSolver] = {}
        self._plunged: set[int] = set()

    def _whole(self, index: int, task: Task) -> _Box:
        return _Box(index, task.fill_s, (task.extra_s, INFINITY), (task.post_s, self._post_limit))

    def _start(self) -> None:
        if self._dives:
            self._dive()

    def _dive(self) -> None:
        """Try the most promising tasks with little more than their bounds until a plan fits."""
        for _, _, box in heapq.nsmallest(_DIVES, self._heap):
            task, solver = self._tasks[box.task], self._solver(box.task)
            if solver.is_quick:
                self._dive_widely()
                return
            for factor in _DIVE_FACTORS:
                slack = self._gap * task.bound_s
                limits = StageLimits(factor * task.bound_s, self._post_limit, slack_s=slack)
                try:
                    answer = solver.solve(limits, self._deadline_s)
                except NotSolvedError:
                    continue
                if answer is not None:
                    self._offer(box.task, answer)
                    return

    def _dive_widely(self) -> None:
        """Raise guesses of what tasks cost, the lowest first, until one of them has a plan.

        A guess is no bound: what it leaves out counts again in the search proper.
        """
        guesses = [(bound, box.task) for bound, _, box in heapq.nsmallest(_DIVES, self._heap)]
        known = {task for _, task in guesses}
        for bound, _, box in self._heap:
            count = self._tasks[box.task].setting.microbatches
            if count & (count - 1) == 0 and box.task not in known:
                guesses.append((bound, box.task))
        heapq.heapify(guesses)
        most = _MOST_GUESS * guesses[0][0] if guesses else 0.0
        while guesses:
            bound, task = heapq.heappop(guesses)
            if time.monotonic() > self._deadline_s:
                raise OutOfTimeError
            solver = self._solver(task)
            guess = min(_GUESS * bound, self._target())
            least = solver.tighten(guess, self._post_limit, self._weight)
            answer = solver.solve(StageLimits(post_s=self._post_limit), self._deadline_s)
            if answer is not None:
                self._offer(task, answer)
                if solver.is_quick:
                    self._climb(task, self._improve)
                return
            if guess < min(most, self._target()):
                heapq.heappush(guesses, (max(guess, least), task))

    def _improve(self, task: int) -> None:
        """Look for better plans in a task that is still to be searched."""
        box = next((b for _, _, b in self._heap if b.task == task), None)
        if box is None or task in self._plunged:
            return
        solver = self._solver(task)
        if solver.tighten(self._target(), self._post_limit, self._weight) < self._target():
            self._plunged.add(task)
            self._plunge(box, solver)

    def _plunge(self, box: _Box, solver: ChainSolver) -> None:
        """Follow a task downwards, with less extra each time, as long as that gives better plans."""
        if not solver.is_quick:
            return
        most = self._target() - box.fill_s - self._weight * box.post[0]
        for factor in _PLUNGE_FACTORS:
            limits = StageLimits(most, self._post_limit, fill_s=self._target())
            answer = solver.solve(limits, self._deadline_s)
            if answer is None:
                return
            self._offer(box.task, answer)
            most = min(most, factor * answer.extra_s)

    def _solver(self, task: int) -> ChainSolver:
        if task not in self._solvers:
            self._solvers[task] = self._tasks[task].build()
        return self._solvers[task]

    def _look(self, bound: float, box: _Box) -> None:
        if time.monotonic() > self._deadline_s:
            raise OutOfTimeError
        solver = self._solver(box.task)
        target = self._target()
        bound = max(bound, solver.tighten(target, self._post_limit, self._weight))
        # Stages that are left out cost the target or more, whatever the bound says of the others.
        self._prune(target)
        if bound >= target:
            return
        if box.task not in self._plunged:
            self._plunged.add(box.task)
            self._plunge(box, solver)
            target = self._target()
        if self._heap and bound > self._heap[0][0]:
            self._push(bound, box)
            return
        self.programs += 1
        # A stage with more extra and post than this misses the target, whatever the others do.
        useful = self._target() - box.fill_s
        extra = min(box.extra[1], useful - self._weight * box.post[0])
        both = useful if self._weight > 0 else INFINITY
        if useful < INFINITY:
            self._prune(max(bound, self._target()))
        fill = self._target() - box.extra[0] - self._weight * box.post[0]
        slack = self._gap * _SLACK * bound
        try:
            answer = solver.solve(StageLimits(extra, box.post[1], both, fill, slack), self._deadline_s)
        except NotSolvedError as unsolved:
            if time.monotonic() > self._deadline_s:
                raise
            self._halve(solver, bound, box, extra, unsolved.bound_s)
            return
        if answer is None:
            return
        self._offer(box.task, answer)
        if answer.bound_s < answer.fill_s:
            self._prune(max(bound, answer.bound_s + answer.extra_s + self._weight * answer.post_s))
        self._split(solver, bound, box, answer)

    def _split(self, costs: ChainSolver, bound: float, box: _Box, answer: ChainAnswer) -> None:
        """Push what is left of a box: less extra, in two halves, or the same extra and less post."""
        fill, weight = answer.bound_s, self._weight
        if weight > 0 and answer.post_s > box.post[0]:
            below = _next_below(costs.posts_s, answer.post_s)
            if below >= box.post[0]:
                rest = _Box(box.task, fill, (answer.extra_s, box.extra[1]), (box.post[0], below))
                self._push(max(bound, fill + answer.extra_s + weight * box.post[0]), rest)
        # Above this extra the box cannot beat the target, so it need not be looked at.
        most, useful = (
            _next_below(costs.extras_s, answer.extra_s),
            self._target() - fill - weight * box.post[0],
        )
        if most >= useful:
            most = useful
            self._prune(max(bound, self._target()))
        lowest = max(box.extra[0], float(costs.extras_s[0]))
        if most < lowest:
            return
        middle = _next_above(costs.extras_s, (lowest + most) / 2, lowest, most)
        upper = _Box(box.task, fill, (middle, most), box.post)
        self._push(max(bound, fill + middle + weight * box.post[0]), upper)
        below = _next_below(costs.extras_s, middle)
        if below >= lowest:
            lower = _Box(box.task, fill, (lowest, below), box.post)
            self._push(max(bound, fill + lowest + weight * box.post[0]), lower)

    def _halve(self, solver: ChainSolver, bound: float, box: _Box, most: float, fill_s: float) -> None:
        """Push both halves of a box that was too hard: less extra in one, more in the other."""
        values, fill = solver.extras_s, max(box.fill_s, fill_s)
        lowest, highest = max(box.extra[0], float(values[0])), min(most, float(values[-1]))
        middle = _next_above(values, (lowest + highest) / 2, lowest, highest)
        if not lowest < middle < highest:
            # Nothing is left to divide.
            self._give_up(max(bound, fill + lowest))
            return
        for low, high in ((lowest, _next_below(values, middle)), (middle, highest)):
            half = _Box(box.task, fill, (low, high), box.post)
            self._push(max(bound, fill + low + self._weight * box.post[0]), half)


def _next_below(values: FloatArray, value: float) -> float:
    """The largest attained value below another by more than rounding."""
    index = int(np.searchsorted(values, value * (1 - ROUNDING), side="left")) - 1
    return float(values[index]) if index >= 0 else -INFINITY


def _next_above(values: FloatArray, value: float, low: float, high: float) -> float:
    """The attained value nearest above another within an interval, or the interval's low end."""
    index = int(np.searchsorted(values, value, side="left"))
    if index < len(values) and values[index] <= high:
        return float(values[index])
    return low
