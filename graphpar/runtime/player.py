"""One rank of a rehearsal: waits in place of computing, and messages of one byte (see `rehearsal`)."""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from graphpar.runtime.program import Event, Scene, StepReport
from graphpar.runtime.transport import Arrival, Transport
from graphpar.schedule import Action

EVERYBODY = 0
"""The group of all ranks."""
_POST_AHEAD = 2
"""Receives posted before they are needed, as in a job."""


class Player:
    """One rank of a rehearsal.

    Args:
        transport: The way to the others; its first group is everybody.
        rank: The rank's number.
    """

    def __init__(self, transport: Transport, rank: int) -> None:
        self._transport, self._rank = transport, rank
        # A rank sends one message at a time, to whomever: links of single peers do not overlap.
        self._way_out = SlowLink()
        self._posted: deque[list[Arrival]] = deque()

    def play(self, scenes: Sequence[Scene]) -> StepReport:
        """Play a step, and tell when each action was."""
        to_post = deque(scene for scene in scenes if Action.parse(scene.token).kind in "RG")
        self._meet(EVERYBODY)
        start_s = time.monotonic()
        events = []
        for scene in scenes:
            began_s = time.monotonic()
            self._act(scene, to_post)
            events.append(Event(scene.token, began_s, time.monotonic()))
        self._way_out.drain()
        self._transport.flush()
        return StepReport(self._rank, start_s, time.monotonic(), tuple(events), 0)

    def close(self) -> None:
        """End the thread that sends."""
        self._way_out.close()

    def _act(self, scene: Scene, to_post: deque[Scene]) -> None:
        kind = Action.parse(scene.token).kind
        if kind in "RG":
            self._post(to_post, _POST_AHEAD)
            for arrival in self._posted.popleft():
                arrival.wait()
        elif kind in "SD":
            for peer, tag, seconds in scene.messages:
                self._way_out.carry(seconds, _Delivery(self._transport, peer, tag))
            if scene.waits:
                self._way_out.drain()
        elif kind == "A":
            self._way_out.drain()
            for group, seconds in scene.sums:
                self._meet(group)
                time.sleep(seconds)
        else:
            self._post(to_post, _POST_AHEAD)
            time.sleep(scene.seconds)

    def _post(self, to_post: deque[Scene], ahead: int) -> None:
        while to_post and len(self._posted) < ahead:
            messages = to_post.popleft().messages
            self._posted.append(
                [self._transport.post(peer, (1,), torch.uint8, tag) for peer, tag, _ in messages]
            )

    def _meet(self, group: int) -> None:
        self._transport.sum(torch.zeros(1), group)


class SlowLink:
    """Delivers one message after another, each when it has been on its way for its time.

    That happens on a thread of its own, so that other things go on meanwhile.
    """

    def __init__(self) -> None:
        self._free_at = 0.0
        self._jobs: queue.Queue[tuple[float, Callable[[], None]] | None] = queue.Queue()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="graphpar-link", daemon=True)
        self._thread.start()

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


@dataclass(frozen=True)
class _Delivery:
    """A message of one byte, sent when it is called."""

    transport: Transport
    peer: int
    tag: int

    def __call__(self) -> None:
        self.transport.send(self.peer, torch.zeros(1, dtype=torch.uint8), self.tag)
