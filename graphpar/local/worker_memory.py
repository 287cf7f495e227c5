"""What a worker takes for itself: the peak memory of a small job, less what its tensors should take.

It is measured rather than known: pages of torch's libraries that kernels, autograd and the optimiser
touch, what products pack their operands into, the interpreter's own objects, threads and buffers of
the transport. It differs by a hundred megabytes between torch's builds.
"""

import contextlib
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from graphpar.cluster import Cluster
from graphpar.examples.gpt import GPT, example_inputs
from graphpar.partition.types import Partition, Replica, StageChoice
from graphpar.planner import price
from graphpar.preparation import Prepared, lower, prepare
from graphpar.runtime import by_value
from graphpar.runtime.local import LocalWorkers
from graphpar.runtime.merge import inputs_of_rank
from graphpar.runtime.optimizers import Recipe
from graphpar.runtime.prologue import Prologue
from graphpar.runtime.reference import whole_on_one_device
from graphpar.runtime.starts import rank_starts
from graphpar.runtime.weights import Weights
from graphpar.schedule import build_schedule
from graphpar.schedule.simulate import simulate
from graphpar.schedule.simulated import stage_links
from graphpar.schedule.timing import timing_of
from graphpar.training import Training

STEPS = 3
"""The optimiser's state comes with the first one; the next need all memory at once."""

_LINK = {"bytes_per_s": 1e9, "latency_s": 1e-4}
"""Emulated, as most links between workers of one machine: messages are copied, with when they are due."""


def measure_worker_bytes(threads: int = 1) -> float:
    """The memory of a training worker beside its tensors, after some steps of a small model.

    There are two of them, with one stage each: messages go both ways, and the table that is also the
    head is in both, so that gradients are summed. The larger one counts.

    Args:
        threads: Threads of one worker.

    Raises:
        RunError: No workers could be started.
    """
    with torch.random.fork_rng(devices=()):
        model = GPT(width=256, layers=2, heads=4, length=32)
        ids, targets = example_inputs(4, 32)
    train = Training(optimizer=torch.optim.AdamW)
    prepared = prepare(model, (ids,), {"targets": targets}, train)
    devices = [{"kind": "cpu", "threads": threads, "count": 2}]
    cluster = Cluster.from_dict({"devices": devices, "link": _LINK})
    chosen = _two_stages(prepared, cluster)
    table = price(prepared, cluster, train=train, calibration=None)
    schedule = build_schedule(chosen, stage_links(table, chosen.pipelines), training=True)
    expected = simulate(schedule, timing_of(table, chosen)).peak_bytes
    peaks = _peaks(model, prepared, (ids,), {"targets": targets}, train, cluster, chosen)
    return max(peak - (own - table.reserved_bytes) for own, peak in zip(expected, peaks, strict=True))


def _two_stages(prepared: Prepared, cluster: Cluster) -> Partition:
    alone = whole_on_one_device(prepared.graph)
    (pipeline,) = alone.pipelines
    units = pipeline.stages[-1].last
    first, second = (Replica(device.name, 2) for device in cluster.devices)
    stages = (
        StageChoice(0, units // 2, (first,), "float32"),
        StageChoice(units // 2, units, (second,), "float32"),
    )
    return replace(alone, pipelines=(replace(pipeline, microbatches=2, stages=stages),))


def _peaks(
    model: nn.Module,
    prepared: Prepared,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    train: Training,
    cluster: Cluster,
    chosen: Partition,
) -> list[int]:
    """Peak bytes of the ranks after some steps."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tensors = {n: t.detach() for n, t in {**parameters, **prepared.captured.constants}.items()}
    signature, batch = prepared.captured.signature, prepared.graph.batch
    inputs = signature.bind(args, kwargs)
    prologue = Prologue.of(prepared.graph, tensors)
    if prologue is not None:
        inputs = {**inputs, **prologue.run(inputs, batch)}
    lowered = lower(prepared.graph, chosen, training=True)
    schedule = lowered.schedule(batch)
    per_rank = [
        inputs_of_rank(placement.interfaces, rank, schedule, inputs, signature.batched)
        for rank, placement in enumerate(lowered.placements)
    ]
    starts = rank_starts(cluster, train, lowered, Weights(tensors))
    workers = LocalWorkers(starts, lowered.trained, by_value.dumps(Recipe.of(train)))
    with contextlib.closing(workers):
        workers.install("step", lowered.programs(schedule, batch))
        for number in range(STEPS):
            results = workers.step("step", per_rank, number)
    return [result.report.peak_bytes for result in results]
