"""The parts of a step as they are told: what stages send inside themselves apart from what they compute.

The programme counts what a stage sends for every microbatch (collectives of tensor groups, ZeRO's
exchange, sums of statistics) as time of the stage, in `fill_compute_s` and `steady_s`, since it keeps the
stage busy. Here it is taken out of both.
"""

import math

from graphpar.cost import CostTable
from graphpar.partition.gradient_sums import modes_of
from graphpar.partition.pipeline_price import (
    busy_s,
    meetings_s,
    pipeline_parts_s,
    replica_times_s,
    transfers_s,
    waiting_s,
    zero_s,
)
from graphpar.partition.types import Partition, PipelineChoice, StageChoice
from graphpar.schedule.simulated import has_formula, through_s


def told_parts(table: CostTable, found: Partition) -> dict[str, float]:
    """The parts of a partition's step in seconds, which add up as before.

    Beside those of `Partition.parts` there are `fill_collective_s`, what one microbatch sends inside the
    stages it goes through, and `steady_collective_s`, the same of the busiest stage for all others. Where
    the step is not a formula but played through, `steady_s` stays one.
    """
    parts = dict(found.parts)
    known = has_formula(found.schedule)
    slowest = max(found.pipelines, key=lambda p: _pipeline_s(table, p, found))
    sent = [_sent_s(table, slowest, stage) for stage in slowest.stages]
    fill_s = sum(sent) + meetings_s(table, found.pipelines, 0, table.num_units)
    _take(parts, "fill_compute_s", "fill_collective_s", fill_s)
    if known:
        _take(parts, "steady_s", "steady_collective_s", _steady_s(table, slowest, found))
    return parts


def _take(parts: dict[str, float], whole: str, name: str, seconds: float) -> None:
    """Make a part of its own of some seconds of another."""
    own = min(seconds, parts.get(whole, 0.0))
    if own > 0:
        parts[whole] -= own
        parts[name] = own


def _pipeline_s(table: CostTable, pipeline: PipelineChoice, found: Partition) -> float:
    """What makes a pipeline the one whose parts are told."""
    if has_formula(found.schedule):
        return math.fsum(pipeline_parts_s(table, pipeline, found.schedule).values())
    return through_s(table, pipeline)


def _by_replica(table: CostTable, pipeline: PipelineChoice, stage: StageChoice) -> list[float]:
    """What each replica of a stage sends inside itself for one microbatch."""
    size, units = pipeline.samples / pipeline.microbatches, range(stage.first, stage.last)
    moved_s = zero_s(table, stage)
    return [
        moved_s + sum(table.collective_s(u, mode, size) for u in units) for mode in modes_of(table, stage)
    ]


def _sent_s(table: CostTable, pipeline: PipelineChoice, stage: StageChoice) -> float:
    """What the slowest replica of a stage sends inside itself for one microbatch."""
    times = replica_times_s(table, stage, pipeline.samples / pipeline.microbatches)
    return _by_replica(table, pipeline, stage)[times.index(max(times))]


def _steady_s(table: CostTable, pipeline: PipelineChoice, found: Partition) -> float:
    """What of the time of all microbatches but the first goes into collectives; none where links bind."""
    cuts = transfers_s(table, pipeline)
    size, longest = pipeline.samples / pipeline.microbatches, (0.0, 0.0)
    if not table.training or found.schedule == "gpipe":
        longest = (pipeline.microbatches - 1) * max(cuts), 0.0
    for index, stage in enumerate(pipeline.stages):
        times = replica_times_s(table, stage, size)
        wait = waiting_s(table, found.schedule, cuts[index], cuts[index + 1])
        ends_s = busy_s(table, pipeline, stage, times, wait)
        rows = zip(ends_s, _by_replica(table, pipeline, stage), stage.replicas, strict=True)
        end_s, sent_s, last = max(rows, key=lambda row: row[0])
        own_s = last.microbatches * sent_s - _sent_s(table, pipeline, stage)
        longest = max(longest, (end_s - max(times), own_s))
    return max(0.0, longest[1])
