"""What the views show, against the plan it comes from."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plan_samples import sample_plan

from graphpar.view.build import view_of
from graphpar.view.fold import fold_units


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


def test_shares_add_up() -> None:
    shares = view_of(sample_plan()).shares
    assert shares.compute + shares.gradients + shares.waiting == pytest.approx(1.0)
    assert shares.waiting == pytest.approx(sample_plan().bubble_share)


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


@given(st.lists(st.sampled_from(["a", "h.0", "h.1", "h.1 1/2", "h.2 2/2", "日本"]), min_size=1))
def test_folding_loses_no_unit(units: list[str]) -> None:
    blocks = fold_units(units, 0, len(units))
    assert [u for b in blocks for u in range(b.first, b.last)] == list(range(len(units)))
