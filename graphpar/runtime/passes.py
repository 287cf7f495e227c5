"""Passes over a model's stages in one process, timed stage by stage: what a profile is made of."""

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch

from graphpar.ir.text import parse_graph
from graphpar.runtime.casts import LowerWeights
from graphpar.runtime.clocks import Clock
from graphpar.runtime.deferral import Deferral
from graphpar.runtime.emulate import Pace
from graphpar.runtime.lower import Message, StageBuilder
from graphpar.runtime.program import RankProgram
from graphpar.runtime.random import StepContext

Spent = list[tuple[float, ...]]
"""Forward and backward seconds of every stage of a pass; in halves, those of both backwards."""


class Passes:
    """Runs all stages of a lowered graph one after another, forward and back, for one microbatch.

    Args:
        program: A rank's program; of it the graph, and whether it trains.
        num_stages: Stages of that graph.
        tensors: Parameters, buffers and constants by label.
        device: Where they lie, and the passes run.
        clock: Tells the time there.
        in_halves: Whether gradients of weights are made apart, as in schedules that do so.
    """

    def __init__(
        self,
        program: RankProgram,
        num_stages: int,
        tensors: Mapping[str, torch.Tensor],
        device: torch.device,
        clock: Clock,
        in_halves: bool = False,
    ) -> None:
        graph = parse_graph(program.graph)
        self._device, self._tensors = device, tensors
        self._context = StepContext()
        self._training = program.training
        self._clock = clock
        self._deferral = Deferral() if in_halves else None
        self._lower = [LowerWeights() for _ in range(num_stages)]
        self._builders = [
            StageBuilder(graph, stage, tensors, device, self._context, lower, deferral=self._deferral)
            for stage, lower in enumerate(self._lower)
        ]

    def run(
        self,
        inputs: Mapping[str, torch.Tensor],
        size: int,
        slowdowns: Sequence[float],
        in_flight: int = 1,
        whole_step: bool = False,
    ) -> list[Spent]:
        """Seconds of every stage for each microbatch; gradients are added to those at hand.

        Between stages it waits as workers do that are slowed down, by a number for each stage; that does
        not count. Of several microbatches in flight all (alike) go forward before the first goes back,
        stage by stage, as each stage has a device of its own. With `whole_step` they are those of a step:
        there are no gradients before the first, and it casts the weights anew.
        """
        context, inputs = self._context, {k: v.to(self._device) for k, v in inputs.items()}
        context.step, context.batch, context.first_sample, context.samples = 0, size, 0, size
        if whole_step:
            for lower in self._lower:
                lower.forget()
            for tensor in self._tensors.values():
                tensor.grad = None
        with torch.set_grad_enabled(self._training):
            paces = [Pace(slowdown, 1) for slowdown in slowdowns]
            passes = [_Pass(self._clock, inputs, size, paces, self._deferral) for _ in range(in_flight)]
            for number, builder in enumerate(self._builders):
                for running in passes:
                    running.forward(builder, number)
            for number in reversed(range(len(self._builders))) if self._training else ():
                for running in passes:
                    running.backward(number)
            for running in passes if self._deferral is not None else ():
                running.weights()
        return [running.spent() for running in passes]


@dataclass
class _Ran:
    """What a stage's forward leaves for its backward."""

    builder: StageBuilder
    received: dict[int, torch.Tensor]
    sent: dict[int, torch.Tensor]
    loss: torch.Tensor | None


@dataclass
class _Pass:
    """One microbatch on its way through the stages and back."""

    clock: Clock
    inputs: Mapping[str, torch.Tensor]
    size: int
    paces: Sequence[Pace]
    deferral: Deferral | None = None
    values: dict[int, torch.Tensor] = field(default_factory=dict)
    gradients: dict[int, torch.Tensor] = field(default_factory=dict)
    ran: list[_Ran] = field(default_factory=list)
    forward_s: list[float] = field(default_factory=list)
    backward_s: list[float] = field(default_factory=list)
    weights_s: list[float] = field(default_factory=list)

    def forward(self, builder: StageBuilder, number: int) -> None:
        """Run the next stage on what earlier ones sent."""
        face = builder.interface
        module = builder.module(self.size, self.size)
        received = {m.tag: _detached(self.values.pop(m.tag), m) for m in face.receives}
        given = [self.inputs[label] for label in face.inputs]
        with self._work(number):
            began_s = self.clock()
            sends, results = module(*given, *received.values())
            if face.tail is not None:
                collected = results[len(face.results) :]
                whole = builder.tail(self.size)
                _, last = whole(*(self.inputs[label] for label in face.tail.inputs), *collected)
                results = (*last, *results[: len(face.results)])
            self.forward_s.append(self.clock() - began_s)
        sent = {m.tag: value for m, value in zip(face.sends, sends, strict=True)}
        self.values.update(sent)
        self.ran.append(_Ran(builder, received, sent, results[0] if results else None))

    def backward(self, number: int) -> None:
        """Run a stage backward from the gradients that later ones left."""
        ran = self.ran[number]
        with self._work(number):
            began_s = self.clock()
            roots = self._roots(ran)
            noting = self.deferral.noting(id(self)) if self.deferral is not None else nullcontext()
            with noting:
                if roots:
                    torch.autograd.backward([v for v, _ in roots], [g for _, g in roots])
            self.backward_s.insert(0, self.clock() - began_s)
        grads = ((tag, value.grad) for tag, value in ran.received.items())
        self.gradients.update({tag: grad for tag, grad in grads if grad is not None})
        ran.received, ran.sent, ran.loss = {}, {}, None

    def spent(self) -> Spent:
        """Seconds of every stage, once it is through."""
        backward_s = self.backward_s or [0.0] * len(self.forward_s)
        if self.deferral is None:
            return list(zip(self.forward_s, backward_s, strict=True))
        return list(zip(self.forward_s, backward_s, self.weights_s, strict=True))

    def _work(self, number: int) -> AbstractContextManager[None]:
        """Work of a stage's own device, which has waited for the stages before."""
        self.paces[number].restart(time.monotonic())
        return self.paces[number].work()

    def weights(self) -> None:
        """Make the gradients of weights that the backward of its one stage has left for later."""
        assert self.deferral is not None
        with self._work(0):
            began_s = self.clock()
            self.deferral.settle(id(self))
            self.weights_s.append(self.clock() - began_s)

    def _roots(self, ran: _Ran) -> Sequence[tuple[torch.Tensor, torch.Tensor]]:
        """Where backward starts, each tensor once with the sum of what came back for it."""
        roots: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for message in ran.builder.interface.sends:
            value = ran.sent[message.tag]
            gradient = self.gradients.pop(message.tag, None)
            if gradient is not None and value.requires_grad:
                before = roots.get(id(value))
                roots[id(value)] = (value, gradient if before is None else before[1] + gradient)
        if ran.loss is not None and ran.loss.requires_grad:
            roots[id(ran.loss)] = (ran.loss, torch.ones_like(ran.loss))
        return list(roots.values())


def _detached(value: torch.Tensor, message: Message) -> torch.Tensor:
    """The value as if it had come from another process."""
    own = value.detach()
    return own.requires_grad_() if message.has_gradient and torch.is_grad_enabled() else own
