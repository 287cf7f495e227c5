"""Workers that are processes on the cores of one machine."""

from dataclasses import dataclass


@dataclass(frozen=True)
class CoreUse:
    """What a worker asks of the cores that it shares: so many threads, and what it is slowed down by.

    A worker that is slowed down to 1/`slowdown` needs its cores for that share of its computing time and
    waits for the rest. A tensor group works in step: it counts as one worker of several `members`.
    """

    threads: int = 1
    slowdown: float = 1.0
    members: int = 1

    @property
    def cores(self) -> int:
        """How many cores it would have at work at once."""
        return self.threads * self.members


@dataclass(frozen=True)
class SharedCores:
    """Devices that are processes on the cores of one machine, and what they cost each other.

    Attributes:
        num_cores: Cores that all of them share.
        slowing: How many times longer a kernel takes with 1, 2, ... cores at work than with one, for
            shared caches, memory and power; the last number holds for all cores.
        workers: Who shares them, by device name.
        reference_s: What a reference took when the times were measured; 0 where nobody knows.
        send_s: What handing a message to the transport takes a worker.
        receive_s: What taking in a message that is there takes one.
        late_s: How much later than an emulated link says a message between them is there.
        apart: How many times longer a backward takes that does not follow on its own forward.
    """

    num_cores: int
    slowing: tuple[float, ...]
    workers: dict[str, CoreUse]
    reference_s: float = 0.0
    send_s: float = 0.0
    receive_s: float = 0.0
    late_s: float = 0.0
    apart: float = 1.0

    @property
    def handling_s(self) -> float:
        """What a message costs two workers together.

        Nothing where some are slowed down: these make up for it in their pauses.

        >>> SharedCores(2, (1.0,), {}, send_s=2.0, receive_s=3.0).handling_s
        5.0
        """
        return self.send_s + self.receive_s if self.send_s and not self._catch_up else 0.0

    @property
    def message_s(self) -> float:
        """What a message between two workers takes besides its link."""
        return self.handling_s + (0.0 if self._catch_up else self.late_s)

    @property
    def _catch_up(self) -> bool:
        return any(use.slowdown > 1 for use in self.workers.values())

    def slowed(self, busy: float) -> float:
        """How many times longer a kernel takes while so many cores are at work.

        >>> SharedCores(2, (1.0, 1.2), {}).slowed(1.5)
        1.1
        """
        place = min(max(busy - 1, 0.0), len(self.slowing) - 1)
        low = min(int(place), len(self.slowing) - 2)
        if low < 0:
            return self.slowing[-1]
        return self.slowing[low] + (place - low) * (self.slowing[low + 1] - self.slowing[low])

    def longer_beside(self, others: float, threads: int = 1) -> float:
        """How many times longer a worker's kernels take while others keep so many cores at work.

        >>> cores = SharedCores(2, (1.0, 1.2), {})
        >>> cores.longer_beside(0.5), cores.longer_beside(3)
        (1.1, 1.2)
        """
        return self.slowed(min(threads + others, self.num_cores)) / self.slowed(threads)
