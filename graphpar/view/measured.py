"""Lanes of a step that really ran, on one clock.

The runtime, and with it torch, is imported for its types alone: nobody needs it to draw a picture.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from graphpar.plans.plan import Plan
from graphpar.schedule import Action, Schedule
from graphpar.view.model import Lane, ViewKernel, ViewTimeline

if TYPE_CHECKING:
    from graphpar.runtime.last_step import LastStep

_LONGEST_FAILURE = 160
_Causes = dict[tuple[str, str], float]
"""From node, to node: the shortest time seen between the start of a send and the end of its receive."""


def measured_timeline(plan: Plan, schedule: Schedule, step: "LastStep") -> ViewTimeline | None:
    """The measured lanes; None if no rank reported anything and nothing failed.

    A rank without a report, or with fewer events than its schedule has actions, is marked stopped.
    """
    if not step.reports and not step.failure:
        return None
    rows = {r.rank: [(Action.parse(e.token), e.start_s, e.end_s) for e in r.events] for r in step.reports}
    same_batch = step.predicted_s is not None
    offsets = _offsets(plan, schedule, rows) if same_batch else {}
    node_of = [timing.node for timing in plan.timing.ranks]
    shift = {r.rank: offsets.get(node_of[r.rank], 0.0) for r in step.reports}
    origin = min((r.start_s + shift[r.rank] for r in step.reports), default=0.0)
    lanes = []
    for rank in range(schedule.num_ranks):
        row, move = rows.get(rank, []), shift.get(rank, 0.0) - origin
        short = same_batch and len(row) < len(schedule.actions[rank])
        stopped = rank not in rows or short or (bool(step.failure) and not same_batch)
        lanes.append(
            Lane(
                rank,
                tuple(a for a, _, _ in row),
                tuple(start + move for _, start, _ in row),
                tuple(end + move for _, _, end in row),
                stopped,
            )
        )
    end = max((r.end_s + shift[r.rank] - origin for r in step.reports), default=0.0)
    kernels = tuple(
        ViewKernel(
            r.rank, k.track, k.name, k.start_s + shift[r.rank] - origin, k.end_s + shift[r.rank] - origin
        )
        for r in step.reports
        for k in r.kernels
    )
    note = _note(lanes, same_batch, offsets, step.failure)
    return ViewTimeline(end, tuple(lanes), note, same_batch, kernels)


def _note(lanes: Sequence[Lane], same_batch: bool, offsets: Mapping[str, float], failure: str) -> str:
    remarks = []
    stopped = [lane.rank for lane in lanes if lane.stopped]
    if stopped or failure:
        ranks = ", ".join(map(str, stopped[:8])) + (" and more" if len(stopped) > 8 else "")
        why = f" ({failure.splitlines()[0].rstrip('.')[:_LONGEST_FAILURE]})" if failure else ""
        remarks.append(f"the run failed{why}: it is shown up to where rank {ranks} stopped")
    if not same_batch:
        remarks.append("the measured step had another batch than the plan")
    if any(offsets.values()):
        remarks.append("clocks of different nodes were aligned by their messages")
    return "; ".join(remarks)


def _offsets(
    plan: Plan, schedule: Schedule, rows: Mapping[int, Sequence[tuple[Action, float, float]]]
) -> dict[str, float]:
    """For each node what to add to its clock; zero where messages never arrive before they left.

    Two clocks that contradict each other are set as NTP does it (RFC 5905, section 8): half the
    difference of the shortest trips in the two directions.
    """
    trips = _shortest_trips(plan, schedule, rows)
    node_of = [timing.node for timing in plan.timing.ranks]
    offsets = {node_of[0]: 0.0}
    pending = [node_of[0]]
    while pending:
        near = pending.pop()
        for far in dict.fromkeys(node_of):
            if far in offsets or not {(near, far), (far, near)} & trips.keys():
                continue
            there, back = trips.get((near, far)), trips.get((far, near))
            offsets[far] = offsets[near] + _correction(there, back)
            pending.append(far)
    return offsets


def _correction(there: float | None, back: float | None) -> float:
    if min(t for t in (there, back) if t is not None) >= 0:
        return 0.0
    if there is None or back is None:
        return -(there or 0.0) + (back or 0.0)
    return (back - there) / 2


def _shortest_trips(
    plan: Plan, schedule: Schedule, rows: Mapping[int, Sequence[tuple[Action, float, float]]]
) -> _Causes:
    times = {
        (action.kind, action.stage, action.microbatch, rank): (start, end)
        for rank, row in rows.items()
        for action, start, end in row
        if action.kind in "RSGD"
    }
    trips: _Causes = {}
    node_of = [timing.node for timing in plan.timing.ranks]
    for kind, stage, microbatch, rank in times:
        if kind not in "SD" or microbatch is None:
            continue
        links = schedule.outgoing[stage] if kind == "S" else schedule.incoming[stage]
        for link in links:
            if kind == "D" and not link.has_gradient:
                continue
            far = link.target if kind == "S" else link.source
            other = schedule.rank_of(far, microbatch)
            arrival = times.get(("R" if kind == "S" else "G", far, microbatch, other))
            if arrival is not None and node_of[other] != node_of[rank]:
                pair = node_of[rank], node_of[other]
                trip = arrival[1] - times[kind, stage, microbatch, rank][0]
                trips[pair] = min(trip, trips.get(pair, trip))
    return trips
