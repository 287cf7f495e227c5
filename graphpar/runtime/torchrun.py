"""The same job under torchrun: every rank runs the user's script and is one device of the cluster."""

import atexit
import functools
import hashlib
import os
import socket
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import msgspec
import torch
import torch.distributed as dist

from graphpar.cluster import Cluster
from graphpar.errors import ClusterError, RunError
from graphpar.plans.plan import Plan
from graphpar.runtime.checkpoint import Part, Restored
from graphpar.runtime.executor import StepResult
from graphpar.runtime.local import read_step
from graphpar.runtime.messages import Message, pack, raw_bytes, unpack
from graphpar.runtime.optimizers import Recipe
from graphpar.runtime.parent import end_with_parent, started_by_torchrun
from graphpar.runtime.program import EmulatedLink, RankProgram, encode
from graphpar.runtime.worker import (
    COLLECTIVE_TIMEOUT,
    Worker,
    step_message,
)
from graphpar.runtime.workers import RankStart

_SHORT_BYTES = 8192
"""Messages up to this size, a step's report and loss among them, need no second collective."""
_SIZE_BYTES = 8


def under_torchrun() -> bool:
    """Whether this process is one of several that torchrun (or its like) started."""
    return dist.is_initialized() or {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()


def match_devices(cluster: Cluster, hosts: Sequence[tuple[int, str, int]]) -> dict[str, int]:
    """Which process is which device.

    Args:
        cluster: The devices.
        hosts: For each process rank: the number of its node in torchrun, its host name, its local
            rank.

    Returns:
        Device name to process rank.

    Raises:
        ClusterError: The processes on each node do not match the cluster's devices.

    Nodes of the cluster with a `host` are matched by name, the others in order.
    """
    by_node: dict[int, dict[int, int]] = {}
    names: dict[int, str] = {}
    for rank, (node, host, local) in enumerate(hosts):
        by_node.setdefault(node, {})[local] = rank
        names[node] = host
    free = sorted(by_node)
    chosen: dict[str, int] = {}
    for wanted in cluster.nodes:
        match = next((n for n in free if wanted.host and names[n] == wanted.host), None)
        if match is None and not wanted.host:
            match = next((n for n in free if len(by_node[n]) == len(wanted.devices)), None)
        if match is None or len(by_node[match]) < len(wanted.devices):
            raise ClusterError(
                f"Node {wanted.name!r} of the cluster has {len(wanted.devices)} devices, but torchrun "
                f"started {_describe(by_node, names)}. Start one process per device "
                "(--nproc-per-node), or correct the cluster."
            )
        free.remove(match)
        for local, device in enumerate(wanted.devices):
            chosen[device.name] = by_node[match][local]
    return chosen


def _describe(by_node: Mapping[int, Mapping[int, int]], names: Mapping[int, str]) -> str:
    return ", ".join(f"{len(ranks)} processes on {names[node]}" for node, ranks in by_node.items())


def links_inside(
    links: Sequence[EmulatedLink], rank: int, machines: Sequence[str]
) -> tuple[EmulatedLink, ...]:
    """Those links of a rank that do not leave its machine.

    Between machines a link is what it is, and there is no clock by which a message could be due.

    >>> links = EmulatedLink(1, 1e-3, 1e9), EmulatedLink(2, 1e-3, 1e9)
    >>> [link.rank for link in links_inside(links, 0, ["a", "a", "b"])]
    [1]
    """
    return tuple(link for link in links if machines[link.rank] == machines[rank])


def groups_inside(
    timed: Sequence[int], groups: Sequence[Sequence[int]], machines: Sequence[str]
) -> tuple[int, ...]:
    """Those groups, by number, whose ranks are all on one machine, and so share a clock.

    >>> groups_inside([0, 1], [(0, 1), (0, 2)], ["a", "a", "b"])
    (0,)
    """
    return tuple(g for g in timed if len({machines[rank] for rank in groups[g]}) == 1)


def _machine() -> str:
    """The same for processes that share a monotonic clock."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return socket.gethostname()


class TorchrunWorkers:
    """This process's rank, and collectives with all others.

    Processes without work take part in the exchange of results only.
    """

    def __init__(self, processes: Mapping[str, int], machines: Sequence[str]) -> None:
        self._processes, self._machines = processes, machines
        self._worker: Worker | None = None
        self._rank_of: list[int] = []
        self._closed = False

    @classmethod
    def join(cls, cluster: Cluster) -> "TorchrunWorkers":
        """Meet all processes and match them with the cluster's devices."""
        if started_by_torchrun():
            _end_with_torchrun()
        if not dist.is_initialized():
            try:
                dist.init_process_group("gloo", timeout=COLLECTIVE_TIMEOUT)
                atexit.register(_leave)
            except Exception as error:
                address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
                raise RunError(
                    f"The processes could not meet at {address}: {error}. If the port is in use, give "
                    "torchrun another --master-port, or --standalone on one machine."
                ) from error
        local = int(os.environ.get("LOCAL_RANK", "0"))
        node = int(os.environ.get("GROUP_RANK", "0"))
        here = {"node": node, "host": socket.gethostname(), "local": local, "machine": _machine()}
        met = [m.data for m in exchange(Message("host", here))]
        hosts = [(m["node"], m["host"], m["local"]) for m in met]
        return cls(match_devices(cluster, hosts), [m["machine"] for m in met])

    def agree(self, decide: Callable[[], Plan], model_hash: str) -> Plan:
        """The first process decides; all others get its plan, or its error.

        Raises:
            RunError: The first process failed, or the processes do not run the same model.
        """
        mine = Message("none", {"model": model_hash})
        failure: Exception | None = None
        if dist.get_rank() == 0:
            try:
                mine = Message("plan", {"model": model_hash, "json": decide().to_json()})
            except Exception as error:  # the others wait for an answer, whatever went wrong
                failure, mine = error, Message("error", {"text": str(error)})
        answers = exchange(mine)
        if failure is not None:
            raise failure
        if answers[0].kind == "error":
            raise RunError(f"Planning failed on rank 0: {answers[0].data['text']}", rank=0)
        unlike = [rank for rank, m in enumerate(answers) if m.data["model"] != answers[0].data["model"]]
        if unlike:
            raise RunError(
                f"Rank {unlike[0]} called compile with another model or other batch shapes than rank 0. "
                "Every rank must make the same calls with the same global batch.",
                rank=unlike[0],
            )
        return Plan.from_json(answers[0].data["json"], name="the plan of rank 0")

    def same_everywhere(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The first process's tensors on every process; only those that differ are sent."""
        names = sorted(tensors)
        mine = torch.tensor([_fingerprint(tensors[name]) for name in names], dtype=torch.int64)
        highest, lowest = mine.clone(), mine.clone()
        dist.all_reduce(highest, op=dist.ReduceOp.MAX)
        dist.all_reduce(lowest, op=dist.ReduceOp.MIN)
        result = dict(tensors)
        for place in (highest != lowest).nonzero().flatten().tolist():
            name = names[place]
            buffer = tensors[name].detach().cpu().contiguous().clone()
            dist.broadcast(buffer, src=0)
            result[name] = buffer
        return result

    def begin(
        self,
        starts: Sequence[RankStart],
        trained: Sequence[str],
        recipe: Recipe | None,
    ) -> None:
        """Set up this process's rank, if it has work; all processes make the groups together."""
        self._rank_of = [self._processes[start.device_name] for start in starts]
        mine = dist.get_rank()
        if mine not in self._rank_of:
            for group in starts[0].setup.groups:
                dist.new_group([self._rank_of[r] for r in group], backend="gloo")
            return
        start = starts[self._rank_of.index(mine)]
        torch.set_num_threads(start.setup.threads)
        atexit.register(self.close)
        machines = [self._machines[process] for process in self._rank_of]
        setup = msgspec.structs.replace(
            start.setup,
            links=links_inside(start.setup.links, start.setup.rank, machines),
            timed_groups=groups_inside(start.setup.timed_groups, start.setup.groups, machines),
        )
        self._worker = Worker(setup, start.tensors, trained, recipe, self._rank_of)

    # --- the Workers protocol ---

    def install(self, name: str, programs: Sequence[RankProgram]) -> None:
        """Make a program ready on this rank."""
        if self._worker is not None:
            self._worker.install(name, programs[self._worker.setup.rank])

    def step(
        self,
        name: str,
        inputs: Sequence[Mapping[str, torch.Tensor]],
        number: int,
        profile: bool = False,
    ) -> list[StepResult]:
        """Run a program once; every process gets all ranks' results."""
        message = Message("idle")
        if self._worker is not None:
            result = self._worker.step(name, inputs[self._worker.setup.rank], number, profile)
            message = step_message(result)
        return [read_step(answer) for answer in self._exchange(message)]

    def read(self, labels: Sequence[Sequence[str]]) -> list[dict[str, torch.Tensor]]:
        """Tensors by label from every rank."""
        return self._gather(labels, lambda worker, names: worker.read(names))

    def gradients(self, labels: Sequence[Sequence[str]]) -> list[dict[str, torch.Tensor]]:
        """Gradients by label from every rank."""
        return self._gather(labels, lambda worker, names: worker.gradients(names))

    def write(self, tensors: Sequence[Mapping[str, torch.Tensor]]) -> None:
        """Overwrite tensors by label on this rank."""
        if self._worker is not None:
            self._worker.write(tensors[self._worker.setup.rank])

    @property
    def is_first(self) -> bool:
        """Whether this is the first process."""
        return dist.get_rank() == 0

    def meet(self) -> None:
        """Wait for all processes."""
        exchange(Message("idle"))

    def save(
        self, folder: str, labels: Sequence[Sequence[str]], apart: Sequence[Collection[str]]
    ) -> list[Part]:
        """Write this rank's part of a checkpoint; every process learns of all parts."""
        message = Message("idle")
        if self._worker is not None:
            rank = self._worker.setup.rank
            part = self._worker.save(folder, labels[rank], apart[rank])
            message = Message("part", encode(part))
        return [msgspec.convert(answer.data, Part) for answer in self._exchange(message)]

    def kept(self, labels: Sequence[str]) -> list[dict[str, torch.Tensor]]:
        """One tensor from every rank, with what its optimiser keeps of it."""
        message = Message("idle")
        if self._worker is not None and labels[self._worker.setup.rank]:
            message = Message("tensors", tensors=self._worker.kept(labels[self._worker.setup.rank]))
        return [dict(answer.tensors) for answer in self._exchange(message)]

    def load(self, restored: Sequence[Restored]) -> None:
        """Read this rank's part of a checkpoint."""
        if self._worker is not None:
            self._worker.load(restored[self._worker.setup.rank])
        self.meet()

    def close(self) -> None:
        """End this rank's work; the process group stays, the user's script may go on using it."""
        if self._worker is not None:
            self._worker.close()
        self._worker = None
        self._closed = True
        atexit.unregister(self.close)

    def _gather(
        self,
        labels: Sequence[Sequence[str]],
        get: Callable[[Worker, Sequence[str]], dict[str, torch.Tensor]],
    ) -> list[dict[str, torch.Tensor]]:
        message = Message("idle")
        if self._worker is not None:
            own = get(self._worker, labels[self._worker.setup.rank])
            message = Message("tensors", tensors=own)
        return [dict(answer.tensors) for answer in self._exchange(message)]

    def _exchange(self, message: Message) -> list[Message]:
        """Every rank's message, in rank order."""
        if self._closed:
            raise RunError("This job was closed. Compile the model again.")
        answers = exchange(message)
        return [answers[process] for process in self._rank_of]


@functools.cache
def _end_with_torchrun() -> None:
    """Once in a process, however many jobs it runs."""
    end_with_parent()


def _leave() -> None:
    """Destroy the process group that `join` made; its threads must not outlive the interpreter."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _fingerprint(tensor: torch.Tensor) -> int:
    """A number that tells tensors apart by their bytes."""
    digest = hashlib.blake2b(raw_bytes(tensor), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def exchange(message: Message) -> list[Message]:
    """Every process's message on every process, in process order; one collective if all are short."""
    packed = pack(message)
    start = bytearray(len(packed).to_bytes(_SIZE_BYTES, "big")) + packed[:_SHORT_BYTES]
    parts = _all_gather(start, _SIZE_BYTES + _SHORT_BYTES)
    sizes = [int.from_bytes(part[:_SIZE_BYTES], "big") for part in parts]
    if max(sizes) > _SHORT_BYTES:
        parts = _all_gather(packed, max(sizes))
    else:
        parts = [part[_SIZE_BYTES:] for part in parts]
    return [unpack(part[:size]) for part, size in zip(parts, sizes, strict=True)]


def _all_gather(content: bytearray, num_bytes: int) -> list[memoryview]:
    """Every process's bytes, filled up to the same number."""
    padded = torch.zeros(num_bytes, dtype=torch.uint8)
    padded[: len(content)] = torch.frombuffer(content, dtype=torch.uint8)
    gathered = [torch.empty_like(padded) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, padded)
    return [memoryview(bytearray(part.numpy().data)) for part in gathered]
