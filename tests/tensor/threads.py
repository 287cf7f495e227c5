"""Tensor groups whose members are threads of one process, for tests of the rewriting alone."""

import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from math import prod
from typing import Any, TypeVar

import torch
from torch import nn

from graphpar.groups.sharing import as_one_stage
from graphpar.ir.chain import build_chain
from graphpar.ir.graph import Graph
from graphpar.ir.mesh import Layouts, coords_of, line_of, localized
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

T = TypeVar("T")


class Meeting:
    """Where the threads of a group lay down what they bring and take what the others brought."""

    def __init__(self, size: int, axis: int | None = None) -> None:
        self.size, self.axis = size, axis
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
    lines: tuple["ThreadTeam", ...] = ()
    calls: list[tuple[int | None, str]] = field(default_factory=list)
    sent: list[float] = field(default_factory=list)

    def along(self, axis: int) -> "ThreadTeam":
        return self.lines[axis]

    def _swap(self, call: str, thing: Any) -> list[Any]:
        self.calls.append((self.meeting.axis, call))
        return self.meeting.swap(self.member, call, thing)

    @property
    def size(self) -> int:
        return self.meeting.size

    def start_sum(self, tensor: torch.Tensor, owned: bool = False) -> Callable[[], torch.Tensor]:
        self.sent.append(2 * tensor.nbytes * (self.size - 1) / self.size)
        parts = self._swap(f"sum {tuple(tensor.shape)}", tensor.detach().clone())
        total = torch.stack(parts).sum(0)
        if owned:
            tensor.detach().fill_(float("nan"))  # whoever still reads it is found out
        return lambda: total

    def maximum(self, tensor: torch.Tensor) -> torch.Tensor:
        self.sent.append(2 * tensor.nbytes * (self.size - 1) / self.size)
        parts = self._swap(f"maximum {tuple(tensor.shape)}", tensor.detach().clone())
        return torch.stack(parts).amax(0)

    def start_exchange(
        self, blocks: Sequence[torch.Tensor], shapes: Sequence[tuple[int, ...]]
    ) -> Callable[[], list[torch.Tensor]]:
        self.sent.append(sum(b.nbytes for k, b in enumerate(blocks) if k != self.member))
        parts = self._swap("exchange", [b.detach().clone() for b in blocks])
        mine = [part[self.member] for part in parts]
        assert [tuple(p.shape) for p in mine] == [tuple(s) for s in shapes]
        return lambda: [m.clone() for m in mine]


def in_threads(size: int, work: Callable[[ThreadTeam], T], mesh: tuple[int, ...] = ()) -> list[T]:
    """What every member's thread returned; `mesh` has the members along each of two axes."""
    meeting = Meeting(size)
    lines = {
        line: Meeting(len(line), axis)
        for axis in range(len(mesh))
        for line in (line_of(member, axis, mesh) for member in range(size))
    }
    results: list[Any] = [None] * size
    errors: list[BaseException] = []

    def run(member: int) -> None:
        try:
            team = ThreadTeam(meeting, member)
            mine = (line_of(member, axis, mesh) for axis in range(len(mesh)))
            team.lines = tuple(
                ThreadTeam(lines[line], line.index(member), (), team.calls, team.sent) for line in mine
            )
            results[member] = work(team)
        except BaseException as error:
            errors.append(error)
            for each in (meeting, *lines.values()):
                each.barrier.abort()

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
    """How every op of a stage is computed; along the second axis of a mesh as `inner` says."""

    chosen: Mapping[str, Strategy]
    forms: Mapping[str, Layout]
    weights: Mapping[str, Layout]
    inner: "Choice | None" = None

    def shares_along_both(self, name: str) -> bool:
        """Whether an op's work is divided along both axes of a mesh."""
        inner = self.inner
        return inner is not None and bool(self.chosen[name].shares and inner.chosen[name].shares)

    def shard(self, mesh: tuple[int, ...]) -> Shard:
        """The pass."""
        inner = self.inner.shard(mesh[1:]) if self.inner is not None else None
        return Shard(0, 0, self.chosen, self.forms, self.weights, size=mesh[0], inner=inner)


_LAST: list[Graph] = []
"""The last captured graph that was lowered, and as what: tests ask again and again."""


def one_stage(graph: Graph) -> Graph:
    """The captured graph lowered as a single stage."""
    if not _LAST or _LAST[0] is not graph:
        _LAST[:] = graph, as_one_stage(graph, len(build_chain(graph).units))
    return _LAST[1]


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
    mesh: tuple[int, ...] = (),
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
    shard = choice.shard(mesh or (size,))
    units = tuple(unit.ops for unit in prepared.chain.units) if again else ()
    stages = member_stages(lambda member: graph, shard, size, True, units)
    check_in_step(stages, 0, training=True, units=units, mesh=mesh)

    def work(team: ThreadTeam) -> tuple[list[torch.Tensor], dict[str, torch.Tensor], float, Graph]:
        coords = coords_of(team.member, mesh or (size,))
        local = FuseComm(0, True, units).run(shard.at(coords).run(graph))
        assert local == stages[team.member], "members that share a rewriting are rewritten alike"
        verify(local)
        tensors: dict[str, torch.Tensor] = {}
        for op in local.ops:
            if op.target in SOURCES and op.target != "input":
                label = str(op.args[0])
                tensor = whole.tensors[label].detach()
                for layout, member in zip(_held(choice, op.name, coords), coords, strict=True):
                    if isinstance(layout, Split):
                        tensor = take(tensor, layout.dim, layout.counts, layout.inner, member)
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
            team.calls,
            team_calls(local, 0, training=results[0].requires_grad, units=units),
            samples,
        )
        gradients = {k: t.grad for k, t in tensors.items() if t.grad is not None}
        return [r.detach() for r in results], gradients, sum(team.sent), local

    done = in_threads(size, work, mesh)
    return [d[0] for d in done], _whole_gradients(done, choice, mesh or (size,)), [d[2] for d in done]


def _held(choice: Choice, name: str, coords: Sequence[int]) -> Layouts:
    """How a weight is held along each axis, along the second of what the first leaves."""
    inner = (choice.inner.weights.get(name, "whole"),) if choice.inner is not None else ()
    return localized((choice.weights.get(name, "whole"), *inner), coords)


def check_calls(
    made: Sequence[tuple[int | None, str]], foreseen: Sequence[TeamCall], samples: int
) -> None:
    """What a member asked of the others is what its graph says, in that order.

    When a unit is computed again depends on what the backward looks up first, and it stops early.
    """
    again = Counter(_described(call, samples) for call in foreseen if call.phase == "again")
    others = [_described(call, samples) for call in foreseen if call.phase != "again"]
    if not again:
        assert list(made) == others
    else:
        assert Counter(others) <= Counter(made) <= Counter(others) + again


def _described(call: TeamCall, samples: int) -> tuple[int | None, str]:
    """The call as a team notes it."""
    sizes = [t.sizes(samples) for t in call.types]
    size = sizes[0] if len(sizes) == 1 else (sum(map(prod, sizes)),)
    return call.axis, "exchange" if call.kind == "exchange" else f"{call.kind} {size}"


def _whole_gradients(
    done: Sequence[Any], choice: Choice, mesh: tuple[int, ...]
) -> dict[str, torch.Tensor]:
    gradients: dict[str, torch.Tensor] = {}
    for op in done[0][3].sources("parameter"):
        label = str(op.args[0])
        parts = {coords_of(k, mesh): d[1].get(label) for k, d in enumerate(done)}
        if all(p is None for p in parts.values()):
            continue
        in_parts = op.attr("partial")
        axes = in_parts if isinstance(in_parts, tuple) else (0,) if in_parts else ()
        whole = _put_together(label, (), choice, op.name, mesh, parts, axes)
        assert whole is not None, label
        gradients[label] = whole
    return gradients


def _put_together(
    label: str,
    coords: tuple[int, ...],
    choice: Choice,
    name: str,
    mesh: tuple[int, ...],
    parts: Mapping[tuple[int, ...], torch.Tensor | None],
    in_parts: Sequence[int],
) -> torch.Tensor | None:
    """What the members with these first coordinates have together: joined, summed, or all alike."""
    axis = len(coords)
    if axis == len(mesh):
        return parts[coords]
    rows = [
        _put_together(label, (*coords, k), choice, name, mesh, parts, in_parts) for k in range(mesh[axis])
    ]
    known = [row for row in rows if row is not None]
    if not known:
        return None  # along another axis the others have parts of it, or of zeros
    padded = (*coords, *(0 for _ in mesh[axis:]))
    layout = _held(choice, name, padded)[axis]
    if isinstance(layout, Split):
        assert len(known) == len(rows), label
        return join(known, layout.dim, layout.counts, layout.inner)
    if axis in in_parts:
        return torch.stack(known).sum(0)
    for row in known[1:]:
        torch.testing.assert_close(row, known[0], rtol=1e-4, atol=1e-6)
    assert len(known) == len(rows), label
    return known[0]
