"""Pipelines side by side whose sums are done in time are cut at the same units, and then proven best."""

from dataclasses import replace
from itertools import combinations, pairwise

import numpy as np
import pytest
from all_plans import best_step_s
from cost_tables import make_table
from hypothesis import given
from hypothesis import strategies as st

from graphpar.cost import LinkCost, Topology
from graphpar.partition import side_by_side
from graphpar.partition.cells import StageOption, find_cells, links_to_others
from graphpar.partition.chains import warm as chain_warm
from graphpar.partition.chains.limits import ChainAnswer, Stage
from graphpar.partition.common_cuts import (
    Windows,
    first_windows,
    halves,
    known_sums_s,
    longest_s,
    narrowed,
    segment_sums_s,
)
from graphpar.partition.gradient_sums import worst_finish_s
from graphpar.partition.known_fits import Fit, KnownFits
from graphpar.partition.pipeline import partition
from graphpar.partition.search import Found
from graphpar.partition.types import PipelineChoice, Replica, StageChoice
from graphpar.partition.unit_arrays import Setting


def within(cuts: tuple[int, ...], windows: Windows) -> bool:
    return len(cuts) == len(windows) and all(
        low <= cut <= high for cut, (low, high) in zip(cuts, windows, strict=True)
    )


@given(st.lists(st.integers(0, 4), min_size=1, max_size=8), st.integers(-1, 12), st.integers(0, 7))
def test_windows_hold_all_cuts_that_are_in_time(each: list[int], limit: int, most: int) -> None:
    upto = np.concatenate([[0.0], np.cumsum(each)])
    sums = np.maximum(upto[None, :] - upto[:, None], 0.0)
    units = len(each)
    every = [c for n in range(most + 1) for c in combinations(range(1, units), n)]

    def longest(cuts: tuple[int, ...]) -> float:
        return max(float(sums[a, b]) for a, b in pairwise((0, *cuts, units)))

    in_time = {c for c in every if longest(c) <= limit}
    found = first_windows(sums, limit, most)
    if () in in_time:
        assert found == [()]
        return
    left = [w for w in found if w]
    assert in_time == {c for c in in_time if any(within(c, w) for w in left)}
    while left:
        windows = left.pop()
        held = {c for c in every if within(c, windows)}
        assert all(longest(c) >= longest_s(sums, windows) for c in held)
        fewer = narrowed(sums, limit, windows)
        kept = {c for c in held if fewer is not None and within(c, fewer)}
        assert held & in_time == kept & in_time
        parts = halves(fewer) if fewer else []
        for part in parts:
            kept -= {c for c in held if within(c, part)}
        assert not parts or not kept
        left += parts


@given(
    st.lists(st.sampled_from([0.0, 1.0, 3.0]), min_size=3, max_size=6),
    st.sampled_from([0.0, 0.1]),
    st.data(),
)
def test_sums_of_a_segment_take_at_least_what_is_said(
    gradients: list[float], latency_s: float, data: st.DataObject
) -> None:
    """Also where a unit in the middle has none, on either side of which other devices sum."""
    units = len(gradients)
    table = make_table([1.0] * units, (1.0,), (2 * units,), batch=2, link=LinkCost(latency_s, 1.0))
    costs = [replace(c, gradient_bytes=g) for c, g in zip(table.costs, gradients, strict=True)]
    table, cells = replace(table, costs=tuple(costs)), find_cells(table)
    # A cut is in one pipeline or in the other.
    cut_in = data.draw(st.lists(st.integers(0, 2), min_size=units - 1, max_size=units - 1))
    pipelines = []
    for number in range(2):
        edges = (0, *(i + 1 for i, own in enumerate(cut_in) if own == number), units)
        stages = (StageChoice(a, b, (Replica(f"0.{number * units + a}", 1),)) for a, b in pairwise(edges))
        pipelines.append(PipelineChoice(1, 1, tuple(stages)))
    groups = ((units,),) * 2
    sums_s = segment_sums_s(table, cells, groups, [links_to_others(cells, groups, g) for g in groups])
    assert sums_s[0, units] <= worst_finish_s(table, pipelines)[0] * (1 + 1e-9)
    # Of both pipelines' cuts none is a common one.
    known = known_sums_s(table, sums_s, ())
    assert (known is None) == (not all(gradients))
    if known is not None:
        assert sums_s[0, units] >= sum(gradients) * (1 - 1e-9)
        held = [(s.first, s.last) for p in pipelines for s in p.stages]
        own_s = [2 * (latency_s + sum(gradients[first:last]) / 2) for first, last in held]
        least_s = max(
            max(float(known[0, first]) + seconds, float(known[1, last]))
            for (first, last), seconds in zip(held, own_s, strict=True)
        )
        assert least_s <= worst_finish_s(table, pipelines)[0] * (1 + 1e-9)


def test_sums_are_known_from_the_last_common_cut_on() -> None:
    sums_s = segment_sums_s(
        table := make_table((1.0,) * 4, (1.0,), (4,), gradient_bytes=1.0, link=LinkCost(0.0, 1.0)),
        cells := find_cells(table),
        groups := ((2,), (2,)),
        [links_to_others(cells, groups, g) for g in groups],
    )
    known = known_sums_s(table, sums_s, ((1, 1), (3, 3)))
    assert known is not None
    assert known.tolist() == [[0.0, 0.0, 1.0, 0.0, 1.0], [0.0, 1.0, 1.0, 2.0, 1.0]]
    assert known_sums_s(table, sums_s, ((1, 2),)) is None


_WINDOW = st.tuples(st.integers(1, 5), st.integers(0, 4)).map(lambda w: (w[0], min(sum(w), 5)))
_WINDOWS = st.lists(_WINDOW, min_size=1, max_size=3).map(tuple)


@given(_WINDOWS, _WINDOWS, st.sets(st.integers(1, 5)), st.permutations([1.0, 2.0]))
def test_what_is_known_of_windows_is_told_of_what_is_within(
    windows: Windows, part: Windows, cuts: set[int], limits: list[float]
) -> None:
    def are_cut(places: set[int], windows: Windows) -> bool:
        return all(any(low <= c <= high for c in places) for low, high in windows)

    setting, known = Setting(4, 2, "1f1b"), KnownFits()
    option = StageOption((1,), frozenset({0}), frozenset(), (0,), ((0,),))
    stages = tuple(Stage(a, b, option) for a, b in pairwise((0, *sorted(cuts), 6)))
    found = Found(setting, ChainAnswer(3.0, 1.0, 1.5, 3.0, stages))
    known.add((1,), setting, windows, limits[0], Fit(found, 4.0))
    told = known.about((1,), setting, part, limits[1])
    if told.bound_s:
        every = [set(c) for n in range(6) for c in combinations(range(1, 6), n)]
        assert limits[1] <= limits[0]
        assert all(are_cut(c, windows) for c in every if are_cut(c, part))
    assert (told.found is found) == (told.bound_s == 4.0 and are_cut(cuts, part) and limits[1] >= 1.5)
    assert known.about((2,), setting, windows, limits[0]) == Fit(None, 0.0)
    assert known.about((1,), setting, windows, limits[0]).bound_s == 4.0


@pytest.mark.parametrize("parts", [0, 64])
def test_what_pipelines_cut_apart_sum_is_known_once_parts_are_looked_at(
    parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two nodes of two devices each: without looking at parts 12 % stay open."""
    table = make_table((1.0, 2.0, 1.0), (3.0, 3.0), (2, 2), batch=3, cut_bytes=1.0)
    nodes = {d: d[-1] for d in table.class_of}
    inside = LinkCost(0.0, 5.0)
    costs = [replace(c, gradient_bytes=g) for c, g in zip(table.costs, (5.0, 1.0, 5.0), strict=True)]
    topology = Topology(nodes, {"0": inside, "1": inside}, LinkCost(0.05, 10.0))
    table = replace(table, costs=tuple(costs), topology=topology)
    monkeypatch.setattr(chain_warm, "LOOPS_PAY", 0)
    monkeypatch.setattr(side_by_side, "_MOST_PARTS", parts)
    found = partition(table, gap=0.0, time_limit_s=600.0)
    assert found.objective_s == pytest.approx(best_step_s(table))
    assert found.bound_s <= found.objective_s
    if parts:
        assert found.status == "optimal"
    else:
        assert found.gap > 0.1
        assert found.truncated_by[0].startswith("sums: ")
