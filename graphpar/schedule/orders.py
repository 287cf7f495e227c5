"""From a partition to the order in which every rank works.

Receives stand just before the work that needs them (the runtime posts them ahead), sends right
after the work that made them.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate

from graphpar.errors import VerifyError
from graphpar.partition.types import Partition, PipelineChoice, ScheduleName
from graphpar.schedule.actions import Action, PipelineSpan, Schedule, StageLink
from graphpar.schedule.greedy import Work, play_1f1b
from graphpar.schedule.teams import spread


def build_schedule(
    partition: Partition,
    stage_links: Sequence[StageLink],
    training: bool,
    *,
    idle_allowed: bool = False,
) -> Schedule:
    """The partition's schedule.

    Args:
        partition: Pipelines, stages and replicas; names GPipe or 1F1B.
        stage_links: Pairs of stages (numbered over all pipelines) that exchange data.
        training: False leaves out backwards, all-reduces and optimiser steps.
        idle_allowed: Whether pipelines and replicas may have nothing to do, for a small last batch.

    Raises:
        VerifyError: A device runs two stages, or microbatches and replicas do not add up.
    """
    _check_devices(partition, idle_allowed)
    stages = [s for p in partition.pipelines for s in p.stages]
    first_ranks = [0, *accumulate(len(s.replicas) for s in stages)]
    spans = _spans(partition)
    routes: list[tuple[int, ...]] = []
    actions: list[tuple[Action, ...]] = []
    for span, pipeline in zip(spans, partition.pipelines, strict=True):
        own_routes = _routes(pipeline)
        widths = [len(s.replicas) for s in pipeline.stages]
        first = first_ranks[span.first_stage]
        routes += (tuple(first + rank for rank in route) for route in own_routes)
        actions += _pipeline_actions(partition.schedule, own_routes, span, widths, stage_links, training)
    replicas = Schedule(
        name=partition.schedule,
        training=training,
        pipelines=spans,
        links=tuple(stage_links),
        stage_of=tuple(s for s, stage in enumerate(stages) for _ in stage.replicas),
        microbatch_sizes=tuple(size for p in partition.pipelines for size in p.sizes()),
        routes=tuple(routes),
        actions=tuple(actions),
    )
    return spread(replicas, [len(r.devices) for s in stages for r in s.replicas])


def route_microbatches(shares: Sequence[int]) -> tuple[int, ...]:
    """Deal microbatches to replicas in turn, so that replica r gets exactly `shares[r]` of them.

    Each microbatch goes to the replica that is furthest behind its share (weighted round-robin).

    >>> route_microbatches((2, 1, 1))
    (0, 1, 2, 0)
    >>> route_microbatches((4, 1))
    (0, 0, 1, 0, 0)
    """
    total = sum(shares)
    dealt = [0] * len(shares)
    route = []
    for turn in range(1, total + 1):
        behind = [
            share * turn - total * done if done < share else -total * total
            for share, done in zip(shares, dealt, strict=True)
        ]
        replica = behind.index(max(behind))
        dealt[replica] += 1
        route.append(replica)
    return tuple(route)


def in_flight_limit(num_replicas: Sequence[int], stage: int) -> int:
    """Microbatches that a rank of `stage` may hold between forward and backward under 1F1B.

    One for every rank from this stage on, shared among the stage's replicas: then each of them can
    be at work on a microbatch. Without replicas this is the usual `num_stages - stage`.

    >>> [in_flight_limit((1, 1, 1), s) for s in range(3)], in_flight_limit((1, 2, 1), 1)
    ([3, 2, 1], 2)
    """
    return -(-sum(num_replicas[stage:]) // num_replicas[stage])


def _spans(partition: Partition) -> tuple[PipelineSpan, ...]:
    stages = [0, *accumulate(len(p.stages) for p in partition.pipelines)]
    microbatches = [0, *accumulate(p.microbatches for p in partition.pipelines)]
    return tuple(
        PipelineSpan(stages[i], stages[i + 1], microbatches[i], microbatches[i + 1])
        for i in range(len(partition.pipelines))
    )


def _routes(pipeline: PipelineChoice) -> list[tuple[int, ...]]:
    """For each microbatch its rank at each stage, ranks numbered from 0 within the pipeline."""
    first_ranks = [0, *accumulate(len(s.replicas) for s in pipeline.stages)]
    by_stage = [
        [first_ranks[s] + r for r in route_microbatches([r.microbatches for r in stage.replicas])]
        for s, stage in enumerate(pipeline.stages)
    ]
    return list(zip(*by_stage, strict=True))


def _pipeline_actions(
    name: ScheduleName,
    routes: Sequence[tuple[int, ...]],
    span: PipelineSpan,
    num_replicas: Sequence[int],
    links: Sequence[StageLink],
    training: bool,
) -> Iterator[tuple[Action, ...]]:
    """The rows of the pipeline's ranks, in rank order."""
    works = _works(name, routes, num_replicas, training)
    stages = [span.first_stage + s for s, width in enumerate(num_replicas) for _ in range(width)]
    for stage, work in zip(stages, works, strict=True):
        steps = _Steps(stage, links)
        row: list[Action] = []
        for kind, m in work:
            microbatch = span.first_microbatch + m
            row += steps.forward(microbatch) if kind == "F" else steps.backward(microbatch)
        if training:
            row += Action("A", stage), Action("O", stage)
        yield tuple(row)


def _works(
    name: ScheduleName,
    routes: Sequence[tuple[int, ...]],
    num_replicas: Sequence[int],
    training: bool,
) -> list[list[Work]]:
    """Forwards and backwards of each rank of a pipeline, everything numbered from 0."""
    stages = [s for s, width in enumerate(num_replicas) for _ in range(width)]
    if training and name == "1f1b" and max(num_replicas) > 1:
        return play_1f1b(routes, [in_flight_limit(num_replicas, s) for s in stages])
    works = []
    for rank, stage in enumerate(stages):
        own = [m for m, route in enumerate(routes) if route[stage] == rank]
        ahead = len(own)
        if name == "1f1b":
            ahead = min(ahead, in_flight_limit(num_replicas, stage))
        works.append(list(_order(own, ahead, training)))
    return works


def _order(own: Sequence[int], ahead: int, training: bool) -> Iterator[Work]:
    """Forwards run `ahead` of the backwards by a fixed number; under GPipe by all of them."""
    if not training:
        yield from (("F", m) for m in own)
        return
    yield from (("F", m) for m in own[:ahead])
    for index, microbatch in enumerate(own):
        yield "B", microbatch
        if index + ahead < len(own):
            yield "F", own[index + ahead]


class _Steps:
    """The actions around one forward or backward of a stage, given its neighbours."""

    def __init__(self, stage: int, links: Sequence[StageLink]) -> None:
        incoming = [link for link in links if link.target == stage]
        outgoing = [link for link in links if link.source == stage]
        self._stage = stage
        self._receives = bool(incoming)
        self._sends = bool(outgoing)
        self._receives_gradient = any(link.has_gradient for link in outgoing)
        self._sends_gradient = any(link.has_gradient for link in incoming)

    def forward(self, microbatch: int) -> Iterator[Action]:
        if self._receives:
            yield Action("R", self._stage, microbatch)
        yield Action("F", self._stage, microbatch)
        if self._sends:
            yield Action("S", self._stage, microbatch)

    def backward(self, microbatch: int) -> Iterator[Action]:
        if self._receives_gradient:
            yield Action("G", self._stage, microbatch)
        yield Action("B", self._stage, microbatch)
        if self._sends_gradient:
            yield Action("D", self._stage, microbatch)


def _check_devices(partition: Partition, idle_allowed: bool) -> None:
    seen: set[str] = set()
    for device in partition.used_devices:
        if device in seen:
            raise VerifyError(
                f"schedule: device {device} runs two stages; the runtime gives a device one stage"
            )
        seen.add(device)
    least = 0 if idle_allowed else 1
    for p, pipeline in enumerate(partition.pipelines):
        if idle_allowed and pipeline.samples == pipeline.microbatches == 0:
            continue
        if not 1 <= pipeline.microbatches <= max(pipeline.samples, 1) or not pipeline.stages:
            raise VerifyError(
                f"schedule: pipeline {p} has {pipeline.samples} samples in "
                f"{pipeline.microbatches} microbatches over {len(pipeline.stages)} stages; "
                "each microbatch needs a sample, and a pipeline a stage"
            )
        for s, stage in enumerate(pipeline.stages):
            shares = [r.microbatches for r in stage.replicas]
            if sum(shares) != pipeline.microbatches or min(shares, default=0) < least:
                raise VerifyError(
                    f"schedule: pipeline {p}, stage {s}: replicas take {shares} microbatches, "
                    f"which must be at least one each and {pipeline.microbatches} in all"
                )
