"""Stages and formats in turn: what `precision="auto"` searches, at given corrections of the errors."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from graphpar.cluster import Cluster
from graphpar.cost import CostTable
from graphpar.device import Device
from graphpar.ir.formats import FORMATS, PARTLY, base_format
from graphpar.partition.certificate import BEYOND, certificate
from graphpar.partition.formats import (
    Errors,
    FormatChoice,
    FormatProblem,
    StageRun,
    choice_of,
    choose_formats,
    errors_of,
    looser,
    tighter,
)
from graphpar.partition.types import ROUNDING, Partition, PipelineChoice, Replica, StageChoice
from graphpar.plans.records import PlanBudget, PlanPrecision, PlanUnitFormat
from graphpar.precision.cheapest import cheapest
from graphpar.precision.formats import (
    Formats,
    formats_of,
    quarrels,
    settled,
    with_formats,
)
from graphpar.precision.sensitivity import Sensitivities

_ROUNDS = 3
NO_CORRECTION = (1.0, 1.0)
NEAR = 1e-3
"""Steps that differ by a smaller share are taken for the same."""


@dataclass(frozen=True)
class Pricing:
    """How to price and to plan under given formats, and what casts cost.

    `cast_s(device, elements)` are seconds of casting so many elements, forward and backward.
    """

    table: Callable[[Formats], CostTable]
    solve: Callable[[CostTable], Partition]
    cast_s: Callable[[Device, float], float]


def agreed(
    cluster: Cluster,
    formats: Formats,
    price: Callable[[Formats], CostTable],
    solve: Callable[[CostTable], Partition],
) -> tuple[Formats, CostTable, Partition]:
    """Plan under formats; devices that share a stage but no format fall back to float32."""
    table = price(formats)
    found = solve(table)
    while groups := quarrels(found, formats):
        formats = settled(formats, groups, cluster)
        table = price(formats)
        found = solve(table)
    return formats, table, found


def lower_formats(device: Device) -> tuple[str, ...]:
    """Lower formats worth considering on a device: what has fast units for them."""
    if device.is_local_cpu:
        return ("bfloat16", "bfloat16_linear")
    return tuple(f for f in formats_of(device) if f != "float32")


def candidate_formats(cluster: Cluster) -> tuple[str, ...]:
    """Lower formats worth considering anywhere in a cluster."""
    found = {f for device in cluster.devices for f in lower_formats(device)}
    return tuple(f for f in (*FORMATS, *PARTLY) if f in found)


def _ratios(measured: Errors | None, estimated: Errors) -> Errors:
    """What was measured of a whole over what was estimated."""
    if measured is None:
        return NO_CORRECTION
    pairs = zip(measured, estimated, strict=True)
    output, gradient = (m / e if e > 0 and m > 0 else 1.0 for m, e in pairs)
    return output, gradient


def within(errors: Errors, correction: Errors, budget: float) -> bool:
    """Whether estimated errors, corrected, keep a budget."""
    return all(a * e <= budget * (1 + 1e-6) for a, e in zip(correction, errors, strict=True))


@dataclass(frozen=True)
class Candidate:
    """Stages planned at the prices of some formats, and the errors of those formats."""

    formats: Formats
    table: CostTable
    found: Partition
    errors: Errors

    @property
    def lowered(self) -> bool:
        """Whether any stage has a unit in a lower format."""
        stages = with_formats(self.found, self.formats).pipelines
        return any(f != "float32" for p in stages for s in p.stages for f in s.formats)


class Search:
    """Tables of all formats, made once, and the plans that come out of them under a budget.

    Args:
        cluster: The devices.
        pricing: How to price and plan.
        sensitivities: Errors of every unit in every lower format.
        budget: Largest relative error, of the result and of the gradient.
    """

    def __init__(
        self, cluster: Cluster, pricing: Pricing, sensitivities: Sensitivities, budget: float
    ) -> None:
        self.cluster, self.pricing, self.sensitivities = cluster, pricing, sensitivities
        self.budget = budget
        self.tables = {"float32": pricing.table(Formats({}))}
        self.num_units = self.tables["float32"].num_units
        for f in candidate_formats(cluster):
            having = [d.name for d in cluster.devices if f in lower_formats(d)]
            self.tables[f] = pricing.table(Formats(dict.fromkeys(having, (f,) * self.num_units)))
        self.relaxed = pricing.solve(cheapest(list(self.tables.values())))
        self.errors = tuple(
            {
                f: sensitivities.errors[f][unit]
                for f in self.tables
                if f != "float32" and all(map(math.isfinite, sensitivities.errors[f][unit]))
            }
            for unit in range(self.num_units)
        )

    def run(self, budget: float, correction: Errors = NO_CORRECTION) -> Candidate:
        """The best plan whose units' errors together, corrected, are within a budget."""
        best: Candidate | None = None
        stages, seen = self.relaxed, set[tuple[tuple[str, tuple[str, ...]], ...]]()
        for _ in range(_ROUNDS):
            formats = self._spread(stages, choose_formats(self.problem(stages, correction), budget))
            key = tuple(sorted(formats.by_device.items()))
            if key in seen:
                break
            seen.add(key)
            made = self._planned(formats)
            if within(made.errors, correction, budget) and (
                best is None or made.found.objective_s < best.found.objective_s
            ):
                best = made
            stages = made.found
        if best is None:
            best = self._planned(Formats({}))
        return best

    def _planned(self, formats: Formats) -> Candidate:
        pricing = self.pricing
        formats, table, found = agreed(self.cluster, formats, pricing.table, pricing.solve)
        stages = [s for p in with_formats(found, formats).pipelines for s in p.stages]
        errors = errors_of(self.problem(found), [s.formats for s in stages])
        return Candidate(formats, table, found, errors)

    def next_shorter(self, made: Candidate) -> Candidate | None:
        """The plan of the least larger errors that shortens the step of these stages, if any does."""
        more = looser(*self._as_chosen(made, NO_CORRECTION))
        return self._planned(self._spread(made.found, more[1])) if more is not None else None

    def gains_by_more(self, made: Candidate) -> bool:
        """Whether any budget would make the step of these stages shorter."""
        return looser(*self._as_chosen(made, NO_CORRECTION)) is not None

    def problem(self, found: Partition, correction: Errors = NO_CORRECTION) -> FormatProblem:
        """The choice of formats for the stages of a partition."""
        stages = tuple(
            self._stage(number, pipeline, stage)
            for number, pipeline in enumerate(found.pipelines)
            for stage in pipeline.stages
        )
        return FormatProblem(
            stages, tuple(p.microbatches for p in found.pipelines), self.errors, correction
        )

    def _stage(self, number: int, pipeline: PipelineChoice, stage: StageChoice) -> StageRun:
        size = max(pipeline.sizes())
        devices = [self.cluster.device(d) for r in stage.replicas for d in r.devices]
        allowed = [
            f for f in self.tables if f == "float32" or all(f in lower_formats(d) for d in devices)
        ]
        wide = self.tables["float32"]
        return StageRun(
            pipeline=number,
            first=stage.first,
            last=stage.last,
            most_microbatches=max(r.microbatches for r in stage.replicas),
            seconds=tuple(
                self._seconds(stage, unit, size, allowed) for unit in range(stage.first, stage.last)
            ),
            cast_s=tuple(
                max(self.pricing.cast_s(d, wide.cut_bytes(unit, size)[0] / 4) for d in devices)
                for unit in range(stage.first, stage.last)
            ),
        )

    def _seconds(
        self, stage: StageChoice, unit: int, size: int, allowed: Sequence[str]
    ) -> dict[str, float]:
        """Seconds of a unit by format; a partly lower format only where it differs from its base."""
        known = [f for f in allowed if f == "float32" or f in self.errors[unit]]
        seconds = {f: self._unit_s(self.tables[f], stage, unit, size) for f in known}
        return {f: s for f, s in seconds.items() if f not in PARTLY or s != seconds.get(base_format(f))}

    def _unit_s(self, table: CostTable, stage: StageChoice, unit: int, size: int) -> float:
        """Seconds of one microbatch of a unit on the slowest replica."""
        times = []
        for mode in map(partial(_mode_of, table, stage), stage.replicas):
            backward_s = table.backward_s(unit, mode, size) if table.training else 0.0
            times.append(table.forward_s(unit, mode, size) + backward_s)
        return max(times)

    def _unit_bytes(self, table: CostTable, stage: StageChoice, unit: int, size: int) -> float:
        """What all members of a replica keep of one microbatch of a unit and its weights; the most."""
        held = []
        for mode in map(partial(_mode_of, table, stage), stage.replicas):
            cost = table.every_mode[mode].costs[table.units[unit]]
            kept = sum(table.at_size(row, size) for row in cost.saved_bytes)
            held.append(kept + sum(cost.weight_bytes))
        return max(held)

    def _spread(self, found: Partition, choice: FormatChoice) -> Formats:
        """The choice for every device: what runs a unit decides for those that might have run it."""
        stages = [stage for pipeline in found.pipelines for stage in pipeline.stages]
        wanted = ["float32"] * self.num_units
        own: dict[str, dict[int, str]] = {}
        classes = self.tables["float32"].device_classes
        for stage, formats in zip(stages, choice.formats, strict=True):
            for unit, f in zip(range(stage.first, stage.last), formats, strict=True):
                wanted[unit] = f if f != "float32" else wanted[unit]
                for replica in stage.replicas:
                    for device in replica.devices:
                        name = classes[self.tables["float32"].class_of[device]].devices[0]
                        own.setdefault(name, {})[unit] = f
        by_device = {}
        for group in classes:
            mine = lower_formats(self.cluster.device(group.devices[0]))
            chosen = own.get(group.devices[0], {})
            units = tuple(
                chosen.get(u, f if f == "float32" or f in mine else next(iter(mine), "float32"))
                for u, f in enumerate(wanted)
            )
            if any(f != "float32" for f in units):
                by_device.update(dict.fromkeys(group.devices, units))
        return Formats(by_device)

    def certified(self, best: Candidate, gap: float) -> Partition:
        """The partition with the bound that holds whatever formats are chosen."""
        found = best.found
        known = certificate(found.objective_s, self.relaxed.bound_s, self.relaxed.physical_bound_s)
        cut = found.truncated_by
        if known.beyond:
            cut = (*cut, BEYOND)
        elif known.gap > max(gap, found.gap) + ROUNDING:
            cut = (*cut, "formats: the bound takes every unit's fastest format, whatever its error")
        return replace(
            found,
            bound_s=known.bound_s,
            gap=known.gap,
            status=known.status,
            physical_bound_s=min(found.physical_bound_s, self.relaxed.physical_bound_s),
            truncated_by=cut,
            family=f"{found.family}; every unit in any format its devices have",
        )

    def report(
        self,
        best: Candidate,
        measured: Errors | None,
        correction: Errors,
        refused: Sequence[tuple[Candidate, Errors]],
        told: str,
    ) -> PlanPrecision:
        """How the budget was spent, and what others would buy.

        Estimates of other choices are corrected by what was measured of this one. `refused` are choices
        that were run and broke the budget, with what was measured of them.
        """
        seen = _ratios(measured, best.errors)
        problem, chosen = self._as_chosen(best, seen)
        less = tighter(problem, chosen)
        careful = max(correction[0], seen[0]), max(correction[1], seen[1])
        more = self._looser(best, careful, refused)
        output, gradient = best.errors
        return PlanPrecision(
            budget=self.budget,
            output_error=output,
            gradient_error=gradient,
            measured_output_error=measured[0] if measured is not None else None,
            measured_gradient_error=measured[1] if measured is not None else None,
            step_s=chosen.step_s,
            looser=more,
            tighter=PlanBudget(budget=less[0], step_s=less[1].step_s) if less else None,
            units=tuple(self._units(best)),
            note="; ".join(part for part in (self.sensitivities.note, told) if part),
        )

    def _as_chosen(self, made: Candidate, correction: Errors) -> tuple[FormatProblem, FormatChoice]:
        """The choice of formats for a candidate's stages, and what it chose."""
        problem = self.problem(made.found, correction)
        stages = [s for p in with_formats(made.found, made.formats).pipelines for s in p.stages]
        return problem, choice_of(problem, [s.formats for s in stages])

    def _looser(
        self, best: Candidate, correction: Errors, refused: Sequence[tuple[Candidate, Errors]]
    ) -> PlanBudget | None:
        """The least budget above this one that is known, or else expected, to buy a shorter step."""
        problem, chosen = self._as_chosen(best, correction)
        runs = [(self._as_chosen(made, correction)[1].step_s, max(errors)) for made, errors in refused]
        known = [PlanBudget(budget=error, step_s=step_s) for step_s, error in runs]
        found = [other for other in known if other.step_s < chosen.step_s * (1 - NEAR)]
        more = looser(problem, chosen)
        if more is not None and not any(abs(k.step_s - more[1].step_s) <= NEAR * k.step_s for k in known):
            # What the search had no time to run may break the budget for all that is known.
            found.append(PlanBudget(budget=max(more[0], self.budget), step_s=more[1].step_s))
        return min(found, key=lambda other: (other.budget, other.step_s), default=None)

    def _units(self, best: Candidate) -> Sequence[PlanUnitFormat]:
        rows: dict[int, PlanUnitFormat] = {}
        wide = self.tables["float32"]
        # Prices go by how the search ran a stage; formats are written into it afterwards.
        lower = with_formats(best.found, best.formats).pipelines
        for pipeline, told in zip(best.found.pipelines, lower, strict=True):
            size = max(pipeline.sizes())
            for stage, chosen in zip(pipeline.stages, told.stages, strict=True):
                for unit, f in zip(range(stage.first, stage.last), chosen.formats, strict=True):
                    if f == "float32":
                        continue
                    at = stage, unit, size
                    saved_s = self._unit_s(wide, *at) - self._unit_s(self.tables[f], *at)
                    saved_bytes = self._unit_bytes(wide, *at) - self._unit_bytes(self.tables[f], *at)
                    before = rows.get(unit)
                    output, gradient = self.errors[unit][f]
                    rows[unit] = PlanUnitFormat(
                        unit=unit,
                        format=f,
                        output_error=output,
                        gradient_error=gradient,
                        source=self.sensitivities.sources[f][unit],
                        saved_s=pipeline.microbatches * saved_s + (before.saved_s if before else 0.0),
                        saved_bytes=saved_bytes + (before.saved_bytes if before else 0.0),
                    )
        return [rows[unit] for unit in sorted(rows)]


def _mode_of(table: CostTable, stage: StageChoice, replica: Replica) -> int:
    """How a replica runs a stage; where groups have no price in a table, as its first device alone."""
    mode = table.mode_number(stage, replica)
    return table.class_of[replica.device] if mode is None else mode
