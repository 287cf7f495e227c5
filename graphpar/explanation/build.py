"""Work out why a partition is as it is: change one thing at a time, price again, solve again.

Changes by hand (`re-priced`): a block over a cut, a replica left out or added, recomputation, ZeRO,
schedule, microbatches, shares; everything else stays, so what they cost is an upper bound on the true
price of that choice. Shadow prices are from solving again with a little more of one resource
(`re-solved`, with a bound) or, where that takes too long, from the dual of the linear programme of
fractional work (`dual`). Whatever time did not allow is named in `Explanation.left_out`.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

from graphpar.choice.comparison import step_of
from graphpar.cost import CostTable, LinkCost
from graphpar.errors import InfeasibleError, VerifyError
from graphpar.explanation.account import (
    Alternative,
    Choice,
    ChoiceKind,
    Explanation,
    ResourceKind,
    ShadowPrice,
)
from graphpar.explanation.words import FULL, binding, runner_up
from graphpar.partition.bounds import device_prices_s
from graphpar.partition.gradient_sums import modes_of
from graphpar.partition.infeasible import more_devices, scale_memory
from graphpar.partition.one_unit import as_one_unit
from graphpar.partition.pipeline import partition as solve
from graphpar.partition.pipeline_price import Price
from graphpar.partition.settings import Microbatches, ScheduleChoice, microbatch_counts
from graphpar.partition.types import Partition, PipelineChoice, Replica, ScheduleName, StageChoice
from graphpar.schedule.simulated import deal_any, has_formula, price_any, simulated
from graphpar.schedule.step_parts import told_parts
from graphpar.units import format_bytes

_MORE = 1.1
"""Memory and bandwidth are tried with a tenth more."""

Pipelines = tuple[PipelineChoice, ...]


def explain_partition(
    table: CostTable,
    found: Partition,
    *,
    time_limit_s: float = 2.0,
    schedule: ScheduleChoice = "auto",
    microbatches: Microbatches = "auto",
    whole: bool = False,
) -> Explanation:
    """Explain a partition of a table.

    Args:
        table: What it was made for.
        found: The partition.
        time_limit_s: Seconds after which nothing new is tried; what was not is said.
        schedule: What was searched for; solving again searches for the same.
        microbatches: The number that was fixed, if any.
        whole: Whether the model may not be cut.
    """
    settings = _Settings(schedule, microbatches, whole)
    work = _Work(table, found, time.monotonic() + time_limit_s, settings)
    choices = [c for c in work.choices() if c.alternatives]
    prices = [] if work.played else list(work.shadow_prices())
    parts = told_parts(table, found)
    never = float("inf")
    return Explanation(
        step_s=found.objective_s,
        bound_s=found.bound_s,
        gap=found.gap,
        parts=parts,
        binding=tuple(binding(table, found, parts)),
        choices=tuple(sorted(choices, key=lambda c: never if c.margin_s is None else c.margin_s)),
        runners_up=tuple(runner_up(*work.both(other), schedule) for other in found.runners_up),
        shadow_prices=tuple(sorted(prices, key=lambda p: -(p.saves_s or 0.0))),
        left_out=tuple(work.left_out),
    )


@dataclass(frozen=True)
class _Change:
    """One thing done in another way."""

    label: str
    pipelines: Pipelines
    schedule: ScheduleName


@dataclass(frozen=True)
class _Settings:
    """What was asked for when the partition was made."""

    schedule: ScheduleChoice
    microbatches: Microbatches
    whole: bool


class _Work:
    """One explanation in the making."""

    def __init__(
        self, table: CostTable, found: Partition, deadline_s: float, settings: _Settings
    ) -> None:
        self._table = table
        self._found = found
        self._settings = settings
        # Solving again gives plans whose step is a formula: they are compared with such a one.
        formulas = (p for p in (found, *found.runners_up) if has_formula(p.schedule))
        self._searched = min(formulas, key=lambda p: p.objective_s, default=found)
        self._deadline_s = deadline_s
        self.left_out: list[str] = []
        self.played = has_formula(found.schedule) and self._searched.objective_s < found.objective_s
        if self.played:
            self.left_out.append(
                "shadow prices: the plan was chosen as played through, solving again goes by the formula"
            )
        self._step_s = step_of(table, found) if self.played else found.objective_s

    def both(self, other: Partition) -> tuple[Partition, Partition]:
        """This plan and another one by the same measure: by the formula where both have one, and played
        through where either has none."""
        played = self.played or not all(has_formula(p.schedule) for p in (self._found, other))
        found_s, other_s = (
            step_of(self._table, p) if played else p.objective_s for p in (self._found, other)
        )
        return replace(self._found, objective_s=found_s), replace(other, objective_s=other_s)

    def _price(self, pipelines: Pipelines, schedule: ScheduleName) -> Price:
        if not self.played:
            return price_any(self._table, pipelines, schedule)
        found = simulated(self._table, pipelines, schedule).partition
        return Price(found.objective_s, found.parts, found.peak_bytes)

    # --- changes by hand ---

    def choices(self) -> Iterator[Choice]:
        """All choices with their alternatives, as far as time allows."""
        yield self._choice("schedule", "schedule", self._found.schedule, self._schedules())
        stage = 0
        for number, pipeline in enumerate(self._found.pipelines):
            where = f"pipeline {number}"
            yield self._choice(
                "microbatches",
                f"microbatches of {where}",
                str(pipeline.microbatches),
                self._microbatches(number),
                pipeline=number,
            )
            if len(self._found.pipelines) > 1:
                changes = self._shares(number)
                chosen = f"{pipeline.samples} samples"
                yield self._choice("share", f"share of {where}", chosen, changes, pipeline=number)
            for index in range(len(pipeline.stages)):
                if self._late(f"choices from stage {stage} on"):
                    return
                yield from self._stage_choices(number, index, stage)
                stage += 1
        yield from self._left_out_devices()

    def _stage_choices(self, number: int, index: int, stage: int) -> Iterator[Choice]:
        choice = self._found.pipelines[number].stages[index]
        if index > 0:
            cut = self._table.unit_names[choice.first]
            changes = self._cuts(number, index)
            near = (choice.first - 1, choice.first)
            yield self._choice("cut", f"cut before {cut}", cut, changes, number, stage, near)
        units = tuple(range(choice.first, choice.last))
        width = len(choice.replicas)
        if width > 1:
            changes = self._fewer(number, index)
            kept = f"{width} replicas"
            yield self._choice(
                "replicas", f"replicas of stage {stage}", kept, changes, number, stage, units
            )
        options: tuple[tuple[ChoiceKind, str], ...] = (
            ("recompute", str(choice.recompute)),
            ("zero", str(choice.zero)),
            ("precision", choice.precision),
        )
        for kind, chosen in options:
            changes = self._options(number, index, kind)
            name = f"{'ZeRO level' if kind == 'zero' else kind} of stage {stage}"
            yield self._choice(kind, name, chosen, changes, number, stage, units)
        changes = self._swaps(number, index)
        kinds = ", ".join(dict.fromkeys(self._kinds(choice)))
        yield self._choice("devices", f"devices of stage {stage}", kinds, changes, number, stage, units)

    def _choice(
        self,
        kind: ChoiceKind,
        subject: str,
        chosen: str,
        changes: Iterator[_Change],
        pipeline: int | None = None,
        stage: int | None = None,
        units: tuple[int, ...] = (),
    ) -> Choice:
        tried = [self._try(change) for change in changes]
        ranked = sorted(tried, key=lambda a: float("inf") if a.costs_s is None else a.costs_s)
        return Choice(kind, subject, chosen, tuple(ranked), pipeline, stage, units)

    def _try(self, change: _Change) -> Alternative:
        table = self._table
        dealt = tuple(deal_any(table, p, change.schedule) for p in change.pipelines)
        if any(r.microbatches == 0 for p in dealt for s in p.stages for r in s.replicas):
            return _impossible(change.label, "a replica would get no microbatch")
        try:
            cost = self._price(dealt, change.schedule)
        except VerifyError:
            return _impossible(change.label, "the stages of a device would have unlike replicas")
        excess = {
            d: (peak, table.device_classes[table.class_of[d]].memory_bytes)
            for d, peak in cost.peak_bytes.items()
        }
        worst = max(excess, key=lambda d: excess[d][0] - excess[d][1])
        need, have = excess[worst]
        if need > have * (1 + 1e-9):
            return _impossible(
                change.label, f"{worst} would need {format_bytes(need)} of {format_bytes(have)}"
            )
        extra = cost.objective_s - self._step_s
        return Alternative(change.label, cost.objective_s, extra, "re-priced")

    def _with(self, number: int, pipeline: PipelineChoice) -> Pipelines:
        before = self._found.pipelines
        return (*before[:number], pipeline, *before[number + 1 :])

    def _with_stages(self, number: int, index: int, *stages: StageChoice) -> Pipelines:
        """The plan with some stages of a pipeline, from `index` on, in another way."""
        old = self._found.pipelines[number]
        rest = (*old.stages[:index], *stages, *old.stages[index + len(stages) :])
        return self._with(number, replace(old, stages=rest))

    def _schedules(self) -> Iterator[_Change]:
        if not self._table.training or self._table.tail_reason:
            return
        shared = len(self._found.used_devices) < sum(
            len(r.devices) for p in self._found.pipelines for s in p.stages for r in s.replicas
        )
        deep = any(len(p.stages) > 1 and p.microbatches > 1 for p in self._found.pipelines)
        names: list[ScheduleName] = [] if shared else ["1f1b", "gpipe"]
        names += ["zero-bubble"] if deep else []
        names += ["interleaved"] if shared else []
        for name in names:
            if name != self._found.schedule:
                yield _Change(name, self._found.pipelines, name)

    def _microbatches(self, number: int) -> Iterator[_Change]:
        old = self._found.pipelines[number]
        counts = microbatch_counts(self._table, old.samples, "auto")
        lower = [n for n in counts if n < old.microbatches][-1:]
        for count in (*lower, *[n for n in counts if n > old.microbatches][:1]):
            pipelines = self._with(number, replace(old, microbatches=count))
            yield _Change(f"{count} microbatches", pipelines, self._found.schedule)

    def _shares(self, number: int) -> Iterator[_Change]:
        step = max(1, self._table.batch // 64)
        other = (number + 1) % len(self._found.pipelines)
        for delta in (-step, step):
            pipelines = list(self._found.pipelines)
            for at, change in ((number, delta), (other, -delta)):
                samples = pipelines[at].samples + change
                count = min(pipelines[at].microbatches, samples)
                if samples < 1:
                    break
                pipelines[at] = replace(pipelines[at], samples=samples, microbatches=count)
            else:
                label = f"{pipelines[number].samples} samples"
                yield _Change(label, tuple(pipelines), self._found.schedule)

    def _cuts(self, number: int, index: int) -> Iterator[_Change]:
        left, right = self._found.pipelines[number].stages[index - 1 : index + 1]
        for delta in (-1, 1):
            cut = right.first + delta
            if left.first < cut < right.last:
                stages = replace(left, last=cut), replace(right, first=cut)
                name = self._table.unit_names[cut]
                pipelines = self._with_stages(number, index - 1, *stages)
                yield _Change(f"before {name}", pipelines, self._found.schedule)

    def _fewer(self, number: int, index: int) -> Iterator[_Change]:
        stage = self._found.pipelines[number].stages[index]
        seen: set[tuple[int, ...]] = set()
        for at, replica in enumerate(stage.replicas):
            kinds = tuple(self._table.class_of[d] for d in replica.devices)
            if kinds not in seen:
                seen.add(kinds)
                rest = (*stage.replicas[:at], *stage.replicas[at + 1 :])
                # One that is left alone has nobody to divide anything with.
                fewer = replace(stage, replicas=rest, zero=stage.zero if len(rest) > 1 else 0)
                if any(self._table.mode_number(fewer, r) is None for r in rest):
                    continue
                pipelines = self._with_stages(number, index, fewer)
                yield _Change(f"without {', '.join(replica.devices)}", pipelines, self._found.schedule)

    def _options(self, number: int, index: int, kind: ChoiceKind) -> Iterator[_Change]:
        """The same stage with another precision, recomputation or ZeRO level, where it is priced."""
        stage = self._found.pipelines[number].stages[index]
        attribute = {"recompute": "recompute", "zero": "zero", "precision": "precision"}[kind]
        values = {getattr(m, attribute) for m in self._table.every_mode} - {getattr(stage, attribute)}
        for value in sorted(values, key=str):
            other = replace(stage, **{attribute: value})
            if any(self._table.mode_number(other, r) is None for r in other.replicas):
                continue
            if other.zero and len(other.replicas) == 1:
                continue
            if other.zero > 1 and self._found.schedule not in ("gpipe", "1f1b"):
                continue
            pipelines = self._with_stages(number, index, other)
            yield _Change(f"{attribute} {value}", pipelines, self._found.schedule)

    def _swaps(self, number: int, index: int) -> Iterator[_Change]:
        """The devices of a stage in exchange for those of the next one, where they are unlike."""
        stages = self._found.pipelines[number].stages
        if index + 1 >= len(stages):
            return
        left, right = stages[index : index + 2]
        if self._kinds(left) == self._kinds(right):
            return
        swapped = replace(left, replicas=right.replicas), replace(right, replicas=left.replicas)
        try:
            for stage in swapped:
                modes_of(self._table, stage)
        except ValueError:
            return
        pipelines = self._with_stages(number, index, *swapped)
        yield _Change("in exchange with the next stage", pipelines, self._found.schedule)

    def _kinds(self, stage: StageChoice) -> list[str]:
        table = self._table
        return [table.device_classes[table.class_of[d]].name for r in stage.replicas for d in r.devices]

    def _left_out_devices(self) -> Iterator[Choice]:
        used = set(self._found.used_devices)
        for device_class in self._table.device_classes:
            idle = [d for d in device_class.devices if d not in used]
            if not idle:
                continue
            if self._late(f"what idle {device_class.name} could do"):
                return
            changes = self._added(idle[0])
            subject = f"{len(idle)} of {device_class.name} without work"
            yield self._choice("left out", subject, "no work", changes)

    def _added(self, device: str) -> Iterator[_Change]:
        """A device more for each stage that runs on single devices."""
        for number, pipeline in enumerate(self._found.pipelines):
            for index, stage in enumerate(pipeline.stages):
                if self._late(f"{device} as a replica of every stage"):
                    return
                wider = replace(stage, replicas=(*stage.replicas, Replica(device, 0)))
                fits = len(wider.replicas) <= min(self._table.max_replicas, pipeline.microbatches)
                if fits and all(self._table.mode_number(wider, r) is not None for r in wider.replicas):
                    pipelines = self._with_stages(number, index, wider)
                    label = f"{device} as a further replica of units {stage.first} to {stage.last - 1}"
                    yield _Change(label, pipelines, self._found.schedule)

    # --- more of a resource ---

    def shadow_prices(self) -> Iterator[ShadowPrice]:
        """What a little more of each resource is worth: solved again while time allows, else duals."""
        for kind, subject, have, change, unit, table in self._richer():
            left_s = self._deadline_s - time.monotonic()
            if left_s < 1.5 * self._found.seconds:
                self._late(f"solving again with more {kind} of {subject}", at_once=True)
                continue
            yield self._solved_again(kind, subject, have, change, unit, table, left_s)
        if self.left_out:
            yield from self._duals()

    def _solved_again(
        self,
        kind: ResourceKind,
        subject: str,
        have: float,
        change: float,
        unit: str,
        table: CostTable,
        left_s: float,
    ) -> ShadowPrice:
        gap = max(self._searched.gap, 1e-4)
        try:
            again = solve(
                as_one_unit(table) if self._settings.whole else table,
                gap=gap,
                time_limit_s=left_s,
                schedule=self._settings.schedule,
                microbatches=self._settings.microbatches,
                compare_simple=False,
            )
        except InfeasibleError:
            return ShadowPrice(kind, subject, have, change, unit, None, None, "re-solved")
        # More of a resource never hurts: where the search found nothing better, the old plan stands.
        step = min(again.objective_s, self._searched.objective_s)
        saves = self._searched.objective_s - step
        bound = min(again.bound_s, step)
        return ShadowPrice(kind, subject, have, change, unit, step, saves, "re-solved", bound)

    def _duals(self) -> Iterator[ShadowPrice]:
        for number, saves in enumerate(device_prices_s(self._table)):
            device_class = self._table.device_classes[number]
            if device_class.devices:
                have = float(len(device_class.devices))
                yield ShadowPrice("devices", device_class.name, have, 1.0, "devices", None, saves, "dual")

    def _richer(self) -> Iterator[tuple[ResourceKind, str, float, float, str, CostTable]]:
        """Resources with what there is, what is added, and the table that has it."""
        table = self._table
        for number, device_class in enumerate(table.device_classes):
            if device_class.devices:
                have = float(len(device_class.devices))
                more = more_devices(table, number, 1)
                yield "devices", device_class.name, have, 1.0, "devices", more
        for number, device_class in enumerate(table.device_classes):
            peaks = [self._found.peak_bytes.get(d, 0.0) for d in device_class.devices]
            have = device_class.memory_bytes
            if not peaks or max(peaks) < FULL * have:
                continue
            grown = scale_memory(table, _MORE).device_classes[number]
            classes = tuple(grown if i == number else c for i, c in enumerate(table.device_classes))
            richer = replace(table, device_classes=classes)
            yield "memory", device_class.name, have, have * (_MORE - 1), "bytes", richer
        yield from self._faster_links()

    def _faster_links(self) -> Iterator[tuple[ResourceKind, str, float, float, str, CostTable]]:
        table, topology = self._table, self._table.topology
        used = {topology.node_of[d] for d in self._found.used_devices}

        def faster(link: LinkCost) -> LinkCost:
            return replace(link, bytes_per_s=link.bytes_per_s * _MORE)

        if len(used) > 1:
            between = {pair: faster(link) for pair, link in topology.between.items()}
            network = replace(topology, network=faster(topology.network), between=between)
            have = topology.network.bytes_per_s
            more = replace(table, topology=network)
            yield "bandwidth", "the network", have, have * (_MORE - 1), "bytes/s", more
        counts = [topology.node_of[d] for d in table.class_of]
        if any(counts.count(node) > 1 for node in used):
            inside = {node: faster(link) for node, link in topology.inside.items()}
            have = max(topology.inside[node].bytes_per_s for node in used)
            more = replace(table, topology=replace(topology, inside=inside))
            yield "bandwidth", "links inside nodes", have, have * (_MORE - 1), "bytes/s", more

    def _late(self, what: str, *, at_once: bool = False) -> bool:
        if not at_once and time.monotonic() < self._deadline_s:
            return False
        self.left_out.append(f"{what}: no time left")
        return True


def _impossible(label: str, why: str) -> Alternative:
    return Alternative(label, None, None, "re-priced", impossible=why)
