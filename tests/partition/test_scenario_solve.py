"""From cost tables to answers, without torch and without a model."""

from dataclasses import replace

import pytest
from cost_tables import make_table

from graphpar.cost import LinkCost
from graphpar.cost_models.modes import with_modes
from graphpar.cost_options import StageOptions
from graphpar.scenarios.layouts import recomputed, tensor_groups
from graphpar.scenarios.solve import solve
from graphpar.scenarios.task import Task
from graphpar.scenarios.types import Answer, Layout

TABLE = make_table((1.0,) * 8, speeds=(2.0, 1.0), devices_per_class=(2, 2), batch=8)


def test_a_searched_answer_is_never_slower_than_a_configuration_made_by_hand() -> None:
    table = with_modes(TABLE, StageOptions(tensor_widths=(2,)))
    best = solve(Task(TABLE, gap=0.0))
    assert best.status == "ok"
    assert best.step_s is not None
    for layout in (Layout(pipeline=4), Layout(data=4), Layout(pipeline=2, data=2), Layout(tensor=2)):
        made = solve(Task(table, layout=layout))
        assert made.status == "ok", made.problem
        if layout.tensor == 1:
            assert made.step_s is not None
            assert best.step_s <= made.step_s * (1 + 1e-6), layout


def test_what_does_not_fit_is_an_answer_that_says_how_much_is_lacking() -> None:
    small = make_table((1.0,) * 2, devices_per_class=(1,), memory_bytes=1.5, weight_bytes=1.0)
    assert solve(Task(small)).status == "infeasible"
    by_hand = solve(Task(small, layout=Layout()))
    assert by_hand.status == "infeasible"
    assert "lacks" in by_hand.problem
    assert min(by_hand.headroom_bytes.values()) < 0
    wide = solve(Task(small, layout=Layout(pipeline=2)))
    assert wide.status == "infeasible"
    assert "takes 2 groups" in wide.problem


def test_one_device_is_told_where_more_gain_nothing() -> None:
    slow = LinkCost(10.0, 1.0)
    table = make_table((1.0, 1.0), devices_per_class=(2,), batch=2, link=slow, cut_bytes=1e3)
    table = replace(table, costs=tuple(replace(c, gradient_bytes=1e3) for c in table.costs))
    answer = solve(Task(table))
    assert answer.needless
    assert len(answer.used) == 1
    assert not solve(Task(TABLE)).needless


def test_groups_are_taken_inside_nodes_and_priced_by_their_modes() -> None:
    table = make_table((1.0,) * 4, devices_per_class=(4,), link=LinkCost(0.0, 1e3), cut_bytes=500.0)
    table = with_modes(table, StageOptions(tensor_widths=(2,)))
    assert [g.devices for g in tensor_groups(table, 2)] == [("0.0", "0.1"), ("0.2", "0.3")]
    alone, grouped = (solve(Task(table, layout=Layout(tensor=t, microbatches=1))) for t in (1, 2))
    assert len(grouped.used) == 2 and len(alone.used) == 1
    assert "t=2" in grouped.shape
    assert grouped.step_s is not None and alone.step_s is not None and grouped.step_s != alone.step_s


def test_recomputation_trades_memory_for_time() -> None:
    table = make_table((1.0,) * 4, saved_bytes=100.0, cut_bytes=1.0)
    again = recomputed(table)
    assert again.backward_s(1, 0, 1) == table.backward_s(1, 0, 1) + table.forward_s(1, 0, 1)
    assert again.costs[1].saved_bytes[0] == 1.0
    assert again.costs[1].working_bytes[0] == 99.0


@pytest.mark.parametrize(
    ("answer", "money", "energy"),
    [
        (Answer("", step_s=2.0, batch=4, usd_per_h=3.6, watts=100.0), 500.0, 100 * 0.5e6 / 3.6e6),
        (Answer("", step_s=2.0, batch=4), None, None),
    ],
)
def test_money_and_energy_of_a_million_samples(
    answer: Answer, money: float | None, energy: float | None
) -> None:
    assert answer.usd_per_million_samples == (None if money is None else pytest.approx(money))
    assert answer.kwh_per_million_samples == (None if energy is None else pytest.approx(energy))


def test_bottlenecks_are_told_apart() -> None:
    compute = solve(Task(make_table((5.0,), devices_per_class=(1,))))
    assert compute.bottleneck is not None
    assert compute.bottleneck.kind == "compute"
    assert compute.bottleneck.relief == "a faster device in place of 0.0"
    both = solve(Task(make_table((1.0, 1.0), batch=8)))
    assert both.bottleneck is not None
    assert both.bottleneck.relief.startswith("faster devices in place of 0.0, 0.1, or more")
    tight = make_table((1.0,) * 4, devices_per_class=(2,), batch=4, memory_bytes=3.0, saved_bytes=0.1)
    memory = solve(Task(tight))
    assert memory.bottleneck is not None
    assert memory.headroom_bytes


@pytest.mark.parametrize("slow", ["inside", "network"])
def test_the_link_that_is_told_to_be_slow_shortens_the_step_when_it_is_mended(slow: str) -> None:
    table = make_table((1.0,) * 4, devices_per_class=(4,), batch=4, cut_bytes=20.0)
    fast, snail = LinkCost(1e-3, 1e3), LinkCost(1e-3, 1.0)
    nodes = {"0.0": "a", "0.1": "a", "0.2": "b", "0.3": "b"}

    def over(inside: LinkCost, network: LinkCost) -> Answer:
        topology = replace(
            table.topology, node_of=nodes, inside={"a": inside, "b": inside}, network=network
        )
        return solve(Task(replace(table, topology=topology), layout=Layout(pipeline=4, microbatches=4)))

    held = over(snail, fast) if slow == "inside" else over(fast, snail)
    assert held.bottleneck is not None and held.bottleneck.kind == "link"
    assert ("inside nodes a, b" if slow == "inside" else "network") in held.bottleneck.relief
    mended = over(fast, fast)
    assert mended.step_s is not None and held.step_s is not None
    assert mended.step_s < 0.9 * held.step_s
