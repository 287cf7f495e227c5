"""Say why nothing fits, and the smallest change that would, found by relaxing the memory limits."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NoReturn

from graphpar.cost import CostTable, DeviceClass
from graphpar.errors import InfeasibleError
from graphpar.partition.clock import OutOfTimeError
from graphpar.partition.counting import CountingLimits
from graphpar.partition.family import Family, choose_family
from graphpar.partition.programs import Programs
from graphpar.partition.relaxed_tables import with_batch, with_options, with_small_updates
from graphpar.partition.search import INFINITY
from graphpar.partition.settings import Microbatches, ScheduleChoice
from graphpar.partition.stage_costs import StageLimits
from graphpar.units import format_bytes

EXPLAIN_S = 10.0
"""Time the search for a remedy may take, where nobody says otherwise."""

_PRECISION = 1.02
"""The smallest sufficient memory is found to within two per cent."""

_MOST_DEVICES = 64
"""No more than this many further devices of a class are proposed."""


def explain_infeasible(
    table: CostTable, family: Family, truncated: Sequence[str], seconds: float = EXPLAIN_S
) -> NoReturn:
    """Raise the error for a search that found no plan.

    Raises:
        InfeasibleError: With the limit, the need, what there is and the remedy.
    """
    deadline_s = time.monotonic() + seconds
    if truncated and fits(family, deadline_s):
        raise InfeasibleError(
            f"no plan was found in the time given ({', '.join(truncated)}), though one exists; "
            "give the search more time",
            limit="time",
            remedy="a larger time_limit_s",
        )
    factor = _least_factor(table, family, deadline_s)
    largest = max(c.memory_bytes for c in table.device_classes if c.devices)
    have = sum(c.memory_bytes * len(c.devices) for c in table.device_classes)
    options = list(_options(table, family, deadline_s)) if table.training else []
    remedies = [*options, *_smaller_batch(table, family, deadline_s)]
    remedies += _remedies(table, family, factor, deadline_s)
    need = have * factor if factor < INFINITY else INFINITY
    text = (
        f"no plan fits into memory: {sum(len(c.devices) for c in table.device_classes)} devices have "
        f"{format_bytes(have)} together, {format_bytes(largest)} at most on one"
    )
    if factor < INFINITY:
        text += f"; the least demanding plan needs {factor:.2f} times the memory of every device"
    if remedies:
        text += ". What would fit: " + "; or ".join(remedies)
    raise InfeasibleError(
        text,
        limit="memory",
        need=need if need < INFINITY else None,
        have=have,
        remedy=remedies[0] if remedies else "",
    )


def _options(table: CostTable, family: Family, deadline_s: float) -> Iterator[str]:
    """Options that the table lacks and with which a plan fits, each by itself if that is enough."""
    if any(c.update_share for c in table.device_classes):
        if _certain(with_small_updates(table), family, deadline_s):
            yield "an optimiser whose update needs no further memory (in torch: fused=True)"
    has = {(m.recompute, m.zero) for m in table.every_mode}
    again = not any(recompute for recompute, _ in has)
    levels = [z for z in (1, 2, 3) if z > max(zero for _, zero in has)]
    if again and _certain(with_options(table, recompute=True, zero=0), family, deadline_s):
        yield "recomputation"
        again = False
    found = _least_level(table, family, levels, False, deadline_s)
    if found is not None:
        yield f"ZeRO level {found}"
    elif again:
        found = _least_level(table, family, levels, True, deadline_s)
        if found is not None:
            yield f"recomputation with ZeRO level {found}"


def _least_level(
    table: CostTable, family: Family, levels: Sequence[int], recompute: bool, deadline_s: float
) -> int | None:
    for level in levels:
        if _certain(with_options(table, recompute=recompute, zero=level), family, deadline_s):
            return level
    return None


def _smaller_batch(table: CostTable, family: Family, deadline_s: float) -> Iterator[str]:
    """The largest batch that fits; only where microbatches cannot be made smaller instead."""
    fixed = table.max_microbatches if family.microbatches == "auto" else family.microbatches
    if table.batch <= fixed or not _certain(with_batch(table, fixed), family, deadline_s):
        return
    low, high = fixed, table.batch
    while high - low > 1:
        middle = (low + high) // 2
        if _certain(with_batch(table, middle), family, deadline_s):
            low = middle
        else:
            high = middle
    yield f"a batch of {low} instead of {table.batch}"


def _certain(table: CostTable, family: Family, deadline_s: float) -> bool:
    """Whether a plan was found that fits; unlike `fits`, False where time runs out."""
    return _fits_table(table, family, deadline_s) and time.monotonic() < deadline_s


def some_plan_fits(
    table: CostTable, schedule: ScheduleChoice, microbatches: Microbatches, deadline_s: float
) -> bool:
    """Whether a plan was found that fits into memory; False where time ran out."""
    return (
        fits(choose_family(table, schedule, microbatches), deadline_s) and time.monotonic() < deadline_s
    )


def fits(family: Family, deadline_s: float) -> bool:
    """Whether any single pipeline of the family fits into memory; True where time runs out."""
    programs = Programs(family, CountingLimits(0.5, "highs"))
    tasks = programs.tasks(family.cells.counts, family.table.batch, family.schedules)
    try:
        # The smallest microbatches need least memory: try them first.
        for task in reversed(tasks):
            if task.build().solve(StageLimits(), deadline_s) is not None:
                return True
    except OutOfTimeError:
        return True
    return False


def _fits_table(table: CostTable, family: Family, deadline_s: float) -> bool:
    schedule = family.schedules[0] if len(family.schedules) == 1 else "auto"
    relaxed = choose_family(table, schedule, family.microbatches)
    return fits(relaxed, deadline_s)


def scale_memory(table: CostTable, factor: float) -> CostTable:
    """The same table with every device's memory multiplied."""
    classes = tuple(replace(c, memory_bytes=c.memory_bytes * factor) for c in table.device_classes)
    return replace(table, device_classes=classes)


def _least_factor(table: CostTable, family: Family, deadline_s: float) -> float:
    """By what all memories must be multiplied for a plan to fit; infinite if nothing helps."""
    low, high = 1.0, 2.0
    while not _fits_table(scale_memory(table, high), family, deadline_s):
        low, high = high, high * 2
        if high > 2**20:
            return INFINITY
    while high / low > _PRECISION:
        middle = (low * high) ** 0.5
        if _fits_table(scale_memory(table, middle), family, deadline_s):
            high = middle
        else:
            low = middle
    return high


def _remedies(table: CostTable, family: Family, factor: float, deadline_s: float) -> list[str]:
    found = []
    if factor < INFINITY:
        largest = max(c.memory_bytes for c in table.device_classes if c.devices)
        found.append(
            f"devices with {factor:.2f} times the memory "
            f"({format_bytes(largest * factor)} instead of {format_bytes(largest)})"
        )
    for index, device_class in enumerate(table.device_classes):
        number = _devices_needed(table, index, family, deadline_s)
        if number is not None:
            found.append(f"{number} more of {device_class.name}")
    return found


def _devices_needed(table: CostTable, index: int, family: Family, deadline_s: float) -> int | None:
    """How many further devices of a class make a plan fit, or None."""
    number = 1
    while number <= _MOST_DEVICES and time.monotonic() < deadline_s:
        if _fits_table(more_devices(table, index, number), family, deadline_s):
            break
        number *= 2
    else:
        return None
    low = number // 2
    while number - low > 1:
        middle = (number + low) // 2
        if _fits_table(more_devices(table, index, middle), family, deadline_s):
            number = middle
        else:
            low = middle
    return number if time.monotonic() < deadline_s else None


def more_devices(table: CostTable, index: int, number: int) -> CostTable:
    """The same table with further devices of a class, in the node of its first one."""
    device_class = table.device_classes[index]
    names = tuple(f"further {index}.{i}" for i in range(number))
    grown: DeviceClass = replace(device_class, devices=device_class.devices + names)
    classes = [grown if i == index else c for i, c in enumerate(table.device_classes)]
    first = next(d for c in table.device_classes for d in c.devices)
    like = device_class.devices[0] if device_class.devices else first
    topology = table.topology
    node_of = topology.node_of | dict.fromkeys(names, topology.node_of[like])
    return replace(
        table,
        device_classes=tuple(classes),
        topology=replace(topology, node_of=node_of),
    )
