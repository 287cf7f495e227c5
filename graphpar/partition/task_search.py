"""Best-first search over settings, each solved to the end in one sweep (`chain_labels`).

Where `pipeline_search` divides the limits on extra and post into boxes, here a setting is either excluded
by its bound or has its best plan found at once. The least bound of the settings that are left is at any
time a bound on every plan.

The first plan is looked for among those with one replica per stage, which are few, in settings whose
number of microbatches is a power of two; then, from there, in the settings with about twice and half as
many microbatches.
"""

import heapq
import time
from collections.abc import Iterable

from graphpar.partition.chain_swept import SweptProgram
from graphpar.partition.clock import OutOfTimeError
from graphpar.partition.search import Asked, Search, SearchResult, Task

_NEAREST = 4
"""The settings with the least bounds are tried at first whatever their microbatches."""


def search_tasks(tasks: Iterable[Task], asked: Asked, *, dive: bool = False) -> SearchResult:
    """The pipeline with the least step time over the tasks of swept programmes.

    Arguments as those of `pipeline_search.search`.
    """
    return _TaskSearch(tasks, asked, dive).run()


class _TaskSearch(Search[int]):
    def __init__(self, tasks: Iterable[Task], asked: Asked, dive: bool) -> None:
        super().__init__(tasks, asked)
        self._dives = dive
        self._built: dict[int, SweptProgram] = {}
        self._settled: set[int] = set()

    def _whole(self, index: int, task: Task) -> int:
        return index

    def _start(self) -> None:
        if self._dives:
            self._dive()

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
            self._improve(found)
            self._climb(found, self._improve)

    def _improve(self, task: int) -> None:
        """Settle a task out of turn, unless its bound excludes it."""
        if task not in self._settled and self._tightened(task) < self._target():
            self._settle(task)
