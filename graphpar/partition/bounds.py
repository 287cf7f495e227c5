"""Lower bounds on the step time that need no search."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from graphpar.cost import CostTable
from graphpar.partition.cells import Links
from graphpar.partition.unit_arrays import FloatArray, IntArray, times_s

_ROUNDS = 60
_ROUNDS_FROM_KNOWN = 4
"""So many steps where prices begin near the best, and small ones, as if so many had gone before."""


@dataclass(frozen=True)
class Teams:
    """The distinct sets of members that modes have, as counts per class; plain devices first.

    Only the members matter to a bound on work: of the modes that share them the fastest counts.
    """

    members: FloatArray
    """[team, class]: members of each class."""
    of_mode: IntArray
    """[mode]: its team."""

    def least(self, per_mode: FloatArray) -> FloatArray:
        """[..., mode] to [..., team]: the least over the modes of each team."""
        columns = [per_mode[..., self.of_mode == i].min(axis=-1) for i in range(len(self.members))]
        return np.stack(columns, axis=-1)

    def within(self, counts: FloatArray) -> npt.NDArray[np.bool_]:
        """[team]: whether the devices, given by counts per class, suffice for one."""
        found: npt.NDArray[np.bool_] = np.logical_and.reduce(self.members <= counts, axis=1)
        return found


def find_teams(table: CostTable) -> Teams:
    """The teams of a table."""
    numbers: dict[tuple[int, ...], int] = {}
    of_mode = [numbers.setdefault(tuple(sorted(m.members)), len(numbers)) for m in table.every_mode]
    members = np.zeros((len(numbers), len(table.device_classes)))
    for team, number in numbers.items():
        for device_class in team:
            members[number, device_class] += 1
    return Teams(members, np.array(of_mode, dtype=np.intp))


@dataclass(frozen=True)
class WorkBound:
    """Work over speed at one microbatch size, for any set of devices given by counts per class.

    The fractional assignment of units to devices (or groups of them) that finishes soonest is a linear
    programme; every choice of prices mu on the devices' time bounds it from below:

        time >= m * sum over units of min over teams (mu_team * t_u,team) / sum over classes N_c mu_c

    where the price of a team is that of its members together.
    """

    times_s: FloatArray
    """[distinct unit, team]: seconds of one microbatch."""
    repeats: FloatArray
    """How often each distinct unit occurs in the chain."""
    teams: Teams

    def seconds(self, counts: Sequence[int], known: FloatArray | None = None) -> float:
        """A lower bound on the time the given devices need for one microbatch of work."""
        return self.prices(counts, known)[0]

    def prices(self, counts: Sequence[int], known: FloatArray | None = None) -> tuple[float, FloatArray]:
        """The bound and the prices on the devices' time, per class, that give it.

        Prices `known` from another microbatch size save most of the steps.
        """
        number = np.array(counts, dtype=np.float64)
        used = self.teams.within(number)
        times, members = self.times_s[:, used], self.teams.members[used]
        whole = self._whole(number)
        if not used.any() or whole[number > 0].min() <= 0:
            return 0.0, np.zeros(len(number))
        first, steps = np.where(number > 0, 1 / np.where(whole > 0, whole, 1.0), 0.0), range(_ROUNDS)
        if known is not None and known.any():
            first, steps = known, range(_ROUNDS, _ROUNDS + _ROUNDS_FROM_KNOWN)
        prices = first
        best, best_prices = 0.0, prices
        for step in steps if len(times[0]) > 1 else steps[:1]:
            value, load = self._dual(times, members, number, prices)
            if value > best:
                best, best_prices = value, prices
            # Devices that attract more than their share of the work are priced up.
            prices = prices * np.exp((load - 1) / (2 + step))
        return best, best_prices

    def _whole(self, number: FloatArray) -> FloatArray:
        """[class]: seconds of the whole chain on one device of each class."""
        found: FloatArray = self.repeats @ self.times_s[:, : len(number)]
        return found

    def _dual(
        self, times: FloatArray, members: FloatArray, number: FloatArray, prices: FloatArray
    ) -> tuple[float, FloatArray]:
        priced = times * (members @ prices)
        cheapest = priced.argmin(axis=1)
        value = float(self.repeats @ priced.min(axis=1)) / float(number @ prices)
        work = self.repeats * times[np.arange(len(times)), cheapest]
        load = work @ members[cheapest]
        busy = np.where(number > 0, load / np.maximum(number, 1), 0.0)
        mean = float(busy[number > 0].mean())
        return value, np.clip(busy / mean, 0.0, 2.0) if mean > 0 else np.ones(len(number))

    def fastest_pass_s(self, counts: Sequence[int]) -> float:
        """Seconds of one microbatch with every unit on the team that is fastest for it."""
        used = self.teams.within(np.array(counts, dtype=np.float64))
        return float(self.repeats @ self.times_s[:, used].min(axis=1)) if used.any() else 0.0


_EXPONENTS = (0.0, 0.4, 0.7, 1.0, 1.3, 1.7, 2.2, 3.0)


def chain_bound_s(bound: WorkBound, counts: Sequence[int], takes: FloatArray, microbatches: int) -> float:
    """A lower bound on the time (fill and extra) of one pipeline.

    Args:
        bound: Seconds per microbatch of the distinct units.
        counts: Devices per class.
        takes: [option, team]: replicas of each team that a stage may have.
        microbatches: How many microbatches pass through.

    Every replica r of a stage has `(m_r - 1) t_r <= extra`. Added up over all devices with prices
    that sum to one (a replica's mu_r is that of its members together), and put into `fill + extra`, a
    unit u on replicas R costs at least

        max_R t_ur + sum_R mu_r (m_r - 1) t_ur
            >= max_R t_ur (1 - sum_R mu_r) + m min_R mu_r t_ur

    and the bound is the sum over units of the least of these over all stage options, for any prices;
    those tried fall with a class's time by several exponents.
    """
    number = np.array(counts, dtype=np.float64)
    used = number > 0
    whole = (bound.repeats @ bound.times_s[:, : len(number)])[used]
    if not used.any() or whole.min() <= 0 or len(takes) == 0:
        return 0.0
    rows = [(np.flatnonzero(column > 0), i) for i, column in enumerate(takes.T) if column.any()]
    # Axes [distinct unit, option]; team by team, which are few.
    shape = len(bound.times_s), len(takes)
    longest = np.zeros(shape)
    for options, team in rows:
        longest[:, options] = np.maximum(longest[:, options], bound.times_s[:, team, None])
    best = 0.0
    for exponent in _EXPONENTS:
        prices = np.zeros(len(number))
        prices[used] = (whole.min() / whole) ** exponent
        prices = bound.teams.members @ (prices / (number @ prices))
        cheapest = np.full(shape, np.inf)
        for options, team in rows:
            priced = bound.times_s[:, team, None] * prices[team]
            cheapest[:, options] = np.minimum(cheapest[:, options], priced)
        free = np.maximum(1 - takes @ prices, 0.0)
        each = longest * free + microbatches * cheapest
        best = max(best, float(bound.repeats @ each.min(axis=1)))
    return best


def work_bound(table: CostTable, size: float) -> WorkBound:
    """The bound at one microbatch size."""
    teams = find_teams(table)
    return WorkBound(teams.least(times_s(table, size)), repeats_of(table), teams)


def sizes_of_parts(table: CostTable) -> tuple[int, ...]:
    """Those of the table's sizes that a microbatch can have."""
    whole = table.max_microbatches == 1 and table.max_replicas == 1
    return (table.batch,) if whole else table.sizes


def sample_bound(table: CostTable) -> WorkBound:
    """The bound per sample, each unit at its most efficient microbatch size on each class.

    Times are linear between tabulated sizes, hence seconds per sample are least at one of those.
    """
    work = np.stack([times_s(table, s) / s for s in sizes_of_parts(table)]).min(axis=0)
    teams = find_teams(table)
    return WorkBound(teams.least(work), repeats_of(table), teams)


def least_post_s(table: CostTable, counts: Sequence[int], peers: int, across: Sequence[Links]) -> float:
    """A lower bound on the largest post of a pipeline on some devices (counts per class).

    ZeRO divides the optimiser's work but somebody does each part, hence the sum over the devices of
    one copy is that of its members.
    """
    have = np.array(counts) > 0
    steps, gradients = table.post_work
    usable = [i for i, m in enumerate(table.every_mode) if all(have[k] for k in m.members)]
    if not table.training or not usable:
        return 0.0
    slow = min((max((1 / k.bytes_per_s for k in links), default=0.0) for links in across), default=0.0)
    weight = 2 * (peers - 1) / peers * slow
    each = (steps + weight * gradients)[usable].min(axis=0)
    return float(repeats_of(table) @ each) / sum(counts)


def device_prices_s(table: CostTable) -> list[float]:
    """What one more device of each class takes off the bound on work: its dual values.

    The bound is `W / sum N_c mu_c` for the optimal prices mu, hence its derivative by N_c is
    `-bound * mu_c / sum N mu`.
    """
    numbers = [len(c.devices) for c in table.device_classes]
    bound, prices = sample_bound(table).prices(numbers)
    total = float(np.array(numbers, dtype=np.float64) @ prices)
    return [bound * table.batch * float(p) / total if total > 0 else 0.0 for p in prices]


def least_bytes(table: CostTable) -> float:
    """A lower bound on what one copy of all units takes on its devices together, whatever divides it."""
    each = [
        [sum(c.weight_bytes) + sum(c.gradient_bytes) + sum(c.optimizer_bytes) for c in m.costs]
        for m in table.every_mode
    ]
    return float(repeats_of(table) @ np.array(each).min(axis=0))


def distinct(table: CostTable) -> range:
    """Numbers of the distinct units."""
    return range(len(table.costs))


def repeats_of(table: CostTable) -> FloatArray:
    """[distinct unit]: how often each occurs in the chain."""
    return np.bincount(np.array(table.units), minlength=len(table.costs)).astype(np.float64)
