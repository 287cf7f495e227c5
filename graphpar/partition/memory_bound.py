"""A lower bound on the time of one pipeline that knows what its replicas hold together.

`bounds.chain_bound_s` lets every unit run on the set of replicas that suits it best; where memory is
scarce not all of them can be as many. Each replica holds the units of its stage, and while it trains what
one microbatch of them keeps; all replicas together hold no more than the devices have:

    sum over units of held(u, replicas of u) <= room

With a price on bytes this joins the bound: for any price >= 0

    time >= sum over units of min over stage options (seconds + price * held) - price * room

which is concave in the price. What ZeRO divides among replicas is left out of what they hold.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from graphpar.cost import CostTable
from graphpar.partition.bounds import WorkBound, find_teams
from graphpar.partition.unit_arrays import MEMORY_TOLERANCE, FloatArray

_EXPONENTS = (0.0, 0.7, 1.0, 1.7)
"""Prices on devices' time that are tried fall with a class's time by these."""

_NARROWINGS = 24
"""Times that the interval of prices on bytes is narrowed to 62 %."""

_GOLDEN = (5**0.5 - 1) / 2


def held_bytes(table: CostTable, size: float) -> FloatArray:
    """[distinct unit, team]: the least that a replica of a team holds of a unit, its members together."""
    rows = np.zeros((len(table.costs), len(table.every_mode)))
    for number, mode in enumerate(table.every_mode):
        for unit, cost in enumerate(mode.costs):
            kept = [*cost.weight_bytes] * (mode.zero < 3) + [*cost.gradient_bytes] * (mode.zero < 2)
            kept += [*cost.optimizer_bytes] * (mode.zero < 1)
            if table.training:
                kept += [table.at_size(row, size) for row in cost.saved_bytes]
            rows[unit, number] = sum(kept)
    return find_teams(table).least(rows)


def room_bytes(table: CostTable, counts: Sequence[int]) -> float:
    """What devices, given by counts per class, have for units together."""
    room = sum(
        n * max(0.0, c.memory_bytes - table.reserved_bytes)
        for n, c in zip(counts, table.device_classes, strict=True)
    )
    return room * (1 + MEMORY_TOLERANCE)


def held_bound_s(
    bound: WorkBound,
    held: FloatArray,
    room: float,
    counts: Sequence[int],
    takes: FloatArray,
    microbatches: int,
) -> float:
    """A lower bound on the time (fill and extra) of one pipeline; infinite where its units do not fit.

    Args:
        bound: Seconds per microbatch of the distinct units.
        held: [distinct unit, team], of `held_bytes`.
        room: Of `room_bytes`.
        counts: Devices per class.
        takes: [option, team]: replicas of each team that a stage may have.
        microbatches: How many microbatches pass through.
    """
    number = np.array(counts, dtype=np.float64)
    if not number.any() or len(takes) == 0:
        return 0.0
    holding = takes @ held.T
    if float(bound.repeats @ holding.min(axis=0)) > room:
        return float("inf")
    return max(
        (
            _best(each, holding, bound.repeats, room)
            for each in _seconds(bound, number, takes, microbatches)
        ),
        default=0.0,
    )


def _seconds(
    bound: WorkBound, number: FloatArray, takes: FloatArray, microbatches: int
) -> Iterator[FloatArray]:
    """[option, distinct unit]: seconds of the bound without memory, at several prices of time."""
    used = number > 0
    whole = (bound.repeats @ bound.times_s[:, : len(number)])[used]
    if whole.min() <= 0:
        return
    chosen = takes > 0
    longest = np.where(chosen[:, None], bound.times_s[None], 0.0).max(axis=2)
    for exponent in _EXPONENTS if len(whole) > 1 else _EXPONENTS[:1]:
        prices = np.zeros(len(number))
        prices[used] = (whole.min() / whole) ** exponent
        prices = bound.teams.members @ (prices / (number @ prices))
        cheapest = np.where(chosen[:, None], (bound.times_s * prices)[None], np.inf).min(axis=2)
        free = np.maximum(1 - takes @ prices, 0.0)
        yield longest * free[:, None] + microbatches * cheapest


def _best(each: FloatArray, holding: FloatArray, repeats: FloatArray, room: float) -> float:
    """The bound at the best price of a byte: every price gives one, and it is concave in the price."""

    def at(price: float) -> float:
        return float(repeats @ (each + price * holding).min(axis=0)) - price * room

    positive = holding[holding > 0]
    if room <= 0 or not positive.size:
        return at(0.0)
    low, high = 0.0, float(each.max() / positive.min())
    for _ in range(_NARROWINGS):
        left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
        low, high = (left, high) if at(left) < at(right) else (low, right)
    return max(at(0.0), at(low), at(high))
