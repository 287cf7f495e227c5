"""Compiled loops over all ideals of a placement problem; `latency_bound` says what they compute.

`relax` is one function: cut into five it took four times as long, inlined or not, as arrays in tuples are
counted again wherever a part begins.
"""

from typing import NamedTuple

import numpy as np

from graphpar.partition.jit import compiled_exactly
from graphpar.partition.placement.graph import FloatArray, IntArray
from graphpar.partition.placement.steps import Steps, WordArray, has


class Order(NamedTuple):
    """Items, and their ideals from small to large.

    Attributes:
        ideals: Each ideal's items.
        slots: Ideals by their items, see `find`.
        coupled: Whether some class has several items.
        closed: For each item what an accelerator that takes it must hold.
        ancestors: For each item what must be done before.
        before_start, before_item, after_start, after_item: For each item what it waits for, and what
            waits for it: where that begins, and the items.
        steps: The steps between ideals.
        before_ideal: For each item its ancestors as an ideal.
        work, sent, cpu, size: Accelerator time, cheapest transfer, CPU time and memory of each item.
        memory: What an accelerator holds.
        best: A latency that is known.
    """

    ideals: WordArray
    slots: IntArray
    coupled: bool
    closed: WordArray
    ancestors: WordArray
    before_start: IntArray
    before_item: IntArray
    after_start: IntArray
    after_item: IntArray
    steps: Steps
    before_ideal: IntArray
    work: FloatArray
    sent: FloatArray
    cpu: FloatArray
    size: FloatArray
    memory: float
    best: float


class Times(NamedTuple):
    """Bounds on when ideals are done, by ideal and the most accelerators that hold part of it.

    Attributes:
        least: h of the text.
        whole: The same for ideals that hold whole sets only.
        on_cpu: The same if, besides, something on the CPUs comes last.
        past: The least `whole` of any ideal so far that holds this one.
        serial, origin: g of the text, and the smaller ideal and whether a CPU step led from there.
    """

    least: FloatArray
    whole: FloatArray
    on_cpu: FloatArray
    past: FloatArray
    serial: FloatArray
    origin: IntArray


class Scratch(NamedTuple):
    """What is known of each smaller ideal on the way down from one (I - P in the text).

    Attributes:
        stamp: The ideal that the way came from.
        holds: P with C(P).
        inner: The number of D.
        words: Room for an ideal to look up.
        sums: The work of `holds`, the transfers in, the memory of `holds`, the transfers out of I, and
            those of them that nobody in I wants.
        stack: Ideals to go on from.
    """

    stamp: IntArray
    holds: WordArray
    inner: IntArray
    words: WordArray
    sums: FloatArray
    stack: IntArray


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
def begin_last(times: Times, below: np.int64, inner: np.int64, a: int, load: float) -> np.float64:
    """When an ideal of whole sets is done, at least; its last waits for `inner` and leaves `below`."""
    done: np.float64 = times.whole[below, a] + load
    if inner == below:
        return done
    start = max(times.least[inner, a], times.past[inner, a])
    done = min(done, max(times.on_cpu[below, a], start + load))
    if a > 0:
        start = max(times.least[inner, a - 1], times.past[inner, a - 1])
        done = min(done, max(times.whole[below, a], start + load))
    return done


@compiled_exactly
def relax(begin: int, end: int, order: Order, times: Times, scratch: Scratch) -> None:
    """Fill in the times of ideals `begin` to `end - 1`, one after the other; `past` stays as it is."""
    least, whole, serial, origin = times.least, times.whole, times.serial, times.origin
    stamp, holds, inners, words, sums, stack = scratch
    ideals, best = order.ideals, order.best
    num, width, one = least.shape[1], ideals.shape[1], np.uint64(1)
    for top in range(begin, end):
        for s in range(order.steps.start[top], order.steps.start[top + 1]):
            v, below = order.steps.item[s], order.steps.to[s]
            for a in range(num):
                done = max(least[below, a], least[order.before_ideal[v], a] + order.cpu[v])
                least[top, a] = min(least[top, a], done)
                start = begin_last(times, below, order.before_ideal[v], a, order.cpu[v])
                times.on_cpu[top, a] = min(times.on_cpu[top, a], start)
                whole[top, a] = min(whole[top, a], start)
                if serial[below, a] + order.cpu[v] < serial[top, a]:
                    serial[top, a] = serial[below, a] + order.cpu[v]
                    origin[top, a, 0], origin[top, a, 1] = below, 1
        stamp[top] = top
        holds[top] = np.uint64(0)
        inners[top] = 0
        sums[top] = 0.0
        stack[0], height = top, 1 if num > 1 else 0
        while height > 0:
            height -= 1
            here = stack[height]
            for s in range(order.steps.start[here], order.steps.start[here + 1]):
                v, below = order.steps.item[s], order.steps.to[s]
                if stamp[below] == top:
                    continue
                busy, held = sums[here, 0] + order.work[v], sums[here, 2] + order.size[v]
                within, entire = True, True
                if order.coupled:
                    busy, held = sums[here, 0], sums[here, 2]
                    for w in range(width):
                        fresh = order.closed[v, w] & ~holds[here, w]
                        holds[below, w] = holds[here, w] | order.closed[v, w]
                        within &= holds[below, w] & ideals[below, w] == 0
                        entire &= holds[below, w] & ~ideals[top, w] == 0
                        place = w * 64
                        while fresh:
                            if fresh & one:
                                busy += order.work[place]
                                held += order.size[place]
                            fresh >>= one
                            place += 1
                # More work than this ends too late, and so does whatever has to come along.
                if busy >= min(best, max(whole[top, 1], serial[top, 1])) or held > order.memory:
                    continue
                stamp[below] = top
                moved, leaving, last = sums[here, 1], sums[here, 3], sums[here, 4]
                outside, inside = False, False
                for k in range(order.after_start[v], order.after_start[v + 1]):
                    if has(ideals, top, order.after_item[k]):
                        inside = True
                    else:
                        outside = True
                if outside:
                    leaving += order.sent[v]
                    if not inside:
                        last += order.sent[v]
                if inside:
                    moved -= order.sent[v]
                for k in range(order.before_start[v], order.before_start[v + 1]):
                    u = order.before_item[k]
                    wanted = False
                    for j in range(order.after_start[u], order.after_start[u + 1]):
                        x = order.after_item[j]
                        wanted |= x != v and has(ideals, top, x) and not has(ideals, below, x)
                    if not wanted:
                        moved += order.sent[u]
                # If D has v, then as a maximal item: what comes after v is taken already.
                past, inner = inners[here], np.int64(-1)
                for k in range(order.steps.start[past], order.steps.start[past + 1]):
                    if order.steps.item[k] == v:
                        inner = order.steps.to[k]
                        break
                if inner < 0 and past == 0:
                    inner = order.before_ideal[v]
                if inner < 0:
                    for w in range(width):
                        words[w] = ideals[past, w] | order.ancestors[v, w]
                    inner = find(words, ideals, order.slots)
                inners[below] = inner
                sums[below, 0], sums[below, 1] = busy, moved
                sums[below, 2], sums[below, 3], sums[below, 4] = held, leaving, last
                stack[height] = below
                height += 1
                if not within:
                    continue
                load = busy + moved + leaving
                for a in range(1, num):
                    done = least[inner, a - 1] + busy + moved + last
                    if done < least[top, a]:
                        least[top, a] = min(least[top, a], max(least[below, a - 1], done))
                    if not entire:
                        continue
                    if least[inner, a - 1] + load < whole[top, a]:
                        done = begin_last(times, below, inner, a - 1, load)
                        whole[top, a] = min(whole[top, a], done)
                    # What takes longer one piece after the other than side by side is no better.
                    if least[inner, a - 1] + load >= serial[top, a]:
                        continue
                    if serial[below, a - 1] + load < serial[top, a]:
                        serial[top, a] = serial[below, a - 1] + load
                        origin[top, a, 0], origin[top, a, 1] = below, 0
        for a in range(1, num):
            least[top, a] = min(least[top, a], least[top, a - 1])
            whole[top, a] = min(whole[top, a], whole[top, a - 1])


@compiled_exactly
def pass_on(begin: int, end: int, order: Order, times: Times, stack: IntArray) -> None:
    """Tell all that is part of ideals `begin` to `end - 1` when they are done."""
    whole, past, num = times.whole, times.past, times.past.shape[1]
    for top in range(begin, end):
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
                for s in range(order.steps.start[here], order.steps.start[here + 1]):
                    stack[height] = order.steps.to[s]
                    height += 1
