"""Best-first search over the two limits of a pipeline: what its busiest stage adds, and its post.

A chain programme gives the least fill f(X, Y) with every stage's extra at most X and post at most Y.
The plan sought minimises `f(X, Y) + X + Y`. f falls as X and Y grow, so over a box of limits
`[X0, X1] x [Y0, Y1]` no plan beats `f(X1, Y1) + X0 + Y0`. A solved box yields a plan with its own
extra x and post y, better than which nothing lies in `[x, X1] x [y, Y1]`; what is left of the box is
cut in up to three and goes back on the heap. Limits are values that some stage attains, hence the search
ends, and the least bound on the heap is at any time a bound on every plan.
"""

import heapq
import itertools
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from graphpar.partition.chain import ChainAnswer, NotSolvedError
from graphpar.partition.clock import OutOfTimeError
from graphpar.partition.stage_costs import StageLimits
from graphpar.partition.unit_arrays import FloatArray, Setting

INFINITY = float("inf")

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


class ChainSolver(Protocol):
    """Anything that finds the least fill under limits."""

    @property
    def num_variables(self) -> int:
        """Stages that the programme chooses from."""

    @property
    def is_quick(self) -> bool:
        """Whether solving takes no more than milliseconds."""

    @property
    def extras_s(self) -> FloatArray:
        """All values the busiest stage's extra can take, increasing."""

    @property
    def posts_s(self) -> FloatArray:
        """All values the largest post can take, increasing."""

    def tighten(self, target_s: float, post_limit_s: float, post_weight: float) -> float:
        """Forget stages that no plan below the target needs; a lower bound on all plans.

        The bound covers fill, extra and `post_weight` times post. Until the next call answers hold only
        as far as plans below the target are asked for.
        """

    def solve(self, limits: StageLimits, deadline_s: float) -> ChainAnswer | None:
        """The least fill with all stages within the limits, or None where no pipeline fits."""


@dataclass(frozen=True)
class Found:
    """A pipeline and what it costs before the plan around it is priced."""

    setting: Setting
    answer: ChainAnswer

    @property
    def step_s(self) -> float:
        """Seconds of a step in which this pipeline is alone."""
        return self.answer.fill_s + self.answer.extra_s + self.answer.post_s


@dataclass(frozen=True)
class Task:
    """A setting to try, and how to build its programme when needed.

    All numbers are lower bounds on its plans: `bound_s` on the step without post, the others on its
    parts.
    """

    setting: Setting
    bound_s: float
    fill_s: float
    extra_s: float
    post_s: float
    build: Callable[[], ChainSolver]


@dataclass(frozen=True)
class SearchResult:
    """The best pipeline below the cutoff, if any, and a bound on all others; `cut` where time ended.

    `others` are the best pipelines of other settings that were met on the way, best first.
    """

    best: Found | None
    bound_s: float
    cut: bool
    programs: int
    others: tuple[Found, ...] = ()


@dataclass(frozen=True)
class _Box:
    """Limits from and to; no plan of the box has less than `fill_s`."""

    task: int
    fill_s: float
    extra: tuple[float, float]
    post: tuple[float, float]


def search(
    tasks: Iterable[Task],
    *,
    cutoff_s: float,
    gap: float,
    deadline_s: float,
    post_limit_s: float = INFINITY,
    count_post: bool = True,
    dive: bool = False,
) -> SearchResult:
    """The pipeline with the least step time over all tasks.

    Args:
        tasks: Settings to search.
        cutoff_s: Only plans strictly better than this are of interest.
        gap: Stop once the bound is within this fraction of the best that was found.
        deadline_s: `time.monotonic()` at which to stop.
        post_limit_s: Leave out stages with a longer post.
        count_post: Whether post is part of what is minimised, or only limited.
        dive: Whether to look for a good plan first, with limits guessed from the bounds; worth it where
            programmes without narrow limits are slow.
    """
    run = _Run(list(tasks), cutoff_s, gap, post_limit_s, count_post)
    try:
        if dive:
            run.dive(deadline_s)
        run.work(deadline_s)
    except OutOfTimeError:
        return SearchResult(run.best, run.bound(), True, run.programs, run.others())
    return SearchResult(run.best, run.bound(), False, run.programs, run.others())


class _Run:
    """The state of one search."""

    def __init__(
        self,
        tasks: list[Task],
        cutoff_s: float,
        gap: float,
        post_limit_s: float,
        count_post: bool,
    ) -> None:
        self._tasks = tasks
        self._solvers: dict[int, ChainSolver] = {}
        self._post_limit = post_limit_s
        self._weight = 1.0 if count_post else 0.0
        self._gap = gap
        self._cutoff = cutoff_s
        self._pruned = INFINITY
        self._ticket = itertools.count()
        self._heap: list[tuple[float, int, _Box]] = []
        self.best: Found | None = None
        self._met: dict[int, tuple[float, Found]] = {}
        self.programs = 0
        self._plunged: set[int] = set()
        for index, task in enumerate(tasks):
            bound = task.bound_s + self._weight * task.post_s
            if bound >= cutoff_s:
                self._pruned = min(self._pruned, bound)
            else:
                box = _Box(index, task.fill_s, (task.extra_s, INFINITY), (task.post_s, post_limit_s))
                self._push(bound, box)

    def bound(self) -> float:
        """A lower bound on every plan of the tasks; the cutoff where nothing better exists."""
        return min(self._cutoff, self._pruned, self._heap[0][0] if self._heap else INFINITY)

    def work(self, deadline_s: float) -> None:
        """Solve boxes until none can hold a plan better than the best by more than the gap."""
        while self._heap:
            bound, _, box = heapq.heappop(self._heap)
            if bound >= self._target():
                self._pruned = min(self._pruned, bound)
                return
            try:
                self._solve(bound, box, deadline_s)
            except OutOfTimeError:
                self._pruned = min(self._pruned, bound)
                raise

    def others(self) -> tuple[Found, ...]:
        """The best of every setting but the winner's, best first."""
        rest = [pair for pair in self._met.values() if pair[1] is not self.best]
        return tuple(found for _, found in sorted(rest, key=lambda pair: pair[0]))

    def dive(self, deadline_s: float) -> None:
        """Try the most promising tasks with little more than their bounds until a plan fits."""
        for _, _, box in heapq.nsmallest(_DIVES, self._heap):
            task, solver = self._tasks[box.task], self._solver(box.task)
            if solver.is_quick:
                self._dive_widely(deadline_s)
                return
            for factor in _DIVE_FACTORS:
                slack = self._gap * task.bound_s
                limits = StageLimits(factor * task.bound_s, self._post_limit, slack_s=slack)
                try:
                    answer = solver.solve(limits, deadline_s)
                except NotSolvedError:
                    continue
                if answer is not None:
                    self._offer_answer(box.task, answer)
                    return

    def _dive_widely(self, deadline_s: float) -> None:
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
            if time.monotonic() > deadline_s:
                raise OutOfTimeError
            solver = self._solver(task)
            guess = min(_GUESS * bound, self._target())
            least = solver.tighten(guess, self._post_limit, self._weight)
            answer = solver.solve(StageLimits(post_s=self._post_limit), deadline_s)
            if answer is not None:
                self._offer_answer(task, answer)
                self._climb(task, deadline_s)
                return
            if guess < min(most, self._target()):
                heapq.heappush(guesses, (max(guess, least), task))

    def _climb(self, start: int, deadline_s: float) -> None:
        """From a task that has a plan to others with about twice or half as many microbatches."""
        if not self._solver(start).is_quick:
            return
        tried = {start}
        for factor in (2.0, 0.5):
            here = start
            while (there := self._neighbour(here, factor)) is not None and there not in tried:
                tried.add(there)
                before = self._cutoff
                self._look(there, deadline_s)
                if self._cutoff >= before:
                    break
                here = there

    def _neighbour(self, task: int, factor: float) -> int | None:
        """The task of the same schedule whose microbatches are nearest to a multiple."""
        own = self._tasks[task].setting
        wanted = own.microbatches * factor
        alike = [
            (abs(t.setting.microbatches - wanted), i)
            for i, t in enumerate(self._tasks)
            if t.setting.schedule == own.schedule and i != task
        ]
        return min(alike)[1] if alike else None

    def _look(self, task: int, deadline_s: float) -> None:
        """Look for better plans in a task that is still to be searched."""
        box = next((b for _, _, b in self._heap if b.task == task), None)
        if box is None or task in self._plunged:
            return
        solver = self._solver(task)
        if solver.tighten(self._target(), self._post_limit, self._weight) < self._target():
            self._plunged.add(task)
            self._plunge(box, solver, deadline_s)

    def _plunge(self, box: _Box, solver: ChainSolver, deadline_s: float) -> None:
        """Follow a task downwards, with less extra each time, as long as that gives better plans."""
        if not solver.is_quick:
            return
        most = self._target() - box.fill_s - self._weight * box.post[0]
        for factor in _PLUNGE_FACTORS:
            limits = StageLimits(most, self._post_limit, fill_s=self._target())
            answer = solver.solve(limits, deadline_s)
            if answer is None:
                return
            self._offer_answer(box.task, answer)
            most = min(most, factor * answer.extra_s)

    def _solver(self, task: int) -> ChainSolver:
        if task not in self._solvers:
            self._solvers[task] = self._tasks[task].build()
        return self._solvers[task]

    def _target(self) -> float:
        # Until something is found, everything below the cutoff is of interest.
        return self._cutoff * (1 - self._gap) if self.best is not None else self._cutoff

    def _push(self, bound: float, box: _Box) -> None:
        heapq.heappush(self._heap, (bound, next(self._ticket), box))

    def _solve(self, bound: float, box: _Box, deadline_s: float) -> None:
        if time.monotonic() > deadline_s:
            raise OutOfTimeError
        solver = self._solver(box.task)
        target = self._target()
        bound = max(bound, solver.tighten(target, self._post_limit, self._weight))
        if target < INFINITY:
            self._pruned = min(self._pruned, max(bound, target))
        if bound >= target:
            return
        if box.task not in self._plunged:
            self._plunged.add(box.task)
            self._plunge(box, solver, deadline_s)
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
            self._pruned = min(self._pruned, max(bound, self._target()))
        fill = self._target() - box.extra[0] - self._weight * box.post[0]
        slack = self._gap * _SLACK * bound
        try:
            answer = solver.solve(StageLimits(extra, box.post[1], both, fill, slack), deadline_s)
        except NotSolvedError as unsolved:
            if time.monotonic() > deadline_s:
                raise
            self._halve(solver, bound, box, extra, unsolved.bound_s)
            return
        if answer is None:
            return
        self._offer_answer(box.task, answer)
        if answer.bound_s < answer.fill_s:
            self._pruned = min(
                self._pruned,
                max(bound, answer.bound_s + answer.extra_s + self._weight * answer.post_s),
            )
        self._split(solver, bound, box, answer)

    def _offer_answer(self, task: int, answer: ChainAnswer) -> None:
        value = answer.fill_s + answer.extra_s + self._weight * answer.post_s
        found = Found(self._tasks[task].setting, answer)
        if task not in self._met or value < self._met[task][0]:
            self._met[task] = value, found
        if value < self._cutoff:
            self._cutoff, self.best = value, found

    def _split(self, costs: ChainSolver, bound: float, box: _Box, answer: ChainAnswer) -> None:
        """Push what is left of a box: less extra, in two halves, or the same extra and less post."""
        fill, weight = answer.bound_s, self._weight
        if weight > 0 and answer.post_s > box.post[0]:
            below = _next_below(costs.posts_s, answer.post_s)
            if below >= box.post[0]:
                rest = _Box(box.task, fill, (answer.extra_s, box.extra[1]), (box.post[0], below))
                self._offer(bound, fill + answer.extra_s + weight * box.post[0], rest)
        # Above this extra the box cannot beat the target, so it need not be looked at.
        most, useful = (
            _next_below(costs.extras_s, answer.extra_s),
            self._target() - fill - weight * box.post[0],
        )
        if most >= useful:
            most, self._pruned = useful, min(self._pruned, max(bound, self._target()))
        lowest = max(box.extra[0], float(costs.extras_s[0]))
        if most < lowest:
            return
        middle = _next_above(costs.extras_s, (lowest + most) / 2, lowest, most)
        upper = _Box(box.task, fill, (middle, most), box.post)
        self._offer(bound, fill + middle + weight * box.post[0], upper)
        below = _next_below(costs.extras_s, middle)
        if below >= lowest:
            lower = _Box(box.task, fill, (lowest, below), box.post)
            self._offer(bound, fill + lowest + weight * box.post[0], lower)

    def _halve(self, solver: ChainSolver, bound: float, box: _Box, most: float, fill_s: float) -> None:
        """Push both halves of a box that was too hard: less extra in one, more in the other."""
        values, fill = solver.extras_s, max(box.fill_s, fill_s)
        lowest, highest = max(box.extra[0], float(values[0])), min(most, float(values[-1]))
        middle = _next_above(values, (lowest + highest) / 2, lowest, highest)
        if not lowest < middle < highest:
            # Nothing is left to divide: the box stays what it is, and so does its bound.
            self._pruned = min(self._pruned, max(bound, fill + lowest))
            return
        for low, high in ((lowest, _next_below(values, middle)), (middle, highest)):
            half = _Box(box.task, fill, (low, high), box.post)
            self._offer(bound, fill + low + self._weight * box.post[0], half)

    def _offer(self, parent: float, bound: float, box: _Box) -> None:
        bound = max(parent, bound)
        if bound < self._target():
            self._push(bound, box)
        else:
            self._pruned = min(self._pruned, bound)


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
