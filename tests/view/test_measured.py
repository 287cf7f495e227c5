"""Measured steps on one clock, whole and broken."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plan_samples import CLUSTER, chain, chain_links, sample_plan, table_for
from view_samples import measured_step

from graphpar.plans.build import PlanSubject, make_plan, predict
from graphpar.plans.plan import Plan, hash_of
from graphpar.runtime.last_step import LastStep
from graphpar.runtime.program import Event, StepReport
from graphpar.view.build import view_of


def two_nodes() -> Plan:
    """Two stages on two nodes that talk both ways."""
    partition = chain(2, 4)
    table = table_for(partition, num_units=2)
    subject = PlanSubject("m", "ab" * 32, CLUSTER, hash_of(CLUSTER))
    return make_plan(subject, table, predict(table, partition, chain_links(2, 64.0)))


def test_a_measured_step_starts_at_zero_and_keeps_its_durations() -> None:
    plan = sample_plan()
    view = view_of(plan, measured_step(plan, slower=2.0))
    assert view.measured is not None
    assert view.measured.step_s == pytest.approx(2 * view.step_s)
    assert not view.measured.stopped and view.measured.note == ""
    for lane, predicted in zip(view.measured.lanes, view.predicted.lanes, strict=True):
        assert lane.actions == predicted.actions
        assert list(lane.ends_s) == pytest.approx([2 * e for e in predicted.ends_s], abs=1e-9)
    assert view.devices[1].measured_peak_bytes == 2 * 2**20
    assert view.left_out[0].measured_peak_bytes is None


def test_a_plan_without_a_step_has_nothing_measured() -> None:
    view = view_of(sample_plan())
    assert view.measured is None
    assert all(d.measured_peak_bytes is None for d in view.devices)


def test_a_step_without_reports_is_no_measurement() -> None:
    assert view_of(sample_plan(), LastStep(1.0, 1.0, ())).measured is None


def test_a_failed_step_marks_where_each_rank_stopped() -> None:
    plan = sample_plan()
    step = measured_step(plan, until_s=0.05)
    lost = replace(step, reports=step.reports[:-1])
    measured = view_of(plan, lost).measured
    assert measured is not None
    assert [lane.stopped for lane in measured.lanes] == [True] * 4
    assert len(measured.lanes[-1].actions) == 0
    assert "the run failed" in measured.note


def test_another_batch_is_said_and_not_called_a_failure() -> None:
    plan = sample_plan()
    step = measured_step(plan, until_s=0.05)
    measured = view_of(plan, replace(step, predicted_s=None)).measured
    assert measured is not None and not measured.stopped
    assert "another batch" in measured.note


@given(st.floats(-5.0, 5.0).filter(lambda s: abs(s) > 1.0))
def test_clocks_that_contradict_each_other_are_aligned(ahead_s: float) -> None:
    plan = two_nodes()
    view = view_of(plan, measured_step(plan, slower=1.0, clock_s=(0.0, ahead_s)))
    assert view.measured is not None and "aligned" in view.measured.note
    starts = {
        (lane.rank, str(a)): (start, end)
        for lane in view.measured.lanes
        for a, start, end in lane.events()
    }
    for microbatch in range(4):
        assert starts[0, f"0S{microbatch}"][0] <= starts[1, f"1R{microbatch}"][1] + 1e-9
        assert starts[1, f"1D{microbatch}"][0] <= starts[0, f"0G{microbatch}"][1] + 1e-9
    assert view.measured.step_s == pytest.approx(view.step_s, abs=2e-3)


def test_clocks_that_agree_are_left_alone() -> None:
    plan = two_nodes()
    measured = view_of(plan, measured_step(plan, slower=1.0)).measured
    assert measured is not None and measured.note == ""


def test_a_damaged_token_is_told() -> None:
    broken = StepReport(0, 0.0, 1.0, (Event("??", 0.0, 1.0),), 1)
    with pytest.raises(ValueError, match="is not an action"):
        view_of(sample_plan(), LastStep(1.0, 1.0, (broken,)))
