"""The middle of the line: price a captured model, partition it, explain and predict what was found."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from graphpar.calibration import Calibration
from graphpar.choice.final import CHOICE_S, scheduled
from graphpar.choice.limits import PlanTime
from graphpar.choice.played import best_played
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
from graphpar.explanation.account import Explanation
from graphpar.explanation.build import explain_partition
from graphpar.groups.candidates import (
    LEAST_GAIN,
    candidate_groups,
    meshes_of,
    widest_group,
    width_notes,
)
from graphpar.groups.modes import with_group_modes
from graphpar.groups.sharing import settle_shardings
from graphpar.local.timing import Example, Timings
from graphpar.optimizer_memory import Tried, tried_optimizer
from graphpar.optimizer_probe import (
    joining_optimizer,
    optimizer_state,
    refuse_random_steps,
)
from graphpar.partition.one_unit import as_one_unit, told_in_units
from graphpar.partition.pipeline import partition as partition_chain
from graphpar.partition.settings import Microbatches, ScheduleWish, searched
from graphpar.partition.types import Partition, Replica, TensorWidth
from graphpar.plans.build import PlanSubject, make_plan, predict
from graphpar.plans.plan import Plan, hash_of
from graphpar.plans.records import PlanPrecision
from graphpar.precision.auto import (
    Answer,
    MeasureErrors,
    check_budget,
    choose_auto,
    uniform_answer,
)
from graphpar.precision.formats import (
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
from graphpar.precision.remedies import FORMATS_S, with_format_remedies
from graphpar.precision.search import Pricing, candidate_formats
from graphpar.precision.sensitivity import (
    Sensitivities,
    TrueErrors,
    estimated,
    measure_sensitivities,
)
from graphpar.preparation import Prepared, lower, trial_of
from graphpar.runtime.assemble import stage_links
from graphpar.schedule.timing import Timing
from graphpar.training import Training
from graphpar.wishes import (
    allowed_microbatches,
    allowed_schedule,
    allowed_zero_levels,
    may_repeat,
    possible_zero_levels,
    uncut_note,
)

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
    tried: Tried | None = None,
    rewritten: Mapping[str, Rewritten] | None = None,
    known: dict[int, UnitPricer] | None = None,
) -> CostTable:
    """The table of numbers that the partitioner reads.

    With `formats` every device's numbers are those of the graph it runs; `precision` alone is a
    shortcut for a device that does everything in it. With `timings`, by the kind of device, the numbers
    of devices whose units compute in the format that was timed are what they were timed at.

    What tables of one model have in common may be given: `tried` is what the optimiser takes,
    `rewritten` what devices run in their formats, `known` the pricers of these graphs (`Roofline.price`).
    """
    state, on_gpu, on_cpu = tried or tried_optimizer(train, cluster)
    limit = 1 if prepared.batch_reason else _UNSPLIT
    options = PricingOptions(
        batch=prepared.graph.batch,
        training=train is not None,
        precision=precision,
        optimizer_state_bytes_per_parameter_byte=state,
        update_share=on_gpu.share,
        update_copies=on_gpu.copies,
        cpu_update_share=on_cpu.share,
        cpu_update_copies=on_cpu.copies,
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
    groups = () if prepared.in_step_reason or joins else candidate_groups(cluster, widest, meshes)
    check_budget(precision_budget)
    if calibration is None and any(device.is_local_cpu for device in cluster.devices):
        calibration = Calibration.cached()
    planning = _Planning(
        prepared=prepared,
        cluster=cluster,
        train=train,
        calibration=calibration,
        precision=precision,
        precision_budget=precision_budget,
        example=example,
        timed=_timed(prepared, cluster, train, precision, calibration, example, measure_s),
        tensor=tensor,
        groups=tuple(groups),
        joins=joins,
        schedule=allowed_schedule(prepared, train),
        microbatches=allowed_microbatches(prepared, train),
        zero_levels=allowed_zero_levels(train),
        gap=gap,
        clock=PlanTime(time_limit_s),
    )
    answer = planning.answer()
    found = planning.ordered(answer)
    explanation = planning.explanation(answer, found, explain_s)
    lacking = widest > 1 and prepared.in_step_reason
    ungrouped = f"no tensor groups: {prepared.in_step_reason}, which they do not do" if lacking else ""
    return plan_of(
        prepared,
        cluster,
        labelled(answer.table, answer.formats),
        with_formats(found, answer.formats),
        {**planning.options(), "time_limit_s": time_limit_s},
        precision=precision,
        notes=planning.notes(answer, found, ungrouped),
        explanation=explanation,
        calibration=calibration,
        error_budget=answer.report,
        train=train,
        retime=planning.timed.again,
        assumptions=(*planning.timed.untimed, *described(cluster.devices)),
    )


@dataclass(frozen=True)
class _Timed:
    """Seconds of the model's units on this machine.

    Attributes:
        seconds: By kind of device.
        untimed: What was not timed, and why.
        again: Tries a plan's stages and corrects their seconds; None where nothing can be run.
    """

    seconds: Mapping[str, ModelTiming] = field(default_factory=dict)
    untimed: tuple[str, ...] = ()
    again: Callable[[Partition, Timing], tuple[Timing, str]] | None = None


def _timed(
    prepared: Prepared,
    cluster: Cluster,
    train: Training | None,
    precision: str,
    calibration: Calibration | None,
    example: Example | None,
    measure_s: float,
) -> _Timed:
    if example is None or measure_s <= 0:
        return _Timed()

    def priced(alone: Cluster, formats: Formats) -> CostTable:
        return price(prepared, alone, train=train, calibration=calibration, formats=formats)

    state_ratio = optimizer_state(train) if train else 0.0
    wanted = Timings(prepared, example, train, precision, measure_s, state_ratio, priced)
    seconds, untimed = wanted.of(cluster, calibration)
    return _Timed(seconds, untimed, partial(wanted.retimed, cluster, calibration))


@dataclass(frozen=True, kw_only=True)
class _Planning:
    """What a plan is made for, and what of that the model and its optimiser allow.

    Attributes:
        groups: Tensor groups that may be formed.
        joins: The optimiser, where a step on one parameter depends on all others; empty otherwise.
        zero_levels: ZeRO levels that stages may choose besides 0.
        clock: Deals out the time limit.
    """

    prepared: Prepared
    cluster: Cluster
    train: Training | None
    calibration: Calibration | None
    precision: str
    precision_budget: float
    example: Example | None
    timed: _Timed
    tensor: TensorWidth
    groups: tuple[Replica, ...]
    joins: str
    schedule: ScheduleWish
    microbatches: Microbatches
    zero_levels: tuple[int, ...]
    gap: float
    clock: PlanTime

    def table(self, formats: Formats) -> CostTable:
        """The prices of everything that may be chosen, every unit in its format."""
        table = price(
            self.prepared,
            self.cluster,
            train=self.train,
            calibration=self.calibration,
            formats=formats,
            timings=self.timed.seconds,
        )
        if self.groups:
            table = with_groups(
                table,
                self.prepared,
                self.cluster,
                self.groups,
                train=self.train,
                formats=formats,
                calibration=self.calibration,
                least_gain=LEAST_GAIN if self.tensor == "auto" else 0.0,
                leaner=True,
            )
        if not may_repeat(table):
            return table
        return with_modes(table, StageOptions(recompute=True, zero=self.zero_levels))

    def solve(self, table: CostTable) -> Partition:
        """The best stages that the search finds."""
        whole = as_one_unit(table) if self.joins else table
        search = partial(
            partition_chain,
            whole,
            gap=self.gap,
            schedule=searched(self.schedule),
            microbatches=self.microbatches,
            zero_levels=possible_zero_levels(self.train),
        )
        found = self.clock.search(search)
        if not self.joins:
            return found
        # A model that is not cut has no stages that wait for each other.
        chosen = best_played(whole, found, found, searched(self.schedule), self.microbatches)
        return told_in_units(chosen, table.num_units)

    def answer(self) -> Answer:
        """Stages with their formats, which `auto` chooses in turn."""
        cluster, calibration = self.cluster, self.calibration
        if self.precision == "auto":
            cast_s = _cast_seconds(cluster, calibration, self.train is not None)
            sensitivities, true = _errors(self.prepared, cluster, self.train, self.example)
            pricing = Pricing(self.table, self.solve, cast_s)
            answer = choose_auto(cluster, pricing, sensitivities, true, self.precision_budget, self.gap)
            return replace(answer, notes=(*answer.notes, *unmeasured_notes(cluster, calibration)))
        number = len(self.prepared.chain.units)
        try:
            answer = uniform_answer(cluster, self.precision, number, self.table, self.solve)
        except InfeasibleError as error:
            wish = searched(self.schedule), self.microbatches
            tell = partial(with_format_remedies, error, cluster, self.precision, number, self.table, wish)
            raise self.clock.explain(tell, FORMATS_S) from None
        slow = slow_format_notes(cluster, self.precision, calibration)
        return replace(answer, notes=(*answer.notes, *slow))

    def ordered(self, answer: Answer) -> Partition:
        """The stages found, or others that are shorter in another order of work and as precise."""
        found = answer.found
        if self.joins:
            return found
        choose = partial(scheduled, answer.table, found, self.schedule, self.microbatches)
        chosen = self.clock.choose(choose, CHOICE_S)
        known = self.precision != "auto" or runs_as(chosen, found, answer.formats)
        return chosen if known and not quarrels(chosen, answer.formats) else found

    def explanation(self, answer: Answer, found: Partition, most_s: float) -> Explanation | None:
        """Why the plan is as it is, as far as time allows to say."""
        explain = partial(
            explain_partition,
            answer.table,
            found,
            schedule=searched(self.schedule),
            microbatches=self.microbatches,
            whole=bool(self.joins),
        )
        return self.clock.explain(explain, most_s)

    def notes(self, answer: Answer, found: Partition, ungrouped: str) -> tuple[str, ...]:
        """All remarks; `ungrouped` says why there are no tensor groups, where some were asked for."""
        sizes = [n for pipeline in answer.found.pipelines for n in pipeline.sizes()]
        # Under `auto` most of the work may stay in float32.
        wide = self.precision if self.precision != "auto" else "float32"
        uncut = uncut_note(self.joins) if self.joins else ""
        return (
            *answer.notes,
            *filter(None, (uncut, ungrouped)),
            *width_notes(found, self.tensor, self.groups, answer.table),
            *extrapolations(
                self.prepared.graph, self.cluster, self.calibration, wide, max(sizes, default=1)
            ),
        )

    def options(self) -> dict[str, str | int | float | bool | None]:
        """What was asked for, as the plan keeps it."""
        tensor = "x".join(map(str, self.tensor)) if isinstance(self.tensor, tuple) else self.tensor
        asked: dict[str, str | int | float | bool | None] = {
            "gap": self.gap,
            "schedule": self.schedule,
            "microbatches": self.microbatches,
            "calibrated": self.calibration is not None,
            "precision": self.precision,
            "tensor": tensor,
        }
        if self.precision == "auto":
            asked["precision_budget"] = self.precision_budget
        return asked


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
