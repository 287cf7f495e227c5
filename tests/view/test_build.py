"""What the views show, against the plan it comes from."""

import html
from collections.abc import Iterator
from dataclasses import replace

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from plan_samples import sample_plan
from view_samples import explained_plan

from graphpar.cores import CoreUse, SharedCores
from graphpar.cost import LinkCost
from graphpar.schedule.simulate import simulate
from graphpar.schedule.timing import GradientGroup
from graphpar.view.build import view_of
from graphpar.view.fold import fold_units
from graphpar.view.model import ViewModule
from graphpar.view.outline import outline
from graphpar.view.shares import shares_of
from graphpar.view.svg import render_svg


def test_the_view_repeats_the_plan() -> None:
    plan = sample_plan()
    view = view_of(plan)
    assert view.num_ranks == len(plan.devices)
    assert tuple(d.name for d in view.devices[: view.num_ranks]) == plan.devices
    assert {d.name: d.kind for d in view.left_out} == plan.left_out
    assert view.devices[view.bottleneck].name == plan.bottleneck.device
    assert [n.name for n in view.nodes] == ["p0", "spare"]
    assert view.nodes[1].used == 0
    for device in view.devices[: view.num_ranks]:
        assert device.peak_bytes == pytest.approx(plan.predicted_peak_bytes[device.name])
        parts = device.resident_bytes + device.saved_bytes + device.working_bytes
        assert parts == pytest.approx(device.peak_bytes)


def test_where_memory_is_at_its_peak_in_the_update_that_is_shown() -> None:
    plan = sample_plan()
    ranks = tuple(replace(rank, update_bytes=2.0**40) for rank in plan.timing.ranks)
    timing = replace(plan.timing, ranks=ranks)
    view = view_of(msgspec.structs.replace(plan, timing=timing))
    for device in view.devices[: view.num_ranks]:
        assert (device.saved_bytes, device.working_bytes) == (0.0, 2.0**40)
        assert device.peak_bytes == device.resident_bytes + 2.0**40
    told = "the optimiser's update: 1 TiB"
    assert told in html.unescape(render_svg(view).decode())
    assert told not in html.unescape(render_svg(view_of(plan)).decode())


def test_the_copy_that_a_process_gathers_gradients_in_is_part_of_what_stays() -> None:
    plan = sample_plan()
    shared = SharedCores(8, (1.0,), {device: CoreUse(1, 1.0) for device in plan.devices})
    group = GradientGroup((1, 2), 3e6, 1e-3)
    timing = replace(plan.timing, shared=shared, gradient_groups=(group,))
    view = view_of(msgspec.structs.replace(plan, timing=timing))
    grown = [d.peak_bytes - plan.predicted_peak_bytes[d.name] for d in view.devices[: view.num_ranks]]
    assert grown == pytest.approx([0, 3e6, 3e6, 0], abs=1)
    by_rows = replace(timing, gradient_groups=(replace(group, by_rows=True),))
    apart = view_of(msgspec.structs.replace(plan, timing=by_rows)).devices[1]
    assert apart.peak_bytes == pytest.approx(plan.predicted_peak_bytes[apart.name])
    played = simulate(plan.timeline().schedule, timing).peak_bytes
    assert [d.peak_bytes for d in view.devices[: view.num_ranks]] == pytest.approx(list(played))


def test_shares_add_up() -> None:
    shares = view_of(sample_plan()).shares
    waiting = shares.communication + shares.bubble
    assert shares.compute + shares.gradients + waiting == pytest.approx(1.0)
    assert waiting == pytest.approx(sample_plan().bubble_share)


def test_slower_links_turn_bubbles_into_communication() -> None:
    plan = sample_plan()
    slow = replace(plan.timing, links=(), network=LinkCost(5e-3, 1e8))
    fast = replace(plan.timing, links=(), network=LinkCost(0.0, 1e15))
    told = [shares_of(simulate(plan.schedule(), timing)) for timing in (fast, slow)]
    assert told[0].communication == pytest.approx(0.0, abs=1e-6)
    assert told[1].communication > 0.05
    assert told[0].bubble > 0.05


def test_collectives_of_a_group_are_communication() -> None:
    """They take the time that they take; only the name under which it is shown changes."""
    plan = sample_plan()
    ranks = (
        replace(r, sizes=tuple(replace(row, collective_s=row.forward_s / 2) for row in r.sizes))
        for r in plan.timing.ranks
    )
    alone, shared = (
        simulate(plan.schedule(), timing)
        for timing in (plan.timing, replace(plan.timing, ranks=tuple(ranks)))
    )
    assert shared.step_s == alone.step_s and shared.compute_s == alone.compute_s
    moved = sum(shared.collective_s) / (shared.step_s * len(shared.collective_s))
    before, after = shares_of(alone), shares_of(shared)
    assert moved > 0.01
    assert after.communication - before.communication == pytest.approx(moved)
    assert before.compute - after.compute == pytest.approx(moved)
    assert (after.gradients, after.bubble) == pytest.approx((before.gradients, before.bubble))


def test_parts_of_the_step_are_those_of_the_explanation() -> None:
    """There collectives inside stages stand apart; a plan that was not explained has the programme's."""
    plan = explained_plan()
    assert plan.explanation is not None
    parts = {"fill_compute_s": 0.03, "fill_collective_s": 0.02, "steady_s": 0.15}
    told = replace(plan.explanation, parts=parts)
    assert view_of(msgspec.structs.replace(plan, explanation=told)).certificate.parts == parts
    assert view_of(sample_plan()).certificate.parts == sample_plan().partition.parts


def test_messages_know_their_bytes() -> None:
    view = view_of(sample_plan())
    by_name = {str(a): view.message_bytes(a) for lane in view.predicted.lanes for a in lane.actions}
    assert by_name["0S0"] == 2 * 4096 + 2 * 64 + 512
    assert by_name["1R0"] == 2 * 4096
    assert by_name["2D0"] == 2 * 4096
    assert by_name["0F0"] == by_name["0A"] == 0


@pytest.mark.parametrize(
    ("units", "expected"),
    [
        (["embed", "h.0", "h.1", "head"], [("embed", 1), ("h.0 .. h.1", 2), ("head", 1)]),
        (["h.0 1/2", "h.0 2/2", "h.1 1/2", "h.1 2/2"], [("h.0 .. h.1", 2)]),
        (["h.0 1/2", "h.1 1/2", "h.1 2/2"], [("h.0", 1), ("h.1", 1)]),
        (["a", "b"], [("a", 1), ("b", 1)]),
        (["layer 17"], [("layer 17", 1)]),
    ],
)
def test_repeated_blocks_fold(units: list[str], expected: list[tuple[str, int]]) -> None:
    assert [(b.label, b.count) for b in fold_units(units, 0, len(units))] == expected


NAMES = st.lists(
    st.sampled_from(
        ["a", "h.0", "h.1", "h.1 1/2", "h.2 2/2", "日本", "a.b.0.c", "a.b.1.c", "a+b", ".", ""]
    ),
    min_size=1,
)


@given(NAMES)
def test_folding_loses_no_unit(units: list[str]) -> None:
    blocks = fold_units(units, 0, len(units))
    assert [u for b in blocks for u in range(b.first, b.last)] == list(range(len(units)))


@given(NAMES)
def test_the_tree_of_modules_holds_every_unit_once_and_in_order(units: list[str]) -> None:
    def leaves(modules: tuple[ViewModule, ...]) -> Iterator[int]:
        for module in modules:
            if module.children:
                assert module.first == module.children[0].first
                assert module.last == module.children[-1].last
                yield from leaves(module.children)
            else:
                yield from range(module.first, module.last)

    assert list(leaves(outline(units, 0, len(units)))) == list(range(len(units)))


@pytest.mark.parametrize(
    ("units", "expected"),
    [
        (
            ["m.embed", *(f"m.layer{p}" for i in range(9) for p in (f".{i}", f" {i + 1}/9")), "m.head"],
            [("m.embed", 1), ("m.layer.0 .. m.layer.8", 9), ("m.head", 1)],
        ),
        ([f"d.{i}.l.{k}" for i in range(4) for k in range(3)], [("d.0 .. d.3", 4)]),
        (["h.3 1/2", "h.3 2/2"], [("h.3 1/2", 1), ("h.3 2/2", 1)]),
    ],
)
def test_modules_fold_with_what_repeats(units: list[str], expected: list[tuple[str, int]]) -> None:
    assert [(m.label, m.count) for m in outline(units, 0, len(units))] == expected


def test_a_name_of_ten_thousand_dots_is_a_name() -> None:
    deep = ["x." * 10_000 + "a", "x." * 10_000 + "b"]
    assert outline(deep, 0, 2)[-1].last == 2
