"""One rank at work: holds its tensors and programs, and answers the driver's commands.

Under torchrun the same `Worker` lives in the user's own process; in a local job it runs behind a
socket in a process of its own (`serve`).
"""

import os
import queue
import socket
import sys
import threading
import time
import traceback
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import cloudpickle
import msgspec
import torch
from torch import nn

from graphpar.errors import GraphparError
from graphpar.runtime.casts import LowerWeights
from graphpar.runtime.checkpoint import Part, Restored, restore_optimizer, write_part
from graphpar.runtime.clocks import work_clock
from graphpar.runtime.emulate import Pace
from graphpar.runtime.executor import Executor, StepResult
from graphpar.runtime.failed_op import place_of_failure
from graphpar.runtime.heap import go_on_behind_a_line
from graphpar.runtime.messages import Message, receive, send
from graphpar.runtime.optimizers import Recipe, made_as_intended
from graphpar.runtime.passes import Passes
from graphpar.runtime.player import Player
from graphpar.runtime.profiling import profiled
from graphpar.runtime.program import Kernel, RankProgram, Scene, StepReport, WorkerSetup, encode
from graphpar.runtime.scaling import LossScaler, is_finite
from graphpar.runtime.team import TransportTeam
from graphpar.runtime.tensor_files import read_tensor
from graphpar.runtime.transport import Transport, meet_on_this_machine
from graphpar.runtime.user_ops import load_code
from graphpar.runtime.weights import Origin, Weights
from graphpar.runtime.zero import Shards

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""A peer silent for this long is lost; deaths are noticed at once by other means."""
ALL_RANKS = 0
"""The first group holds every rank that has work."""


class Worker:
    """A rank's tensors, optimiser and programs.

    Args:
        setup: What the rank needs once.
        tensors: Its parameters, buffers and constants by label.
        trained: Labels of the parameters to train, in the model's order.
        recipe: Makes the optimiser; None when nothing is trained.
        ranks: For each rank of the job its rank in the process group.
    """

    def __init__(
        self,
        setup: WorkerSetup,
        tensors: Weights,
        trained: Sequence[str],
        recipe: Recipe | None,
        ranks: Sequence[int],
    ) -> None:
        self.setup = setup
        self.device = torch.device(setup.device)
        self.tensors: dict[str, torch.Tensor] = {}
        wanted = set(trained)
        for label in tensors:
            tensor = tensors.own(label, self.device)
            self.tensors[label] = nn.Parameter(tensor) if label in wanted else tensor
        self.trained = tuple(label for label in trained if label in self.tensors)
        self.pace = Pace(setup.slowdown, setup.threads)
        timed = setup.timed_groups
        self.transport = Transport(self.device, ranks, setup.groups, setup.links, self.pace, timed)
        self.shards = Shards(self.tensors, setup.shards, setup.shard_groups, self.transport)
        self._recipe = recipe
        self.optimizer = self._fresh_optimizer()
        self.scheduler = recipe.scheduled(self.optimizer) if recipe and self.optimizer else None
        self.executors: dict[str, Executor] = {}
        self.passes: dict[str, Passes] = {}
        self.lower_weights = LowerWeights()
        self.scaler = LossScaler() if setup.scales_loss else None
        self._grad_norm: float | None = None
        self._skipped = False
        self._wants_norm = False
        self._player: Player | None = None

    def _fresh_optimizer(self) -> torch.optim.Optimizer | None:
        """A new optimiser of the rank's parameters, where there is something to train."""
        if self._recipe is None:
            return None
        parameters = {label: self._parameter(label) for label in self.trained}
        setup = self.setup
        return made_as_intended(self._recipe, parameters, setup.own_settings, setup.settings)

    def install(self, name: str, program: RankProgram) -> None:
        """Make a program ready to run under a name."""
        load_code(program.imports, program.operators)
        step = (lambda: self._optimize(program)) if program.training else None
        self.executors[name] = Executor(
            program,
            self.tensors,
            self.transport,
            self.device,
            self.setup.seed,
            self.pace,
            step,
            self.lower_weights,
            self.scaler,
            self._team(program),
            self.shards,
        )

    def _team(self, program: RankProgram) -> TransportTeam | None:
        if program.team < 0:
            return None
        lines = [self._team_of(number) for number in program.lines]
        return self._team_of(program.team, lines)

    def _team_of(self, number: int, lines: Sequence[TransportTeam] = ()) -> TransportTeam:
        """The rank's view of one of its groups."""
        members = self.setup.groups[number]
        place = members.index(self.setup.rank)
        return TransportTeam(self.transport, number, place, len(members), lines)

    def step(
        self,
        name: str,
        inputs: Mapping[str, torch.Tensor],
        number: int,
        profile: bool = False,
        asked_s: float | None = None,
    ) -> StepResult:
        """Run a program once, under torch.profiler if wanted; all ranks were asked to at one time."""
        self.pace.restart(time.monotonic() if asked_s is None else asked_s)
        scale = self.scaler.scale if self.scaler is not None else None
        self._grad_norm, self._skipped = None, False
        self._wants_norm = self.setup.measures_norm and number == 0
        kernels: tuple[Kernel, ...] = ()
        if profile:
            result, kernels = profiled(lambda: self.executors[name].step(inputs, number), self.device)
        else:
            result = self.executors[name].step(inputs, number)
        report = msgspec.structs.replace(
            result.report,
            rank=self.setup.rank,
            grad_norm=self._grad_norm,
            loss_scale=scale,
            skipped=self._skipped,
            kernels=kernels,
        )
        return StepResult(result.results, report)

    def so_far(self) -> StepReport | None:
        """What was done of the step that runs, or failed; None if there is none."""
        for executor in list(self.executors.values()):
            report = executor.so_far()
            if report is not None:
                return msgspec.structs.replace(report, rank=self.setup.rank)
        return None

    def rehearse(self, scenes: Sequence[Scene]) -> StepReport:
        """Play a step without computing."""
        self._player = self._player or Player(self.transport, self.setup.rank)
        return self._player.play(scenes)

    def install_passes(self, name: str, program: RankProgram, num_stages: int, in_halves: bool) -> None:
        """Make ready to pass through all stages of a program's graph, for their times."""
        load_code(program.imports, program.operators)
        clock = work_clock(self.setup.threads, self.device)
        self.passes[name] = Passes(program, num_stages, self.tensors, self.device, clock, in_halves)

    def time_update(self) -> float:
        """Seconds of the optimiser's step, as a step of a job ends with it."""
        clock = work_clock(self.setup.threads, self.device)
        began_s = clock()
        if self.setup.max_grad_norm is not None:
            float(torch.nn.utils.get_total_norm(self._gradients(self.trained)))
            for gradient in self._gradients(self.trained):
                gradient.mul_(1.0)
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()
        return clock() - began_s

    def read(self, labels: Iterable[str]) -> dict[str, torch.Tensor]:
        """Copies of tensors by label."""
        return {label: self.tensors[label].detach().clone() for label in labels}

    def write(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Overwrite tensors by label; one the rank does not hold yet is added."""
        with torch.no_grad():
            for label, tensor in tensors.items():
                if label in self.tensors:
                    self.tensors[label].copy_(tensor)
                else:
                    self.tensors[label] = tensor.to(self.device, copy=True)

    def save(self, folder: str, labels: Iterable[str], apart: Collection[str]) -> Part:
        """Write tensors, and what the optimiser keeps of them, into a folder; a failure is told.

        Of those `apart`, which the rank holds a slice of, only the optimiser's settings are told.
        """
        settings: dict[int, dict[str, Any]] = {}
        for group in self.optimizer.param_groups if self.optimizer is not None else ():
            own = {key: value for key, value in group.items() if key != "params"}
            settings.update({id(parameter): own for parameter in group["params"]})
        tensors = {label: self.tensors[label] for label in labels}
        stepped = {label: self.shards.stepped(label, tensor) for label, tensor in tensors.items()}
        kept = {
            label: (self.optimizer.state.get(tensor, {}), settings[id(tensor)])
            for label, tensor in stepped.items()
            if self.optimizer is not None and id(tensor) in settings
        }
        scaler = (self.scaler.scale, self.scaler.good_steps) if self.scaler is not None else None
        try:
            part = write_part(folder, self.setup.rank, tensors, kept, apart)
        except OSError as error:
            return Part(failure=f"rank {self.setup.rank}: {error}")
        return msgspec.structs.replace(part, scaler=scaler)

    def kept(self, label: str) -> dict[str, torch.Tensor]:
        """A tensor, and under keys the tensors that the optimiser keeps of it."""
        tensor = self.shards.stepped(label, self.tensors[label])
        state = self.optimizer.state.get(tensor, {}) if self.optimizer is not None else {}
        inside = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
        return {"": tensor.detach().clone(), **inside}

    def load(self, restored: Restored) -> None:
        """Read tensors and the optimiser's state from a checkpoint."""
        with torch.no_grad():
            for label, stored in restored.model.items():
                self.tensors[label].copy_(read_tensor(stored, cut=restored.slices.get(label)))
        if self.optimizer is not None:
            labels = {id(self._parameter(label)): label for label in self.trained}
            restore_optimizer(self.optimizer, labels, restored)
            self._restore_schedule(restored.step)
        if self.scaler is not None and restored.scaler is not None:
            self.scaler.scale, self.scaler.good_steps = restored.scaler

    def _restore_schedule(self, step: int) -> None:
        """With a scheduler the settings are those of the user's functions after so many steps."""
        if self.optimizer is None or self._recipe is None or self.scheduler is None:
            return
        fresh = self._fresh_optimizer()
        assert fresh is not None
        for group, as_made in zip(self.optimizer.param_groups, fresh.param_groups, strict=True):
            members = group["params"]
            group.clear()
            group.update({**as_made, "params": members})
        self.scheduler = self._recipe.scheduled(self.optimizer, step)

    def gradients(self, labels: Iterable[str]) -> dict[str, torch.Tensor]:
        """Gradients of the last step by label, where they were kept."""
        kept = {la: self.shards.stepped(la, self.tensors[la]).grad for la in labels}
        return {label: g.detach().clone() for label, g in kept.items() if g is not None}

    def close(self) -> None:
        """End what runs beside the worker; it cannot be used any more."""
        self.transport.close()
        if self._player is not None:
            self._player.close()

    def _parameter(self, label: str) -> nn.Parameter:
        parameter = self.shards.stepped(label, self.tensors[label])
        assert isinstance(parameter, nn.Parameter)
        return parameter

    def _optimize(self, program: RankProgram) -> None:
        if self.scaler is not None and not self._unscale(program, self.scaler):
            self._skipped = True
        else:
            if self._wants_norm and self.setup.max_grad_norm is None:
                self._norm(program)
            if self.setup.max_grad_norm is not None:
                self._clip(program, self.setup.max_grad_norm)
            if self.optimizer is not None:
                self.optimizer.step()
            self.shards.gather()
            self.lower_weights.forget()
        if self.optimizer is not None:
            self.optimizer.zero_grad()
        if self.scheduler is not None:
            self.scheduler.step()

    def _unscale(self, program: RankProgram, scaler: LossScaler) -> bool:
        """Take the scale off all gradients; False where one overflowed, on whichever rank."""
        finite = is_finite(self._gradients(program.owned))
        overflows = torch.tensor(0.0 if finite else 1.0, dtype=torch.float64)
        overflowed = float(self.transport.sum(overflows, ALL_RANKS)) > 0
        if not overflowed:
            scaler.unscale(self._gradients(self.trained))
        scaler.update(overflowed=overflowed)
        return not overflowed

    def _gradients(self, labels: Iterable[str]) -> list[torch.Tensor]:
        found = (self.shards.stepped(label, self.tensors[label]).grad for label in labels)
        return [gradient for gradient in found if gradient is not None]

    def _clip(self, program: RankProgram, limit: float) -> None:
        """Clip by the norm over all ranks, each parameter counted once."""
        norm = self._norm(program)
        scale = limit / (norm + 1e-6)
        if scale >= 1.0:
            return
        # A norm that is no number spoils all gradients, as on one device.
        for gradient in self._gradients(self.trained):
            gradient.mul_(scale)

    def _norm(self, program: RankProgram) -> float:
        """The norm of all gradients of all ranks."""
        owned = torch.nn.utils.get_total_norm(list(self._gradients(program.owned)))
        square = owned.cpu().double().square()
        self._grad_norm = float(self.transport.sum(square, ALL_RANKS).sqrt())
        return self._grad_norm


def serve(channel: socket.socket) -> None:
    """Answer the driver until it closes the channel; the process ends with this function.

    A thread reads commands, so that the end of the driver is noticed in the midst of a computation. It
    also answers how far a step came, which the main thread cannot while it waits for a lost peer.
    """
    commands: queue.Queue[Message] = queue.Queue()
    worker: Worker | None = None
    sending = threading.Lock()

    def listen() -> None:
        try:
            while True:
                command = receive(channel)
                if command.kind == "so far":
                    with sending:
                        send(channel, _so_far(worker))
                else:
                    commands.put(command)
        except (EOFError, OSError):
            os._exit(1)

    threading.Thread(target=listen, name="graphpar-commands", daemon=True).start()
    while True:
        command = commands.get()
        if command.kind == "close":
            os._exit(0)
        try:
            if command.kind == "setup":
                worker = _set_up(command)
                reply = Message("ready")
            else:
                assert worker is not None
                reply = _answer(worker, command)
        except BaseException as error:
            reply = _failure(error)
        with sending:
            send(channel, reply)
        # Or a step's results would stay while the next one's are made.
        del command, reply


def _set_up(command: Message) -> Worker:
    setup = msgspec.convert(command.data["setup"], WorkerSetup)
    sys.path[:] = [*setup.path, *(p for p in sys.path if p not in setup.path)]
    torch.set_num_threads(setup.threads)
    meet_on_this_machine(setup.store, setup.rank, setup.world_size, COLLECTIVE_TIMEOUT)
    pickled = command.data["optimizer"]
    recipe = cloudpickle.loads(pickled) if pickled else None
    init = cloudpickle.loads(command.data["init"]) if command.data["init"] else None
    origins = msgspec.convert(command.data["origins"], dict[str, Origin])
    weights = Weights(dict(command.tensors), origins, init, received=True)
    return Worker(setup, weights, command.data["trained"], recipe, range(setup.world_size))


def _answer(worker: Worker, command: Message) -> Message:
    data: Mapping[str, Any] = command.data
    if command.kind == "install":
        first = not worker.executors
        worker.install(data["name"], msgspec.convert(data["program"], RankProgram))
        if first:
            # Later, for another batch size, the heap's end is what steps have freed: skipped, it is lost.
            go_on_behind_a_line()
        return Message("ready")
    if command.kind == "install passes":
        program = msgspec.convert(data["program"], RankProgram)
        worker.install_passes(data["name"], program, data["num_stages"], data["in_halves"])
        return Message("ready")
    if command.kind == "pass":
        passes = worker.passes[data["name"]]
        how = data["size"], data["slowdowns"], data["in_flight"], data["whole_step"]
        return Message("spent", {"spent": passes.run(command.tensors, *how)})
    if command.kind == "update":
        return Message("seconds", {"seconds": worker.time_update()})
    if command.kind == "step":
        asked = data["name"], command.tensors, data["number"], data["profile"], data["asked_s"]
        return step_message(worker.step(*asked))
    if command.kind == "rehearse":
        report = worker.rehearse(msgspec.convert(data["scenes"], tuple[Scene, ...]))
        return Message("report", {"report": encode(report)})
    if command.kind == "read":
        return Message("tensors", tensors=worker.read(data["labels"]))
    if command.kind == "write":
        worker.write(command.tensors)
        return Message("ready")
    if command.kind == "save":
        return Message("part", encode(worker.save(data["folder"], data["labels"], data["apart"])))
    if command.kind == "kept":
        label = data["label"]
        return Message("tensors", tensors=worker.kept(label) if label else {})
    if command.kind == "load":
        worker.load(msgspec.convert(data["restored"], Restored))
        return Message("ready")
    assert command.kind == "gradients", command.kind
    return Message("tensors", tensors=worker.gradients(data["labels"]))


def step_message(result: StepResult) -> Message:
    """A step's result as a message."""
    tensors = {f"{place}@{number}": t for (place, number), t in result.results.items()}
    return Message("result", {"report": encode(result.report)}, tensors)


def _so_far(worker: Worker | None) -> Message:
    report = worker.so_far() if worker is not None else None
    return Message("so far", {"report": encode(report) if report is not None else None})


def _failure(error: BaseException) -> Message:
    place = place_of_failure(error)
    return Message(
        "error",
        {
            "time_s": time.monotonic(),
            "type": type(error).__name__,
            "text": f"{error} (at {place})" if place else str(error),
            "traceback": "" if isinstance(error, GraphparError) else traceback.format_exc(),
        },
    )
