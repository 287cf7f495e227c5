"""One step under torch.profiler: the operations that ran, on the clock of the rank's own report."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from graphpar.runtime.program import Kernel

_Result = TypeVar("_Result")
_MARKER = "graphpar::step"
"""Recorded when the monotonic clock is read: it ties the profiler's clock to ours."""
_ENGINE = "autograd::engine::evaluate_function: "


def profiled(run: Callable[[], _Result], device: torch.device) -> tuple[_Result, tuple[Kernel, ...]]:
    """Run something under the profiler; returns its result and what ran, outermost operations only."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        with record_function(_MARKER):
            began_s = time.monotonic()
        result = run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return result, tuple(_kernels(profiler.events() or (), began_s))


def _kernels(events: Any, began_s: float) -> Iterator[Kernel]:
    """Operations by track: a thread of the CPU, or a stream of a GPU; times come in microseconds."""
    tracks: dict[str, list[Any]] = defaultdict(list)
    offset_s = began_s
    for event in events:
        if event.name == _MARKER:
            offset_s = began_s - event.time_range.start * 1e-6
        else:
            kind = "CPU thread" if event.device_type.name == "CPU" else f"{event.device_type.name} stream"
            tracks[f"{kind} {event.thread}"].append(event)
    for track, row in sorted(tracks.items()):
        yield from _outermost(track, row, offset_s)


def _outermost(track: str, events: list[Any], offset_s: float) -> Iterator[Kernel]:
    until = float("-inf")
    for event in sorted(events, key=lambda e: (e.time_range.start, -e.time_range.end)):
        if event.time_range.start >= until and event.time_range.end > event.time_range.start:
            until = event.time_range.end
            start_s, end_s = event.time_range.start * 1e-6, until * 1e-6
            yield Kernel(event.name.removeprefix(_ENGINE), track, offset_s + start_s, offset_s + end_s)
