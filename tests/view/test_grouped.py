"""Tensor groups in every view: their members work on the same microbatches, each with its share."""

import json

import pytest
from grouped_samples import grouped_plan
from test_trace import check_trace
from view_samples import measured_step

from graphpar.plans.plan import Plan
from graphpar.view.build import view_of
from graphpar.view.html import render_html
from graphpar.view.svg import render_svg
from graphpar.view.trace import render_trace


@pytest.fixture(scope="module")
def plan() -> Plan:
    return grouped_plan()


def test_the_view_knows_who_shares_what(plan: Plan) -> None:
    view = view_of(plan)
    assert [stage.groups for stage in view.stages] == [((0,),), ((1, 2),), ((3,),)]
    assert [d.share for d in view.devices[: view.num_ranks]] == pytest.approx([1.0, 0.6, 0.4, 1.0])
    for device, peak in zip(
        view.devices[: view.num_ranks], plan.predicted_peak_bytes.values(), strict=True
    ):
        assert device.peak_bytes == pytest.approx(peak)


def test_the_trace_is_sound(plan: Plan) -> None:
    events = json.loads(render_trace(view_of(plan, measured_step(plan))))["traceEvents"]
    check_trace(events)
    forwards = [e["tid"] for e in events if e.get("cat") == "F" and e["pid"] == 1]
    assert forwards.count(3) == forwards.count(5) == 8, "both members run all microbatches"


def test_pages_and_pictures_hold_all_members(plan: Plan) -> None:
    view = view_of(plan)
    for device in plan.devices:
        assert device in render_svg(view).decode()
    page = render_html(view).decode()
    assert '"groups":[[1,2]]' in page
    assert f"tensor group {plan.devices[1]} & {plan.devices[2]} (60 : 40 %)" in " ".join(
        str(plan).split()
    )
    assert max(map(len, str(plan).splitlines())) <= 80
