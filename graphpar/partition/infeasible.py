"""Say why nothing fits, and the smallest change that would, found by relaxing the memory limits."""

import heapq
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NoReturn

from graphpar.cost import CostTable, DeviceClass
from graphpar.errors import InfeasibleError
from graphpar.partition.bounds import least_bytes
from graphpar.partition.clock import OutOfTimeError
from graphpar.partition.counting.programme import CountingLimits
from graphpar.partition.family import Family, Group, Grouping, choose_family, groupings
from graphpar.partition.fewer_devices import TooManyUnitsError
from graphpar.partition.memory_bound import room_bytes
from graphpar.partition.memory_fit import larger_hold_more
from graphpar.partition.programs import Programs
from graphpar.partition.relaxed_tables import with_batch, with_options, with_small_updates
from graphpar.partition.search import INFINITY, Found
from graphpar.partition.settings import (
    EVERY_LEVEL,
    Microbatches,
    ScheduleChoice,
    microbatch_counts,
)
from graphpar.partition.stage_costs import StageLimits
from graphpar.partition.types import ScheduleName
from graphpar.partition.unit_arrays import Setting
from graphpar.units import enough_bytes, format_bytes

EXPLAIN_S = 10.0
"""Time the search for a remedy may take, where nobody says otherwise."""

_PRECISION = 1.02
"""The smallest sufficient memory is found to within two per cent."""

_MOST_FACTOR = 2.0**20
"""No more memory than so many times what is known to be too little is tried."""

_HALVINGS = 30
"""Of an interval of factors, one of which is just too little."""

_WHOLE = 100.0
"""Of larger factors nobody needs two digits behind the point."""

_DEVICES_S = 1.0
"""Processor time after which no other kind is asked for: what other work there is must not matter."""

_MOST_DEVICES = 64
"""No more than this many further devices of a class are proposed."""


def explain_infeasible(
    table: CostTable,
    family: Family,
    truncated: Sequence[str],
    seconds: float = EXPLAIN_S,
    zero_levels: Sequence[int] = EVERY_LEVEL,
) -> NoReturn:
    """Raise the error for a search that found no plan; of ZeRO only some levels may be proposed.

    Where time cut the search short, it is asked first whether any plan fits.

    Raises:
        InfeasibleError: With the limit, the need, what there is and the remedy.
    """
    deadline_s = time.monotonic() + seconds
    some = fits(family, deadline_s) if truncated else False
    if some is not False:
        known = "though one exists" if some else "nor was it settled whether one fits"
        raise InfeasibleError(
            f"no plan was found in the time given ({', '.join(truncated)}), {known}; "
            "give the search more time",
            limit="time",
            remedy="a larger time_limit_s",
        )
    less, factor = _least_factor(family, deadline_s)
    largest = max(c.memory_bytes for c in table.device_classes if c.devices)
    have = sum(c.memory_bytes * len(c.devices) for c in table.device_classes)
    options = list(_options(table, family, zero_levels, deadline_s)) if table.training else []
    remedies = [*_settings(table, family, deadline_s), *options]
    remedies += _smaller_batch(table, family, deadline_s)
    remedies += _remedies(table, family, factor, deadline_s)
    # Of plans over devices that were left out nothing is proven.
    is_least = not family.partial and factor / less <= _PRECISION
    number = sum(len(c.devices) for c in table.device_classes)
    text = (
        f"{'no plan was found that' if family.partial else 'no plan'} fits into memory: {number} devices "
        f"have {format_bytes(have)} together, {format_bytes(largest)} at most on one"
    )
    if is_least:
        text += f"; the least demanding plan needs {_up(factor)} times the memory of every device"
    elif factor < INFINITY:
        text += f"; {_up(factor)} times the memory of every device is enough, which may not be the least"
    elif less > 1 and not family.partial:
        lacks = f"{_down(less)} times the memory of every device ({format_bytes(have * less)} together)"
        text += f"; {lacks} is not enough"
    if family.partial:
        text += f"; searched were {family.staffing}"
    if remedies:
        text += ". What would fit: " + "; or ".join(remedies)
    raise InfeasibleError(
        text,
        limit="memory",
        need=have * factor if is_least else None,
        have=have,
        remedy=remedies[0] if remedies else "",
    )


def _up(factor: float) -> str:
    """A factor that is enough, with two digits where they say something.

    >>> _up(1.361), _up(1.5), _up(1048577.5)
    ('1.37', '1.50', '1,048,578')
    """
    if factor > _WHOLE:
        return f"{math.ceil(factor * (1 - 1e-12)):,}"
    return f"{math.ceil(100 * factor * (1 - 1e-12)) / 100:.2f}"


def _down(factor: float) -> str:
    """A factor that is not enough, rounded the other way."""
    return f"{math.floor(factor):,}" if factor > _WHOLE else f"{math.floor(100 * factor) / 100:.2f}"


def _settings(table: CostTable, family: Family, deadline_s: float) -> Iterator[str]:
    """What was fixed and would fit if it were not: the fewest microbatches beyond, and 1F1B."""
    if family.microbatches != "auto":
        counts = microbatch_counts(table, table.batch, "auto")
        more = [n for n in counts if n > family.microbatches]
        if more and _fit_cut(table, family, more[-1], deadline_s):
            low, high = -1, len(more) - 1
            while high - low > 1:
                middle = (low + high) // 2
                enough = _fit_cut(table, family, more[middle], deadline_s)
                low, high = (low, middle) if enough else (middle, high)
            yield f"microbatches={more[high]} instead of {family.microbatches}"
    if table.training and family.schedules == ("gpipe",) and not table.tail_reason:
        if some_plan_fits(table, "1f1b", family.microbatches, deadline_s):
            yield 'schedule="1f1b" instead of "gpipe"'


def _fit_cut(table: CostTable, family: Family, microbatches: int, deadline_s: float) -> bool:
    """Whether a plan of so many microbatches was found to fit."""
    return bool(_fits_table(table, replace(family, microbatches=microbatches), deadline_s))


def _options(
    table: CostTable, family: Family, zero_levels: Sequence[int], deadline_s: float
) -> Iterator[str]:
    """Options that the table lacks and with which a plan fits, each by itself if that is enough.

    Units of a model whose samples mix write into buffers: they do not run twice.
    """
    if any(c.update_share for c in table.device_classes):
        if _certain(with_small_updates(table), family, deadline_s):
            yield "an optimiser whose update needs no further memory (in torch: fused=True)"
    has = {(m.recompute, m.zero) for m in table.every_mode}
    mixes = table.batch_reason or table.in_step_reason
    again = not mixes and not any(recompute for recompute, _ in has)
    levels = [z for z in zero_levels if z > max(zero for _, zero in has)]
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
    """Whether a plan was found that fits; False where time runs out."""
    return bool(_fits_table(table, family, deadline_s))


def some_plan_fits(
    table: CostTable, schedule: ScheduleChoice, microbatches: Microbatches, deadline_s: float
) -> bool:
    """Whether a plan was found that fits into memory; False where time ran out, or units are too many."""
    try:
        return bool(fits(choose_family(table, schedule, microbatches), deadline_s))
    except TooManyUnitsError:
        return False


def fits(family: Family, deadline_s: float) -> bool | None:
    """Whether any plan of the family fits into memory; None where time runs out.

    One pipeline over all devices keeps no more than several do, but where what is kept grows with its
    samples: there pipelines side by side are asked for as well.
    """
    if time.monotonic() > deadline_s:
        return None
    programs, table = Programs(family, CountingLimits(0.5, "highs"), deadline_s), family.table
    try:
        if _holds(programs, family.cells.counts, table.batch, 1, deadline_s):
            return True
        grows = _grows_with_samples(family)
        return grows and any(_hold_together(programs, g, deadline_s) for g in groupings(family))
    except OutOfTimeError:
        return None


def held_by_memory(programs: Programs) -> tuple[bool, Found | None]:
    """What memory alone says in hundredths of a second: whether a plan may fit, and one that does.

    That one may be far from the best. Nothing is said of stages that are counted.
    """
    family = programs.family
    if family.repeats is not None or not programs.loops or _grows_with_samples(family):
        return True, None
    counts, samples = family.cells.counts, family.table.batch
    settings = _finest_first(family, samples)
    if not settings:
        return False, None
    found = programs.memory_fit(counts, 1).witness(settings[0])
    if found is not None:
        return True, found
    return not _none_by_memory(programs, counts, settings, family.table.max_replicas), None


def one_may_fit(programs: Programs) -> bool:
    """Whether memory leaves room for one pipeline over all devices; False is proven. Needs loops."""
    counts, settings = (
        programs.family.cells.counts,
        _finest_first(programs.family, programs.family.table.batch),
    )
    # One replica per stage is looked at first: there are few such stages, and mostly they will do.
    return not settings or (
        programs.memory_fit(counts, 1).may_fit(settings[0])
        or not _none_by_memory(programs, counts, settings, programs.family.table.max_replicas)
    )


def _grows_with_samples(family: Family) -> bool:
    """Whether a pipeline keeps less with fewer samples: then several may fit where one does not."""
    table = family.table
    grows = bool(table.in_step_reason or table.tail_reason) or family.schedules == ("gpipe",)
    return table.training and (grows or family.microbatches != "auto")


def _holds(programs: Programs, group: Group, samples: int, peers: int, deadline_s: float) -> bool:
    """Whether one of so many pipelines, on devices given by counts per cell, can take so many samples."""
    if programs.loops:
        known = _by_memory_alone(programs, group, samples, peers, deadline_s)
        if known is not None:
            return known
    tasks = programs.tasks(group, samples, programs.family.schedules, peers)
    finest = [t for t in tasks if t.setting.microbatches == samples]
    if finest and _finest_holds_least(programs.family):
        tasks = [t for t in finest if t.setting.schedule == "1f1b"] or finest
    # The smallest microbatches need least memory: try them first.
    return any(t.build().solve(StageLimits(), deadline_s) is not None for t in reversed(tasks))


def _by_memory_alone(
    programs: Programs, group: Group, samples: int, peers: int, deadline_s: float
) -> bool | None:
    """`_holds` as far as memory alone says it, which is quick; None where it does not."""
    family = programs.family
    settings = _finest_first(family, samples)
    if not settings:
        return False
    # One replica per stage is looked at first: there are few such stages, and mostly they will do.
    if programs.memory_fit(group, 1).witness(settings[0]) is not None:
        return True
    width = family.table.max_replicas // peers
    if _none_by_memory(programs, group, settings, width):
        return False
    fit = programs.memory_fit(group, width)
    for setting in settings:
        if time.monotonic() > deadline_s:
            raise OutOfTimeError
        if fit.witness(setting) is not None:
            return True
    return None


def _finest_first(family: Family, samples: int) -> list[Setting]:
    """Every number of microbatches, the largest first, under the schedule that keeps least."""
    schedule: ScheduleName = "1f1b" if "1f1b" in family.schedules else "gpipe"
    return [Setting(samples, m, schedule) for m in reversed(family.counts(samples))]


def _none_by_memory(programs: Programs, group: Group, settings: Sequence[Setting], width: int) -> bool:
    """Whether memory alone excludes all of some settings, the finest first."""
    finest_is_enough = len(settings) == 1 or larger_hold_more(programs.family.table)
    return finest_is_enough and not programs.memory_fit(group, width).may_fit(settings[0])


def _finest_holds_least(family: Family) -> bool:
    """Whether whatever fits in any number of microbatches fits in as many as there are samples.

    With m microbatches of up to s = ceil(n / m) samples a replica holds `h(m) = min(ceil(m / w),
    ceil(D / w))` of them, under GPipe `ceil(m / w)`, and under 1F1B no more than under GPipe. As `s m >=
    n`, `s h(m) >= h(n)`. So it is enough that s samples at once keep no less than s times what one does,
    and that temporaries grow; ZeRO's do not depend on s, and n microbatches allow as many replicas as
    any. Unlike replicas need not have equal shares: a fast one may hold more when they are cut finer.
    """
    table = family.table
    alike = all(len(set(option.staff)) == 1 for option in family.options)
    rows = [(c.saved_bytes, c.working_bytes) for mode in table.every_mode for c in mode.costs]
    return (alike and table.sizes[0] == 1) and all(
        all(kept >= size * row[0] * (1 - 1e-12) for size, kept in zip(table.sizes, row, strict=True))
        and all(a <= b for a, b in pairwise(more))
        for saved, working in rows
        for row, more in zip(saved, working, strict=True)
    )


def _hold_together(programs: Programs, groups: Grouping, deadline_s: float) -> bool:
    """Whether the most that each of some pipelines can take add up to the batch."""
    batch = programs.family.table.batch
    most = {group: _most_samples(programs, group, len(groups), deadline_s) for group in set(groups)}
    return min(most.values()) > 0 and sum(most[group] for group in groups) >= batch


def _most_samples(programs: Programs, group: Group, peers: int, deadline_s: float) -> int:
    low, over = 0, programs.family.table.batch
    while over - low > 1:
        middle = (low + over) // 2
        if _holds(programs, group, middle, peers, deadline_s):
            low = middle
        else:
            over = middle
    return low


def _fits_table(table: CostTable, family: Family, deadline_s: float) -> bool | None:
    schedule = family.schedules[0] if len(family.schedules) == 1 else "auto"
    relaxed = choose_family(table, schedule, family.microbatches)
    return fits(relaxed, deadline_s)


def scale_memory(table: CostTable, factor: float) -> CostTable:
    """The same table with every device's memory multiplied."""
    classes = tuple(replace(c, memory_bytes=c.memory_bytes * factor) for c in table.device_classes)
    return replace(table, device_classes=classes)


def _least_factor(family: Family, deadline_s: float) -> tuple[float, float]:
    """By what all memories must be multiplied for a plan to fit: too little, and enough.

    The two are close where time allows. Enough is infinite if nothing helps or none was found in time.
    """
    if not any(c.memory_bytes for c in family.table.device_classes if c.devices):
        return 1.0, INFINITY  # No multiple of nothing is enough.
    low, high = max(1.0, _beyond_doubt(family.table)), INFINITY
    most = low * _MOST_FACTOR
    while high / low > _PRECISION and low < most:
        middle = low * 2 if high == INFINITY else (low * high) ** 0.5
        # What is searched does not depend on memory.
        enough = fits(replace(family, table=scale_memory(family.table, middle)), deadline_s)
        if enough is None:
            break
        low, high = (low, middle) if enough else (middle, high)
    return low, high


def _beyond_doubt(table: CostTable) -> float:
    """So many times the memory does not hold one copy of all units: no search is needed to know that."""
    counts, need = [len(c.devices) for c in table.device_classes], least_bytes(table)
    total = sum(n * c.memory_bytes for n, c in zip(counts, table.device_classes, strict=True))
    # Enough of every device's memory for its worker and all units.
    low, high = 0.0, (need + sum(counts) * table.reserved_bytes) / total
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        holds = room_bytes(scale_memory(table, middle), counts) >= need
        low, high = (low, middle) if holds else (middle, high)
    return low


def _remedies(table: CostTable, family: Family, factor: float, deadline_s: float) -> list[str]:
    found = []
    if factor < INFINITY:
        largest = max(c.memory_bytes for c in table.device_classes if c.devices)
        found.append(
            f"devices with {_up(factor)} times the memory "
            f"({enough_bytes(largest * factor)} instead of {format_bytes(largest)})"
        )
    return [*found, *_further_devices(table, family, deadline_s)]


def _further_devices(table: CostTable, family: Family, deadline_s: float) -> Iterator[str]:
    """How many more devices of each kind would do, the fewest first; of those there is time for.

    Small numbers of all kinds are tried before larger ones of any. What is told fits, and one less was
    tried and does not. Still fewer are taken not to fit either, since devices may stand idle; only where
    more devices are searched in fewer ways could that be otherwise.
    """
    until_s = time.process_time() + _DEVICES_S
    too_few = _too_few(table)
    # What is tried next, of which kind, and what is known to be too few and enough.
    waiting: list[tuple[int, int, int, int | None]] = [
        (low + 1, index, low, None) for index, low in enumerate(too_few) if low < _MOST_DEVICES
    ]
    heapq.heapify(waiting)
    needed = []
    while waiting and time.process_time() < until_s and time.monotonic() < deadline_s:
        number, index, low, high = heapq.heappop(waiting)
        enough = _fits_table(more_devices(table, index, number), family, deadline_s)
        if enough is None:
            break
        low, high = (low, number) if enough else (number, high)
        # Without enough: twice as far as before from what is too few by the sum of all memory.
        further = min(2 * low - too_few[index], _MOST_DEVICES)
        number = further if high is None else (low + high) // 2
        if high is not None and high - low == 1:
            needed.append((high, index))
        elif number > low:
            heapq.heappush(waiting, (number, index, low, high))
    yield from (f"{number} more of {table.device_classes[i].name}" for number, i in sorted(needed))


def _too_few(table: CostTable) -> list[int]:
    """[class]: so many further devices do not have the memory for one copy of all units."""
    missing = least_bytes(table) - room_bytes(table, [len(c.devices) for c in table.device_classes])
    each = [room_bytes(replace(table, device_classes=(c,)), (1,)) for c in table.device_classes]
    if missing <= 0:
        return [0] * len(each)
    enough = (math.ceil(missing / room * (1 - 1e-9)) if room > 0 else INFINITY for room in each)
    return [int(min(number - 1, _MOST_DEVICES)) for number in enough]


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
