"""Which schedule a plan gets: by simulation, within memory, and with a bound that holds."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graphpar.choice.orders import (
    UnavailableScheduleError,
    choose_schedule,
    interleaved,
)
from graphpar.cost import CostTable, CutEdge, DeviceClass, LinkCost, Topology, UnitCost
from graphpar.errors import InfeasibleError
from graphpar.explanation.build import explain_partition
from graphpar.partition.pipeline import partition
from graphpar.partition.settings import ScheduleWish
from graphpar.partition.types import Partition, PipelineChoice, Replica, ScheduleName, StageChoice
from graphpar.plans.build import predict
from graphpar.schedule.simulated import Simulated, least_step_s, simulated, stage_links


def blocks(
    units: int = 8,
    speeds: tuple[float, ...] = (1.0, 1.0),
    batch: int = 6,
    *,
    memory_bytes: float = 1e12,
    split_s: float = 0.0,
) -> CostTable:
    """Equal blocks, heavy to copy and light to send; half of a backward is for weights."""

    def rows(each: float) -> tuple[tuple[float, ...], ...]:
        return tuple((speed * each, speed * each * batch) for speed in speeds)

    names = tuple(f"a/{i}" for i in range(len(speeds)))
    link = LinkCost(0.0, 1e8)
    unit = UnitCost(
        name="block",
        forward_s=rows(1e-3),
        backward_s=rows(2e-3),
        optimizer_s=(0.0,) * len(speeds),
        weight_bytes=1e7,
        gradient_bytes=1e7,
        optimizer_bytes=0.0,
        saved_bytes=(1e6, 1e6 * batch),
        working_bytes=(0.0, 0.0),
        weight_s=rows(1e-3),
        deferred_bytes=(5e5, 5e5 * batch),
        split_s=((split_s, split_s),) * len(speeds),
    )
    return CostTable(
        batch=batch,
        training=True,
        sizes=(1, batch),
        units=(0,) * units,
        unit_names=tuple(f"h.{i}" for i in range(units)),
        costs=(unit,),
        edges=tuple(CutEdge(u, u + 1, 100.0, 100.0) for u in range(units - 1)),
        device_classes=tuple(DeviceClass(n, (n,), memory_bytes) for n in names),
        topology=Topology(dict.fromkeys(names, "a"), {"a": link}, link),
        max_microbatches=batch,
        max_replicas=batch,
    )


def straight(cuts: tuple[int, ...], microbatches: int) -> PipelineChoice:
    stages = tuple(
        StageChoice(first, last, (Replica(f"a/{i}", microbatches),))
        for i, (first, last) in enumerate(itertools.pairwise(cuts))
    )
    return PipelineChoice(microbatches, microbatches, stages)


def test_the_best_simulated_schedule_wins_and_says_what_others_take() -> None:
    table = blocks()
    found = partition(table)
    chosen = choose_schedule(table, found)
    assert chosen.schedule == "zero-bubble"
    (note,) = [n for n in chosen.notes if n.startswith("schedules, simulated")]
    assert found.schedule in note and "interleaved, 2 stages each" in note
    assert chosen.bound_s == chosen.physical_bound_s <= chosen.objective_s < found.objective_s
    assert "any kind" in chosen.family and any("schedule" in t for t in chosen.truncated_by)
    assert chosen.runners_up[0].schedule == found.schedule
    assert all(other.objective_s >= chosen.objective_s for other in chosen.runners_up)
    # What the plan promises is what its lists take.
    predicted = predict(table, chosen, stage_links(table, chosen.pipelines))
    assert predicted.timeline.step_s == pytest.approx(chosen.objective_s)


def test_halves_that_cost_more_than_they_gain_are_left_alone() -> None:
    table = blocks(units=2, split_s=1e-2)
    found = partition(table)
    chosen = choose_schedule(table, found)
    assert chosen.schedule == found.schedule and chosen.gap == found.gap


def test_a_shorter_schedule_that_is_not_taken_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphpar.choice.orders.LEAST_GAIN", 0.99)
    table = blocks()
    chosen = choose_schedule(table, found := partition(table))
    assert chosen.schedule == found.schedule
    assert any("was kept" in note and "99 % shorter" in note for note in chosen.notes)


@pytest.mark.parametrize("wish", ["interleaved", "zero-bubble"])
def test_a_schedule_can_be_asked_for(wish: ScheduleWish) -> None:
    table = blocks(split_s=1e-2)
    chosen = choose_schedule(table, partition(table, schedule="1f1b"), wish)
    assert chosen.schedule == wish
    (pipeline,) = chosen.pipelines
    assert wish == "zero-bubble" or len(pipeline.stages) > 2


def test_a_schedule_that_cannot_be_had_says_why() -> None:
    alone, whole = blocks(speeds=(1.0,)), replace(blocks(), max_microbatches=1, batch_reason="%x mixes")
    for table, why in ((alone, "one device"), (whole, "%x mixes")):
        with pytest.raises(UnavailableScheduleError, match=why):
            choose_schedule(table, partition(table, schedule="1f1b"), "interleaved")
    small = blocks(memory_bytes=4 * 2e7 + 8.5e6)
    with pytest.raises(InfeasibleError, match="does not fit"):
        choose_schedule(small, partition(small, schedule="1f1b", microbatches=6), "interleaved", 6)


def test_explanations_know_schedules_without_a_formula() -> None:
    table = blocks()
    chosen = choose_schedule(table, partition(table))
    explained = explain_partition(table, chosen, time_limit_s=5.0)
    choice = next(c for c in explained.choices if c.kind == "microbatches")
    assert all(a.costs_s is None or a.costs_s >= -1e-9 for a in choice.alternatives)
    assert explained.runners_up[0].costs_s > 0


@settings(max_examples=20, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(2, 4), st.integers(2, 3), st.integers(0, 5), st.integers(2, 9))
def test_interleaved_is_no_slower_on_like_devices(
    devices: int, chunks: int, more: int, rounds: int
) -> None:
    """With stages that divide evenly, links that take nothing, and microbatches for all devices."""
    microbatches = devices * rounds + more
    table = blocks(devices * chunks, (1.0,) * devices, microbatches)
    table = replace(table, topology=replace(table.topology, inside={"a": LinkCost(0.0, 1e30)}))
    plain = straight(tuple(range(0, devices * chunks + 1, chunks)), microbatches)
    dealt = interleaved(table, plain, chunks)
    assert [s.last - s.first for s in dealt.stages] == [1] * devices * chunks
    ways: tuple[tuple[PipelineChoice, ScheduleName], ...] = (
        (plain, "1f1b"),
        (dealt, "interleaved"),
        (dealt, "zero-bubble"),
    )
    steps = [simulated(table, (pipeline,), name).step_s for pipeline, name in ways]
    assert steps == sorted(steps, reverse=True)


@settings(max_examples=15, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.data())
def test_unlike_devices_keep_about_their_share_of_the_work(data: st.DataObject) -> None:
    speeds = tuple(
        data.draw(st.sampled_from([1.0, 2.0, 3.0])) for _ in range(data.draw(st.integers(2, 3)))
    )
    table = blocks(18, speeds, 4)
    found: Partition = partition(table, schedule="1f1b", microbatches=4)
    for pipeline in found.pipelines:
        dealt = interleaved(table, pipeline, 2)
        ends = [s.first for s in dealt.stages] + [dealt.stages[-1].last]
        assert ends == sorted(set(ends)) and (ends[0], ends[-1]) == (0, 18)
        if dealt is not pipeline:
            work = {s.replicas[0].device: s.last - s.first for s in pipeline.stages}
            for device, units in work.items():
                own = [s.last - s.first for s in dealt.stages if s.replicas[0].device == device]
                assert len(own) == 2 and abs(sum(own) - units) <= 2


def test_ways_that_differ_by_rounding_alone_are_no_trouble(monkeypatch: pytest.MonkeyPatch) -> None:
    number = itertools.count()

    def nearly_alike(*args: Any) -> Simulated:
        return replace(simulated(*args), step_s=1e-3 * (1 - 1e-12 * next(number)))

    monkeypatch.setattr("graphpar.choice.orders.simulated", nearly_alike)
    table = blocks()
    assert choose_schedule(table, partition(table)).pipelines


@pytest.mark.parametrize(("speeds", "microbatches"), [((1.0, 1.0), 6), ((1.0, 2.0), 3)])
def test_what_no_order_is_shorter_than_is_reached_without_bubbles(
    speeds: tuple[float, ...], microbatches: int
) -> None:
    table = blocks(speeds=speeds)
    plan = [replace(straight((0, 4, 8), microbatches), samples=6)]
    least_s = least_step_s(table, plan)
    steps_s = [simulated(table, plan, name).step_s for name in ("1f1b", "gpipe", "zero-bubble")]
    assert least_s <= min(steps_s) <= least_s * (1 + 1e-3)


@pytest.mark.parametrize("joined", [False, True])
def test_stages_that_nothing_joins_need_not_wait(joined: bool) -> None:
    table = blocks()
    costs = tuple(replace(c, weight_s=()) for c in table.costs)
    # Nothing at all crosses the boundary, or what does has no gradient, such as integers.
    edges = [replace(e, bytes_per_sample=1.0, gradient_bytes_per_sample=0.0) for e in table.edges]
    table = replace(table, costs=costs, edges=tuple(edges) if joined else ())
    plan = [straight((0, 4, 8), 1)]
    for name in ("1f1b", "gpipe", "zero-bubble"):
        assert least_step_s(table, plan) <= simulated(table, plan, name).step_s * (1 + 1e-9)
