"""The straight line in one place: capture, canonicalize, price, partition, plan, lower, run."""

import hashlib
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from graphpar.auto_precision import (
    Pricing,
    candidate_formats,
    check_budget,
    choose_auto,
    uniform_answer,
)
from graphpar.calibration import Calibration
from graphpar.cluster import Cluster
from graphpar.cost import CostTable, PricingOptions, StageOptions
from graphpar.cost_models.modes import with_modes
from graphpar.cost_models.rates import rates_of
from graphpar.cost_models.roofline import Roofline
from graphpar.cost_models.work import Kernel
from graphpar.device import Device
from graphpar.explanation import Explanation
from graphpar.explanation_build import explain_partition
from graphpar.frontend.capture import Captured, capture
from graphpar.hf_models import hf_buffers
from graphpar.ir.chain import Chain, build_chain
from graphpar.ir.formats import base_format
from graphpar.ir.graph import Graph
from graphpar.ir.text import format_op
from graphpar.partition.formats import Errors
from graphpar.partition.pipeline import partition as partition_chain
from graphpar.partition.settings import Microbatches, ScheduleChoice
from graphpar.partition.types import Partition
from graphpar.passes.batch import AnalyseBatch, mixing_reason
from graphpar.passes.canonicalize import Canonicalize
from graphpar.passes.casts import AssignFormats, InsertCasts
from graphpar.passes.comm import InsertMessages
from graphpar.passes.place import Place
from graphpar.passes.randomness import KeyRandomness
from graphpar.plan_build import PlanSubject, make_plan, predict
from graphpar.plan_records import PlanPrecision
from graphpar.plans import Plan, hash_of
from graphpar.precision import (
    Formats,
    check_precision,
    labelled,
    rewritten_by_device,
    slow_format_notes,
    unmeasured_notes,
    with_formats,
)
from graphpar.rewrite import Pipeline
from graphpar.runtime.assemble import Lowered, stage_links
from graphpar.runtime.first_step import FirstStepCheck
from graphpar.runtime.job import CompiledModel, Subject
from graphpar.runtime.reference import whole_on_one_device
from graphpar.runtime.weights import WeightSource, find_weights
from graphpar.sensitivity import (
    Sensitivities,
    Trial,
    estimated,
    measure_sensitivities,
    reference_run,
    true_errors,
)
from graphpar.tensor_groups import candidate_groups, member_graphs, widest_group, with_group_modes
from graphpar.training import Training

ClusterLike = Cluster | Mapping[str, Any] | str | os.PathLike[str]

CAPTURE_PASSES = Pipeline((Canonicalize(), KeyRandomness(), AnalyseBatch()))
"""What every captured graph goes through before it is priced."""
EXPLAIN_S = 2.0
"""What `plan` may spend on saying why; `compile` is in more of a hurry."""

_UNSPLIT = 10**6
"""Stands for "as many as there are samples" where the batch may be split freely."""


def lowering_passes(stage_of_unit: tuple[int, ...], unit_formats: tuple[str, ...] = ()) -> Pipeline:
    """What leads from a captured graph to one that runs: stages, then casts, then messages."""
    return Pipeline((AssignFormats(unit_formats), Place(stage_of_unit), InsertCasts(), InsertMessages()))


PRECISION_BUDGET = 1e-2
"""Largest relative error that `precision="auto"` may cause unless told otherwise."""


@dataclass(frozen=True)
class Example:
    """A model with an example batch, to run on this machine while planning."""

    model: nn.Module
    args: Sequence[Any]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True)
class Prepared:
    """A captured model after the first passes, cut into units."""

    captured: Captured
    graph: Graph
    chain: Chain
    batch_reason: str

    @property
    def model_hash(self) -> str:
        """Hash of the structure: ops, shapes and names, not source lines or weights."""
        digest = hashlib.sha256()
        for op in self.graph.ops:
            digest.update(format_op(op).split(" @ ")[0].encode())
        return digest.hexdigest()


def plan(
    model: nn.Module,
    cluster: ClusterLike,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    train: Training | None = None,
    precision: str = "float32",
    precision_budget: float = PRECISION_BUDGET,
    tensor: int | Literal["auto"] = 1,
    calibration: Calibration | None = None,
    time_limit_s: float = 60.0,
    gap: float = 0.01,
) -> Plan:
    """Decide who runs what; needs no GPU and no weights (a model on the meta device will do).

    Args:
        model: Any `nn.Module`.
        cluster: A `Cluster`, a dict, or the path of a cluster file.
        args: Positional arguments of an example batch, the global batch in size.
        kwargs: Keyword arguments of the example batch.
        train: Plan training steps; without it, inference.
        precision: Number format to compute in: "float32", "bfloat16" or "float16", each where a device
            has it; "auto" to choose for each unit within `precision_budget`; "float8_e4m3fn" can be
            planned, not run.
        precision_budget: Largest relative error of the result and of the gradient under "auto".
        tensor: The most devices of a node that may share every layer of a stage (a tensor group); 1 for
            none, "auto" for as many as a node has. Groups are used where that is faster or fits.
        calibration: Measured curves of this machine's CPU; the cached ones by default.
        time_limit_s: When to stop searching; the plan then says so.
        gap: When to stop searching: proven within this fraction of the best.

    Raises:
        CaptureError: The model cannot be captured.
        ClusterError: The cluster makes no sense.
        InfeasibleError: Nothing fits; says what binds and the smallest change that fits.

    >>> import torch, graphpar
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> plan = graphpar.plan(model, {"devices": [{"kind": "cpu"}]}, args=(torch.randn(6, 4),))
    >>> len(plan.stages)
    1
    """
    check_precision(precision)
    where = as_cluster(cluster)
    prepared = prepare(model, args, kwargs or {}, train)
    return plan_prepared(
        prepared,
        where,
        train=train,
        precision=precision,
        tensor=tensor,
        calibration=calibration,
        time_limit_s=time_limit_s,
        gap=gap,
        explain_s=EXPLAIN_S,
        precision_budget=precision_budget,
        example=Example(model, args, kwargs or {}),
    )


def compile(
    model: nn.Module,
    cluster: ClusterLike,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    train: Training | None = None,
    plan: Plan | None = None,
    weights: WeightSource | None = None,
    precision: str = "float32",
    precision_budget: float = PRECISION_BUDGET,
    tensor: int | Literal["auto"] = 1,
    calibration: Calibration | None = None,
    time_limit_s: float = 60.0,
    gap: float = 0.01,
    verify_first_step: bool = False,
) -> CompiledModel:
    """Turn a model into a running parallel job.

    Under plain `python` local workers are started; under torchrun every rank makes the same call.

    Args:
        model: Any `nn.Module`, with its weights or on the meta device; it is left as it is.
        cluster: A `Cluster`, a dict, or the path of a cluster file.
        args: Positional arguments of an example batch.
        kwargs: Keyword arguments of the example batch.
        train: How to train; without it the job only infers.
        plan: A plan made before; it must be for this model and this cluster.
        weights: For a model without weights (built on the meta device or inside
            `graphpar.without_weights()`): a safetensors file, an index or a folder of several, or a
            function `init(name, tensor)` that fills a fresh tensor. Each rank reads or makes its own.
        precision: Number format to compute in: "float32", "bfloat16" or "float16", each where a device
            has it; "auto" to choose for each unit within `precision_budget`. Weights, optimiser
            state, losses, norms and sums stay in float32.
        precision_budget: Largest relative error of the result and of the gradient under "auto".
        tensor: The most devices of a node that may share every layer of a stage (a tensor group); 1 for
            none, "auto" for as many as a node has. Groups are used where that is faster or fits.
        calibration: Measured curves of this machine's CPU; the cached ones by default.
        time_limit_s: When to stop searching for a plan.
        gap: When to stop searching: proven within this fraction of the best.
        verify_first_step: Compare loss and gradients of the first training step with one device before
            the weights change: for models that fit into the driver twice. `NumbersDifferError` where
            they differ by more than rounding, a warning where the job computes in fewer bits.

    Raises:
        CaptureError: The model cannot be captured.
        ClusterError: The cluster makes no sense, or does not fit the processes torchrun started.
        InfeasibleError: Nothing fits.
        PlanError: The plan given belongs to another model or cluster.
        RunError: Workers could not be started.
    """
    check_precision(precision, to_run=True)
    where = as_cluster(cluster)
    CompiledModel.warm_up()
    prepared = prepare(model, args, kwargs or {}, train)

    def decide() -> Plan:
        if plan is None:
            return plan_prepared(
                prepared,
                where,
                train=train,
                precision=precision,
                tensor=tensor,
                calibration=calibration,
                time_limit_s=time_limit_s,
                gap=gap,
                precision_budget=precision_budget,
                example=Example(model, args, kwargs or {}),
            )
        plan.check_model(prepared.graph.name, prepared.model_hash)
        plan.check_cluster(where.to_dict(), hash_of(where.to_dict()))
        plan.check_mode(training=train is not None)
        for pipeline in plan.partition.pipelines:
            for f in {f for stage in pipeline.stages for f in stage.formats}:
                check_precision(base_format(f), to_run=True)
        return plan

    subject = subject_of(model, prepared, where, train, weights)
    if verify_first_step:
        if train is None:
            raise ValueError("verify_first_step=True checks a training step; pass train=Training(...).")
        check = FirstStepCheck(
            model, subject.captured, subject.graph, train, subject.lower, precision == "float32"
        )
        subject = replace(subject, check=check)
    return CompiledModel.start(subject, decide)


def subject_of(
    model: nn.Module,
    prepared: Prepared,
    cluster: Cluster,
    train: Training | None,
    weights: WeightSource | None = None,
) -> Subject:
    """What a job of a captured model is made of."""
    return Subject(
        model=model,
        captured=prepared.captured,
        graph=prepared.graph,
        model_hash=prepared.model_hash,
        whole_batch_only=bool(prepared.batch_reason),
        cluster=cluster,
        training=train,
        lower=lambda graph, chosen, like: lower(
            graph, chosen, train is not None, cluster=cluster, like=like, train=train
        ),
        prepare_inference=lambda a, k: _captured(prepare(model, a, k, None)),
        prepare_again=lambda a, k: _captured(prepare(model, a, k, train)),
        reference=lambda a, k: reference_run(trial_of(model, prepared, train), a, k),
        find_weights=lambda: find_weights(
            model, prepared.captured, weights, lambda names: hf_buffers(model, names)
        ),
    )


def as_cluster(cluster: ClusterLike) -> Cluster:
    """A cluster from whatever describes it."""
    if isinstance(cluster, Cluster):
        return cluster
    if isinstance(cluster, Mapping):
        return Cluster.from_dict(cluster)
    return Cluster.load(cluster)


def prepare(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], train: Training | None
) -> Prepared:
    """Capture a model for training or inference and cut it into units."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"The model must be a torch.nn.Module, not {type(model).__name__}.")
    if train is None:
        captured = capture(model, args, kwargs, loss=None, training=False)
    else:
        captured = capture(model, args, kwargs, loss=train.loss or "returned")
    return _prepared(captured)


def _prepared(captured: Captured) -> Prepared:
    graph, _ = CAPTURE_PASSES.run(captured.graph)
    reason = captured.unsplittable or mixing_reason(graph)
    return Prepared(captured, graph, build_chain(graph), reason)


def _captured(prepared: Prepared) -> Captured:
    """What the runtime needs of a model captured for other calls than the example's."""
    return replace(prepared.captured, graph=prepared.graph, mixes=prepared.batch_reason)


def price(
    prepared: Prepared,
    cluster: Cluster,
    *,
    train: Training | None,
    precision: str = "float32",
    calibration: Calibration | None,
    formats: Formats | None = None,
) -> CostTable:
    """The table of numbers that the partitioner reads.

    With `formats` every device's numbers are those of the graph it runs; `precision` alone is a
    shortcut for a device that does everything in it.
    """
    limit = 1 if prepared.batch_reason else _UNSPLIT
    options = PricingOptions(
        batch=prepared.graph.batch,
        training=train is not None,
        precision=precision,
        optimizer_state_bytes_per_parameter_byte=optimizer_state(train) if train else 0.0,
        max_microbatches=min(limit, prepared.graph.batch),
        max_replicas=min(limit, prepared.graph.batch),
        batch_reason=prepared.batch_reason,
        clips_gradients=train is not None and train.max_grad_norm is not None,
    )
    rewritten = rewritten_by_device(prepared.graph, prepared.chain, formats) if formats else {}
    return Roofline(calibration).price(prepared.graph, prepared.chain, cluster, options, rewritten)


def plan_prepared(
    prepared: Prepared,
    cluster: Cluster,
    *,
    train: Training | None,
    precision: str,
    calibration: Calibration | None,
    time_limit_s: float,
    gap: float,
    precision_budget: float = PRECISION_BUDGET,
    example: Example | None = None,
    explain_s: float = 0.25,
    tensor: int | Literal["auto"] = 1,
) -> Plan:
    """Price, partition, explain (for at most `explain_s`) and predict a captured model.

    `example` is run to measure errors under `precision="auto"`; without it they are estimated.
    """
    check_precision(precision)
    widest = widest_group(cluster, tensor)
    if widest > 1 and precision != "float32":
        raise ValueError(f"tensor={tensor!r} works in float32 only so far, not with {precision=}.")
    candidates = candidate_groups(cluster, widest)
    check_budget(precision_budget)
    if calibration is None and any(device.is_local_cpu for device in cluster.devices):
        calibration = Calibration.cached()
    schedule: ScheduleChoice = train.schedule if train else "auto"
    microbatches = _microbatches(prepared, train)
    options: dict[str, str | int | float | bool | None] = {
        "gap": gap,
        "time_limit_s": time_limit_s,
        "schedule": schedule,
        "microbatches": microbatches,
        "calibrated": calibration is not None,
        "precision": precision,
        "tensor": tensor,
    }

    def table_of(formats: Formats) -> CostTable:
        table = price(prepared, cluster, train=train, calibration=calibration, formats=formats)
        if train is not None and not prepared.batch_reason and formats.all_float32:
            # What writes into buffers (there, samples mix) cannot run twice; lower formats keep casts.
            table = with_modes(table, StageOptions(recompute=True))
        if candidates:
            table = with_group_modes(table, prepared.graph, cluster, candidates, calibration, train)
        return table

    def solve(table: CostTable) -> Partition:
        return partition_chain(
            table, gap=gap, time_limit_s=time_limit_s, schedule=schedule, microbatches=microbatches
        )

    if precision == "auto":
        options["precision_budget"] = precision_budget
        pricing = Pricing(table_of, solve, _cast_seconds(cluster, calibration, train is not None))
        sensitivities, true = _errors(prepared, cluster, train, example)
        answer = choose_auto(cluster, pricing, sensitivities, true, precision_budget, gap)
        notes = (*answer.notes, *unmeasured_notes(cluster, calibration))
    else:
        answer = uniform_answer(cluster, precision, len(prepared.chain.units), table_of, solve)
        notes = (*answer.notes, *slow_format_notes(cluster, precision, calibration))
    explanation = explain_partition(answer.table, answer.found, time_limit_s=explain_s)
    return plan_of(
        prepared,
        cluster,
        labelled(answer.table, answer.formats),
        with_formats(answer.found, answer.formats),
        options,
        precision=precision,
        notes=notes,
        explanation=explanation,
        calibration=calibration,
        error_budget=answer.report,
    )


def _cast_seconds(
    cluster: Cluster, calibration: Calibration | None, training: bool
) -> Callable[[Device, float], float]:
    """What casting so many elements takes on a device, and casting their gradients back."""
    rates = {d.name: rates_of(d, calibration) for d in cluster.devices}

    def cast_s(device: Device, elements: float) -> float:
        one = rates[device.name].seconds([Kernel("cast", elements, 6 * elements, elements)])
        return one * device.slowdown * (2 if training else 1)

    return cast_s


def _errors(
    prepared: Prepared, cluster: Cluster, train: Training | None, example: Example | None
) -> tuple[Sensitivities, Callable[[tuple[str, ...]], Errors | None]]:
    """Errors of the units in lower formats, and how to find those of all of them together."""
    formats = candidate_formats(cluster)
    if example is None:
        return estimated(prepared.graph, prepared.chain, formats), lambda _: None
    trial = trial_of(example.model, prepared, train)
    found = measure_sensitivities(trial, example.args, example.kwargs, formats)
    return found, lambda chosen: true_errors(trial, example.args, example.kwargs, chosen)


def trial_of(model: nn.Module, prepared: Prepared, train: Training | None) -> Trial:
    """The model on one device of this machine, its units in any formats."""
    alone = whole_on_one_device(prepared.graph)
    (pipeline,) = alone.pipelines
    (stage,) = pipeline.stages

    def lowered(formats: tuple[str, ...]) -> Graph:
        only = replace(pipeline, stages=(replace(stage, unit_formats=formats),))
        (graph,) = lower(prepared.graph, replace(alone, pipelines=(only,)), train is not None).graphs
        return graph

    return Trial(
        model=model,
        captured=prepared.captured,
        graph=prepared.graph,
        chain=prepared.chain,
        model_hash=prepared.model_hash,
        whole_batch_only=bool(prepared.batch_reason),
        training=train is not None,
        seed=train.seed if train else 0,
        lower=lowered,
    )


def _microbatches(prepared: Prepared, train: Training | None) -> Microbatches:
    """How many microbatches to plan for; a batch that must stay whole is one, and says so."""
    wanted = train.microbatches if train else "auto"
    if wanted in ("auto", 1) or not prepared.batch_reason:
        return wanted
    warnings.warn(
        f"Training(microbatches={wanted}) is ignored: {prepared.batch_reason}, so that the batch must "
        "stay whole to give the numbers of one device. It is one microbatch.",
        stacklevel=4,
    )
    return "auto"


def plan_of(
    prepared: Prepared,
    cluster: Cluster,
    table: CostTable,
    found: Partition,
    options: Mapping[str, str | int | float | bool | None] | None = None,
    *,
    precision: str = "float32",
    notes: Sequence[str] = (),
    explanation: Explanation | None = None,
    calibration: Calibration | None = None,
    error_budget: PlanPrecision | None = None,
) -> Plan:
    """The plan of a partition, whoever found it; `options` is what the planner was asked for."""
    groups = [r for p in found.pipelines for s in p.stages for r in s.replicas if r.others]
    if groups:
        table = with_group_modes(table, prepared.graph, cluster, groups, calibration)
    lowered = lower(prepared.graph, found, table.training, cluster=cluster, shard=False)
    subject = PlanSubject(
        model=prepared.graph.name,
        model_hash=prepared.model_hash,
        cluster=cluster.to_dict(),
        cluster_hash=hash_of(cluster.to_dict()),
        precision=precision,
        options=dict(options or {}),
        error_budget=error_budget,
    )
    links = stage_links(found, lowered.graphs)
    prediction = predict(table, found, links)
    return make_plan(subject, table, prediction, notes=notes, explanation=explanation)


def lower(
    graph: Graph,
    found: Partition,
    training: bool,
    *,
    cluster: Cluster | None = None,
    like: Lowered | None = None,
    train: Training | None = None,
    shard: bool = True,
) -> Lowered:
    """One lowered graph per pipeline of a partition, and one for each member of a tensor group.

    Args:
        graph: A captured graph.
        found: Who runs what.
        training: Whether the lowered graphs train.
        cluster: The devices; needed where the partition has tensor groups.
        like: Lowered before for the same ranks: weights stay in the slices they are held in.
        train: How the job trains; an optimiser that must see whole weights keeps them whole.
        shard: False leaves the members' own graphs out.
    """
    graphs = []
    for pipeline in found.pipelines:
        stage_of_unit = [0] * pipeline.stages[-1].last
        for number, stage in enumerate(pipeline.stages):
            stage_of_unit[stage.first : stage.last] = [number] * (stage.last - stage.first)
        formats = tuple(f for stage in pipeline.stages for f in stage.formats)
        lowered, _ = lowering_passes(tuple(stage_of_unit), formats).run(graph)
        graphs.append(lowered)
    local: dict[int, Graph] = {}
    if shard and any(r.others for p in found.pipelines for s in p.stages for r in s.replicas):
        if cluster is None:
            raise ValueError("A partition with tensor groups is lowered for a cluster; give cluster=.")
        local = member_graphs(graph, tuple(graphs), found, cluster, training, like, train)
    again = any(stage.recompute for pipeline in found.pipelines for stage in pipeline.stages)
    units = tuple(unit.ops for unit in build_chain(graph).units) if again else ()
    return Lowered(found, tuple(graphs), training, local=local, units=units)


def optimizer_state(train: Training) -> float:
    """Bytes of optimiser state per byte of parameters, seen from one step on a small parameter."""
    parameter = nn.Parameter(torch.zeros(64, 64))
    parameter.grad = torch.zeros_like(parameter)
    try:
        optimizer = train.optimizer([parameter])
        optimizer.step()
    except Exception as error:
        raise ValueError(
            f"Training(optimizer=...) failed on a list of one parameter: {error}. It must make an "
            "optimiser from any iterable of parameters."
        ) from error
    state = optimizer.state.get(parameter, {})
    held = sum(v.nbytes for v in state.values() if isinstance(v, torch.Tensor) and v.numel() > 1)
    return held / parameter.nbytes
