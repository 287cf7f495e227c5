"""A trace file that Perfetto and Chrome open: predicted and measured as two process groups.

The format is the Trace Event Format,
https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU. Every rank has
two tracks, since messages travel while it computes: one for what it does, one for what it sends.
Arrows lead from a send to the forward or backward that needs what was sent.
"""

from collections.abc import Iterator
from typing import Any

import msgspec

from graphpar.plans.records import PlanEdge
from graphpar.schedule import Action
from graphpar.view.model import ViewData, ViewTimeline
from graphpar.view.palette import ACTION_NAMES

PREDICTED_PROCESS, MEASURED_PROCESS = 1, 2
_TRACKS_PER_RANK = 2
_Key = tuple[int, str, int, int]
"""Rank, kind of action, stage, microbatch."""


def render_trace(view: ViewData) -> bytes:
    """The trace as JSON."""
    document = {
        "displayTimeUnit": "ms",
        "otherData": {"model": view.model, "predicted_step_s": view.step_s, **_measured_data(view)},
        "traceEvents": list(_all_events(view)),
    }
    return msgspec.json.encode(document) + b"\n"


def _measured_data(view: ViewData) -> dict[str, Any]:
    if view.measured is None:
        return {}
    return {"measured_step_s": view.measured.step_s, "measured_note": view.measured.note}


def _all_events(view: ViewData) -> Iterator[dict[str, Any]]:
    yield from _group(view, view.predicted, PREDICTED_PROCESS, "predicted")
    if view.measured is not None:
        yield from _group(view, view.measured, MEASURED_PROCESS, "measured")


def _group(view: ViewData, timeline: ViewTimeline, process: int, name: str) -> Iterator[dict[str, Any]]:
    yield _named("process_name", process, 0, f"{name}: {view.model}")
    for lane in timeline.lanes:
        label = f"rank {lane.rank} {view.devices[lane.rank].name}"
        label += " (stopped)" if lane.stopped else ""
        yield _named("thread_name", process, _track(lane.rank, sends=False), label)
        yield _named("thread_name", process, _track(lane.rank, sends=True), f"{label} sends")
        for action, start_s, end_s in lane.events():
            num_bytes = view.message_bytes(action) if timeline.planned_batch else 0.0
            yield _slice(process, lane.rank, action, start_s, end_s, num_bytes)
    if timeline.planned_batch:
        yield from _flows(view, timeline, process)
    yield from _kernels(timeline, process)


def _kernels(timeline: ViewTimeline, process: int) -> Iterator[dict[str, Any]]:
    """What a profiler saw, on tracks of their own below those of the ranks."""
    tracks: dict[tuple[int, str], int] = {}
    for kernel in timeline.kernels:
        key = (kernel.rank, kernel.track)
        if key not in tracks:
            tracks[key] = 1 + len(timeline.lanes) * _TRACKS_PER_RANK + len(tracks)
            yield _named("thread_name", process, tracks[key], f"rank {kernel.rank} {kernel.track}")
        begin, end = _microseconds(kernel.start_s), _microseconds(kernel.end_s)
        yield {
            "ph": "X",
            "name": kernel.name,
            "cat": "kernel",
            "pid": process,
            "tid": tracks[key],
            "ts": begin,
            "dur": round(end - begin, 3),
        }


def _named(what: str, process: int, track: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": process, "tid": track, "args": {"name": name}}


def _track(rank: int, *, sends: bool) -> int:
    return 1 + rank * _TRACKS_PER_RANK + sends


def _slice(
    process: int, rank: int, action: Action, start_s: float, end_s: float, num_bytes: float
) -> dict[str, Any]:
    begin, end = _microseconds(start_s), _microseconds(end_s)
    details: dict[str, Any] = {"action": str(action), "stage": action.stage}
    if action.microbatch is not None:
        details["microbatch"] = action.microbatch
    if num_bytes:
        details["bytes"] = num_bytes
    return {
        "ph": "X",
        "name": ACTION_NAMES[action.kind],
        "cat": action.kind,
        "pid": process,
        "tid": _track(rank, sends=action.kind in "SD"),
        "ts": begin,
        "dur": round(end - begin, 3),
        "args": details,
    }


def _microseconds(seconds: float) -> float:
    """Rounded to nanoseconds, so that the end of a slice and the start of the next stay ordered."""
    return round(seconds * 1e6, 3)


def _flows(view: ViewData, timeline: ViewTimeline, process: int) -> Iterator[dict[str, Any]]:
    """Both ends of every message whose send and use both happened."""
    starts: dict[_Key, float] = {
        (lane.rank, _flow_kind(action), action.stage, action.microbatch): start
        for lane in timeline.lanes
        for action, start, _ in lane.events()
        if action.microbatch is not None and action.kind in "SDFBI"
    }
    number = process
    for (rank, kind, stage, microbatch), start in starts.items():
        if kind not in "SD":
            continue
        for other in _receivers(view.edges, stage, kind):
            receiver = view.rank_of(other, microbatch)
            use = starts.get((receiver, "F" if kind == "S" else "B", other, microbatch))
            if use is None:
                continue
            number += MEASURED_PROCESS
            flow = {"name": ACTION_NAMES["S" if kind == "S" else "D"], "cat": "message", "id": number}
            sent = _track(rank, sends=True), _microseconds(start)
            used = _track(receiver, sends=False), _microseconds(use)
            yield {**flow, "ph": "s", "pid": process, "tid": sent[0], "ts": sent[1]}
            yield {**flow, "ph": "f", "bp": "e", "pid": process, "tid": used[0], "ts": used[1]}


def _flow_kind(action: Action) -> str:
    """The first half of a backward uses gradients that came back, like a whole one."""
    return "B" if action.kind == "I" else action.kind


def _receivers(edges: tuple[PlanEdge, ...], stage: int, kind: str) -> list[int]:
    if kind == "S":
        return [e.target for e in edges if e.source == stage]
    return [e.source for e in edges if e.target == stage and e.link.has_gradient]
