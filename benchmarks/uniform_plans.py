"""What people write down for a large cluster: the same groups, replicas and options in every stage.

Every stage of such a plan has the same tensor width, number of replicas, recomputation, ZeRO level and
number format; each kind of device makes as many stages as it has groups for. Blocks go to stages
evenly, or in proportion to how fast their kind runs one. All widths and options that every kind has are
tried with replicas in powers of two and microbatches of 1, 2, 4, ... samples; the best that fits counts.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from graphpar.cost import CostTable
from graphpar.errors import InfeasibleError
from graphpar.partition.handmade import priced_plan
from graphpar.partition.physical_bound import physical_bound_s
from graphpar.partition.repeats import Repeats, find_repeats
from graphpar.partition.types import Partition, PipelineChoice, Replica, StageChoice


@dataclass(frozen=True)
class _Way:
    """One choice of options, and for every kind its mode and its groups."""

    modes: tuple[int, ...]
    groups: tuple[tuple[tuple[str, ...], ...], ...]


def uniform_plan(table: CostTable, *, by_speed: bool, time_limit_s: float) -> Partition:
    """The best such plan that was priced in time.

    Raises:
        InfeasibleError: None was priced that fits, or the model has no equal blocks.
    """
    repeats, until_s = find_repeats(table), time.monotonic() + time_limit_s
    if repeats is None:
        raise InfeasibleError("such plans are for equal blocks", limit="form")
    best: Partition | None = None
    physical_s = physical_bound_s(table)
    for way in _ways(table):
        width = 1
        while stages := _stages(table, repeats, way, width, by_speed):
            for size in (2**i for i in range(table.batch.bit_length())):
                count = table.batch // size
                if count < width or time.monotonic() > until_s:
                    break
                found = priced_plan(
                    table, [PipelineChoice(table.batch, count, stages)], "1f1b", physical_s
                )
                if not _fits(table, found):
                    break
                if best is None or found.objective_s < best.objective_s:
                    best = found
            width *= 2
    if best is None:
        raise InfeasibleError("no plan with equal stages was found that fits", limit="memory")
    return best


def _ways(table: CostTable) -> Iterator[_Way]:
    """All options that every kind has a mode for."""
    by_options: dict[tuple[int, str, bool, int], dict[int, int]] = {}
    for number, mode in enumerate(table.every_mode):
        if len(set(mode.members)) == 1:
            key = (len(mode.members), mode.precision, mode.recompute, mode.zero)
            by_options.setdefault(key, {})[mode.members[0]] = number
    used = [k for k, c in enumerate(table.device_classes) if c.devices]
    for (size, *_), modes in by_options.items():
        if all(k in modes for k in used):
            yield _Way(tuple(modes[k] for k in used), tuple(_groups(table, k, size) for k in used))


def _groups(table: CostTable, kind: int, size: int) -> tuple[tuple[str, ...], ...]:
    """Groups of devices of a kind, each in one node."""
    nodes: dict[str, list[str]] = {}
    for device in table.device_classes[kind].devices:
        nodes.setdefault(table.topology.node_of[device], []).append(device)
    return tuple(
        tuple(own[at : at + size]) for own in nodes.values() for at in range(0, len(own) - size + 1, size)
    )


def _stages(
    table: CostTable, repeats: Repeats, way: _Way, width: int, by_speed: bool
) -> tuple[StageChoice, ...]:
    """Stages of so many replicas, none where there are more than blocks or no groups for one."""
    staffed = [
        (mode, groups[at : at + width])
        for mode, groups in zip(way.modes, way.groups, strict=True)
        for at in range(0, len(groups) - width + 1, width)
    ]
    staffed = staffed[: repeats.number]
    if not staffed:
        return ()
    speeds = [1 / _block_s(table, repeats, mode) if by_speed else 1.0 for mode, _ in staffed]
    total, done, cuts = sum(speeds), 0.0, [0]
    for place, speed in enumerate(speeds, 1):
        done += speed
        most = repeats.number - (len(staffed) - place)
        cuts.append(min(max(round(repeats.number * done / total), cuts[-1] + 1), most))
    units = [0, *(repeats.unit(c) for c in cuts[1:-1]), table.num_units]
    return tuple(
        _stage(table, first, last, mode, groups)
        for (first, last), (mode, groups) in zip(pairwise(units), staffed, strict=True)
    )


def _stage(
    table: CostTable, first: int, last: int, number: int, groups: tuple[tuple[str, ...], ...]
) -> StageChoice:
    mode = table.every_mode[number]
    replicas = tuple(Replica(g[0], 0, g[1:], mode.shares, mode.mesh) for g in groups)
    zero = mode.zero if len(groups) > 1 else 0
    return StageChoice(first, last, replicas, mode.precision, mode.recompute, zero)


def _block_s(table: CostTable, repeats: Repeats, mode: int) -> float:
    units = range(repeats.start, repeats.unit(1))
    return sum(table.forward_s(u, mode, 1.0) + table.backward_s(u, mode, 1.0) for u in units)


def _fits(table: CostTable, found: Partition) -> bool:
    memory = {d: c.memory_bytes for c in table.device_classes for d in c.devices}
    return all(peak <= memory[d] for d, peak in found.peak_bytes.items())
