"""Several pipelines side by side, each with its share of the batch.

For a set of pipelines P_1..P_k, given by the devices each may use, and a limit Y on post, let f_g(n)
be the least time of pipeline g for n samples. The step is `max_g f_g(n_g) + Y` with the shares n_g
adding up to the batch. To improve on a step time T one needs f_g(n_g) <= T - Y for all g: for each
pipeline the shares that qualify are listed, and a sum of shares equal to the batch is looked for.

The post of a pipeline depends on where the others cut and how many replicas they have there. Here it is
the least that may be (`stage_costs.summing`), so all bounds are true; whoever is offered the plans that
are met prices them as they are.
"""

import time
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass

import numpy as np

from graphpar.partition.cells import links_to_others
from graphpar.partition.clock import OutOfTimeError
from graphpar.partition.common_cuts import (
    Windows,
    first_windows,
    halves,
    known_sums_s,
    longest_s,
    narrowed,
    segment_sums_s,
)
from graphpar.partition.family import share_step
from graphpar.partition.known_fits import Fit, KnownFits
from graphpar.partition.programs import Programs
from graphpar.partition.search import INFINITY, Found, Task
from graphpar.partition.share_bounds import Group, ShareBounds, apportion, least_post_s, shares_of
from graphpar.partition.types import ScheduleName

_ESTIMATES = 3
"""Times that shares are adapted to how fast pipelines turned out to be."""

_ESTIMATE_GAP = 0.02
"""How closely a pipeline is searched for an estimate."""


_MOST_PARTS = 64
"""Parts that are looked at to find where all pipelines are cut."""


@dataclass(frozen=True)
class SideBySide:
    """A bound on all plans of a grouping, and whether time ended the search."""

    bound_s: float
    cut: bool


def _time_s(found: Found) -> float:
    """Seconds of a pipeline without what comes after its last backward."""
    return found.answer.fill_s + found.answer.extra_s


def best_shares(
    programs: Programs,
    groups: Sequence[Group],
    schedule: ScheduleName,
    *,
    bounds: ShareBounds | None,
    cutoff_s: float,
    gap: float,
    deadline_s: float,
    offer: Callable[[tuple[Found, ...]], float],
) -> SideBySide:
    """The best shares, microbatches and stages for one set of pipelines under one schedule.

    Plans that are met on the way are offered, which gives what they really take as a whole. With
    `bounds` shares that no pipeline can have below the cutoff are left out first.
    """
    try:
        target_s = cutoff_s * (1 - gap)
        most = bounds.largest(groups, cutoff_s=target_s, deadline_s=deadline_s) if bounds else {}
        if most is None:
            return SideBySide(target_s, False)
        run = _Grouping(programs, groups, schedule, most, gap, deadline_s, offer)
        return run.work(cutoff_s)
    except OutOfTimeError:
        return SideBySide(0.0, True)


def estimate_shares(
    programs: Programs,
    groups: Sequence[Group],
    schedule: ScheduleName,
    size: float,
    *,
    cutoff_s: float,
    deadline_s: float,
) -> tuple[Found, ...] | None:
    """Pipelines whose shares are in proportion to how fast each turned out to be; None if too slow.

    Microbatches are about as large as `size`. Nothing is proven about other shares.
    """
    table = programs.family.table
    rates = [1 / max(programs.work_per_sample_s(g), 1e-30) for g in groups]
    best: tuple[float, tuple[Found, ...]] | None = None
    tried: set[tuple[int, ...]] = set()
    known: dict[tuple[Group, int], Found | None] = {}
    for _ in range(_ESTIMATES):
        shares = apportion(rates, table.batch, share_step(table))
        if shares is None or shares in tried:
            break
        tried.add(shares)
        for key in zip(map(tuple, groups), shares, strict=True):
            if key not in known:
                across = links_to_others(programs.family.cells, groups, key[0])
                every = programs.tasks(key[0], key[1], (schedule,), len(groups), across)
                tasks = [t for t in every if size / 1.6 <= t.setting.size <= size * 1.6]
                result = programs.search(
                    tasks, cutoff_s=1.5 * cutoff_s, gap=_ESTIMATE_GAP, deadline_s=deadline_s, dive=True
                )
                known[key] = result.best
        found = [known[key] for key in zip(map(tuple, groups), shares, strict=True)]
        if any(f is None for f in found):
            break
        times = [_time_s(f) for f in found if f is not None]
        step = max(f.step_s for f in found if f is not None)
        if best is None or step < best[0]:
            best = step, tuple(f for f in found if f is not None)
        rates = [n / max(t, 1e-30) for n, t in zip(shares, times, strict=True)]
    return best[1] if best is not None and best[0] < cutoff_s else None


class _Grouping:
    """One set of pipelines under one schedule."""

    def __init__(
        self,
        programs: Programs,
        groups: Sequence[Group],
        schedule: ScheduleName,
        most: Mapping[Group, int],
        gap: float,
        deadline_s: float,
        offer: Callable[[tuple[Found, ...]], float],
    ) -> None:
        self._programs = programs
        self._offer = offer
        self._groups = tuple(groups)
        self._schedule = schedule
        self._most = most
        self._gap = gap
        self._deadline = deadline_s
        self._across = {g: links_to_others(programs.family.cells, groups, g) for g in self._groups}
        self._table = programs.family.table
        self._per_sample = {g: programs.work_per_sample_s(g) for g in self._groups}
        self._least_post = least_post_s(programs, self._groups)
        links = [self._across[g] for g in self._groups]
        self._sums_s = segment_sums_s(self._table, programs.family.cells, self._groups, links)
        self._windows: Windows | None = None
        self._looked = [0]
        self._fits: dict[tuple[Group, int], Fit] = {}
        self._known = KnownFits()
        self._summed = False
        """Whether what stages sum is known from where all pipelines are cut."""
        self._cutoff = INFINITY

    def work(self, cutoff_s: float, post_limit: float = INFINITY) -> SideBySide:
        """Lower the limit on post from above; at each, lower the time until nothing qualifies.

        With less post nothing is sooner ready. So what improves on the target has less post than what the
        target leaves after the least time under the limit before. Where that says at which units all
        pipelines are cut, only such are looked at from there on.
        """
        self._cutoff = cutoff_s
        while (least := self._least_time(post_limit)) is not None:
            slowest, post_s = max(map(_time_s, least)), max(f.answer.post_s for f in least)
            left_s = self._target() - (1 - self._gap) * slowest
            if (parts := self._parts(left_s)) is not None:
                for windows in parts:
                    part = self._within(windows)
                    part.work(self._cutoff, post_limit)
                    self._cutoff = min(self._cutoff, part._cutoff)
                break
            # What the others have to sum at the least is all that is known of plans like this one.
            self._cutoff = min(self._cutoff, slowest + max(post_s, self._least_post))
            if post_s <= self._least_post:
                break
            left_s = self._target() - (1 - self._gap) * slowest
            post_limit = np.nextafter(min(post_s, left_s), -INFINITY)
        return SideBySide(self._target(), False)

    def _parts(self, limit_s: float) -> list[Windows] | None:
        """Where all pipelines are cut if sums are done within a limit; None if nothing more is known."""
        if not self._programs.loops or self._looked[0] >= _MOST_PARTS:
            return None
        if self._windows is None:
            most = min(map(sum, self._groups)) - 1
            found = first_windows(self._sums_s, limit_s, most)
            return None if () in found else found
        windows = narrowed(self._sums_s, limit_s, self._windows)
        if windows is None:
            return []
        return [windows] if windows != self._windows else halves(windows) or None

    def _within(self, windows: Windows) -> "_Grouping":
        """The same for pipelines that are all cut within some windows, at the same units."""
        found = copy(self)
        sums_s = known_sums_s(self._table, self._sums_s, windows)
        found._programs, found._fits = self._programs.cut_within(windows, sums_s), {}
        found._windows, found._summed = windows, sums_s is not None
        found._least_post = max(self._least_post, longest_s(self._sums_s, windows))
        self._looked[0] += 1
        return found

    def _target(self) -> float:
        return self._cutoff * (1 - self._gap)

    def _least_time(self, post_limit: float) -> tuple[Found, ...] | None:
        """The pipelines with the least time under a limit on post; None if none can improve."""
        least: tuple[Found, ...] | None = None
        time_limit = self._target() - self._least_post
        while True:
            if time.monotonic() > self._deadline:
                raise OutOfTimeError
            found = self._combine(time_limit, post_limit)
            if found is None:
                return least
            least = found
            self._cutoff = min(self._cutoff, self._offer(found))
            slowest = max(map(_time_s, found))
            time_limit = min(slowest * (1 - self._gap), self._target() - self._least_post)

    def _combine(self, time_limit: float, post_limit: float) -> tuple[Found, ...] | None:
        """Shares for which every pipeline's time is below a limit, the slowest as fast as can be."""
        shares = self._usable(time_limit, post_limit)
        if shares is None:
            return None
        reach: dict[int, tuple[float, tuple[Found, ...]]] = {0: (0.0, ())}
        for group, mine in zip(self._groups, shares, strict=True):
            fits = []
            for share in mine:
                found = self._fit(group, share, time_limit, post_limit).found
                if found is not None and _time_s(found) < time_limit:
                    fits.append((share, found, _time_s(found)))
            reach = _extend(reach, fits, self._table.batch)
        whole = reach.get(self._table.batch)
        return whole[1] if whole else None

    def _usable(self, time_limit: float, post_limit: float) -> list[list[int]] | None:
        """The shares of each pipeline that a sum may need; None if there is none.

        Most shares need no look: each pipeline's largest is found from above, beginning with what its
        work allows, and what all of them exceed the batch by is what any may be smaller.
        """
        most = [self._largest_share(g, time_limit) for g in self._groups]
        every = shares_of(self._table, len(self._groups))
        shares = [every[: bisect_right(every, n)] for n in most]
        if not all(shares):
            return None
        for number, group in enumerate(self._groups):
            mine = shares[number]
            while mine and sum(own[-1] for own in shares) >= self._table.batch:
                found = self._fit(group, mine[-1], time_limit, post_limit).found
                if found is not None and _time_s(found) < time_limit:
                    break
                mine.pop()
            if not mine:
                return None
        spare = sum(own[-1] for own in shares) - self._table.batch
        if spare < 0:
            return None
        return [[n for n in own if n >= own[-1] - spare] for own in shares]

    def _largest_share(self, group: Group, time_limit: float) -> int:
        low, high = 0, self._most.get(group, self._table.batch - len(self._groups) + 1)
        while low < high:
            middle = (low + high + 1) // 2
            if self._per_sample[group] * middle < time_limit:
                low = middle
            else:
                high = middle - 1
        return low

    def _fit(self, group: Group, share: int, time_limit: float, post_limit: float) -> Fit:
        # Limits on post only fall: what was found under a looser one stays the best as long as it
        # keeps the new one, and a bound stays a bound.
        key = (group, share)
        known = self._fits.get(key)
        if known is not None:
            if known.found is None and known.bound_s >= time_limit:
                return known
            if known.found is not None and known.found.answer.post_s <= post_limit:
                return known
        tasks = self._programs.tasks(
            group, share, (self._schedule,), len(self._groups), self._across[group]
        )
        best = self._best if self._windows is None else self._best_of_each
        fit = self._fits[key] = best(tasks, time_limit, post_limit)
        return fit

    def _best(self, tasks: Sequence[Task], time_limit: float, post_limit: float) -> Fit:
        """The best pipeline of some settings below a limit."""
        result = self._programs.search(
            tasks,
            cutoff_s=time_limit,
            gap=self._gap,
            deadline_s=self._deadline,
            post_limit_s=post_limit,
            count_post=False,
        )
        if result.cut:
            raise OutOfTimeError
        return Fit(result.best, result.bound_s)

    def _best_of_each(self, tasks: Sequence[Task], time_limit: float, post_limit: float) -> Fit:
        """The same setting by setting: what is known of one within these windows helps in their parts."""
        assert self._windows is not None
        known = [(self._known.about(t.limits, t.setting, self._windows, post_limit), t) for t in tasks]
        best: Found | None = None
        bound_s = limit = time_limit
        for fit, task in sorted(
            known, key=lambda k: (k[0].found is None, max(k[0].bound_s, k[1].bound_s))
        ):
            if self._summed:
                # What was found elsewhere may sum for longer here.
                fit = Fit(None, fit.bound_s)
            least_s = max(fit.bound_s, task.bound_s)
            if fit.found is None and least_s < limit:
                fit = self._best([task], time_limit, post_limit)
                if not self._summed:
                    self._known.add(task.limits, task.setting, self._windows, post_limit, fit)
                least_s = fit.bound_s
            bound_s = min(bound_s, least_s)
            if fit.found is not None and _time_s(fit.found) < limit:
                best, limit = fit.found, _time_s(fit.found)
        return Fit(best, bound_s)


def _extend(
    reach: dict[int, tuple[float, tuple[Found, ...]]],
    fits: list[tuple[int, Found, float]],
    batch: int,
) -> dict[int, tuple[float, tuple[Found, ...]]]:
    grown: dict[int, tuple[float, tuple[Found, ...]]] = {}
    for used, (slowest, chosen) in reach.items():
        for share, found, seconds in fits:
            total = used + share
            if total > batch:
                continue
            value = max(slowest, seconds)
            if total not in grown or value < grown[total][0]:
                grown[total] = (value, (*chosen, found))
    return grown
