"""Rehearsals: every message has one receiver, and nothing is over before its time."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_samples import partitions, sample_plan, stage_links, table_for

from graphpar.commands.rehearse import command
from graphpar.errors import RunError
from graphpar.runtime import rehearsal
from graphpar.runtime.rehearsal import rehearse, scenes_of
from graphpar.schedule import Action, build_schedule
from graphpar.schedule.simulate import simulate
from graphpar.schedule.timing import timing_of


@settings(max_examples=50)
@given(data=st.data(), training=st.booleans())
def test_every_message_is_received_once(data: st.DataObject, training: bool) -> None:
    partition = data.draw(partitions())
    links = data.draw(stage_links(partition))
    schedule = build_schedule(partition, links, training)
    timing = timing_of(table_for(partition, training=training), partition)
    scripts = scenes_of(schedule, timing, simulate(schedule, timing), 2.0)
    sent: Counter[tuple[int, int, int]] = Counter()
    received: Counter[tuple[int, int, int]] = Counter()
    for rank, scenes in enumerate(scripts):
        assert [scene.token for scene in scenes] == [str(a) for a in schedule.actions[rank]]
        for scene in scenes:
            away = Action.parse(scene.token).kind in "SD"
            for peer, tag, seconds in scene.messages:
                assert peer != rank and seconds >= 0
                (sent if away else received)[(rank, peer, tag) if away else (peer, rank, tag)] += 1
    assert sent == received
    assert set(sent.values()) <= {1}


@pytest.mark.distributed
def test_a_plan_for_absent_devices_is_played() -> None:
    plan = sample_plan()
    found = rehearse(plan, steps=2, lasting_s=0.4)
    assert found.ranks == len(plan.devices)
    assert found.predicted_s == pytest.approx(plan.timeline().step_s)
    # Waits are never shorter than asked for; on a busy machine they may be longer by anything.
    assert all(seconds > 0.98 * found.predicted_s for seconds in found.rehearsed_s)
    assert found.latest_s > -0.02 * found.predicted_s
    assert any(found.latest.startswith(device) for device in plan.devices)


@pytest.mark.distributed
def test_command(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    sample_plan(training=False).save(file)
    asked = [str(file), "--steps", "1", "--seconds", "0.05"]
    told = json.loads(CliRunner().invoke(command, [*asked, "--json"], catch_exceptions=False).stdout)
    assert told["ranks"] == len(sample_plan().devices)
    assert told["error"] == pytest.approx(told["predicted_s"] / told["rehearsed_s"][0] - 1)


def test_what_cannot_be_played_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="positive"):
        rehearse(sample_plan(), steps=0, lasting_s=1.0)
    with pytest.raises(ValueError, match="positive"):
        rehearse(sample_plan(), steps=1, lasting_s=float("nan"))
    for seconds, why in (("nan", "not a number"), ("1e-9", "not in the range")):
        refused = CliRunner().invoke(command, ["plan.json", "--seconds", seconds])
        assert refused.exit_code == 2 and "--seconds" in refused.output and why in refused.output
    monkeypatch.setattr(rehearsal, "MOST_PROCESSES", 1)
    with pytest.raises(RunError, match=f"{len(sample_plan().devices)} processes; 1 can"):
        rehearse(sample_plan(), steps=1, lasting_s=1.0)


def test_the_page_says_who_played_and_which_way_times_were_stretched() -> None:
    found = rehearsal.Rehearsal(2, 2, 4.0, 1.0, (1.0, 1.25, 1.25), 0.1, "a/0, 0O")
    assert "4 times as long" in str(found) and "-20.0 %" in str(found)
    assert "1/2 as long" in str(replace(found, stretch=0.5))
    assert str(found).startswith("2 ranks as processes")
    assert str(replace(found, ranks=1, processes=1)).startswith("1 rank as")
    assert "4 ranks, each tensor group as one process, 1 in all" in str(
        replace(found, ranks=4, processes=1)
    )
