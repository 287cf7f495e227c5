"""A lower bound on the step of any plan, whatever its stages, replicas and order of work."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from graphpar.cost import CostTable
from graphpar.partition.bounds import (
    WorkBound,
    distinct,
    find_teams,
    repeats_of,
    sample_bound,
    sizes_of_parts,
)
from graphpar.partition.unit_arrays import BoolArray, FloatArray, times_s

_WEIGHTS = np.geomspace(0.02, 4.0, 24)
"""Prices of the samples' time together, over those of the devices' time, that are tried."""


def physical_bound_s(table: CostTable) -> float:
    """A lower bound on the step time of any plan, of whatever kind, under a table.

    Devices work for no longer than the step T each, and no sample is longer on its way than T: forward
    and backward of units that need each other's results come one after another, while gradients of
    weights may wait. For any prices mu on the devices' time and lambda on the samples'

        T (sum over devices of mu + lambda batch) >= sum over samples and units of the least, over modes
            and microbatch sizes s, of mu t(s) / s + lambda p(s)

    where t is a unit's time for a microbatch and p the part of it that others wait for. Large
    microbatches are efficient but long on their way. The optimiser's work of one copy is added to the
    work; with lambda = 0 the bound is work over speed, without mu the fastest way of a single sample.
    Replicas under ZeRO divide the optimiser's work otherwise than the samples, so there the least of
    either counts for itself.
    """
    return PhysicalBound(table).seconds([len(c.devices) for c in table.device_classes])


@dataclass(frozen=True)
class TimePrices:
    """Prices that bound the step of any number of devices: `T >= work_s / (counts @ device + sample)`.

    `device` is per device of each class, `sample` of all samples of the batch together.
    """

    work_s: float
    device: FloatArray
    sample: float


class PhysicalBound:
    """The bound of `physical_bound_s` for one table and any number of devices of its classes."""

    def __init__(self, table: CostTable) -> None:
        self._table = table
        self._teams, per_sample = find_teams(table), sample_bound(table)
        self._step = _optimizer_s(table)
        self._divided = np.array([m.zero > 0 for m in table.every_mode])
        work = per_sample.times_s * table.batch
        if len(set(self._teams.of_mode[self._divided].tolist())) <= 1:
            work = work + self._teams.least(self._step)
        self._whole = WorkBound(work, repeats_of(table), self._teams)
        self._repeats, self._rows = repeats_of(table), _Rows.of(table)

    def seconds(self, counts: Sequence[int]) -> float:
        """The bound for so many devices of each class."""
        return self._best(counts)[0]

    def prices(self, counts: Sequence[int]) -> tuple[float, TimePrices]:
        """The bound, and the prices that give it or nearly so, to bound other numbers of devices by.

        Of classes that are not among them a device costs so much that it never is the cheapest.
        """
        number = np.array(counts, dtype=np.float64)
        best, device, weight = self._best(counts)
        missing, every = number <= 0, np.ones(len(self._divided), dtype=np.bool_)
        if missing.any() and device.any():
            times = self._whole.times_s[:, : len(number)]
            least = (times[:, ~missing] * device[~missing]).min(axis=1)
            device = device.copy()
            device[missing] = (least[:, None] / np.maximum(times[:, missing], 1e-300)).max(axis=0)
        (work_s,) = self._work_s(device, every, [weight])
        return best, TimePrices(work_s, device, weight * self._table.batch)

    def _best(self, counts: Sequence[int]) -> tuple[float, FloatArray, float]:
        """The bound, and the prices of the devices and of a sample that give it."""
        numbers = np.array(counts, dtype=np.float64)
        best, prices = self._whole.prices(counts)
        usable = self._teams.within(numbers)[self._teams.of_mode]
        if not usable.any():
            return best, prices, 0.0
        path = self._rows.path[..., usable].min(axis=(0, 2))
        best = max(best, float(_waiting(self._table, path) @ path))
        device_s, batch = float(numbers @ prices), self._table.batch
        if device_s <= 0:
            return best, prices, 0.0
        weights = [0.0, *(float(weight) for weight in _WEIGHTS * device_s / batch)]
        works = self._work_s(prices, usable, weights)
        values = [w / (device_s + weight * batch) for w, weight in zip(works, weights, strict=True)]
        number = int(np.argmax(values))
        return max(best, values[number]), prices, weights[number]

    def _work_s(self, prices: FloatArray, usable: BoolArray, weights: Sequence[float]) -> list[float]:
        """What all work costs at least, by the price of a sample's time, at prices of the devices'."""
        rows, batch = self._rows.among(usable), self._table.batch
        waiting = _waiting(self._table, rows.path.min(axis=(0, 2)))
        others = self._repeats - waiting
        mode_prices = (self._teams.members @ prices)[self._teams.of_mode][usable]
        update, divided = mode_prices * self._step[:, usable], self._divided[usable]
        free = _cheapest(batch * rows.least(mode_prices, 0.0), update, divided)
        found = []
        for weight in weights:
            each = _cheapest(batch * rows.least(mode_prices, weight), update, divided) if weight else free
            found.append(float(waiting @ each + others @ free))
        return found


def _cheapest(work: FloatArray, update: FloatArray, divided: BoolArray) -> FloatArray:
    """[distinct unit]: the least of work and update over modes, which those under ZeRO may mix."""
    least: FloatArray = (work + update)[:, ~divided].min(axis=1, initial=np.inf)
    if divided.any():
        mixed = work[:, divided].min(axis=1) + update[:, divided].min(axis=1)
        least = np.minimum(least, mixed)
    return least


def _optimizer_s(table: CostTable) -> FloatArray:
    """[distinct unit, mode]: seconds of the optimiser, nothing in inference."""
    rows = [[m.costs[i].optimizer_s * table.training for m in table.every_mode] for i in distinct(table)]
    return np.array(rows, dtype=np.float64)


@dataclass(frozen=True)
class _Rows:
    """Times at the microbatch sizes at which they bend; between those they are straight."""

    sizes: FloatArray
    time: FloatArray
    """[size, distinct unit, mode]: seconds of one microbatch."""
    path: FloatArray
    """Likewise, without what nothing waits for."""

    @staticmethod
    def of(table: CostTable) -> "_Rows":
        sizes = np.array(sizes_of_parts(table), dtype=np.float64)
        time = np.stack([times_s(table, s) for s in sizes])
        later = np.stack([_weight_s(table, s) for s in sizes])
        return _Rows(sizes, time, np.maximum(time - later, 0.0))

    def among(self, usable: BoolArray) -> "_Rows":
        """Those of some modes alone."""
        return replace(self, time=self.time[..., usable], path=self.path[..., usable])

    def least(self, prices: FloatArray, weight: float) -> FloatArray:
        """[distinct unit, mode]: the least of `prices * time / size + weight * path` over all sizes.

        On a straight piece it is `a / s + b + c s`: least at an end, or at the root of a / c.
        """
        ends = prices * self.time / self.sizes[:, None, None] + weight * self.path
        found: FloatArray = ends.min(axis=0)
        if len(self.sizes) == 1 or weight == 0:
            return found
        left, right = self.sizes[:-1, None, None], self.sizes[1:, None, None]
        rise = prices * np.diff(self.time, axis=0) / (right - left)
        fixed = prices * self.time[:-1] - rise * left
        climb = weight * np.diff(self.path, axis=0) / (right - left)
        inner = np.sqrt(np.maximum(fixed, 0) / np.maximum(climb, 1e-300)).clip(left, right)
        between = fixed / inner + rise + weight * self.path[:-1] + climb * (inner - left)
        least: FloatArray = np.minimum(found, between.min(axis=0))
        return least


def _weight_s(table: CostTable, size: float) -> FloatArray:
    """[distinct unit, mode]: seconds of one microbatch for gradients of weights, which may come later."""
    if not table.training:
        return np.zeros((len(table.costs), len(table.every_mode)))
    rows = [[m.costs[i].weight_s for m in table.every_mode] for i in distinct(table)]
    return np.array([[table.at_size(row, size) if row else 0.0 for row in line] for line in rows])


def _waiting(table: CostTable, path_s: FloatArray) -> FloatArray:
    """[distinct unit]: how often each occurs on the longest way through units that need each other.

    Where an edge has no gradient only forwards wait for each other; such edges are left out.
    """
    before: dict[int, list[int]] = {}
    for edge in table.edges:
        back = edge.gradient_bytes_per_sample + edge.gradient_fixed_bytes
        if not table.training or back > 0:
            before.setdefault(edge.target, []).append(edge.source)
    ends_s: list[float] = []
    came_from: list[int | None] = []
    for unit, number in enumerate(table.units):
        source = max(before.get(unit, ()), key=ends_s.__getitem__, default=None)
        ends_s.append(float(path_s[number]) + (ends_s[source] if source is not None else 0.0))
        came_from.append(source)
    found = np.zeros(len(table.costs))
    at: int | None = int(np.argmax(ends_s)) if ends_s else None
    while at is not None:
        found[table.units[at]] += 1
        at = came_from[at]
    return found
