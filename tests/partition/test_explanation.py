"""Explanations: what is said to cost so much does, and more of a resource never hurts."""

from dataclasses import replace

import pytest
from cost_tables import make_table, small_tables
from hypothesis import HealthCheck, given, settings

from graphpar.cost import CostTable, LinkCost, Topology
from graphpar.cost_models.modes import with_modes
from graphpar.cost_options import StageOptions
from graphpar.errors import InfeasibleError
from graphpar.explanation.build import explain_partition
from graphpar.partition.handmade import evaluate
from graphpar.partition.pipeline import partition
from graphpar.partition.types import PipelineChoice, Replica, ScheduleName, StageChoice
from graphpar.schedule.simulated import has_formula, simulated
from graphpar.units import format_percent, format_seconds


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(small_tables(max_units=3, modes=True))
def test_no_other_choice_beats_an_optimal_plan(table: CostTable) -> None:
    try:
        found = partition(table, gap=0.0)
    except InfeasibleError:
        return
    if found.status != "optimal":
        return
    told = explain_partition(table, found, time_limit_s=60.0)
    assert not told.left_out
    for choice in told.choices:
        for other in choice.alternatives:
            assert (other.costs_s is None) == bool(other.impossible)
            if other.label in ("interleaved", "zero-bubble"):
                continue  # the search proves nothing about these: they are tried on its plan afterwards
            assert other.costs_s is None or other.costs_s >= -1e-9 * max(1.0, found.objective_s)
    for runner in told.runners_up:
        assert runner.costs_s >= -1e-9 * max(1.0, found.objective_s)
        assert runner.differences
    for price in told.shadow_prices:
        assert price.saves_s is not None
        assert price.saves_s >= 0


def test_a_cut_is_weighed_against_its_neighbours() -> None:
    table = make_table([1.0] * 6, (1.0, 2.0), (1, 1), batch=4, memory_bytes=4.0)
    found = partition(table, gap=0.0, microbatches=4, schedule="1f1b")
    told = explain_partition(table, found, time_limit_s=60.0)
    (cut,) = (c for c in told.choices if c.kind == "cut")
    # Four units to the fast device, two to the slow one: one unit over the cut costs the slow one 1.5x
    # or breaks the memory of the fast one.
    assert cut.margin_s is not None
    assert cut.margin_s > 0
    assert {bool(a.impossible) for a in cut.alternatives} == {True, False}
    assert cut.units


def test_devices_and_memory_have_their_prices() -> None:
    table = make_table([1.0] * 4, (1.0,), (2,), batch=4, memory_bytes=2.0)
    found = partition(table, gap=0.0)
    told = explain_partition(table, found, time_limit_s=60.0)
    prices = {p.kind: p for p in told.shadow_prices}
    assert set(prices) == {"devices", "memory", "bandwidth"}
    more = replace(
        table, device_classes=(replace(table.device_classes[0], devices=("0.0", "0.1", "0.2")),)
    )
    more = replace(
        more, topology=replace(table.topology, node_of=table.topology.node_of | {"0.2": "node"})
    )
    again = partition(more, gap=0.0)
    assert prices["devices"].step_s == pytest.approx(again.objective_s)
    assert prices["devices"].method == "re-solved"
    assert any("memory" in line for line in told.binding)


def test_what_was_fixed_stays_fixed_where_it_is_solved_again() -> None:
    """With one microbatch three devices side by side take as long as ever; cut finer they would not."""
    table = make_table([1.0] * 4, (1.0,), (2,), batch=8)
    table = replace(table, max_replicas=1)
    found = partition(table, gap=0.0, microbatches=1, schedule="gpipe")
    told = explain_partition(table, found, time_limit_s=60.0, microbatches=1, schedule="gpipe")
    assert not told.left_out
    assert {p.saves_s for p in told.shadow_prices if p.kind == "devices"} == {0.0}
    free = explain_partition(table, found, time_limit_s=60.0)
    assert all(p.saves_s for p in free.shadow_prices if p.kind == "devices")


def test_without_time_what_was_not_tried_is_said() -> None:
    table = make_table([1.0] * 6, (1.0, 2.0), (2, 1), batch=4, link=LinkCost(0.1, 1.0))
    found = partition(table)
    told = explain_partition(table, found, time_limit_s=1e-9)
    assert told.left_out
    assert {p.method for p in told.shadow_prices} == {"dual"}
    assert all(p.saves_s is not None and p.saves_s > 0 for p in told.shadow_prices)


def _two_groups(training: bool, inside: LinkCost) -> CostTable:
    """Two nodes of two devices, a network that takes nothing, and the modes of groups of two."""
    table = make_table((3.0, 1.0, 1.0), (1.0,), (4,), batch=6, training=training, cut_bytes=1e3)
    nodes = {f"0.{i}": "ab"[i // 2] for i in range(4)}
    topology = Topology(nodes, {"a": inside, "b": inside}, LinkCost(0.0, 1e30))
    return with_modes(replace(table, topology=topology), StageOptions(tensor_widths=(2,), recompute=True))


@pytest.mark.parametrize(("training", "recompute"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("schedule", ["1f1b", "gpipe", "zero-bubble"])
def test_collectives_of_groups_are_no_computing(
    schedule: ScheduleName, training: bool, recompute: bool
) -> None:
    """What is told as computing is what the same plan takes where members send in no time."""
    groups = Replica("0.0", 3, ("0.1",)), Replica("0.2", 3, ("0.3",))
    stages = tuple(
        StageChoice(first, last, (group,), recompute=recompute)
        for (first, last), group in zip(((0, 1), (1, 3)), groups, strict=True)
    )
    pipelines = (PipelineChoice(6, 3, stages),)
    slow, free = (_two_groups(training, LinkCost(0.0, rate)) for rate in (2e3, 1e30))
    if has_formula(schedule):
        found, computed = (evaluate(table, pipelines, schedule) for table in (slow, free))
    else:
        found, computed = (simulated(t, pipelines, schedule).partition for t in (slow, free))
    told = explain_partition(slow, found, time_limit_s=1e-9)
    assert sum(told.parts.values()) == pytest.approx(told.step_s)
    assert told.parts["fill_collective_s"] > 0.1
    assert told.parts["fill_compute_s"] == pytest.approx(computed.parts["fill_compute_s"])
    if has_formula(schedule):
        assert told.parts["steady_collective_s"] > 0.1
        assert told.parts["steady_s"] == pytest.approx(computed.parts["steady_s"])
    (line,) = (text for text in told.binding if text.startswith("collectives of one microbatch"))
    share = format_percent(told.parts["fill_collective_s"] / told.step_s)
    assert f"inside the stages: {share} of the programme's {format_seconds(told.step_s)} (" in line
