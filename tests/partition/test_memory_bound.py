"""Bounds on pipelines side by side that know how they fill and what they hold, against every plan."""

from dataclasses import replace
from itertools import pairwise, product
from typing import Any

import pytest
from all_plans import best_step_s
from cost_tables import make_table, small_tables
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graphpar.cost import CostTable
from graphpar.partition.cells import links_to_others
from graphpar.partition.chains import warm as chain_warm
from graphpar.partition.counting.programme import CountingLimits
from graphpar.partition.family import choose_family, groupings
from graphpar.partition.pipeline import partition
from graphpar.partition.programs import Programs, Way
from graphpar.partition.search import INFINITY
from graphpar.partition.share_bounds import (
    ShareBounds,
    pipelines_bound_s,
    shares_of,
    sharing_bound_s,
)
from graphpar.partition.unit_arrays import Setting, memory_never_binds


def programs(table: CostTable, deadline_s: float = float("inf")) -> Programs:
    return Programs(choose_family(table, "auto", "auto"), CountingLimits(0.01, "highs"), deadline_s)


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(small_tables(max_units=3, modes=True), st.data())
def test_no_plan_is_faster_than_the_least_of_the_bounds(table: CostTable, data: st.DataObject) -> None:
    best = best_step_s(table)
    known = programs(table)
    everything = [*groupings(known.family), (known.family.cells.counts,)]
    least = min(pipelines_bound_s(known, groups) for groups in everything)
    assert best is None or least <= best * (1 + 1e-9) + 1e-12
    # Bounds by shares hold wherever the shares begin, and whatever is thought of how long they take.
    bounds = [
        sharing_bound_s(
            known,
            groups,
            *drawn_shares(data, table.batch, len(groups)),
            cutoff_s=INFINITY,
            gap=0.0,
            deadline_s=INFINITY,
        )
        for groups in everything
    ]
    assert best is None or min(bounds) <= best * (1 + 1e-9) + 1e-12


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(small_tables(max_units=3, max_batch=6, modes=True), st.data())
def test_no_larger_share_is_faster_where_none_is(table: CostTable, data: st.DataObject) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chain_warm, "LOOPS_PAY", 0)
        known = programs(table)
    kinds, cache = range(len(table.device_classes)), dict[Any, Any]()
    for counts in product(range(1, table.batch + 1), repeat=2):
        setting = Setting(max(counts), min(counts), "1f1b")
        never = memory_never_binds(table, setting, kinds, cache)
        assert never == memory_never_binds(table, setting, kinds), "what settings share is their own"
    for groups in groupings(known.family):
        shares = shares_of(table, len(groups))
        own = {(g, links_to_others(known.family.cells, groups, g)) for g in groups}
        steps = {}
        for group, across in own:
            for n in shares:
                tasks = known.tasks(group, n, known.family.schedules, len(groups), across)
                least_s = min((t.bound_s + t.post_s for t in tasks), default=INFINITY)
                assert known.least_step_s(group, n, len(groups), across) == least_s
                found = known.search(tasks, cutoff_s=INFINITY, gap=0.0, deadline_s=INFINITY).best
                steps[group, n] = INFINITY if found is None else found.step_s
            asked = [*(s for s in steps.values() if s < INFINITY), 1.0]
            cutoff_s = data.draw(st.sampled_from(asked)) * data.draw(st.sampled_from([0.5, 1.0, 1.5]))
            for i in range(len(shares)):
                excluded = set[Way]()
                way = known.way_from(
                    group,
                    shares[i:],
                    len(groups),
                    across,
                    cutoff_s=cutoff_s,
                    deadline_s=INFINITY,
                    excluded=excluded,
                )
                assert way not in excluded
                if way is None:
                    assert min(steps[group, n] for n in shares[i:]) >= cutoff_s * (1 - 1e-9)
        # What no pair of shares reaches is no bound on either; whatever all reach is kept.
        most = ShareBounds(known).largest(groups, cutoff_s=cutoff_s, deadline_s=INFINITY)
        for group in groups:
            fits = [n for n in shares if steps[group, n] < cutoff_s * (1 - 1e-9)]
            assert most is None or not fits or most[group] >= max(fits)
        if most is None:
            reach = {0}
            for group in groups:
                fits = [n for n in shares if steps[group, n] < cutoff_s * (1 - 1e-9)]
                reach = {r + n for r in reach for n in fits}
            assert table.batch not in reach


def test_most_shares_are_excluded_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chain_warm, "LOOPS_PAY", 0)
    known = programs(make_table((1.0,) * 4, devices_per_class=(4,), batch=8))
    half = (2,)
    across = links_to_others(known.family.cells, (half, half), half)
    # Two devices take 3 * 4 / 2 seconds a sample and have to fill: four samples take more than 24.

    def way_from(least: int, excluded: set[Way], ways: list[Way] | None = None) -> Way | None:
        return known.way_from(
            half,
            range(least, 8),
            2,
            across,
            cutoff_s=24.0,
            deadline_s=INFINITY,
            excluded=excluded,
            ways=ways,
        )

    assert way_from(4, set()) is None
    way = way_from(3, set())
    assert way is not None
    assert way_from(3, set(), [way]) == way
    assert way_from(3, {way}, [way]) is None
    bounds = ShareBounds(known)
    assert bounds.largest((half, half), cutoff_s=24.0, deadline_s=INFINITY) is None
    assert bounds.largest((half, half), cutoff_s=60.0, deadline_s=INFINITY) is not None


def drawn_shares(data: st.DataObject, batch: int, number: int) -> tuple[list[int], list[float]]:
    """Shares that add up to a batch, and seconds."""
    cuts = data.draw(st.permutations(range(1, batch)))[: number - 1]
    ends = [0, *sorted(cuts), batch]
    times_s = data.draw(st.lists(st.floats(0.1, 9.0), min_size=number, max_size=number))
    return [b - a for a, b in pairwise(ends)], times_s


def test_a_bound_by_fewer_samples_needs_that_more_are_no_easier() -> None:
    table = make_table((1.0,) * 4, devices_per_class=(4,), batch=8)
    half = (2,)
    assert pipelines_bound_s(programs(table), (half, half)) > 0
    faster = tuple(replace(c, forward_s=((9.0, 1.0),), backward_s=((0.0, 0.0),)) for c in table.costs)
    smaller = tuple(replace(c, saved_bytes=(2.0, 1.0)) for c in table.costs)
    for costs in (faster, smaller):
        assert pipelines_bound_s(programs(replace(table, costs=costs)), (half, half)) == 0


def test_memory_that_is_scarce_raises_the_bound() -> None:
    units, many = (1.0,) * 8, (8,)
    wide = programs(make_table(units, devices_per_class=many, batch=8))
    tight = programs(make_table(units, devices_per_class=many, batch=8, memory_bytes=3.0))
    nothing = programs(make_table(units, devices_per_class=many, batch=8, memory_bytes=0.5))
    late = programs(make_table(units, devices_per_class=many, batch=8, memory_bytes=3.0), 0.0)
    free, scarce, none = (p.pipeline_bound_s((8,), 8, 1) for p in (wide, tight, nothing))
    assert free == pytest.approx(24.0)
    assert free < scarce < float("inf")
    assert none == float("inf")
    # Memory is looked at as long as there is time.
    assert late.pipeline_bound_s((8,), 8, 1) == pytest.approx(free)
    found = partition(make_table(units, devices_per_class=many, batch=8, memory_bytes=3.0), gap=0.0)
    assert scarce <= found.objective_s
