"""Best-first search over settings, each solved to the end in one sweep (`chains.labels`).

Where `pipeline_search` divides the limits on extra and post into boxes, here a setting is either excluded
by its bound or has its best plan found at once. The least bound of the settings that are left is at any
time a bound on every plan.

The first plan is looked for among those of one stage or with one replica per stage, which are few, in
settings whose number of microbatches is a power of two; then, from there, in the settings with about
twice and half as many microbatches.
"""

import heapq
import math
import time
from collections.abc import Iterable
from dataclasses import replace

from graphpar.partition.chains.swept import SweptProgram
from graphpar.partition.clock import OutOfTimeError
from graphpar.partition.search import INFINITY, Asked, Search, SearchResult, Task

_NEAREST = 4
"""The settings with the least bounds are tried at first whatever their microbatches."""

_GUESSES = (1.5, 2.0, 3.0, 5.0, 10.0, 100.0, math.inf)
"""A first plan is looked for below so many times a bound, ..."""

_ROUGH, _FINE = 0.05, 0.01
"""... where this share of the guess does not matter, and then this one."""

_HAIR = 1 - 1e-12
"""Sums of the same numbers in another order differ by less."""

_FURTHER = 3
"""Settings that are looked at roughly once one of them has a plan."""


def search_tasks(tasks: Iterable[Task], asked: Asked, *, dive: bool = False) -> SearchResult:
    """The pipeline with the least step time over the tasks of swept programmes.

    Arguments as those of `pipeline_search.search`.
    """
    return _TaskSearch(tasks, asked, dive).run()


class _TaskSearch(Search[int]):
    def __init__(self, tasks: Iterable[Task], asked: Asked, dive: bool) -> None:
        # What was found before need not be found, and nothing be priced, again for a hair more.
        cutoff_s = asked.cutoff_s * (_HAIR if asked.aim == "proof" else 1.0)
        super().__init__(tasks, replace(asked, cutoff_s=cutoff_s))
        self._dives = dive
        self._built: dict[int, SweptProgram] = {}
        self._settled: set[int] = set()

    def _whole(self, index: int, task: Task) -> int:
        return index

    def _start(self) -> None:
        if self._dives and self._aim != "proof":
            self._dive()
        elif self._known is not None:
            settings = [t.setting for t in self._tasks]
            if self._known.setting in settings:
                self._improve(settings.index(self._known.setting))

    def _work(self) -> None:
        if self._aim != "plan" or self.best is None:
            super()._work()

    def _look(self, bound: float, task: int) -> None:
        if task in self._settled:
            self._prune(self._target())
            return
        bound = self._current_s = max(bound, self._tightened(task))
        if bound < self._target() and self._heap and bound > self._heap[0][0]:
            self._push(bound, task)
        elif bound < self._target():
            self._settle(task)
            self._prune(max(bound, self._target()))
        else:
            # What was left out costs the target or more, and so may the bound say.
            self._prune(self._target())

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

    # --- the first plan ---

    def _dive(self) -> None:
        """Look for a good plan where there are few, then around it."""
        nearest = {task for _, _, task in heapq.nsmallest(_NEAREST, self._heap)}
        some: list[tuple[float, int]] = []
        for bound, _, task in sorted(self._heap):
            count = self._tasks[task].setting.microbatches
            if task in nearest or count & (count - 1) == 0:
                some.append((bound, task))
        best: int | None = None
        for bound, task in some:
            if bound < self._target():
                answer = self._program(task).best_whole(self._target(), self._post_limit, self._weight)
                if answer is not None:
                    self._offer(task, answer)
                    best = task
        found = self._guess(some)
        best = best if found is None else found
        if best is not None:
            self._improve_all(best)

    def _improve_all(self, task: int) -> None:
        """Settle a task, then as many microbatches under another schedule, then more from the better."""
        settings = [t.setting for t in self._tasks]
        alike = [i for i, s in enumerate(settings) if i != task and s.shared == settings[task].shared]
        for one in (task, *alike):
            self._improve(one)
        best = task if self.best is None else settings.index(self.best.setting)
        self._climb(best if best in alike else task, self._improve)

    def _guess(self, bounded: Iterable[tuple[float, int]]) -> int | None:
        """Find a plan with one replica per stage: raise guesses of what tasks cost, the lowest first.

        Tasks come with their bounds, which are sharpened where a guess is the lowest. Roughly: a sweep
        that takes all below a twentieth of the guess for nothing is short. What is found is looked at
        more closely.
        """
        asked = self._post_limit, self._weight
        guesses = [(_GUESSES[0] * bound, -1, bound, task) for bound, task in bounded]
        heapq.heapify(guesses)
        best, further = None, 0
        while guesses and guesses[0][2] < self._target() and further < _FURTHER:
            guess, step, bound, task = heapq.heappop(guesses)
            if step < 0:
                bound = max(bound, self._program(task).bound_simple(self._target(), *asked))
                heapq.heappush(guesses, (_GUESSES[0] * bound, 0, bound, task))
                continue
            further += best is not None
            if self._simple(task, min(guess, self._target()), _ROUGH):
                best = task
            elif best is None and guess < self._target() and step + 1 < len(_GUESSES):
                heapq.heappush(guesses, (_GUESSES[step + 1] * bound, step + 1, bound, task))
        if best is not None:
            self._simple(best, self._target(), _FINE)
        return best

    def _simple(self, task: int, most_s: float, rough: float) -> bool:
        """Whether a better plan with one replica per stage is found in a task."""
        slack_s = rough * most_s if most_s < INFINITY else 0.0
        answer = self._program(task).good_simple(
            most_s, self._post_limit, self._weight, self._deadline_s, slack_s
        )
        before = self._cutoff
        return answer is not None and self._offer(task, answer) < before

    def _improve(self, task: int) -> None:
        """Settle a task out of turn, unless its bound excludes it."""
        if task not in self._settled and self._tightened(task) < self._target():
            self._settle(task)
