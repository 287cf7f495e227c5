"""The partitioner against every plan there is, against the baselines, and where it must refuse."""

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
from all_plans import best_step_s
from amounts import examples
from cost_tables import make_table, small_tables
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graphpar.cost import CostTable, CutEdge, LinkCost, Topology
from graphpar.cost_models.modes import with_modes
from graphpar.cost_options import StageOptions
from graphpar.errors import InfeasibleError, VerifyError
from graphpar.partition import infeasible
from graphpar.partition.baselines import (
    best_like_subset,
    data_parallel,
    even_split,
    greedy_split,
    one_device,
)
from graphpar.partition.check import check_partition
from graphpar.partition.counting.programme import CountingLimits
from graphpar.partition.family import Family, choose_family
from graphpar.partition.handmade import evaluate, simple_plans
from graphpar.partition.pipeline import partition
from graphpar.partition.programs import Programs
from graphpar.partition.relaxed_tables import with_batch, with_options
from graphpar.partition.stage_costs import StageLimits
from graphpar.partition.types import Partition, PipelineChoice, Replica, SearchedSchedule, StageChoice

RELAXED = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]


def assert_best(table: CostTable, found: Partition, best: float) -> None:
    """No plan is better; with pipelines of several stages side by side, by no more than the gap told."""
    assert found.bound_s <= best * (1 + 1e-9)
    assert found.physical_bound_s <= best * (1 + 1e-9)
    assert found.objective_s >= best * (1 - 1e-9)
    if found.status == "optimal":
        assert found.objective_s == pytest.approx(best, rel=1e-9, abs=1e-12)
        assert not found.truncated_by
        return
    # Two devices form no pipeline beside another one that could be cut.
    assert len(table.class_of) > 2 and table.training
    assert [words for words in found.truncated_by if not words.startswith("sums: ")] == []
    assert found.truncated_by


def assert_best_of_all(table: CostTable) -> None:
    best = best_step_s(table)
    if best is None:
        with pytest.raises(InfeasibleError):
            partition(table, gap=0.0)
        return
    found = partition(table, gap=0.0)
    assert_best(table, found, best)
    check_partition(table, found)


@settings(max_examples=examples(60), deadline=None, suppress_health_check=RELAXED)
@given(small_tables())
def test_partition_is_the_best_of_all_plans(table: CostTable) -> None:
    assert_best_of_all(table)


@settings(max_examples=examples(60), deadline=None, suppress_health_check=RELAXED)
@given(small_tables(max_units=3, modes=True))
def test_partition_is_the_best_of_all_plans_in_all_modes(table: CostTable) -> None:
    assert_best_of_all(table)


@settings(max_examples=examples(25), deadline=None, suppress_health_check=RELAXED)
@given(small_tables(max_units=3), st.sampled_from([(1,), (1, 2, 3)]), st.booleans())
def test_partition_is_the_best_of_all_plans_where_modes_outdo_others(
    table: CostTable, zero: tuple[int, ...], recompute: bool
) -> None:
    """Modes drawn one by one never cost the same; those of a table do, and then some are dropped."""
    assert_best_of_all(with_modes(table, StageOptions(zero=zero, recompute=recompute)))


@pytest.mark.parametrize(("optimizer_s", "zero"), [(0.0, 0), (40.0, 1)])
def test_replicas_divide_the_optimiser_where_that_takes_less(optimizer_s: float, zero: int) -> None:
    """Two replicas beside one device, which pipelines side by side cannot be: a device holds one unit."""
    table = make_table(
        (2.0, 1.0), (1.0,), (3,), memory_bytes=25.0, link=LinkCost(0.0, 10.0),
        weight_bytes=20.0, gradient_bytes=1.0, optimizer_s=optimizer_s,
    )  # fmt: skip
    table = with_modes(table, StageOptions(zero=(1,)))
    assert_best_of_all(table)
    (pipeline,) = partition(table, gap=0.0).pipelines
    assert [(len(s.replicas), s.zero) for s in pipeline.stages] == [(2, zero), (1, 0)]


@pytest.mark.slow
@settings(max_examples=40, deadline=None, suppress_health_check=RELAXED)
@given(small_tables(max_units=4, max_devices=4, max_batch=4))
def test_partition_is_the_best_of_all_plans_on_four_devices(table: CostTable) -> None:
    best = best_step_s(table)
    if best is not None:
        assert_best(table, partition(table, gap=0.0), best)


@pytest.mark.slow
@settings(max_examples=5, deadline=None, suppress_health_check=RELAXED)
@given(small_tables(max_units=6, max_devices=4, max_batch=2, modes=True))
def test_nothing_is_lost_against_all_decisions_at_once(table: CostTable) -> None:
    """Six blocks, four devices: cuts, order, staffing, modes, shares, microbatches, schedule together."""
    best = best_step_s(table)
    if best is not None:
        assert_best(table, partition(table, gap=0.0), best)


@settings(max_examples=examples(40), deadline=None, suppress_health_check=RELAXED)
@given(small_tables(), st.sampled_from([0.05, 0.2]))
def test_the_gap_is_kept_and_its_bound_true(table: CostTable, gap: float) -> None:
    best = best_step_s(table)
    if best is None:
        return
    found = partition(table, gap=gap)
    assert found.bound_s <= best * (1 + 1e-9)
    assert found.gap <= gap + 1e-9 or found.truncated_by[0].startswith("sums: ")
    assert found.objective_s * (1 - found.gap) <= best * (1 + 1e-9) + 1e-12


@settings(max_examples=25, deadline=None, suppress_health_check=RELAXED)
@given(small_tables(max_units=6, max_devices=4), st.sampled_from([60.0, 1e-9]))
def test_no_baseline_is_better(table: CostTable, time_limit_s: float) -> None:
    found: Partition | None = None
    simple = (even_split, greedy_split, data_parallel, one_device, best_like_subset)
    for make in simple:
        if make is best_like_subset and time_limit_s < 1:
            continue
        try:
            baseline = make(table)
        except InfeasibleError:
            continue
        found = found or partition(table, gap=0.0, time_limit_s=time_limit_s)
        if make is best_like_subset and found.truncated_by:
            assert found.objective_s * (1 - found.gap) <= baseline.objective_s * (1 + 1e-9)
            continue
        assert found.objective_s <= baseline.objective_s * (1 + 1e-9), make.__name__


@pytest.mark.parametrize(
    ("seconds", "speeds", "counts", "batch"),
    [([1.0, 1.0], (1.0,), (3,), 4), ([2.0, 1.0], (3.0, 1.5), (1, 1), 8)],
)
def test_no_simple_plan_is_better_within_the_gap(
    seconds: list[float], speeds: tuple[float, ...], counts: tuple[int, ...], batch: int
) -> None:
    """A search may stop at a plan within its gap that a split by hand beats by some per cent."""
    table = make_table(seconds, speeds, counts, batch=batch, link=LinkCost(0.1, 1.0), gradient_bytes=5.0)
    found = partition(table, gap=0.2)
    assert found.objective_s <= min(p.objective_s for p in simple_plans(table)) * (1 + 1e-9)


def test_a_search_cut_short_says_so() -> None:
    seconds = [1.0 + 0.1 * i for i in range(12)]
    table = make_table(
        seconds, (1.0, 2.0, 3.0), (2, 2, 2), batch=16, link=LinkCost(0.1, 1.0), gradient_bytes=9.0
    )
    cut = partition(table, gap=0.0, time_limit_s=1e-9)
    whole = partition(table, gap=0.01)
    assert cut.truncated_by
    assert cut.status == "feasible"
    assert cut.gap > 0
    assert cut.bound_s <= whole.objective_s
    assert not whole.truncated_by
    assert whole.gap <= 0.01
    check_partition(table, cut)


def test_shares_follow_speed() -> None:
    # Two devices, one three times faster, and no communication: 3 of 4 samples go to it.
    table = make_table([1.0], (1.0, 3.0), (1, 1), batch=4)
    found = partition(table, gap=0.0)
    assert found.objective_s == pytest.approx(3.0)
    work = {r.device: r.microbatches for p in found.pipelines for s in p.stages for r in s.replicas}
    samples = {p.stages[0].replicas[0].device: p.samples for p in found.pipelines}
    assert work == {"1.0": 3, "0.0": 1} or samples == {"1.0": 3, "0.0": 1}


def test_units_follow_speed_where_samples_mix() -> None:
    table = make_table([1.0] * 4, (1.0, 3.0), (1, 1), batch=4, memory_bytes=3.0)
    table = replace(table, max_microbatches=1, max_replicas=1, batch_reason="batch normalisation")
    found = partition(table, gap=0.0)
    (pipeline,) = found.pipelines
    assert pipeline.microbatches == 1
    stages = {s.replicas[0].device: s.last - s.first for s in pipeline.stages}
    assert stages == {"1.0": 3, "0.0": 1}
    assert any("batch normalisation" in note for note in found.notes)


def test_a_device_that_only_slows_down_is_left_out() -> None:
    link = LinkCost(10.0, 1.0)
    table = make_table([1.0] * 3, (1.0, 0.01), (1, 1), batch=1, link=link, cut_bytes=100.0)
    found = partition(table, gap=0.0)
    assert found.used_devices == ("0.0",)
    assert any("1.0" in note for note in found.notes)


def test_neighbouring_stages_share_a_node() -> None:
    table = make_table([1.0] * 4, (1.0,), (4,), batch=8, cut_bytes=1.0, memory_bytes=1.0)
    node_of = {"0.0": "a", "0.1": "b", "0.2": "a", "0.3": "b"}
    topology = Topology(node_of, {"a": LinkCost(0, 100.0), "b": LinkCost(0, 100.0)}, LinkCost(0, 1.0))
    found = partition(replace(table, topology=topology), gap=0.0)
    (pipeline,) = found.pipelines
    nodes = [node_of[s.replicas[0].device] for s in pipeline.stages]
    assert len(nodes) == 4
    assert sum(a != b for a, b in pairwise(nodes)) == 1


def test_inference_has_no_backward() -> None:
    table = make_table([1.0] * 4, (1.0,), (2,), batch=4, training=False, gradient_bytes=5.0)
    found = partition(table, gap=0.0)
    assert found.objective_s == pytest.approx(8.0)
    assert found.parts["sync_s"] == 0


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_schedule_and_microbatches_can_be_fixed(schedule: SearchedSchedule) -> None:
    table = make_table([1.0] * 4, (1.0,), (2,), batch=8, memory_bytes=3.0)
    found = partition(table, schedule=schedule, microbatches=4)
    assert found.schedule == schedule
    assert found.pipelines[0].microbatches == 4


def test_1f1b_keeps_less_than_gpipe() -> None:
    # Four microbatches of one byte per unit do not fit; two do.
    table = make_table([1.0] * 2, (1.0,), (2,), batch=4, memory_bytes=3.0, saved_bytes=1.0)
    found = partition(table, gap=0.0, microbatches=4)
    assert found.schedule == "1f1b"
    assert sorted(found.peak_bytes.values()) == [2.0, 3.0]


def test_infeasible_names_need_have_and_remedy() -> None:
    table = make_table([1.0] * 4, (1.0,), (2,), batch=2, weight_bytes=10.0, memory_bytes=15.0)
    with pytest.raises(InfeasibleError) as caught:
        partition(table)
    error = caught.value
    assert error.limit == "memory"
    assert error.have == 30.0
    assert error.need is not None
    assert 40.0 * 0.97 <= error.need <= 40.0 * 1.03
    assert "times the memory" in error.remedy
    assert "2 more of kind0" in str(error)
    assert "not enough" not in str(error)
    # However little there is of it.
    little = make_table([1.0] * 4, (1.0,), (2,), batch=2, weight_bytes=10.0, memory_bytes=1e-9)
    with pytest.raises(InfeasibleError, match=r"10 B instead of|20.\d B instead of") as caught:
        partition(little)
    assert caught.value.need == pytest.approx(40.0, rel=0.03)
    larger = make_table([1.0] * 4, (1.0,), (2,), batch=2, weight_bytes=10.0, memory_bytes=20.0)
    partition(larger)
    more = make_table([1.0] * 4, (1.0,), (4,), batch=2, weight_bytes=10.0, memory_bytes=15.0)
    partition(more)


@pytest.mark.parametrize("answers", range(14))
def test_what_time_did_not_settle_is_not_claimed(answers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two devices of 5 bytes for 40: four times the memory fits, and no plan does with 3.9 times."""
    table = make_table([1.0] * 4, (1.0,), (2,), batch=2, weight_bytes=10.0, memory_bytes=5.0)
    fits, asked = infeasible.fits, iter(range(answers))

    def in_time(family: Family, deadline_s: float) -> bool | None:
        return None if next(asked, None) is None else fits(family, deadline_s)

    monkeypatch.setattr(infeasible, "fits", in_time)
    with pytest.raises(InfeasibleError) as caught:
        partition(table)
    text, need = str(caught.value), caught.value.need
    assert need is None or need == pytest.approx(40.0, rel=0.03)
    assert ("the least demanding plan" in text) == (need is not None)
    lacks = re.findall(
        r"([0-9.]+) times the memory of every device \(([0-9.]+) B together\) is not", text
    )
    assert bool(lacks) == (answers == 0), "one copy of all weights needs nearly four times the memory"
    for factor, together in lacks:
        assert 3.9 < float(factor) < 4 and 39 < float(together) <= 40
    for factor in re.findall(r"devices with ([0-9.]+) times the memory", text):
        assert float(factor) >= 4 * 0.99
    # Eight devices of 5 bytes hold nothing either: a unit has 10.
    assert "more of kind0" not in text


def test_infeasible_names_options_that_fit() -> None:
    # Two samples at once keep 2 x 4 x 10 bytes; one device has room for the weights and half of that.
    kept = make_table(
        [1.0] * 4, (1.0,), (1,), batch=4, weight_bytes=1.0, saved_bytes=10.0, memory_bytes=60.0
    )
    whole = replace(kept, max_microbatches=1, max_replicas=1, sizes=(4,))
    rows = {"forward_s": ((4.0,),), "backward_s": ((8.0,),), "saved_bytes": (40.0,)}
    costs = tuple(replace(c, **rows, working_bytes=(0.0,)) for c in kept.costs)  # type: ignore[arg-type]
    whole = replace(whole, costs=costs)
    with pytest.raises(InfeasibleError) as caught:
        partition(whole)
    assert caught.value.remedy == "recomputation"
    assert "a batch of 1 instead of 4" in str(caught.value)
    partition(with_options(whole, recompute=True, zero=0))
    partition(with_batch(whole, 1))
    with pytest.raises(InfeasibleError):
        partition(with_batch(whole, 2))
    # Where samples mix, units may not run twice.
    with pytest.raises(InfeasibleError) as caught:
        partition(replace(whole, batch_reason="samples mix"))
    assert caught.value.remedy == "a batch of 1 instead of 4"


def test_infeasible_names_what_was_fixed_too_tightly() -> None:
    """Two stages of two units; the first one's microbatches in flight fit if they are small enough."""
    table = make_table([1.0] * 4, (1.0,), (2,), batch=8, saved_bytes=1.0, memory_bytes=11.0)
    with pytest.raises(InfeasibleError) as caught:
        partition(table, microbatches=2)
    # Weights of 2, and two microbatches of 8 / m samples in two units each: 2 + 2 * 2 * 8 / m.
    assert caught.value.remedy == "microbatches=4 instead of 2"
    partition(table, microbatches=4)
    with pytest.raises(InfeasibleError):
        partition(table, microbatches=3)
    with pytest.raises(InfeasibleError) as caught:
        partition(table, schedule="gpipe")
    assert caught.value.remedy == 'schedule="1f1b" instead of "gpipe"'
    assert partition(table, schedule="1f1b").schedule == "1f1b"


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(small_tables(modes=True), st.sampled_from([0.02, 0.1, 0.4]))
def test_whether_the_finest_microbatches_fit_says_whether_any_do(table: CostTable, part: float) -> None:
    def by_sample(row: Sequence[float]) -> tuple[float, ...]:
        return tuple(size * row[0] for size in table.sizes)

    costs = tuple(replace(c, saved_bytes=by_sample(c.saved_bytes)) for c in table.costs)
    modes = tuple(
        replace(
            mode,
            costs=tuple(replace(c, saved_bytes=tuple(map(by_sample, c.saved_bytes))) for c in mode.costs),
        )
        for mode in table.modes
    )
    scaled = infeasible.scale_memory(replace(table, costs=costs, modes=modes), part)
    family = choose_family(scaled, "auto", "auto")
    alike = tuple(o for o in family.options if len(set(o.staff)) == 1)
    family = replace(family, options=alike)
    assert infeasible._finest_holds_least(family)
    programs = Programs(family, CountingLimits(0.5, "highs"))
    tasks = programs.tasks(family.cells.counts, table.batch, family.schedules)
    every = any(t.build().solve(StageLimits(), float("inf")) is not None for t in tasks)
    assert infeasible._holds(programs, family.cells.counts, table.batch, 1, float("inf")) == every


def test_enough_is_rounded_up() -> None:
    """Three devices of which two hold three units of ten bytes; what is told must be enough."""
    table = make_table([1.0] * 7, (1.0,), (3,), weight_bytes=10.007, memory_bytes=22.0)
    with pytest.raises(InfeasibleError) as caught:
        partition(table)
    found = re.search(
        r"devices with [0-9.]+ times the memory \(([0-9.]+) B instead of 22 B\)", str(caught.value)
    )
    assert found is not None
    enough = float(found.group(1))
    partition(make_table([1.0] * 7, (1.0,), (3,), weight_bytes=10.007, memory_bytes=enough))
    with pytest.raises(InfeasibleError):
        partition(make_table([1.0] * 7, (1.0,), (3,), weight_bytes=10.007, memory_bytes=enough / 1.03))


def test_infeasible_counts_on_pipelines_side_by_side() -> None:
    """In step each pipeline keeps all its samples: two take more of them than one over all devices."""

    def kept(devices: int, memory_bytes: float) -> CostTable:
        table = make_table(
            [1.0] * 2, (1.0,), (devices,), batch=8, saved_bytes=2.0, memory_bytes=memory_bytes
        )
        return replace(table, in_step_reason="sums over the batch", max_microbatches=1)

    with pytest.raises(InfeasibleError) as caught:
        partition(kept(3, 11.0))
    # Two stages of a unit of one byte take 6 samples of 2 bytes, the third device 2; alone they take 8.
    assert caught.value.need == pytest.approx(3 * (1 + 2 * 6), rel=0.03)
    assert "1 more of kind0" in str(caught.value)
    partition(kept(3, 13.0))
    partition(kept(4, 11.0))


def test_infeasible_names_an_optimiser_whose_update_takes_less() -> None:
    """Two stages of two units, each with 4 bytes of weights and gradients and 2 of the update."""
    table = make_table([1.0] * 4, (1.0,), (2,), weight_bytes=1.0, gradient_bytes=1.0, memory_bytes=5.0)
    gpus = tuple(replace(c, update_share=1.0) for c in table.device_classes)
    with pytest.raises(InfeasibleError) as caught:
        partition(replace(table, device_classes=gpus))
    assert "fused=True" in caught.value.remedy
    assert set(partition(table).peak_bytes.values()) == {4.0}
    (larger,) = (replace(c, memory_bytes=6.0) for c in gpus)
    fitting = partition(replace(table, device_classes=(larger,)))
    assert set(fitting.peak_bytes.values()) == {6.0}
    with pytest.raises(VerifyError, match="needs 6 bytes of 5"):
        check_partition(replace(table, device_classes=gpus), fitting)


def test_a_mode_like_the_plain_one_is_refused() -> None:
    table = make_table()
    with pytest.raises(ValueError, match="mode 0 is there twice"):
        partition(replace(table, modes=(table.every_mode[0],)))


def test_infeasible_names_zero_where_replicas_can_share() -> None:
    table = make_table([1.0], (1.0,), (2,), batch=4, memory_bytes=25.0)
    costs = tuple(replace(c, optimizer_bytes=40.0) for c in table.costs)
    with pytest.raises(InfeasibleError) as caught:
        partition(replace(table, costs=costs))
    assert caught.value.remedy == "ZeRO level 1"
    partition(with_options(replace(table, costs=costs), recompute=False, zero=1))


def broken_tables() -> list[tuple[CostTable, str]]:
    """Tables that make no sense, with what the error must mention."""
    good = make_table()
    cost = good.costs[0]
    nan = replace(cost, forward_s=((float("nan"), 1.0),))
    negative = replace(cost, weight_bytes=-1.0)
    short = replace(cost, backward_s=((1.0,),))
    nobody = replace(good.device_classes[0], devices=())
    one_way = {("a", "b"): LinkCost(0.0, 1.0), ("b", "a"): LinkCost(0.0, 2.0)}
    return [
        (replace(good, costs=(nan, *good.costs[1:])), "forward_s holds nan"),
        (replace(good, costs=(negative, *good.costs[1:])), "weight_bytes holds -1"),
        (replace(good, costs=(short, *good.costs[1:])), "backward_s must be"),
        (replace(good, device_classes=(nobody,)), "no devices"),
        (replace(good, units=(), unit_names=()), "no units"),
        (replace(good, units=(0, 1, 2, 9)), "refers to cost 9"),
        (replace(good, sizes=(4, 1)), "increase"),
        (replace(good, batch=0), "batch has 0"),
        (replace(good, edges=(CutEdge(2, 1, 1.0),)), "edge 2 -> 1"),
        (replace(good, edges=(CutEdge(0, 1, float("inf")),)), "bytes_per_sample holds inf"),
        (replace(good, topology=Topology({}, {}, LinkCost(0.0, 1.0))), "has no node"),
        (replace(good, topology=replace(good.topology, network=LinkCost(0.0, 0.0))), "bytes_per_s 0"),
        (replace(good, topology=replace(good.topology, between=one_way)), "between a and b is not"),
    ]


@pytest.mark.parametrize(("table", "words"), broken_tables())
def test_a_table_without_sense_is_refused(table: CostTable, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        partition(table)


def test_arguments_are_checked() -> None:
    table = make_table()
    for arguments in ({"gap": 1.0}, {"time_limit_s": 0.0}, {"microbatches": 9}, {"schedule": "none"}):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            partition(table, **arguments)


def test_impossible_entries_are_avoided() -> None:
    table = make_table([1.0] * 4, (1.0, 1e-18), (1, 1), batch=2)
    found = partition(table, gap=0.0)
    assert found.used_devices == ("0.0",)
    assert found.objective_s == pytest.approx(24.0)


def test_even_split_is_even() -> None:
    found = even_split(make_table([1.0] * 6, (1.0, 2.0), (2, 1), batch=4))
    (pipeline,) = found.pipelines
    assert [s.last - s.first for s in pipeline.stages] == [2, 2, 2]
    assert found.used_devices == ("0.0", "0.1", "1.0")


def test_even_split_that_does_not_fit_is_infeasible() -> None:
    with pytest.raises(InfeasibleError, match="even split"):
        even_split(make_table([1.0] * 4, weight_bytes=10.0, memory_bytes=15.0))


def test_like_subset_uses_one_class() -> None:
    table = make_table([1.0] * 4, (1.0, 2.0), (2, 1), batch=4)
    used = best_like_subset(table).used_devices
    assert len({table.class_of[d] for d in used}) == 1


def test_evaluate_deals_microbatches() -> None:
    table = make_table([1.0] * 2, (1.0, 3.0), (1, 1), batch=4)
    stage = StageChoice(0, 2, (Replica("0.0", 0), Replica("1.0", 0)))
    found = evaluate(table, [PipelineChoice(4, 4, (stage,))])
    assert [r.microbatches for r in found.pipelines[0].stages[0].replicas] == [1, 3]
    assert found.objective_s == pytest.approx(6.0)


def parts_add_up(found: Partition) -> bool:
    """Whether the parts are the whole."""
    return sum(found.parts.values()) == pytest.approx(found.objective_s)


def test_parts_add_up() -> None:
    table = make_table([1.0] * 4, (1.0, 2.0), (1, 1), gradient_bytes=1.0, optimizer_s=0.1)
    assert parts_add_up(partition(table))
