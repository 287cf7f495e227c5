"""The straight line in one place: capture, canonicalize, price, partition, plan, lower, run."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from graphpar.arguments import check_limits
from graphpar.calibration import Calibration
from graphpar.cluster import Cluster
from graphpar.errors import ClusterError
from graphpar.frontend.refusals import warn_of_bad_weights
from graphpar.hf.models import hf_buffers
from graphpar.local.timing import Example
from graphpar.optimizer_probe import refuse_random_steps
from graphpar.partition.types import TensorWidth
from graphpar.planner import EXPLAIN_S, MEASURE_S, PRECISION_BUDGET, plan_prepared
from graphpar.plans.plan import Plan, hash_of
from graphpar.precision.formats import check_precision
from graphpar.precision.sensitivity import reference_run
from graphpar.preparation import Prepared, captured_again, lower, prepare, trial_of
from graphpar.runtime.first_step import FirstStepCheck
from graphpar.runtime.job import CompiledModel
from graphpar.runtime.subject import Subject
from graphpar.runtime.weights import WeightSource, find_weights
from graphpar.runtime.zero import refuse_cut_model, refuse_levels
from graphpar.training import Training

ClusterLike = Cluster | Mapping[str, Any] | str | os.PathLike[str]


def plan(
    model: nn.Module,
    cluster: ClusterLike,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    train: Training | None = None,
    precision: str = "float32",
    precision_budget: float = PRECISION_BUDGET,
    tensor: TensorWidth = 1,
    calibration: Calibration | None = None,
    time_limit_s: float = 60.0,
    gap: float = 0.01,
    measure_s: float = MEASURE_S,
) -> Plan:
    """Decide who runs what; needs no GPU and no weights (a model on the meta device will do).

    Args:
        model: Any `nn.Module`.
        cluster: A `Cluster`, a dict, or the path of a cluster file.
        args: Positional arguments of an example batch, the global batch in size.
        kwargs: Keyword arguments of the example batch.
        train: Plan training steps; without it, inference.
        precision: Number format to compute in: "float32", "bfloat16", "float16" or "float8_e4m3fn"
            (products with weights in 8 bits, the rest in bfloat16), each where a device has it; "auto" to
            choose for each unit within `precision_budget`.
        precision_budget: Largest relative error of the result and of the gradient under "auto".
        tensor: The most devices of a node that may share every layer of a stage (a tensor group); 1 for
            none, "auto" for as many as a node has. Groups are used where that is faster or fits. Two
            numbers, as (2, 4) for 2 rows of 4, let groups split ops along two axes too, where that
            beats groups of one axis of up to as many members.
        calibration: Measured curves of this machine's CPU; the cached ones by default.
        time_limit_s: When to stop searching; the plan then says so.
        gap: When to stop searching: proven within this fraction of the best.
        measure_s: On a calibrated machine, what may be spent on any one measurement of the model's own
            units and stages on its processor (several times as much in all; 0 for none), for workers
            that run there. Kept for later plans.

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
    check_limits(gap=gap, time_limit_s=time_limit_s, measure_s=measure_s, calibration=calibration)
    where = as_cluster(cluster)
    prepared = prepare(model, args, {} if kwargs is None else kwargs, train)
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
        measure_s=measure_s,
        precision_budget=precision_budget,
        example=Example(model, args, {} if kwargs is None else kwargs),
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
    tensor: TensorWidth = 1,
    calibration: Calibration | None = None,
    time_limit_s: float = 60.0,
    gap: float = 0.01,
    measure_s: float = MEASURE_S,
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
        precision: Number format to compute in: "float32", "bfloat16", "float16" or "float8_e4m3fn"
            (products with weights in 8 bits, the rest in bfloat16), each where a device has it; "auto" to
            choose for each unit within `precision_budget`. Weights, optimiser state, losses, norms and
            sums stay in float32.
        precision_budget: Largest relative error of the result and of the gradient under "auto".
        tensor: The most devices of a node that may share every layer of a stage (a tensor group); 1 for
            none, "auto" for as many as a node has. Groups are used where that is faster or fits. Two
            numbers, as (2, 4) for 2 rows of 4, let groups split ops along two axes too, where that
            beats groups of one axis of up to as many members.
        calibration: Measured curves of this machine's CPU; the cached ones by default.
        time_limit_s: When to stop searching for a plan.
        gap: When to stop searching: proven within this fraction of the best.
        measure_s: On a calibrated machine, what may be spent on any one measurement of the model's own
            units and stages on its processor (several times as much in all; 0 for none), for workers
            that run there. Kept for later plans.
        verify_first_step: Compare loss and gradients of the first training step with one device before
            the weights change: for models that fit into the driver twice. `NumbersDifferError` where
            they differ by more than rounding, a warning where the job computes in fewer bits.

    Raises:
        CaptureError: The model cannot be captured.
        ClusterError: The cluster makes no sense, or does not fit the processes torchrun started.
        InfeasibleError: Nothing fits.
        PlanError: The plan given belongs to another model or cluster.
        RunError: Workers could not be started.

    >>> import torch, graphpar
    >>> model, batch = torch.nn.Linear(4, 2), torch.randn(6, 4)
    >>> with graphpar.compile(model, {"devices": [{"kind": "cpu", "threads": 1}]}, (batch,)) as job:
    ...     torch.allclose(job(batch), model(batch), atol=1e-6)
    True
    """
    check_precision(precision)
    check_limits(gap=gap, time_limit_s=time_limit_s, measure_s=measure_s, calibration=calibration)
    where = as_cluster(cluster)
    CompiledModel.warm_up()
    prepared = prepare(model, args, {} if kwargs is None else kwargs, train)
    warn_of_bad_weights(model)

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
                measure_s=measure_s,
                precision_budget=precision_budget,
                example=Example(model, args, {} if kwargs is None else kwargs),
            )
        plan.check_model(prepared.graph.name, prepared.model_hash)
        plan.check_cluster(where.to_dict(), hash_of(where.to_dict()))
        plan.check_mode(training=train is not None)
        refuse_random_steps(train, len(plan.partition.used_devices))
        for pipeline in plan.partition.pipelines:
            refuse_levels(pipeline, train, plan.partition.schedule)
            refuse_cut_model(pipeline, train)
        return plan

    subject = subject_of(model, prepared, where, train, weights)
    if verify_first_step:
        if train is None:
            raise ValueError("verify_first_step=True checks a training step; pass train=Training(...).")
        check = FirstStepCheck(model, subject.captured, subject.graph, train, subject.lower)
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
        prepare_inference=lambda a, k: captured_again(prepare(model, a, k, None)),
        prepare_again=lambda a, k: captured_again(prepare(model, a, k, train)),
        reference=lambda a, k: reference_run(trial_of(model, prepared, train), a, k),
        find_weights=lambda: find_weights(
            model, prepared.captured, weights, lambda names: hf_buffers(model, names)
        ),
    )


def as_cluster(cluster: ClusterLike) -> Cluster:
    """A cluster from whatever describes it.

    Raises:
        ClusterError: It describes none.
    """
    if isinstance(cluster, Cluster):
        return cluster
    if isinstance(cluster, Mapping):
        return Cluster.from_dict(cluster)
    if not isinstance(cluster, (str, os.PathLike)):
        raise ClusterError(
            f"cluster= takes a Cluster, a dict or the path of a cluster file, not {cluster!r}. "
            "graphpar.Cluster.local() describes this machine."
        )
    return Cluster.load(cluster)
