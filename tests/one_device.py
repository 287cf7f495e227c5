"""Run a captured model on one device, whole or in parts, and compare it with eager PyTorch."""

import copy
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from graphpar.frontend.capture import Captured, capture
from graphpar.frontend.export import find_loss
from graphpar.ir.graph import Graph
from graphpar.passes.batch import mixing_reason
from graphpar.preparation import CAPTURE_PASSES, lower
from graphpar.runtime.in_step import Meetings, Swap
from graphpar.runtime.reference import OneDevice, whole_on_one_device
from graphpar.runtime.tail import Tail

Loss = Callable[[Any, Any], Any] | str | None
Gradients = Mapping[str, torch.Tensor]


class Calls(nn.Module):
    """A module that hands itself, a linear layer's result and the target to a function.

    It has a table `table` [50, 4], a vector `vector` [4], a buffer `buffer` [50, 4] and, where given, a
    layer `layer`.
    """

    def __init__(self, function: Callable[..., Any], layer: nn.Module | None = None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.function = function
        self.linear = nn.Linear(4, 4)
        self.layer = layer or nn.Identity()
        self.table = nn.Parameter(torch.randn(50, 4, generator=generator))
        self.vector = nn.Parameter(torch.randn(4, generator=generator))
        self.buffer: torch.Tensor
        self.register_buffer("buffer", torch.randn(50, 4, generator=generator))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
        return self.function(self, self.linear(x), y)


@dataclass(frozen=True)
class Ready:
    """A captured model, lowered as one stage, and why its batch cannot be split, if so."""

    model: nn.Module
    captured: Captured
    source: Graph
    lowered: Graph
    reason: str

    def device(self, seed: int = 0) -> OneDevice:
        """A fresh copy of the weights with no gradients."""
        return OneDevice(self.model, self.captured, self.lowered, self.source, seed)


def ready(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    loss: Loss = "returned",
    training: bool | None = None,
) -> Ready:
    """Capture and lower a model."""
    captured = capture(model, args, kwargs or {}, loss=loss, training=training)
    source, _ = CAPTURE_PASSES.run(captured.graph)
    (lowered,) = lower(source, whole_on_one_device(source), loss is not None).graphs
    reason = captured.unsplittable or mixing_reason(source)
    return Ready(model, captured, source, lowered, reason)


def in_parts(
    made: Ready, args: Sequence[Any], sizes: Sequence[int], kwargs: Mapping[str, Any] | None = None
) -> tuple[torch.Tensor, Gradients]:
    """The loss and all gradients from microbatches of the given sizes, summed."""
    if made.source.output.attr("in_step") and len(sizes) > 1:
        return _in_step(made, args, sizes, kwargs or {})
    device = made.device()
    signature, context, builder = made.captured.signature, device._context, device._builder
    inputs = signature.bind(args, kwargs or {})
    batch, first = sum(sizes), 0
    if device._prologue is not None:
        inputs = {**inputs, **device._prologue.run(inputs, batch)}
    total = torch.zeros((), dtype=torch.float64)
    context.batch = batch
    waiting: list[tuple[torch.Tensor, ...]] = []
    for size in sizes:
        context.first_sample, context.samples = first, size
        part = {
            label: value[first : first + size] if label in signature.batched else value
            for label, value in inputs.items()
        }
        module = builder.module(size, batch)
        _, (*losses,) = module(*(part[label] for label in builder.interface.inputs))
        if builder.interface.tail is not None:
            waiting.append(tuple(losses))
            losses = []
        for loss in losses:
            if loss.requires_grad:
                loss.backward()
            total += loss.detach().double().reshape(())
        first += size
    if waiting:
        context.first_sample, context.samples = 0, batch
        total += _tail(Tail(builder, sizes, [0] * len(sizes)), waiting, inputs)
    return total, device.gradients()


class Meeting:
    """Where threads lay down what they bring and take what the others brought."""

    def __init__(self, size: int) -> None:
        self.brought: list[Any] = [None] * size
        self.calls = [""] * size
        self.barrier = threading.Barrier(size, timeout=30)

    def swap(self, member: int, call: str, thing: Any) -> list[Any]:
        """What every member brought to the same call."""
        self.calls[member], self.brought[member] = call, thing
        self.barrier.wait()
        assert len(set(self.calls)) == 1, self.calls
        taken = list(self.brought)
        self.barrier.wait()
        return taken


class ThreadMeetings:
    """Where the threads that have a part each meet: every swap gives all what all brought."""

    def __init__(self, meeting: Meeting, member: int) -> None:
        self.meeting, self.member = meeting, member

    def at(self, name: str) -> Swap:
        """How to meet in an op."""

        def swap(tensor: torch.Tensor, *, back: bool) -> list[torch.Tensor]:
            return self.meeting.swap(self.member, f"{name} {back}", tensor.detach().clone())

        return swap


def _in_step(
    made: Ready, args: Sequence[Any], sizes: Sequence[int], kwargs: Mapping[str, Any]
) -> tuple[torch.Tensor, Gradients]:
    """The same from parts that go in step, each in a thread with weights of its own."""
    meeting = Meeting(len(sizes))
    devices = [made.device() for _ in sizes]

    def work(member: int) -> torch.Tensor:
        device = devices[member]
        builder, context, signature = device._builder, device._context, made.captured.signature
        builder._meetings = cast(Meetings, ThreadMeetings(meeting, member))
        inputs = signature.bind(args, kwargs)
        batch, first = sum(sizes), sum(sizes[:member])
        if device._prologue is not None:
            inputs = {**inputs, **device._prologue.run(inputs, batch)}
        context.batch, context.first_sample, context.samples = batch, first, sizes[member]
        part = {
            label: value[first : first + sizes[member]] if label in signature.batched else value
            for label, value in inputs.items()
        }
        module = builder.module(sizes[member], batch)
        _, values = module(*(part[label] for label in builder.interface.inputs))
        if builder.interface.tail is None:
            (loss,) = values
            if loss.requires_grad:
                loss.backward()
            own: torch.Tensor = loss.detach().double().reshape(())
            return own
        context.first_sample, context.samples = 0, batch
        every = meeting.swap(member, "tail", tuple(value.detach().clone() for value in values))
        tail = Tail(builder, sizes, range(len(sizes)))
        parts = [dict(enumerate(given)) for given in zip(*every, strict=True)]
        whole = tail.run(parts, [inputs[label] for label in tail.inputs], training=True)
        tail.backward(whole, 1.0, [member])
        pairs = zip(values, tail.gradients(whole, member), strict=True)
        roots = [(v, g) for v, g in pairs if v.requires_grad and g is not None]
        if roots:
            torch.autograd.backward([v for v, _ in roots], [g for _, g in roots])
        (loss,) = whole.results.values()
        total: torch.Tensor = loss.detach().double().reshape(()) * (member == 0)
        return total

    with ThreadPoolExecutor(len(sizes)) as pool:
        losses = list(pool.map(work, range(len(sizes))))
    totals: dict[str, torch.Tensor] = {}
    for device in devices:
        for name, gradient in device.gradients().items():
            totals[name] = totals[name] + gradient if name in totals else gradient
    for name, tensor in devices[0].tensors.items():
        for other in devices[1:]:
            torch.testing.assert_close(other.tensors[name], tensor, rtol=0, atol=0, equal_nan=True)
    return torch.stack(losses).sum(), totals


def _tail(
    tail: Tail, collected: Sequence[tuple[torch.Tensor, ...]], inputs: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """Run a tail on what all microbatches gave, and all backwards; its loss."""
    parts = [dict(enumerate(values)) for values in zip(*collected, strict=True)]
    whole = tail.run(parts, [inputs[label] for label in tail.inputs], training=True)
    tail.backward(whole, 1.0, range(len(collected)))
    for number, values in enumerate(collected):
        pairs = zip(values, tail.gradients(whole, number), strict=True)
        roots = [(v, g) for v, g in pairs if v.requires_grad and g is not None]
        if roots:
            torch.autograd.backward([v for v, _ in roots], [g for _, g in roots])
    (loss,) = whole.results.values()
    return loss.detach().double().reshape(())


def eagerly(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None, loss: Loss = None
) -> tuple[torch.Tensor, Gradients]:
    """Loss and gradients of the user's model, on a copy."""
    model = copy.deepcopy(model)
    if callable(loss):
        value = loss(model(*args[:-1], **(kwargs or {})), args[-1])
    else:
        value = find_loss(model(*args, **(kwargs or {})))
    value.backward()
    named = model.named_parameters(remove_duplicate=True)
    return value.detach(), {name: p.grad for name, p in named if p.grad is not None}


def assert_close(
    got: tuple[torch.Tensor, Gradients], wanted: tuple[torch.Tensor, Gradients], tolerance: float = 1e-5
) -> None:
    """Loss and every gradient agree, relative to the largest gradient of all."""
    loss, expected = got[0].double().reshape(()), wanted[0].double().reshape(())
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=tolerance)
    largest = max((float(g.abs().max()) for g in wanted[1].values()), default=0.0)
    for name, gradient in wanted[1].items():
        given = got[1].get(name, torch.zeros_like(gradient))
        difference = float((given.double() - gradient.double()).abs().max())
        assert difference <= tolerance * max(largest, 1e-3), (name, difference, largest)


def assert_as_eager(model: nn.Module, args: Sequence[Any], *, loss: Loss = None) -> Ready:
    """The captured graph on one device gives eager's loss and gradients."""
    made = ready(model, args, loss=loss or "returned")
    device = made.device()
    (value,) = device.forward(args, {})
    value.backward()  # type: ignore[no-untyped-call]
    assert_close((value.detach(), device.gradients()), eagerly(model, args, None, loss))
    return made
