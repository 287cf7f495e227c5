"""Arrays of what the possible stages of one pipeline cost.

Index legend: `range` stands for one or two axes that number runs of units; entries that are no run
are infinite. An *arm* is a stage option together with the links
at its two boundaries; link kind 0 is the end of the pipeline, where nothing is sent.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from graphpar.cost import CostTable
from graphpar.partition.cells import Cells, Links, StageOption, links_between
from graphpar.partition.unit_arrays import (
    UNLIMITED,
    Cache,
    FloatArray,
    Ranges,
    Setting,
    UnitArrays,
    all_ranges,
)

BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class StageLimits:
    """Stages with more extra, more post or more of both together are left out.

    A pipeline with a fill of `fill_s` or more is of no interest, and one whose fill is `slack_s` above
    the least is good enough; a programme may make use of either, or not.
    """

    extra_s: float = float("inf")
    post_s: float = float("inf")
    both_s: float = float("inf")
    fill_s: float = float("inf")
    slack_s: float = 0.0


@dataclass(frozen=True)
class Arm:
    """A stage option between two kinds of links."""

    option: int
    link_before: int
    link_after: int


@dataclass(frozen=True, eq=False)
class StageCosts:
    """Costs of every stage of a pipeline.

    Attributes:
        options: The ways to staff a stage.
        arms: Options with the links around them.
        ranges: The runs of units priced.
        fill_s: [option, range]: seconds of one microbatch.
        before_s: [link kind, unit]: transfer over the boundary before a unit.
        extra_s: [arm, range]: what the further microbatches add if this stage is the busiest.
        post_s: [option, range]: gradient sync and optimiser.
        most_below: [option, range]: the most replicas from this stage to the pipeline's end
            for which memory holds, or -1.
    """

    setting: Setting
    options: tuple[StageOption, ...]
    arms: tuple[Arm, ...]
    link_kinds: tuple[Links, ...]
    ranges: "Ranges" = field(repr=False)
    fill_s: FloatArray = field(repr=False)
    before_s: FloatArray = field(repr=False)
    extra_s: FloatArray = field(repr=False)
    post_s: FloatArray = field(repr=False)
    most_below: FloatArray = field(repr=False)

    @cached_property
    def extras_s(self) -> FloatArray:
        """All values the busiest stage's extra can take, increasing."""
        return _values(self.extra_s)

    @cached_property
    def posts_s(self) -> FloatArray:
        """All values the largest post can take, increasing."""
        return _values(self.post_s)


def _values(array: FloatArray) -> FloatArray:
    found: FloatArray = np.unique(array[np.isfinite(array)])
    return found


def build_costs(
    table: CostTable,
    cells: Cells,
    options: Sequence[StageOption],
    setting: Setting,
    ranges: Ranges | None = None,
    cache: Cache | None = None,
) -> StageCosts:
    """Price the stages a pipeline in this setting can have: every run of units, or those given.

    Options with more replicas than microbatches are dropped: a replica without work is no replica.
    `cache` may be shared by calls for the same table and the same ranges.
    """
    kept = tuple(o for o in options if o.width <= setting.microbatches)
    units = UnitArrays(table, setting, ranges or all_ranges(table.num_units), cache)
    seconds = {m: units.seconds(m) for m in sorted({m for o in kept for m in o.staff})}
    flight = {
        key: units.most_in_flight(*key) for key in sorted({(m, o.width) for o in kept for m in o.staff})
    }
    kept, worse = _without_outdone(table, units, kept, setting, seconds, flight)
    kinds = _link_kinds(cells, kept)
    before = boundary_seconds(table, setting, kinds)
    arms = _arms(cells, kept, kinds)
    shape = units.valid.shape
    fill = np.empty((len(kept), *shape))
    extra = np.empty((len(arms), *shape))
    most_below = np.empty((len(kept), *shape))
    rows: dict[int, list[int]] = {}
    for number, arm in enumerate(arms):
        rows.setdefault(arm.option, []).append(number)
    for index, option in enumerate(kept):
        times = _replica_seconds(table, units, option, seconds)
        fill[index] = np.maximum.reduce(times)
        most_below[index] = np.inf
        for number in rows.get(index, ()):
            arm = arms[number]
            wait = _waiting(table, setting, before, arm, units)
            extra[number], own = _extra(times, wait, setting.microbatches)
            if not table.training or setting.schedule == "gpipe":
                cut = (setting.microbatches - 1) * before[arm.link_before][units.runs.first]
                extra[number] = np.maximum(extra[number], cut)
            extra[number][~units.valid] = np.inf
            most = [flight[m, option.width] for m in option.staff[: len(own)]]
            limits = _most_below(setting, own, most, option.width)
            most_below[index] = np.minimum(most_below[index], limits)
            if worse[index] is not None:
                extra[number][worse[index]] = np.inf
        if worse[index] is not None:
            fill[index][worse[index]] = np.inf
    post = np.stack([_cached_post(table, units, o, setting) for o in kept]) if kept else fill
    return StageCosts(setting, kept, arms, kinds, units.runs, fill, before, extra, post, most_below)


def _without_outdone(
    table: CostTable,
    units: UnitArrays,
    options: Sequence[StageOption],
    setting: Setting,
    seconds: dict[int, FloatArray],
    flight: dict[tuple[int, int], FloatArray],
) -> tuple[tuple[StageOption, ...], list[BoolArray | None]]:
    """Options without those that the same devices outdo in another mode; of the rest, where they do.

    Where every replica is no slower, the post no longer and the memory no tighter, neither fill nor
    fill and extra together are more, hence no plan is lost.
    """
    alike: dict[object, list[int]] = {}
    for number, option in enumerate(options):
        alike.setdefault(option.groups, []).append(number)
    look = _Outdone(table, units, options, setting, seconds, flight)
    worse: dict[int, BoolArray] = {}
    for group in alike.values():
        for i in group if len(group) > 1 else ():
            mask = ~units.valid
            for j in group:
                if i != j:
                    # Of two that are equal the first stays.
                    usable = ~worse[j] if j in worse else units.valid
                    mask = mask | (usable & look.by(i, j))
            worse[i] = mask
    kept = [i for i in range(len(options)) if i not in worse or not worse[i].all()]
    return tuple(options[i] for i in kept), [worse.get(i) for i in kept]


@dataclass(frozen=True, eq=False)
class _Outdone:
    """Compares two ways to run stages on the same devices."""

    table: CostTable
    units: UnitArrays
    options: Sequence[StageOption]
    setting: Setting
    seconds: dict[int, FloatArray]
    flight: dict[tuple[int, int], FloatArray]

    def by(self, one: int, other: int) -> BoolArray:
        """[range]: where the other is as good as the one in all respects."""
        mine, theirs = self.options[one], self.options[other]
        width, uniform = mine.width, len(set(mine.staff)) == len(set(theirs.staff)) == 1
        posts = [_cached_post(self.table, self.units, o, self.setting) for o in (mine, theirs)]
        found: BoolArray = posts[1] <= posts[0]
        times = [_replica_seconds(self.table, self.units, o, self.seconds) for o in (mine, theirs)]
        pairs = {(id(a), id(b)): (a, b) for a, b in zip(*times, strict=True)}
        for a, b in pairs.values():
            found = found & (b <= a)
        for m, n in set(zip(mine.staff, theirs.staff, strict=True)):
            room = self.flight[n, width]
            ample = room >= self.setting.microbatches
            found = found & (ample | (room >= self.flight[m, width]) if uniform else ample)
        return found


def _replica_seconds(
    table: CostTable, units: UnitArrays, option: StageOption, seconds: dict[int, FloatArray]
) -> list[FloatArray]:
    """Seconds of one microbatch on each replica; likes share one array."""
    moved = _zero_seconds(table, units, option)
    if moved is None:
        return [seconds[m] for m in option.staff]
    with_moved = {m: seconds[m] + moved for m in set(option.staff)}
    return [with_moved[m] for m in option.staff]


def _zero_seconds(table: CostTable, units: UnitArrays, option: StageOption) -> FloatArray | None:
    """What ZeRO moves for every microbatch; None below level 2."""
    zero, width = table.every_mode[option.staff[0]].zero, option.width
    if zero < 2 or width < 2 or not table.training:
        return None
    each = table.sum_s_per_byte
    moved = ring_array(option.ring, _most_bytes(units, option, "gradient_bytes"), width, each) / 2
    if zero > 2:
        moved += ring_array(option.ring, _most_bytes(units, option, "weight_bytes"), width, each)
    return moved


def _most_bytes(units: UnitArrays, option: StageOption, name: str) -> FloatArray:
    found: FloatArray = np.maximum.reduce([units.most_bytes(m, name) for m in set(option.staff)])
    return found


def _link_kinds(cells: Cells, options: Sequence[StageOption]) -> tuple[Links, ...]:
    found = {k for sides in _sides(cells, options) for k in sides}
    return (frozenset(), *sorted((k for k in found if k), key=repr))


def _sides(cells: Cells, options: Sequence[StageOption]) -> list[set[Links]]:
    """For each option the kinds of links its boundaries may have."""
    places = {o.places for o in options}
    near = {p: {links_between(cells, p, q) for q in places} for p in places}
    return [near[o.places] if o.sides is None else set(o.sides) for o in options]


def boundary_seconds(table: CostTable, setting: Setting, kinds: Sequence[Links]) -> FloatArray:
    """[link kind, boundary]: seconds of a microbatch's transfers, both directions."""
    forward, backward = boundary_bytes(table, setting.size)
    seconds = np.zeros((len(kinds), table.num_units + 1))
    for number, links in enumerate(kinds):
        seconds[number] = _slowest(links, forward)
        if table.training:
            seconds[number] += _slowest(links, backward)
    return seconds


def boundary_bytes(table: CostTable, size: float) -> tuple[FloatArray, FloatArray]:
    """`CostTable.cut_bytes` at every boundary: forward and backward."""
    per_sample, fixed, back = np.zeros((3, table.num_units + 1))
    for edge in table.edges:
        # An edge from s to t crosses the boundaries s + 1 to t. Counted first: a sum of differences
        # would leave rounding where nothing crosses.
        crossed = slice(edge.source + 1, edge.target + 1)
        per_sample[crossed] += edge.bytes_per_sample
        fixed[crossed] += edge.fixed_bytes
        back[crossed] += edge.gradient_bytes_per_sample
    return per_sample * size + fixed, back * size


def slowest_transfer_s(table: CostTable, setting: Setting, links: Links) -> float:
    """Seconds of the slowest boundary, both directions, if it were cut over the given links."""
    return float(boundary_seconds(table, setting, (links,)).max())


def _slowest(links: Links, num_bytes: FloatArray) -> FloatArray:
    if not links:
        return np.zeros(num_bytes.shape)
    slow = np.maximum.reduce([k.latency_s + num_bytes / k.bytes_per_s for k in links])
    return np.where(num_bytes > 0, slow, 0.0)


def _arms(cells: Cells, options: Sequence[StageOption], kinds: Sequence[Links]) -> tuple[Arm, ...]:
    """Every option with every kind of link that some neighbour can give it, or an end."""
    number = {links: i for i, links in enumerate(kinds)}
    around = [sorted({0} | {number[k] for k in sides}) for sides in _sides(cells, options)]
    return tuple(Arm(i, b, a) for i, near in enumerate(around) for b in near for a in near)


def _waiting(
    table: CostTable, setting: Setting, before: FloatArray, arm: Arm, units: UnitArrays
) -> FloatArray:
    """Half of either boundary's transfer under 1F1B, [range]."""
    if not table.training or setting.schedule == "gpipe":
        return np.zeros(units.valid.shape)
    after = before[arm.link_after][units.runs.last]
    wait: FloatArray = (before[arm.link_before][units.runs.first] + after) / 2
    return wait


def _extra(
    seconds: list[FloatArray], wait: FloatArray, microbatches: int
) -> tuple[FloatArray, list[FloatArray]]:
    """Extra of a stage and the microbatches of each replica, dealt to the first that is free."""
    width = len(seconds)
    if all(s is seconds[0] for s in seconds):
        share, longer = divmod(microbatches, width)
        # The first replica has the most work; the others bind no limit that it does not.
        counts = [np.full(wait.shape, float(share + (longer > 0)))]
        more = share + (longer > 0) - 1
        return more * np.where(np.isfinite(seconds[0]), seconds[0] + wait, 0.0), counts
    with np.errstate(invalid="ignore", divide="ignore"):
        periods = [s + wait for s in seconds]
        counts = _deal_arrays(seconds, periods, microbatches)
        ends = [t + (n - 1) * p for t, p, n in zip(seconds, periods, counts, strict=True)]
        extra = np.maximum.reduce(ends) - np.maximum.reduce(seconds)
    # A replica without a microbatch makes this the stage of another option.
    idle = np.minimum.reduce(counts) < 1
    idle |= (np.minimum.reduce(periods) <= 0) & (np.maximum.reduce(periods) > 0)
    return np.where(idle, np.inf, extra), counts


def _deal_arrays(
    seconds: list[FloatArray], periods: list[FloatArray], microbatches: int
) -> list[FloatArray]:
    """`pipeline_price.deal` for all stages at once.

    What the fluid solution completes is among the first `microbatches` completions, so the deal may
    start from there and has at most one microbatch per replica left.
    """
    usable = np.minimum.reduce(periods) > 0
    safe = [np.where(usable & np.isfinite(p), p, 1.0) for p in periods]
    start = [np.where(usable & np.isfinite(s), s, 1.0) for s in seconds]
    rate = np.add.reduce([1 / p for p in safe])
    offset = np.add.reduce([1 - t / p for t, p in zip(start, safe, strict=True)])
    level = (microbatches - offset) / rate
    # A hair below the fluid level, so that rounding never completes too much.
    counts = [
        np.maximum(np.floor((level * (1 - 1e-12) - t) / p + 1), 0.0)
        for t, p in zip(start, safe, strict=True)
    ]
    stacked = np.stack(counts)
    replicas = np.arange(len(seconds)).reshape(-1, *(1 for _ in stacked.shape[1:]))
    for _ in range(len(seconds) + 1):
        missing = microbatches - stacked.sum(axis=0)
        ends = np.stack([t + n * p for t, p, n in zip(start, safe, stacked, strict=True)])
        first = np.argmin(np.where(ends <= ends.min(axis=0), stacked, np.inf), axis=0)
        hit = replicas == first[None]
        stacked = stacked + (hit & (missing > 0)[None])
    return list(stacked)


def _most_below(
    setting: Setting, own: list[FloatArray], flight: list[FloatArray], width: int
) -> FloatArray:
    limits = []
    for number, most in zip(own, flight, strict=True):
        bounded = np.full(most.shape, -1.0) if setting.schedule == "gpipe" else width * most
        limits.append(np.where(number <= most, UNLIMITED, bounded))
    found: FloatArray = np.minimum.reduce(limits)
    return found


def _cached_post(
    table: CostTable, units: UnitArrays, option: StageOption, setting: Setting
) -> FloatArray:
    key = ("post", option.staff, option.ring, setting.peers, setting.across)
    if key not in units.cache:
        units.cache[key] = _post(table, units, option, setting)
    return units.cache[key]


def _post(table: CostTable, units: UnitArrays, option: StageOption, setting: Setting) -> FloatArray:
    if not table.training:
        return np.where(units.valid, 0.0, np.inf)
    zero, width, each = table.every_mode[option.staff[0]].zero, option.width, table.sum_s_per_byte
    gradients = _most_bytes(units, option, "gradient_bytes")
    sync = ring_array(setting.across, gradients, setting.peers, each)
    if zero < 2:
        sync = sync + ring_array(option.ring, gradients, width, each) / (1 if zero == 0 else 2)
    if zero in (1, 2):
        weights = _most_bytes(units, option, "weight_bytes")
        sync = sync + ring_array(option.ring, weights, width, each) / 2
    optimizer = [units.optimizer_seconds(m) for m in set(option.staff)]
    share = width if zero else 1
    return np.where(units.valid, sync + np.maximum.reduce(optimizer) / share, np.inf)


def ring_array(links: Links, num_bytes: FloatArray, copies: int, sum_s_per_byte: float) -> FloatArray:
    """Seconds of a ring all-reduce over the slowest of some links."""
    if copies < 2:
        return np.zeros_like(num_bytes)
    message = num_bytes / copies
    summing = sum_s_per_byte * message if sum_s_per_byte else 0.0  # nothing times infinity is no number
    return 2 * (copies - 1) * (_slowest(links, message) + summing)
