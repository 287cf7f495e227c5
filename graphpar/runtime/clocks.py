"""When things began and ended on the device, which may run far behind the host that issues them."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from graphpar.runtime.program import Event

Clock = Callable[[], float]
"""Seconds that only grow."""


def work_clock(threads: int, device: torch.device) -> Clock:
    """Tells the time that work on a device takes, between two calls.

    Of one thread on a processor it is that thread's own, which others disturb little; of several the time
    that passes; of a GPU the time that passes until it has done what it was asked for.
    """
    if device.type == "cuda":
        return lambda: _when_idle(device)
    return time.thread_time if threads == 1 else time.perf_counter


def _when_idle(device: torch.device) -> float:
    torch.cuda.synchronize(device)
    return time.perf_counter()


@dataclass(frozen=True)
class _Mark:
    """An action as the host saw it, and a mark that the device passes once it is done there."""

    token: str
    began_s: float
    ended_s: float
    passed: torch.cuda.Event


class StepClock:
    """Notes the actions of a step with their times on the monotonic clock.

    On a processor an action is over when the call returns. A GPU is left to run behind the host: the
    action is over when the device passes a mark that was put behind its kernels, and the next one begins
    there at the earliest.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._events: list[Event] = []
        self._marks: list[_Mark] = []
        self._origin = self._mark() if device.type == "cuda" else None
        if self._origin is not None:
            torch.cuda.synchronize(device)
        self.start_s = time.monotonic()

    def note(self, token: str, began_s: float) -> None:
        """An action that began at a time has been issued."""
        ended_s = time.monotonic()
        if self._origin is None:
            self._events.append(Event(token, began_s, ended_s))
        else:
            self._marks.append(_Mark(token, began_s, ended_s, self._mark()))

    def finish(self) -> None:
        """Wait until the device has done everything."""
        if self._origin is not None:
            torch.cuda.synchronize(self._device)

    def events(self) -> tuple[Event, ...]:
        """The actions that are over; another thread may ask."""
        if self._origin is None:
            return tuple(self._events)
        found: list[Event] = []
        before_s = self.start_s
        for mark in tuple(self._marks):
            if not mark.passed.query():  # type: ignore[no-untyped-call]
                break
            passed_s = self.start_s + self._origin.elapsed_time(mark.passed) * 1e-3
            ended_s = max(mark.ended_s, passed_s)
            found.append(Event(mark.token, min(max(mark.began_s, before_s), ended_s), ended_s))
            before_s = ended_s
        return tuple(found)

    def _mark(self) -> torch.cuda.Event:
        with torch.cuda.device(self._device):
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
        return event
