"""The best pipeline below a target in one sweep: labels instead of limits.

`limits` finds the least fill under given limits on extra and post, a sweep per pair of limits. Here a
suffix of a pipeline is a *label* (fill, extra so far, post so far) at (first unit, link before it,
devices used), and all of them grow at once, by states with more and more replicas. What keeps them few:

* A label stands for another one at the same place if its fill, what its extra is more than that of the
  other, and `weight` times what its post is more, add up to no more than the fill of the other: whatever
  comes before, the largest extra and post of the whole differ by no more than that.
* A label ends where the least that comes before it brings the sum to the target. That least is a shortest
  path over (replicas behind, unit, link), twice: over fill alone, and over the prices of `relaxed`,
  in which stages not yet there count with their extra and post as well.

So the answer is exact, and None means that there is no plan below the target.
"""

import math
import time
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from graphpar.partition.chains.path_loops import least_before
from graphpar.partition.clock import OutOfTimeError
from graphpar.partition.jit import compiled_exactly
from graphpar.partition.unit_arrays import BoolArray, FloatArray, IntArray, starts

ArrayT = TypeVar("ArrayT", FloatArray, IntArray)

_ROUNDING = 1 + 1e-12
"""Sums of the same numbers in another order differ by less."""

_FIRST_CAPACITY = 1_000_000
"""Labels that there is room for at first: memory counts only once it is used."""

_AT_ONCE = 64
"""States after which somebody looks at the clock."""


class ManyLabelsError(Exception):
    """There are more labels than were asked for."""


@dataclass(frozen=True, eq=False)
class LabelColumns:
    """Stages that may be used, sorted by team and by where they end; arrays over stages.

    `head` and `after` number (link kind, unit) before and after a stage as kind * (units + 1) + unit;
    `priced_s` is what it costs in the relaxation.
    """

    team: IntArray
    head: IntArray
    after: IntArray
    place: IntArray
    width: IntArray
    below: IntArray
    cost_s: FloatArray
    extra_s: FloatArray
    post_s: FloatArray
    priced_s: FloatArray


@dataclass(frozen=True, eq=False)
class LabelStates:
    """Sets of devices, by growing number of replicas.

    `usable[state, team]` says whether the devices suffice for a team, `rest` by how much the number of a
    state falls without it; `share`, `post_share` and `due` are the weights and the price of the devices.
    """

    order: IntArray
    replicas: IntArray
    usable: BoolArray
    rest: IntArray
    share: FloatArray
    post_share: FloatArray
    due: FloatArray
    paid: float


@dataclass(eq=False)
class _Labels:
    """Growing arrays over labels; `next` chains the labels of one place."""

    fill: FloatArray
    extra: FloatArray
    post: FloatArray
    column: IntArray
    parent: IntArray
    next: IntArray
    number: int

    def double(self) -> "_Labels":
        """The same with room for twice as many."""

        def longer(array: ArrayT) -> ArrayT:
            found = np.empty(2 * len(array), dtype=array.dtype)
            found[: self.number] = array[: self.number]
            return found

        fill, extra, post = longer(self.fill), longer(self.extra), longer(self.post)
        ints = longer(self.column), longer(self.parent), longer(self.next)
        return _Labels(fill, extra, post, *ints, self.number)


def _first_labels() -> _Labels:
    """One label: nothing is done yet."""

    def nothing() -> FloatArray:
        found = np.empty(_FIRST_CAPACITY)
        found[0] = 0.0
        return found

    def nobody() -> IntArray:
        found = np.empty(_FIRST_CAPACITY, dtype=np.intp)
        found[0] = -1
        return found

    return _Labels(nothing(), nothing(), nothing(), nobody(), nobody(), nobody(), 1)


def best_line(
    columns: LabelColumns,
    states: LabelStates,
    joins: BoolArray,
    stands_for: BoolArray,
    num_units: int,
    *,
    target_s: float,
    post_weight: float,
    deadline_s: float,
    slack_s: float = 0.0,
    most_labels: float = math.inf,
) -> list[int] | None:
    """The stages, first to last, of the pipeline that costs least below a target; None without one.

    Args:
        columns: The stages.
        states: The sets of devices.
        joins: [left place, right place, link kind]: whether that kind of link joins the two.
        stands_for: [place, other place, link kind]: whether all that reach the other place by it reach
            the place.
        num_units: Units of the chain.
        target_s: Fill, extra and `post_weight` times post must be less.
        post_weight: How much post counts.
        deadline_s: `time.monotonic()` at which to give up.
        slack_s: A label may stand for one that is less by so much; then a better plan may be missed, and
            one just below the target.
        most_labels: With more it gives up.

    Raises:
        ManyLabelsError: There were more.
        OutOfTimeError: The deadline passed.
    """
    kinds, levels = joins.shape[2], int(states.replicas.max()) + 1
    buckets = kinds * (num_units + 1)
    by_first = np.argsort(columns.head % (num_units + 1), kind="stable")
    head, after = columns.head[by_first], columns.after[by_first]
    width, below = columns.width[by_first], columns.below[by_first]
    priced, plain = (
        np.ascontiguousarray(least_before(head, after, width, below, c[by_first], levels, buckets).T)
        for c in (columns.priced_s, columns.cost_s)
    )
    key = columns.team * buckets + columns.after
    begins = np.flatnonzero(starts(key))
    group_team, ends = columns.team[begins], np.append(begins[1:], len(key))
    team_groups = np.searchsorted(group_team, np.arange(len(states.rest) + 1))
    first = np.full(len(states.replicas) * buckets, -1, dtype=np.intp)
    labels = _first_labels()
    first[num_units] = 0
    target, best, done = target_s, -1, 0
    while done < len(states.order):
        if time.monotonic() > deadline_s:
            raise OutOfTimeError
        wanted = min(done + _AT_ONCE, len(states.order))
        done, labels.number, found, target = sweep(
            done,
            wanted,
            (states.order, states.replicas, states.rest),
            states.usable,
            (states.share, states.post_share, states.due - states.paid),
            (team_groups, begins, ends),
            (columns.head, columns.after, columns.place, columns.below),
            (columns.cost_s, columns.extra_s, columns.post_s),
            joins,
            stands_for,
            priced,
            plain,
            (target, post_weight, slack_s),
            first,
            (labels.fill, labels.extra, labels.post),
            (labels.column, labels.parent, labels.next),
            labels.number,
            num_units,
        )
        best = found if found >= 0 else best
        if labels.number > most_labels:
            raise ManyLabelsError
        if done < wanted:
            labels = labels.double()
    if best < 0:
        return None
    line = []
    while best > 0:
        line.append(int(labels.column[best]))
        best = int(labels.parent[best])
    return line


@compiled_exactly
def not_outdone(
    team: IntArray,
    slot: IntArray,
    seconds: tuple[FloatArray, FloatArray, FloatArray, FloatArray],
    weight: float,
) -> BoolArray:
    """Which columns no other one of the same devices on the same slot stands for; likes come together.

    `seconds` are cost, extra and post, with the most replicas from there on. One stands for another as
    labels do: what it costs more later is made up for by what it costs less, wherever memory allows.
    """
    cost, extra, post, below = seconds
    kept = np.ones(len(team), dtype=np.bool_)
    start = 0
    while start < len(team):
        end = start + 1
        while end < len(team) and team[end] == team[start] and slot[end] == slot[start]:
            end += 1
        for c in range(start, end):
            for other in range(start, end):
                if other == c or not kept[other] or below[other] < below[c]:
                    continue
                more = max(0.0, extra[other] - extra[c]) + weight * max(0.0, post[other] - post[c])
                if cost[other] + more <= cost[c]:
                    kept[c] = False
                    break
        start = end
    return kept


@compiled_exactly
def sweep(
    done: int,
    until: int,
    states: tuple[IntArray, IntArray, IntArray],
    usable: BoolArray,
    of_devices: tuple[FloatArray, FloatArray, FloatArray],
    groups: tuple[IntArray, IntArray, IntArray],
    places: tuple[IntArray, IntArray, IntArray, IntArray],
    seconds: tuple[FloatArray, FloatArray, FloatArray],
    joins: BoolArray,
    stands_for: BoolArray,
    priced: FloatArray,
    plain: FloatArray,
    limits: tuple[float, float, float],
    first: IntArray,
    label_seconds: tuple[FloatArray, FloatArray, FloatArray],
    label_numbers: tuple[IntArray, IntArray, IntArray],
    number: int,
    num_units: int,
) -> tuple[int, int, int, float]:
    """All labels of some states: how many states are done, labels, the best whole one, and its value.

    States are not done where there was no room for their labels; what was made of these is forgotten.
    """
    order, replicas, rest = states
    share, post_share, due = of_devices
    target, weight, slack = limits
    best, buckets = -1, priced.shape[1]
    while done < until:
        state = order[done]
        level = replicas[state]
        own = (target, weight, share[state], post_share[state], due[state], slack)
        count, found, value = _extend(
            state,
            level,
            usable[state],
            rest,
            groups,
            places,
            seconds,
            joins,
            stands_for,
            priced[level],
            plain[level],
            own,
            first,
            label_seconds,
            label_numbers,
            number,
            num_units,
        )
        if count < 0:
            first[state * buckets : (state + 1) * buckets] = -1
            break
        number, done = count, done + 1
        if found >= 0:
            target, best = value, found
    return done, number, best, target


@compiled_exactly
def _extend(
    state: int,
    replicas: int,
    usable: BoolArray,
    rest: IntArray,
    groups: tuple[IntArray, IntArray, IntArray],
    places: tuple[IntArray, IntArray, IntArray, IntArray],
    seconds: tuple[FloatArray, FloatArray, FloatArray],
    joins: BoolArray,
    stands_for: BoolArray,
    priced: FloatArray,
    plain: FloatArray,
    limits: tuple[float, float, float, float, float, float],
    first: IntArray,
    label_seconds: tuple[FloatArray, FloatArray, FloatArray],
    label_numbers: tuple[IntArray, IntArray, IntArray],
    number: int,
    num_units: int,
) -> tuple[int, int, float]:
    """All labels of one state: their number so far (-1: no room), the best whole one, and its value."""
    target, weight, share, post_share, due, slack = limits
    team_groups, begins, ends = groups
    head, after, place, below = places
    cost, extra, post = seconds
    fill_of, extra_of, post_of = label_seconds
    column_of, parent_of, next_of = label_numbers
    buckets, capacity, best = len(priced), len(fill_of), -1
    for team in range(len(usable)):
        if not usable[team]:
            continue
        source = (state - rest[team]) * buckets
        for group in range(team_groups[team], team_groups[team + 1]):
            start = first[source + after[begins[group]]]
            if start < 0:
                continue
            kind = after[begins[group]] // (num_units + 1)
            for c in range(begins[group], ends[group]):
                if below[c] < replicas:
                    continue
                here, before = state * buckets + head[c], head[c] // (num_units + 1)
                to_go, priced_to_go = plain[head[c]], priced[head[c]] + due
                label = start
                while label >= 0:
                    old = label
                    label = next_of[old]
                    fill = fill_of[old] + cost[c]
                    most, last = max(extra_of[old], extra[c]), max(post_of[old], post[c])
                    whole = fill + most + weight * last
                    if whole + to_go >= target * _ROUNDING:
                        continue
                    least = fill + share * most + weight * post_share * last + priced_to_go
                    if least >= target * _ROUNDING:
                        continue
                    if kind > 0 and not joins[place[c], place[column_of[old]], kind]:
                        continue
                    if head[c] == 0 and whole >= target:
                        continue
                    kept, behind, other = True, -1, first[here]
                    while other >= 0:
                        same = place[column_of[other]]
                        more = max(0.0, extra_of[other] - most)
                        later = weight * max(0.0, post_of[other] - last)
                        if (
                            fill_of[other] + more + later <= fill + slack
                            and stands_for[same, place[c], before]
                        ):
                            kept = False
                            break
                        more = max(0.0, most - extra_of[other])
                        later = weight * max(0.0, last - post_of[other])
                        following = next_of[other]
                        if fill + more + later <= fill_of[other] and stands_for[place[c], same, before]:
                            if behind < 0:
                                first[here] = following
                            else:
                                next_of[behind] = following
                        else:
                            behind = other
                        other = following
                    if not kept:
                        continue
                    if number >= capacity:
                        return -1, -1, target
                    fill_of[number], extra_of[number], post_of[number] = fill, most, last
                    column_of[number], parent_of[number] = c, old
                    next_of[number] = first[here]
                    first[here] = number
                    if head[c] == 0:
                        target, best = whole, number
                    number += 1
    return number, best, target
