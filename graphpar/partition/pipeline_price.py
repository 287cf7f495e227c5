"""The price of a plan made of pipelines: seconds per step and bytes per device.

A pipeline with `n` samples in `m` microbatches of mean size `b = n / m` has stages `s = 1..S`. Stage
`s` holds the units `U_s` and has `w` replicas `r`, devices or tensor groups, each taking `m_r` of the
microbatches, `sum_r m_r = m`. Each runs in a mode of the table, which fixes times and bytes. Times are
linear between neighbouring integer sizes, so the time at the mean size is the mean time.

    t_r    = sum over U_s of (forward + backward) in the mode of r, at size b, + overhead per direction
             + z_s
    z_s    = what ZeRO moves for every microbatch over the replicas (see below); 0 below level 2
    c_s    = transfer forward + transfer backward over the boundary after s: all bytes that cross it,
             on the slowest link between a device of s and one of s + 1, and what either side spends
             on the message where they are workers of one machine (`CostTable.message_s`)
    e_r    = t_r + (c_{s-1} + c_s) / 2     under 1F1B          (see below)
           = t_r + (h_{s-1} + h_s) / 2     under GPipe and in inference
    h_s    = of c_s what keeps either side busy, where they are workers of one machine
             (`CostTable.handling_s`); else 0
    x_r    = l_r - l m_r / m, where l = n mod m microbatches have a sample more than the others, of
             which r has l_r: every w-th where replicas are alike, else at most ceil(l m_r / m)
    u_r    = seconds of one sample more, where replicas are unlike not less than 0
    extra_s    = max_r (t_r + (m_r - 1) e_r + x_r u_r) - max_r t_r
    extra_cut  = (m - 1) c_s               under GPipe and in inference
    fill   = sum_s max_r t_r + sum_s c_s
    time   = fill + max(extra)
    post_r = until all sums of gradients that r takes part in are done (`gradient_sums`)
             + sum over U_s of the optimiser's time
    step   = max over pipelines of time + max over devices of post

Larger microbatches are dealt first, so a replica may have samples beyond its share of the mean; with one
replica per stage that is nothing. `fill` is one microbatch through all stages
and back; every further one costs what the busiest stage needs. Under 1F1B a stage may have only as many
microbatches in flight as there are replicas below it, hence a round trip over any run of L neighbouring
stages takes L periods: the period is at least (sum t + sum c inside the run) / L. Charging half of each
transfer to either side is an upper bound on all these averages, and meets them where stages are balanced.
Under GPipe transfers overlap. What the price leaves out is that the replicas of a stage behind narrower
ones start one after another: with few microbatches the simulated step may be longer by part of a fill.

Microbatches are dealt by a rule, not a choice: the next one goes to the replica that would finish it
first.

ZeRO (Rajbhandari et al., 2020, arXiv:1910.02054) divides among the `w` replicas of a stage what all of
them would hold. Level 1: optimiser state; sync is half(gradients) + half(weights), and each replica
steps 1/w of the parameters. Level 2: gradients as well, reduced after every microbatch:
`z = half(gradients)`, sync is half(weights). Level 3: weights as well, gathered for either pass:
`z = half(gradients) + 2 half(weights)`, no sync is left. `half` stands in `gradient_sums`.

Peak of a device: weights + gradients + optimiser state of `U_s`, each divided by `w` where ZeRO divides
it, plus what the framework reserves, plus the larger of two: `in flight * saved` and the largest
temporary of a unit at the size of the largest microbatch (with the unit's whole gradients from level 2
and its whole weights from level 3 on), or what the optimiser's update takes when activations are gone
(`DeviceClass.update_per_gradient`). In flight are `m_r` microbatches under GPipe and
`min(m_r, ceil(D_s / w_s))` under 1F1B, where `D_s` counts the replicas of the pipeline from stage `s` on:
one microbatch for each of them, shared by the `w_s` replicas; with one replica per stage that is the
number of stages remaining. Inference keeps nothing.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from heapq import heapify, heapreplace

from graphpar.cost import CostTable, LinkCost, ModeCost
from graphpar.partition.gradient_sums import (
    half_ring_s,
    links_between_replicas,
    modes_of,
    most_bytes,
    ring_s,
    slowest,
    unit_costs,
    worst_finish_s,
)
from graphpar.partition.types import ROUNDING, PipelineChoice, ScheduleName, StageChoice


@dataclass(frozen=True)
class Price:
    """What a plan costs: `parts` add up to `objective_s`, `peak_bytes` is by device."""

    objective_s: float
    parts: dict[str, float]
    peak_bytes: dict[str, float]


def deal(times_s: Sequence[float], periods_s: Sequence[float], microbatches: int) -> tuple[int, ...]:
    """Deal microbatches one by one to the replica that would finish the next one first.

    A replica's first microbatch takes its `times_s`, each further one its `periods_s`; among equals
    the one with fewer microbatches goes first.

    >>> deal([1.0, 3.0], [1.0, 3.0], 4)
    (3, 1)
    """
    width = len(times_s)
    if len(set(times_s)) == 1 and len(set(periods_s)) == 1:
        share, longer = divmod(microbatches, width)
        return tuple(share + (i < longer) for i in range(width))
    counts = [0] * width
    ends = [(t, 0, i) for i, t in enumerate(times_s)]
    heapify(ends)
    for _ in range(microbatches):
        _, number, index = ends[0]
        counts[index] = number + 1
        end = times_s[index] + (number + 1) * periods_s[index]
        heapreplace(ends, (end, number + 1, index))
    return tuple(counts)


def stage_time_s(table: CostTable, first: int, last: int, mode: int, size: float) -> float:
    """Seconds of one microbatch on one stage in a mode, both directions, launch overhead included."""
    overhead = table.mode_overhead_s(mode)
    ahead, back = table.unit_seconds(mode, size)
    forward = sum(ahead[first:last]) + overhead
    return forward + sum(back[first:last]) + overhead if table.training else forward


def replica_times_s(table: CostTable, stage: StageChoice, size: float) -> list[float]:
    """Seconds of one microbatch on each replica, ZeRO's exchange for every microbatch included."""
    moved, modes = zero_s(table, stage), modes_of(table, stage)
    times_s = {m: stage_time_s(table, stage.first, stage.last, m, size) + moved for m in set(modes)}
    return [times_s[m] for m in modes]


def are_alike(times_s: Sequence[float]) -> bool:
    """Whether replicas take equally long, but for rounding."""
    return max(times_s) - min(times_s) <= ROUNDING * max(times_s)


def ragged_s(
    table: CostTable, pipeline: PipelineChoice, stage: StageChoice, times_s: Sequence[float]
) -> list[float]:
    """Seconds by which unequal microbatches keep each replica busier than the mean size says.

    `times_s` are those of a microbatch of mean size on each replica.
    """
    number, width = pipeline.microbatches, len(stage.replicas)
    small, larger = divmod(pipeline.samples, number)
    if larger == 0 or width == 1:
        return [0.0] * width
    alike, bounds, found = are_alike(times_s), (stage.first, stage.last), []
    for place, (replica, mode) in enumerate(zip(stage.replicas, modes_of(table, stage), strict=True)):
        share = larger * replica.microbatches
        own = -((place - larger) // width) if alike else -(-share // number)
        sample_s = stage_time_s(table, *bounds, mode, small + 1) - stage_time_s(
            table, *bounds, mode, small
        )
        # Unlike replicas need not have as many of the larger ones, so that nobody counts on being faster.
        found.append((own - share / number) * (sample_s if alike else max(sample_s, 0.0)))
    return found


def zero_s(table: CostTable, stage: StageChoice) -> float:
    """What ZeRO moves for every microbatch; nothing below level 2."""
    width = len(stage.replicas)
    if stage.zero < 2 or width < 2 or not table.training:
        return 0.0
    links = links_between_replicas(table, stage.replicas)
    gradients = most_bytes(table, stage, "gradient_bytes")
    moved = half_ring_s(links, gradients, width, table.sum_s_per_byte)
    if stage.zero > 2:
        weights = most_bytes(table, stage, "weight_bytes")
        moved += ring_s(links, weights, width, table.sum_s_per_byte)
    return moved


def boundary_s(table: CostTable, links: Sequence[LinkCost], boundary: int, size: float) -> float:
    """Seconds of the transfers of one microbatch over a boundary, both directions."""
    forward, backward = table.cut_bytes(boundary, size)
    moved = forward, backward if table.training else 0.0
    return sum(slowest(links, sent) + (table.message_s if links and sent > 0 else 0.0) for sent in moved)


def pairs(table: CostTable, left: Sequence[str], right: Sequence[str]) -> list[LinkCost]:
    """The links between two sets of devices that share none, or of one set with itself."""
    topology = table.topology
    ours, theirs = (Counter(topology.node_of[d] for d in side) for side in (left, right))
    found = topology.between_nodes(ours, theirs)
    same = left == right
    found |= {topology.inside[n] for n in ours if n in theirs and (not same or ours[n] > 1)}
    return list(found)


def transfers_s(table: CostTable, pipeline: PipelineChoice) -> list[float]:
    """Transfer seconds at each boundary: before the first stage, between stages, after the last."""
    size = pipeline.samples / pipeline.microbatches
    between = [
        boundary_s(table, pairs(table, _devices(a), _devices(b)), b.first, size)
        for a, b in zip(pipeline.stages, pipeline.stages[1:], strict=False)
    ]
    return [0.0, *between, 0.0]


def share_microbatches(
    table: CostTable, pipeline: PipelineChoice, schedule: ScheduleName
) -> PipelineChoice:
    """The same pipeline with its microbatches dealt to the replicas by the rule."""
    size = pipeline.samples / pipeline.microbatches
    cuts = transfers_s(table, pipeline)
    stages = []
    for index, stage in enumerate(pipeline.stages):
        times = replica_times_s(table, stage, size)
        wait = waiting_s(table, schedule, cuts[index], cuts[index + 1])
        counts = deal(times, [t + wait for t in times], pipeline.microbatches)
        dealt = (replace(r, microbatches=n) for r, n in zip(stage.replicas, counts, strict=True))
        stages.append(replace(stage, replicas=tuple(dealt)))
    return PipelineChoice(pipeline.samples, pipeline.microbatches, tuple(stages))


def waiting_s(table: CostTable, schedule: ScheduleName, before: float, after: float) -> float:
    """What transfers add to a stage's period: half of either boundary under 1F1B.

    Else half of what workers spend on messages, which nothing overlaps.
    """
    if table.training and schedule == "1f1b":
        return (before + after) / 2
    return (min(before, table.handling_s) + min(after, table.handling_s)) / 2


def in_flight(table: CostTable, schedule: ScheduleName, own: int, replicas_below: int, width: int) -> int:
    """Microbatches whose saved values a replica holds at its peak."""
    if not table.training:
        return 0
    return own if schedule == "gpipe" else min(own, -(-replicas_below // width))


def price(table: CostTable, pipelines: Sequence[PipelineChoice], schedule: ScheduleName) -> Price:
    """Price a plan whose microbatches are dealt; the formulas stand at the top of this file."""
    times = [pipeline_parts_s(table, p, schedule) for p in pipelines]
    slow = max(times, key=lambda parts: math.fsum(parts.values()))
    sync, optimizer = worst_finish_s(table, pipelines)
    parts = {**slow, "sync_s": sync, "optimizer_s": optimizer}
    parts["fill_compute_s"] += meetings_s(table, pipelines, 0, table.num_units)
    peaks = {d: b for p in pipelines for d, b in _peaks(table, p, schedule).items()}
    return Price(math.fsum(parts.values()), parts, peaks)


def meetings_s(table: CostTable, pipelines: Sequence[PipelineChoice], first: int, last: int) -> float:
    """Seconds of a step in which some units of pipelines that go in step exchange sums."""
    if len(pipelines) < 2 or not table.in_step_reason:
        return 0.0
    directions = 2 if table.training else 1
    costs, links = [table.costs[kind] for kind in table.units[first:last]], cross_links(table, pipelines)
    met = (sum(c.meetings * k.seconds(c.met_bytes / max(c.meetings, 1)) for c in costs) for k in links)
    return directions * max(met, default=0.0)


def _devices(stage: StageChoice) -> list[str]:
    return [d for r in stage.replicas for d in r.devices]


def pipeline_parts_s(
    table: CostTable, pipeline: PipelineChoice, schedule: ScheduleName
) -> dict[str, float]:
    """The parts of a step that a pipeline takes before gradients are summed."""
    size = pipeline.samples / pipeline.microbatches
    cuts = transfers_s(table, pipeline)
    overlapped = not table.training or schedule == "gpipe"
    compute, extra = 0.0, (pipeline.microbatches - 1) * max(cuts) if overlapped else 0.0
    for index, stage in enumerate(pipeline.stages):
        wait = waiting_s(table, schedule, cuts[index], cuts[index + 1])
        times = replica_times_s(table, stage, size)
        compute += max(times)
        extra = max(extra, max(busy_s(table, pipeline, stage, times, wait)) - max(times))
    return {"fill_compute_s": compute, "fill_transfer_s": sum(cuts), "steady_s": extra}


def busy_s(
    table: CostTable,
    pipeline: PipelineChoice,
    stage: StageChoice,
    times_s: Sequence[float],
    wait_s: float,
) -> list[float]:
    """Seconds that each replica needs for all its microbatches.

    `times_s` are those of a microbatch of mean size by replica, `wait_s` what each further one waits.
    """
    rows = zip(times_s, stage.replicas, ragged_s(table, pipeline, stage, times_s), strict=True)
    return [t + (r.microbatches - 1) * (t + wait_s) + x for t, r, x in rows]


def cross_links(table: CostTable, pipelines: Sequence[PipelineChoice]) -> list[LinkCost]:
    """The links between devices of unlike pipelines."""
    # Links depend on nodes only: one device of each node of a pipeline stands for all.
    node_of = table.topology.node_of
    groups = [list({node_of[d]: d for s in p.stages for d in _devices(s)}.values()) for p in pipelines]
    return list(
        {
            link
            for i, left in enumerate(groups)
            for right in groups[i + 1 :]
            for link in pairs(table, left, right)
        }
    )


def _peaks(table: CostTable, pipeline: PipelineChoice, schedule: ScheduleName) -> dict[str, float]:
    size = -(-pipeline.samples // pipeline.microbatches)
    peaks: dict[str, float] = {}
    below = 0
    for stage in reversed(pipeline.stages):
        width = len(stage.replicas)
        below += width
        alike: dict[tuple[int, float], list[float]] = {}
        for replica, mode in zip(stage.replicas, modes_of(table, stage), strict=True):
            held = in_flight(table, schedule, replica.microbatches, below, width)
            if (mode, held) not in alike:
                members = range(len(replica.devices))
                alike[mode, held] = [_peak(table, stage, mode, m, held, size) for m in members]
            peaks.update(zip(replica.devices, alike[mode, held], strict=True))
    return peaks


def _peak(
    table: CostTable, stage: StageChoice, mode: int, member: int, held: float, size: float
) -> float:
    """Most bytes that one member of a replica with so many microbatches in flight has in use."""
    fixed, saved, working = member_bytes(table, stage, unit_costs(table, stage, mode), member, size)
    update = update_bytes(table, stage, mode, member)
    return fixed + max(held * saved + working, update) + table.reserved_bytes


def update_bytes(table: CostTable, stage: StageChoice, mode: int, member: int) -> float:
    """What the optimiser's update takes on one member of a replica when activations are gone."""
    if not table.training:
        return 0.0
    gradients = sum(c.gradient_bytes[member] for c in unit_costs(table, stage, mode))
    gradients += sum(r.gradient_bytes for r in table.repeated if r.held_by(stage.first, stage.last))
    device_class = table.device_classes[table.every_mode[mode].members[member]]
    return gradients * device_class.update_per_gradient(stage.zero, len(stage.replicas))


def member_bytes(
    table: CostTable, stage: StageChoice, costs: Sequence[ModeCost], member: int, size: float
) -> tuple[float, float, float]:
    """Bytes of one member: what stays, what a microbatch in flight keeps, the largest temporary."""
    width = len(stage.replicas)
    of_weights, of_gradients, of_state = (width if stage.zero >= level else 1 for level in (3, 2, 1))
    fixed = sum(
        c.weight_bytes[member] / of_weights
        + c.gradient_bytes[member] / of_gradients
        + c.optimizer_bytes[member] / of_state
        for c in costs
    )
    fixed += sum(
        r.weight_bytes / of_weights + r.gradient_bytes / of_gradients + r.optimizer_bytes / of_state
        for r in table.repeated
        if r.held_by(stage.first, stage.last)
    )
    saved = sum(table.at_size(c.saved_bytes[member], size) for c in costs)
    working = max(
        table.at_size(c.working_bytes[member], size)
        + (c.gradient_bytes[member] if of_gradients > 1 else 0.0)
        + (c.weight_bytes[member] if of_weights > 1 else 0.0)
        for c in costs
    )
    return fixed, saved, working
