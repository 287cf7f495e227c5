"""Where the time of all ranks goes in one step: work, messages on their way, gradient sums, bubbles."""

from collections.abc import Iterator

from graphpar.schedule import Schedule
from graphpar.schedule.simulate import Timeline
from graphpar.view.model import ViewShares

_Sends = dict[tuple[str, int, int], float]
"""Start of a send by its kind, the sending stage and the microbatch."""


def shares_of(timeline: Timeline) -> ViewShares:
    """Shares of the predicted step.

    A wait for a message counts as communication from the moment the message was sent, and as a bubble
    before that, when the sender had not made it yet. Collectives inside tensor groups are communication.
    """
    total = timeline.step_s * len(timeline.compute_s)
    if total <= 0:
        return ViewShares(0.0, 0.0, 0.0, 1.0)
    busy, gradients = sum(timeline.compute_s) / total, sum(timeline.reduce_s) / total
    waiting = min(sum(_waits_for_messages(timeline)) / total, max(0.0, 1 - busy - gradients))
    collectives = min(sum(timeline.collective_s) / total, busy)
    bubble = max(0.0, 1.0 - busy - gradients - waiting)
    return ViewShares(busy - collectives, waiting + collectives, gradients, bubble)


def _waits_for_messages(timeline: Timeline) -> Iterator[float]:
    schedule = timeline.schedule
    sends = _sends(timeline)
    for rank, row in enumerate(schedule.actions):
        times = zip(row, timeline.starts_s[rank], timeline.ends_s[rank], strict=True)
        for action, start_s, end_s in times:
            if action.kind in "RG" and end_s > start_s and action.microbatch is not None:
                sent_s = _last_sent(schedule, sends, action.kind, action.stage, action.microbatch)
                yield min(end_s - start_s, max(0.0, end_s - sent_s))


def _sends(timeline: Timeline) -> _Sends:
    schedule = timeline.schedule
    return {
        (action.kind, action.stage, action.microbatch): start_s
        for rank, row in enumerate(schedule.actions)
        for action, start_s in zip(row, timeline.starts_s[rank], strict=True)
        if action.kind in "SD" and action.microbatch is not None
    }


def _last_sent(schedule: Schedule, sends: _Sends, kind: str, stage: int, microbatch: int) -> float:
    """When the last of the awaited messages was sent; it is the one that was waited for."""
    if kind == "R":
        starts = [sends.get(("S", link.source, microbatch)) for link in schedule.incoming[stage]]
    else:
        starts = [
            sends.get(("D", link.target, microbatch))
            for link in schedule.outgoing[stage]
            if link.has_gradient
        ]
    return max((s for s in starts if s is not None), default=float("inf"))
