"""What workers on the same cores cost each other: longer times of single actions.

A worker that computes has its own pace as long as a core is free. Three things hold it up: kernels take
longer while other cores are at work (shared caches, memory, power); with more workers at work than there
are cores each gets a part of one; and a worker that is slowed down computes first and waits afterwards,
so that two that start together are in each other's way more than their shares say.

Times depend on who else computes meanwhile, and that on the times: the schedule is played through
`ROUNDS` times, each with times found from the last one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from graphpar.cores import CoreUse, SharedCores
from graphpar.schedule import Schedule
from graphpar.schedule.timing import Timing

ROUNDS = 6
_KEPT = 0.5
"""Share of an action's last time in its next one, so that two workers do not swap places for ever."""

_COMPUTE = "FBIWO"


def is_crowded(timing: Timing) -> bool:
    """Whether several ranks share cores in a way that costs them anything."""
    shared = timing.shared
    if shared is None:
        return False
    uses = [shared.workers[r.device] for r in timing.ranks if r.device in shared.workers]
    several = sum(use.members for use in uses) > 1
    return several and (max(shared.slowing) > 1 or sum(use.cores for use in uses) > shared.num_cores)


@dataclass(frozen=True)
class _Phases:
    """A rank's computing actions: their places, when they start, need no core any more, and are over."""

    places: tuple[int, ...]
    alone_s: npt.NDArray[np.float64]
    starts_s: npt.NDArray[np.float64]
    ends_s: npt.NDArray[np.float64]
    over_s: npt.NDArray[np.float64]

    def until(self, times_s: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Seconds on the cores before each of these times."""
        edges = np.stack([self.starts_s, self.ends_s], axis=1).ravel()
        spent = np.repeat(np.cumsum(self.ends_s - self.starts_s), 2)
        spent[::2] -= self.ends_s - self.starts_s
        found: npt.NDArray[np.float64] = np.interp(times_s, edges, spent)
        return found


def longer_times(
    schedule: Schedule,
    timing: Timing,
    starts_s: Sequence[Sequence[float]],
    ends_s: Sequence[Sequence[float]],
    before: Mapping[tuple[int, int], float],
) -> dict[tuple[int, int], float]:
    """Seconds of every computing action by rank and place, with the others where they were.

    Args:
        schedule: Who does what.
        timing: Seconds of actions whose rank has its cores for itself.
        starts_s: By rank when its actions started.
        ends_s: By rank when they ended.
        before: What this function found last; empty at first.
    """
    shared = timing.shared
    assert shared is not None
    uses = {rank: shared.workers.get(numbers.device) for rank, numbers in enumerate(timing.ranks)}
    phases = {
        rank: _phases(schedule, timing, rank, use, starts_s[rank], ends_s[rank])
        for rank, use in uses.items()
        if use is not None
    }
    found: dict[tuple[int, int], float] = {}
    for rank, mine in phases.items():
        use = uses[rank]
        assert use is not None
        others, beside = np.zeros(len(mine.places)), np.zeros(len(mine.places))
        for other, theirs in phases.items():
            their_use = uses[other]
            if other != rank and their_use is not None and theirs.places:
                before_s = theirs.until(mine.starts_s)
                others += their_use.cores * (theirs.until(mine.ends_s) - before_s)
                beside += their_use.cores * (theirs.until(mine.over_s) - before_s)
        others /= np.maximum(mine.ends_s - mine.starts_s, 1e-12)
        beside /= np.maximum(mine.over_s - mine.starts_s, 1e-12)
        for at, alone_s, busy, mean in zip(mine.places, mine.alone_s, others, beside, strict=True):
            new_s = _crowded_s(shared, use, float(alone_s), float(busy), float(mean))
            found[rank, at] = _KEPT * before.get((rank, at), new_s) + (1 - _KEPT) * new_s
    return found


def _crowded_s(shared: SharedCores, use: CoreUse, alone_s: float, others: float, mean: float) -> float:
    """An action's time with so many other cores asked for while it has its own, and on average."""
    at_work = use.cores + others
    longer = shared.slowed(min(use.cores + mean, shared.num_cores)) / shared.slowed(use.threads)
    computing_s = alone_s / use.slowdown * longer
    return max(computing_s * use.slowdown, computing_s * max(at_work / shared.num_cores, 1.0))


def _phases(
    schedule: Schedule,
    timing: Timing,
    rank: int,
    use: CoreUse,
    starts_s: Sequence[float],
    ends_s: Sequence[float],
) -> _Phases:
    numbers, sizes = timing.ranks[rank], schedule.microbatch_sizes
    places, alone_s = [], []
    for at, (kind, stage, microbatch) in enumerate(schedule.actions[rank]):
        if kind not in _COMPUTE:
            continue
        places.append(at)
        if microbatch is None:
            alone_s.append(numbers.optimizer_s)
        else:
            alone_s.append(numbers.at_size(sizes[microbatch], stage).seconds(kind))
    starts = np.array([starts_s[at] for at in places], dtype=np.float64)
    ends = np.array([ends_s[at] for at in places], dtype=np.float64)
    alone = np.array(alone_s, dtype=np.float64)
    return _Phases(tuple(places), alone, starts, starts + (ends - starts) / use.slowdown, ends)
