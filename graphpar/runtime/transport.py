"""Tensors between ranks over torch.distributed (gloo): tagged, asynchronous, receives posted ahead.

Devices without gloo support are staged through the CPU, so that a GPU and a CPU can be neighbours.
Emulated links carry with a message when it is due, on the clock that all processes of the machine share;
it is sent at once and whoever receives it waits until then.
"""

import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import timedelta
from math import prod

import torch
import torch.distributed as dist

from graphpar.runtime.emulate import LinkTime, Pace
from graphpar.runtime.program import EmulatedLink


def meet_on_this_machine(store: str, rank: int, num_ranks: int, timeout: timedelta) -> None:
    """Meet other processes of this machine through a file; nothing listens beyond loopback."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
    met = dist.FileStore(store, num_ranks)  # type: ignore[attr-defined]
    try:
        dist.init_process_group("gloo", store=met, rank=rank, world_size=num_ranks, timeout=timeout)
    except RuntimeError as error:
        if "Unable to find address" not in str(error):
            raise
        raise RuntimeError(
            "the loopback interface of this machine has no address, as in a container without network: "
            "bring it up (`ip link set lo up`); `graphpar doctor` tries it"
        ) from None


@dataclass
class Arrival:
    """A receive that was posted: `wait` gives the tensor on the rank's device."""

    buffer: torch.Tensor
    work: "dist.Work | None"
    device: torch.device
    pace: Pace
    due: torch.Tensor | None = None

    def wait(self) -> torch.Tensor:
        """Block until the message is here, and due where its link is emulated."""
        if self.work is not None:
            began_s = time.monotonic()
            self.work.wait()
            now_s = time.monotonic()
            if self.due is not None:
                due_s = float(self.due)
                time.sleep(max(0.0, due_s - now_s))
                self.pace.ready(due_s)
            elif now_s - began_s > _AT_ONCE_S:
                self.pace.ready(now_s)
        return self.buffer.to(self.device)


_AT_ONCE_S = 5e-5
"""What was waited for no longer than this was there before."""

_DUE_BYTES = 8
"""A message over an emulated link ends in a float64: when it is due."""


class Transport:
    """Point-to-point messages and reductions of one rank.

    Args:
        device: Where the rank computes.
        ranks: For each rank of the job its rank in the process group.
        groups: Ranks of the job that reduce together; created by all ranks in this order.
        links: Links of this rank that are made slower.
        pace: The time of the device, where that is emulated.
        timed_groups: Groups, by number, whose collectives begin when the last member has come by its own
            time, and take what the slowest emulated links would. All members of a group give the same.
    """

    def __init__(
        self,
        device: torch.device,
        ranks: Sequence[int],
        groups: Sequence[Sequence[int]],
        links: Sequence[EmulatedLink] = (),
        pace: Pace | None = None,
        timed_groups: Collection[int] = (),
    ) -> None:
        self.device = device
        self.ranks = tuple(ranks)
        self.pace = pace or Pace(1.0, 1)
        self._slow = {link.rank: LinkTime(link.latency_s, link.bytes_per_s) for link in links}
        self._emulated = {link.rank: link for link in links}
        self._members = [tuple(g) for g in groups]
        self._groups = [dist.new_group([self.ranks[r] for r in g], backend="gloo") for g in groups]
        self._timed = frozenset(timed_groups)
        self._leaving = _Leaving()
        self._busy_until = 0.0

    def post(self, rank: int, shape: tuple[int, ...], dtype: torch.dtype, tag: int) -> Arrival:
        """Make ready for a message from a rank."""
        due = None
        if rank in self._slow:
            num_bytes = prod(shape) * dtype.itemsize
            packet = torch.empty(_aligned(num_bytes) + _DUE_BYTES, dtype=torch.uint8)
            buffer = packet[:num_bytes].view(dtype).view(shape)
            due = packet[-_DUE_BYTES:].view(torch.float64)
        else:
            buffer = torch.empty(shape, dtype=dtype)
            packet = _flat(buffer)
        work = dist.irecv(packet, src=self.ranks[rank], tag=tag)
        return Arrival(buffer, work, self.device, self.pace, due)

    def send(self, rank: int, tensor: torch.Tensor, tag: int) -> None:
        """Send without waiting; the tensor is kept until it is out."""
        # Not a blocking send: receivers may take messages of one link in another order.
        packet, _ = self._packet(rank, tensor)
        self._leaving.add(dist.isend(packet, dst=self.ranks[rank], tag=tag), packet)

    def start_send(self, rank: int, tensor: torch.Tensor, tag: int) -> Callable[[], None]:
        """Begin to send; the result waits, once, until the tensor is out and an emulated link free."""
        packet, due_s = self._packet(rank, tensor)
        work = dist.isend(packet, dst=self.ranks[rank], tag=tag)
        return lambda: _wait(work, due_s)

    def _packet(self, rank: int, tensor: torch.Tensor) -> tuple[torch.Tensor, float]:
        """The bytes to send, and when they are due; 0 where no link is emulated."""
        # Lazy conjugates and negatives are told by a bit that bytes do not carry.
        written = tensor.detach().resolve_conj().resolve_neg()
        flat, slow = _flat(written.cpu().contiguous()), self._slow.get(rank)
        if slow is None:
            return flat, 0.0
        due_s = slow.due_s(flat.nbytes, self.pace.now_s())
        packet = torch.empty(_aligned(flat.nbytes) + _DUE_BYTES, dtype=torch.uint8)
        packet[: flat.nbytes] = flat.view(torch.uint8)
        packet[-_DUE_BYTES:].view(torch.float64).fill_(due_s)
        return packet, due_s

    def flush(self) -> None:
        """Wait until everything sent is out."""
        self._leaving.drain()

    def close(self) -> None:
        """End the threads; torch does not survive threads at the end of a process."""
        self._leaving.close()

    def sum(self, tensor: torch.Tensor, group: int) -> torch.Tensor:
        """Sum over a group of ranks; the result is on the tensor's device."""
        return self.start_sum(tensor, group)()

    def start_sum(self, tensor: torch.Tensor, group: int) -> Callable[[], torch.Tensor]:
        """Begin a sum, in the tensor's own place where it lies on the CPU; the result of waiting."""
        buffer = tensor.cpu().contiguous()
        due = self._due(self._ring_seconds(self._members[group], buffer.nbytes), group)
        work = dist.all_reduce(buffer, group=self._groups[group], async_op=True)

        def finish() -> torch.Tensor:
            self._await(work, due)
            return buffer.to(tensor.device)

        return finish

    def maximum(self, tensor: torch.Tensor, group: int) -> torch.Tensor:
        """Largest values over a group of ranks; the result is on the tensor's device."""
        buffer = tensor.cpu()
        due = self._due(self._ring_seconds(self._members[group], buffer.nbytes), group)
        dist.all_reduce(buffer, op=dist.ReduceOp.MAX, group=self._groups[group])
        self._await(None, due)
        return buffer.to(tensor.device)

    def start_exchange(
        self, blocks: Sequence[torch.Tensor], shapes: Sequence[tuple[int, ...]], group: int
    ) -> Callable[[], list[torch.Tensor]]:
        """Begin to give every rank of a group its block; waiting gives those meant for this one.

        They have the shapes given; the own block is handed back as it is.
        """
        members = self._members[group]
        own = next(k for k, rank in enumerate(members) if self.ranks[rank] == dist.get_rank())
        others = [k for k in range(len(members)) if k != own]
        away = [blocks[k].detach().cpu().reshape(-1) for k in others]
        flat = away[0] if len(away) == 1 else torch.cat(away)
        sizes = [0 if k == own else prod(shape) for k, shape in enumerate(shapes)]
        arrived = torch.empty(sum(sizes), dtype=flat.dtype)
        due = self._due(self._peer_seconds(members, blocks), group)
        given = [0 if k == own else block.numel() for k, block in enumerate(blocks)]
        group_of = self._groups[group]
        work = dist.all_to_all_single(arrived, flat, sizes, given, group=group_of, async_op=True)

        def finish() -> list[torch.Tensor]:
            self._await(work, due)
            parts = torch.split(arrived, sizes)
            return [
                blocks[k] if k == own else part.view(shape).to(blocks[k].device)
                for k, (part, shape) in enumerate(zip(parts, shapes, strict=True))
            ]

        return finish

    def _due(self, seconds: float, group: int) -> Callable[[], float]:
        """When emulated links will have carried a collective that begins now; 0 where none is emulated.

        A link carries one after another, and this one not before all members have come. A member that is
        ahead of its device's time may have come long before it, and one of fast links may come last, so
        members tell each other when they begin and what their links take.
        """
        begins_s = max(self.pace.now_s(), self._busy_until)
        own_s = begins_s + seconds if seconds else 0.0
        self._busy_until = max(self._busy_until, own_s)
        if group not in self._timed:
            return lambda: own_s
        latest = torch.tensor([begins_s, seconds], dtype=torch.float64)
        work = dist.all_reduce(latest, dist.ReduceOp.MAX, group=self._groups[group], async_op=True)

        def agreed_s() -> float:
            work.wait()
            due_s = float(latest.sum())
            self._busy_until = max(self._busy_until, due_s)
            return due_s

        return agreed_s

    def _await(self, work: "dist.Work | None", due: Callable[[], float]) -> None:
        """Wait for a collective that all members meet in, and until links would have carried it."""
        if work is not None:
            work.wait()
        due_s = due()
        self.pace.ready(max(due_s, time.monotonic()))
        _wait(None, due_s)

    def _peer_seconds(self, members: Sequence[int], blocks: Sequence[torch.Tensor]) -> float:
        """Blocks leave one after another; each link takes its own time."""
        seconds = 0.0
        for rank, block in zip(members, blocks, strict=True):
            link = self._emulated.get(rank)
            if link is not None:
                seconds += link.latency_s + block.nbytes / link.bytes_per_s
        return seconds

    def _ring_seconds(self, members: Sequence[int], num_bytes: int) -> float:
        """A ring moves 2 (w - 1) / w of the bytes in 2 (w - 1) messages over its slowest link."""
        links = [self._emulated[r] for r in members if r in self._emulated]
        if not links:
            return 0.0
        turns = 2 * (len(members) - 1)
        chunk = num_bytes / len(members)
        return turns * max(k.latency_s + chunk / k.bytes_per_s for k in links)


_LAST_SENDS_S = 2.0
"""How long the end of a job waits for messages that nobody may want any more."""


class _Leaving:
    """Tensors that are being sent, each let go of when it is out.

    A send of gloo does not say by itself that it is out; somebody has to wait for it, on a thread.
    """

    def __init__(self) -> None:
        self._sends: queue.Queue[tuple[dist.Work | None, torch.Tensor] | None] = queue.Queue()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def add(self, work: "dist.Work | None", tensor: torch.Tensor) -> None:
        """Keep a tensor until its send is done."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="graphpar-sends", daemon=True)
            self._thread.start()
        self._sends.put((work, tensor))

    def drain(self) -> None:
        """Wait until everything is out; raises what waiting raised."""
        self._sends.join()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """End the thread once everything is out; of a job that failed nothing may ever be."""
        if self._thread is not None:
            self._sends.put(None)
            self._thread.join(_LAST_SENDS_S)

    def _run(self) -> None:
        while (sent := self._sends.get()) is not None:
            try:
                _wait(sent[0], 0.0)
            except BaseException as error:
                self._error = error
            finally:
                del sent
                self._sends.task_done()


def _wait(work: "dist.Work | None", due: float) -> None:
    """Wait for a collective, and until an emulated link would have carried it."""
    if work is not None:
        work.wait()
    if due:
        time.sleep(max(0.0, due - time.monotonic()))


def _aligned(num_bytes: int) -> int:
    """The place of a float64 behind so many bytes."""
    return -(-num_bytes // _DUE_BYTES) * _DUE_BYTES


def _flat(buffer: torch.Tensor) -> torch.Tensor:
    """Gloo sends no zero-dimensional tensors; a flat view of the same storage is sent."""
    return buffer.view(-1)
