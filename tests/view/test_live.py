"""What `graphpar run` shows: lines in a file, a table on a terminal."""

import io
from dataclasses import replace

import pytest
from plan_samples import sample_plan
from rich.console import Console
from view_samples import measured_step

from graphpar.commands.live import Progress, shares_of_step, step_line
from graphpar.runtime.last_step import LastStep


def steps() -> tuple[LastStep, LastStep]:
    plan = sample_plan()
    return measured_step(plan, slower=1.25), measured_step(plan)


def shown(*, terminal: bool) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=80, color_system=None)
    with Progress(sample_plan(), 2, console) as progress:
        for number, step in enumerate(steps(), start=1):
            progress.show(number, 16, step, loss=1.5 / number)
    return out.getvalue()


def test_a_file_gets_one_line_a_step() -> None:
    assert shown(terminal=False).splitlines() == [
        "step 1/2  loss 1.500000  239 ms  66.9 sample/s  predicted 191 ms (-20.0 %)",
        "step 2/2  loss 0.750000  210 ms  76.1 sample/s  predicted 191 ms (-9.1 %)",
    ]


def test_a_terminal_gets_a_table_of_the_ranks() -> None:
    text = shown(terminal=True)
    assert "\x1b[" in text, "the table is redrawn in place"
    last = text[text.rindex("step 2/2") :]
    for device in sample_plan().devices:
        assert device in last
    assert all(word in last for word in ("busy", "plan", "memory", "4 MiB"))


def test_busy_shares_are_those_of_the_plan_where_all_is_stretched_alike() -> None:
    plan = sample_plan()
    for share, replica in zip(shares_of_step(plan, steps()[0]), plan.replicas, strict=True):
        assert share.device == replica.device
        assert share.busy == pytest.approx(replica.busy_share)
        assert share.predicted_bytes == replica.peak_bytes


def test_a_step_of_another_batch_is_not_compared() -> None:
    line = step_line(1, 1, 3, replace(measured_step(sample_plan()), predicted_s=None), None)
    assert "predicted" not in line and "loss" not in line
