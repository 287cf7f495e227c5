"""What cannot be worse is never answered worse; plans carry over to other settings."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plan_samples import sample_partition, table_for

from graphpar.cluster import Cluster
from graphpar.optimizer_memory import update_memory
from graphpar.partition.pipeline_price import price
from graphpar.partition.relaxed_tables import with_batch
from graphpar.partition.settings import microbatch_counts
from graphpar.scenarios.changes import apply
from graphpar.scenarios.dominance import GivenOptimizer, covers, places, with_these_alone
from graphpar.scenarios.pricing import training_of
from graphpar.scenarios.transfer import carried
from graphpar.scenarios.types import OPTIMIZER_UPDATES, KnownPlan, Setting
from graphpar.training import Training

LAB = Cluster.from_dict(
    {
        "nodes": [
            {"name": "a", "devices": {"kind": "h100-sxm-80gb", "count": 2}},
            {"name": "b", "devices": [{"kind": "t4", "count": 1}, {"kind": "l4", "count": 1}]},
        ],
        "network": {"bytes_per_s": 1e9, "latency_s": 1e-5},
    }
)
BASE = Setting(LAB, batch=16, training=True)

BETTER = (
    "set network.bytes_per_s=2e9",
    "set network.latency_s=1e-6",
    "set a.link.bytes_per_s=1e12",
    "set a/0.memory_bytes=90e9",
    "add t4 to b",
    "add l4",
    "set batch=48",
    "set tensor=auto",
)
"""Each of them gives the planner more, or no less."""

WORSE = (
    "set network.bytes_per_s=0.5e9",
    "set a.link.latency_s=1",
    "set b.memory_bytes=1e9",
    "set a.slowdown=2",
    "drop b/0",
    "down a",
    "set batch=8",
    "set recompute=off",
    "set recompute=on",
    "set schedule=gpipe",
    "set microbatches=4",
    "dp=2",
)

OTHER = ("set precision=bfloat16", "replace b/0 with l4", "set seq_len=7", "set batch=24")


@given(st.lists(st.sampled_from(BETTER), unique=True), st.lists(st.sampled_from(WORSE), max_size=3))
def test_what_is_better_in_every_way_covers_what_is_not(better: list[str], worse: list[str]) -> None:
    up = BASE
    for change in better:
        up = apply(up, [change])
    down = BASE
    for change in worse:
        try:
            down = apply(down, [change])
        except ValueError:
            continue  # the device it is about is gone
    if up.batch % down.batch == 0 and (up.batch == down.batch or down.layout is None):
        assert covers(up, down)
    assert covers(down, up) <= (up == down or not better)


@pytest.mark.parametrize("change", OTHER)
def test_what_is_only_different_covers_nothing(change: str) -> None:
    other = apply(BASE, [change])
    assert not covers(other, BASE)
    assert not covers(BASE, other)


def test_a_lighter_optimiser_covers_a_heavier_one_where_that_is_known() -> None:
    sgd, adam = (replace(BASE, optimizer=name) for name in ("sgd", "adam"))
    assert covers(sgd, adam)
    assert not covers(adam, sgd)
    assert not covers(sgd, BASE)
    assert covers(sgd, BASE, GivenOptimizer(2.0))
    # SGD with weight decay keeps no state, but its update takes a value for every gradient.
    assert covers(sgd, BASE, GivenOptimizer(0.0, 1.0)) and not covers(BASE, sgd, GivenOptimizer(0.0, 1.0))
    train = Training(optimizer=torch.optim.SGD)
    for name, share in OPTIMIZER_UPDATES.items():
        named = training_of(train, name)
        assert named is not None and update_memory(named.optimizer, on_gpu=True).share == share
        assert update_memory(named.optimizer, on_gpu=False).share == 0
    # One that updates everything at once does so on processors, too, where those known by name do not.
    for kind, covered in (("cpu", False), ("t4", True)):
        own = replace(BASE, cluster=Cluster.from_dict({"devices": [{"kind": kind, "count": 2}]}))
        named_so = replace(own, optimizer="adam")
        assert covers(own, named_so, GivenOptimizer(2.0, 1.0, 1.0)) is covered
        assert covers(named_so, own, GivenOptimizer(2.0, 1.0, 1.0))


@pytest.mark.parametrize(("slow", "fast", "covered"), [(3, 2, True), (2, 1, False)])
def test_workers_without_pauses_have_messages_to_pay_for(slow: float, fast: float, covered: bool) -> None:
    def at(slowdown: float) -> Setting:
        workers = {"devices": [{"kind": "cpu", "count": 2, "slowdown": slowdown}]}
        return replace(BASE, cluster=Cluster.from_dict(workers))

    assert covers(at(fast), at(slow)) is covered


@given(st.integers(1, 80))
def test_a_plan_carries_over_to_another_batch(batch: int) -> None:
    found = sample_partition()
    (before,) = found.pipelines
    plan = KnownPlan(found.pipelines, found.schedule, before.samples)
    table = table_for(replace(found, pipelines=(replace(before, samples=batch),)))
    other = carried(table, plan, again=False)
    assert (other is None) == (batch < 5), "the slower of two replicas is left without microbatches"
    if other is None:
        return
    (pipeline,) = other.pipelines
    assert pipeline.samples == batch
    assert pipeline.microbatches in microbatch_counts(table, batch, "auto")
    assert all(r.microbatches for s in pipeline.stages for r in s.replicas)
    assert other.objective_s == pytest.approx(price(table, other.pipelines, other.schedule).objective_s)
    if batch % before.samples == 0:
        assert pipeline.sizes() == before.sizes() * (batch // before.samples)


def test_what_a_plan_leaves_idle_may_be_missing() -> None:
    without = apply(BASE, ["drop b/0"])
    assert not covers(without, BASE)
    assert covers(without, with_these_alone(BASE, ("a/0", "a/1", "b/1")))
    assert covers(apply(BASE, ["drop b"]), with_these_alone(BASE, ("a/0",)))
    assert not covers(without, with_these_alone(BASE, ("a/0", "b/0")))


def test_equal_devices_and_equal_nodes_stand_in_for_each_other() -> None:
    first, second = (apply(BASE, [f"drop a/{i}"]) for i in (0, 1))
    assert places(first, second) == {"a/0": "a/1", "b/0": "b/0", "b/1": "b/1"}
    assert places(apply(BASE, ["drop b/0"]), with_these_alone(BASE, ("b/0",))) is None
    twins = apply(BASE, ["drop b", "set a.copies=2"])
    left, right = apply(twins, ["drop a"]), apply(twins, ["drop a-2"])
    assert places(left, right) == {"a/0": "a-2/0", "a/1": "a-2/1"}
    # The device with more memory takes the place of the one that needs it.
    more = apply(BASE, ["set a/1.memory_bytes=90e9"])
    assert places(more, apply(BASE, ["set a/0.memory_bytes=90e9"])) == {
        "a/0": "a/1", "a/1": "a/0", "b/0": "b/0", "b/1": "b/1",
    }  # fmt: skip


def test_a_configuration_by_hand_is_not_carried_to_other_devices() -> None:
    first, second = (apply(BASE, [f"drop a/{i}", "pp=2"]) for i in (0, 1))
    assert covers(first, first)
    assert not covers(first, second)


def test_a_plan_that_cannot_be_had_is_not_carried_over() -> None:
    found = sample_partition()
    plan = KnownPlan(found.pipelines, found.schedule, sum(p.samples for p in found.pipelines))
    table = table_for(found)
    tiny = replace(
        table, device_classes=tuple(replace(c, memory_bytes=1.0) for c in table.device_classes)
    )
    assert carried(tiny, plan, again=False) is None
    assert carried(table, plan, again=True) is None
    assert carried(with_batch(table, 1), plan, again=False) is None
    gone = replace(table, device_classes=tuple(replace(c, devices=()) for c in table.device_classes))
    assert carried(gone, plan, again=False) is None


def test_replicas_share_the_microbatches_of_a_larger_batch_in_an_order_without_a_formula() -> None:
    found = sample_partition()
    assert any(len(s.replicas) > 1 for p in found.pipelines for s in p.stages)
    plan = KnownPlan(found.pipelines, "zero-bubble", sum(p.samples for p in found.pipelines))
    twice = replace(found, pipelines=tuple(replace(p, samples=2 * p.samples) for p in found.pipelines))
    larger = carried(table_for(twice), plan, again=False)
    assert larger is not None
    for pipeline, small in zip(larger.pipelines, found.pipelines, strict=True):
        assert pipeline.microbatches == 2 * small.microbatches
        for stage in pipeline.stages:
            assert sum(r.microbatches for r in stage.replicas) == pipeline.microbatches
