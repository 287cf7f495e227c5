"""Plans that people write down by hand, and what they are ranked by."""

import math
import time
from dataclasses import replace
from itertools import accumulate, combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_samples import partitions, sample_partition, table_for

from graphpar.choice.final import choose_plan
from graphpar.choice.like_pipelines import best_like, even_cuts, shares
from graphpar.errors import VerifyError
from graphpar.partition.certificate import BEYOND
from graphpar.partition.handmade import priced_plan
from graphpar.partition.types import Partition, PipelineChoice, Replica, ScheduleName, StageChoice
from graphpar.schedule.simulated import deal_any, least_step_s, simulated


@given(
    st.lists(st.floats(0.1, 9.0), min_size=1, max_size=8),
    st.lists(st.integers(1, 4), min_size=1, max_size=4),
)
def test_no_other_cuts_leave_the_busiest_replica_less(times: list[float], widths: list[int]) -> None:
    widths = widths[: len(times)]
    done = [0.0, *accumulate(times)]

    def busiest(cuts: list[int]) -> float:
        return max((done[b] - done[a]) / w for (a, b), w in zip(pairwise(cuts), widths, strict=True))

    found = even_cuts(times, widths)
    inner = combinations(range(1, len(times)), len(widths) - 1)
    assert busiest(found) <= min(busiest([0, *cut, len(times)]) for cut in inner) * (1 + 1e-9)
    assert found == sorted(set(found)) and found[0] == 0 and found[-1] == len(times)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(6, 40))
def test_shares_are_whole_samples_in_proportion(weights: list[int], batch: int) -> None:
    found = shares(batch, weights)
    assert sum(found) == batch and min(found) >= 1
    if min(found) > 1:
        assert all(abs(s - batch * w / sum(weights)) < 2 for s, w in zip(found, weights, strict=True))


@settings(max_examples=30, deadline=None)
@given(partitions(), st.sampled_from(["1f1b", "gpipe", "zero-bubble"]))
def test_no_order_of_work_is_shorter_than_the_least(found: Partition, schedule: ScheduleName) -> None:
    table = table_for(found)
    pipelines = tuple(deal_any(table, p, schedule) for p in found.pipelines)
    try:
        played = simulated(table, pipelines, schedule)
    except VerifyError:
        return
    assert least_step_s(table, pipelines) <= played.step_s * (1 + 1e-9)


def test_the_best_regular_plan_fits_and_is_what_it_takes_to_play_it() -> None:
    table = table_for(sample_partition())
    found = best_like(table, "auto", time.monotonic() + 60)
    assert found is not None and found.fits(table)
    plan = found.partition
    assert simulated(table, plan.pipelines, plan.schedule).step_s == found.step_s
    assert found.step_s >= least_step_s(table, plan.pipelines)
    again = best_like(table, "auto", math.inf, formulas=False)
    assert again is not None and again.partition.schedule == "zero-bubble"
    assert best_like(table, "auto", math.inf, cutoff_s=0.0) is None
    assert best_like(table, "interleaved", math.inf) is None


@pytest.mark.parametrize("wish", ["1f1b", "gpipe", "zero-bubble"])
def test_a_schedule_asked_for_is_kept(wish: ScheduleName) -> None:
    found = best_like(table_for(sample_partition()), wish, time.monotonic() + 60)
    assert found is not None and found.partition.schedule == wish


_OTHERS = "devices: no bound is known but that on plans of any kind"


@pytest.mark.parametrize(
    ("words", "cut", "told"),
    [
        ("chains, among the first 1 devices of each kind only", (), _OTHERS),
        ("chains, among the faster devices only", (), _OTHERS),
        ("chains", ("time limit: single pipeline",), BEYOND),
    ],
)
def test_beyond_what_was_searched_orders_with_a_formula_are_tried_and_not_certified(
    words: str, cut: tuple[str, ...], told: str
) -> None:
    table = table_for(sample_partition())
    stage = StageChoice(0, table.num_units, (Replica(table.device_classes[0].devices[0], 1),))
    alone = priced_plan(table, (PipelineChoice(table.batch, 1, (stage,)),), "1f1b")
    proven = replace(alone, truncated_by=(), bound_s=0.9 * alone.objective_s, gap=0.1, family="chains")
    assert choose_plan(table, proven, "1f1b").objective_s == alone.objective_s, "the search covers them"
    found = choose_plan(table, replace(proven, family=words, truncated_by=cut), "1f1b")
    assert found.objective_s < proven.bound_s, "a bound on plans of one device holds for none of two"
    assert found.bound_s == found.physical_bound_s and found.family.startswith("plans of any kind")
    assert found.status == "feasible" and found.truncated_by == (*cut, told)
