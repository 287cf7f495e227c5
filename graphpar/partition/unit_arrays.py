"""What a run of units costs on one device, for many runs at once."""

from bisect import bisect_left
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from graphpar.cost import CostTable, DeviceClass, Mode
from graphpar.partition.cells import Links
from graphpar.partition.types import ScheduleName

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.intp]
BoolArray = npt.NDArray[np.bool_]

UNLIMITED = 1e15
"""A number of microbatches or devices that no plan reaches."""

MEMORY_TOLERANCE = 1e-9
"""Relative excess of a sum of bytes over a device's memory that is rounding."""


@dataclass(frozen=True)
class Setting:
    """What one pipeline is asked to do.

    `peers` is the number of pipelines side by side; `across` holds for each place of this one the best
    links from there to each of the others.
    """

    samples: int
    microbatches: int
    schedule: ScheduleName
    peers: int = 1
    across: tuple[Links, ...] = ()

    @property
    def shared(self) -> tuple[object, ...]:
        """All but the schedule."""
        return self.samples, self.microbatches, self.peers, self.across

    @property
    def size(self) -> float:
        """Mean microbatch size."""
        return self.samples / self.microbatches


@dataclass(frozen=True, eq=False)
class Ranges:
    """Runs of units `first .. last - 1`, in arrays of any one shape; `valid` marks the real ones."""

    first: IntArray
    last: IntArray
    valid: npt.NDArray[np.bool_]

    @cached_property
    def halves(self) -> list[tuple[BoolArray, IntArray, IntArray]]:
        """By powers of two: the runs that are as long but not twice, and where two of them cover each."""
        found, reach, length = [], 1, self.last - self.first
        while (length >= reach).any():
            here = self.valid & (length >= reach) & (length < 2 * reach)
            found.append((here, self.first[here], self.last[here] - reach))
            reach *= 2
        return found


def run_ranges(num_units: int) -> Ranges:
    """Every run, by first unit and then by length."""
    return some_ranges([(a, b) for a in range(num_units) for b in range(a + 1, num_units + 1)])


def starts(array: IntArray) -> BoolArray:
    """Which entries are unlike the one before them, as the first one is."""
    found = np.ones(len(array), dtype=np.bool_)
    np.not_equal(array[1:], array[:-1], out=found[1:])
    return found


def at_size(table: CostTable, rows: FloatArray, size: float) -> FloatArray:
    """`CostTable.at_size` of [tabulated size, ...] at once."""
    sizes = table.sizes
    found: FloatArray
    if size <= sizes[0]:
        found = rows[0] * (max(size, 0) / sizes[0])
    elif size >= sizes[-1]:
        found = rows[-1] * (size / sizes[-1])
    else:
        right = bisect_left(sizes, size)
        share = (size - sizes[right - 1]) / (sizes[right] - sizes[right - 1])
        found = rows[right - 1] * (1 - share) + rows[right] * share
    return found


def times_s(table: CostTable, size: float) -> FloatArray:
    """[distinct unit, mode]: seconds of one microbatch, both directions."""
    return at_size(table, table.both_s, size)


def some_ranges(runs: Sequence[tuple[int, int]]) -> Ranges:
    """The given runs, in one dimension."""
    # Compiled loops are made for arrays without gaps, and would be compiled once more for others.
    first, last = np.array(runs, dtype=np.intp).reshape(-1, 2).T.copy()
    return Ranges(first, last, np.ones(len(first), dtype=np.bool_))


Cache = dict[tuple[Hashable, ...], npt.NDArray[Any]]
"""What was worked out for a table and ranges already; whoever shares one shares both."""


class UnitArrays:
    """Per-unit rows of a table for one microbatch size, summed up over runs."""

    def __init__(
        self, table: CostTable, setting: Setting, ranges: Ranges, cache: Cache | None = None
    ) -> None:
        self.cache: Cache = {} if cache is None else cache
        self.table = table
        self.setting = setting
        self.runs = ranges
        self.valid = ranges.valid
        self._kind = np.array(table.units)
        self._every_valid = bool(ranges.valid.all())

    def ranges(self, per_cost: Sequence[float] | FloatArray) -> FloatArray:
        """Sums over each run of a value per distinct unit; infinite where there is no run."""
        values = np.array(per_cost, dtype=np.float64)[self._kind]
        total = np.concatenate([[0.0], np.cumsum(values)])
        found: FloatArray = total[self.runs.last] - total[self.runs.first]
        return found if self._every_valid else np.where(self.valid, found, np.inf)

    def maxima(self, per_cost: Sequence[float] | FloatArray) -> FloatArray:
        """Maxima over each run of a value per distinct unit."""
        values = np.array(per_cost, dtype=np.float64)[self._kind]
        found = np.zeros(self.valid.shape)
        # Runs double in length: the maximum over a run is that over two overlapping powers of two.
        power, reach = values, 1
        for here, a, b in self.runs.halves:
            found[here] = np.maximum(power[a], power[b])
            power, reach = np.maximum(power[:-reach], power[reach:]), 2 * reach
        return found

    def seconds(self, mode: int) -> FloatArray:
        """Seconds of one microbatch for each stage in a mode, without ZeRO's exchange."""
        key = ("seconds", mode, self.setting.size)
        if key not in self.cache:
            self.cache[key] = self._seconds(mode)
        return self.cache[key]

    def _seconds(self, mode: int) -> FloatArray:
        overhead = self.table.mode_overhead_s(mode) * (2 if self.table.training else 1)
        return self.ranges(self._both_s(self.setting.size)[:, mode]) + overhead

    def seconds_in(self, modes: Sequence[int]) -> FloatArray:
        """[range, mode]: `seconds` of several modes."""
        each = np.array([self.table.mode_overhead_s(m) for m in modes])
        whole = self._sums(self._both_s(self.setting.size)[:, list(modes)])
        found: FloatArray = whole + each * (2 if self.table.training else 1)
        return found

    def sample_seconds_in(self, modes: Sequence[int]) -> FloatArray:
        """[range, mode]: what a microbatch with one sample more takes longer than a smaller one."""
        small = self.setting.samples // self.setting.microbatches
        return self._sums((self._both_s(small + 1) - self._both_s(small))[:, list(modes)])

    def _sums(self, per_cost: FloatArray) -> FloatArray:
        """[range, column]: `ranges` of every column, in one dimension."""
        total = np.cumsum(per_cost[self._kind], axis=0)
        total = np.concatenate([np.zeros((1, total.shape[1])), total])
        found: FloatArray = total[self.runs.last] - total[self.runs.first]
        return found

    def _both_s(self, size: float) -> FloatArray:
        """[distinct unit, mode]: `times_s`, known for each size."""
        key = ("both", size)
        if key not in self.cache:
            self.cache[key] = times_s(self.table, size)
        return self.cache[key]

    def mode_seconds(self, modes: Sequence[int]) -> FloatArray:
        """[unit, mode]: seconds of one microbatch of each unit alone, without overhead."""
        found: FloatArray = self._both_s(self.setting.size)[self._kind][:, list(modes)]
        return found

    def sample_seconds(self, mode: int) -> FloatArray:
        """What a microbatch with one sample more takes longer than one of the smaller size."""
        small = self.setting.samples // self.setting.microbatches
        key = ("sample", mode, small)
        if key not in self.cache:
            more = self._both_s(small + 1)[:, mode] - self._both_s(small)[:, mode]
            self.cache[key] = self.ranges(more)
        return self.cache[key]

    def most_bytes(self, mode: int, name: str) -> FloatArray:
        """Gradients or weights of each stage, on the member that holds most of them.

        One array for all modes that hold the same.
        """
        key = ("most", mode, name)
        if key not in self.cache:
            held = tuple(getattr(c, name) for c in self.table.every_mode[mode].costs)
            if ("most", held) not in self.cache:
                parts = [self.ranges([own[i] for own in held]) for i in range(len(held[0]))]
                self.cache[("most", held)] = np.maximum.reduce(parts)
            self.cache[key] = self.cache[("most", held)]
        return self.cache[key]

    def optimizer_seconds(self, mode: int) -> FloatArray:
        """The optimiser's time of each stage. One array for all modes that take as long."""
        key = ("optimizer", mode)
        if key not in self.cache:
            taken = tuple(c.optimizer_s for c in self.table.every_mode[mode].costs)
            if ("optimizer", taken) not in self.cache:
                self.cache[("optimizer", taken)] = self.ranges(list(taken))
            self.cache[key] = self.cache[("optimizer", taken)]
        return self.cache[key]

    def most_in_flight(self, mode: int, width: int) -> FloatArray:
        """The most microbatches whose saved values fit for each stage on `width` replicas, or -1."""
        found: FloatArray = self.in_flight_by_width(mode, [width])[0]
        return found

    def in_flight_by_width(self, mode: int, widths: Sequence[int]) -> FloatArray:
        """`most_in_flight` for several numbers of replicas: [width, range]."""
        chosen = self.table.every_mode[mode]
        key = ("flight", mode, self._largest, *(widths if chosen.zero else (len(widths),)))
        if key not in self.cache:
            found = self.most_by_width(mode, widths)
            self.cache[key] = found if chosen.zero else np.repeat(found, len(widths), axis=0)
        return self.cache[key]

    def most_by_width(self, mode: int, widths: Sequence[int]) -> FloatArray:
        """The same worked out anew, in one row for all widths where nothing is divided."""
        chosen = self.table.every_mode[mode]
        some = tuple(widths) if chosen.zero else (1,)
        parts = []
        for member, device_class in unlike_members(chosen):
            free = self.free_bytes(chosen, mode, member, self.table.device_classes[device_class], some)
            working = self.working_bytes(chosen, member, some)
            parts.append(self._flights(free - working, self.saved_bytes(chosen, member)))
        return parts[0] if len(parts) == 1 else np.minimum.reduce(parts)

    @property
    def _largest(self) -> int:
        """Samples of the largest microbatch."""
        return -(-self.setting.samples // self.setting.microbatches)

    def free_bytes(
        self, chosen: Mode, mode: int, member: int, device_class: DeviceClass, widths: tuple[int, ...]
    ) -> FloatArray:
        """[width, range]: bytes for microbatches and temporaries; -inf where the update does not fit."""
        key = ("free", mode, member, widths)
        if key in self.cache:
            return self.cache[key]
        table = self.table
        # What ZeRO divides, at its first level 1, 2 and 3.
        names = ("optimizer_bytes", "gradient_bytes", "weight_bytes")
        held = [self._held(chosen, member, name) for name in names]
        wide = np.array(widths, dtype=np.float64)[:, None]
        fixed = sum(b / (wide if chosen.zero > level else 1) for level, b in enumerate(held))
        free = device_class.memory_bytes * (1 + MEMORY_TOLERANCE) - fixed - table.reserved_bytes
        shares = np.array([[device_class.update_per_gradient(chosen.zero, n)] for n in widths])
        if table.training and shares.any():
            free = np.where((shares > 0) & (shares * held[1] > free), -np.inf, free)
        found = self.cache[key] = np.atleast_2d(free)
        return found

    def working_bytes(self, chosen: Mode, member: int, widths: tuple[int, ...]) -> FloatArray:
        """[width, range] or [range]: the largest temporary; wholes are some from ZeRO level 2 on."""
        alone = self._at_largest(chosen, member, "working_bytes")
        names = [n for at, n in ((2, "gradient_bytes"), (3, "weight_bytes")) if chosen.zero >= at]
        single = self._maxima_of(alone)
        if not names or max(widths) < 2:
            return single
        whole = sum(np.array([getattr(c, name)[member] for c in chosen.costs]) for name in names)
        divided = self._maxima_of(alone + whole)
        wide = np.array(widths)[:, None] > 1
        if wide.all():
            return divided
        # What has such a number is kept in the cache, so that no other array gets it.
        key = ("by width", id(divided), id(single), widths)
        if key not in self.cache:
            self.cache[key] = np.where(wide, divided, single)
        return self.cache[key]

    def saved_bytes(self, chosen: Mode, member: int) -> FloatArray:
        """[range]: what one of the largest microbatches keeps."""
        row = self._at_largest(chosen, member, "saved_bytes")
        return self._alike("saved", row, self.ranges)

    def _maxima_of(self, row: FloatArray) -> FloatArray:
        return self._alike("largest", row, self.maxima)

    def _alike(self, name: str, row: FloatArray, make: Callable[[FloatArray], FloatArray]) -> FloatArray:
        """What is made of a row, once for all rows that are equal, as those of many devices are."""
        key = (name, row.tobytes())
        if key not in self.cache:
            self.cache[key] = make(row)
        return self.cache[key]

    def _at_largest(self, chosen: Mode, member: int, name: str) -> FloatArray:
        """[distinct unit]: bytes of a kind in a microbatch of the largest size."""
        return np.array(at_size(self.table, self._rows(chosen, member, name), self._largest))

    def _held(self, chosen: Mode, member: int, name: str) -> FloatArray:
        """Bytes of a kind that each run takes of a member."""
        key = ("held", chosen.key, member, name)
        if key not in self.cache:
            own = self.ranges([getattr(c, name)[member] for c in chosen.costs])
            self.cache[key] = own + self._repeated(name)
        return self.cache[key]

    def _rows(self, chosen: Mode, member: int, name: str) -> FloatArray:
        """[size, distinct unit]: bytes of a kind on a member."""
        key = ("rows", chosen.key, member, name)
        if key not in self.cache:
            self.cache[key] = np.array([getattr(c, name)[member] for c in chosen.costs]).T
        return self.cache[key]

    def _repeated(self, name: str) -> FloatArray:
        """Bytes of a kind that each run holds of weights which an earlier unit counts."""
        found = np.zeros(self.valid.shape)
        first, last = self.runs.first, self.runs.last
        for again in self.table.repeated:
            units = np.array(again.again)
            reads = np.searchsorted(units, first) < np.searchsorted(units, last)
            found += np.where((again.first < first) & reads, getattr(again, name), 0.0)
        return found

    def _flights(self, free: FloatArray, saved: FloatArray) -> FloatArray:
        if not self.table.training:
            return np.where(free >= 0, UNLIMITED, -1.0)
        with np.errstate(divide="ignore", invalid="ignore"):
            most = np.where(saved > 0, np.floor(free / saved), UNLIMITED)
        return np.where(self.valid & (free >= 0), np.minimum(most, UNLIMITED), -1.0)


def unlike_members(mode: Mode) -> list[tuple[int, int]]:
    """Numbers and classes of members that differ in class or bytes; one stands for its likes."""
    if len(mode.members) == 1:
        return [(0, mode.members[0])]
    found: dict[object, tuple[int, int]] = {}
    for i, k in enumerate(mode.members):
        held = tuple(
            (
                c.weight_bytes[i],
                c.gradient_bytes[i],
                c.optimizer_bytes[i],
                c.saved_bytes[i],
                c.working_bytes[i],
            )
            for c in mode.costs
        )
        found.setdefault((k, held), (i, k))
    return list(found.values())


def memory_never_binds(
    table: CostTable, setting: Setting, classes: Sequence[int], cache: Cache | None = None
) -> bool:
    """Whether devices of these classes could hold all units with all microbatches in flight.

    In every mode, so that memory limits no stage whatsoever. The cache is of other settings of the table.
    """
    whole = UnitArrays(table, setting, some_ranges([(0, table.num_units)]), cache)
    usable = [i for i, m in enumerate(table.every_mode) if set(m.members) <= set(classes)]
    # ZeRO divides among two or more; with two each holds most.
    return all(
        whole.most_in_flight(m, 2 if table.every_mode[m].zero else 1)[0] >= setting.microbatches
        for m in usable
    )
