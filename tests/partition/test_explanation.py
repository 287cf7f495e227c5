"""Explanations: what is said to cost so much does, and more of a resource never hurts."""

from dataclasses import replace

import pytest
from cost_tables import make_table, small_tables
from hypothesis import HealthCheck, given, settings

from graphpar.cost import CostTable, LinkCost
from graphpar.errors import InfeasibleError
from graphpar.explanation_build import explain_partition
from graphpar.partition.pipeline import partition


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
    assert told.about_unit(cut.units[0]) != ()


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


def test_without_time_what_was_not_tried_is_said() -> None:
    table = make_table([1.0] * 6, (1.0, 2.0), (2, 1), batch=4, link=LinkCost(0.1, 1.0))
    found = partition(table)
    told = explain_partition(table, found, time_limit_s=1e-9)
    assert told.left_out
    assert {p.method for p in told.shadow_prices} == {"dual"}
    assert all(p.saves_s is not None and p.saves_s > 0 for p in told.shadow_prices)
