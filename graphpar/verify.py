"""Does the parallel job compute what one device computes? Outputs, losses, every gradient."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from math import isfinite
from typing import Any

import msgspec
import torch
from torch import nn

from graphpar.compiler import ClusterLike, as_cluster
from graphpar.compiler import compile as compile_model
from graphpar.frontend.objects import opened
from graphpar.frontend.torch_private import flatten
from graphpar.ir.formats import ROUNDOFF, base_format
from graphpar.local.timing import Example
from graphpar.partition.types import TensorWidth
from graphpar.planner import PRECISION_BUDGET, plan_prepared
from graphpar.plans.plan import Plan
from graphpar.preparation import Prepared, lower, prepare
from graphpar.runtime.hold import HoldStill
from graphpar.runtime.job import CompiledModel
from graphpar.runtime.numbers import (
    FLOAT32_ROUNDING,
    compare_gradients,
    finite_share,
    relative_difference,
)
from graphpar.runtime.optimizers import on_one_device
from graphpar.runtime.own_rounding import MARGIN, last_bits_changed, own_rounding
from graphpar.runtime.reference import EagerModel, OneDevice, draws_at_random, whole_on_one_device
from graphpar.training import Training
from graphpar.view.notebook import preformatted

_LOWER_ROUNDING = 32.0
"""Rounding of a lower format, in its unit roundoff: errors of some hundred roundings in a row."""


class VerifyReport(msgspec.Struct, frozen=True):
    """Largest relative differences between the parallel job and one device.

    Attributes:
        equal: Whether all of them are within rounding.
        reference: What the job was compared with: "eager model" or "captured graph".
        output_difference: Of inference results, None when training was verified.
        loss_difference: Of the losses of all steps, None for inference.
        gradient_difference: Of the first step's gradients, None for inference.
        worst_gradient: Name of the parameter with the largest difference.
        losses: Losses of the parallel job.
        reference_losses: Losses on one device.
        devices: Devices of the plan.
        rounding: Differences up to this count as rounding: more where stages compute in lower formats.
        is_own_rounding: Some are larger, but so are those of one device from float64, or from itself when
            the last bits of its weights change.
        finite_share: Share of one device's numbers that are finite. Where they are NaN or infinite
            nothing is told but that the job's are, too.
    """

    equal: bool
    reference: str
    output_difference: float | None
    loss_difference: float | None
    gradient_difference: float | None
    worst_gradient: str
    losses: tuple[float, ...]
    reference_losses: tuple[float, ...]
    devices: tuple[str, ...]
    rounding: float = FLOAT32_ROUNDING
    is_own_rounding: bool = False
    finite_share: float = 1.0

    def _verdict(self) -> str:
        if not self.equal:
            return "THE NUMBERS DIFFER"
        if not self.finite_share:
            return "nothing is told: all numbers are NaN or infinite on one device, too"
        if self.finite_share < 1:
            bad_pct = 100 * (1 - self.finite_share)
            return f"{self._of_finite()}; {bad_pct:.3g} % of them are NaN or infinite in both"
        return self._of_finite()

    def _of_finite(self) -> str:
        if self.is_own_rounding:
            return "no more apart than one device is from float64, or from itself with other last bits"
        if self.rounding > FLOAT32_ROUNDING:
            return f"no more apart than lower formats explain (up to {self.rounding:.2g})"
        return "the numbers are the same"

    def __str__(self) -> str:
        lines = [f"compared with the {self.reference} on one device, over {', '.join(self.devices)}"]
        for name, value in (
            ("output", self.output_difference),
            ("loss", self.loss_difference),
            ("gradient", self.gradient_difference),
        ):
            if value is not None:
                lines.append(f"largest {name} difference {value:.2g} (relative)")
        if self.worst_gradient:
            lines.append(f"worst gradient: {self.worst_gradient}")
        lines.append(self._verdict())
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return preformatted(str(self))


def verify(
    model: nn.Module,
    cluster: ClusterLike,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    train: Training | None = None,
    plan: Plan | None = None,
    steps: int = 1,
    precision: str = "float32",
    precision_budget: float = PRECISION_BUDGET,
    time_limit_s: float = 60.0,
    gap: float = 0.01,
    tensor: TensorWidth = 1,
) -> VerifyReport:
    """Run the same steps on the cluster and on one device, and compare.

    Args:
        model: Any module with weights; left as it is.
        cluster: Where to run.
        args: Positional arguments of the batch.
        kwargs: Keyword arguments of the batch.
        train: Verify training with this optimiser; without it, inference.
        plan: A plan made before.
        steps: Training steps whose losses are compared.
        precision: See `graphpar.compile`. A lower format makes larger differences count as rounding.
        precision_budget: See `graphpar.compile`.
        time_limit_s: See `graphpar.compile`.
        gap: See `graphpar.compile`.
        tensor: See `graphpar.compile`.
    """
    kwargs = dict(kwargs or {})
    where = as_cluster(cluster)
    prepared = prepare(model, args, kwargs, train)
    if plan is None:
        plan = plan_prepared(
            prepared, where, train=train, precision=precision, calibration=None,
            time_limit_s=time_limit_s, gap=gap, precision_budget=precision_budget,
            example=Example(model, args, kwargs), tensor=tensor,
        )  # fmt: skip

    def job(training: Training | None) -> CompiledModel:
        return compile_model(model, where, args, kwargs, train=training, plan=plan)

    devices = plan.partition.used_devices
    rounding = rounding_of(plan)
    if train is None:
        return _verify_inference(model, prepared, job, args, kwargs, devices, rounding)
    return _verify_training(model, prepared, job, args, kwargs, train, steps, devices, rounding)


def rounding_of(plan: Plan) -> float:
    """Largest relative difference that the plan's formats explain.

    Lower formats are not expected to give float32's numbers; what is caught is everything worse than
    their rounding.
    """
    stages = [stage for pipeline in plan.partition.pipelines for stage in pipeline.stages]
    roundoff = max(ROUNDOFF[base_format(f)] for stage in stages for f in stage.formats)
    return max(FLOAT32_ROUNDING, _LOWER_ROUNDING * roundoff)


def reference_for(model: nn.Module, prepared: Prepared, train: Training | None) -> EagerModel | OneDevice:
    """The one-device run that a job must agree with."""
    if not draws_at_random(prepared.graph):
        return EagerModel(model, train)
    partition = whole_on_one_device(prepared.graph)
    (graph,) = lower(prepared.graph, partition, train is not None).graphs
    return OneDevice(model, prepared.captured, graph, prepared.graph, train.seed if train else 0)


def _verify_inference(
    model: nn.Module,
    prepared: Prepared,
    job: Callable[[Training | None], CompiledModel],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    devices: tuple[str, ...],
    rounding: float,
) -> VerifyReport:
    with torch.no_grad():
        reference = reference_for(model, prepared, None)
        wanted = reference.forward(args, kwargs)
    with job(None) as running:
        leaves, _ = flatten(opened(running(*args, **kwargs)))
    got = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    difference = max((relative_difference(a, b) for a, b in zip(got, wanted, strict=True)), default=0.0)
    return VerifyReport(
        equal=difference <= rounding,
        reference=_name(reference),
        output_difference=difference,
        loss_difference=None,
        gradient_difference=None,
        worst_gradient="",
        losses=(),
        reference_losses=(),
        devices=devices,
        rounding=rounding,
        finite_share=finite_share(wanted),
    )


def _verify_training(
    model: nn.Module,
    prepared: Prepared,
    job: Callable[[Training | None], CompiledModel],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    train: Training,
    steps: int,
    devices: tuple[str, ...],
    rounding: float,
) -> VerifyReport:
    reference = reference_for(model, prepared, train)
    (loss,) = reference.forward(args, kwargs)
    loss.backward()  # type: ignore[no-untyped-call]
    wanted = {name: g.clone() for name, g in reference.gradients().items()}
    with job(replace(train, optimizer=HoldStill, max_grad_norm=None)) as running:
        first = float(running.step(*args, **kwargs))
        got = running.gradients()
    worst, gradient_difference = compare_gradients(got, wanted)
    with job(train) as running:
        losses = tuple(float(running.step(*args, **kwargs)) for _ in range(steps))
    reference = reference_for(model, prepared, train)
    expected = tuple(train_on_one_device(reference, train, args, kwargs, steps))
    pairs = [(first, float(loss.detach())), *zip(losses, expected, strict=True)]
    loss_difference = max(_apart(a, b) for a, b in pairs)
    equal = loss_difference <= rounding and gradient_difference <= rounding
    is_own_rounding = not equal and rounding >= _beyond_own_rounding(
        lambda: reference_for(model, prepared, train), train, args, kwargs, pairs, got, wanted
    )
    return VerifyReport(
        equal=equal or is_own_rounding,
        reference=_name(reference),
        output_difference=None,
        loss_difference=loss_difference,
        gradient_difference=gradient_difference,
        worst_gradient=worst,
        losses=losses,
        reference_losses=expected,
        devices=devices,
        rounding=rounding,
        is_own_rounding=is_own_rounding,
        finite_share=finite_share([torch.tensor(expected), *wanted.values()]),
    )


def _beyond_own_rounding(
    make: Callable[[], EagerModel | OneDevice],
    train: Training,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    losses: Sequence[tuple[float, float]],
    got: Mapping[str, torch.Tensor],
    wanted: Mapping[str, torch.Tensor],
) -> float:
    """Largest relative difference that the last bits of the weights do not explain.

    `losses` are pairs of the job's and one device's: of the first step alone, then of the steps in turn.
    """
    (_, loss), steps = losses[0], len(losses) - 1
    in_loss, explained = own_rounding(make, args, kwargs, torch.tensor(loss), wanted)
    other = make()
    last_bits_changed(other, seed=0)
    moved = train_on_one_device(other, train, args, kwargs, steps)
    in_losses = [in_loss, *(MARGIN * abs(b - c) for (_, b), c in zip(losses[1:], moved, strict=True))]
    beyond = [_apart(a, b, allowed) for (a, b), allowed in zip(losses, in_losses, strict=True)]
    return max(compare_gradients(got, wanted, explained)[1], *beyond)


def _apart(loss: float, wanted: float, allowed: float = 0.0) -> float:
    explained = allowed if isfinite(allowed) else 0.0
    a, b = torch.tensor(loss, dtype=torch.float64), torch.tensor(wanted, dtype=torch.float64)
    return relative_difference(a, b, 1e-8, explained)


def train_on_one_device(
    reference: EagerModel | OneDevice,
    train: Training,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    steps: int,
) -> Iterable[float]:
    """Losses of optimiser steps on one device."""
    optimizer, scheduler = on_one_device(train, reference.trained)
    for step in range(steps):
        (loss,) = reference.forward(args, kwargs, step)
        loss.backward()  # type: ignore[no-untyped-call]
        for p in reference.parameters:
            if p.grad is not None and p.grad.is_sparse:  # the job's are dense, which Adam needs
                p.grad = p.grad.to_dense()
        if train.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(reference.parameters, train.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()
        yield float(loss.detach())


def _name(reference: EagerModel | OneDevice) -> str:
    return "eager model" if isinstance(reference, EagerModel) else "captured graph"
