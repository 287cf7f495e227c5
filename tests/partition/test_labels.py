"""The best line of labels, held against all pipelines there are."""

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphpar.partition.chains.labels import (
    LabelColumns,
    LabelStates,
    ManyLabelsError,
    best_line,
)
from graphpar.partition.device_sets import states_of, strides_of
from graphpar.partition.slots import Slots
from graphpar.partition.unit_arrays import BoolArray, run_ranges

UNITS, COUNTS, KINDS = 3, (1, 2), 3
TEAMS = np.array([[1, 0], [0, 1], [0, 2], [1, 1]], dtype=np.intp)
WIDTH, STATES = TEAMS.sum(axis=1), states_of(COUNTS)
SLOTS = Slots(run_ranges(UNITS), UNITS, KINDS).every


class Drawn:
    """Stages of one to three units, links that join some teams, prices of devices."""

    def __init__(self, seed: int, weight: float, *, prices: bool) -> None:
        draw, number, most = np.random.default_rng(seed), 60, 6
        places, devices = SLOTS.places, np.array(COUNTS, dtype=np.float64)
        team, slot = draw.integers(len(TEAMS), size=number), draw.integers(len(SLOTS.run), size=number)
        order = np.lexsort((places[1][slot], team))
        self.team, self.slot, self.weight = team[order], slot[order], weight
        self.cost, self.extra, self.post = draw.integers(1, most, size=(3, number)).astype(np.float64)
        # Where what comes first has most of either, others need not save any.
        first = SLOTS.first[self.slot] == 0
        self.extra, self.post = (s + 9 * draw.integers(2) * first for s in (self.extra, self.post))
        # Several stages take about as long as one.
        length = (SLOTS.last - SLOTS.first)[self.slot]
        self.cost *= length + 3 * (length == UNITS)
        self.below = draw.integers(1, sum(COUNTS) + 1, size=number)
        between = draw.integers(KINDS, size=(len(TEAMS), len(TEAMS)))
        self.joins: BoolArray = (between[:, :, None] == np.arange(KINDS)) & (np.arange(KINDS) > 0)
        nu, rho = draw.random((2, len(COUNTS)))
        nu, rho, use = nu / (devices @ nu), rho / (devices @ rho), prices * draw.random(len(COUNTS))
        of_team = TEAMS @ np.stack([nu, weight * rho, use], axis=1)
        priced = self.cost + (
            of_team[self.team] * np.stack([self.extra, self.post, self.cost**0], 1)
        ).sum(1)
        self.columns = LabelColumns(
            team=self.team,
            head=places[0][self.slot],
            after=places[1][self.slot],
            place=self.team,
            width=WIDTH[self.team],
            below=self.below,
            cost_s=self.cost,
            extra_s=self.extra,
            post_s=self.post,
            priced_s=priced,
        )
        some = STATES.sum(axis=1)
        self.states = LabelStates(
            order=np.flatnonzero(some > 0)[np.argsort(some[some > 0], kind="stable")],
            replicas=some,
            usable=np.logical_and.reduce(STATES[:, None] >= TEAMS, axis=2),
            rest=TEAMS @ strides_of(COUNTS),
            share=STATES @ nu,
            post_share=STATES @ rho,
            due=STATES @ use,
            paid=float(devices @ use),
        )

    def lines(self, unit: int = 0, kind: int = 0) -> Iterator[tuple[int, ...]]:
        """All pipelines from a unit on whose devices and links there are, with memory by position."""
        if unit == UNITS:
            yield ()
            return
        for c in np.flatnonzero(
            (SLOTS.first[self.slot] == unit) & (SLOTS.before[self.slot] == kind)
        ).tolist():
            after = int(SLOTS.after[self.slot[c]])
            for rest in self.lines(int(SLOTS.last[self.slot[c]]), after):
                teams = self.team[[c, *rest]]
                if rest and not self.joins[teams[0], teams[1], after]:
                    continue
                if (TEAMS[teams].sum(axis=0) <= COUNTS).all() and WIDTH[teams].sum() <= self.below[c]:
                    yield (c, *rest)

    def takes(self, line: tuple[int, ...]) -> float:
        """Fill, extra and what counts of post."""
        own = list(line)
        return float(self.cost[own].sum() + self.extra[own].max() + self.weight * self.post[own].max())

    def best(self, target_s: float, slack_s: float = 0.0, most: float = np.inf) -> list[int] | None:
        """By labels."""
        left, right = self.joins[:, :, None, :], self.joins[:, None, :, :]
        return best_line(
            self.columns, self.states, self.joins, np.logical_and.reduce(left | ~right, axis=0), UNITS,
            target_s=target_s, post_weight=self.weight, deadline_s=np.inf,
            slack_s=slack_s, most_labels=most,
        )  # fmt: skip


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.5, 1.0]), st.booleans(), st.integers(0, 20))
def test_the_best_line_is_the_best_of_all(seed: int, weight: float, prices: bool, whole: int) -> None:
    drawn = Drawn(seed, weight, prices=prices)
    every = {line: drawn.takes(line) for line in drawn.lines()}
    least = min(every.values(), default=np.inf)
    for target_s in (whole + 0.25, least, np.nextafter(least, np.inf), np.inf):
        found = drawn.best(target_s)
        if found is None:
            assert not least < target_s
        else:
            assert every[tuple(found)] == least < target_s
    # One that stands for others that are less by so much may hide them, once for each stage.
    found = drawn.best(whole + 0.25, slack_s=1.0)
    value = np.inf if found is None else every[tuple(found)]
    assert value == np.inf or value < whole + 0.25
    assert not least + UNITS < min(value, whole + 0.25)


def test_more_labels_than_asked_for_are_said() -> None:
    with pytest.raises(ManyLabelsError):
        Drawn(0, 1.0, prices=True).best(np.inf, most=1)
