"""Chains in which no device is in two stages, held against all chains there are."""

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphpar.partition.chains import loops
from graphpar.partition.chains.columns import Columns
from graphpar.partition.chains.sets import SetChains
from graphpar.partition.device_sets import DeviceSets, device_sets
from graphpar.partition.slots import Slots
from graphpar.partition.unit_arrays import run_ranges

UNITS, COUNTS = 3, (1, 2)
TEAMS = np.array([[1, 0], [0, 1], [0, 2], [1, 1]], dtype=np.intp)
WIDTH = TEAMS.sum(axis=1)
SETS = device_sets(TEAMS, np.arange(len(TEAMS)), WIDTH, COUNTS, with_replicas=False)
SLOTS = Slots(run_ranges(UNITS), UNITS, 3)


@st.composite
def drawn_columns(draw: st.DrawFn) -> Columns:
    """Some columns, by slot, with whole numbers of seconds."""
    seconds = st.integers(0, 9)
    row = st.tuples(
        st.integers(0, len(SLOTS) - 1), st.integers(0, len(TEAMS) - 1), *[seconds] * 3, st.integers(1, 4)
    )
    slot, option, *floats = np.array(sorted(draw(st.lists(row, min_size=1, max_size=30)))).T
    return Columns(option, slot, *(np.ascontiguousarray(f, dtype=np.float64) for f in floats))


def chains(columns: Columns, unit: int = 0, kind: int = 0) -> Iterator[tuple[int, ...]]:
    """All chains of columns from a unit on that have devices and, by position, memory for each."""
    if unit == UNITS:
        yield ()
        return
    slots = SLOTS.at(columns.slot)
    for c in np.flatnonzero((slots.first == unit) & (slots.before == kind)).tolist():
        for rest in chains(columns, int(slots.last[c]), int(slots.after[c])):
            devices = columns.option[[c, *rest]]
            enough = (TEAMS[devices].sum(axis=0) <= COUNTS).all()
            if enough and WIDTH[devices].sum() <= columns.most_below[c]:
                yield (c, *rest)


@settings(max_examples=60, deadline=None)
@given(drawn_columns(), st.integers(1, 40), st.sampled_from([0.0, 1.0]), st.integers(0, 4))
def test_a_column_is_left_where_a_chain_below_the_target_has_it(
    columns: Columns, whole: int, weight: float, few: int
) -> None:
    target = whole + 0.5
    tried = SetChains(columns, columns.option, SETS, SLOTS, UNITS, target, weight)
    every, some = list(map(list, chains(columns))), np.arange(len(columns))
    fill = [float(columns.cost_s[c].sum()) for c in every]
    own_s = np.full(len(columns), np.inf)
    needed = set()
    for chain, seconds in zip(every, fill, strict=True):
        more = columns.extra_s[chain] + weight * columns.post_s[chain]
        own_s[chain] = np.minimum(own_s[chain], seconds + more)
        if seconds + columns.extra_s[chain].max() + weight * columns.post_s[chain].max() < target:
            needed |= set(chain)
    # What a stage has of extra and post by itself alone: exact in one window, sharper in several.
    assert tried.in_windows(some, len(columns), 5)[0].tolist() == np.flatnonzero(own_s < target).tolist()
    left = set(tried.in_windows(some, few, 5)[0].tolist())
    assert needed <= left <= set(np.flatnonzero(own_s < target).tolist())
    nu, rho = np.array([0.5, 0.25, 0.5, 0.75]), np.array([1.0, 0.0, 0.0, 1.0])
    bound_s, priced = tried.at_prices(nu, rho)
    assert needed <= set(priced.tolist())
    of_chains = [
        seconds + float(nu[o] @ columns.extra_s[c] + weight * rho[o] @ columns.post_s[c])
        for c, seconds in zip(every, fill, strict=True)
        for o in [columns.option[c]]
    ]
    assert bound_s == pytest.approx(min(of_chains, default=np.inf))


@settings(max_examples=60, deadline=None)
@given(drawn_columns(), st.integers(1, 40), st.sampled_from([0.0, 1.0]), st.integers(0, 4), st.data())
def test_a_stage_is_allowed_where_a_chain_below_the_target_has_it(
    columns: Columns, whole: int, weight: float, few: int, data: st.DataObject
) -> None:
    """Others stand for stages that cost no less, and no less together with their extra."""
    target = whole + 0.5
    tried = SetChains(columns, columns.option, SETS, SLOTS, UNITS, target, weight)
    kept, allowed = tried.in_windows(np.arange(len(columns)), few, 5)
    more = st.lists(st.tuples(*[st.integers(0, 3)] * 2), min_size=UNITS, max_size=UNITS)
    for chain in map(list, chains(columns)):
        cost_s, extra_s, post_s = columns.cost_s[chain], columns.extra_s[chain], columns.post_s[chain]
        dearer, longer = np.array(data.draw(more), dtype=np.float64)[: len(chain)].T
        cost_s, extra_s = cost_s + dearer, np.maximum(extra_s - dearer, 0.0) + longer
        if cost_s.sum() + extra_s.max() + weight * post_s.max() >= target:
            continue
        for c, cost, extra, post in zip(chain, cost_s, extra_s, weight * post_s, strict=True):
            entry = int(np.searchsorted(kept, c))
            assert kept[entry] == c
            assert loops._is_allowed(entry, cost, extra, post, allowed.plain)


def test_windows_leave_less_than_what_stages_have_alone() -> None:
    """Two units on either device: a fast stage beside a slow one has the extra of that."""
    none = np.zeros(4)
    columns = Columns(
        option=np.array([0, 1, 0, 1]),
        slot=np.array([0, 0, 2, 2]),
        cost_s=none,
        extra_s=np.array([1.0, 9.0, 1.0, 9.0]),
        post_s=none,
        most_below=np.full(4, 9.0),
    )
    slots = Slots(run_ranges(2), 2, 0)
    sets: DeviceSets = SETS
    tried = SetChains(columns, columns.option, sets, slots, 2, 5.0, 1.0)
    assert tried.in_windows(np.arange(4), 4, 5)[0].tolist() == [0, 2]
    assert tried.in_windows(np.arange(4), 0, 5)[0].tolist() == []
