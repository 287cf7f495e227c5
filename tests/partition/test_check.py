"""The checker finds what is wrong, and agrees with the solver's own prices."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations, product

import pytest
from all_plans import all_plans, bare
from cost_tables import make_table, small_tables
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graphpar.cost import CostTable
from graphpar.cost_models.modes import with_modes
from graphpar.cost_options import StageOptions
from graphpar.errors import VerifyError
from graphpar.partition.candidate import best_candidate
from graphpar.partition.check import check_partition, recompute
from graphpar.partition.handmade import evaluate
from graphpar.partition.pipeline import partition
from graphpar.partition.pipeline_price import price, replica_times_s, share_microbatches
from graphpar.partition.types import Partition, PipelineChoice, Replica, ScheduleName, StageChoice


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(small_tables(), st.sampled_from(["1f1b", "gpipe"]), st.randoms(use_true_random=False))
def test_checker_and_price_agree_on_any_plan(
    table: CostTable, schedule: ScheduleName, random: st.DataObject
) -> None:
    plans = list(all_plans(table, schedule))
    for _ in range(min(20, len(plans))):
        plan = random.choice(plans)  # type: ignore[attr-defined]
        cost = price(table, plan, schedule)
        checked = recompute(table, bare(plan, schedule))
        assert checked.objective_s == pytest.approx(cost.objective_s, rel=1e-9, abs=1e-12)
        assert checked.peak_bytes == pytest.approx(cost.peak_bytes, rel=1e-9)


def test_unlike_replicas_that_take_equally_long_are_alike_whatever_the_order_of_sums() -> None:
    """They do at the mean size; a larger sample takes one no longer, the other three times as long."""
    table = make_table([1.0] * 3, (1.0, 1.0), (1, 1), batch=3)
    unit = replace(
        table.costs[0], forward_s=((1.0, 1.0), (0.1, 2.1)), backward_s=((0.1, 0.1), (0.0, 2.0))
    )
    table = replace(table, sizes=(1, 3), costs=(unit,), units=(0, 0, 0))
    stage = StageChoice(0, 3, (Replica("0.0", 1), Replica("1.0", 1)))
    times_s = replica_times_s(table, stage, 1.5)
    assert times_s[0] != times_s[1]
    found = evaluate(table, [PipelineChoice(3, 2, (stage,))])
    assert recompute(table, found).objective_s == pytest.approx(found.objective_s, rel=1e-12)


def good() -> tuple[CostTable, Partition]:
    """A table and its plan: two stages."""
    table = make_table([1.0] * 4, (1.0,), (2,), batch=4, memory_bytes=3.0)
    return table, partition(table)


def with_stages(found: Partition, stages: tuple[StageChoice, ...]) -> Partition:
    """The same partition with other stages."""
    return replace(found, pipelines=(replace(found.pipelines[0], stages=stages),))


def test_a_good_partition_passes() -> None:
    table, found = good()
    checked = check_partition(table, found)
    assert checked.objective_s == pytest.approx(found.objective_s)


def test_of_pipelines_that_end_together_any_may_say_what_the_step_consists_of() -> None:
    """Sums of equal numbers differ by rounding: which of two pipelines is the slower is no claim."""
    table = make_table([1.0] * 4, (3.0, 1.0), (1, 1), batch=4)
    fast = PipelineChoice(3, 3, (StageChoice(0, 4, (Replica("0.0", 0),)),))
    slow = PipelineChoice(1, 1, (StageChoice(0, 4, (Replica("1.0", 0),)),))
    found = evaluate(table, [fast, slow])
    for fill_s, steady_s in ((4.0, 8.0), (12.0, 0.0)):
        parts = {**found.parts, "fill_compute_s": fill_s, "steady_s": steady_s}
        check_partition(table, replace(found, parts=parts))
    with pytest.raises(VerifyError, match="fill_compute_s"):
        check_partition(
            table, replace(found, parts={**found.parts, "fill_compute_s": 8.0, "steady_s": 4.0})
        )


def broken() -> list[tuple[Partition, str]]:
    """Partitions with one thing wrong each."""
    _, found = good()
    (pipeline,) = found.pipelines
    first, last = pipeline.stages
    twice = replace(last, replicas=first.replicas)
    other = PipelineChoice(4, 4, (StageChoice(0, 4, (Replica("0.0", 4),)),))
    return [
        (replace(found, objective_s=found.objective_s * 1.01), "step"),
        (replace(found, bound_s=found.objective_s * 1.01), "bound"),
        (replace(found, parts={}), "fill_compute_s"),
        (replace(found, peak_bytes=dict.fromkeys(found.peak_bytes, 0.0)), "peak of"),
        (replace(found, peak_bytes={}), "other devices"),
        (replace(found, pipelines=()), "no pipeline"),
        (replace(found, pipelines=(replace(pipeline, samples=3),)), "add up to the batch"),
        (replace(found, pipelines=(replace(pipeline, microbatches=5),)), "microbatches"),
        (with_stages(found, (first,)), "end at unit"),
        (with_stages(found, (last, first)), "holds units"),
        (with_stages(found, (first, twice)), "used twice"),
        (with_stages(found, (first, replace(last, replicas=(Replica("x", 4),)))), "no device x"),
        (with_stages(found, (first, replace(last, replicas=()))), "deals"),
        (replace(found, pipelines=(other,)), "."),
    ]


@pytest.mark.parametrize(("claim", "words"), broken())
def test_a_wrong_claim_is_refused(claim: Partition, words: str) -> None:
    table, _ = good()
    with pytest.raises(VerifyError, match=words):
        check_partition(table, claim)


def test_memory_is_enforced() -> None:
    table, found = good()
    small = tuple(replace(c, memory_bytes=1.0) for c in table.device_classes)
    with pytest.raises(VerifyError, match="needs"):
        check_partition(replace(table, device_classes=small), found)
    check_partition(replace(table, device_classes=small), found, memory=False)


def test_copies_are_limited() -> None:
    table = make_table([1.0], (1.0,), (2,), batch=4)
    found = partition(table)
    assert len(found.used_devices) == 2
    with pytest.raises(VerifyError, match="2 copies"):
        check_partition(replace(table, max_replicas=1), found)


def test_the_replica_with_the_fastest_optimiser_sums_with_other_pipelines() -> None:
    """No order of the replicas is better, and the given one is worse."""
    table = make_table([1.0], (1.0, 4.0), (2, 2), weight_bytes=8.0, gradient_bytes=8.0, optimizer_s=20.0)
    table = with_modes(replace(table, sum_s_per_byte=0.5), StageOptions(zero=(1,)))
    pairs = (("0.0", "1.0"), ("0.1", "1.1"))

    def plan(orders: Sequence[Sequence[str]]) -> tuple[PipelineChoice, ...]:
        stages = [StageChoice(0, 1, tuple(Replica(d, 0) for d in own), zero=1) for own in orders]
        return tuple(share_microbatches(table, PipelineChoice(2, 2, (s,)), "1f1b") for s in stages)

    steps = [
        price(table, plan(orders), "1f1b").objective_s for orders in product(*map(permutations, pairs))
    ]
    found = best_candidate(table, plan(pairs), "1f1b")
    assert found.step_s == pytest.approx(min(steps))
    assert found.step_s < price(table, plan(pairs), "1f1b").objective_s
