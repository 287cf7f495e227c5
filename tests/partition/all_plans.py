"""Every plan of a small table, one by one, priced by the checker: the oracle of the partitioner."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations, permutations, product

from graphpar.cost import CostTable, Mode
from graphpar.partition.check import recompute
from graphpar.partition.pipeline_price import share_microbatches
from graphpar.partition.types import (
    Partition,
    PipelineChoice,
    Replica,
    ScheduleName,
    StageChoice,
)


def best_step_s(table: CostTable) -> float | None:
    """The least step time of all plans that fit, or None where none does."""
    return min((step_s for _, step_s in fitting_plans(table)), default=None)


def fitting_plans(table: CostTable) -> Iterator[tuple[tuple[PipelineChoice, ...], float]]:
    """All plans that fit, with their step time."""
    schedules: tuple[ScheduleName, ...] = ("1f1b", "gpipe") if table.training else ("gpipe",)
    for schedule in schedules:
        for pipelines in all_plans(table, schedule):
            checked = recompute(table, bare(pipelines, schedule))
            if all(
                peak <= table.device_classes[table.class_of[d]].memory_bytes * (1 + 1e-9)
                for d, peak in checked.peak_bytes.items()
            ):
                yield pipelines, checked.objective_s


def bare(pipelines: tuple[PipelineChoice, ...], schedule: ScheduleName) -> Partition:
    """A partition without a certificate."""
    return Partition(pipelines, schedule, "feasible", 0.0, {}, 0.0, 0.0, 0.0, 0.0, (), "", {})


def all_plans(table: CostTable, schedule: ScheduleName) -> Iterator[tuple[PipelineChoice, ...]]:
    """All sets of pipelines with all shares, microbatch counts, stages and replica sets."""
    for groups in _groups(tuple(table.class_of)):
        if len(groups) <= min(table.max_replicas, table.batch):
            for shares in _shares(table.batch, len(groups)):
                yield from _product(table, schedule, groups, shares)


def _product(
    table: CostTable,
    schedule: ScheduleName,
    groups: tuple[tuple[str, ...], ...],
    shares: tuple[int, ...],
) -> Iterator[tuple[PipelineChoice, ...]]:
    if not groups:
        yield ()
        return
    width = table.max_replicas // len(groups)
    rest = list(_product_of_rest(table, schedule, groups, shares, width))
    for pipeline in _pipelines(table, schedule, groups[0], shares[0], width):
        for others in rest:
            yield (pipeline, *others)


def _product_of_rest(
    table: CostTable,
    schedule: ScheduleName,
    groups: tuple[tuple[str, ...], ...],
    shares: tuple[int, ...],
    width: int,
) -> Iterator[tuple[PipelineChoice, ...]]:
    if len(groups) == 1:
        yield ()
        return
    rest = list(_product_of_rest(table, schedule, groups[1:], shares[1:], width))
    for pipeline in _pipelines(table, schedule, groups[1], shares[1], width):
        for others in rest:
            yield (pipeline, *others)


def _pipelines(
    table: CostTable, schedule: ScheduleName, devices: tuple[str, ...], samples: int, width: int
) -> Iterator[PipelineChoice]:
    for microbatches in range(1, min(samples, table.max_microbatches) + 1):
        for staffing in _ordered_partitions(devices):
            ways = [list(_ways(table, names)) for names in staffing]
            for cuts, chosen in product(
                combinations(range(1, table.num_units), len(staffing) - 1), product(*ways)
            ):
                edges = (0, *cuts, table.num_units)
                stages = tuple(
                    replace(way, first=edges[i], last=edges[i + 1]) for i, way in enumerate(chosen)
                )
                if max(len(s.replicas) for s in stages) > min(width, microbatches):
                    continue
                if any(len(s.replicas) == 1 and s.zero for s in stages):
                    continue  # Nobody to share with: no other plan than without.
                dealt = share_microbatches(table, PipelineChoice(samples, microbatches, stages), schedule)
                if all(r.microbatches for s in dealt.stages for r in s.replicas):
                    yield dealt


def _ways(table: CostTable, names: tuple[str, ...]) -> Iterator[StageChoice]:
    """All ways in which a set of devices can run a stage: modes, and replicas alike in them."""
    options = {(m.precision, m.recompute, m.zero) for m in table.every_mode}
    for precision, again, zero in sorted(options):
        singles = tuple(Replica(d, 0) for d in names)
        stage = StageChoice(0, 1, singles, precision, again, zero)
        if all(table.mode_number(stage, r) is not None for r in singles):
            yield stage
    for mode in table.modes:
        if len(mode.members) > 1 and len(names) % len(mode.members) == 0:
            for groups in _in_groups(table, mode, names):
                replicas = tuple(Replica(g[0], 0, g[1:], mode.shares) for g in groups)
                yield StageChoice(0, 1, replicas, mode.precision, mode.recompute, mode.zero)


def _in_groups(
    table: CostTable, mode: Mode, names: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], ...]]:
    """All ways to cut a set of devices into groups that a mode's price holds for."""
    if not names:
        yield ()
        return
    for group in permutations(names, len(mode.members)):
        if names[0] not in group or tuple(table.class_of[d] for d in group) != mode.members:
            continue
        near = all(
            mode.link is None or table.topology.link(a, b).at_least(mode.link)
            for a, b in combinations(group, 2)
        )
        if near:
            rest = tuple(d for d in names if d not in group)
            for others in _in_groups(table, mode, rest):
                yield (group, *others)


def _ordered_partitions(devices: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], ...]]:
    """All ways to line up non-empty disjoint sets that together are the devices."""
    if not devices:
        yield ()
        return
    for size in range(1, len(devices) + 1):
        for first in combinations(devices, size):
            rest = tuple(d for d in devices if d not in first)
            for others in _ordered_partitions(rest):
                yield (first, *others)


def _groups(devices: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], ...]]:
    """All sets of disjoint non-empty sets of devices, devices left out included."""

    def grow(rest: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], ...]]:
        if not rest:
            yield ()
            return
        yield from grow(rest[1:])
        for size in range(len(rest)):
            for others in combinations(rest[1:], size):
                left = tuple(d for d in rest[1:] if d not in others)
                for groups in grow(left):
                    yield ((rest[0], *others), *groups)

    return (g for g in grow(devices) if g)


def _shares(batch: int, number: int) -> Iterator[tuple[int, ...]]:
    if number == 1:
        yield (batch,)
        return
    for first in range(1, batch - number + 2):
        for others in _shares(batch - first, number - 1):
            yield (first, *others)
