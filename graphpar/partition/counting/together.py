"""Microbatch counts that differ little, and both schedules, excluded together.

Most tasks of a search are excluded by the linear relaxation of all that they are, and then it is pricing
their columns that takes the time. So tasks are put together: one programme whose columns take no more
than those of each (`columns.price_columns` with a span). What its relaxation says holds for all
of them. Only where that leaves hope are they looked at in two halves, and in the end one by one.
"""

from collections.abc import Callable, Iterable, Sequence

from graphpar.partition.counting.boxes import Box
from graphpar.partition.counting.programme import CountingProgram
from graphpar.partition.search import INFINITY, Asked, Search, Task

Together = Callable[[Sequence[Task]], Task | None]
"""Makes one task of several, whose relaxations bound theirs; None where there is none."""

_ALIKE = 2.0
"""Tasks are excluded together at first whose microbatches differ by up to this factor."""

_LIKE = 0.02
"""Of tasks whose bounds differ by less than this the one with most microbatches is dived into first."""

_ROUNDING = 1e-9
"""Relative difference of a bound and what meets it that is rounding."""


class SearchTogether(Search[Box]):
    """What a search over counting programmes knows of its tasks."""

    def __init__(self, tasks: Iterable[Task], asked: Asked, together: Together) -> None:
        super().__init__(tasks, asked)
        self._together = together
        self._parts: dict[int, tuple[int, ...]] = {}
        """The tasks that one stands for."""
        self._built: dict[int, CountingProgram] = {}

    def _whole(self, index: int, task: Task) -> Box:
        # Bounds that a stage meets exactly may be above it by rounding.
        extra_s, post_s = task.extra_s * (1 - _ROUNDING), task.post_s * (1 - _ROUNDING)
        return Box(index, (extra_s, INFINITY), (post_s, self._post_limit))

    def _program(self, task: int) -> CountingProgram:
        if task not in self._built:
            program = self._tasks[task].build()
            assert isinstance(program, CountingProgram)
            self._built[task] = program
        return self._built[task]

    def _promising(self) -> Box:
        """Of the boxes with about the least bound the one with most microbatches."""
        near = self._heap[0][0] * (1 + _LIKE)
        alike = [box for bound, _, box in self._heap if bound <= near]
        return max(alike, key=lambda b: self._tasks[b.task].setting.microbatches)

    def _gather(self) -> None:
        """Put tasks together whose microbatches differ little, to exclude them at once.

        Those of the best plan stay alone: they will not be excluded.
        """
        if self._target() == INFINITY or not self._heap:
            return
        likely = self._tasks[self._promising().task] if self.best is None else self.best
        own = likely.setting.microbatches
        whole, self._heap = self._heap, []
        bounds = {box.task: bound for bound, _, box in whole}
        by_count: dict[int, list[int]] = {}
        for task in bounds:
            by_count.setdefault(self._tasks[task].setting.microbatches, []).append(task)
        teams: list[list[int]] = []
        most = INFINITY
        for count in sorted(by_count, reverse=True):
            if count == own or count * _ALIKE < most:
                teams.append([])
                most = INFINITY if count == own else float(count)
            teams[-1] += by_count[count]
        for team in teams:
            if self._tasks[team[0]].setting.microbatches == own:
                for task in team:
                    self._push(bounds[task], self._whole(task, self._tasks[task]))
            else:
                self._push_together(min(bounds[t] for t in team), tuple(team))

    def _push_together(self, bound: float, team: tuple[int, ...]) -> None:
        """Push tasks, most microbatches first, as one if they may be."""
        joint = self._together([self._tasks[t] for t in team]) if len(team) > 1 else None
        if joint is None:
            for index in team:
                task = self._tasks[index]
                own = max(bound, task.bound_s + self._weight * task.post_s)
                self._push(own, self._whole(index, task))
            return
        self._tasks.append(joint)
        number = len(self._tasks) - 1
        self._parts[number] = team
        self._push(bound, self._whole(number, joint))

    def _part(self, bound: float, team: tuple[int, ...]) -> None:
        """Push the halves of tasks that could not be excluded together."""
        counts = [self._tasks[t].setting.microbatches for t in team]
        middle = counts[len(counts) // 2]
        halves = [
            [t for t, m in zip(team, counts, strict=True) if (m > middle) == more] for more in (1, 0)
        ]
        if not all(halves):
            for task in team:
                self._push_together(bound, (task,))
            return
        for half in halves:
            self._push_together(bound, tuple(half))
