"""Rehearse a plan: its ranks as processes here, with messages, and waits in place of computing.

Every rank plays its own list of actions. A forward, a backward or an optimiser step waits for as long
as it was predicted to take; messages of one byte go between the processes when the described link would
have carried the real ones; gradient sums meet, then wait. So a plan for sixty-four cards that nobody
has yet can be played on two cores: it shows that the lists fit together, and how far their times hold
when the ranks really wait for each other, not for a simulator.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from graphpar.errors import RunError
from graphpar.plans.plan import Plan
from graphpar.runtime.local import LocalWorkers
from graphpar.runtime.player import EVERYBODY
from graphpar.runtime.program import Scene, StepReport, WorkerSetup
from graphpar.runtime.weights import Weights
from graphpar.runtime.workers import RankStart
from graphpar.schedule import Action, Schedule
from graphpar.schedule.simulate import Timeline, simulate
from graphpar.schedule.team_timing import timing_of_leaders
from graphpar.schedule.teams import collapsed, leaders_of
from graphpar.schedule.timing import Timing
from graphpar.units import format_seconds

MOST_PROCESSES = 128
"""That are started at most; every pair of them keeps a connection."""


@dataclass(frozen=True)
class Rehearsal:
    """What came out of rehearsing a plan.

    Attributes:
        ranks: The plan's ranks, one per device.
        processes: Those that played them; a tensor group is one.
        stretch: How many times longer everything took than in the plan.
        predicted_s: The step that the plan predicts.
        rehearsed_s: Steps as they were played, over `stretch`.
        latest_s: By how much an action ended later than predicted at most, over `stretch`, in the median
            step; where is `latest`.
        latest: The rank's device and the action.
    """

    ranks: int
    processes: int
    stretch: float
    predicted_s: float
    rehearsed_s: tuple[float, ...]
    latest_s: float
    latest: str

    @property
    def error(self) -> float:
        """The predicted step over the median rehearsed one, minus one."""
        return self.predicted_s / median(self.rehearsed_s) - 1

    def __str__(self) -> str:
        played = ", ".join(format_seconds(s) for s in self.rehearsed_s)
        how = (
            f"{self.stretch:.3g} times as long"
            if self.stretch >= 1
            else f"1/{1 / self.stretch:.3g} as long"
        )
        who = f"{self.ranks} rank{'s' if self.ranks > 1 else ''} as processes"
        if self.processes < self.ranks:
            who = f"{self.ranks} ranks, each tensor group as one process, {self.processes} in all,"
        return (
            f"{who} on this machine, everything {how}\n"
            f"step predicted {format_seconds(self.predicted_s)}, rehearsed {played} "
            f"({100 * self.error:+.1f} %)\n"
            f"latest against the prediction: {self.latest}, by {format_seconds(self.latest_s)}"
        )


def rehearse(plan: Plan, steps: int, lasting_s: float) -> Rehearsal:
    """Play the steps of a plan on this machine; no model, weights or devices are needed.

    Args:
        plan: Any plan.
        steps: How often; one more is played first to warm up.
        lasting_s: How long a step is to take here; all times are stretched alike.

    Raises:
        RunError: It needs too many processes, or a process failed.
        ValueError: A number is not positive.

    >>> import torch
    >>> from graphpar import plan
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
    >>> made = plan(model, {"devices": [{"kind": "h100-sxm-80gb"}]}, (torch.randn(6, 4),))
    >>> rehearse(made, steps=1, lasting_s=0.05).ranks
    1
    """
    if steps < 1 or not 0 < lasting_s < float("inf"):
        raise ValueError(f"steps={steps} and lasting_s={lasting_s} must be positive.")
    schedule, timing, names = _of_leaders(plan)
    if schedule.num_ranks > MOST_PROCESSES:
        raise RunError(
            f"This plan needs {schedule.num_ranks} processes; {MOST_PROCESSES} can be rehearsed with at "
            "most. Plan fewer devices of each kind: what they do is alike."
        )
    predicted = simulate(schedule, timing)
    stretch = lasting_s / predicted.step_s if predicted.step_s > 0 else 1.0
    workers = LocalWorkers(_starts(schedule, timing, names), (), b"")
    with contextlib.closing(workers):
        scripts = scenes_of(schedule, timing, predicted, stretch)
        played = [workers.rehearse(scripts) for _ in range(1 + steps)][1:]
    seconds = [_step_s(reports) / stretch for reports in played]
    late_s, where = _latest(predicted, played[seconds.index(sorted(seconds)[len(seconds) // 2])], stretch)
    latest = f"{names[where[0]]}, {where[1]}"
    ranks = plan.schedule().num_ranks
    return Rehearsal(ranks, schedule.num_ranks, stretch, predicted.step_s, tuple(seconds), late_s, latest)


def _of_leaders(plan: Plan) -> tuple[Schedule, Timing, list[str]]:
    """The schedule with every tensor group as one rank, its numbers, and the devices' names."""
    schedule, timing = plan.schedule(), plan.timing
    if not schedule.teams:
        return schedule, timing, [rank.device for rank in timing.ranks]
    names = [timing.ranks[rank].device for rank in leaders_of(schedule)]
    return collapsed(schedule), timing_of_leaders(schedule, timing), names


def _starts(schedule: Schedule, timing: Timing, names: Sequence[str]) -> list[RankStart]:
    ranks = range(schedule.num_ranks)
    groups = (tuple(ranks), *(group.ranks for group in timing.gradient_groups))
    return [
        RankStart(
            name,
            WorkerSetup(rank, schedule.num_ranks, "cpu", 1, 1.0, (), groups, 0, None),
            Weights({}),
        )
        for rank, name in zip(ranks, names, strict=True)
    ]


def scenes_of(
    schedule: Schedule, timing: Timing, predicted: Timeline, stretch: float
) -> list[tuple[Scene, ...]]:
    """What each rank plays, in its order.

    Args:
        schedule: The lists of actions.
        timing: Links and gradient sums.
        predicted: Says how long each action takes.
        stretch: What all times are multiplied with.
    """
    return [
        tuple(
            Scene(
                token=str(event.action),
                seconds=(event.end_s - event.start_s) * stretch if event.action.kind in "FBIWO" else 0.0,
                messages=tuple(_messages(schedule, timing, rank, event.action, stretch)),
                sums=tuple(_sums(timing, rank, stretch)) if event.action.kind == "A" else (),
                waits=not timing.overlap,
            )
            for event in predicted.events(rank)
        )
        for rank in range(schedule.num_ranks)
    ]


def _messages(
    schedule: Schedule, timing: Timing, rank: int, action: Action, stretch: float
) -> list[tuple[int, int, float]]:
    """Peers, tags and seconds of the messages of an action, those to itself left out."""
    if action.kind not in "RSGD" or action.microbatch is None:
        return []
    stage, number = action.stage, action.microbatch
    size = schedule.microbatch_sizes[number]
    ahead = action.kind in "RS"
    found = []
    for link in schedule.incoming[stage] if action.kind in "RD" else schedule.outgoing[stage]:
        other = link.source if action.kind in "RD" else link.target
        peer = schedule.rank_of(other, number)
        if peer == rank or not (ahead or link.has_gradient):
            continue
        tag = (schedule.links.index(link) * 2 + (not ahead)) * schedule.num_microbatches + number
        num_bytes = link.forward_bytes(size) if ahead else link.backward_bytes(size)
        found.append((peer, tag, timing.link(rank, peer).seconds(num_bytes) * stretch))
    return found


def _sums(timing: Timing, rank: int, stretch: float) -> list[tuple[int, float]]:
    """Numbers and seconds of the gradient sums that a rank takes part in."""
    groups = enumerate(timing.gradient_groups, start=1 + EVERYBODY)
    return [(number, group.seconds * stretch) for number, group in groups if rank in group.ranks]


def _step_s(reports: Sequence[StepReport]) -> float:
    return max(r.end_s for r in reports) - min(r.start_s for r in reports)


def _latest(
    predicted: Timeline, reports: Sequence[StepReport], stretch: float
) -> tuple[float, tuple[int, str]]:
    """By how much which action of which rank ended later than predicted at most."""
    origin_s = min(report.start_s for report in reports)
    late: list[tuple[float, tuple[int, str]]] = []
    for report in reports:
        for event, planned in zip(report.events, predicted.events(report.rank), strict=True):
            if (
                planned.action.kind not in "SD"
            ):  # those end when the link is through, these when handed over
                late.append(
                    ((event.end_s - origin_s) / stretch - planned.end_s, (report.rank, event.token))
                )
    return max(late, default=(0.0, (0, "no action")))
