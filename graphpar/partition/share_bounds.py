"""Bounds on the step of pipelines side by side, whatever their shares, stages and microbatches are.

The first need no search. `ShareBounds` and `sharing_bound_s` search pipelines one by one: whatever the
others do, a step is no shorter than one pipeline's own time and what its own devices sum and step at
least (`stage_costs.summing`).
"""

import math
import time
from bisect import bisect_left
from collections.abc import Sequence

from graphpar.cost import CostTable
from graphpar.partition.cells import Links, links_to_others
from graphpar.partition.clock import OutOfTimeError
from graphpar.partition.family import share_step
from graphpar.partition.programs import Programs, Way
from graphpar.partition.search import INFINITY, Task

_MOST_COUNTS = 64
"""Microbatch counts that a bound on a share goes through at most."""

_ESTIMATES = 2
"""Times that parts of the batch are adapted to what bounds say of them."""

_ANY = 0.999
"""A gap with which a search ends at the first plan below its cutoff."""

_HAIR = 1 - 1e-6
"""Cutoffs that differ by less are as good as the same."""

Group = tuple[int, ...]


def grouping_bound_s(programs: Programs, groups: Sequence[Group]) -> float:
    """A lower bound on the step time of a set of pipelines: their devices sharing all work.

    Infinite where one of them cannot hold the model.
    """
    if not all(programs.may_hold(g) for g in groups):
        return INFINITY
    together = [sum(column) for column in zip(*groups, strict=True)]
    work = programs.work_per_sample_s(together) * programs.family.table.batch
    return work + least_post_s(programs, groups)


def least_post_s(programs: Programs, groups: Sequence[Group]) -> float:
    """A lower bound on the largest post of any pipeline of a set."""
    cells, number = programs.family.cells, len(groups)
    return max(
        programs.least_post_s(g, number, links_to_others(cells, groups, g)) for g in dict.fromkeys(groups)
    )


def pipelines_bound_s(programs: Programs, groups: Sequence[Group]) -> float:
    """A lower bound on the step time of a set of pipelines that knows how a pipeline fills; 0 for none.

    Whatever the shares of a batch of n are, for any weights w that add up to one some pipeline has
    `n_g >= w_g n` samples. No pipeline takes longer for fewer samples or holds more, as long as no
    microbatch does; so the step is at least the least, over the pipelines, of the bound on one with
    `ceil(w_g n)` samples in any number of microbatches. Weights are in proportion to how fast the
    devices work.
    """
    if not programs.larger_need_more:
        return 0.0
    rates = [1 / max(programs.work_per_sample_s(g), 1e-30) for g in groups]
    batch = programs.family.table.batch
    # A hair less than the share, lest rounding make the parts more than the batch.
    shares = [max(1, math.ceil(batch * r / sum(rates) * (1 - 1e-9))) for r in rates]
    if max(shares) > _MOST_COUNTS:
        return 0.0
    least = {
        (g, n): programs.pipeline_bound_s(g, n, len(groups)) for g, n in zip(groups, shares, strict=True)
    }
    return min(least.values()) + least_post_s(programs, groups)


def sharing_bound_s(
    programs: Programs,
    groups: Sequence[Group],
    shares: Sequence[int],
    times_s: Sequence[float],
    *,
    cutoff_s: float,
    gap: float,
    deadline_s: float,
) -> float:
    """A lower bound up to `cutoff_s` on the step time of a set of pipelines, whatever their shares are.

    Take a share `s_g` for each pipeline, and the largest that it may have below: `p_g`. If the `p_g` add
    up to less than the batch, then in every plan some pipeline has `s_g` samples or more, for with less
    in all of them part of the batch would be left. The step is no shorter than that pipeline would take
    alone with its share: its fill, its extra, and what its own devices have to sum and step at least
    (`stage_costs.summing`). Hence the least over all g, all shares from `s_g` on and all their settings
    bounds the step. One best-first search looks at all of these; where it is cut short, what it has
    proven by then holds as well. Nothing is said (0) where time ends before it begins.

    Args:
        programs: Of the family.
        groups: The devices of each pipeline.
        shares: Where the `s_g` begin: the samples that each pipeline has in a good plan.
        times_s: How long each takes for them there. Where that is least, `s_g` rises: only guidance.
        cutoff_s: Only plans that are faster are of interest.
        gap: See `Asked`.
        deadline_s: See `Asked`.
    """
    table, number = programs.family.table, len(groups)
    every = shares_of(table, number)
    rates = [t / n for t, n in zip(times_s, shares, strict=True)]
    least: dict[Group, int] = {}
    wanted = _wanted_shares(every, table.batch, shares, rates)
    for group, share in zip(groups, wanted, strict=True):
        least[group] = min(share, least.get(group, share))
    tasks: list[Task] = []
    for group, share in least.items():
        across = links_to_others(programs.family.cells, groups, group)
        work_s = programs.work_per_sample_s(group)
        for n in every[bisect_left(every, share) :]:
            if work_s * n >= cutoff_s:
                break
            if time.monotonic() > deadline_s:
                return 0.0
            tasks += programs.tasks(group, n, programs.family.schedules, number, across)
    return programs.search(tasks, cutoff_s=cutoff_s, gap=gap, deadline_s=deadline_s).bound_s


class ShareBounds:
    """Which shares pipelines can have within a time; what is found out about one serves all groupings."""

    def __init__(self, programs: Programs) -> None:
        self._programs = programs
        self._known: dict[tuple[Group, int, int, tuple[Links, ...]], tuple[float, float]] = {}
        """By devices, samples, pipelines and links: a bound on the step, and what a plan takes."""
        self._largest_below: dict[tuple[Group, ...], tuple[float, dict[Group, int] | None]] = {}
        """By grouping: a cutoff, and what `largest` said of it."""

    def largest(
        self, groups: Sequence[Group], *, cutoff_s: float, deadline_s: float
    ) -> dict[Group, int] | None:
        """Upper bounds on the shares in steps below a cutoff; None where they cannot add up to the batch.

        First all shares from one on are looked at together, for each pipeline from about its part of the
        batch. What is left is tried from above, those whose bounds are highest first, each in all
        schedules and microbatch counts at once.

        Raises:
            OutOfTimeError: `time.monotonic()` passed `deadline_s`.
        """
        key = tuple(groups)
        known_s, found = self._largest_below.get(key, (-INFINITY, None))
        # Shares that are too large below a cutoff are so below a lower one.
        if cutoff_s > known_s or (found is not None and cutoff_s < _HAIR * known_s):
            found = self._largest(groups, cutoff_s, deadline_s)
            self._largest_below[key] = cutoff_s, found
        return found

    def _largest(
        self, groups: Sequence[Group], cutoff_s: float, deadline_s: float
    ) -> dict[Group, int] | None:
        table = self._programs.family.table
        every = shares_of(table, len(groups))
        left = self._few_enough(groups, every, cutoff_s, deadline_s)
        settled: set[Group] = set()
        bounds = {g: self._least_s(groups, g, own[-1], cutoff_s) for g, own in left.items() if own}
        while all(left.values()) and sum(left[g][-1] for g in groups) >= table.batch:
            unsettled = [g for g in left if g not in settled]
            if not unsettled:
                return {g: own[-1] for g, own in left.items()}
            group = max(unsettled, key=lambda g: bounds[g])
            share = left[group][-1]
            if bounds[group] < cutoff_s and self._is_within(groups, group, share, cutoff_s, deadline_s):
                settled.add(group)
                continue
            left[group].pop()
            if left[group]:
                bounds[group] = self._least_s(groups, group, left[group][-1], cutoff_s)
        return None

    def _few_enough(
        self, groups: Sequence[Group], every: list[int], cutoff_s: float, deadline_s: float
    ) -> dict[Group, list[int]]:
        """The shares of each pipeline below the ones that are too many in any number of microbatches."""
        left: dict[Group, list[int]] = {}
        for group in groups:
            rate = self._programs.work_per_sample_s(group)
            left[group] = every[: bisect_left(every, True, key=lambda n: rate * n >= cutoff_s)]
        for group, fair in zip(groups, self._fair(groups, every), strict=True):
            own = left[group]
            low = bisect_left(own, fair)
            left[group] = own[: self._too_many(groups, group, own, low, cutoff_s, deadline_s)]
        return left

    def _too_many(
        self,
        groups: Sequence[Group],
        group: Group,
        own: Sequence[int],
        low: int,
        cutoff_s: float,
        deadline_s: float,
    ) -> int:
        """The place, `low` or a later one, from which on shares are too many in any way.

        A way that is not excluded at a place is looked at alone until it is: then most others are, too.
        """
        across, excluded = links_to_others(self._programs.family.cells, groups, group), set[Way]()

        def way_from(place: int, but: set[Way], ways: Sequence[Way] | None = None) -> Way | None:
            return self._programs.way_from(
                group,
                own[place:],
                len(groups),
                across,
                cutoff_s=cutoff_s,
                deadline_s=deadline_s,
                excluded=but,
                ways=ways,
            )

        while low < len(own) and (way := way_from(low, excluded)) is not None:
            alone, places = [way], range(len(own))
            low = bisect_left(places, True, low + 1, key=lambda i: way_from(i, set(), alone) is None)
            excluded.add(way)
        return low

    def _fair(self, groups: Sequence[Group], every: list[int]) -> list[int]:
        """Shares so that not all pipelines can have less, in proportion to what they can do at most."""
        table = self._programs.family.table
        rates = [1 / max(self._programs.work_per_sample_s(g), 1e-30) for g in groups]
        shares: tuple[int, ...] | None = None
        for _ in range(_ESTIMATES):
            shares = apportion(rates, table.batch, share_step(table))
            if shares is None:
                return [every[-1]] * len(groups)
            least = [self._least_s(groups, g, n, INFINITY) for g, n in zip(groups, shares, strict=True)]
            # A pipeline that has no room for its share takes for ever, which must not be divided by.
            rates = [n / min(max(s, 1e-30), 1e30) for n, s in zip(shares, least, strict=True)]
        assert shares is not None
        return _wanted_shares(every, table.batch, shares, [1 / r for r in rates])

    def _least_s(self, groups: Sequence[Group], group: Group, share: int, cutoff_s: float) -> float:
        """A lower bound on the step of a pipeline with a share that needs no search."""
        work_s = self._programs.work_per_sample_s(group) * share
        if work_s >= cutoff_s:
            return work_s
        key = self._key(groups, group, share)
        known = self._known.get(key)
        if known is not None:
            return known[0]
        return self._programs.least_step_s(*key)

    def _is_within(
        self, groups: Sequence[Group], group: Group, share: int, cutoff_s: float, deadline_s: float
    ) -> bool:
        """Whether a pipeline may end a share below the cutoff, as far as it alone is concerned."""
        key = self._key(groups, group, share)
        bound_s, takes_s = self._known.get(key, (0.0, INFINITY))
        if takes_s < cutoff_s:
            return True
        if bound_s >= cutoff_s:
            return False
        # Any plan below the cutoff will do.
        found = self._programs.search(
            self._tasks(*key), cutoff_s=cutoff_s, gap=_ANY, deadline_s=deadline_s
        )
        if found.cut:
            raise OutOfTimeError
        takes_s = INFINITY if found.best is None else found.best.step_s
        self._known[key] = found.bound_s, takes_s
        return takes_s < cutoff_s

    def _key(
        self, groups: Sequence[Group], group: Group, share: int
    ) -> tuple[Group, int, int, tuple[Links, ...]]:
        across = links_to_others(self._programs.family.cells, groups, group)
        return group, share, len(groups), across

    def _tasks(self, group: Group, share: int, peers: int, across: tuple[Links, ...]) -> list[Task]:
        return self._programs.tasks(group, share, self._programs.family.schedules, peers, across)


def _wanted_shares(
    every: Sequence[int], batch: int, shares: Sequence[int], rates: Sequence[float]
) -> list[int]:
    """Of every share there is, one for each pipeline, so that not all pipelines can have less.

    `shares` add up to the batch; `rates` are seconds per sample.
    """
    index = [bisect_left(every, n) for n in shares]
    below = sum(every[i - 1] for i in index if i)
    while True:
        fastest = min(range(len(index)), key=lambda g: rates[g] * every[index[g]])
        here = index[fastest]
        below += every[here] - (every[here - 1] if here else 0)
        if below >= batch or here + 1 == len(every):
            return [every[i] for i in index]
        index[fastest] += 1


def shares_of(table: CostTable, peers: int) -> list[int]:
    """Multiples of the step, and what is left of the batch after multiples for the others."""
    step = share_step(table)
    rest = table.batch % step
    return [n for n in range(1, table.batch - peers + 2) if n % step in (0, rest)]


def apportion(rates: Sequence[float], batch: int, step: int) -> tuple[int, ...] | None:
    """Shares of a batch in proportion to rates, in steps; the last of the fastest takes what is left."""
    total = sum(rates)
    shares = [max(step, round(batch * r / total / step) * step) for r in rates]
    fastest = max(range(len(rates)), key=lambda i: rates[i])
    shares[fastest] += batch - sum(shares)
    return tuple(shares) if min(shares) > 0 else None
