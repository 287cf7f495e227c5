"""A lower bound on a placement's latency, and a serial answer, over all ideals.

h[I, a] is a lower bound on the time at which all of ideal I can be done if at most a accelerators hold
part of it, and outputs of its maximal items leave their devices. Take the last, in an order in which
they run, of the accelerators and CPU items that hold part of I. Its part P is closed under successors
in I, so I - P is an ideal; it starts when D, what P waits for in I - P, is done, and D is an ideal as
well. The maximal items of either are maximal in I or wanted by P, on another device. Let C(P) be what
an accelerator with one of P's items must hold (`reach`), for each of them: where that has items
of I - P, there is no such part. With A(P) the work of P and C(P), the transfers of outputs of I - P
that P wants, and those of P's items that are maximal in I,

    h[I, a] = min( min over P of        max(h[I - P, a - 1], h[D, a - 1] + A(P)),
                   min over maximal v   max(h[I - v, a], h[before v, a] + CPU time of v) ).

Both terms may assume different answers, and an accelerator that reaches beyond I only counts its part
and what that entails: that is what makes it a bound and not a latency. Classes count through C(P)
alone.

*Whole sets.* If I is all that some accelerators and CPU items do, whole sets of theirs, then so is I -
P, C(P) is part of P, and P pays for all its transfers out of I. So is F, all that is done when P
starts: D <= F <= I - P. Let w[I, a] be the bound for such ideals, c[I, a] the same if a CPU item comes
last, and p[D, a] the least w[F, a] of any F that holds D. What I - P has and F does not is nothing, or
CPU items alone, or an accelerator's set among others. With B(P) the work and all transfers of P, it
ends no sooner than

    min( w[I - P, a - 1] + B(P),
         max(c[I - P, a - 1], p[D, a - 1] + B(P)),
         max(w[I - P, a - 1], p[D, a - 2] + B(P)) ),

and likewise for a CPU item. Everything together is such an ideal: its w is the bound.

*Serial answers.* On the same way down, g[I, a] is the least time in which ideal I can be done one piece
after the other, with all transfers in and out:

    g[I, a] = min( min over P of g[I - P, a - 1] + load of P,
                   min over v of g[I - v, a] + CPU time of v ).

CPUs really run side by side, so the latency of the answer is at most g.
"""

import itertools
import math
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from graphpar.partition.jit import COMPILED
from graphpar.partition.placement.ideal_loops import (
    Order,
    Scratch,
    Times,
    fill_slots,
    pass_on,
    relax,
)
from graphpar.partition.placement.reach import Held, Reach, bits
from graphpar.partition.placement.steps import AllIdeals, all_ideals_of, lists_of, words_of
from graphpar.partition.placement.units import Devices, Units

_MOST_IDEALS = 50_000
"""Ideals up to which all pairs are looked at in less than a minute."""

_AT_A_TIME = 64
"""Ideals between two looks at the clock."""

_TELLING_SHARE = 0.2
"""Share of all ideals after which it is known how long the rest takes at least."""


@dataclass(frozen=True)
class IdealWalk:
    """A lower bound on every latency, at most a known one, and the best serial answer, if any."""

    bound: float = 0.0
    devices: Devices | None = None


def walk_ideals(reach: Reach, best: float, most_s: float, threads: int = 1) -> IdealWalk:
    """Bound latencies and find the best serial schedule, both over all ideals; `best` is a known latency.

    Needs compiled loops and not too many ideals for `most_s` seconds; else there is nothing.
    """
    units, began_s = reach.units, time.perf_counter()
    if not COMPILED or not math.isfinite(best):
        return IdealWalk()
    need = [sum(1 << j for j in before) for before in units.before]
    every = all_ideals_of(need, _MOST_IDEALS, lambda: time.perf_counter() - began_s > most_s)
    if every is None:
        return IdealWalk()
    order = _order(reach, every, best)
    times = _nothing_known(order, units.num_accelerators)
    scratches = [_scratch(order) for _ in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        for done, end in itertools.pairwise(every.levels[1:]):
            for begin in range(done, end, _AT_A_TIME * threads):
                share = begin / len(every.found)  # larger ideals take longer, if anything
                spent_s = time.perf_counter() - began_s
                if spent_s > most_s or (share > _TELLING_SHARE and spent_s > share * most_s):
                    return IdealWalk()
                until = min(begin + _AT_A_TIME * threads, end)
                _relax_together(pool, begin, until, order, times, scratches)
            pass_on(done, end, order, times, scratches[0].stack)
    # Transfers are at most `best`, and each of a way's sums of them rounds once for each item.
    rounding = float(np.finfo(np.float64).eps) * units.num_items**2 * best
    bound = max(0.0, float(times.whole[-1, -1]) * (1 - 1e-9) - rounding)
    return IdealWalk(bound, _follow(every.found, times, units))


def _relax_together(
    pool: ThreadPoolExecutor, begin: int, end: int, order: Order, times: Times, scratches: list[Scratch]
) -> None:
    """Ideals of one size, none of which is part of another; one thread for each scratch."""
    cuts = np.linspace(begin, end, len(scratches) + 1).astype(int).tolist()
    waiting = [
        pool.submit(relax, a, b, order, times, scratch)
        for a, b, scratch in zip(cuts[1:-1], cuts[2:], scratches[1:], strict=True)
        if a < b
    ]
    relax(cuts[0], cuts[1], order, times, scratches[0])
    for result in waiting:
        result.result()


def _order(reach: Reach, every: AllIdeals, best: float) -> Order:
    units, found = reach.units, every.found
    ancestors = [reach.around([i])[0] for i in range(units.num_items)]
    closed = []
    for c in range(units.num_classes):
        held = Held(reach)
        held.take([c])
        closed.append(held.items)
    ideals = words_of(found, units.num_items)
    slots = np.full(1 << (3 * len(found)).bit_length(), -1, np.int64)
    fill_slots(ideals, slots)
    sent = np.full(units.num_items, np.inf)
    for (j, _), cost in units.sends.items():
        sent[j] = min(sent[j], cost)
    # What is dearer excludes no more, but would drown the others in sums that it comes and goes in.
    sent = np.where(np.isfinite(sent), np.minimum(sent, best), sent)
    possible = np.isfinite(units.accelerator[list(units.class_of)])
    return Order(
        ideals,
        slots,
        units.num_classes < units.num_items,
        words_of([closed[c] for c in units.class_of], units.num_items),
        words_of(ancestors, units.num_items),
        *lists_of(units.before),
        *lists_of(units.after),
        every.steps,
        np.array([every.number[mask] for mask in ancestors], np.int64),
        np.where(possible, units.work, np.inf).astype(np.float64),
        sent,
        units.cpu.astype(np.float64),
        units.held.astype(np.float64),
        float(units.memory_limit * (1 + 1e-12)),
        float(best),
    )


def _nothing_known(order: Order, num_accelerators: int) -> Times:
    shape = (len(order.ideals), num_accelerators + 1)
    least, serial = np.full(shape, order.best), np.full(shape, np.inf)
    least[0] = serial[0] = 0.0
    origin = np.full((*shape, 2), -1, np.int64)
    return Times(least, least.copy(), least.copy(), least.copy(), serial, origin)


def _scratch(order: Order) -> Scratch:
    count, width = order.ideals.shape
    return Scratch(
        np.full(count, -1, np.int32),
        np.zeros((count, width), np.uint64),
        np.zeros(count, np.int64),
        np.zeros(width, np.uint64),
        np.zeros((count, 5)),
        np.zeros(count + len(order.steps.to), np.int64),
    )


def _follow(found: list[int], times: Times, units: Units) -> Devices | None:
    """The devices of the best serial schedule."""
    a, k = int(times.serial[-1].argmin()), len(found) - 1
    if not math.isfinite(times.serial[k, a]):
        return None
    devices = [0] * units.num_classes
    while k:
        smaller, on_cpu = map(int, times.origin[k, a])
        for i in bits(found[k] & ~found[smaller]):
            devices[units.class_of[i]] = 0 if on_cpu else a
        k, a = smaller, a if on_cpu else a - 1
    return devices
