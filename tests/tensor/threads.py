"""Tensor groups whose members are threads of one process, for tests of the rewriting alone."""

import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from math import prod
from typing import Any, TypeVar

import torch
from torch import nn

from graphpar.ir.chain import build_chain
from graphpar.ir.graph import Graph
from graphpar.ir.ops import SOURCES
from graphpar.ir.recomputed import units_of_member
from graphpar.ir.rules import verify
from graphpar.ir.shards import Layout, Split
from graphpar.ir.strategies import Strategy
from graphpar.passes.fuse import FuseComm
from graphpar.passes.members import member_stages
from graphpar.passes.shard import Shard
from graphpar.preparation import Prepared
from graphpar.runtime.lower import StageBuilder
from graphpar.runtime.random import StepContext
from graphpar.runtime.reference import OneDevice
from graphpar.runtime.slices import join, take
from graphpar.runtime.team_calls import TeamCall, check_in_step, team_calls
from graphpar.tensor_groups import as_one_stage

T = TypeVar("T")


class Meeting:
    """Where the threads of a group lay down what they bring and take what the others brought."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.brought: list[Any] = [None] * size
        self.calls: list[list[str]] = [[] for _ in range(size)]
        self.barrier = threading.Barrier(size, timeout=60)

    def swap(self, member: int, call: str, thing: Any) -> list[Any]:
        self.calls[member].append(call)
        self.brought[member] = thing
        self.barrier.wait()
        taken = list(self.brought)
        assert len({c[-1] for c in self.calls}) == 1, self.calls
        self.barrier.wait()
        return taken


@dataclass
class ThreadTeam:
    """One thread's view of its group."""

    meeting: Meeting
    member: int
    sent_bytes: float = 0.0

    @property
    def size(self) -> int:
        return self.meeting.size

    def start_sum(self, tensor: torch.Tensor, owned: bool = False) -> Callable[[], torch.Tensor]:
        self.sent_bytes += 2 * tensor.nbytes * (self.size - 1) / self.size
        parts = self.meeting.swap(self.member, f"sum {tuple(tensor.shape)}", tensor.detach().clone())
        total = torch.stack(parts).sum(0)
        if owned:
            tensor.detach().fill_(float("nan"))  # whoever still reads it is found out
        return lambda: total

    def maximum(self, tensor: torch.Tensor) -> torch.Tensor:
        self.sent_bytes += 2 * tensor.nbytes * (self.size - 1) / self.size
        parts = self.meeting.swap(self.member, f"maximum {tuple(tensor.shape)}", tensor.detach().clone())
        return torch.stack(parts).amax(0)

    def start_exchange(
        self, blocks: Sequence[torch.Tensor], shapes: Sequence[tuple[int, ...]]
    ) -> Callable[[], list[torch.Tensor]]:
        self.sent_bytes += sum(b.nbytes for k, b in enumerate(blocks) if k != self.member)
        parts = self.meeting.swap(self.member, "exchange", [b.detach().clone() for b in blocks])
        mine = [part[self.member] for part in parts]
        assert [tuple(p.shape) for p in mine] == [tuple(s) for s in shapes]
        return lambda: [m.clone() for m in mine]


def in_threads(size: int, work: Callable[[ThreadTeam], T]) -> list[T]:
    """What every member's thread returned."""
    meeting = Meeting(size)
    results: list[Any] = [None] * size
    errors: list[BaseException] = []

    def run(member: int) -> None:
        try:
            results[member] = work(ThreadTeam(meeting, member))
        except BaseException as error:
            errors.append(error)
            meeting.barrier.abort()

    threads = [threading.Thread(target=run, args=(k,)) for k in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    real = [e for e in errors if not isinstance(e, threading.BrokenBarrierError)]
    for error in real or errors:
        raise error
    return results


@dataclass(frozen=True)
class Choice:
    """How every op of a stage is computed."""

    chosen: Mapping[str, Strategy]
    forms: Mapping[str, Layout]
    weights: Mapping[str, Layout]


def one_stage(graph: Graph) -> Graph:
    """The captured graph lowered as a single stage."""
    return as_one_stage(graph, len(build_chain(graph).units))


def grouped(
    model: nn.Module,
    prepared: Prepared,
    choice: Choice,
    size: int,
    args: Any,
    kwargs: Any,
    seed: int = 0,
    again: bool = False,
    watched: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> tuple[list[list[torch.Tensor]], dict[str, torch.Tensor], list[float]]:
    """Results of every member, whole gradients, and bytes sent by each, of one forward and backward.

    With `again` every unit is computed again for the backward. Forwards run inside of `watched`.
    """
    graph = one_stage(prepared.graph)
    whole = OneDevice(model, prepared.captured, graph, prepared.graph, seed)
    inputs = prepared.captured.signature.bind(args, kwargs)
    samples = prepared.graph.batch
    if whole._prologue is not None:
        inputs = {**inputs, **whole._prologue.run(inputs, samples)}
    shard = Shard(0, 0, choice.chosen, choice.forms, choice.weights)
    units = tuple(unit.ops for unit in prepared.chain.units) if again else ()
    stages = member_stages(lambda member: graph, shard, size, True, units)
    check_in_step(stages, 0, training=True, units=units)

    def work(team: ThreadTeam) -> tuple[list[torch.Tensor], dict[str, torch.Tensor], float, Graph]:
        local = FuseComm(0, True, units).run(replace(shard, member=team.member).run(graph))
        assert local == stages[team.member], "members that share a rewriting are rewritten alike"
        verify(local)
        tensors: dict[str, torch.Tensor] = {}
        for op in local.ops:
            if op.target in SOURCES and op.target != "input":
                label = str(op.args[0])
                tensor = whole.tensors[label].detach()
                layout = choice.weights.get(op.name)
                if isinstance(layout, Split):
                    tensor = take(tensor, layout.dim, layout.counts, layout.inner, team.member)
                trained = isinstance(whole.tensors[label], nn.Parameter)
                tensors[label] = nn.Parameter(tensor.clone()) if trained else tensor.clone()
        context = StepContext(seed=seed, batch=samples, samples=samples)
        builder = StageBuilder(
            local,
            0,
            tensors,
            torch.device("cpu"),
            context,
            team=team,
            recompute=units_of_member(local, 0, units),
        )
        module = builder.module(samples, samples)
        with watched():
            _, results = module(*(inputs[label] for label in builder.interface.inputs))
        if results[0].requires_grad:
            results[0].backward()
        check_calls(
            team.meeting.calls[team.member],
            team_calls(local, 0, training=results[0].requires_grad, units=units),
            samples,
        )
        gradients = {k: t.grad for k, t in tensors.items() if t.grad is not None}
        return [r.detach() for r in results], gradients, team.sent_bytes, local

    done = in_threads(size, work)
    return [d[0] for d in done], _whole_gradients(done, choice), [d[2] for d in done]


def check_calls(made: Sequence[str], foreseen: Sequence[TeamCall], samples: int) -> None:
    """What a member asked of the others is what its graph says, in that order.

    When a unit is computed again depends on what the backward looks up first, and it stops early.
    """
    again = Counter(_described(call, samples) for call in foreseen if call.phase == "again")
    others = [_described(call, samples) for call in foreseen if call.phase != "again"]
    if not again:
        assert list(made) == others
    else:
        assert Counter(others) <= Counter(made) <= Counter(others) + again


def _described(call: TeamCall, samples: int) -> str:
    """The call as a meeting notes it."""
    sizes = [t.sizes(samples) for t in call.types]
    size = sizes[0] if len(sizes) == 1 else (sum(map(prod, sizes)),)
    return "exchange" if call.kind == "exchange" else f"{call.kind} {size}"


def _whole_gradients(done: Sequence[Any], choice: Choice) -> dict[str, torch.Tensor]:
    gradients: dict[str, torch.Tensor] = {}
    for op in done[0][3].sources("parameter"):
        label = str(op.args[0])
        parts = [d[1].get(label) for d in done]
        if all(p is None for p in parts):
            continue
        layout = choice.weights.get(op.name)
        if isinstance(layout, Split):
            shapes = [p for p in parts if p is not None]
            assert len(shapes) == len(parts), label
            gradients[label] = join(shapes, layout.dim, layout.counts, layout.inner)
        elif op.attr("partial"):
            gradients[label] = torch.stack([p for p in parts if p is not None]).sum(0)
        else:
            for p in parts[1:]:
                assert p is not None and parts[0] is not None, label
                torch.testing.assert_close(p, parts[0], rtol=1e-4, atol=1e-6)
            gradients[label] = parts[0]
    return gradients
