"""Predicted against measured per device: what is told, and the likely reason."""

import pytest
from msgspec.structs import replace
from plan_samples import sample_plan

from graphpar.plans.plan import Plan
from graphpar.runtime.comparison import TOLERANCE, MachineNow, StepComparison, compare_step
from graphpar.runtime.program import Event, StepReport


def reports(plan: Plan, compute: float = 1.0, wait: float = 1.0, memory: float = 1.0) -> list[StepReport]:
    """What ranks would report whose actions took so many times the predicted ones."""
    timeline = plan.timeline()
    found = []
    for rank, name in enumerate(plan.devices):
        events = []
        for event in timeline.events(rank):
            factor = compute if event.action.kind in "FB" else wait
            length = (event.end_s - event.start_s) * factor
            events.append(Event(str(event.action), event.start_s, event.start_s + length))
        peak = int(plan.predicted_peak_bytes[name] * memory)
        found.append(StepReport(rank, 0.0, timeline.step_s, tuple(events), peak))
    return found


def told(factor: float, **changes: float) -> StepComparison:
    plan = sample_plan()
    return compare_step(plan, reports(plan, **changes), plan.predicted_step_s * factor)


def test_a_step_as_predicted_needs_no_reason() -> None:
    found = told(1.0)
    assert found.error == pytest.approx(0.0)
    assert found.reasons == ()
    assert {d.device for d in found.devices} == set(sample_plan().devices)
    assert all(abs(d.compute_error) < 1e-9 for d in found.devices)
    assert told(1 + TOLERANCE / 2, compute=1 + TOLERANCE / 2).reasons == ()


def test_slow_computation_is_told_from_slow_links_and_from_memory() -> None:
    (reason,) = told(1.6, compute=1.6).reasons
    assert "computes 60 % longer" in reason
    (reason,) = told(1.6, wait=10.0).reasons
    assert "waits longer for messages" in reason
    assert all("more memory" in r for r in told(1.0, memory=1.5).reasons)
    assert "%" in str(told(1.6, compute=1.6))


@pytest.mark.parametrize(
    ("members", "words"), [(1, "waits longer for messages"), (2, "sums of gradients")]
)
def test_sums_are_slow_where_the_member_that_comes_last_takes_long(members: int, words: str) -> None:
    plan = sample_plan()
    (group,) = plan.timing.gradient_groups
    found = reports(plan)
    for rank in group.ranks[:members]:
        late = Event("0A", 0.0, plan.predicted_step_s)
        kept = tuple(e for e in found[rank].events if not e.token.endswith("A"))
        found[rank] = replace(found[rank], events=(*kept, late))
    (reason,) = compare_step(plan, found, 2 * plan.predicted_step_s).reasons
    assert words in reason


def test_a_faster_machine_is_told_too() -> None:
    (reason,) = told(0.5, compute=0.5).reasons
    assert "shorter" in reason


def test_a_device_that_differs_is_told_though_the_step_does_not() -> None:
    (reason,) = told(1.1, compute=1.6).reasons
    assert "computes 60 % longer" in reason


def on_this_machine() -> Plan:
    data = sample_plan().to_json().replace(b'"fast"', b'"cpu"').replace(b'"slow"', b'"cpu x3 slower"')
    return Plan.from_json(data)


@pytest.mark.parametrize(
    ("factor", "machine", "words"),
    [
        (1.6, MachineNow(1.4, 0.1, 2), "1.40 times"),
        (1.6, MachineNow(1.4, 1.2, 2), "1.2 of this machine's 2 cores busy"),
        (1.6, MachineNow(0.7, 0.1, 2), "planned with are wrong"),  # a faster machine explains nothing
        (2.6, MachineNow(1.2, 0.1, 2), "planned with are wrong"),  # nor does one that is a little slower
        (1.2, MachineNow(1.2, 0.1, 2), "1.20 times"),
        (0.5, MachineNow(1.2, 0.1, 2), "planned with are wrong"),
        (1.6, MachineNow(1.01, None, 2), "was shared with other work"),
        (1.6, MachineNow(1.01, 0.1, 2), "planned with are wrong"),
        (0.5, MachineNow(0.99, 0.1, 2), "planned with are wrong"),
        (1.6, None, "was shared with other work"),
        (0.5, MachineNow(0.7, 0.1, 2), "0.70 times"),
        (0.5, MachineNow(1.4, 1.2, 2), "busier when it was measured"),
    ],
)
def test_the_machine_s_own_speed_is_told_from_other_causes(
    factor: float, machine: MachineNow | None, words: str
) -> None:
    plan = on_this_machine()
    spent = reports(plan, compute=factor)
    (reason,) = compare_step(plan, spent, factor * plan.predicted_step_s, machine).reasons
    assert words in reason


def test_a_worker_that_is_slower_than_described_is_told_from_a_slow_machine() -> None:
    plan = on_this_machine()
    slowed, *others = reports(plan, compute=2.0)
    spent = [slowed, *reports(plan)[1:]]
    (reason,) = compare_step(plan, spent, 2 * plan.predicted_step_s, MachineNow(1.0, 0.0, 2)).reasons
    assert others and plan.devices[0] in reason and "slower than the cluster describes it" in reason
