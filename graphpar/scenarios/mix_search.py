"""Which mix of instance types is the best: planned best bound first, as far as the time goes.

Best is the fastest, or the one that costs least for a step. Either way a mix has a score, seconds or
dollars times seconds, and a lower bound on it, which is that on its seconds times the same.

A mix whose bound is no better than the best plan found, less the gap asked for, is never planned. What
one type alone gives comes first, for such clusters are the easiest to plan well; its plan is where
larger mixes begin. What is found fastest in a short time is searched again for longer.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from graphpar.cluster_build import num_cores
from graphpar.errors import GraphparError, RunError
from graphpar.partition.unit_arrays import FloatArray
from graphpar.scenarios.mixes import MixBounds, Mixes, Objective
from graphpar.scenarios.study import MOST_HINTS, Solver
from graphpar.scenarios.transfer import placed
from graphpar.scenarios.types import Answer, KnownPlan, Setting
from graphpar.scenarios.workers import Submit, going_alone, solving

ALONE_SHARE, COARSE_SHARE = 0.25, 0.45
"""Of the time: for types alone, and for mixes that are planned briefly; the rest for the best again."""

LEAST_S, MOST_S = 1.0, 4.0
"""No mix is planned briefly for less or more than this, ..."""

LEAST_SHARE = 0.04
"""... or for less than this share of all time, where there is little."""

MOST_LOOKED = 16
"""Mixes whose bounds are sharpened before one is chosen."""

RULE_OUT_SHARE = 0.05
"""Of the time, for bounds of mixes that there was no time for."""

AGAIN = 4
"""So many of the best are searched again, each in so many times the time."""

_ALIKE = 1e-6
"""Bounds that differ by less, relatively, are alike."""


@dataclass(frozen=True)
class Found:
    """A cluster within the budget and its answer; a second of a step counts `weight`."""

    counts: Mapping[str, int]
    setting: Setting
    answer: Answer
    weight: float = 1.0

    @property
    def step_s(self) -> float:
        """Infinite where no plan was found."""
        step_s = self.answer.step_s if self.answer.status == "ok" else None
        return step_s if step_s is not None else np.inf

    @property
    def score(self) -> float:
        """What is to be least."""
        return self.step_s * self.weight


@dataclass(frozen=True)
class _Try:
    """What is planned next, for how long; `mix` is its number, None for a part of a mix."""

    counts: Mapping[str, int]
    setting: Setting
    mix: int | None
    limit_s: float


@dataclass
class MixSearch:
    """The state of a search.

    Attributes:
        planned: Numbers of the mixes that were planned.
        found: The clusters that were planned, by their counts.
    """

    solver: Solver
    mixes: Mixes
    bounds: MixBounds
    setting_of: Callable[[Mapping[str, int]], Setting]
    objective: Objective = "time"
    planned: set[int] = field(default_factory=set)
    found: dict[tuple[tuple[str, int], ...], Found] = field(default_factory=dict)

    @property
    def best(self) -> Found | None:
        """The one with the least score; None without any plan."""
        best = min(self.found.values(), key=lambda f: f.score, default=None)
        return best if best is not None and best.step_s < np.inf else None

    @property
    def target(self) -> float:
        """Only lower scores than this are of interest."""
        best = self.best
        return best.score * (1 - self.solver.limits.gap) if best is not None else np.inf

    @cached_property
    def _weights(self) -> FloatArray:
        """[mix]: what a second of its step counts."""
        priced = (self.mixes.counts @ self.mixes.usd_per_h).astype(np.float64)
        return priced if self.objective == "cost" else np.ones(len(priced))

    @property
    def least(self) -> FloatArray:
        """[mix]: no plan on it has a lower score, as far as bounds are known."""
        return self.bounds.least_s * self._weights

    def weight(self, counts: Mapping[str, int]) -> float:
        """What a second of the step of a cluster counts."""
        return self.mixes.price(counts) if self.objective == "cost" else 1.0

    @property
    def open(self) -> int:
        """How many mixes were neither planned nor ruled out."""
        hopeful = self.least < self.target
        hopeful[[*self.planned]] = False
        return int(hopeful.sum())

    def run(self, time_limit_s: float) -> None:
        """Search for so long; where no time is left, one cluster is planned all the same."""
        began_s = time.monotonic()
        self._processes = self.solver.limits.processes or num_cores()
        self._end_s = began_s + (1 - RULE_OUT_SHARE) * time_limit_s
        self._least_s = max(min(LEAST_S, LEAST_SHARE * time_limit_s), _NO_TIME_S)
        try:
            self._search(began_s, time_limit_s)
        except RunError as error:
            going_alone(error)
            self._processes = 1
            ended = {self.mixes.find(found.counts) for found in self.found.values()}
            self.planned &= {mix for mix in ended if mix is not None}
            self._search(began_s, time_limit_s)
        self._rule_out(min(time.monotonic(), began_s + time_limit_s) + RULE_OUT_SHARE * time_limit_s)

    def _search(self, began_s: float, time_limit_s: float) -> None:
        with solving(self._processes, len(self.mixes.counts) + 2) as submit:
            self._work(submit, self._alone(began_s + ALONE_SHARE * time_limit_s))
            self._work(submit, self._by_bound(began_s + (ALONE_SHARE + COARSE_SHARE) * time_limit_s))
            self._work(submit, self._again())
            # Where nothing was left to be searched again there is time for more mixes.
            self._work(submit, self._by_bound(self._end_s))

    def _alone(self, until_s: float) -> Iterator[_Try]:
        """Each type by itself, first those of the mixes with the least bounds."""
        left_s = (until_s - time.monotonic()) * self._processes
        limit_s = self._briefly(left_s / len(self.mixes.types))
        least, tried = self.least, [self._by_itself(i) for i in range(len(self.mixes.types))]
        bounds = [least[self.mixes.counts[:, i] == n].min() for i, n in enumerate(tried)]
        for number in np.argsort(bounds).tolist():
            late = self.best is not None and time.monotonic() > until_s
            if late or bounds[number] == np.inf:
                return
            counts = {self.mixes.types[number]: tried[number]}
            if tuple(counts.items()) in self.found:
                continue
            mix = self.mixes.find(counts)
            if mix is not None:
                self.bounds.sharpen(mix)
                self.planned.add(mix)
            yield self._try(counts, limit_s, mix)

    def _by_itself(self, kind: int) -> int:
        """How many of a type: as many as can be paid, or the fewest that may cost least for a step."""
        counts = self.mixes.counts
        if self.objective == "time":
            return int(counts[:, kind].max())
        alone = np.flatnonzero(counts[:, kind] == counts.sum(axis=1))
        least = self.least[alone]
        return int(counts[alone, kind][least <= least.min() * (1 + _ALIKE)].min())

    def _by_bound(self, until_s: float) -> Iterator[_Try]:
        """Mixes that no bound rules out, the least bound first."""
        left_s = (until_s - time.monotonic()) * self._processes
        limit_s = self._briefly(left_s / max(self.open, 1))
        while time.monotonic() < until_s:
            mix = self._next()
            if mix is None:
                return
            self.planned.add(mix)
            yield self._try(self.mixes.named(mix), limit_s, mix)

    def _next(self) -> int | None:
        """A mix with the least bound of those not planned; None if all others are ruled out.

        Of thousands that are nearly alike many would have to be looked at before the least is known to
        be the least; of those looked at it is.
        """
        looked = 0
        while (mix := self._least()) is not None:
            new, looked = self.bounds.sharpen(mix), looked + 1
            if not new or (looked >= MOST_LOOKED and self.least[mix] < self.target):
                return mix
        return None

    def _least(self) -> int | None:
        """The mix with the least bound as far as it is known."""
        waiting = self.least
        waiting[[*self.planned]] = np.inf
        mix = int(waiting.argmin())
        return mix if waiting[mix] < self.target else None

    def _rule_out(self, until_s: float) -> None:
        """Look closer at mixes that were not planned, as far as there is time."""
        waiting = np.flatnonzero(self.least < self.target).tolist()
        for mix in waiting:
            if time.monotonic() > until_s:
                return
            self.bounds.sharpen(mix)

    def _again(self) -> Iterator[_Try]:
        """The best, each searched for longer than before."""
        best = sorted(self.found.values(), key=lambda f: f.score)[:AGAIN]
        for found in best if len(self.found) > 1 else ():
            left_s = (self._end_s - time.monotonic()) * self._processes / len(best)
            if found.score < np.inf and left_s > self._least_s:
                yield self._try(found.counts, left_s, self.mixes.find(found.counts))

    def _briefly(self, limit_s: float) -> float:
        return min(max(limit_s, self._least_s), MOST_S)

    def _try(self, counts: Mapping[str, int], limit_s: float, mix: int | None = None) -> _Try:
        return _Try(counts, self.setting_of(counts), mix, limit_s)

    def _work(self, submit: Submit, tries: Iterator[_Try]) -> None:
        """Plan as many at once as there are processes, until there is nothing left or the time is up."""
        running: dict[Future[list[Answer]], _Try] = {}
        once_more: list[_Try] = []
        while True:
            while len(running) < self._processes and (late_s := self._late()) is not None:
                one = once_more.pop() if once_more else next(tries, None)
                if one is None:
                    break
                self._begin(submit, one, running, late_s)
            if not running:
                self.planned.difference_update(one.mix for one in once_more if one.mix is not None)
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                one, (answer,) = running.pop(future), future.result()
                if answer.quarrels:
                    # Devices that shared a stage but no format compute in float32 then.
                    self.solver.book.settle(one.setting, answer.quarrels)
                    once_more.append(one)
                else:
                    self._take(one, answer)

    def _late(self) -> float | None:
        """Seconds left; None where it is too late for another try. One is made in any case."""
        left_s = self._end_s - time.monotonic()
        if left_s <= 0 and self.found:
            return None
        return max(left_s, _NO_TIME_S)

    def _begin(
        self, submit: Submit, one: _Try, running: dict[Future[list[Answer]], _Try], left_s: float
    ) -> None:
        hints = self._hints(one.counts)
        try:
            task = self.solver.task(one.setting, min(one.limit_s, left_s), hints)
        except (ValueError, GraphparError) as error:
            self._take(one, Answer("", status="invalid", problem=str(error)))
            return
        running[submit([replace(task, step_only=True)])] = one

    def _take(self, one: _Try, answer: Answer) -> None:
        """What a try found."""
        if one.mix is not None and answer.status == "invalid":
            self.planned.discard(one.mix)
            self.bounds.exclude(one.mix, answer.problem)
        key = tuple(one.counts.items())
        mine = Found(one.counts, one.setting, answer, self.weight(one.counts))
        before = self.found.get(key)
        if before is None or mine.step_s < before.step_s:
            self.found[key] = mine
        self.solver.tell(len(self.planned), len(self.planned) + self.open)

    def _hints(self, counts: Mapping[str, int]) -> tuple[KnownPlan, ...]:
        """The fastest plans found for parts of a mix, on its devices."""
        parts = (
            f
            for f in self.found.values()
            if f.step_s < np.inf and all(n <= counts.get(t, 0) for t, n in f.counts.items())
        )
        best = sorted(parts, key=lambda f: f.step_s)[:MOST_HINTS]
        return tuple(
            placed(f.answer.plan, _places(f, counts, self.setting_of(counts)))
            for f in best
            if f.answer.plan is not None
        )


def _places(part: Found, counts: Mapping[str, int], setting: Setting) -> dict[str, str]:
    """By device of a part of a mix that of the mix: the first instances of each type."""
    own, theirs = iter(part.setting.cluster.nodes), iter(setting.cluster.nodes)
    found: dict[str, str] = {}
    for name, number in counts.items():
        nodes = [next(theirs) for _ in range(number)]
        for node in nodes[: part.counts.get(name, 0)]:
            mine = next(own)
            found |= {a.name: b.name for a, b in zip(mine.devices, node.devices, strict=True)}
    return found


_NO_TIME_S = 1e-3
"""A search needs some time to be one."""
