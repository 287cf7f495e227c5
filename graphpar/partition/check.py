"""Recompute a partition from the cost table alone; shares no code with what found it.

The formulas are those documented in `pipeline_price`, written a second time on purpose: microbatch
by microbatch instead of by mean sizes, unit by unit instead of by prefix sums.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import product

from graphpar.cost import CostTable, Mode
from graphpar.errors import VerifyError
from graphpar.partition.types import ROUNDING, Partition, PipelineChoice, Replica, StageChoice

TOLERANCE = 1e-7
"""Largest relative difference between two ways to add up the same numbers."""


@dataclass(frozen=True)
class Checked:
    """What the checker found: step time, peak bytes per device, and the parts of the step.

    Where several pipelines, or devices after them, end last at the same time, any of them may say what
    the step consists of: `parts` are those of one, `ways` those of all.
    """

    objective_s: float
    ways: tuple[dict[str, float], ...]
    peak_bytes: dict[str, float]

    @property
    def parts(self) -> dict[str, float]:
        """What adds up to the step."""
        return self.ways[0]


def check_partition(table: CostTable, partition: Partition, *, memory: bool = True) -> Checked:
    """Recompute everything a partition claims.

    Args:
        table: What the partition was made for.
        partition: The claim.
        memory: Whether a peak above a device's memory is an error.

    Raises:
        VerifyError: A rule is broken or a number is wrong; lists up to ten of them.
    """
    problems = list(_structure_problems(table, partition))
    if not problems:
        checked = recompute(table, partition)
        problems = list(_number_problems(table, partition, checked, memory))
        if not problems:
            return checked
    raise VerifyError("the partition does not hold what it says: " + "; ".join(problems[:10]))


def recompute(table: CostTable, partition: Partition) -> Checked:
    """Step time, parts and peaks of a partition whose structure is sound."""
    slowest = _last([_pipeline_parts(table, partition, p) for p in partition.pipelines])
    exchanges = _exchanges(table, partition)
    names = ("fill_compute_s", "fill_transfer_s", "steady_s", "sync_s", "optimizer_s")
    ways = tuple(
        dict(zip(names, (fill + exchanges, *rest, *finish), strict=True))
        for (fill, *rest), finish in product(slowest, _last(_finishes(table, partition)))
    )
    peaks: dict[str, float] = {}
    for pipeline in partition.pipelines:
        for number in range(len(pipeline.stages)):
            peaks.update(_stage_peaks(table, partition, pipeline, number))
    return Checked(max(sum(parts.values()) for parts in ways), ways, peaks)


def _last(every: Sequence[tuple[float, ...]]) -> list[tuple[float, ...]]:
    """Those that together take longest, to within the tolerance, without repetition."""
    longest = max(map(sum, every))
    return list(dict.fromkeys(p for p in every if sum(p) >= longest * (1 - TOLERANCE)))


def _structure_problems(table: CostTable, partition: Partition) -> Iterator[str]:
    if not partition.pipelines:
        yield "there is no pipeline"
    if sum(p.samples for p in partition.pipelines) != table.batch:
        yield f"the shares do not add up to the batch of {table.batch}"
    if table.tail_reason and table.training and partition.schedule != "gpipe":
        yield f"forwards and backwards alternate, but {table.tail_reason}"
    seen: set[str] = set()
    copies = [0] * len(table.units)
    for number, pipeline in enumerate(partition.pipelines):
        where = f"pipeline {number}"
        if not 1 <= pipeline.microbatches <= min(pipeline.samples, table.max_microbatches):
            yield f"{where}: {pipeline.microbatches} microbatches of {pipeline.samples} samples"
        expected = 0
        for stage in pipeline.stages:
            if stage.first != expected or stage.last <= stage.first:
                yield f"{where}: a stage holds units {stage.first} to {stage.last}"
            expected = stage.last
            for unit in range(max(stage.first, 0), min(stage.last, len(copies))):
                copies[unit] += len(stage.replicas)
            dealt = [r.microbatches for r in stage.replicas]
            if not dealt or min(dealt) < 1 or sum(dealt) != pipeline.microbatches:
                yield f"{where}: a stage deals {dealt} of {pipeline.microbatches} microbatches"
            for replica in stage.replicas:
                for device in replica.devices:
                    if device not in table.class_of:
                        yield f"{where}: there is no device {device}"
                    if device in seen:
                        yield f"device {device} is used twice"
                    seen.add(device)
                yield from _mode_problems(table, where, stage, replica)
        if expected != len(table.units):
            yield f"{where}: the stages end at unit {expected} of {len(table.units)}"
    if max(copies, default=0) > table.max_replicas:
        yield f"a unit has {max(copies)} copies where {table.max_replicas} are allowed"


def _find_mode(table: CostTable, stage: StageChoice, replica: Replica) -> Mode | None:
    """The way a stage runs on a replica; None where the table does not know it."""
    kinds = tuple(table.class_of.get(device, -1) for device in replica.devices)
    options = (stage.precision, stage.recompute, stage.zero)
    number = table.mode_of_key.get((kinds, replica.shares, *options, replica.mesh, replica.lean))
    return None if number is None else table.every_mode[number]


def _mode_problems(table: CostTable, where: str, stage: StageChoice, replica: Replica) -> Iterator[str]:
    mode = _find_mode(table, stage, replica)
    if mode is None:
        yield (
            f"{where}: units {stage.first} to {stage.last} run on {', '.join(replica.devices)} in a way "
            "that has no price"
        )
        return
    for first in replica.devices:
        for second in replica.devices:
            if first == second or mode.link is None:
                continue
            link = table.topology.link(first, second)
            if link.latency_s > mode.link.latency_s or link.bytes_per_s < mode.link.bytes_per_s:
                yield f"{where}: {first} and {second} form a group over a link too slow for its price"


def _number_problems(
    table: CostTable, partition: Partition, checked: Checked, memory: bool
) -> Iterator[str]:
    if not _close(partition.objective_s, checked.objective_s):
        yield f"step {partition.objective_s!r} s, recomputed {checked.objective_s!r} s"
    yield from min((list(_other_parts(partition, checked, way)) for way in checked.ways), key=len)
    if partition.bound_s > checked.objective_s * (1 + TOLERANCE):
        yield f"bound {partition.bound_s!r} s above the step {checked.objective_s!r} s"
    if partition.physical_bound_s > checked.objective_s * (1 + TOLERANCE):
        yield f"physical bound {partition.physical_bound_s!r} s above the step"
    if set(partition.peak_bytes) != set(checked.peak_bytes):
        yield "peaks are given for other devices than are used"
    for device, peak in checked.peak_bytes.items():
        if not _close(partition.peak_bytes.get(device, math.nan), peak):
            yield f"peak of {device} {partition.peak_bytes.get(device)!r}, recomputed {peak!r}"
        capacity = table.device_classes[table.class_of[device]].memory_bytes
        if memory and peak > capacity * (1 + TOLERANCE):
            yield f"{device} needs {peak:.6g} bytes of {capacity:.6g}"


def _other_parts(partition: Partition, checked: Checked, way: dict[str, float]) -> Iterator[str]:
    for name, value in way.items():
        if not abs(partition.parts.get(name, math.nan) - value) <= TOLERANCE * checked.objective_s:
            yield f"{name} {partition.parts.get(name)!r}, recomputed {value!r}"


def _close(claimed: float, value: float) -> bool:
    return abs(claimed - value) <= TOLERANCE * max(abs(value), 1e-300)


def _mean_time(table: CostTable, pipeline: PipelineChoice, stage: StageChoice, index: int) -> float:
    """Mean seconds of the pipeline's microbatches on one replica, both directions."""
    mode = _mode(table, stage, index)
    launch = max(table.device_classes[k].stage_overhead_s for k in mode.members)
    total = 0.0
    for size in set(pipeline.sizes()):
        seconds = launch * (2 if table.training else 1)
        for unit in range(stage.first, stage.last):
            cost = mode.costs[table.units[unit]]
            seconds += table.at_size(cost.forward_s, size)
            if table.training:
                seconds += table.at_size(cost.backward_s, size)
        total += seconds * pipeline.sizes().count(size)
    return total / pipeline.microbatches + _zero_traffic(table, stage)


def _uneven(
    table: CostTable, pipeline: PipelineChoice, stage: StageChoice, index: int, times: list[float]
) -> float:
    """Seconds of samples a replica has beyond its share of the mean, larger microbatches dealt first."""
    sizes, own = pipeline.sizes(), stage.replicas[index].microbatches
    if len(stage.replicas) == 1 or sizes[0] == sizes[-1]:
        return 0.0
    large = sizes.count(sizes[0])
    share = Fraction(large * own, len(sizes))
    alike = max(times) - min(times) <= ROUNDING * max(times)
    having = len(range(index, large, len(stage.replicas))) if alike else math.ceil(share)
    costs = _mode(table, stage, index).costs
    seconds = 0.0
    for unit in range(stage.first, stage.last):
        cost = costs[table.units[unit]]
        for row in (cost.forward_s, cost.backward_s) if table.training else (cost.forward_s,):
            seconds += table.at_size(row, sizes[0]) - table.at_size(row, sizes[-1])
    if not alike:
        # It is not sure to have so many, which is no comfort where larger ones are faster.
        seconds = max(seconds, 0.0)
    return float(having - share) * seconds


def _mode(table: CostTable, stage: StageChoice, index: int) -> Mode:
    mode = _find_mode(table, stage, stage.replicas[index])
    assert mode is not None
    return mode


def _unlike(table: CostTable, stage: StageChoice) -> list[int]:
    """Places of replicas of which no two run in the same way: of hundreds mostly one."""
    places: dict[object, int] = {}
    for index, replica in enumerate(stage.replicas):
        kinds = tuple(table.class_of[device] for device in replica.devices)
        places.setdefault((kinds, replica.shares, replica.mesh, replica.lean), index)
    return list(places.values())


def _largest_part(table: CostTable, stage: StageChoice, name: str) -> float:
    """Bytes of a kind on the device of the stage that holds most of them, undivided by ZeRO."""
    largest = 0.0
    for index in _unlike(table, stage):
        mode = _mode(table, stage, index)
        for member in range(len(mode.members)):
            held = 0.0
            for unit in range(stage.first, stage.last):
                held += getattr(mode.costs[table.units[unit]], name)[member]
            largest = max(largest, held)
    return largest


def _own_group(stage: StageChoice) -> list[tuple[int, str]]:
    return [(i, device) for i, r in enumerate(stage.replicas) for device in r.devices]


def _zero_traffic(table: CostTable, stage: StageChoice) -> float:
    """Gradients scattered, and from level 3 on weights gathered twice, for every microbatch."""
    copies = len(stage.replicas)
    if stage.zero < 2 or not table.training:
        return 0.0
    gradients = _largest_part(table, stage, "gradient_bytes")
    seconds = _all_reduce(table, _own_group(stage), copies, gradients) / 2
    if stage.zero == 3:
        weights = _largest_part(table, stage, "weight_bytes")
        seconds += _all_reduce(table, _own_group(stage), copies, weights)
    return seconds


def _transfer(table: CostTable, pipeline: PipelineChoice, number: int) -> float:
    """Seconds one microbatch spends between stage `number` and the next, both directions."""
    if number < 0 or number + 1 >= len(pipeline.stages):
        return 0.0
    left, right = pipeline.stages[number], pipeline.stages[number + 1]
    size = pipeline.samples / pipeline.microbatches
    there = back = 0.0
    for edge in table.edges:
        if edge.source < right.first <= edge.target:
            there += edge.bytes_per_sample * size + edge.fixed_bytes
            back += edge.gradient_bytes_per_sample * size + edge.gradient_fixed_bytes
    forward = backward = 0.0
    node_of = table.topology.node_of
    senders = {node_of[d]: d for _, d in _own_group(left)}
    receivers = {node_of[d]: d for _, d in _own_group(right)}
    for a in senders.values():
        for b in receivers.values():
            link = table.topology.link(a, b)
            if there > 0:
                forward = max(forward, link.latency_s + there / link.bytes_per_s)
            if back > 0 and table.training:
                backward = max(backward, link.latency_s + back / link.bytes_per_s)
    messages = (forward > 0) + (backward > 0)
    return forward + backward + messages * table.message_s


def _pipeline_parts(
    table: CostTable, partition: Partition, pipeline: PipelineChoice
) -> tuple[float, float, float]:
    """Fill by computing, fill by transfers, and what the busiest stage or boundary adds."""
    compute = transfers = busiest = 0.0
    stalls = table.training and partition.schedule == "1f1b"
    for number, stage in enumerate(pipeline.stages):
        before = _transfer(table, pipeline, number - 1)
        after = _transfer(table, pipeline, number)
        transfers += after
        if not stalls:
            busiest = max(busiest, (pipeline.microbatches - 1) * after)
        waited = (before, after) if stalls else (min(s, table.handling_s) for s in (before, after))
        wait = sum(waited) / 2
        times = [_mean_time(table, pipeline, stage, i) for i in range(len(stage.replicas))]
        ends = [
            time * r.microbatches
            + wait * (r.microbatches - 1)
            + _uneven(table, pipeline, stage, i, times)
            for i, (time, r) in enumerate(zip(times, stage.replicas, strict=True))
        ]
        compute += max(times)
        busiest = max(busiest, max(ends) - max(times))
    return compute, transfers, busiest


def _all_reduce(table: CostTable, devices: list[tuple[int, str]], copies: int, size: float) -> float:
    """A ring over `copies` holders; the slowest link joins two devices with unlike group numbers."""
    if copies < 2 or size <= 0:
        return 0.0
    slowest = 0.0
    devices = _two_per_node(table, devices)
    for group, a in devices:
        for other, b in devices:
            if group != other:
                link = table.topology.link(a, b)
                slowest = max(slowest, link.latency_s + size / copies / link.bytes_per_s)
    return 2 * (copies - 1) * (slowest + table.sum_s_per_byte * size / copies)


def _two_per_node(table: CostTable, devices: list[tuple[int, str]]) -> list[tuple[int, str]]:
    """Devices of two groups for each node: with any third one of them forms an unlike pair too."""
    kept: dict[str, dict[int, str]] = {}
    for group, device in devices:
        here = kept.setdefault(table.topology.node_of[device], {})
        if len(here) < 2:
            here.setdefault(group, device)
    return [(group, device) for here in kept.values() for group, device in here.items()]


def _one_per_node(table: CostTable, devices: list[tuple[int, str]]) -> list[tuple[int, str]]:
    """For each group one device of each of its nodes: links depend on nodes only."""
    return list({(group, table.topology.node_of[d]): (group, d) for group, d in devices}.values())


def _exchanges(table: CostTable, partition: Partition) -> float:
    """What pipelines that go in step tell each other within the units, in all directions of a step."""
    if not table.in_step_reason:
        return 0.0
    found = 0.0
    for number, pipeline in enumerate(partition.pipelines):
        for other in partition.pipelines[number + 1 :]:
            for a, b in product(_all_devices(pipeline), _all_devices(other)):
                link = table.topology.link(a, b)
                costs = [table.costs[kind] for kind in table.units]
                seconds = sum(c.meetings * link.latency_s + c.met_bytes / link.bytes_per_s for c in costs)
                found = max(found, seconds)
    return found * (2 if table.training else 1)


def _all_devices(pipeline: PipelineChoice) -> list[str]:
    return [device for stage in pipeline.stages for r in stage.replicas for device in r.devices]


def _finishes(table: CostTable, partition: Partition) -> list[tuple[float, ...]]:
    """Sync and optimiser seconds of every device."""
    if not table.training:
        return [(0.0, 0.0)]
    found: list[tuple[float, ...]] = []
    clock: dict[str, float] = {}
    for devices, seconds in _sums_in_order(table, partition):
        end = max(clock.get(device, 0.0) for device in devices) + seconds
        for device in devices:
            clock[device] = end
    for pipeline in partition.pipelines:
        for stage in pipeline.stages:
            for index, replica in enumerate(stage.replicas):
                mode = _mode(table, stage, index)
                steps = [mode.costs[table.units[u]].optimizer_s for u in range(stage.first, stage.last)]
                optimizer = sum(steps) / (len(stage.replicas) if stage.zero > 0 else 1)
                found += [(clock.get(device, 0.0), optimizer) for device in replica.devices]
    return found


def _sums_in_order(table: CostTable, partition: Partition) -> Iterator[tuple[tuple[str, ...], float]]:
    """Who sums after the last backward, and for how long: ZeRO's replicas, then all copies by unit."""
    every = [s for p in partition.pipelines for s in p.stages]
    for stage in every:
        if stage.zero > 0 and len(stage.replicas) > 1:
            seconds = _stage_finish(table, stage)
            for member in range(len(stage.replicas[0].devices)):
                yield tuple(r.devices[member] for r in stage.replicas), seconds
    modes = {
        id(s): {id(m): m for m in (_mode(table, s, i) for i in range(len(s.replicas)))} for s in every
    }
    held: dict[tuple[str, ...], tuple[list[Replica], dict[tuple[int, ...], dict[tuple[int, ...], float]]]]
    held = {}
    for unit, kind in enumerate(table.units):
        here = [s for s in every if s.first <= unit < s.last]
        run = tuple(map(id, here))
        speaking = [r for s in here for r in s.replicas[: 1 if s.zero > 0 else None]]
        for member in range(max(len(r.devices) for r in speaking)):
            copies = [r for r in speaking if len(r.devices) > member]
            _, runs = held.setdefault(tuple(r.devices[member] for r in copies), (copies, {}))
            sizes = runs.setdefault(run, {})
            for stage in here:
                for number, mode in modes[id(stage)].items():
                    for place, size in enumerate(mode.costs[kind].gradient_bytes):
                        holder = (id(stage), number, place)
                        sizes[holder] = sizes.get(holder, 0.0) + size
    for devices, (copies, runs) in held.items():
        group = _one_per_node(table, [(i, d) for i, r in enumerate(copies) for d in r.devices])
        size = sum(max(sizes.values()) for sizes in runs.values())
        if size > 0:
            # Who has nothing to sum waits for nobody.
            yield devices, _all_reduce(table, group, len(devices), size)


def _stage_finish(table: CostTable, stage: StageChoice) -> float:
    """What the replicas of a stage exchange after the last backward."""
    group, copies = _own_group(stage), len(stage.replicas)
    gradients = _largest_part(table, stage, "gradient_bytes")
    weights = _largest_part(table, stage, "weight_bytes")
    if stage.zero == 0:
        return _all_reduce(table, group, copies, gradients)
    if stage.zero == 1:
        scattered = _all_reduce(table, group, copies, gradients) / 2
        return scattered + _all_reduce(table, group, copies, weights) / 2
    return _all_reduce(table, group, copies, weights) / 2 if stage.zero == 2 else 0.0


def _stage_peaks(
    table: CostTable, partition: Partition, pipeline: PipelineChoice, number: int
) -> Iterator[tuple[str, float]]:
    """The peak of every device of a stage; of hundreds of replicas with the same work one is added up."""
    known: dict[object, list[float]] = {}
    for index, replica in enumerate(pipeline.stages[number].replicas):
        kinds = tuple(table.class_of[device] for device in replica.devices)
        work = kinds, replica.shares, replica.mesh, replica.lean, replica.microbatches
        if work not in known:
            members = range(len(kinds))
            known[work] = [_peak(table, partition, pipeline, number, index, m) for m in members]
        yield from zip(replica.devices, known[work], strict=True)


def _peak(
    table: CostTable,
    partition: Partition,
    pipeline: PipelineChoice,
    number: int,
    index: int,
    member: int,
) -> float:
    stage = pipeline.stages[number]
    copies = len(stage.replicas)
    below = sum(len(s.replicas) for s in pipeline.stages[number:])
    own = stage.replicas[index].microbatches
    if not table.training:
        held = 0
    elif partition.schedule == "gpipe":
        held = own
    else:
        held = min(own, math.ceil(below / copies))
    size = max(pipeline.sizes())
    mode = _mode(table, stage, index)
    total = table.reserved_bytes
    kept, largest, stepped, freed = 0.0, 0.0, 0.0, 0.0
    for unit in range(stage.first, stage.last):
        cost = mode.costs[table.units[unit]]
        parts = [
            (1, cost.optimizer_bytes[member]),
            (2, cost.gradient_bytes[member]),
            (3, cost.weight_bytes[member]),
        ]
        temporary = table.at_size(cost.working_bytes[member], size)
        for level, num_bytes in parts:
            if stage.zero >= level and copies > 1:
                total += num_bytes / copies
                temporary += num_bytes if level > 1 else 0.0
            else:
                total += num_bytes
        kept += held * table.at_size(cost.saved_bytes[member], size)
        largest = max(largest, temporary)
        stepped += cost.gradient_bytes[member]
    for again in table.repeated:
        if again.first < stage.first and set(again.again) & set(range(stage.first, stage.last)):
            parts = [(1, again.optimizer_bytes), (2, again.gradient_bytes), (3, again.weight_bytes)]
            total += sum(b / (copies if stage.zero >= level else 1) for level, b in parts)
            stepped += again.gradient_bytes
    if not table.training:
        return total + largest
    if stage.zero:
        # At level 1 gradients were whole until they were summed, and are gone when the update begins.
        freed = stepped * (1 - 1 / copies) if stage.zero == 1 else 0.0
        stepped /= copies
    update = table.device_classes[mode.members[member]].update_share * stepped - freed
    return total + max(kept + largest, update)
