"""Jobs whose partition is forced, so that a test decides who runs what, and their comparison."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import cloudpickle
import torch
from captures import prepared_once
from torch import nn

from graphpar.cluster import Cluster
from graphpar.cluster_build import cuda_devices
from graphpar.compiler import as_cluster, subject_of
from graphpar.cost_models.modes import with_modes
from graphpar.cost_options import StageOptions
from graphpar.ir.chain import Chain, Unit, free_ops
from graphpar.ir.graph import Graph
from graphpar.ir.ops import SOURCES
from graphpar.partition.types import Partition, PipelineChoice, Replica, ScheduleName, StageChoice
from graphpar.passes.comm import InsertMessages
from graphpar.passes.place import place_ops
from graphpar.planner import plan_of, price
from graphpar.plans.build import PlanSubject, make_plan, predict
from graphpar.plans.plan import Plan, hash_of
from graphpar.preparation import Prepared
from graphpar.runtime.assemble import Lowered, stage_links
from graphpar.runtime.job import CompiledModel
from graphpar.runtime.numbers import relative_difference
from graphpar.runtime.reference import EagerModel, OneDevice
from graphpar.schedule.simulated import as_given
from graphpar.training import Training
from graphpar.verify import reference_for, train_on_one_device

ROUNDING = 2e-5
"""Largest relative difference that counts as float32 rounding for the small models of the tests."""


@dataclass(frozen=True)
class Line:
    """One forced pipeline.

    Attributes:
        stages: For each stage the number of its replicas, or the microbatches that each takes.
        microbatches: How many microbatches; stages given by a number share them evenly.
        samples: Its part of the batch; None for all of it.
        cuts: Units where stages after the first begin; evenly spread when left out.
        groups: For each stage the shares of its replicas' members; one device each when left out.
        meshes: For each stage the members along two axes of its groups; one axis when left out.
        chunks: How many stages each device holds: the whole list of stages is repeated so often.
    """

    stages: tuple[int | tuple[int, ...], ...]
    microbatches: int = 1
    samples: int | None = None
    cuts: tuple[int, ...] | None = None
    groups: tuple[tuple[float, ...], ...] = ()
    chunks: int = 1
    meshes: tuple[tuple[int, ...], ...] = ()


def straight(num_stages: int, microbatches: int = 1) -> tuple[Line, ...]:
    """One pipeline of single devices."""
    return (Line((1,) * num_stages, microbatches),)


GPU_FIRST = bool(os.environ.get("GRAPHPAR_TEST_GPU"))
"""Whether the first worker of `cpus` is this machine's first CUDA device."""


def sent_whole(module: str) -> None:
    """Send workers the functions of a test module as they are.

    By name they would import the module, and with it pytest and all of the compiler: a second or two of
    each worker of each job.
    """
    cloudpickle.register_pickle_by_value(sys.modules[module])


def cpus(count: int, **keys: Any) -> Cluster:
    """So many single-threaded workers on this machine.

    Or one less beside a CUDA device, so that whatever a test checks is checked between the two.
    """
    gpus = cuda_devices()[:1] if GPU_FIRST else []
    gpus = [gpu | {k: keys[k] for k in ("memory_bytes",) if k in keys} for gpu in gpus]
    cpu = {"kind": "cpu", "count": count - len(gpus), "threads": 1, **keys}
    return Cluster.from_dict({"devices": [*gpus, cpu] if count > len(gpus) else gpus})


sgd = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
"""An error of a gradient stays proportional; pickled by reference to torch, so workers import nothing."""
TRAINING = Training(optimizer=sgd)


@dataclass(frozen=True)
class Forced:
    """A captured model with a partition made by hand."""

    model: nn.Module
    prepared: Prepared
    cluster: Cluster
    training: Training | None
    plan: Plan
    lower: Callable[[Graph, Partition, Lowered | None], Lowered] | None = None

    def start(self) -> CompiledModel:
        """The running job; captures nothing again."""
        subject = subject_of(self.model, self.prepared, self.cluster, self.training)
        if self.lower is not None:
            subject = replace(subject, lower=self.lower)
        return CompiledModel.start(subject, lambda: self.plan)


def force(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    lines: Sequence[Line],
    train: Training | None = TRAINING,
    schedule: ScheduleName = "1f1b",
    cluster: Cluster | Mapping[str, Any] | None = None,
    prepared: Prepared | None = None,
    by_op: bool = False,
    recompute: bool = False,
    zero: int = 0,
) -> Forced:
    """Capture a model and give its units to the pipelines asked for.

    With `by_op` every op is a unit of its own, so that cuts are possible anywhere. With `recompute` all
    stages compute what is inside their units again for the backward. `zero` is the ZeRO level of all.
    Where something needs the whole batch, all forwards come first, whatever the schedule asked for.
    """
    prepared = prepared or prepared_once(model, args, kwargs or {}, train)
    schedule = "gpipe" if prepared.tail_reason else schedule
    count = sum(_num_devices(line) for line in lines)
    where = as_cluster(cluster) if cluster is not None else cpus(count)
    if by_op:
        prepared = replace(prepared, chain=finest_chain(prepared.graph))
    table = price(prepared, where, train=train, precision="float32", calibration=None)
    if recompute or zero:
        table = with_modes(table, StageOptions(recompute=recompute, zero=(zero,) if zero else ()))
    names = iter(device.name for device in where.devices)
    units = len(prepared.chain.units)
    pipelines = tuple(_pipeline(line, units, prepared.graph.batch, lambda: next(names)) for line in lines)
    if recompute:
        pipelines = tuple(
            replace(p, stages=tuple(replace(s, recompute=True) for s in p.stages)) for p in pipelines
        )
    if zero:
        pipelines = tuple(
            replace(p, stages=tuple(replace(s, zero=zero) for s in p.stages)) for p in pipelines
        )
    found = handmade(pipelines, schedule)
    if by_op:
        lower = partial(lower_by_op, training=train is not None)
        links = stage_links(found, lower(prepared.graph, found).graphs)
        data = where.to_dict()
        subject = PlanSubject(prepared.graph.name, prepared.model_hash, data, hash_of(data))
        plan = make_plan(subject, table, predict(table, found, links))
        return Forced(model, prepared, where, train, plan, lower)
    return Forced(model, prepared, where, train, plan_of(prepared, where, table, found, train=train))


def finest_chain(graph: Graph) -> Chain:
    """A chain with a unit for each op; an op with several results keeps them with it.

    Ops that touch a buffer which one of them writes are cut apart, too, as no plan does: not for models
    that keep such buffers beyond one op.
    """
    free = free_ops(graph)
    units: list[Unit] = []
    for op in graph.ops:
        if op.target in (*SOURCES, "output") or op.name in free:
            continue
        if op.target == "getitem":
            units[-1] = replace(units[-1], ops=(*units[-1].ops, op.name))
        else:
            units.append(Unit(op.name, (op.name,), len(units)))
    return Chain(tuple(units), free)


def lower_by_op(
    graph: Graph, found: Partition, like: Lowered | None = None, *, training: bool
) -> Lowered:
    """What the compiler's lowering does, for the finest chain."""
    units = finest_chain(graph).units
    graphs = []
    for pipeline in found.pipelines:
        stages = {
            name: number
            for number, stage in enumerate(pipeline.stages)
            for unit in units[stage.first : stage.last]
            for name in unit.ops
        }
        placed = graph.with_ops(place_ops(graph, stages, "place"), level="placed")
        graphs.append(InsertMessages().run(placed))
    return Lowered(found, tuple(graphs), training)


handmade = as_given
"""A partition that nobody searched for or priced."""


def _shares(stage: int | tuple[int, ...], microbatches: int) -> tuple[int, ...]:
    if isinstance(stage, tuple):
        return stage
    return tuple(microbatches // stage + (r < microbatches % stage) for r in range(stage))


def _pipeline(line: Line, units: int, batch: int, device: Callable[[], str]) -> PipelineChoice:
    count = len(line.stages) * line.chunks
    cuts = line.cuts or tuple(round(i * units / count) for i in range(1, count))
    ends = [0, *cuts, units]
    assert len(cuts) == count - 1 and ends == sorted(set(ends)), f"{units} units, cut at {cuts}"
    stages: list[StageChoice] = []
    for first, last, width in zip((0, *cuts), (*cuts, units), line.stages * line.chunks, strict=True):
        if len(stages) >= len(line.stages):
            stages.append(StageChoice(first, last, stages[len(stages) - len(line.stages)].replicas))
            continue
        shares = _shares(width, line.microbatches)
        parts = line.groups[len(stages)] if line.groups else ()
        mesh = line.meshes[len(stages)] if line.meshes else ()
        replicas = tuple(replace(_replica(device, n, parts), mesh=mesh) for n in shares)
        stages.append(StageChoice(first, last, replicas))
    samples = batch if line.samples is None else line.samples
    return PipelineChoice(samples, line.microbatches, tuple(stages))


def _num_devices(line: Line) -> int:
    widths = [len(_shares(stage, line.microbatches)) for stage in line.stages]
    groups = line.groups or ((),) * len(widths)
    return sum(width * max(1, len(parts)) for width, parts in zip(widths, groups, strict=True))


def _replica(device: Callable[[], str], microbatches: int, parts: tuple[float, ...]) -> Replica:
    first, *others = [device() for _ in parts or (1.0,)]
    return Replica(first, microbatches, tuple(others), parts if others else ())


def check_training(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    steps: int = 2,
    rounding: float = ROUNDING,
    **how: Any,
) -> None:
    """Losses of some steps and the state after them are those of one device."""
    forced = force(model, args, kwargs, **how)
    kwargs = dict(kwargs or {})
    assert forced.training is not None
    with forced.start() as job:
        losses = [float(job.step(*args, **kwargs)) for _ in range(steps)]
        state = job.state_dict()
    reference = reference_for(model, forced.prepared, forced.training)
    expected = list(train_on_one_device(reference, forced.training, args, kwargs, steps))
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=rounding, atol=1e-7)
    compare_states(state, state_of(reference, forced), model.state_dict(), rounding)


def state_of(reference: EagerModel | OneDevice, forced: Forced) -> dict[str, torch.Tensor]:
    """The one-device tensors under all their names."""
    if isinstance(reference, EagerModel):
        return dict(reference.model.state_dict())
    tensors = dict(reference.tensors)
    for label, others in forced.prepared.graph.aliases.items():
        tensors.update(dict.fromkeys(others, tensors[label]))
    return tensors


def compare_states(
    got: Mapping[str, torch.Tensor],
    wanted: Mapping[str, torch.Tensor],
    before: Mapping[str, torch.Tensor],
    rounding: float = ROUNDING,
) -> None:
    """The changes that training made to each tensor are the same but for rounding."""
    moved = {n: _wide(wanted[n].detach()) - _wide(t) for n, t in before.items() if n in wanted}
    made = {n: _wide(got[n].detach()) - _wide(t) for n, t in before.items() if n in wanted}
    largest = max(float(m.abs().max()) for m in moved.values() if m.numel())
    for name, change in moved.items():
        if not change.numel():
            continue
        room = rounding * 50 * max(float(change.abs().max()), 1e-3 * largest)
        room += 3e-7 * float(_wide(before[name]).abs().max())
        difference = float((made[name] - change).abs().max())
        assert difference <= room, f"{name} moved {change.abs().max():.3g}, differs {difference:.3g}"


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.complex128) if tensor.is_complex() else tensor.double()


def check_inference(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None, **how: Any
) -> Any:
    """The result has the structure and the numbers of the eager model's; returns it."""
    forced = force(model, args, kwargs, **{**how, "train": None})
    kwargs = dict(kwargs or {})
    with forced.start() as job:
        got = job(*args, **kwargs)
    compare_results(got, eager(model, args, kwargs))
    return got


def eager(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> Any:
    """What the model returns in evaluation mode; its own mode is kept."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            return model(*args, **(kwargs or {}))
    finally:
        for module, mode in modes.items():
            module.training = mode


def compare_results(got: Any, wanted: Any) -> None:
    """Equal structure, equal plain values, tensors equal but for rounding."""
    if isinstance(wanted, torch.Tensor):
        assert isinstance(got, torch.Tensor) and got.dtype == wanted.dtype
        assert relative_difference(got, wanted.detach()) <= ROUNDING
        return
    assert type(got) is type(wanted), f"{got!r} instead of {wanted!r}"
    if isinstance(wanted, Mapping):
        assert list(got) == list(wanted)
        for key in wanted:
            compare_results(got[key], wanted[key])
    elif isinstance(wanted, (tuple, list)):
        assert len(got) == len(wanted)
        for one, other in zip(got, wanted, strict=True):
            compare_results(one, other)
    elif hasattr(wanted, "__dataclass_fields__"):
        compare_results(vars(got), vars(wanted))
    else:
        assert got == wanted
