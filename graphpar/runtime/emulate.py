"""Emulation: real numbers, real messages, and a pause for the time a slower device would need more.

Emulated devices and links live in a time of their own: an action begins when its device has done the one
before and its messages are due, whatever the system that runs the worker makes of it. A worker that is
behind that time, because it was woken late or another one had the core, makes up for it in pauses that it
has anyway.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Pace:
    """Stretches work to `slowdown` times its own computing time, and keeps the device's time.

    With one thread the computing time is the thread's CPU time, so that waiting for a core that
    another worker holds is not stretched too. A device that is not slowed down has no pauses to catch up
    in: its time is the machine's.
    """

    def __init__(self, slowdown: float, threads: int) -> None:
        self.slowdown = slowdown
        self.clock = time.thread_time if threads == 1 else time.perf_counter
        self._waited_s = self._not_computed_s = 0.0
        self._free_s = self._ready_s = -math.inf
        self._works = False

    def restart(self, at_s: float) -> None:
        """The device has nothing to do, and inputs for what comes next, since a time."""
        self._free_s, self._ready_s = at_s, -math.inf

    def ready(self, at_s: float) -> None:
        """What the next action waits for was there at a time, or will be."""
        self._ready_s = max(self._ready_s, at_s)

    def now_s(self) -> float:
        """The device's time, which the machine's may be ahead of."""
        now_s = time.monotonic()
        if self.slowdown == 1.0 or self._works:
            return now_s
        own_s = max(self._free_s, self._ready_s)
        return min(own_s, now_s) if own_s > -math.inf else now_s

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Work stands still in the body, for others; that is not stretched."""
        began, computed = time.monotonic(), self.clock()
        yield
        self._waited_s += time.monotonic() - began
        self._not_computed_s += self.clock() - computed

    @contextmanager
    def work(self) -> Iterator[None]:
        """Run the body, then sleep for the rest of its stretched time."""
        if self.slowdown == 1.0:
            yield
            return
        self._waited_s = self._not_computed_s = 0.0
        began, computed = self.now_s(), self.clock()
        self._works = True
        try:
            yield
        finally:
            self._works = False
        own_s = (self.clock() - computed - self._not_computed_s) * self.slowdown
        self._free_s = began + own_s + self._waited_s
        rest = self._free_s - time.monotonic()
        if rest > 0:
            time.sleep(rest)


class LinkTime:
    """When messages over one direction of an emulated link are there: one by one, at a given rate."""

    def __init__(self, latency_s: float, bytes_per_s: float) -> None:
        self.latency_s, self.bytes_per_s = latency_s, bytes_per_s
        self._free_s = -math.inf

    def due_s(self, num_bytes: int, leaves_s: float) -> float:
        """When a message will be there that could leave at a time, and leaves when the link is free."""
        self._free_s = max(leaves_s, self._free_s) + self.latency_s + num_bytes / self.bytes_per_s
        return self._free_s
