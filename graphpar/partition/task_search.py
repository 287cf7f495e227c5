"""Best-first search over settings, each solved to the end in one sweep (`chain_labels`).

Where `pipeline_search` divides the limits on extra and post into boxes, here a setting is either excluded
by its bound or has its best plan found at once. The least bound of the settings that are left is at any
time a bound on every plan.

The first plan is looked for among those with one replica per stage, which are few, in settings whose
number of microbatches is a power of two; then, from there, in the settings with about twice and half as
many microbatches.
"""

import heapq
import itertools
import time
from collections.abc import Iterable

from graphpar.partition.chain import ChainAnswer
from graphpar.partition.chain_swept import SweptProgram
from graphpar.partition.clock import OutOfTimeError
from graphpar.partition.pipeline_search import INFINITY, Found, SearchResult, Task

_NEAREST = 4
"""The settings with the least bounds are tried at first whatever their microbatches."""


def search_tasks(
    tasks: Iterable[Task],
    *,
    cutoff_s: float,
    gap: float,
    deadline_s: float,
    post_limit_s: float = INFINITY,
    count_post: bool = True,
    dive: bool = False,
) -> SearchResult:
    """The pipeline with the least step time over the tasks of swept programmes.

    Arguments as those of `pipeline_search.search`.
    """
    run = _Run(list(tasks), cutoff_s, gap, post_limit_s, count_post, deadline_s)
    cut = False
    try:
        if dive:
            run.dive()
        run.work()
    except OutOfTimeError:
        cut = True
    return SearchResult(run.best, run.bound(), cut, run.programs, run.others())


class _Run:
    """The state of one search."""

    def __init__(
        self,
        tasks: list[Task],
        cutoff_s: float,
        gap: float,
        post_limit_s: float,
        count_post: bool,
        deadline_s: float,
    ) -> None:
        self._tasks = tasks
        self._gap, self._cutoff, self._deadline_s = gap, cutoff_s, deadline_s
        self._post_limit = post_limit_s
        self._weight = 1.0 if count_post else 0.0
        self._pruned = INFINITY
        self._ticket = itertools.count()
        self._heap: list[tuple[float, int, int]] = []
        self._built: dict[int, SweptProgram] = {}
        self._settled: set[int] = set()
        self._met: dict[int, tuple[float, Found]] = {}
        self.best: Found | None = None
        self.programs = 0
        for index, task in enumerate(tasks):
            self._push(task.bound_s + self._weight * task.post_s, index)

    def bound(self) -> float:
        """A lower bound on every plan of the tasks; the cutoff where nothing better exists."""
        return min(self._cutoff, self._pruned, self._heap[0][0] if self._heap else INFINITY)

    def others(self) -> tuple[Found, ...]:
        """The best of every setting but the winner's, best first."""
        rest = [pair for pair in self._met.values() if pair[1] is not self.best]
        return tuple(found for _, found in sorted(rest, key=lambda pair: pair[0]))

    def work(self) -> None:
        """Settle tasks until none can hold a plan better than the best by more than the gap."""
        while self._heap:
            bound, _, task = heapq.heappop(self._heap)
            if bound >= self._target():
                self._pruned = min(self._pruned, bound)
                return
            if task in self._settled:
                self._pruned = min(self._pruned, self._target())
                continue
            try:
                bound = max(bound, self._tightened(task))
                if bound < self._target() and self._heap and bound > self._heap[0][0]:
                    self._push(bound, task)
                elif bound < self._target():
                    self._settle(task)
                    self._pruned = min(self._pruned, max(bound, self._target()))
                else:
                    # What was left out costs the target or more, and so may the bound say.
                    self._pruned = min(self._pruned, self._target())
            except OutOfTimeError:
                self._pruned = min(self._pruned, bound)
                raise

    def _target(self) -> float:
        # Until something is found, everything below the cutoff is of interest.
        return self._cutoff * (1 - self._gap) if self.best is not None else self._cutoff

    def _push(self, bound: float, task: int) -> None:
        if bound < self._target():
            heapq.heappush(self._heap, (bound, next(self._ticket), task))
        else:
            self._pruned = min(self._pruned, bound)

    def _program(self, task: int) -> SweptProgram:
        if time.monotonic() > self._deadline_s:
            raise OutOfTimeError
        if task not in self._built:
            program = self._tasks[task].build()
            assert isinstance(program, SweptProgram)
            self._built[task] = program
        return self._built[task]

    def _tightened(self, task: int) -> float:
        return self._program(task).tighten(self._target(), self._post_limit, self._weight)

    def _settle(self, task: int) -> None:
        """Find the best plan of a task whose columns are those below the target."""
        self.programs += 1
        program = self._program(task)
        answer = program.best(self._target(), self._post_limit, self._weight, self._deadline_s)
        self._settled.add(task)
        if answer is not None:
            self._offer(task, answer)

    def _offer(self, task: int, answer: ChainAnswer) -> None:
        value = answer.fill_s + answer.extra_s + self._weight * answer.post_s
        found = Found(self._tasks[task].setting, answer)
        if task not in self._met or value < self._met[task][0]:
            self._met[task] = value, found
        if value < self._cutoff:
            self._cutoff, self.best = value, found

    # --- the first plan ---

    def dive(self) -> None:
        """Look for a good plan where there are few, then around it."""
        nearest = {task for _, _, task in heapq.nsmallest(_NEAREST, self._heap)}
        found: int | None = None
        for bound, _, task in sorted(self._heap):
            count = self._tasks[task].setting.microbatches
            if bound >= self._target() or (task not in nearest and count & (count - 1)):
                continue
            answer = self._program(task).best_alone(
                self._target(), self._post_limit, self._weight, self._deadline_s
            )
            if answer is not None:
                self._offer(task, answer)
                found = task
        if found is not None:
            self._look(found)
            self._climb(found)

    def _climb(self, start: int) -> None:
        """From a task that has a plan to others with about twice or half as many microbatches."""
        tried = {start}
        for factor in (2.0, 0.5):
            here = start
            while (there := self._neighbour(here, factor)) is not None and there not in tried:
                tried.add(there)
                before = self._cutoff
                self._look(there)
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

    def _look(self, task: int) -> None:
        """Settle a task out of turn, unless its bound excludes it."""
        if task not in self._settled and self._tightened(task) < self._target():
            self._settle(task)
