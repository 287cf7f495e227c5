"""Dynamic programming over ideals: the busiest device of a contiguous split, exactly.

An ideal is a set of blocks closed under predecessors. A contiguous split whose devices can be put in
an order in which no forward transfer goes back is a chain of ideals; the set of each device is the
difference of two neighbours of the chain. So with f[J, a, c] the least busiest load when ideal J is
done by a accelerators and c CPU pools,

    f[J, a, c] = min over ideals I inside J of min( max(f[I, a - 1, c], accelerator load of J - I),
                                                    max(f[I, a, c - 1], CPU load of J - I) ).

An output moves into or out of J - I if the blocks that make or take it are neither all inside nor
all outside. With Q those blocks, "all inside" is [Q in J] [Q and I disjoint] and "all outside" is
[|Q and J| = |Q and I|], so the transfers of all pairs (I, J) are matrix products.

*Free* blocks have no place in the order. Where there are few, every ideal comes with every choice of them
(`free_ideals`). Else each has a window, the blocks that it exchanges outputs with, and may be taken by a
device once an ideal holds some of them; the device that takes the last of the window takes it at
the latest (`window_ideals`). An answer may do otherwise and put it where nothing of the window is, so for
a bound that last device may go without it, and counts whatever is less (`windows`).
"""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from graphpar.partition.placement.graph import Blocks, FloatArray, product
from graphpar.partition.placement.windows import Elsewhere

BoolArray = npt.NDArray[np.bool_]

_BATCH = 64
"""Larger ideals compared with all near smaller ones at a time."""


@dataclass(frozen=True, eq=False)
class Ideals:
    """Ideals by growing size, `member[i, b]`; `complete` if these are all there are."""

    member: BoolArray
    complete: bool


@dataclass(frozen=True, eq=False)
class Split:
    """A contiguous split: sets of blocks in order, each on the CPUs or on an accelerator."""

    load: float
    parts: tuple[tuple[bool, tuple[int, ...]], ...]


def all_ideals(blocks: Blocks, most: int) -> Ideals | None:
    """Every ideal, or None where there are more than `most`; free blocks are not expected."""
    found = _ideal_sets(blocks, most)
    return None if found is None else Ideals(_unpack(found, blocks.num_blocks), True)


def _ideal_sets(blocks: Blocks, most: int) -> set[int] | None:
    """The ideals of the blocks that are not free, as bits."""
    before = [0] * blocks.num_blocks
    for a, b in blocks.edges:
        before[b] |= 1 << a
    after: list[list[int]] = [[] for _ in before]
    for a, b in blocks.edges:
        after[a].append(b)
    found = {0}
    free = set(blocks.free)
    level = {0: [b for b, need in enumerate(before) if not need and b not in free]}
    while level:
        following: dict[int, list[int]] = {}
        for ideal, available in level.items():
            for b in available:
                larger = ideal | 1 << b
                if larger not in following:
                    more = [c for c in after[b] if before[c] & ~larger == 0]
                    following[larger] = [c for c in available if c != b] + more
        found.update(following)
        if len(found) > most:
            return None
        level = following
    return found


def windows_of(blocks: Blocks) -> dict[int, frozenset[int]]:
    """For each free block the blocks that are not free and exchange outputs with it.

    One that only exchanges with other free blocks has their windows.
    """
    free, ties = set(blocks.free), {f: set[int]() for f in blocks.free}
    for ends, _ in blocks.bundles:
        for f in ends & free:
            ties[f] |= ends - {f}
    windows = {f: ends - free for f, ends in ties.items()}
    while empty := [f for f, window in windows.items() if not window]:
        found = {f: set().union(*(windows[g] for g in ties[f] & free)) for f in empty}
        if not any(found.values()):
            break
        windows |= found
    return {f: frozenset(window) for f, window in windows.items()}


def free_ideals(blocks: Blocks, most: int) -> Ideals | None:
    """Every ideal with every choice of the free blocks."""
    plain = _ideal_sets(blocks, most)
    if plain is None or len(plain) << len(blocks.free) > most:
        return None
    found = list(plain)
    for f in blocks.free:
        found += [ideal | 1 << f for ideal in found]
    return Ideals(_unpack(set(found), blocks.num_blocks), True)


def window_ideals(blocks: Blocks, most: int) -> Ideals | None:
    """Every ideal with every choice of the free blocks whose window it has begun and not finished."""
    plain = _ideal_sets(blocks, most)
    if plain is None:
        return None
    windows = [(1 << f, sum(1 << b for b in window)) for f, window in windows_of(blocks).items()]
    found: set[int] = set()
    for ideal in plain:
        extended = [ideal]
        for bit, window in windows:
            if ideal & window == window:
                extended = [i | bit for i in extended]
            elif ideal & window:
                extended += [i | bit for i in extended]
        found.update(extended)
        if len(found) > most:
            return None
    return Ideals(_unpack(found, blocks.num_blocks), True)


def chain_ideals(blocks: Blocks, orders: Iterable[list[int]]) -> Ideals:
    """The prefixes of some topological orders."""
    found = {0}
    for order in orders:
        ideal = 0
        for b in order:
            ideal |= 1 << b
            found.add(ideal)
    return Ideals(_unpack(found, blocks.num_blocks), False)


def _unpack(ideals: set[int], width: int) -> BoolArray:
    num_bytes = max(1, (width + 7) // 8)
    packed = np.frombuffer(
        b"".join(i.to_bytes(num_bytes, "little") for i in sorted(ideals, key=int.bit_count)),
        dtype=np.uint8,
    ).reshape(len(ideals), num_bytes)
    return np.unpackbits(packed, axis=1, bitorder="little")[:, :width].astype(np.bool_)


class Transfers:
    """Transfer cost of J - I for many pairs at a time."""

    def __init__(self, blocks: Blocks, member: BoolArray) -> None:
        incidence = np.zeros((blocks.num_blocks, len(blocks.bundles)), dtype=np.float32)
        for q, (ends, _) in enumerate(blocks.bundles):
            incidence[list(ends), q] = 1.0
        cost = np.array([cost for _, cost in blocks.bundles])
        count = product(member.astype(np.float32), incidence)
        whole = incidence.sum(axis=0)
        self._total = float(cost.sum())
        self._inside = (count == whole) * cost
        self._disjoint = (count == 0).astype(np.float64)
        # One column per (bundle, count): pairs agree on a bundle where both have a one.
        levels = int(whole.max(initial=0.0)) + 1
        columns, weighted = [np.zeros((len(member), 0))], [np.zeros((len(member), 0))]
        for level in range(levels):
            reaching = whole >= level
            same = (count[:, reaching] == level).astype(np.float64)
            columns.append(same)
            weighted.append(same * cost[reaching])
        self._same = np.concatenate(columns, axis=1)
        self._weighted = np.concatenate(weighted, axis=1)

    def between(self, larger: slice, smaller: npt.NDArray[np.intp]) -> FloatArray:
        """`[j, i]`: cost of what enters or leaves larger j less smaller i."""
        inside = product(self._inside[larger], self._disjoint[smaller].T)
        outside = product(self._weighted[larger], self._same[smaller].T)
        moved: FloatArray = np.maximum(0.0, self._total - inside - outside)
        return moved


def best_split(
    blocks: Blocks,
    ideals: Ideals,
    *,
    num_accelerators: int,
    num_cpu_pools: int,
    memory_limit: float,
    cutoff: float = np.inf,
    should_stop: Callable[[], bool] = lambda: False,
    relaxed: bool = False,
) -> Split | None:
    """The split of least busiest load whose ideals are among the given ones.

    None if no split below `cutoff` exists, or when told to stop. If `relaxed`, the load is a lower bound
    for answers that put free blocks anywhere.
    """
    finite = np.where(np.isfinite(blocks.accelerator), blocks.accelerator, 0.0)
    cpu = blocks.cpu
    if np.isfinite(cutoff):
        # What is above the cutoff anyway must not drown smaller amounts in sums.
        finite, cpu = np.minimum(finite, 2.0 * cutoff), np.minimum(cpu, 2.0 * cutoff)
    # Ideals of one batch should have similar work, so that few smaller ones are near all of them.
    certain, certain_cpu = finite.copy(), cpu.copy()
    if relaxed:
        # A device may go without these.
        certain[list(blocks.free)] = certain_cpu[list(blocks.free)] = 0.0
    order = np.lexsort((product(ideals.member, certain), ideals.member.sum(axis=1)))
    member = ideals.member[order]
    count = len(member)
    barred = ~np.isfinite(blocks.accelerator)
    sums: dict[str, FloatArray] = {
        "accelerator": product(member, finite),
        "cpu": product(member, cpu),
        "size": product(member, blocks.size),
        "barred": product(member, barred.astype(np.float64)),
    }
    amounts_of = {"cpu": cpu, "size": blocks.size, "barred": barred}
    optional = blocks.optional if relaxed and blocks.optional.any() else None
    if optional is not None:
        amounts_of["optional"] = optional
        sums["optional"] = product(member, optional)
    work, cpu_work = product(member, certain), product(member, certain_cpu)
    if should_stop():
        return None
    elsewhere = Elsewhere(blocks, windows_of(blocks), member) if relaxed and blocks.free else None
    outside = ~member
    transfers = Transfers(blocks, member)
    shape = (num_accelerators + 1, num_cpu_pools + 1, count)
    value = np.full(shape, np.inf)
    value[:, :, 0] = 0.0
    origin = np.full((*shape, 2), -1, dtype=np.int64)
    sizes = member.sum(axis=1)
    room = memory_limit * (1 + 1e-12)
    starts = np.searchsorted(sizes, np.arange(1, blocks.num_blocks + 2))
    for begin, end in itertools.pairwise(starts):
        for first in range(begin, end, _BATCH):
            if should_stop():
                return None
            here = slice(first, min(first + _BATCH, end))
            near = work[:begin] > work[here].min() - cutoff
            near |= cpu_work[:begin] > cpu_work[here].min() - cutoff
            smaller = np.flatnonzero(near)
            if not smaller.size:
                continue
            extra = product(member[smaller].astype(np.float32), outside[here].T.astype(np.float32))
            contained = (extra == 0).T
            gained = {key: total[here][:, None] - total[smaller][None, :] for key, total in sums.items()}
            on_accelerator = gained["accelerator"] + transfers.between(here, smaller)
            if elsewhere is not None:
                on_accelerator -= elsewhere.saving(here, smaller)
                for key, amounts in amounts_of.items():
                    gained[key] -= elsewhere.given_up(amounts, here, smaller)
            if optional is not None:
                missing = np.maximum(0.0, gained["size"] + gained["optional"] - room)
                on_accelerator += blocks.price * np.minimum(missing, gained["optional"])
            fits = contained & (gained["size"] <= room) & (gained["barred"] < 0.5)
            on_accelerator[~fits | (on_accelerator >= cutoff)] = np.inf
            on_cpu = np.where(contained & (gained["cpu"] < cutoff), gained["cpu"], np.inf)
            _relax(value, origin, here, smaller, on_accelerator, on_cpu)
    if not np.isfinite(value[-1, -1, -1]):
        return None
    return Split(float(value[-1, -1, -1]), _trace(member, origin, value.shape))


def _relax(
    value: FloatArray,
    origin: npt.NDArray[np.int64],
    here: slice,
    smaller: npt.NDArray[np.intp],
    on_accelerator: FloatArray,
    on_cpu: FloatArray,
) -> None:
    rows = np.arange(on_accelerator.shape[0])
    for a in range(value.shape[0]):
        for c in range(value.shape[1]):
            for kind, load, (pa, pc) in (
                (0, on_accelerator, (a - 1, c)),
                (1, on_cpu, (a, c - 1)),
            ):
                if pa < 0 or pc < 0:
                    continue
                worst = np.maximum(load, value[pa, pc, smaller][None, :])
                best = worst.argmin(axis=1)
                found = worst[rows, best]
                better = found < value[a, c, here]
                value[a, c, here][better] = found[better]
                origin[a, c, here][better] = np.stack(
                    [smaller[best[better]], np.full(int(better.sum()), kind)], axis=1
                )


def _trace(
    member: BoolArray, origin: npt.NDArray[np.int64], shape: tuple[int, ...]
) -> tuple[tuple[bool, tuple[int, ...]], ...]:
    a, c, j = shape[0] - 1, shape[1] - 1, shape[2] - 1
    parts: list[tuple[bool, tuple[int, ...]]] = []
    while j:
        i, kind = map(int, origin[a, c, j])
        parts.append((kind == 1, tuple(np.flatnonzero(member[j] & ~member[i]).tolist())))
        a, c, j = (a, c - 1, i) if kind == 1 else (a - 1, c, i)
    return tuple(reversed(parts))
