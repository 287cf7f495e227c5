"""The trace: tracks without overlap, flows in pairs, durations that add up."""

import json
from collections import defaultdict
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_samples import CLUSTER, partitions, sample_plan, stage_links, table_for
from view_samples import HOSTILE, hostile_plan, measured_step

from graphpar.plans.build import PlanSubject, make_plan, predict
from graphpar.plans.plan import Plan, hash_of
from graphpar.view.build import view_of
from graphpar.view.trace import MEASURED_PROCESS, PREDICTED_PROCESS, render_trace

GOLDEN = Path(__file__).with_name("golden") / "small.json"
_ROUNDING_US = 1e-3


def events_of(plan: Plan, step: Any = None) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = json.loads(render_trace(view_of(plan, step)))["traceEvents"]
    return events


def check_trace(events: list[dict[str, Any]]) -> None:
    """No overlap within a track; both ends of a flow exist, in order, inside slices."""
    tracks: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
    flows: dict[int, dict[str, dict[str, Any]]] = defaultdict(dict)
    for event in events:
        if event["ph"] == "X":
            tracks[event["pid"], event["tid"]].append(event)
        elif event["ph"] in "sf":
            assert event["ph"] not in flows[event["id"]], "an end of a flow is doubled"
            flows[event["id"]][event["ph"]] = event
    for slices in tracks.values():
        slices.sort(key=lambda s: (s["ts"], s["dur"]))
        for before, after in pairwise(slices):
            assert before["ts"] + before["dur"] <= after["ts"] + _ROUNDING_US / 2
    for ends in flows.values():
        assert ends.keys() == {"s", "f"}, "a flow has one end only"
        assert ends["s"]["ts"] <= ends["f"]["ts"]
        for end in ends.values():
            starts = {s["ts"] for s in tracks[end["pid"], end["tid"]]}
            assert end["ts"] in starts, "a flow hangs in the air"


def test_the_trace_of_a_small_plan_is_golden() -> None:
    assert render_trace(view_of(sample_plan())).decode() == GOLDEN.read_text(encoding="utf-8")


def test_predicted_and_measured_stand_in_two_groups() -> None:
    plan = sample_plan()
    events = events_of(plan, measured_step(plan))
    check_trace(events)
    count = {p: sum(e["ph"] == "X" and e["pid"] == p for e in events) for p in (1, 2)}
    assert count[PREDICTED_PROCESS] == count[MEASURED_PROCESS]
    assert count[PREDICTED_PROCESS] == sum(map(len, plan.schedule().actions))


@settings(max_examples=30)
@given(st.data())
def test_any_plan_gives_a_sound_trace_whose_times_add_up(data: st.DataObject) -> None:
    partition = data.draw(partitions())
    links = data.draw(stage_links(partition))
    training = data.draw(st.booleans())
    table = table_for(partition, training=training)
    subject = PlanSubject("m", "ab" * 32, CLUSTER, hash_of(CLUSTER))
    plan = make_plan(subject, table, predict(table, partition, links))
    events = events_of(plan, measured_step(plan))
    check_trace(events)
    timeline = plan.timeline()
    for rank, seconds in enumerate(timeline.compute_s):
        drawn = sum(
            e["dur"]
            for e in events
            if e["ph"] == "X"
            and e["pid"] == PREDICTED_PROCESS
            and e["tid"] == 1 + 2 * rank
            and e["cat"] in "FBIWO"
        )
        assert drawn == pytest.approx(seconds * 1e6, abs=1e-2)
    last = max(e["ts"] + e["dur"] for e in events if e["ph"] == "X" and e["pid"] == PREDICTED_PROCESS)
    assert last == pytest.approx(timeline.step_s * 1e6, abs=1e-2)


def test_every_message_of_the_schedule_is_an_arrow() -> None:
    plan = sample_plan()
    flows = [e for e in events_of(plan) if e["ph"] == "s"]
    assert len(flows) == 8 * (3 + 2)  # per microbatch: three links forward, two with gradients


def test_a_step_that_failed_is_a_sound_trace_too() -> None:
    plan = sample_plan()
    events = events_of(plan, measured_step(plan, until_s=0.1))
    check_trace(events)
    names = [e["args"]["name"] for e in events if e["name"] == "thread_name" and e["pid"] == 2]
    assert all("(stopped)" in name for name in names)


def test_a_step_of_another_batch_has_no_arrows_and_no_bytes() -> None:
    plan = sample_plan()
    other = replace(measured_step(plan), predicted_s=None)
    events = [e for e in events_of(plan, other) if e["pid"] == MEASURED_PROCESS]
    check_trace(events)
    assert {e["ph"] for e in events} == {"M", "X"}
    assert not any("bytes" in e["args"] for e in events)


def test_hostile_names_survive() -> None:
    names = json.dumps([e["args"] for e in events_of(hostile_plan()) if e["ph"] == "M"])
    assert json.dumps(HOSTILE[0])[1:-1] in names
