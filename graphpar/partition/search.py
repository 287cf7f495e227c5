"""What every best-first search over pipelines keeps: what is left to look at, the best that was found.

A search takes settings (tasks) and looks at parts of them, the one with the least bound first. Whatever
is put aside leaves its bound behind, so that the least bound of all is at any time one on every plan.
"""

import heapq
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, Literal, Protocol, TypeVar

from graphpar.partition.chains.limits import ChainAnswer
from graphpar.partition.clock import OutOfTimeError
from graphpar.partition.stage_costs import StageLimits
from graphpar.partition.unit_arrays import FloatArray, Setting

INFINITY = float("inf")

Aim = Literal["both", "plan", "proof"]


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
    parts. `limits` are the devices of each cell that its pipelines may use.
    """

    setting: Setting
    bound_s: float
    fill_s: float
    extra_s: float
    post_s: float
    build: Callable[[], ChainSolver]
    limits: tuple[int, ...] = ()


@dataclass(frozen=True)
class SearchResult:
    """The best pipeline below the cutoff, if any, and a bound on all others; `cut` where time ended.

    `unsolved` says that parts which may hold better ones were too hard for the programmes' solver.
    `others` are the best pipelines of other settings that were met on the way, best first; `before` are
    those that were the best of all for a time, the last one first.
    """

    best: Found | None
    bound_s: float
    cut: bool
    programs: int
    others: tuple[Found, ...] = ()
    unsolved: bool = False
    before: tuple[Found, ...] = ()


@dataclass(frozen=True)
class Asked:
    """What a search is to find.

    Attributes:
        cutoff_s: Only plans strictly better than this are of interest.
        gap: Stop once the bound is within this fraction of the best that was found.
        deadline_s: `time.monotonic()` at which to stop.
        post_limit_s: Leave out stages with a longer post.
        count_post: Whether post is part of what is minimised, or only limited.
        aim: `plan` ends with the first good plan where one is found before the search proper; `proof`
            looks for none there, because the cutoff comes from a plan that is about as good as any.
        near: A pipeline known to be about as good as any: better ones may have somewhat less extra.
        real_s: What a pipeline takes on devices with names, where that may be more than it costs here.
    """

    cutoff_s: float
    gap: float
    deadline_s: float
    post_limit_s: float = INFINITY
    count_post: bool = True
    aim: Aim = "both"
    real_s: Callable[[Found], float] | None = None
    near: Found | None = None


Part = TypeVar("Part")
"""What a search looks at: a task or a part of one."""


class Search(ABC, Generic[Part]):
    """The state of one search; its kinds say how a part is looked at."""

    def __init__(self, tasks: Iterable[Task], asked: Asked) -> None:
        self._tasks = list(tasks)
        self._gap, self._cutoff, self._deadline_s = asked.gap, asked.cutoff_s, asked.deadline_s
        self._post_limit = asked.post_limit_s
        self._aim, self._real_s, self._known = asked.aim, asked.real_s, asked.near
        self._weight = 1.0 if asked.count_post else 0.0
        self._pruned = self._given_up = INFINITY
        self._ticket = itertools.count()
        self._heap: list[tuple[float, int, Part]] = []
        self._met: dict[int, tuple[float, Found]] = {}
        self._current_s = INFINITY
        """A lower bound on the part that is being looked at."""
        self.best: Found | None = None
        self._before: list[Found] = []
        self.programs = 0
        for index, task in enumerate(self._tasks):
            self._push(task.bound_s + self._weight * task.post_s, self._whole(index, task))

    def run(self) -> SearchResult:
        """The best pipeline below the cutoff and a bound on all others."""
        cut = False
        try:
            self._start()
            self._work()
        except OutOfTimeError:
            cut = True
        unsolved = self._given_up < self._target()
        return SearchResult(
            best=self.best,
            bound_s=self._bound(),
            cut=cut,
            programs=self.programs,
            others=self._others(),
            unsolved=unsolved,
            before=tuple(reversed(self._before)),
        )

    @abstractmethod
    def _whole(self, index: int, task: Task) -> Part:
        """All of a task."""

    def _start(self) -> None:
        """Look for a first plan, where that pays."""

    @abstractmethod
    def _look(self, bound: float, part: Part) -> None:
        """Look at a part that may hold a plan better than the target; push what is left of it."""

    def _work(self) -> None:
        """Look at parts until none can hold a plan better than the best by more than the gap."""
        while self._heap:
            bound, _, part = heapq.heappop(self._heap)
            if bound >= self._target():
                self._prune(bound)
                return
            self._current_s = bound
            try:
                self._look(bound, part)
            except OutOfTimeError:
                self._prune(self._current_s)
                raise

    def _target(self) -> float:
        # Until something is found, everything below the cutoff is of interest.
        return self._cutoff * (1 - self._gap) if self.best is not None else self._cutoff

    def _bound(self) -> float:
        """A lower bound on every plan of the tasks; the cutoff where nothing better exists."""
        return min(self._cutoff, self._pruned, self._heap[0][0] if self._heap else INFINITY)

    def _others(self) -> tuple[Found, ...]:
        """The best of every setting but the winner's, best first."""
        rest = [pair for pair in self._met.values() if pair[1] is not self.best]
        return tuple(found for _, found in sorted(rest, key=lambda pair: pair[0]))

    def _prune(self, bound: float) -> None:
        """Put aside what costs so much at least."""
        self._pruned = min(self._pruned, bound)

    def _give_up(self, bound: float) -> None:
        """Put aside what the solver had no answer for: it stays what it is, and so does its bound."""
        self._given_up = min(self._given_up, bound)
        self._prune(bound)

    def _push(self, bound: float, part: Part) -> None:
        """Keep a part for later, unless it cannot reach the target."""
        if bound < self._target():
            heapq.heappush(self._heap, (bound, next(self._ticket), part))
        else:
            self._prune(bound)

    def _offer(self, task: int, answer: ChainAnswer) -> float:
        """Take an answer for a plan of a task; what it costs."""
        value = answer.fill_s + answer.extra_s + self._weight * answer.post_s
        found = Found(self._tasks[task].setting, answer)
        if value < self._cutoff and self._real_s is not None:
            value = self._real_s(found)
        if task not in self._met or value < self._met[task][0]:
            self._met[task] = value, found
        if value < self._cutoff:
            if self.best is not None:
                self._before.append(self.best)
            self._cutoff, self.best = value, found
        return value

    def _climb(self, start: int, improve: Callable[[int], None]) -> None:
        """From a task that has a plan to others with about twice or half as many microbatches."""
        tried = {start}
        for factor in (2.0, 0.5):
            here = start
            while (there := self._neighbour(here, factor)) is not None and there not in tried:
                tried.add(there)
                before = self._cutoff
                improve(there)
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
