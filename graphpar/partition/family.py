"""Which plans are searched: how stages may be staffed, which microbatch counts and shares are tried.

Everything here that narrows the search is spelled out in words, because a bound holds only for the
plans that were searched.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, combinations, combinations_with_replacement, product

import numpy as np

from graphpar.cost import CostTable, Mode
from graphpar.partition.cells import (
    Cells,
    StageOption,
    class_cells,
    count_vectors,
    find_cells,
    links_to_others,
    make_option,
    plain_option,
    relaxed_cells,
)
from graphpar.partition.counting.options import counting_options
from graphpar.partition.fewer_devices import (
    TooManyUnitsError,
    fewer_devices,
    is_of_some_devices,
    whole_s,
)
from graphpar.partition.jit import COMPILED
from graphpar.partition.repeats import Repeats, find_repeats
from graphpar.partition.settings import (
    Microbatches,
    ScheduleChoice,
    microbatch_counts,
    schedules_of,
)
from graphpar.partition.staffings import BY_ARRAYS, BY_LOOPS, ON_REAL_LINKS, Effort, staffings, states
from graphpar.partition.types import SearchedSchedule

_FEW_STATES = 256
"""So few sets of devices are searched by compiled loops rather than counted; so are unlike devices."""

SHARE_STEPS = 64
"""Batch shares of pipelines side by side are multiples of batch / SHARE_STEPS, at least one sample."""

_SHARED = ", equal blocks of a stage shared in one way"
"""Each mode of a tensor group has one sharding for every kind of unit."""

LEAST_BLOCKS = 8
"""A chain with fewer equal blocks is not counted."""

EVERY_GROUPING = 4
"""Up to this many devices every way to form pipelines side by side is tried."""


@dataclass(frozen=True)
class Family:
    """The plans that are searched.

    Attributes:
        table: What everything costs.
        cells: Interchangeable devices; `exact` says whether their links are the real ones.
        options: The ways to staff a stage.
        schedules: Schedules tried.
        microbatches: A fixed count or `auto`.
        staffing: In words, how stages may be staffed.
        repeats: Where set, stages are counted by the counting programme and blocks are not cut.
    """

    table: CostTable
    cells: Cells
    exact: bool
    options: tuple[StageOption, ...] = field(repr=False)
    schedules: tuple[SearchedSchedule, ...]
    microbatches: Microbatches
    staffing: str
    repeats: Repeats | None = None
    _within: dict[tuple[tuple[int, ...], int], tuple[StageOption, ...]] = field(
        default_factory=dict, repr=False, compare=False
    )

    @property
    def partial(self) -> bool:
        """Whether plans over a part of the devices are searched only."""
        return is_of_some_devices(self.staffing)

    def counts(self, samples: int) -> list[int]:
        """The microbatch counts tried for a share of the batch."""
        return microbatch_counts(self.table, samples, self.microbatches)

    def within(self, limits: Sequence[int], width: int) -> tuple[StageOption, ...]:
        """Options that fit into a count of devices per cell, with at most `width` replicas."""
        key = (tuple(limits), width)
        if key not in self._within:
            takes = np.array([o.take for o in self.options], dtype=np.intp)
            widths = np.array([o.width for o in self.options], dtype=np.intp)
            fits = (takes <= np.array(limits)).all(axis=1) & (widths <= width)
            self._within[key] = tuple(self.options[i] for i in np.flatnonzero(fits).tolist())
        return self._within[key]

    def classes(self, limits: Sequence[int]) -> list[int]:
        """Counts per device class of counts per cell."""
        numbers = [0] * len(self.table.device_classes)
        for cell, number in zip(self.cells.cells, limits, strict=True):
            numbers[cell.device_class] += number
        return numbers


def choose_family(table: CostTable, schedule: ScheduleChoice, microbatches: Microbatches) -> Family:
    """The widest family that can be searched: placed stages, counted stages, or fewer devices.

    Raises:
        TooManyUnitsError: Nothing can be.
    """
    schedules = schedules_of(table, schedule)
    if not table.training:
        schedules = ("gpipe",) if schedule == "auto" else (schedule,)
    settings = (schedules, microbatches)
    cells, repeats = find_cells(table), find_repeats(table)
    counted = repeats is not None and repeats.number >= LEAST_BLOCKS
    few = states(cells) <= _FEW_STATES or max(cells.counts, default=0) == 1
    effort = BY_LOOPS if COMPILED and (few or not counted) else BY_ARRAYS
    placed = _placed_family(table, cells, True, settings, effort, wide=True)
    if placed is not None:
        return placed
    if repeats is not None and counted:
        return _counted_family(table, schedules, microbatches, repeats)
    ways = [(True, cells, ON_REAL_LINKS), (False, relaxed_cells(table), BY_ARRAYS)]
    for exact, some, effort in [(True, cells, BY_LOOPS)] * COMPILED + ways:
        placed = _placed_family(table, some, exact, settings, effort, wide=False)
        if placed is not None:
            return placed
    if len(table.class_of) == 1:
        raise TooManyUnitsError(f"{table.num_units:,} unlike units are too many to search")
    fewer, words = fewer_devices(table)
    family = choose_family(fewer, schedule, microbatches)
    if not family.partial:
        family = replace(family, staffing=family.staffing + words)
    return family


def _placed_family(
    table: CostTable,
    cells: Cells,
    exact: bool,
    settings: tuple[tuple[SearchedSchedule, ...], Microbatches],
    effort: Effort,
    *,
    wide: bool,
) -> Family | None:
    """The widest family that an effort allows to search; `wide` insists on replicas."""
    for words, takes in staffings(cells, table.max_replicas, effort):
        if wide and len(takes) > 1 and max(map(sum, takes)) < min(table.max_replicas, 2):
            continue
        if not effort.allows(table, cells, takes, plain=True):
            continue
        for more, options in _with_modes(table, cells, takes, exact):
            if not table.modes or effort.allows(table, cells, [o.take for o in options], plain=False):
                return Family(table, cells, exact, tuple(options), *settings, words + more)
    return None


def _with_modes(
    table: CostTable, cells: Cells, takes: Sequence[tuple[int, ...]], exact: bool
) -> Iterator[tuple[str, list[StageOption]]]:
    """Stage options in all modes, then with fewer of them, widest first."""
    plain = [plain_option(cells, take) for take in takes]
    if not table.modes:
        yield "", plain
        return
    variants = _variants(table)
    groups = list(_group_options(table, cells)) if exact else []
    some = f" in {len(variants)} further mode{'s' * (len(variants) > 1)}" if variants else ""
    many = len({o.staff[0] for o in groups})
    words = f"{some}, or tensor groups in {many} modes, alike in a stage{_SHARED}" if groups else some
    yield words, [*plain, *_in_variants(table, cells, plain, variants), *groups]
    uniform = [o for o in plain if len(set(o.staff)) == 1 and len(o.places) == 1]
    if len(uniform) < len(plain):
        yield (
            words + " (modes only for interchangeable replicas)",
            [
                *plain,
                *_in_variants(table, cells, uniform, variants),
                *(o for o in groups if len(o.places) == 1),
            ],
        )
    yield (
        some + " (modes only for single devices)",
        [
            *plain,
            *_in_variants(table, cells, [o for o in plain if o.width == 1], variants),
        ],
    )
    yield " (plain modes only)", plain


Variant = dict[int, int]
"""Device class to the mode that runs on one device of it with certain options."""


def _variants(table: CostTable) -> list[Variant]:
    found: dict[tuple[str, bool, int], Variant] = {}
    for number, mode in enumerate(table.every_mode):
        if number >= len(table.device_classes) and len(mode.members) == 1:
            key = (mode.precision, mode.recompute, mode.zero)
            found.setdefault(key, {})[mode.members[0]] = number
    return list(found.values())


def _in_variants(
    table: CostTable, cells: Cells, plain: Sequence[StageOption], variants: Sequence[Variant]
) -> Iterator[StageOption]:
    """The same stages in every mode that all their devices have; ZeRO needs somebody to share with."""
    class_of = [cell.device_class for cell in cells.cells]
    staffed = [(option, [class_of[i] for (i,) in option.groups]) for option in plain]
    for variant in variants:
        zero = table.every_mode[next(iter(variant.values()))].zero
        for o, classes in staffed:
            if (len(classes) > 1 or zero == 0) and all(c in variant for c in classes):
                staff = tuple(variant[c] for c in classes)
                yield StageOption(o.take, o.places, o.ring, staff, o.groups)


def _group_options(table: CostTable, cells: Cells) -> Iterator[StageOption]:
    """Stages whose replicas are tensor groups of one mode, each inside a place."""
    for number, mode in enumerate(table.every_mode):
        if len(mode.members) < 2:
            continue
        homes = list(_homes(cells, mode))
        for chosen in _multisets(cells.counts, homes, table.max_replicas):
            if len(chosen) > 1 or mode.zero == 0:
                yield make_option(cells, chosen, (number,) * len(chosen))


def _homes(cells: Cells, mode: Mode) -> Iterator[tuple[int, ...]]:
    """Cells for the members of one group, wherever links are as good as its price needs."""
    # Members of a class may change places: they are equal devices.
    classes = sorted(range(len(mode.members)), key=mode.members.__getitem__)
    ways = [
        combinations_with_replacement(
            [i for i, c in enumerate(cells.cells) if c.device_class == k and cells.counts[i]], number
        )
        for k, number in sorted(Counter(mode.members).items())
    ]
    found = []
    for parts in product(*ways):
        placed = dict(zip(classes, chain.from_iterable(parts), strict=True))
        found.append(tuple(placed[member] for member in range(len(classes))))
    for home in sorted(found):
        if any(n > cells.counts[i] for i, n in Counter(home).items()):
            continue
        places = [cells.cells[i].place for i in home]
        links = [cells.links[a][b] for a, b in combinations(places, 2)]
        if mode.link is None or all(k is not None and k.at_least(mode.link) for k in links):
            yield home


def _multisets(
    counts: Sequence[int], homes: Sequence[tuple[int, ...]], most: int
) -> Iterator[tuple[tuple[int, ...], ...]]:
    """All ways to take one or more of some groups, with repetition, that the counts allow."""

    def grow(
        start: int, left: Counter[int], chosen: tuple[tuple[int, ...], ...]
    ) -> Iterator[tuple[tuple[int, ...], ...]]:
        if chosen:
            yield chosen
        if len(chosen) == most:
            return
        for index in range(start, len(homes)):
            rest = left.copy()
            rest.subtract(homes[index])
            if min(rest[i] for i in homes[index]) >= 0:
                yield from grow(index, rest, (*chosen, homes[index]))

    return grow(0, Counter(dict(enumerate(counts))), ())


def _counted_family(
    table: CostTable,
    schedules: tuple[SearchedSchedule, ...],
    microbatches: Microbatches,
    repeats: Repeats,
) -> Family:
    cells = class_cells(table)
    options = counting_options(table, cells, table.max_replicas)
    used = ", ".join(str(w) for w in sorted({o.width for o in options}))
    words = f"replicas of one kind in numbers {used}"
    if _inside_is_slower(cells):
        words += ", inside a node where they fit into one"
    if table.modes:
        modes = {o.staff[0] for o in options}
        sizes = ", ".join(map(str, sorted({len(table.every_mode[m].members) for m in modes})))
        shared = _SHARED if sizes != "1" else ""
        words += f", in {len(modes)} modes, tensor groups of {sizes}{shared}"
    if repeats.period > 1:
        words += f", cut only between the {repeats.number} equal blocks"
    return Family(table, cells, False, tuple(options), schedules, microbatches, words, repeats)


def _inside_is_slower(cells: Cells) -> bool:
    """Whether replicas in several nodes might exchange faster than in one, which is not searched."""
    network = cells.links[-1][0]
    inside = [cells.links[c.place][c.place] for c in cells.cells]
    return network is not None and any(k is not None and not k.at_least(network) for k in inside)


def share_step(table: CostTable) -> int:
    """Samples by which the shares of pipelines side by side differ."""
    return max(1, table.batch // SHARE_STEPS)


Group = tuple[int, ...]
"""The devices that a pipeline may use, as counts per cell."""

Grouping = tuple[Group, ...]


def groupings(family: Family) -> list[Grouping]:
    """Sets of pipelines side by side, each pipeline given as counts of devices per cell."""
    table, counts = family.table, family.cells.counts
    most = min(table.batch, table.max_replicas, sum(counts))
    if most < 2:
        return []
    if family.repeats is not None:
        return [g for g in dict.fromkeys(_of_kinds(counts)) if len(g) <= most and all(map(any, g))]
    if sum(counts) <= EVERY_GROUPING:
        every: Iterable[Grouping] = _partitions(counts)
    else:
        every = dict.fromkeys(tuple(sorted(g, reverse=True)) for g in _natural(family))
    found = [g for g in every if 2 <= len(g) <= most and all(map(any, g))]
    return [g for g in found if not any(_covers(family.cells, h, g) for h in found)]


def _covers(cells: Cells, wide: Grouping, narrow: Grouping) -> bool:
    """Whether every plan of one grouping is a plan of another, at the same bounds.

    A pipeline may leave devices out, so it is if the pipelines of one have all devices of those of the
    other; the bounds are the same where the best links to the others are.
    """
    if len(wide) != len(narrow) or wide == narrow:
        return False

    def holds(large: Group, small: Group) -> bool:
        if any(a < b for a, b in zip(large, small, strict=True)):
            return False
        here, there = (links_to_others(cells, g, o) for g, o in ((wide, large), (narrow, small)))
        own = {c.place for c, n in zip(cells.cells, small, strict=True) if n}
        return all(here[p] == there[p] for p in own)

    def match(left: Grouping, right: Grouping) -> bool:
        return not right or any(
            holds(large, right[0]) and match((*left[:i], *left[i + 1 :]), right[1:])
            for i, large in enumerate(left)
        )

    return match(wide, narrow)


def grouping_words(family: Family, searched: int = 0) -> str:
    """Which groupings are tried, in words; of a large cluster's so many were `searched` to the end."""
    if family.repeats is not None and searched == 0:
        return "one pipeline"
    if family.repeats is not None:
        return f"one pipeline, or the {searched} most promising ways to run kinds side by side"
    if sum(family.cells.counts) <= EVERY_GROUPING:
        return "every way to form pipelines side by side"
    return "pipelines side by side by device, cell, class, place or equal division, slow classes left out"


def _partitions(counts: Sequence[int]) -> Iterator[tuple[tuple[int, ...], ...]]:
    """All multisets of non-zero vectors whose sum is within the counts."""
    vectors = sorted(count_vectors(counts, sum(counts)), reverse=True)

    def grow(
        start: int, left: tuple[int, ...], chosen: tuple[tuple[int, ...], ...]
    ) -> Iterator[tuple[tuple[int, ...], ...]]:
        if chosen:
            yield chosen
        for index in range(start, len(vectors)):
            rest = tuple(a - b for a, b in zip(left, vectors[index], strict=True))
            if min(rest) >= 0:
                yield from grow(index, rest, (*chosen, vectors[index]))

    return grow(0, tuple(counts), ())


def _of_kinds(counts: Sequence[int]) -> Iterator[tuple[tuple[int, ...], ...]]:
    """A pipeline for each kind; kinds in two sets; two or four equal mixtures of all."""
    kinds = range(len(counts))
    if len(counts) > 1:
        yield tuple(tuple(n if i == j else 0 for j, n in enumerate(counts)) for i in kinds)
    for size in range(1, len(counts) // 2 + 1):
        for chosen in combinations(kinds, size):
            left = tuple(n if i in chosen else 0 for i, n in enumerate(counts))
            yield tuple(sorted((left, tuple(n - k for n, k in zip(counts, left, strict=True)))))
    for parts in (2, 4):
        yield (tuple(n // parts for n in counts),) * parts


def _natural(family: Family) -> Iterator[tuple[tuple[int, ...], ...]]:
    cells = family.cells.cells
    for kept in _class_prefixes(family):
        counts = tuple(
            n if c.device_class in kept else 0 for c, n in zip(cells, family.cells.counts, strict=True)
        )
        keys = (
            [c.place for c in cells],
            [c.device_class for c in cells],
            list(range(len(cells))),
        )
        for key in keys:
            yield _by(counts, key)
        for parts in (2, 4, 8):
            yield (tuple(n // parts for n in counts),) * parts
            split = [
                tuple(n // parts if i == j else 0 for j, n in enumerate(counts))
                for i in range(len(counts))
                for _ in range(parts)
            ]
            yield tuple(g for g in split if any(g))
        yield tuple(
            tuple(int(i == j) for j in range(len(counts))) for i, n in enumerate(counts) for _ in range(n)
        )


def _class_prefixes(family: Family) -> Iterator[set[int]]:
    """All classes, then without the slowest, and so on."""
    whole = whole_s(family.table)
    order = sorted({c.device_class for c in family.cells.cells}, key=lambda k: whole[k])
    for number in range(len(order), 0, -1):
        yield set(order[:number])


def _by(counts: Sequence[int], key: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    groups = [
        tuple(n if k == value else 0 for n, k in zip(counts, key, strict=True))
        for value in sorted(set(key))
    ]
    return tuple(g for g in groups if any(g))
