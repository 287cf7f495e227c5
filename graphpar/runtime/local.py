"""Local workers: forked from a zygote, driven over private sockets, never left behind."""

import contextlib
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any

import msgspec
import torch

from graphpar.errors import RunError
from graphpar.runtime.checkpoint import Part, Restored
from graphpar.runtime.executor import StepResult
from graphpar.runtime.fork_server import ForkServer
from graphpar.runtime.messages import Message, receive, send
from graphpar.runtime.passes import Spent
from graphpar.runtime.program import RankProgram, Scene, StepReport, encode
from graphpar.runtime.turns import Turn
from graphpar.runtime.weights import pickled_init
from graphpar.runtime.workers import RankStart

_GRACE_S = 1.0
"""After a first failure, how long to listen for the one at its root."""
_END_S = 5.0
"""How long workers get to end by themselves before they are killed."""


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

    def __init__(self, starts: Sequence[RankStart], trained: Sequence[str], optimizer: bytes) -> None:
        self._folder = tempfile.mkdtemp(prefix="graphpar-")
        self._ended: str = ""
        self._owner = os.getpid()
        self._turn = Turn()
        self._processes: list[_Process] = []
        self._server = ForkServer.get()
        try:
            for rank, start in enumerate(starts):
                pid, channel = self._server.fork()
                self._processes.append(_Process(rank, start.device_name, pid, channel))
            self._ask([self._setup_message(s, trained, optimizer) for s in starts])
        except BaseException:
            self._end("it could not be started")
            raise
        finally:
            # All have met, so that the rendezvous file has done its work.
            shutil.rmtree(self._folder, ignore_errors=True)

    def _setup_message(self, start: RankStart, trained: Sequence[str], optimizer: bytes) -> Message:
        path = tuple(entry or os.getcwd() for entry in sys.path)
        setup = msgspec.structs.replace(start.setup, store=f"{self._folder}/rendezvous", path=path)
        data = {
            "setup": encode(setup),
            "trained": list(trained),
            "optimizer": optimizer,
            "origins": {label: encode(origin) for label, origin in start.tensors.origins.items()},
            "init": pickled_init(start.tensors.init),
        }
        return Message("setup", data, start.tensors.here)

    # --- the Workers protocol ---

    def same_everywhere(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors as they are: there is one driver."""
        return dict(tensors)

    def install(self, name: str, programs: Sequence[RankProgram]) -> None:
        """Make a program ready on every rank."""
        self._ask([Message("install", {"name": name, "program": encode(p)}) for p in programs])

    def step(
        self,
        name: str,
        inputs: Sequence[Mapping[str, torch.Tensor]],
        number: int,
        profile: bool = False,
    ) -> list[StepResult]:
        """Run a program once on every rank."""
        data = {"name": name, "number": number, "profile": profile, "asked_s": time.monotonic()}
        return [read_step(m) for m in self._ask([Message("step", data, i) for i in inputs])]

    def install_passes(
        self, name: str, program: RankProgram, num_stages: int, in_halves: bool = False
    ) -> None:
        """Make ready to pass through all stages of a program's graph on every rank."""
        data = {
            "name": name,
            "program": encode(program),
            "num_stages": num_stages,
            "in_halves": in_halves,
        }
        self._ask([Message("install passes", data) for _ in self._processes])

    def time_pass(
        self,
        name: str,
        inputs: Mapping[str, torch.Tensor],
        size: int,
        slowdowns: Sequence[float],
        in_flight: int = 1,
        whole_step: bool = False,
    ) -> list[Spent]:
        """Seconds of every stage, for each microbatch of a pass on the first rank, with its waits."""
        data = {"name": name, "size": size, "slowdowns": list(slowdowns)}
        data |= {"in_flight": in_flight, "whole_step": whole_step}
        (reply, *_) = self._ask([Message("pass", data, inputs)])
        return [[tuple(seconds) for seconds in spent] for spent in reply.data["spent"]]

    def time_update(self) -> float:
        """Seconds of the optimiser's step on the first rank's gradients."""
        (reply, *_) = self._ask([Message("update")])
        return float(reply.data["seconds"])

    def rehearse(self, scenes: Sequence[Sequence[Scene]]) -> list[StepReport]:
        """Play a step without computing on every rank."""
        asked = [Message("rehearse", {"scenes": [encode(s) for s in own]}) for own in scenes]
        return [msgspec.convert(m.data["report"], StepReport) for m in self._ask(asked)]

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

    is_first = True

    def meet(self) -> None:
        """Nothing: there is one driver."""

    def save(
        self, folder: str, labels: Sequence[Sequence[str]], apart: Sequence[Collection[str]]
    ) -> list[Part]:
        """Let every rank write its part of a checkpoint."""
        asked = [
            Message("save", {"folder": folder, "labels": list(names), "apart": list(others)})
            for names, others in zip(labels, apart, strict=True)
        ]
        return [msgspec.convert(reply.data, Part) for reply in self._ask(asked)]

    def kept(self, labels: Sequence[str]) -> list[dict[str, torch.Tensor]]:
        """One tensor from every rank, with what its optimiser keeps of it."""
        replies = self._ask([Message("kept", {"label": label}) for label in labels])
        return [dict(reply.tensors) for reply in replies]

    def load(self, restored: Sequence[Restored]) -> None:
        """Let every rank read its part of a checkpoint."""
        self._ask([Message("load", {"restored": encode(part)}) for part in restored])

    def close(self) -> None:
        """Ask all workers to end, and kill those that do not; a forked process leaves them alone."""
        if self._owner != os.getpid():
            return
        for process in self._processes:
            with contextlib.suppress(OSError):
                send(process.channel, Message("close"))
        self._server.wait_for(self.pids, _END_S)
        self._end("it was closed")

    @property
    def pids(self) -> tuple[int, ...]:
        """Process numbers of the workers, by rank."""
        return tuple(p.pid for p in self._processes)

    # --- asking and failing ---

    def _ask(self, messages: Sequence[Message]) -> list[Message]:
        """One exchange with all workers; threads take turns, for a channel carries one at a time."""
        if self._owner != os.getpid():
            raise RunError(
                f"This job belongs to process {self._owner}, from which this one was forked: both would "
                "talk to its workers at once. Use the job there, or compile one here."
            )
        with self._turn:
            return self._exchanged(messages)

    def _exchanged(self, messages: Sequence[Message]) -> list[Message]:
        if self._ended:
            raise RunError(f"This job ended earlier: {self._ended}. Compile the model again.")
        try:
            for process, message in zip(self._processes, messages, strict=True):
                try:
                    send(process.channel, message)
                except OSError:
                    self._raise_failure({process.rank: None}, {})
            return self._collect()
        except BaseException as error:
            self._end(f"it was interrupted ({type(error).__name__})")
            raise

    def _collect(self) -> list[Message]:
        replies: dict[int, Message] = {}
        waiting: dict[Any, _Process] = {p.channel: p for p in self._processes}
        while waiting:
            bad: dict[int, Message | None] = {}
            for channel in wait(list(waiting)):
                process = waiting.pop(channel)
                reply = _receive_or_none(channel)
                if reply is None or reply.kind == "error":
                    bad[process.rank] = reply
                else:
                    replies[process.rank] = reply
            if bad:
                self._raise_failure(self._listen_on(waiting, bad), replies)
        return [replies[p.rank] for p in self._processes]

    def _listen_on(
        self, waiting: dict[Any, _Process], bad: dict[int, Message | None]
    ) -> dict[int, Message | None]:
        """Hear the other failures too: the first to be noticed is rarely the cause."""
        until = time.monotonic() + _GRACE_S
        while waiting and (rest := until - time.monotonic()) > 0:
            for channel in wait(list(waiting), rest):
                process = waiting.pop(channel)
                reply = _receive_or_none(channel)
                if reply is None or reply.kind == "error":
                    bad[process.rank] = reply
        return bad

    def _raise_failure(self, bad: Mapping[int, Message | None], done: Mapping[int, Message]) -> None:
        self._server.wait_for([self._processes[r].pid for r, reply in bad.items() if reply is None], 1.0)
        rank, text = self._root_cause(bad)
        reports = self._reports_so_far(done, {r for r, reply in bad.items() if reply is None})
        device = self._processes[rank].device
        self._end(f"rank {rank} ({device}) {text}")
        raise RunError(
            f"The job stopped because rank {rank} (device {device}) {text}\n"
            "All workers have been ended. Start the job again; if memory was the cause, plan with a "
            "smaller `memory_bytes` for that device.",
            rank=rank,
            reports=reports,
        )

    def _reports_so_far(self, done: Mapping[int, Message], dead: set[int]) -> tuple[StepReport, ...]:
        """What ranks did of their step: those that ended it, and the living as far as they answer."""
        told = dict(done)
        asked: dict[Any, _Process] = {}
        for process in self._processes:
            with contextlib.suppress(OSError):
                if process.rank not in dead | told.keys():
                    send(process.channel, Message("so far"))
                    asked[process.channel] = process
        until = time.monotonic() + _GRACE_S
        while asked and (rest := until - time.monotonic()) > 0:
            for channel in wait(list(asked), rest):
                reply = _receive_or_none(channel)
                if reply is not None and reply.kind == "error":
                    continue  # of the same failure; the answer comes behind it
                process = asked.pop(channel)
                if reply is not None:
                    told[process.rank] = reply
        reports = (told[rank].data.get("report") for rank in sorted(told))
        return tuple(msgspec.convert(report, StepReport) for report in reports if report)

    def _root_cause(self, bad: Mapping[int, Message | None]) -> tuple[int, str]:
        """A death comes before an error, an error of one's own before a lost connection."""
        dead = [rank for rank, reply in bad.items() if reply is None]
        if dead:
            code = self._server.exit_code(self._processes[dead[0]].pid)
            return dead[0], f"died: {_describe_exit(code)}."
        errors = {rank: reply.data for rank, reply in bad.items() if reply is not None}
        rank = min(errors, key=lambda r: (_is_echo(errors[r]), errors[r]["time_s"]))
        data = errors[rank]
        return rank, f"raised {data['type']}: {data['text']}\n{data['traceback']}"

    def _end(self, why: str) -> None:
        """Kill what still lives; the first reason given is the one that is told later."""
        self._ended = self._ended or why
        for pid in self._server.wait_for(self.pids, 0.0):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._server.wait_for(self.pids, _END_S)
        for process in self._processes:
            process.channel.close()
        self._processes = []


def read_step(message: Message) -> StepResult:
    """The inverse of `worker.step_message`."""
    results = {}
    for name, tensor in message.tensors.items():
        place, _, number = name.partition("@")
        results[int(place), int(number)] = tensor
    return StepResult(results, msgspec.convert(message.data["report"], StepReport))


def _receive_or_none(channel: Any) -> Message | None:
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
