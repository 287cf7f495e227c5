"""The best contiguous split over all ideals, one device at a time; `ideals` says what it is.

From each ideal a way leads down to every smaller one, block by block, as long as the blocks left out
could still be one device's work. What they take and exchange follows the way: of a bundle that the next
block belongs to, only its other blocks count. So a pair of ideals takes the time of a few additions,
and pairs that are too far apart take none.
"""

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from graphpar.partition.jit import compiled_exactly
from graphpar.partition.placement.graph import Blocks, FloatArray, IntArray
from graphpar.partition.placement.ideals import Split
from graphpar.partition.placement.steps import (
    AllIdeals,
    Steps,
    WordArray,
    all_ideals_of,
    has,
    lists_of,
    words_of,
)

_AT_A_TIME = 64
"""Ideals between two looks at the clock, for each thread."""


class Sets(NamedTuple):
    """Blocks, and their ideals from small to large.

    Attributes:
        ideals, steps: See `steps`.
        bundle_start, bundle: For each block the bundles that it belongs to.
        end_start, end: For each bundle its blocks.
        cost: Of each bundle.
        work, cpu, size: Accelerator time, CPU time and memory of each block.
        room: What an accelerator holds.
        cutoff: Loads from which a split is of no use.
    """

    ideals: WordArray
    steps: Steps
    bundle_start: IntArray
    bundle: IntArray
    end_start: IntArray
    end: IntArray
    cost: FloatArray
    work: FloatArray
    cpu: FloatArray
    size: FloatArray
    room: float
    cutoff: float


class Found(NamedTuple):
    """For each ideal the least busiest load, by accelerators and CPU pools, and where that came from.

    Attributes:
        value: Infinite where there is none below the cutoff.
        origin: The smaller ideal, and 1 if the rest is on the CPUs.
    """

    value: FloatArray
    origin: IntArray


class Way(NamedTuple):
    """What is known of each smaller ideal on the way down from one.

    Attributes:
        stamp: The ideal that the way came from.
        sums: Work, CPU time, memory and transfers of what was left out.
        stack: Ideals to go on from.
    """

    stamp: IntArray
    sums: FloatArray
    stack: IntArray


def ideals_of(blocks: Blocks, most: int, should_stop: Callable[[], bool]) -> AllIdeals | None:
    """Every ideal of blocks none of which is free, or None where there are more than `most`."""
    before = [0] * blocks.num_blocks
    for a, b in blocks.edges:
        before[b] |= 1 << a
    return all_ideals_of(before, most, should_stop)


def best_split_of_all(
    blocks: Blocks,
    every: AllIdeals,
    *,
    num_accelerators: int,
    num_cpu_pools: int,
    memory_limit: float,
    cutoff: float,
    should_stop: Callable[[], bool],
    threads: int = 1,
) -> tuple[Split | None, bool]:
    """The split of least busiest load below `cutoff`, if any, and whether there was time to look."""
    sets = _sets(blocks, every, memory_limit, cutoff)
    shape = (len(every.found), num_accelerators + 1, num_cpu_pools + 1)
    found = Found(np.full(shape, np.inf), np.full((*shape, 2), -1, np.int64))
    found.value[0] = 0.0
    ways = [_way(len(every.found)) for _ in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        for first, last in itertools.pairwise(every.levels[1:]):
            for begin in range(first, last, _AT_A_TIME * threads):
                if should_stop():
                    return None, False
                end = min(begin + _AT_A_TIME * threads, last)
                # None of one size is part of another, so they may be looked at in any order.
                cuts = np.linspace(begin, end, threads + 1).astype(int).tolist()
                waiting = [
                    pool.submit(relax_splits, a, b, sets, found, way)
                    for a, b, way in zip(cuts[1:-1], cuts[2:], ways[1:], strict=True)
                ]
                relax_splits(cuts[0], cuts[1], sets, found, ways[0])
                for result in waiting:
                    result.result()
    load = float(found.value[-1, -1, -1])
    return (Split(load, _trace(every, found)) if np.isfinite(load) else None), True


def _sets(blocks: Blocks, every: AllIdeals, memory_limit: float, cutoff: float) -> Sets:
    bundles: list[list[int]] = [[] for _ in range(blocks.num_blocks)]
    for q, (ends, _) in enumerate(blocks.bundles):
        for b in ends:
            bundles[b].append(q)
    return Sets(
        words_of(every.found, blocks.num_blocks),
        every.steps,
        *lists_of(bundles),
        *lists_of([sorted(ends) for ends, _ in blocks.bundles]),
        np.array([cost for _, cost in blocks.bundles], np.float64),
        blocks.accelerator.astype(np.float64),
        blocks.cpu.astype(np.float64),
        blocks.size.astype(np.float64),
        float(memory_limit * (1 + 1e-12)),
        float(cutoff),
    )


def _way(count: int) -> Way:
    return Way(np.full(count, -1, np.int64), np.zeros((count, 4)), np.zeros(count, np.int64))


def _trace(every: AllIdeals, found: Found) -> tuple[tuple[bool, tuple[int, ...]], ...]:
    k = len(every.found) - 1
    a, c = found.value.shape[1] - 1, found.value.shape[2] - 1
    parts: list[tuple[bool, tuple[int, ...]]] = []
    while k:
        smaller, kind = map(int, found.origin[k, a, c])
        rest = every.found[k] & ~every.found[smaller]
        parts.append((kind == 1, tuple(b for b in range(rest.bit_length()) if rest >> b & 1)))
        a, c, k = (a, c - 1, smaller) if kind == 1 else (a - 1, c, smaller)
    return tuple(reversed(parts))


@compiled_exactly
def exchanged(sets: Sets, top: int, here: int, v: int) -> float:
    """What transfers change when block v joins the blocks of ideal `top` that are not in `here`."""
    change = 0.0
    for k in range(sets.bundle_start[v], sets.bundle_start[v + 1]):
        q = sets.bundle[k]
        held = others = 0
        for j in range(sets.end_start[q], sets.end_start[q + 1]):
            b = sets.end[j]
            if b != v:
                others += 1
                if has(sets.ideals, top, b) and not has(sets.ideals, here, b):
                    held += 1
        if others > 0 and held == 0:
            change += sets.cost[q]
        elif held == others:
            change -= sets.cost[q]
    return change


@compiled_exactly
def relax_splits(begin: int, end: int, sets: Sets, found: Found, way: Way) -> None:
    """Fill in ideals `begin` to `end - 1` from all smaller ones."""
    value, origin = found
    stamp, sums, stack = way
    num_a, num_c, cutoff = value.shape[1], value.shape[2], sets.cutoff
    for top in range(begin, end):
        stamp[top] = top
        sums[top] = 0.0
        stack[0], height = top, 1
        while height > 0:
            height -= 1
            here = stack[height]
            for s in range(sets.steps.start[here], sets.steps.start[here + 1]):
                v, below = sets.steps.item[s], sets.steps.to[s]
                if stamp[below] == top:
                    continue
                busy, cpu = sums[here, 0] + sets.work[v], sums[here, 1] + sets.cpu[v]
                held = sums[here, 2] + sets.size[v]
                fits = num_a > 1 and busy < cutoff and held <= sets.room
                if not fits and (num_c < 2 or cpu >= cutoff):
                    continue
                stamp[below] = top
                moved = sums[here, 3] + exchanged(sets, top, here, v)
                sums[below, 0], sums[below, 1] = busy, cpu
                sums[below, 2], sums[below, 3] = held, moved
                stack[height] = below
                height += 1
                if value[below, num_a - 1, num_c - 1] >= cutoff:
                    continue
                load = busy + max(0.0, moved)
                for c in range(num_c):
                    for a in range(num_a):
                        if a > 0 and fits and load < cutoff:
                            worst = max(load, value[below, a - 1, c])
                            if worst < value[top, a, c]:
                                value[top, a, c] = worst
                                origin[top, a, c, 0], origin[top, a, c, 1] = below, 0
                        if c > 0 and cpu < cutoff:
                            worst = max(cpu, value[below, a, c - 1])
                            if worst < value[top, a, c]:
                                value[top, a, c] = worst
                                origin[top, a, c, 0], origin[top, a, c, 1] = below, 1
