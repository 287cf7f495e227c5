"""Plans that differ in one thing from another one: a cut, the devices of two stages, how a stage is run.

The partitioner weighs stages by the formula of 1F1B and GPipe. What is best under another order of work
is often near: a tensor group's members as replicas, a block over a cut, other formats or ZeRO levels.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice, pairwise

from graphpar.cost import CostTable
from graphpar.partition.assign import groups_hold
from graphpar.partition.types import PipelineChoice, Replica, StageChoice

Pipelines = tuple[PipelineChoice, ...]


def near_plans(table: CostTable, pipelines: Pipelines) -> Iterator[Pipelines]:
    """All plans with one thing changed; memory is not looked at."""
    for number, pipeline in enumerate(pipelines):
        for changed in (*_cuts(pipeline), *_modes(table, pipeline), *_swaps(table, pipeline)):
            yield (*pipelines[:number], changed, *pipelines[number + 1 :])


def as_replicas(table: CostTable, pipelines: Pipelines) -> Iterator[Pipelines]:
    """The plan with the members of all tensor groups as replicas, their gradients not divided."""
    if not any(r.others for p in pipelines for s in p.stages for r in s.replicas):
        return
    for zero in sorted({m.zero for m in table.every_mode if len(m.members) == 1 and m.zero < 2}):
        made = [
            [next(_singles(table, s, [(s.precision, s.recompute, zero)]), None) for s in p.stages]
            for p in pipelines
        ]
        if all(stage is not None for stages in made for stage in stages):
            yield tuple(
                replace(p, stages=tuple(s for s in stages if s is not None))
                for p, stages in zip(pipelines, made, strict=True)
            )


def _cuts(pipeline: PipelineChoice) -> Iterator[PipelineChoice]:
    stages = pipeline.stages
    for at in range(1, len(stages)):
        left, right = stages[at - 1 : at + 1]
        for cut in (right.first - 1, right.first + 1):
            if left.first < cut < right.last:
                moved = replace(left, last=cut), replace(right, first=cut)
                yield replace(pipeline, stages=(*stages[: at - 1], *moved, *stages[at + 1 :]))


def _modes(table: CostTable, pipeline: PipelineChoice) -> Iterator[PipelineChoice]:
    """Stages that share their devices change together."""
    for devices in dict.fromkeys(map(_devices, pipeline.stages)):
        mine = [s for s in pipeline.stages if _devices(s) == devices]
        for way in _ways(table, mine[0]):
            stages = tuple(
                replace(way, first=s.first, last=s.last) if _devices(s) == devices else s
                for s in pipeline.stages
            )
            changed = replace(pipeline, stages=stages)
            if stages != pipeline.stages and groups_hold(table, (changed,)):
                yield changed


def _swaps(table: CostTable, pipeline: PipelineChoice) -> Iterator[PipelineChoice]:
    """The devices of neighbouring stages in exchange, wherever either has some."""
    crews = list(dict.fromkeys(map(_devices, pipeline.stages)))
    kinds = {crew: [table.class_of[d] for d in crew] for crew in crews}
    by_crew = {_devices(s): s for s in pipeline.stages}
    for left, right in pairwise(crews):
        if kinds[left] == kinds[right]:
            continue
        there = {left: by_crew[right], right: by_crew[left]}
        yield replace(
            pipeline,
            stages=tuple(
                replace(there.get(_devices(s), s), first=s.first, last=s.last) for s in pipeline.stages
            ),
        )


def _devices(stage: StageChoice) -> tuple[str, ...]:
    return tuple(d for r in stage.replicas for d in r.devices)


def _ways(table: CostTable, stage: StageChoice) -> Iterator[StageChoice]:
    options = sorted({(m.precision, m.recompute, m.zero) for m in table.every_mode})
    yield from _singles(table, stage, options)
    devices = _devices(stage)
    for mode in table.modes:
        size = len(mode.members)
        if size == 1 or len(devices) % size:
            continue
        names = iter(devices)
        groups = [tuple(islice(names, size)) for _ in range(len(devices) // size)]
        if all(tuple(table.class_of[d] for d in own) == mode.members for own in groups):
            if len(groups) == 1 and mode.zero:
                continue
            replicas = tuple(
                Replica(own[0], 0, own[1:], mode.shares, mode.mesh, mode.lean) for own in groups
            )
            yield StageChoice(
                stage.first, stage.last, replicas, mode.precision, mode.recompute, mode.zero
            )


def _singles(
    table: CostTable, stage: StageChoice, options: Sequence[tuple[str, bool, int]]
) -> Iterator[StageChoice]:
    """Every device a replica; one that is alone has nobody to divide anything with."""
    replicas = tuple(Replica(d, 0) for d in _devices(stage))
    for precision, recompute, zero in options:
        found = replace(stage, replicas=replicas, precision=precision, recompute=recompute, zero=zero)
        if len(replicas) == 1:
            found = replace(found, zero=0)
        if all(table.mode_number(found, r) is not None for r in replicas):
            yield found
