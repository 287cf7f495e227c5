"""Lower bounds on a placement's latency: along paths, and over ideals.

*Paths.* Along a path an accelerator's items are consecutive (its set is contiguous), and it takes at
least the work of all that contiguity makes it hold with them (`place_reach`) plus the transfers over the
path's edges at both ends. The best way to do just one path is a small dynamic programme over its prefixes
and the accelerators used.

*Ideals.* h[I, a] is a lower bound on the time at which all of
ideal I can be done if at most a accelerators hold part of it. Take the last, in an order in which they
run, of the accelerators and CPU items that hold part of I. Its part P is closed under successors
in I, so I - P is an ideal; it starts when D, what P waits for in I - P, is done, and D is an ideal as
well. Let C(P) be what an accelerator with one of P's items must hold, for each of them: where C(P) has
items of I - P, there is no such part. With A(P) the work of P and C(P) and the transfers of outputs of
I - P that P wants,

    h[I, a] = min( min over P of        max(h[I - P, a - 1], h[D, a - 1] + A(P)),
                   min over maximal v   max(h[I - v, a], h[before v, a] + CPU time of v) ).

Both terms may assume different answers, and an accelerator that reaches beyond I only counts its part and
what that entails: that is what makes it a bound and not a latency. Classes count through C(P) alone. If I is
all that the first accelerators and items do, whole sets of theirs, then so is I - P, C(P) is part of P, and
P pays for its transfers out of I as well; the bound for such ideals is kept apart, and the bound of
everything is one of these. On the same way down, g[I, a] is the least time in which ideal I can be done one
piece after the other, with all transfers in and out:

    g[I, a] = min( min over P of g[I - P, a - 1] + load of P,
                   min over v of g[I - v, a] + CPU time of v ).

CPUs really run side by side, so the latency of the answer is at most g.
"""

import contextlib
import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from graphpar.partition.clock import OutOfTimeError, ShouldStop, never
from graphpar.partition.jit import COMPILED, compiled_exactly
from graphpar.partition.place_graph import FloatArray, IntArray
from graphpar.partition.place_reach import Held, Reach, bits
from graphpar.partition.place_units import Devices, Units

WordArray = npt.NDArray[np.uint64]

_NUM_PATHS = 24
"""Long paths looked at."""

_PLACES_PER_LOOK = 16
"""Places of a path between two looks at the clock."""

_MOST_IDEALS = 12_000
"""Ideals up to which the relaxation over them takes some seconds."""

_AT_A_TIME = 64
"""Ideals between two looks at the clock."""


def path_bound(reach: Reach, should_stop: ShouldStop = never) -> float:
    """The best latency that some one path allows, of as many as there is time for."""
    bound = _least_bound(reach.units)
    with contextlib.suppress(OutOfTimeError):
        for path in long_paths(reach.units):
            bound = max(bound, _one_path_bound(reach, path, should_stop))
    return bound


def _least_bound(units: Units) -> float:
    """The longest path, each item where it is fastest and nothing moved: takes no time."""
    work = np.where(np.isfinite(units.accelerator[list(units.class_of)]), units.work, np.inf)
    fastest = np.minimum(units.cpu, work if units.num_accelerators else np.inf)
    length: list[float] = []
    for i, before in enumerate(units.before):
        length.append(float(fastest[i]) + max((length[j] for j in before), default=0.0))
    return max(length, default=0.0)


def _one_path_bound(reach: Reach, path: list[int], should_stop: ShouldStop) -> float:
    units = reach.units
    # Transfers count only where a class ends with the set, so the ends are on different devices.
    steps = [0.0, *(units.sends[edge] for edge in itertools.pairwise(path)), 0.0]
    place = {item: k for k, item in enumerate(path, start=1)}
    on_path = sum(1 << item for item in path)
    least = np.full((len(path) + 1, units.num_accelerators + 1), np.inf)
    least[0] = 0.0
    for i, item in enumerate(path, start=1):
        if i % _PLACES_PER_LOOK == 0 and should_stop():
            raise OutOfTimeError
        least[i] = least[i - 1] + units.cpu[item]
        held, begin = Held(reach), i
        later = sum(1 << late for late in path[i:])
        for j in range(i, 0, -1):
            earlier = held.items
            held.take([units.class_of[path[j - 1]]])
            if held.items & later or not math.isfinite(held.work):
                break
            if held.size > units.memory_limit * (1 + 1e-12):
                break
            begin = min([begin, *(place[k] for k in bits(held.items & ~earlier & on_path))])
            if begin == j:
                there = least[j - 1, :-1] + held.work + steps[j - 1] + steps[i]
                least[i, 1:] = np.minimum(least[i, 1:], there)
    return float(least[-1].min())


def long_paths(units: Units) -> list[list[int]]:
    """Paths that between them visit much of the work: longest first, then least seen."""
    weight = np.where(np.isfinite(units.cpu), units.cpu, 0.0) + units.work
    paths: list[list[int]] = []
    for _ in range(_NUM_PATHS):
        length: list[float] = []
        for i, before in enumerate(units.before):
            length.append(float(weight[i]) + max((length[j] for j in before), default=0.0))
        item = max(range(len(length)), key=lambda i: length[i])
        path = [item]
        while units.before[item]:
            item = max(units.before[item], key=lambda j: length[j])
            path.append(item)
        if path[::-1] in paths:
            break
        paths.append(path[::-1])
        weight[path] *= 0.5
    return paths


@dataclass(frozen=True)
class IdealWalk:
    """A lower bound on every latency, at most a known one, and the best serial answer, if any."""

    bound: float = 0.0
    devices: Devices | None = None


def walk_ideals(reach: Reach, best: float, should_stop: ShouldStop) -> IdealWalk:
    """Bound latencies and find the best serial schedule, both over all ideals; `best` is a known latency.

    Needs compiled loops and not too many ideals; else there is nothing.
    """
    units = reach.units
    if not COMPILED or not math.isfinite(best):
        return IdealWalk()
    found = _ideals(units, should_stop)
    if found is None:
        return IdealWalk()
    ideals, *arguments = _arrays(reach, found)
    least = np.full((len(found), units.num_accelerators + 1), best)
    serial = np.full(least.shape, np.inf)
    least[0] = serial[0] = 0.0
    whole, past, on_cpu = least.copy(), least.copy(), least.copy()
    origin = np.full((*least.shape, 2), -1, np.int64)
    fill: Any = relax
    slots = np.full(1 << (3 * len(found)).bit_length(), -1, np.int64)
    fill_slots(ideals, slots)
    scratch = _Scratch(len(found), ideals.shape[1])
    memory = units.memory_limit * (1 + 1e-12)
    for begin in range(1, len(found), _AT_A_TIME):
        if should_stop():
            return IdealWalk()
        end = min(begin + _AT_A_TIME, len(found))
        tables = (least, whole, on_cpu, past, serial, origin, slots, ideals, *arguments)
        fill(begin, end, *tables, memory, best, *scratch.arrays)
    devices = _follow(found, serial, origin, units)
    return IdealWalk(float(whole[-1, -1]) * (1 - 1e-9), devices)


def _arrays(reach: Reach, found: list[int]) -> tuple[Any, ...]:
    """What `relax` needs to know of items and ideals, in its order."""
    units = reach.units
    number = {ideal: k for k, ideal in enumerate(found)}
    count, width = units.num_items, 1 + units.num_items // 64
    ancestors = [0] * count
    for i, before in enumerate(units.before):
        for j in before:
            ancestors[i] |= ancestors[j] | 1 << j
    closed = [0] * units.num_classes
    for c in range(units.num_classes):
        held = Held(reach)
        held.take([c])
        closed[c] = held.items
    return (
        _words(found, width),
        _words([closed[c] for c in units.class_of], width),
        _words(ancestors, width),
        _words([sum(1 << j for j in before) for before in units.before], width),
        _words([sum(1 << j for j in after) for after in units.after], width),
        *_steps(units, found, number),
        np.array([number[mask] for mask in ancestors], np.int64),
        *(array.astype(np.float64) for array in _by_item(units)),
    )


def _follow(found: list[int], serial: FloatArray, origin: IntArray, units: Units) -> Devices | None:
    """The devices of the best serial schedule, in which classes on the CPUs may be done in parts."""
    a, k = int(serial[-1].argmin()), len(found) - 1
    if not math.isfinite(serial[k, a]):
        return None
    devices = [0] * units.num_classes
    while k:
        smaller, on_cpu = map(int, origin[k, a])
        for i in bits(found[k] & ~found[smaller]):
            devices[units.class_of[i]] = 0 if on_cpu else a
        k, a = smaller, a if on_cpu else a - 1
    return devices


class _Scratch:
    """What is known of each smaller ideal on the way down from one."""

    def __init__(self, count: int, width: int) -> None:
        self.arrays = (
            np.full(count, -1, np.int64),
            np.zeros((count, width), np.uint64),
            np.zeros((count, width), np.uint64),
            np.zeros((count, width), np.uint64),
            np.zeros((count, 5)),
            np.zeros(64 * width * count, np.int64),
        )


def _by_item(units: Units) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
    """Accelerator time, cheapest transfer, CPU time and memory of each item."""
    sent = np.full(units.num_items, np.inf)
    for (j, _), cost in units.sends.items():
        sent[j] = min(sent[j], cost)
    possible = np.isfinite(units.accelerator[list(units.class_of)])
    return np.where(possible, units.work, np.inf), sent, units.cpu, units.held


def _ideals(units: Units, should_stop: ShouldStop) -> list[int] | None:
    """All ideals as bits, smaller ones first, or None where there are too many."""
    need = [sum(1 << j for j in before) for before in units.before]
    levels = [{0}]
    total = 1
    while levels[-1]:
        following = set()
        for ideal in levels[-1]:
            for i, mask in enumerate(need):
                if not ideal >> i & 1 and mask & ~ideal == 0:
                    following.add(ideal | 1 << i)
        total += len(following)
        if total > _MOST_IDEALS or should_stop():
            return None
        levels.append(following)
    return [ideal for level in levels for ideal in level]


def _steps(units: Units, found: list[int], number: dict[int, int]) -> tuple[IntArray, IntArray, IntArray]:
    """For each ideal its maximal items and the ideals without them: where they begin, items, ideals."""
    later = [sum(1 << j for j in after) for after in units.after]
    start, items, smaller = [0], [], []
    for ideal in found:
        for i, mask in enumerate(later):
            if ideal >> i & 1 and mask & ideal == 0:
                items.append(i)
                smaller.append(number[ideal ^ 1 << i])
        start.append(len(items))
    return np.array(start, np.int64), np.array(items, np.int64), np.array(smaller, np.int64)


def _words(masks: list[int], width: int) -> WordArray:
    rows = [[mask >> 64 * w & (2**64 - 1) for w in range(width)] for mask in masks]
    return np.array(rows, dtype=np.uint64).reshape(len(masks), width)


@compiled_exactly
def slot_of(words: WordArray, num_slots: int) -> np.int64:
    """Where the search for a set of items begins."""
    mixed = np.uint64(0)
    for word in words:
        mixed = (mixed ^ word) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
    return np.int64(mixed & np.uint64(num_slots - 1))


@compiled_exactly
def fill_slots(ideals: WordArray, slots: IntArray) -> None:
    """Put every ideal's number into a table with open addressing."""
    for k in range(len(ideals)):
        at = slot_of(ideals[k], len(slots))
        while slots[at] >= 0:
            at = (at + 1) & (len(slots) - 1)
        slots[at] = k


@compiled_exactly
def find(words: WordArray, ideals: WordArray, slots: IntArray) -> np.int64:
    """The number of an ideal."""
    at = slot_of(words, len(slots))
    while True:
        k = np.int64(slots[at])
        same = True
        for w in range(len(words)):
            if ideals[k, w] != words[w]:
                same = False
                break
        if same:
            return k
        at = (at + 1) & (len(slots) - 1)


@compiled_exactly
def begin_last(
    whole: FloatArray,
    on_cpu: FloatArray,
    past: FloatArray,
    least: FloatArray,
    below: int,
    inner: int,
    a: int,
    load: float,
) -> float:
    """When everything is done, at least, if the last to be done waits for `inner` and leaves `below`."""
    done = whole[below, a] + load
    if inner == below:
        return done
    done = min(done, max(on_cpu[below, a], max(least[inner, a], past[inner, a]) + load))
    if a > 0:
        start = max(least[inner, a - 1], past[inner, a - 1])
        done = min(done, max(whole[below, a], start + load))
    return done


@compiled_exactly
def relax(
    begin: int,
    end: int,
    least: FloatArray,
    whole: FloatArray,
    on_cpu: FloatArray,
    past: FloatArray,
    serial: FloatArray,
    origin: IntArray,
    slots: IntArray,
    ideals: WordArray,
    closed: WordArray,
    ancestors: WordArray,
    before: WordArray,
    after: WordArray,
    step_start: IntArray,
    step_item: IntArray,
    step_to: IntArray,
    before_ideal: IntArray,
    work: FloatArray,
    sent: FloatArray,
    cpu: FloatArray,
    size: FloatArray,
    memory: float,
    best: float,
    stamp: IntArray,
    holds: WordArray,
    waits: WordArray,
    wanted: WordArray,
    sums: FloatArray,
    stack: IntArray,
) -> None:
    """Fill `least`, `whole`, `serial` and where that came from for ideals `begin` to `end - 1`, in order.

    Of each smaller ideal on the way down: `holds` is P and C(P), `waits` is D, `wanted` the items outside
    P whose outputs P wants, `sums` the work of `holds`, the transfers in, its memory, the transfers out.
    """
    num, width, one = least.shape[1], ideals.shape[1], np.uint64(1)
    for top in range(begin, end):
        for s in range(step_start[top], step_start[top + 1]):
            v, below = step_item[s], step_to[s]
            for a in range(num):
                done = max(least[below, a], least[before_ideal[v], a] + cpu[v])
                least[top, a] = min(least[top, a], done)
                start = begin_last(whole, on_cpu, past, least, below, before_ideal[v], a, cpu[v])
                on_cpu[top, a] = min(on_cpu[top, a], start)
                whole[top, a] = min(whole[top, a], start)
                if serial[below, a] + cpu[v] < serial[top, a]:
                    serial[top, a] = serial[below, a] + cpu[v]
                    origin[top, a, 0], origin[top, a, 1] = below, 1
        stamp[top] = top
        holds[top] = np.uint64(0)
        waits[top] = np.uint64(0)
        wanted[top] = np.uint64(0)
        sums[top] = 0.0
        stack[0], height = top, 1
        while height > 0:
            height -= 1
            here = stack[height]
            for s in range(step_start[here], step_start[here + 1]):
                v, below = step_item[s], step_to[s]
                if stamp[below] == top:
                    continue
                busy, held = sums[here, 0], sums[here, 2]
                within, entire = True, True
                for w in range(width):
                    fresh = closed[v, w] & ~holds[here, w]
                    holds[below, w] = holds[here, w] | closed[v, w]
                    within &= holds[below, w] & ideals[below, w] == 0
                    entire &= holds[below, w] & ~ideals[top, w] == 0
                    place = w * 64
                    while fresh:
                        if fresh & one:
                            busy += work[place]
                            held += size[place]
                        fresh >>= one
                        place += 1
                if busy >= best or held > memory:
                    continue
                stamp[below] = top
                moved, leaving, last = sums[here, 1], sums[here, 3], sums[here, 4]
                outside, inside = False, False
                for w in range(width):
                    outside |= after[v, w] & ~ideals[top, w] != 0
                    inside |= after[v, w] & ideals[top, w] != 0
                if outside:
                    leaving += sent[v]
                    if not inside:
                        last += sent[v]
                word, bit = v // 64, one << np.uint64(v % 64)
                if wanted[here, word] & bit:
                    moved -= sent[v]
                for w in range(width):
                    fresh = before[v, w] & ~wanted[here, w]
                    wanted[below, w] = wanted[here, w] | before[v, w]
                    waits[below, w] = waits[here, w] | ancestors[v, w]
                    place = w * 64
                    while fresh:
                        if fresh & one:
                            moved += sent[place]
                        fresh >>= one
                        place += 1
                wanted[below, word] &= ~bit
                waits[below, word] &= ~bit
                sums[below, 0], sums[below, 1] = busy, moved
                sums[below, 2], sums[below, 3], sums[below, 4] = held, leaving, last
                stack[height] = below
                height += 1
                if not within:
                    continue
                inner = find(waits[below], ideals, slots)
                for a in range(1, num):
                    done = max(least[below, a - 1], least[inner, a - 1] + busy + moved + last)
                    least[top, a] = min(least[top, a], done)
                    if not entire:
                        continue
                    load = busy + moved + leaving
                    done = begin_last(whole, on_cpu, past, least, below, inner, a - 1, load)
                    whole[top, a] = min(whole[top, a], done)
                    if serial[below, a - 1] + busy + moved + leaving < serial[top, a]:
                        serial[top, a] = serial[below, a - 1] + busy + moved + leaving
                        origin[top, a, 0], origin[top, a, 1] = below, 0
        for a in range(1, num):
            least[top, a] = min(least[top, a], least[top, a - 1])
            whole[top, a] = min(whole[top, a], whole[top, a - 1])
        stack[0], height = top, 1
        while height > 0:
            height -= 1
            here, sooner = stack[height], False
            for a in range(num):
                if whole[top, a] < past[here, a]:
                    past[here, a] = whole[top, a]
                    sooner = True
            # What is part of an ideal is past no later than that, so there is nothing to tell it.
            if sooner:
                for s in range(step_start[here], step_start[here + 1]):
                    stack[height] = step_to[s]
                    height += 1
