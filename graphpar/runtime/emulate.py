"""Emulation: real numbers, real messages, and a pause for the time a slower device would need more."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_TIMER_S = 2e-4
"""A pause that lasts this much too long is the timer's doing; what is more, a core that was not free."""


class Pace:
    """Stretches work to `slowdown` times its own computing time.

    With one thread the computing time is the thread's CPU time, so that waiting for a core that
    another worker holds is not stretched too. By what the system let the last pause last too long, a
    tenth of a millisecond as a rule, the next one is shorter: many short actions would add up to a device
    slower than described.
    """

    def __init__(self, slowdown: float, threads: int) -> None:
        self.slowdown = slowdown
        self.clock = time.thread_time if threads == 1 else time.perf_counter
        self._waited_s = self._not_computed_s = 0.0
        self._late_s = 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Work stands still in the body, for others; that is not stretched."""
        began, computed = time.perf_counter(), self.clock()
        yield
        self._waited_s += time.perf_counter() - began
        self._not_computed_s += self.clock() - computed

    @contextmanager
    def work(self) -> Iterator[None]:
        """Run the body, then sleep for the rest of its stretched time."""
        if self.slowdown == 1.0:
            yield
            return
        self._waited_s = self._not_computed_s = 0.0
        began, computed = time.perf_counter(), self.clock()
        yield
        target = (self.clock() - computed - self._not_computed_s) * self.slowdown
        rest = target - (time.perf_counter() - began - self._waited_s)
        if rest > 0:
            self._pause(rest)

    def _pause(self, seconds: float) -> None:
        until = time.perf_counter() + seconds - self._late_s
        wanted = until - time.perf_counter()
        if wanted > 0:
            time.sleep(wanted)
        self._late_s = min(time.perf_counter() - until, _TIMER_S)


class SlowLink:
    """One direction of a link that carries one message at a time at a given rate.

    A message leaves when the link is free and has had `latency_s + bytes / bytes_per_s`; sending
    happens on a thread of its own, so that computing goes on meanwhile.
    """

    def __init__(self, latency_s: float, bytes_per_s: float) -> None:
        self.latency_s, self.bytes_per_s = latency_s, bytes_per_s
        self._free_at = 0.0
        self._jobs: queue.Queue[tuple[float, Callable[[], None]] | None] = queue.Queue()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="graphpar-link", daemon=True)
        self._thread.start()

    def submit(self, num_bytes: int, deliver: Callable[[], None]) -> None:
        """Deliver a message of so many bytes when the link would have carried it."""
        self.carry(self.latency_s + num_bytes / self.bytes_per_s, deliver)

    def carry(self, seconds: float, deliver: Callable[[], None]) -> None:
        """Deliver a message that the link is busy with for so long."""
        self._free_at = max(time.monotonic(), self._free_at) + seconds
        self._jobs.put((self._free_at, deliver))

    def drain(self) -> None:
        """Wait until everything submitted is delivered; raises what delivering raised."""
        self._jobs.join()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """End the thread once everything submitted is delivered."""
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            due, deliver = job
            rest = due - time.monotonic()
            if rest > 0:
                time.sleep(rest)
            try:
                deliver()
            except BaseException as error:
                self._error = error
            finally:
                self._jobs.task_done()
