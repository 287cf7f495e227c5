"""From a partition to the order in which every rank works.

Receives stand just before the work that needs them (the runtime posts them ahead), sends right
after the work that made them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from graphpar.errors import VerifyError
from graphpar.partition.types import Partition, PipelineChoice, StageChoice, StagePace
from graphpar.schedule.actions import Action, PipelineSpan, Schedule, StageLink
from graphpar.schedule.greedy import play_1f1b
from graphpar.schedule.play import Game, Kind, Work, play
from graphpar.schedule.teams import spread

_USUAL_PACE = StagePace(forward_s=1.0, backward_s=1.0, weight_s=1.0)
"""Of a stage nobody timed: three products of one size for each of the forward's."""


def build_schedule(
    partition: Partition,
    stage_links: Sequence[StageLink],
    training: bool,
    *,
    idle_allowed: bool = False,
) -> Schedule:
    """The partition's schedule.

    Args:
        partition: Pipelines, stages and replicas, and the name of the schedule.
        stage_links: Pairs of stages (numbered over all pipelines) that exchange data.
        training: False leaves out backwards, all-reduces and optimiser steps.
        idle_allowed: Whether pipelines and replicas may have nothing to do, for a small last batch.

    Raises:
        VerifyError: A device runs several stages where it may not, or microbatches and replicas do not
            add up.
    """
    _check_devices(partition, training, idle_allowed)
    spans = _spans(partition)
    crews = [_crew(pipeline) for pipeline in partition.pipelines]
    firsts = [0, *accumulate(len(crew.stages_of) for crew in crews)]
    routes: list[tuple[int, ...]] = []
    actions: list[tuple[Action, ...]] = []
    stages_of: list[tuple[int, ...]] = []
    for number, (span, crew) in enumerate(zip(spans, crews, strict=True)):
        routes += (tuple(firsts[number] + rank for rank in route) for route in crew.routes)
        stages_of += (tuple(span.first_stage + s for s in own) for own in crew.stages_of)
        works = _works(partition, number, span, crew, stage_links, training)
        actions += _rows(works, crew, span, stage_links, training)
    replicas = Schedule(
        name=partition.schedule,
        training=training,
        pipelines=spans,
        links=tuple(stage_links),
        stages_of=tuple(stages_of),
        microbatch_sizes=tuple(size for p in partition.pipelines for size in p.sizes()),
        routes=tuple(routes),
        actions=tuple(actions),
    )
    return spread(replicas, [width for crew in crews for width in crew.widths])


@dataclass(frozen=True)
class _Crew:
    """The ranks of a pipeline, one per replica; ranks, stages and microbatches are numbered within it.

    Attributes:
        stages_of: For each rank its stages.
        routes: For each microbatch its rank at each stage.
        widths: For each rank the members of its tensor group.
    """

    stages_of: tuple[tuple[int, ...], ...]
    routes: tuple[tuple[int, ...], ...]
    widths: tuple[int, ...]

    @property
    def positions(self) -> list[list[int]]:
        """Ranks that stand for each other (they hold the same stages), in the order of their stages."""
        found: dict[tuple[int, ...], list[int]] = {}
        for rank, own in enumerate(self.stages_of):
            found.setdefault(own, []).append(rank)
        return list(found.values())

    @property
    def is_plain(self) -> bool:
        """Whether every rank has one stage."""
        return all(len(own) == 1 for own in self.stages_of)


def _crew(pipeline: PipelineChoice) -> _Crew:
    ranks: dict[tuple[str, ...], int] = {}
    stages_of: list[list[int]] = []
    by_stage = []
    for number, stage in enumerate(pipeline.stages):
        own = []
        for replica in stage.replicas:
            rank = ranks.setdefault(replica.devices, len(ranks))
            if rank == len(stages_of):
                stages_of.append([])
            stages_of[rank].append(number)
            own.append(rank)
        by_stage.append([own[r] for r in route_microbatches([r.microbatches for r in stage.replicas])])
    return _Crew(tuple(map(tuple, stages_of)), tuple(zip(*by_stage, strict=True)), tuple(map(len, ranks)))


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


def _rows(
    works: Sequence[Sequence[Work]],
    crew: _Crew,
    span: PipelineSpan,
    links: Sequence[StageLink],
    training: bool,
) -> Iterator[tuple[Action, ...]]:
    """The rows of the pipeline's ranks, in rank order."""
    steps = [_Steps(stage, links) for stage in range(span.first_stage, span.last_stage)]
    for own, work in zip(crew.stages_of, works, strict=True):
        row: list[Action] = []
        for kind, stage, m in work:
            row += steps[stage].around(kind, span.first_microbatch + m)
        if training:
            row += Action("A", span.first_stage + own[0]), Action("O", span.first_stage + own[0])
        yield tuple(row)


def _works(
    partition: Partition,
    number: int,
    span: PipelineSpan,
    crew: _Crew,
    links: Sequence[StageLink],
    training: bool,
) -> list[list[Work]]:
    """Forwards and backwards of each rank of a pipeline, everything numbered from 0."""
    if partition.schedule in ("zero-bubble", "interleaved") or not crew.is_plain:
        return play(_game(partition, span, crew, links, training))
    num_replicas = [len(stage.replicas) for stage in partition.pipelines[number].stages]
    if training and partition.schedule == "1f1b" and max(num_replicas) > 1:
        limits = [in_flight_limit(num_replicas, own[0]) for own in crew.stages_of]
        played = play_1f1b(crew.routes, limits)
        return [
            [_of_stage(own[0], kind, m) for kind, m in row]
            for own, row in zip(crew.stages_of, played, strict=True)
        ]
    works = []
    for rank, (stage,) in enumerate(crew.stages_of):
        own = [m for m, route in enumerate(crew.routes) if route[stage] == rank]
        ahead = len(own)
        if partition.schedule == "1f1b":
            ahead = min(ahead, in_flight_limit(num_replicas, stage))
        works.append([_of_stage(stage, kind, m) for kind, m in _order(own, ahead, training)])
    return works


def _of_stage(stage: int, kind: Kind, microbatch: int) -> Work:
    return kind, stage, microbatch


def _game(
    partition: Partition, span: PipelineSpan, crew: _Crew, links: Sequence[StageLink], training: bool
) -> Game:
    """The pipeline as it is played; in inference nothing is held, so nothing limits it."""
    stages = range(span.first_stage, span.last_stage)
    paces = [partition.paces[s] if partition.paces else _USUAL_PACE for s in stages]
    returns = {link.target for link in links if link.has_gradient}
    halves = training and partition.schedule == "zero-bubble"
    groups = _groups(len(crew.routes), len(crew.stages_of))
    usual = _usual_ahead(crew, max(groups, default=0))
    ahead = [paces[own[0]].ahead or usual[rank] for rank, own in enumerate(crew.stages_of)]
    most = [max(max(usual), n) for n in ahead] if halves else ahead
    held = [
        max(n, paces[own[0]].held or m) for n, m, own in zip(ahead, most, crew.stages_of, strict=True)
    ]
    endless = [len(stages) * len(crew.routes) + 1] * len(ahead)
    return Game(
        routes=crew.routes,
        paces=paces,
        splits=[halves and s in returns and p.weight_s > 0 for s, p in zip(stages, paces, strict=True)],
        ahead=ahead if training else endless,
        held=held if training else endless,
        groups=groups,
        training=training,
    )


def _groups(microbatches: int, ranks: int) -> list[int]:
    """As many equal groups as there are that hold a microbatch for each rank.

    >>> _groups(10, 4), _groups(3, 4)
    ([5, 5], [3])
    """
    number = max(1, microbatches // ranks)
    share, larger = divmod(microbatches, number)
    return [share + (i < larger) for i in range(number)]


def _usual_ahead(crew: _Crew, group: int) -> list[int]:
    """How many microbatches each rank has between forward and backward: as many as under 1F1B.

    With several stages per rank (Narayanan et al., 2021) the first microbatch comes back after two trips
    over the ranks that follow, and a group of them has gone through each further stage.
    """
    ahead = [0] * len(crew.stages_of)
    widths = [len(ranks) for ranks in crew.positions]
    for place, ranks in enumerate(crew.positions):
        chunks = len(crew.stages_of[ranks[0]])
        following = sum(widths[place:])
        if chunks > 1:
            following = 2 * sum(widths[place + 1 :]) + (chunks - 1) * group + widths[place]
        for rank in ranks:
            ahead[rank] = -(-following // widths[place])
    return ahead


def _order(own: Sequence[int], ahead: int, training: bool) -> Iterator[tuple[Literal["F", "B"], int]]:
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

    def around(self, kind: Kind, microbatch: int) -> Iterator[Action]:
        """Receives, the work itself, sends."""
        if kind == "F" and self._receives:
            yield Action("R", self._stage, microbatch)
        if kind in "BI" and self._receives_gradient:
            yield Action("G", self._stage, microbatch)
        yield Action(kind, self._stage, microbatch)
        if kind == "F" and self._sends:
            yield Action("S", self._stage, microbatch)
        if kind in "BI" and self._sends_gradient:
            yield Action("D", self._stage, microbatch)


def _check_devices(partition: Partition, training: bool, idle_allowed: bool) -> None:
    seen: dict[str, tuple[int, StageChoice]] = {}
    several = partition.schedule in ("interleaved", "zero-bubble") or not training
    for p, pipeline in enumerate(partition.pipelines):
        for stage in pipeline.stages:
            devices = [d for r in stage.replicas for d in r.devices]
            for device in devices:
                pipeline_before, before = seen.setdefault(device, (p, stage))
                again = before is not stage or devices.count(device) > 1
                if again and not several:
                    raise VerifyError(
                        f"schedule: device {device} runs two stages; {partition.schedule} gives a device "
                        "one stage (interleaved and zero-bubble may give it several)"
                    )
                alike = pipeline_before == p and before.replicas == stage.replicas
                if devices.count(device) > 1 or not alike:
                    raise VerifyError(
                        f"schedule: device {device} runs stages with unlike replicas; all stages of a "
                        "device must have the same replicas with the same microbatches"
                    )
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
