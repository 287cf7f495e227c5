"""Local workers: forked from a zygote, driven over private sockets, never left behind."""

import atexit
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch

from graphpar.errors import RunError
from graphpar.runtime.executor import StepResult
from graphpar.runtime.messages import Message, receive, send
from graphpar.runtime.program import RankProgram, StepReport, encode
from graphpar.runtime.workers import RankStart

_GRACE_S = 1.0
"""After a first failure, how long to listen for the one at its root."""
_END_S = 5.0
"""How long workers get to end by themselves before they are killed."""


class _Zygote:
    """The process that forks workers; one per driver process, started when first needed."""

    _current: "_Zygote | None" = None

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        root = str(Path(__file__).resolve().parents[2])
        environment["PYTHONPATH"] = os.pathsep.join(
            [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        )
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "graphpar.runtime.zygote", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env=environment,
        )
        theirs.close()
        self.channel = ours
        self.exits: dict[int, int] = {}
        self.owner = os.getpid()
        self._expect("ready")
        atexit.register(self.close)

    @classmethod
    def get(cls) -> "_Zygote":
        """The living zygote of this process."""
        current = cls._current
        if current is None or current.owner != os.getpid() or current.process.poll() is not None:
            current = cls._current = cls()
        return current

    def fork(self) -> tuple[int, socket.socket]:
        """A new worker's process number and the driver's end of its channel."""
        ours, theirs = socket.socketpair()
        with theirs:
            send(self.channel, Message("fork"))
            socket.send_fds(self.channel, [b"f"], [theirs.fileno()])
        return int(self._expect("forked").data["pid"]), ours

    def poll(self, timeout_s: float = 0.0) -> None:
        """Take in notices of workers that ended."""
        while select.select([self.channel], [], [], timeout_s)[0]:
            self._note(receive(self.channel))
            timeout_s = 0.0

    def close(self) -> None:
        """End the zygote, and with it every worker."""
        if self.owner != os.getpid():
            return
        self.channel.close()
        try:
            self.process.wait(_END_S)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def _expect(self, kind: str) -> Message:
        while True:
            try:
                message = receive(self.channel)
            except EOFError as error:
                code = self.process.wait()
                raise RunError(
                    f"Local workers could not be started: the process that starts them ended with "
                    f"code {code}. See its message above; `graphpar doctor` checks the installation."
                ) from error
            if message.kind == kind:
                return message
            self._note(message)

    def _note(self, message: Message) -> None:
        if message.kind == "exited":
            self.exits[message.data["pid"]] = message.data["code"]


@dataclass
class _Process:
    rank: int
    device: str
    pid: int
    channel: socket.socket


class LocalWorkers:
    """One process per rank on this machine.

    Args:
        starts: What each rank starts with.
        trained: Labels of parameters to train, in the model's order.
        optimizer: The optimiser factory, pickled by cloudpickle; empty for inference.

    Raises:
        RunError: A worker could not be set up; none is left behind.
    """

    def __init__(
        self, starts: Sequence[RankStart], trained: Sequence[str], optimizer: bytes
    ) -> None:
        self._folder = tempfile.mkdtemp(prefix="graphpar-")
        self._failed: str = ""
        self._processes: list[_Process] = []
        self._zygote = _Zygote.get()
        try:
            for rank, start in enumerate(starts):
                pid, channel = self._zygote.fork()
                self._processes.append(_Process(rank, start.device_name, pid, channel))
            self._ask([self._setup_message(s, trained, optimizer) for s in starts])
        except BaseException:
            self._kill()
            raise

    def _setup_message(self, start: RankStart, trained: Sequence[str], optimizer: bytes) -> Message:
        setup = msgspec.structs.replace(
            start.setup, store=f"{self._folder}/rendezvous", path=tuple(sys.path)
        )
        data = {"setup": encode(setup), "trained": list(trained), "optimizer": optimizer}
        return Message("setup", data, start.tensors)

    # --- the Workers protocol ---

    def install(self, name: str, programs: Sequence[RankProgram]) -> None:
        """Make a program ready on every rank."""
        self._ask([Message("install", {"name": name, "program": encode(p)}) for p in programs])

    def step(
        self, name: str, inputs: Sequence[Mapping[str, torch.Tensor]], number: int
    ) -> list[StepResult]:
        """Run a program once on every rank."""
        data = {"name": name, "number": number}
        return [read_step(m) for m in self._ask([Message("step", data, i) for i in inputs])]

    def read(self, labels: Sequence[Sequence[str]]) -> list[dict[str, torch.Tensor]]:
        """Tensors by label from every rank."""
        replies = self._ask([Message("read", {"labels": list(names)}) for names in labels])
        return [dict(reply.tensors) for reply in replies]

    def gradients(self, labels: Sequence[Sequence[str]]) -> list[dict[str, torch.Tensor]]:
        """Gradients by label from every rank."""
        replies = self._ask([Message("gradients", {"labels": list(names)}) for names in labels])
        return [dict(reply.tensors) for reply in replies]

    def write(self, tensors: Sequence[Mapping[str, torch.Tensor]]) -> None:
        """Overwrite tensors by label on every rank."""
        self._ask([Message("write", {}, t) for t in tensors])

    def close(self) -> None:
        """Ask all workers to end, and kill those that do not."""
        for process in self._processes:
            try:
                send(process.channel, Message("close"))
            except OSError:
                continue
        self._wait_for_exits(_END_S)
        self._kill()

    @property
    def pids(self) -> tuple[int, ...]:
        """Process numbers of the workers, by rank."""
        return tuple(p.pid for p in self._processes)

    # --- asking and failing ---

    def _ask(self, messages: Sequence[Message]) -> list[Message]:
        if self._failed:
            raise RunError(f"This job ended earlier: {self._failed}")
        try:
            for process, message in zip(self._processes, messages, strict=True):
                try:
                    send(process.channel, message)
                except OSError:
                    self._raise_failure({process.rank: None})
            return self._collect()
        except KeyboardInterrupt:
            self._failed = "it was interrupted"
            self._kill()
            raise

    def _collect(self) -> list[Message]:
        replies: dict[int, Message] = {}
        waiting = {p.channel: p for p in self._processes}
        while waiting:
            ready, _, _ = select.select(list(waiting), [], [])
            bad: dict[int, Message | None] = {}
            for channel in ready:
                process = waiting.pop(channel)
                reply = _receive_or_none(channel)
                if reply is None or reply.kind == "error":
                    bad[process.rank] = reply
                else:
                    replies[process.rank] = reply
            if bad:
                self._raise_failure(self._listen_on(waiting, bad))
        return [replies[p.rank] for p in self._processes]

    def _listen_on(
        self, waiting: dict[socket.socket, _Process], bad: dict[int, Message | None]
    ) -> dict[int, Message | None]:
        """Hear the other failures too: the first to be noticed is rarely the cause."""
        until = time.monotonic() + _GRACE_S
        while waiting and (rest := until - time.monotonic()) > 0:
            for channel in select.select(list(waiting), [], [], rest)[0]:
                process = waiting.pop(channel)
                reply = _receive_or_none(channel)
                if reply is None or reply.kind == "error":
                    bad[process.rank] = reply
        return bad

    def _raise_failure(self, bad: Mapping[int, Message | None]) -> None:
        self._zygote.poll(0.2)
        rank, text = self._root_cause(bad)
        device = self._processes[rank].device
        self._failed = f"rank {rank} ({device}) {text}"
        self._kill()
        raise RunError(
            f"The job stopped because rank {rank} (device {device}) {text}\n"
            "All workers have been ended. Start the job again; if memory was the cause, plan with a "
            "smaller `memory_bytes` for that device.",
            rank=rank,
        )

    def _root_cause(self, bad: Mapping[int, Message | None]) -> tuple[int, str]:
        """A death comes before an error, an error of one's own before a lost connection."""
        dead = [rank for rank, reply in bad.items() if reply is None]
        if dead:
            code = self._zygote.exits.get(self._processes[dead[0]].pid)
            return dead[0], f"died: {_describe_exit(code)}."
        errors = {rank: reply.data for rank, reply in bad.items() if reply is not None}
        rank = min(errors, key=lambda r: (_is_echo(errors[r]), errors[r]["time_s"]))
        data = errors[rank]
        return rank, f"raised {data['type']}: {data['text']}\n{data['traceback']}"

    def _wait_for_exits(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while self._alive() and time.monotonic() < until:
            self._zygote.poll(0.05)

    def _alive(self) -> list[int]:
        return [p.pid for p in self._processes if p.pid not in self._zygote.exits]

    def _kill(self) -> None:
        for pid in self._alive():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self._wait_for_exits(_END_S)
        for process in self._processes:
            process.channel.close()
        self._processes = []
        shutil.rmtree(self._folder, ignore_errors=True)


def read_step(message: Message) -> StepResult:
    """The inverse of `worker.step_message`."""
    results = {}
    for name, tensor in message.tensors.items():
        place, _, number = name.partition("@")
        results[int(place), int(number)] = tensor
    return StepResult(results, msgspec.convert(message.data["report"], StepReport))


def _receive_or_none(channel: socket.socket) -> Message | None:
    try:
        return receive(channel)
    except EOFError:
        return None


def _is_echo(data: Mapping[str, Any]) -> bool:
    """Whether an error only tells that another rank is gone."""
    return any(
        sign in data["text"] for sign in ("Connection closed", "Connection reset", "Broken pipe", "EOF")
    )


def _describe_exit(code: int | None) -> str:
    if code is None:
        return "it closed its channel"
    if code < 0:
        name = signal.Signals(-code).name
        reason = " (often the system's answer to too little memory)" if name == "SIGKILL" else ""
        return f"killed by {name}{reason}"
    return f"it ended with exit code {code}"
