"""Lower bounds on the step time that need no search."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from graphpar.cost import CostTable
from graphpar.partition.cells import Links
from graphpar.partition.unit_arrays import FloatArray

_ROUNDS = 60


@dataclass(frozen=True)
class WorkBound:
    """Work over speed at one microbatch size, for any set of devices given by counts per class.

    The fractional assignment of units to devices that finishes soonest is a linear programme; every
    choice of prices mu on the devices' time bounds it from below:

        time >= m * sum over units of min over classes (mu_c * t_uc) / sum over classes N_c mu_c
    """

    times_s: FloatArray
    """[distinct unit, class]: seconds of one microbatch."""
    repeats: FloatArray
    """How often each distinct unit occurs in the chain."""

    def seconds(self, counts: Sequence[int]) -> float:
        """A lower bound on the time the given devices need for one microbatch of work."""
        number = np.array(counts, dtype=np.float64)
        used = number > 0
        times, number = self.times_s[:, used], number[used]
        whole = self.repeats @ times
        if not used.any() or whole.min() <= 0:
            return 0.0
        prices = 1 / whole
        best = 0.0
        for step in range(_ROUNDS if len(number) > 1 else 1):
            value, load = self._dual(times, number, prices)
            best = max(best, value)
            # Devices that attract more than their share of the work are priced up.
            prices = prices * np.exp((load - 1) / (2 + step))
        return best

    def _dual(
        self, times: FloatArray, number: FloatArray, prices: FloatArray
    ) -> tuple[float, FloatArray]:
        priced = times * prices
        cheapest = priced.argmin(axis=1)
        value = float(self.repeats @ priced.min(axis=1)) / float(number @ prices)
        load = np.zeros(len(number))
        work = self.repeats * times[np.arange(len(times)), cheapest]
        np.add.at(load, cheapest, work)
        busy = load / number
        mean = float(busy.mean())
        return value, np.clip(busy / mean, 0.0, 2.0) if mean > 0 else np.ones(len(number))

    def fastest_pass_s(self, counts: Sequence[int]) -> float:
        """Seconds of one microbatch with every unit on the class that is fastest for it."""
        used = np.array(counts) > 0
        return float(self.repeats @ self.times_s[:, used].min(axis=1)) if used.any() else 0.0


_EXPONENTS = (0.0, 0.4, 0.7, 1.0, 1.3, 1.7, 2.2, 3.0)


def chain_bound_s(bound: WorkBound, counts: Sequence[int], takes: FloatArray, microbatches: int) -> float:
    """A lower bound on the time (fill and extra) of one pipeline.

    Args:
        bound: Seconds per microbatch of the distinct units.
        counts: Devices per class.
        takes: [option, class]: devices of each class that a stage may have.
        microbatches: How many microbatches pass through.

    Every replica r of a stage has `(m_r - 1) t_r <= extra`. Added up over all devices with prices
    mu_r that sum to one, and put into `fill + extra`, a unit u on replicas R costs at least

        max_R t_ur + sum_R mu_r (m_r - 1) t_ur
            >= max_R t_ur (1 - sum_R mu_r) + m min_R mu_r t_ur

    and the bound is the sum over units of the least of these over all stage options, for any prices;
    those tried fall with a class's time by several exponents.
    """
    number = np.array(counts, dtype=np.float64)
    used = number > 0
    times, number, takes = bound.times_s[:, used], number[used], takes[:, used]
    whole = bound.repeats @ times
    if not used.any() or whole.min() <= 0 or len(takes) == 0:
        return 0.0
    chosen = takes > 0
    longest = np.where(chosen[:, None], times[None], 0.0).max(axis=2)
    best = 0.0
    for exponent in _EXPONENTS:
        prices = (whole.min() / whole) ** exponent
        prices = prices / (number @ prices)
        cheapest = np.where(chosen[:, None], (times * prices)[None], np.inf).min(axis=2)
        free = np.maximum(1 - takes @ prices, 0.0)
        each = longest * free[:, None] + microbatches * cheapest
        best = max(best, float(bound.repeats @ each.min(axis=0)))
    return best


def work_bound(table: CostTable, size: float) -> WorkBound:
    """The bound at one microbatch size."""
    return WorkBound(_times(table, size), _repeats(table))


def sample_bound(table: CostTable) -> WorkBound:
    """The bound per sample, each unit at its most efficient microbatch size on each class.

    Times are linear between tabulated sizes, hence seconds per sample are least at one of those.
    """
    sizes = table.sizes if table.max_microbatches > 1 else (table.batch,)
    work = np.stack([_times(table, s) / s for s in sizes]).min(axis=0)
    return WorkBound(work, _repeats(table))


def least_post_s(table: CostTable, counts: Sequence[int], peers: int, across: Links) -> float:
    """A lower bound on the largest post of a pipeline on some devices (counts per class)."""
    used = [k for k, n in enumerate(counts) if n]
    if not table.training or not used:
        return 0.0
    optimizer = np.array([[c.optimizer_s[k] for k in used] for c in table.costs]).min(axis=1)
    gradients = np.array([c.gradient_bytes for c in table.costs])
    slow = max((1 / k.bytes_per_s for k in across), default=0.0)
    each = optimizer + 2 * (peers - 1) / peers * slow * gradients
    return float(_repeats(table) @ each) / sum(counts)


def physical_bound_s(table: CostTable) -> float:
    """A lower bound on the step time of any plan, of whatever kind, under a table.

    The larger of two: all work, each unit at its most efficient microbatch size and on fractional
    devices, over all devices, the optimiser's work of one copy included; and one sample passing
    through all units, each on its fastest class.
    """
    numbers = [len(c.devices) for c in table.device_classes]
    work = sample_bound(table).times_s * table.batch
    if table.training:
        work = work + np.array([c.optimizer_s for c in table.costs])
    whole = WorkBound(work, _repeats(table)).seconds(numbers)
    sizes = table.sizes if table.max_microbatches > 1 else (table.batch,)
    single = np.stack([_times(table, s) for s in sizes]).min(axis=0)
    return max(whole, WorkBound(single, _repeats(table)).fastest_pass_s(numbers))


def _times(table: CostTable, size: float) -> FloatArray:
    classes = range(len(table.device_classes))
    return np.array(
        [
            [
                table.at_size(c.forward_s[k], size)
                + (table.at_size(c.backward_s[k], size) if table.training else 0.0)
                for k in classes
            ]
            for c in table.costs
        ]
    )


def _repeats(table: CostTable) -> FloatArray:
    return np.bincount(np.array(table.units), minlength=len(table.costs)).astype(np.float64)
