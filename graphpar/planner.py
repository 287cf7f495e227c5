"""The middle of the line: price a captured model, partition it, explain and predict what was found."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from graphpar.auto_precision import (
    MeasureErrors,
    check_budget,
    choose_auto,
    uniform_answer,
)
from graphpar.auto_search import Pricing, candidate_formats
from graphpar.calibration import Calibration
from graphpar.cluster import Cluster
from graphpar.cost import CostTable
from graphpar.cost_models.extrapolation import described, extrapolations
from graphpar.cost_models.measured import ModelTiming, with_timing
from graphpar.cost_models.modes import with_modes
from graphpar.cost_models.rates import rates_of
from graphpar.cost_models.roofline import Rewritten, Roofline
from graphpar.cost_models.unit_costs import UnitPricer
from graphpar.cost_models.work import Kernel
from graphpar.cost_options import PricingOptions, StageOptions
from graphpar.device import Device
from graphpar.errors import InfeasibleError
from graphpar.explanation import Explanation
from graphpar.explanation_build import explain_partition
from graphpar.format_remedies import with_format_remedies
from graphpar.group_candidates import (
    LEAST_GAIN,
    candidate_groups,
    meshes_of,
    widest_group,
    width_notes,
)
from graphpar.group_modes import with_group_modes
from graphpar.local_timing import Example, Timings
from graphpar.optimizer_memory import tried_optimizer
from graphpar.optimizer_probe import (
    joining_optimizer,
    optimizer_state,
    optimizer_traits,
    refuse_random_steps,
)
from graphpar.partition.one_unit import as_one_unit, told_in_units
from graphpar.partition.pipeline import partition as partition_chain
from graphpar.partition.settings import Microbatches, ScheduleWish, searched
from graphpar.partition.types import Partition, Replica, TensorWidth
from graphpar.plan_build import PlanSubject, make_plan, predict
from graphpar.plan_choice import CHOICE_S, scheduled
from graphpar.plan_records import PlanPrecision
from graphpar.plan_time import PlanTime
from graphpar.plans import Plan, hash_of
from graphpar.played_choice import best_played
from graphpar.precision import (
    Formats,
    check_precision,
    labelled,
    quarrels,
    rewritten_by_device,
    runs_as,
    slow_format_notes,
    unmeasured_notes,
    with_formats,
)
from graphpar.preparation import Prepared, lower, trial_of
from graphpar.runtime.assemble import stage_links
from graphpar.sensitivity import (
    Sensitivities,
    TrueErrors,
    estimated,
    measure_sensitivities,
)
from graphpar.tensor_groups import settle_shardings
from graphpar.timing import Timing
from graphpar.training import Training

EXPLAIN_S = 2.0
"""What `plan` may spend on saying why; `compile` is in more of a hurry."""

MEASURE_S = 3.0
"""What planning may spend on timing the model's units on this machine, where it is calibrated."""

_UNSPLIT = 10**6
"""Stands for "as many as there are samples" where the batch may be split freely."""

PRECISION_BUDGET = 1e-2
"""Largest relative error that `precision="auto"` may cause unless told otherwise."""


def price(
    prepared: Prepared,
    cluster: Cluster,
    *,
    train: Training | None,
    precision: str = "float32",
    calibration: Calibration | None,
    formats: Formats | None = None,
    timings: Mapping[str, ModelTiming] | None = None,
    tried: tuple[float, float] | None = None,
    rewritten: Mapping[str, Rewritten] | None = None,
    known: dict[int, UnitPricer] | None = None,
) -> CostTable:
    """The table of numbers that the partitioner reads.

    With `formats` every device's numbers are those of the graph it runs; `precision` alone is a
    shortcut for a device that does everything in it. With `timings`, by the kind of device, the numbers
    of devices whose units compute in the format that was timed are what they were timed at.

    What tables of one model have in common may be given: `tried` are the optimiser's bytes of state per
    byte of parameters and of its update per byte of gradients, `rewritten` what devices run in their
    formats, `known` the pricers of these graphs (see `Roofline.price`).
    """
    state, share = tried or tried_optimizer(train, cluster)
    limit = 1 if prepared.batch_reason else _UNSPLIT
    options = PricingOptions(
        batch=prepared.graph.batch,
        training=train is not None,
        precision=precision,
        optimizer_state_bytes_per_parameter_byte=state,
        update_share=share,
        max_microbatches=1 if prepared.in_step_reason else min(limit, prepared.graph.batch),
        max_replicas=min(limit, prepared.graph.batch),
        batch_reason=prepared.batch_reason,
        tail_reason=prepared.tail_reason,
        in_step_reason=prepared.in_step_reason,
        clips_gradients=train is not None and train.max_grad_norm is not None,
    )
    if rewritten is None:
        rewritten = rewritten_by_device(prepared.graph, prepared.chain, formats) if formats else {}
    table = Roofline(calibration).price(
        prepared.graph, prepared.chain, cluster, options, rewritten, known
    )
    for kind, timing in (timings or {}).items():
        mine = {d.name for d in cluster.devices if d.kind == kind}
        if precision == "float32" and (formats or Formats({})).all_in(mine, timing.precision):
            table = with_timing(table, prepared.graph, prepared.chain, cluster, timing, kind)
    return table


def with_groups(
    table: CostTable,
    prepared: Prepared,
    cluster: Cluster,
    groups: Sequence[Replica],
    *,
    train: Training | None,
    formats: Formats,
    calibration: Calibration | None,
    least_gain: float = 0.0,
    leaner: bool = False,
) -> CostTable:
    """The table with a price for each tensor group, in the formats of its members.

    `least_gain` leaves out groups of two axes, `leaner` adds shardings (see `with_group_modes`).
    """
    lower = rewritten_by_device(prepared.graph, prepared.chain, formats)
    return with_group_modes(
        table, prepared.graph, cluster, groups, calibration, train, lower, least_gain, leaner
    )


def may_repeat(table: CostTable) -> bool:
    """Whether units may run a second time in a step, and their state be divided.

    What writes into buffers (there, samples mix) cannot run twice.
    """
    return table.training and not table.batch_reason and not table.in_step_reason


def uncut_note(optimizer: str) -> str:
    """Why a model stays in one piece."""
    return (
        f"the model is not cut: a step of {optimizer} on one parameter depends on all others, so that "
        "every device holds all of them"
    )


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
    tensor: TensorWidth = 1,
    measure_s: float = MEASURE_S,
) -> Plan:
    """Price, partition, explain (for at most `explain_s`) and predict a captured model.

    `example` is run to measure errors under `precision="auto"`; without it they are estimated. It is
    also run to time the model's units, on each kind of device that this machine has of the cluster for
    `measure_s` or so: on a calibrated processor in float32, on a GPU in the format it will compute in.
    """
    check_precision(precision)
    widest = widest_group(cluster, tensor)
    refuse_random_steps(train, len(cluster.devices))
    joins = joining_optimizer(train)
    meshes = meshes_of(tensor, widest)
    candidates = () if prepared.in_step_reason or joins else candidate_groups(cluster, widest, meshes)
    least_gain = LEAST_GAIN if tensor == "auto" else 0.0
    check_budget(precision_budget)
    if calibration is None and any(device.is_local_cpu for device in cluster.devices):
        calibration = Calibration.cached()
    timings: dict[str, ModelTiming] = {}
    untimed: tuple[str, ...] = ()
    retime: Callable[[Partition, Timing], tuple[Timing, str]] | None = None
    if example is not None and measure_s > 0:
        curves = calibration

        def priced(alone: Cluster, formats: Formats) -> CostTable:
            return price(prepared, alone, train=train, calibration=curves, formats=formats)

        state_ratio = optimizer_state(train) if train else 0.0
        wanted = Timings(prepared, example, train, precision, measure_s, state_ratio, priced)
        timings, untimed = wanted.of(cluster, calibration)
        retime = partial(wanted.retimed, cluster, calibration)
    schedule = _schedule(prepared, train)
    microbatches = _microbatches(prepared, train)
    levels, possible = _zero_levels(train), _possible_levels(train)
    clock = PlanTime(time_limit_s)
    options: dict[str, str | int | float | bool | None] = {
        "gap": gap,
        "time_limit_s": time_limit_s,
        "schedule": schedule,
        "microbatches": microbatches,
        "calibrated": calibration is not None,
        "precision": precision,
        "tensor": "x".join(map(str, tensor)) if isinstance(tensor, tuple) else tensor,
    }

    def table_of(formats: Formats) -> CostTable:
        table = price(
            prepared, cluster, train=train, calibration=calibration, formats=formats, timings=timings
        )
        if candidates:
            table = with_groups(
                table,
                prepared,
                cluster,
                candidates,
                train=train,
                formats=formats,
                calibration=calibration,
                least_gain=least_gain,
                leaner=True,
            )
        return (
            with_modes(table, StageOptions(recompute=True, zero=levels)) if may_repeat(table) else table
        )

    def solve(table: CostTable) -> Partition:
        whole = as_one_unit(table) if joins else table
        search = partial(
            partition_chain,
            whole,
            gap=gap,
            schedule=searched(schedule),
            microbatches=microbatches,
            zero_levels=possible,
        )
        found = clock.search(search)
        if not joins:
            return found
        # A model that is not cut has no stages that wait for each other.
        chosen = best_played(whole, found, found, searched(schedule), microbatches)
        return told_in_units(chosen, table.num_units)

    if precision == "auto":
        options["precision_budget"] = precision_budget
        pricing = Pricing(table_of, solve, _cast_seconds(cluster, calibration, train is not None))
        sensitivities, true = _errors(prepared, cluster, train, example)
        answer = choose_auto(cluster, pricing, sensitivities, true, precision_budget, gap)
        notes = (*answer.notes, *unmeasured_notes(cluster, calibration))
    else:
        number = len(prepared.chain.units)
        try:
            answer = uniform_answer(cluster, precision, number, table_of, solve)
        except InfeasibleError as error:
            wish = searched(schedule), microbatches
            raise with_format_remedies(error, cluster, precision, number, table_of, wish) from None
        notes = (*answer.notes, *slow_format_notes(cluster, precision, calibration))
    if joins:
        notes = (*notes, uncut_note(joins))
    if widest > 1 and prepared.in_step_reason:
        notes = (*notes, f"no tensor groups: {prepared.in_step_reason}, which they do not do")
    found = answer.found
    if not joins:
        choose = partial(scheduled, answer.table, found, schedule, microbatches)
        chosen = clock.choose(choose, CHOICE_S)
        known = precision != "auto" or runs_as(chosen, found, answer.formats)
        found = chosen if known and not quarrels(chosen, answer.formats) else found
    notes = (*notes, *width_notes(found, tensor, candidates, answer.table))
    sizes = [n for pipeline in answer.found.pipelines for n in pipeline.sizes()]
    # Under `auto` most of the work may stay in float32.
    wide = precision if precision != "auto" else "float32"
    far = extrapolations(prepared.graph, cluster, calibration, wide, max(sizes, default=1))
    notes = (*notes, *far)
    explain = partial(
        explain_partition,
        answer.table,
        found,
        schedule=searched(schedule),
        microbatches=microbatches,
        whole=bool(joins),
    )
    explanation = clock.explain(explain, explain_s)
    return plan_of(
        prepared,
        cluster,
        labelled(answer.table, answer.formats),
        with_formats(found, answer.formats),
        options,
        precision=precision,
        notes=notes,
        explanation=explanation,
        calibration=calibration,
        error_budget=answer.report,
        train=train,
        retime=retime,
        assumptions=(*untimed, *described(cluster.devices)),
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
) -> tuple[Sensitivities, MeasureErrors]:
    """Errors of the units in lower formats, and how to find those of all of them together."""
    formats = candidate_formats(cluster)
    if example is None:
        return estimated(prepared.graph, prepared.chain, formats), lambda _: None
    trial = trial_of(example.model, prepared, train)
    found = measure_sensitivities(trial, example.args, example.kwargs, formats)
    return found, TrueErrors(trial, example.args, example.kwargs).of_pipelines


def _microbatches(prepared: Prepared, train: Training | None) -> Microbatches:
    """How many microbatches to plan for; a batch that must stay whole is one, and says so."""
    wanted = train.microbatches if train else "auto"
    reason = whole_reason(prepared)
    if wanted in ("auto", 1) or not reason:
        return wanted
    warnings.warn(f"Training(microbatches={wanted}) is ignored: {reason}", stacklevel=4)
    return "auto"


def whole_reason(prepared: Prepared) -> str:
    """Why the samples of a pipeline are one microbatch; empty where they need not be."""
    reason = prepared.batch_reason or prepared.in_step_reason
    return reason and (
        f"{reason}, so that the samples of a pipeline must stay together to give the numbers of one "
        "device. They are one microbatch."
    )


def _zero_levels(train: Training | None) -> tuple[int, ...]:
    """ZeRO levels besides 0 that stages may choose, with a warning where that is less than asked for."""
    if train is None or not train.zero:
        return ()
    traits = optimizer_traits(train.optimizer)
    levels = zero_levels(train, traits.by_slices, train.schedule)
    if not levels:
        warnings.warn(
            f"Training(zero={train.zero}) is ignored: {traits.name} needs "
            "whole parameters, so its state cannot be divided among replicas by rows.",
            stacklevel=4,
        )
    elif max(levels) < train.zero:
        warnings.warn(
            f"Training(zero={train.zero}) is taken for zero=1: under the schedule {train.schedule} "
            "gradients are not divided among replicas. Level 2 runs under 1f1b and gpipe.",
            stacklevel=4,
        )
    return levels


def _possible_levels(train: Training | None) -> tuple[int, ...]:
    """ZeRO levels that could be asked for, whatever was."""
    if train is None:
        return ()
    return zero_levels(
        replace(train, zero=2), optimizer_traits(train.optimizer).by_slices, train.schedule
    )


def zero_levels(train: Training | None, by_slices: bool, schedule: ScheduleWish) -> tuple[int, ...]:
    """ZeRO levels besides 0 that stages may choose under the schedule wished for.

    `by_slices` says whether the optimiser works on rows of parameters as on whole ones.
    """
    if train is None or not by_slices:
        return ()
    most = min(train.zero, 1) if schedule in ("interleaved", "zero-bubble") else train.zero
    return tuple(range(1, most + 1))


def _schedule(prepared: Prepared, train: Training | None) -> ScheduleWish:
    """The schedule to plan for; where the whole batch has to be there before any backward it is GPipe."""
    wanted: ScheduleWish = train.schedule if train else "auto"
    reason = gpipe_reason(prepared)
    if wanted in ("auto", "gpipe") or not reason:
        return wanted
    warnings.warn(f"Training(schedule={wanted!r}) is ignored: {reason}", stacklevel=4)
    return "gpipe"


def gpipe_reason(prepared: Prepared) -> str:
    """Why no schedule but GPipe is possible; empty where others are."""
    return prepared.tail_reason and (
        f"{prepared.tail_reason}, so that all forwards have to come before the first backward. The "
        "schedule is GPipe."
    )


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
    train: Training | None = None,
    retime: Callable[[Partition, Timing], tuple[Timing, str]] | None = None,
    assumptions: Sequence[str] = (),
) -> Plan:
    """The plan of a partition, whoever found it; `options` is what the planner was asked for.

    With `train` the plan says how its tensor groups share their stages; otherwise that is worked out
    whenever it is lowered for training; `retime` may try its stages and correct their seconds, and says
    why where it does not.
    """
    groups = [r for p in found.pipelines for s in p.stages for r in s.replicas if r.others]
    if groups:
        table = with_group_modes(table, prepared.graph, cluster, groups, calibration, train)
        choices = [s for p in found.pipelines for s in p.stages]
        levels = tuple(sorted({s.zero for s in choices if s.zero}))
        ways = StageOptions(recompute=any(s.recompute for s in choices), zero=levels)
        table = with_modes(table, ways)
    lowered = lower(prepared.graph, found, table.training, cluster=cluster, shard=False)
    if groups and (train is not None or not table.training):
        settled = settle_shardings(prepared.graph, lowered.graphs, found, cluster, train)
        found = replace(found, shardings=settled)
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
    tried = partial(retime, found) if retime is not None else None
    prediction = predict(table, found, links, lowered.summed_bytes, tried)
    return make_plan(
        subject, table, prediction, assumptions=assumptions, notes=notes, explanation=explanation
    )
