"""Runs a rank's list of actions: receives posted ahead, direct edges between any two stages.

The forward of a stage is its own autograd graph. Backward starts from the gradients that later stages
send back (and from the loss in the stage that makes it) and ends at the values received from earlier
stages, whose gradients are sent on. It may be done in two halves (`deferral`). A rank may hold several
stages; what they send each other stays where it is.
"""

import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from graphpar.ir.graph import Graph
from graphpar.ir.text import parse_graph
from graphpar.runtime.casts import LowerWeights
from graphpar.runtime.clocks import StepClock
from graphpar.runtime.deferral import Deferral
from graphpar.runtime.emulate import Pace
from graphpar.runtime.gradient_rows import GradientRows
from graphpar.runtime.in_step import Meetings
from graphpar.runtime.lower import Message, StageBuilder, StageInterface
from graphpar.runtime.pieces import in_place, sliced, whole_size
from graphpar.runtime.program import WHOLE, RankProgram, StepReport
from graphpar.runtime.random import StepContext
from graphpar.runtime.scaling import LossScaler
from graphpar.runtime.tail import Tail, Whole
from graphpar.runtime.team import Team
from graphpar.runtime.transport import Arrival, Transport
from graphpar.runtime.zero import Shards, in_turns
from graphpar.schedule import Action
from graphpar.schedule.simulate import SUM_BYTES

_POST_AHEAD = 2
"""Receives posted before they are needed; one would stall the sender, many would hold memory."""


@dataclass
class _InFlight:
    """What one microbatch leaves between its forward and its backward."""

    received: dict[int, torch.Tensor]
    sent: dict[int, torch.Tensor]
    loss: torch.Tensor | None
    collected: tuple[torch.Tensor, ...] = ()


@dataclass
class StepResult:
    """What a rank has after a step: results by (place among all results, microbatch)."""

    results: dict[tuple[int, int], torch.Tensor]
    report: StepReport


@dataclass
class _Step:
    """State of one step."""

    inputs: Mapping[str, torch.Tensor]
    clock: StepClock
    start_s: float
    posted: dict[Action, list[Arrival | None]] = field(default_factory=dict)
    to_post: deque[Action] = field(default_factory=deque)
    handed_over: dict[int, torch.Tensor] = field(default_factory=dict)
    arrived: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)
    gradients: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)
    outgoing: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)
    returning: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)
    in_flight: dict[tuple[int, int], _InFlight] = field(default_factory=dict)
    collected: dict[int, tuple[torch.Tensor, ...]] = field(default_factory=dict)
    whole: Whole | None = None
    results: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)


class Executor:
    """One rank's part of one schedule.

    Args:
        program: What to do.
        tensors: The rank's parameters, buffers and constants by label.
        transport: The way to other ranks.
        device: Where to compute.
        seed: Seed of the keyed random streams.
        pace: Stretches computing for an emulated device.
        optimizer: Called for the optimiser step; None for inference.
        lower_weights: The rank's weights in lower formats, shared by all its programs.
        scaler: What the loss is multiplied with; None where it is not.
        team: The rank's tensor group; None where it works alone.
        shards: Weights of which the rank steps some rows alone; None where there are none.
    """

    def __init__(
        self,
        program: RankProgram,
        tensors: Mapping[str, torch.Tensor],
        transport: Transport,
        device: torch.device,
        seed: int,
        pace: Pace,
        optimizer: Callable[[], None] | None = None,
        lower_weights: LowerWeights | None = None,
        scaler: LossScaler | None = None,
        team: Team | None = None,
        shards: Shards | None = None,
    ) -> None:
        self.program = program
        self.transport = transport
        self.pace = pace
        self.context = StepContext(seed=seed)
        graph = parse_graph(program.graph)
        self.team = team
        self.member, self.width = (0, 1) if team is None else (team.member, team.size)
        self._teams = {members[0]: members for members in program.teams}
        meetings = Meetings(program.meetings, transport, program.rank) if program.meetings else None
        self.actions = tuple(Action.parse(token) for token in program.actions)
        halves = {action.stage for action in self.actions if action.kind == "I"}
        self._deferrals = {stage: Deferral() for stage in halves}
        self.builders = {
            program.first_stage + stage: StageBuilder(
                graph,
                stage,
                tensors,
                device,
                self.context,
                lower_weights,
                team,
                program.recompute,
                self._deferrals.get(program.first_stage + stage),
                meetings,
            )
            for stage in program.stages
        }
        self.interfaces = {stage: builder.interface for stage, builder in self.builders.items()}
        self.device = device
        self._optimizer = optimizer
        self._scaler = scaler
        self._tensors = tensors
        self._shards = shards or Shards({}, {}, {}, transport)
        self._rows: GradientRows | None = None
        if program.scatter is not None and any(action.kind == "A" for action in self.actions):
            self._rows = GradientRows(program.scatter, self._shards, transport, pace)
        self._types = _types(graph, self.interfaces.values())
        self._tails = {s: tail for s, b in self.builders.items() if (tail := Tail.of(b, program, team))}
        self._own = tuple(
            a.microbatch
            for a in self.actions
            if a.kind == "F" and a.microbatch is not None and a.stage in self._tails
        )
        self._running: _Step | None = None
        self._run: dict[str, Callable[[_Step, Action], None]] = {
            "R": self._receive,
            "F": self._forward,
            "S": self._send,
            "G": self._receive_gradient,
            "B": self._backward,
            "I": self._backward_of_inputs,
            "W": self._backward_of_weights,
            "D": self._send_gradient,
            "A": self._reduce,
            "O": self._optimize,
        }

    def step(self, inputs: Mapping[str, torch.Tensor], number: int) -> StepResult:
        """Run all actions once.

        Args:
            inputs: Graph inputs by label; per microbatch as `label@number`, of the whole batch as
                `label@whole`, shared ones as `label`.
            number: Which step this is; keys the random streams.
        """
        self.context.step = number
        self.context.batch = self.program.batch
        own = {k: v.to(self.device) for k, v in inputs.items()}
        state = _Step(own, StepClock(self.device), self.pace.now_s())
        state.to_post.extend(a for a in self.actions if a.kind in "RG")
        self._running = state
        self._post_ahead(state)
        dividing = self._rows.step() if self._rows is not None else nullcontext()
        with torch.set_grad_enabled(self.program.training), dividing:
            for action in self.actions:
                began = time.monotonic()
                self._run[action.kind](state, action)
                state.clock.note(str(action), began)
        self.transport.flush()
        state.clock.finish()
        self._running = None
        return StepResult(state.results, self._report(state))

    def so_far(self) -> StepReport | None:
        """What was done of a step that has not ended, or never will; None between steps.

        Another thread may ask while the step runs.
        """
        state = self._running
        return self._report(state) if state is not None else None

    def _report(self, state: _Step) -> StepReport:
        events = state.clock.events()
        return StepReport(-1, state.start_s, time.monotonic(), events, peak_bytes(self.device))

    # --- messages ---

    def _tag(self, message: Message, microbatch: int, backward: bool) -> int:
        return (2 * message.tag + backward) * len(self.program.sizes) + microbatch

    def _stays(self, message: Message) -> bool:
        """Whether the other stage is on this rank too."""
        return self.program.first_stage + message.stage in self.builders

    def _peer(self, message: Message, microbatch: int) -> int:
        """The rank of the other stage to hear from: of a tensor group, by place modulo width."""
        team = self._team(self.program.routes[microbatch][message.stage])
        return team[self.member % len(team)]

    def _peers(self, message: Message, microbatch: int) -> list[int]:
        """The ranks of the other stage that this one sends to: those that will look for it here."""
        team = self._team(self.program.routes[microbatch][message.stage])
        return list(team[self.member :: self.width])

    def _team(self, leader: int) -> tuple[int, ...]:
        return self._teams.get(leader, (leader,))

    def _post_ahead(self, state: _Step) -> None:
        while state.to_post and len(state.posted) < _POST_AHEAD:
            action = state.to_post.popleft()
            assert action.microbatch is not None
            backward = action.kind == "G"
            face = self.interfaces[action.stage]
            messages = _gradients_back(face) if backward else face.receives
            state.posted[action] = [
                None if self._stays(message) else self._post(message, action.microbatch, backward)
                for message in messages
            ]

    def _post(self, message: Message, microbatch: int, backward: bool) -> Arrival:
        sizes, dtype = self._types[message.name]
        shape = sizes(self.program.sizes[microbatch])
        tag = self._tag(message, microbatch, backward)
        return self.transport.post(self._peer(message, microbatch), shape, dtype, tag)

    def _receive(self, state: _Step, action: Action) -> None:
        self._take_in(state, action, self.interfaces[action.stage].receives, state.arrived)

    def _receive_gradient(self, state: _Step, action: Action) -> None:
        self._take_in(state, action, _gradients_back(self.interfaces[action.stage]), state.gradients)

    def _take_in(
        self,
        state: _Step,
        action: Action,
        messages: Sequence[Message],
        into: dict[tuple[int, int], torch.Tensor],
    ) -> None:
        assert action.microbatch is not None
        arrivals = state.posted.pop(action)
        self._post_ahead(state)
        for message, arrival in zip(messages, arrivals, strict=True):
            tag = self._tag(message, action.microbatch, backward=action.kind == "G")
            value = state.handed_over.pop(tag) if arrival is None else arrival.wait()
            into[message.tag, action.microbatch] = value

    def _send(self, state: _Step, action: Action) -> None:
        self._give_out(state, action, self.interfaces[action.stage].sends, state.outgoing)

    def _send_gradient(self, state: _Step, action: Action) -> None:
        messages = [m for m in self.interfaces[action.stage].receives if m.has_gradient]
        self._give_out(state, action, messages, state.returning)

    def _give_out(
        self,
        state: _Step,
        action: Action,
        messages: Sequence[Message],
        values: dict[tuple[int, int], torch.Tensor],
    ) -> None:
        assert action.microbatch is not None
        for message in messages:
            value = values.pop((message.tag, action.microbatch))
            tag = self._tag(message, action.microbatch, backward=action.kind == "D")
            if self._stays(message):
                state.handed_over[tag] = value.detach()
                continue
            for peer in self._peers(message, action.microbatch):
                self.transport.send(peer, value, tag)

    # --- computing ---

    def _forward(self, state: _Step, action: Action) -> None:
        number = action.microbatch
        assert number is not None
        size = self._at_microbatch(number)
        face = self.interfaces[action.stage]
        received = {m.tag: state.arrived.pop((m.tag, number)) for m in face.receives}
        if self.program.training:
            for message in face.receives:
                if message.has_gradient:
                    received[message.tag].requires_grad_()
        module = self.builders[action.stage].module(size, self.program.batch)
        inputs = [self._input(state, label, number) for label in face.inputs]
        with self.pace.work():
            sends, results = module(*inputs, *received.values())
        results, collected = results[: len(face.results)], results[len(face.results) :]
        sent = {m.tag: value for m, value in zip(face.sends, sends, strict=True)}
        state.outgoing.update({(tag, number): value for tag, value in sent.items()})
        if self.member == 0:
            for (place, _), value in zip(face.results, results, strict=True):
                state.results[place, number] = value.detach()
        if self.program.training:
            loss = results[0] if results else None
            state.in_flight[action.stage, number] = _InFlight(received, sent, loss, collected)
        tail = self._tails.get(action.stage)
        if tail is not None:
            state.collected[number] = tuple(value.detach() for value in collected)
            if number == self._own[-1]:
                self._run_tail(state, tail)

    def _run_tail(self, state: _Step, tail: Tail) -> None:
        """All own forwards are done: give and get what the tail collects, then run it."""
        own = [{n: state.collected[n][i] for n in self._own} for i in range(len(tail.collects))]
        state.collected.clear()
        parts = tail.exchange(own, self.transport)
        inputs = [self._input(state, label, WHOLE) for label in tail.inputs]
        self.context.first_sample, self.context.samples = 0, self.program.batch
        with self.pace.work():
            state.whole = tail.run(parts, inputs, self.program.training)
            if self.program.training:
                tail.backward(state.whole, self._loss_scale, self._own)
        if 0 in self._own and self.member == 0:
            for place, value in state.whole.results.items():
                state.results[place, 0] = value.detach()

    def _at_microbatch(self, number: int) -> int:
        """Tell random ops where in the batch they are; returns the microbatch's size."""
        self.context.first_sample = self.program.first_samples[number]
        self.context.samples = self.program.sizes[number]
        return self.program.sizes[number]

    def _input(self, state: _Step, label: str, number: int | str) -> torch.Tensor:
        own = state.inputs.get(f"{label}@{number}")
        return own if own is not None else state.inputs[label]

    def _backward(self, state: _Step, action: Action) -> None:
        if action.stage in self._deferrals:
            self._backward_of_inputs(state, action)
            self._backward_of_weights(state, action)
        else:
            self._follow_back(state, action)

    def _follow_back(self, state: _Step, action: Action) -> None:
        number = action.microbatch
        assert number is not None
        face = self.interfaces[action.stage]
        kept = state.in_flight.pop((action.stage, number))
        self._at_microbatch(number)  # units that are computed again draw the same bits again
        roots, gradients = self._roots(state, face, kept, number)
        dividing = self._rows.backward(number) if self._rows is not None else nullcontext()
        with self.pace.work(), dividing:
            if roots:
                torch.autograd.backward(roots, gradients)
        for message in face.receives:
            if message.has_gradient:
                value = kept.received[message.tag]
                state.returning[message.tag, number] = (
                    value.grad if value.grad is not None else torch.zeros_like(value)
                )

    def _backward_of_inputs(self, state: _Step, action: Action) -> None:
        assert action.microbatch is not None
        with self._deferrals[action.stage].noting(action.microbatch):
            self._follow_back(state, action)

    def _backward_of_weights(self, state: _Step, action: Action) -> None:
        assert action.microbatch is not None
        with self.pace.work():
            self._deferrals[action.stage].settle(action.microbatch)

    def _roots(
        self, state: _Step, face: StageInterface, kept: _InFlight, number: int
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Tensors where backward starts, each once, with the sum of the gradients that came back."""
        totals: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for message in _gradients_back(face):
            value = kept.sent[message.tag]
            gradient = state.gradients.pop((message.tag, number))
            if value.requires_grad:
                before = totals.get(id(value))
                totals[id(value)] = (value, gradient if before is None else before[1] + gradient)
        tail = self._tails.get(self.program.first_stage + face.stage)
        if tail is not None and state.whole is not None:
            gradients = tail.gradients(state.whole, number)
            for value, given in zip(kept.collected, gradients, strict=True):
                if value.requires_grad and given is not None:
                    before = totals.get(id(value))
                    totals[id(value)] = (value, given if before is None else before[1] + given)
        if kept.loss is not None and kept.loss.requires_grad:
            totals[id(kept.loss)] = (kept.loss, torch.full_like(kept.loss, self._loss_scale))
        return [v for v, _ in totals.values()], [g for _, g in totals.values()]

    @property
    def _loss_scale(self) -> float:
        return self._scaler.scale if self._scaler is not None else 1.0

    # --- after the last backward ---

    def _reduce(self, state: _Step, action: Action) -> None:
        """Sum the gradients of parameters that other ranks hold too."""
        if self._rows is not None:
            self._rows.finish()
        divided = self._rows.labels if self._rows is not None else frozenset()
        buckets: dict[tuple[int, torch.dtype], list[str]] = {}
        for label, group in sorted(self.program.shared.items()):
            if label not in divided or not self._shards.sums_rows(label, group):
                buckets.setdefault((group, self._tensors[label].dtype), []).append(label)
        for (group, _), every in sorted(buckets.items(), key=lambda item: item[0][0]):
            by_rows = [label for label in every if self._shards.sums_rows(label, group)]
            labels = [label for label in every if label not in by_rows]
            if by_rows:
                self._shards.sum_rows(by_rows)
            for some in in_turns(labels, self._summed_bytes, SUM_BYTES):
                self._shards.make_whole(label for label in some if label in divided)
                self._sum(some, group)
                self._shards.keep_rows(some)

    def _summed_bytes(self, label: str) -> int:
        """Bytes of a parameter's gradient in a sum; the same on all ranks that take part."""
        cut, num_bytes = self.program.slices.get(label), self._tensors[label].nbytes
        if label not in self.program.spread or cut is None:
            return num_bytes
        return whole_size(num_bytes, cut)

    def _sum(self, labels: Sequence[str], group: int) -> None:
        given = [self._given(label) for label in labels]
        flat = torch.cat([g.reshape(-1) for g in given]) if len(given) > 1 else given[0].reshape(-1)
        total = self.transport.sum(flat, group)
        parts = torch.split(total, [g.numel() for g in given])
        for label, whole, part in zip(labels, given, parts, strict=True):
            self._tensors[label].grad = self._taken(label, part.view_as(whole))

    def _given(self, label: str) -> torch.Tensor:
        """What the rank adds to a sum: its gradient, in its place where others hold other slices."""
        parameter, cut = self._tensors[label], self.program.slices.get(label)
        gradient = parameter.grad
        if gradient is None or label in self.program.silent:
            gradient = torch.zeros_like(parameter)
        if label in self.program.spread and cut is not None:
            return in_place(gradient, cut)
        return gradient

    def _taken(self, label: str, total: torch.Tensor) -> torch.Tensor:
        """The rank's part of a sum."""
        cut = self.program.slices.get(label)
        if label not in self.program.spread or cut is None:
            return total
        return sliced(total, cut)

    def _optimize(self, state: _Step, action: Action) -> None:
        if self._optimizer is not None:
            with self.pace.work():
                self._optimizer()


def _gradients_back(face: StageInterface) -> list[Message]:
    return [m for m in face.sends if m.has_gradient]


def _types(
    graph: Graph, faces: Iterable[StageInterface]
) -> dict[str, tuple[Callable[[int], tuple[int, ...]], torch.dtype]]:
    """For each message a function from microbatch size to shape, and the dtype."""
    return {
        m.name: (graph[m.name].type.sizes, getattr(torch, graph[m.name].type.dtype))
        for face in faces
        for m in (*face.receives, *face.sends)
    }


CONTEXT_BYTES = 0.8e9
"""What a process takes of a CUDA device besides, which torch cannot tell: by nvidia-smi on an H200, torch
2.11, 2026-11-26, beside an allocator that had handed out 0.5 GB."""


def peak_bytes(device: torch.device) -> int:
    """Largest memory so far: of the process on a CPU; on a GPU what the allocator took from the device,
    and `CONTEXT_BYTES`."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_reserved(device) + CONTEXT_BYTES)
    scale: Any = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale)
