"""Arrays of what the stages of one pipeline cost: seconds, extra, post, transfers, memory by position.

Index legend: `range` stands for one or two axes that number runs of units; entries that are no run
are infinite.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from graphpar.cost import CostTable, LinkCost
from graphpar.partition.cells import Links, StageOption, pareto
from graphpar.partition.types import ROUNDING
from graphpar.partition.unit_arrays import UNLIMITED, Cache, FloatArray, IntArray, Setting, UnitArrays


@dataclass(frozen=True)
class StageLimits:
    """Stages with more extra, more post or more of both together are left out.

    A pipeline with a fill of `fill_s` or more is of no interest, nor is one whose fill, extra and
    `post_weight` times post are `all_s` or more; one whose fill is `slack_s` above the least is good
    enough. A programme may make use of these, or not.
    """

    extra_s: float = float("inf")
    post_s: float = float("inf")
    both_s: float = float("inf")
    fill_s: float = float("inf")
    slack_s: float = 0.0
    all_s: float = float("inf")
    post_weight: float = 1.0


def zero_seconds(table: CostTable, units: UnitArrays, option: StageOption) -> FloatArray | None:
    """What ZeRO moves for every microbatch; None below level 2. The same array for options alike."""
    zero, width = table.every_mode[option.staff[0]].zero, option.width
    if zero < 2 or width < 2 or not table.training:
        return None
    names = ("gradient_bytes",) if zero == 2 else ("gradient_bytes", "weight_bytes")
    gradients, *weights = (_most_bytes(units, option, name) for name in names)
    key = ("moved", option.ring, width, id(gradients), *map(id, weights))
    if key not in units.cache:
        moved = _ring(units, option.ring, width, gradients) / 2
        for num_bytes in weights:
            moved += _ring(units, option.ring, width, num_bytes)
        units.cache[key] = moved
    return units.cache[key]


def _most_bytes(units: UnitArrays, option: StageOption, name: str) -> FloatArray:
    """The same array again for all options whose replicas hold the same."""
    arrays = {id(a): a for a in (units.most_bytes(m, name) for m in set(option.staff))}
    if len(arrays) == 1:
        return next(iter(arrays.values()))
    # What has such a number is kept in the cache, so that no other array gets it.
    key = ("most of", *sorted(arrays))
    if key not in units.cache:
        units.cache[key] = np.maximum.reduce(list(arrays.values()))
    return units.cache[key]


def _ring(units: UnitArrays, links: Links, copies: int, num_bytes: FloatArray) -> FloatArray:
    """`ring_array` of an array that is kept, worked out once."""
    key = ("ring", links, copies, id(num_bytes))
    if key not in units.cache:
        units.cache[key] = ring_array(links, copies, num_bytes, units.table.sum_s_per_byte)
    return units.cache[key]


def boundary_seconds(
    table: CostTable, setting: Setting, kinds: Sequence[Links], cache: Cache | None = None
) -> FloatArray:
    """[link kind, boundary]: seconds of a microbatch's transfers, both directions."""
    found = np.zeros((len(kinds), table.num_units + 1))
    some, rows, starts, latency, rate = _links_of(tuple(kinds))
    if len(some) == 0:
        return found
    for num_bytes in boundary_bytes(table, setting.size, cache)[: 2 if table.training else 1]:
        each = np.where(num_bytes > 0, latency + num_bytes / rate + table.message_s, 0.0)
        found[some] += np.maximum.reduceat(each[rows], starts, axis=0)
    return found


@lru_cache(maxsize=64)
def _links_of(
    kinds: tuple[Links, ...],
) -> tuple[IntArray, IntArray, IntArray, FloatArray, FloatArray]:
    """Kinds with links, the numbers of these, where those of each begin; latency and rate of links."""
    some = [number for number, links in enumerate(kinds) if links]
    every = list(dict.fromkeys(link for number in some for link in kinds[number]))
    row = {link: i for i, link in enumerate(every)}
    rows = [row[link] for number in some for link in kinds[number]]
    starts = np.cumsum([0, *(len(kinds[number]) for number in some[:-1])], dtype=np.intp)
    latency = np.array([k.latency_s for k in every])[:, None]
    rate = np.array([k.bytes_per_s for k in every])[:, None]
    return np.array(some, dtype=np.intp), np.array(rows, dtype=np.intp), starts, latency, rate


def boundary_bytes(
    table: CostTable, size: float, cache: Cache | None = None
) -> tuple[FloatArray, FloatArray]:
    """`CostTable.cut_bytes` at every boundary: forward and backward."""
    known: Cache = {} if cache is None else cache
    if ("crossing",) not in known:
        known[("crossing",)] = _crossing(table)
    per_sample, fixed, back, fixed_back = known[("crossing",)]
    return per_sample * size + fixed, back * size + fixed_back


def _crossing(table: CostTable) -> FloatArray:
    """[forward by sample, forward whatever the size, the same backward; boundary]: bytes that cross."""
    found = np.zeros((4, table.num_units + 1))
    per_sample, fixed, back, fixed_back = found
    for edge in table.edges:
        # An edge from s to t crosses the boundaries s + 1 to t. Counted first: a sum of differences
        # would leave rounding where nothing crosses.
        crossed = slice(edge.source + 1, edge.target + 1)
        per_sample[crossed] += edge.bytes_per_sample
        fixed[crossed] += edge.fixed_bytes
        back[crossed] += edge.gradient_bytes_per_sample
        fixed_back[crossed] += edge.gradient_fixed_bytes
    return found


def slowest_transfer_s(table: CostTable, setting: Setting, links: Links) -> float:
    """Seconds of the slowest boundary, both directions, if it were cut over the given links."""
    return float(boundary_seconds(table, setting, (links,)).max())


def _slowest(links: Links, num_bytes: FloatArray) -> FloatArray:
    if not links:
        return np.zeros(num_bytes.shape)
    slow = np.maximum.reduce([k.latency_s + num_bytes / k.bytes_per_s for k in links])
    return np.where(num_bytes > 0, slow, 0.0)


def _ragged_s(
    seconds: list[FloatArray], own: list[FloatArray], setting: Setting, sample_s: list[FloatArray]
) -> list[FloatArray]:
    """What samples beyond its share of the mean take each replica (`pipeline_price.ragged_s`)."""
    larger, number, width = setting.samples % setting.microbatches, setting.microbatches, len(own)
    longest = np.maximum.reduce(seconds)
    alike = longest - np.minimum.reduce(seconds) <= ROUNDING * longest
    found = []
    for place, (counts, each) in enumerate(zip(own, sample_s, strict=True)):
        share = larger * counts / number
        most = np.ceil(share - 1e-9)
        more = np.where(alike, -((place - larger) // width), most) - share
        found.append(more * np.where(alike, each, np.maximum(each, 0.0)))
    return found


def stage_extra(
    seconds: list[FloatArray], wait: FloatArray, setting: Setting, sample_s: list[FloatArray]
) -> tuple[FloatArray, list[FloatArray]]:
    """Extra of a stage and the microbatches of each replica, dealt to the first that is free.

    `sample_s` is what one sample more takes each replica.
    """
    microbatches = setting.microbatches
    width = len(seconds)
    if width == 1:
        share, longer = divmod(microbatches, width)
        # The first replica has the most work; the others bind no limit that it does not.
        counts = [np.full(wait.shape, float(share + (longer > 0)))]
        more = share + (longer > 0) - 1
        return more * np.where(np.isfinite(seconds[0]), seconds[0] + wait, 0.0), counts
    with np.errstate(invalid="ignore", divide="ignore"):
        periods = [s + wait for s in seconds]
        counts = _deal_arrays(seconds, periods, microbatches)
        ends = [t + (n - 1) * p for t, p, n in zip(seconds, periods, counts, strict=True)]
        if setting.samples % microbatches:
            ragged = _ragged_s(seconds, counts, setting, sample_s)
            ends = [e + x for e, x in zip(ends, ragged, strict=True)]
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


def most_below(
    setting: Setting, own: list[FloatArray], flight: list[FloatArray], width: int
) -> FloatArray:
    limits = []
    for number, most in zip(own, flight, strict=True):
        bounded = np.full(most.shape, -1.0) if setting.schedule == "gpipe" else width * most
        limits.append(np.where(number <= most, UNLIMITED, bounded))
    found: FloatArray = np.minimum.reduce(limits)
    return found


def cached_post(table: CostTable, units: UnitArrays, option: StageOption, setting: Setting) -> FloatArray:
    """What a stage takes after its last backward, at the least; the same array for options alike."""
    cache = units.cache
    if not table.training:
        if ("post",) not in cache:
            cache[("post",)] = np.where(units.valid, 0.0, np.inf)
        return cache[("post",)]
    zero = table.every_mode[option.staff[0]].zero
    held = tuple(_most_bytes(units, option, name) for name in ("gradient_bytes", "weight_bytes"))
    steps = {id(a): a for a in map(units.optimizer_seconds, set(option.staff))}
    summed = summing(option, zero, setting)
    key = ("post", zero, option.ring, option.width, summed, *map(id, held), *sorted(steps))
    if key not in cache:
        cache[key] = _post(units, option, zero, summed, held, list(steps.values()))
    return cache[key]


def _post(
    units: UnitArrays,
    option: StageOption,
    zero: int,
    summed: tuple[Links, int],
    held: Sequence[FloatArray],
    steps: Sequence[FloatArray],
) -> FloatArray:
    width, (gradients, weights) = option.width, held
    own: FloatArray | float = 0.0
    if zero == 1:
        own = own + _ring(units, option.ring, width, gradients) / 2
    if zero in (1, 2):
        own = own + _ring(units, option.ring, width, weights) / 2
    sync = own + _ring(units, *summed, gradients)
    longest = np.maximum.reduce(steps)
    if not zero:
        found = sync + longest
    else:
        # Any of the replicas may be the one that speaks with other pipelines; the slowest need not.
        found = np.maximum(sync + np.minimum.reduce(steps) / width, own + longest / width)
    return found if units.valid.all() else np.where(units.valid, found, np.inf)


def least_step_s(table: CostTable, units: UnitArrays, option: StageOption) -> FloatArray:
    """What a stage steps after its last sum of gradients, at the least."""
    steps = np.stack([units.optimizer_seconds(mode) for mode in set(option.staff)])
    found: FloatArray = steps.max(axis=0)
    return steps.min(axis=0) / option.width if table.every_mode[option.staff[0]].zero else found


def summing(option: StageOption, zero: int, setting: Setting) -> tuple[Links, int]:
    """The links and the holders of a stage's sums of gradients, at the least.

    The stages of other pipelines that hold the same units have one replica or more, on links that are no
    better than the best; then nothing is left out where each of them is one device.
    """
    kinds = [setting.across[p] for p in option.places if setting.across]
    if zero:
        return _links_of_any(kinds), setting.peers
    links = frozenset[LinkCost]().union(*kinds)
    return pareto([*links, *option.ring]), option.width + setting.peers - 1


def _links_of_any(kinds: Sequence[Links]) -> Links:
    """Links whose slowest is no slower than the slowest of any one kind, for any message."""
    if len(kinds) == 1:
        return kinds[0]
    if not kinds or not all(kinds):
        return frozenset()
    latency_s = min(max(k.latency_s for k in links) for links in kinds)
    bytes_per_s = max(min(k.bytes_per_s for k in links) for links in kinds)
    return frozenset((LinkCost(latency_s, float("inf")), LinkCost(0.0, bytes_per_s)))


def ring_array(links: Links, copies: int, num_bytes: FloatArray, sum_s_per_byte: float) -> FloatArray:
    """Seconds of a ring all-reduce over the slowest of some links."""
    if copies < 2:
        return np.zeros_like(num_bytes)
    message = num_bytes / copies
    summing = sum_s_per_byte * message if sum_s_per_byte else 0.0  # nothing times infinity is no number
    return 2 * (copies - 1) * (_slowest(links, message) + summing)
