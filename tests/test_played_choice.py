"""No plan over several devices is taken where one is as fast when both are played through."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_schedule_choice import blocks

from graphpar.choice.comparison import step_of
from graphpar.choice.final import choose_plan
from graphpar.choice.played import best_played
from graphpar.cores import CoreUse, SharedCores
from graphpar.cost import CostTable, LinkCost, RepeatedWeights, Topology
from graphpar.explanation import words
from graphpar.explanation.build import explain_partition
from graphpar.partition.check import check_partition
from graphpar.partition.handmade import Tried, even_split, one_device, priced_plan, simple_plans
from graphpar.partition.pipeline import partition
from graphpar.partition.types import Partition, PipelineChoice, Replica, StageChoice
from graphpar.scenarios.solve import solve
from graphpar.scenarios.task import Task
from graphpar.schedule.simulated import certified, simulated
from graphpar.schedule.timing import timing_of
from graphpar.units import format_seconds


def on_cores(num_cores: int, table: CostTable, message_s: float = 0.0) -> CostTable:
    """The table with every device a worker on the cores of this machine."""
    workers = {device: CoreUse() for device in table.class_of}
    return replace(table, shared=SharedCores(num_cores, (1.0,), workers, send_s=message_s))


def told(plan: Partition, word: str) -> str:
    return next(note for note in plan.notes if word in note)


CROWDED = {
    "one core for four workers": on_cores(1, blocks(4, (1.0,) * 4)),
    "the fastest is not the first": on_cores(1, blocks(4, (1.1, 1.0, 1.1))),
    "only forward": on_cores(1, replace(blocks(4, (1.0,) * 3), training=False)),
}


@pytest.mark.parametrize("case", CROWDED)
def test_one_device_is_taken_where_playing_says_so_and_the_certificate_stays_true(case: str) -> None:
    table = CROWDED[case]
    found, alone = partition(table), one_device(table)
    assert len(found.used_devices) > 1 and found.objective_s < alone.objective_s
    chosen = choose_plan(table, found)
    fastest = min(table.class_of, key=lambda d: table.forward_s(0, table.class_of[d], 1))
    assert chosen.used_devices == (fastest,) and chosen.schedule in ("1f1b", "gpipe")
    assert step_of(table, chosen) == step_of(table, alone) <= step_of(table, found) * (1 + 1e-9)
    # The bound and the gap are still those of the formula, by which another plan is shorter.
    check_partition(table, chosen)
    assert chosen.bound_s == found.bound_s <= found.objective_s < chosen.objective_s
    assert chosen.gap == pytest.approx(1 - chosen.bound_s / chosen.objective_s) and chosen.gap > found.gap
    assert any(limit.startswith("formula") for limit in chosen.truncated_by)
    why = told(chosen, "alone was taken")
    assert f"over {len(found.used_devices)} devices" in why
    assert f"keeps busy for {format_seconds(step_of(table, alone))} under any plan" in why
    assert told(chosen, "left out") and chosen.runners_up[0].pipelines == found.pipelines
    # A question about the same job is answered with the same plan, and says that more gain nothing.
    answer = solve(Task(table))
    assert answer.used == chosen.used_devices and answer.step_s == step_of(table, chosen)
    assert answer.needless and answer.one_device_s == answer.step_s
    # What lost costs more, as it is compared.
    explained = explain_partition(table, chosen, time_limit_s=5.0)
    costs = [a.costs_s for c in explained.choices for a in c.alternatives if a.costs_s is not None]
    assert min(costs, default=0.0) >= -1e-9 and explained.runners_up[0].costs_s >= 0


def test_fewer_workers_are_taken_where_there_are_no_cores_for_more() -> None:
    table = blocks(units=1, speeds=(1.0,) * 4, batch=8)
    table = on_cores(2, replace(table, costs=tuple(replace(c, gradient_bytes=6e5) for c in table.costs)))
    found = partition(table)
    chosen = choose_plan(table, found)
    assert (len(found.used_devices), len(chosen.used_devices)) == (4, 2)
    assert step_of(table, chosen) < 0.9 * step_of(table, found)
    assert told(chosen, "a plan over 2 devices was taken")
    # Plans that lost are looked at as well: without crowding, only they are.
    stage = StageChoice(0, 1, tuple(Replica(d, 4) for d in ("a/0", "a/1")))
    lost = priced_plan(table, (PipelineChoice(8, 8, (stage,)),), "1f1b")
    free = on_cores(4, table)
    for shared in (free, replace(free, shared=None)):
        kept = replace(found, runners_up=(lost,))
        assert choose_plan(shared, kept).used_devices == found.used_devices


def test_an_order_of_work_that_is_shorter_but_not_taken_is_told_with_the_reason() -> None:
    table = blocks(speeds=(1.0, 6.0))
    lost = zero_bubble(table)
    alone_s = one_device(table).objective_s
    assert 0.9 * alone_s < lost.objective_s < alone_s
    chosen = best_played(table, lost, partition(table))
    assert chosen.used_devices == ("a/0",) and not chosen.truncated_by
    assert "zero-bubble, has no formula and so must be 10 % shorter" in told(chosen, "alone was taken")
    assert told(chosen, "left out") == "left out: a/1"
    # Where it stands among the plans that lost, too, though it costs less than nothing.
    runner_up = explain_partition(table, chosen, time_limit_s=5.0).runners_up[0]
    assert runner_up.costs_s == pytest.approx(lost.objective_s - alone_s) and runner_up.costs_s < 0
    assert "shorter, but not by the 10 %" in runner_up.differences[-1]
    # No other reason is claimed than the one there is.
    found = replace(chosen, runners_up=())
    asked_for = words.runner_up(found, lost, "1f1b").differences[-1]
    assert asked_for == f"shorter, but {found.schedule} was asked for"
    much = words.runner_up(found, replace(lost, objective_s=alone_s / 2), "auto").differences[-1]
    assert "by which these two were not compared" in much
    rounded = words.runner_up(found, replace(found, objective_s=alone_s * (1 - 1e-12)), "auto")
    assert not any("shorter" in text for text in rounded.differences)
    quicker = replace(found, objective_s=lost.objective_s / 2)
    assert "was asked for" not in words.runner_up(lost, quicker, "auto").differences[-1]
    assert "zero-bubble was asked for" in words.runner_up(lost, quicker, "1f1b").differences[-1]


def test_a_wider_gap_than_was_proven_has_its_reason_whatever_was_nearly_taken() -> None:
    table = blocks(speeds=(1.0, 0.5))
    found = partition(table)
    chosen = best_played(table, zero_bubble(table), found)
    assert found.gap < chosen.gap < zero_bubble(table).gap
    assert any(limit.startswith("formula") for limit in chosen.truncated_by)
    assert "no formula" not in told(chosen, "was taken")


def test_weights_that_two_stages_sum_are_played_before_several_devices_are_taken() -> None:
    table = blocks(8, (1.0,) * 4, batch=16)
    held = replace(table.costs[0], weight_bytes=5e7, gradient_bytes=5e7)
    table = replace(table, costs=(held,), repeated=(RepeatedWeights(0, (7,), 5e7, 5e7, 0.0),))
    found, alone = partition(table), one_device(table)
    assert [len(p.stages) for p in found.pipelines] == [4]
    assert 2 * found.objective_s < alone.objective_s
    (group,) = timing_of(table, found).gradient_groups
    assert (group.ranks, group.num_bytes) == ((0, 3), 5e7)
    assert step_of(table, found) >= found.objective_s * 0.9 + group.seconds
    # However much more than its formula a plan takes: one device is looked at.
    assert choose_plan(table, found).used_devices == ("a/0",)
    assert solve(Task(table)).used == ("a/0",)
    # Where other weights are light, every device holds all of them instead.
    light = replace(table, costs=(replace(held, weight_bytes=1e6, gradient_bytes=1e6),))
    found, chosen = partition(light), choose_plan(light, partition(light))
    assert [len(p.stages) for p in found.pipelines] == [4]
    (only,) = (p.stages for p in chosen.pipelines)
    assert len(only) == 1 and len(chosen.used_devices) == 4
    assert step_of(light, chosen) < 0.9 * min(step_of(light, found), step_of(light, alone))


def alone(device: str, table: CostTable, microbatches: int) -> Partition:
    stage = StageChoice(0, table.num_units, (Replica(device, microbatches),))
    return priced_plan(table, (PipelineChoice(table.batch, microbatches, (stage,)),), "1f1b")


def test_of_equal_devices_the_first_is_taken_whichever_lost() -> None:
    table = on_cores(1, blocks(4, (1.0,) * 4))
    found = replace(even_split(table), runners_up=tuple(alone(d, table, 1) for d in ("a/3", "a/2")))
    assert best_played(table, found, found).used_devices == ("a/0",)


@given(st.data())
@settings(max_examples=15, deadline=None)
def test_nothing_at_hand_is_shorter_where_stages_sum_weights(data: st.DataObject) -> None:
    speeds = data.draw(st.lists(st.sampled_from((0.3, 1.0, 1.1)), min_size=2, max_size=4), label="speeds")
    table = blocks(4, tuple(speeds), batch=8)
    gradient_bytes = data.draw(st.sampled_from((1e6, 5e7)), label="gradients")
    held = replace(table.costs[0], weight_bytes=5e7, gradient_bytes=gradient_bytes)
    nodes = {d: data.draw(st.sampled_from("ab"), label=d) for d in table.class_of}
    links = {"a": LinkCost(0.0, 1e10), "b": LinkCost(0.0, 1e9)}
    topology = Topology(nodes, {n: links[n] for n in sorted({*nodes.values()})}, LinkCost(0.0, 1e8))
    tied = (RepeatedWeights(0, (3,), 5e7, 5e7, 0.0),)
    table = replace(table, costs=(held,), repeated=tied, topology=topology)
    found = even_split(table)
    at_hand = [alone(d, table, m) for d in table.class_of for m in (1, 8)]
    # However many of one device there are, and in whatever order.
    found = replace(found, runners_up=tuple(data.draw(st.permutations(at_hand), label="order")))
    chosen = best_played(table, found, found)
    chosen_s = step_of(table, chosen)
    assert chosen_s <= min(step_of(table, plan) for plan in at_hand) * (1 + 1e-9)
    for node in topology.inside:
        devices = tuple(d for d in table.class_of if nodes[d] == node)
        for plan in simple_plans(table, Tried(devices=devices)):
            assert chosen_s * 0.9 <= step_of(table, plan) * (1 + 1e-9), plan.pipelines


def zero_bubble(table: CostTable) -> Partition:
    """All units but the last on the first device, the last on the second, each sample by itself."""
    batch, last = table.batch, table.num_units - 1
    stages = (
        StageChoice(0, last, (Replica("a/0", batch),)),
        StageChoice(last, last + 1, (Replica("a/1", batch),)),
    )
    played = simulated(table, (PipelineChoice(batch, batch, stages),), "zero-bubble")
    return certified(table, played.partition)


def test_messages_that_cost_more_than_they_bring_are_known_to_the_search() -> None:
    table = on_cores(2, blocks(4, batch=2))
    assert len(partition(table).used_devices) == 2
    found = partition(on_cores(2, table, message_s=8e-3))
    assert len(found.used_devices) == 1 and found.gap <= 0.01 and not found.truncated_by


def test_what_needs_several_devices_keeps_them_and_says_so_where_they_gain_nothing() -> None:
    table = on_cores(1, blocks())
    found = partition(table, schedule="1f1b")
    chosen = choose_plan(table, found, "interleaved")
    assert chosen.schedule == "interleaved" and len(chosen.used_devices) == 2
    assert told(chosen, "no gain: use one device; a/0 alone takes 144 ms per step")
    # A model that fits into no single device.
    small = on_cores(1, blocks(memory_bytes=6 * 2e7))
    chosen = choose_plan(small, partition(small))
    assert len(chosen.used_devices) == 2 and not any("device" in note for note in chosen.notes)
