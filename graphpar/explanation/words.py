"""What an explanation says in words: what holds a plan back, and in what plans that lost differ."""

from collections.abc import Iterator

from graphpar.choice.orders import LEAST_GAIN
from graphpar.cost import CostTable
from graphpar.explanation.account import RunnerUp
from graphpar.partition.settings import ScheduleChoice
from graphpar.partition.types import Partition
from graphpar.schedule.simulated import has_formula
from graphpar.units import format_bytes, format_percent, format_seconds

_ROUNDING = 1e-9
FULL = 0.9
"""A device that is fuller than this may be held back by its memory."""


def binding(table: CostTable, found: Partition, parts: dict[str, float]) -> Iterator[str]:
    """The largest parts of the step, and devices whose memory is nearly full."""
    names = {
        "steady_s": "the busiest stage, for all microbatches but the first",
        "steady_collective_s": "collectives of the busiest stage, for all microbatches but the first",
        "fill_compute_s": "one microbatch computing through all stages",
        "fill_collective_s": "collectives of one microbatch inside the stages",
        "fill_transfer_s": "transfers of one microbatch",
        "sync_s": "summing gradients after the last backward",
        "optimizer_s": "the optimiser's step",
    }
    for name, seconds in sorted(parts.items(), key=lambda item: -item[1]):
        if seconds > 0.05 * found.objective_s:
            # Of the step that the parts add up to; the one that was played through may be another.
            whole, part = format_seconds(found.objective_s), format_seconds(seconds)
            share = format_percent(seconds / found.objective_s)
            yield f"{names.get(name, name)}: {share} of the programme's {whole} ({part})"
    for device_class in table.device_classes:
        peaks = [(found.peak_bytes[d], d) for d in device_class.devices if d in found.peak_bytes]
        if peaks and max(peaks)[0] > FULL * device_class.memory_bytes:
            peak, device = max(peaks)
            yield (
                f"memory of {device_class.name}: {device} uses {format_bytes(peak)} of "
                f"{format_bytes(device_class.memory_bytes)}"
            )


def runner_up(found: Partition, other: Partition, asked: ScheduleChoice) -> RunnerUp:
    return RunnerUp(
        differences=(*_differences(found, other), *_why_lost(found, other, asked)),
        step_s=other.objective_s,
        costs_s=other.objective_s - found.objective_s,
        num_devices=len(other.used_devices),
        num_stages=sum(len(p.stages) for p in other.pipelines),
    )


def _why_lost(found: Partition, other: Partition, asked: ScheduleChoice) -> Iterator[str]:
    """Why a plan lost that takes less."""
    if other.objective_s >= found.objective_s * (1 - _ROUNDING):
        return
    if asked != "auto" and other.schedule != found.schedule:
        # Orders without a formula are searched for as 1F1B (`searched`).
        yield f"shorter, but {found.schedule} was asked for"
    elif has_formula(found.schedule) and other.objective_s >= (1 - LEAST_GAIN) * found.objective_s:
        yield (
            f"shorter, but not by the {100 * LEAST_GAIN:.0f} % for which a plan is given up that the "
            "search proved something of"
        )
    else:
        yield "shorter as played through, by which these two were not compared when the plan was chosen"


def _differences(found: Partition, other: Partition) -> Iterator[str]:
    if found.schedule != other.schedule:
        yield f"schedule {other.schedule} instead of {found.schedule}"
    if len(found.pipelines) != len(other.pipelines):
        yield f"{len(other.pipelines)} pipelines instead of {len(found.pipelines)}"
    ours, theirs = ([p.microbatches for p in x.pipelines] for x in (found, other))
    if ours != theirs:
        yield f"{_listed(theirs)} microbatches instead of {_listed(ours)}"
    ours, theirs = ([len(p.stages) for p in x.pipelines] for x in (found, other))
    if ours != theirs:
        yield f"{_listed(theirs)} stages instead of {_listed(ours)}"
    unused = sorted(set(found.used_devices) - set(other.used_devices))
    new = sorted(set(other.used_devices) - set(found.used_devices))
    for word, devices in (("without", unused), ("with", new)):
        if devices:
            more = f" and {len(devices) - 4} more" if len(devices) > 4 else ""
            yield f"{word} {', '.join(devices[:4])}{more}"
    options = [
        {(s.precision, s.recompute, s.zero) for p in x.pipelines for s in p.stages}
        for x in (found, other)
    ]
    if options[0] != options[1]:
        yield "other precision, recomputation or ZeRO in some stages"
    cuts = [[[s.first for s in p.stages] for p in x.pipelines] for x in (found, other)]
    if cuts[0] != cuts[1]:
        yield f"stages start at units {_listed(cuts[1][0])} instead of {_listed(cuts[0][0])}"
    elif not options[0] ^ options[1]:
        yield "the same cuts on other devices, or with other replicas"


def _listed(values: list[int]) -> str:
    more = ", ..." if len(values) > 8 else ""
    return ", ".join(map(str, values[:8])) + more
