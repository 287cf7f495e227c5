"""What ends a process of the coverage harness, and what its row says of it then."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import coverage_run
from coverage_case import Row
from coverage_table import table


class _NoServer:
    def adopt(self) -> None:
        pass


def row_of(monkeypatch: pytest.MonkeyPatch, case: Callable[..., None], limit_s: float = 60.0) -> Row:
    """The row of an architecture whose process does what is given."""
    monkeypatch.setattr(coverage_run, "run_case", case)
    terms = coverage_run.Terms(limit_s, (2,), "done")
    server: Any = _NoServer()
    row, _ = coverage_run._in_own_process("Some", terms, server)
    return row


def test_a_process_that_is_killed_leaves_its_stage_and_the_signal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def dies(name: str, row: Row, workers: Any, tell: Callable[[], None], until: str) -> None:
        row.stage = "capture"
        tell()
        os.kill(os.getpid(), signal.SIGKILL)

    row = row_of(monkeypatch, dies)
    assert (row.status, row.stage) == ("fail", "capture") and "SIGKILL" in row.reason


def test_a_process_that_ends_without_a_word_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def leaves(name: str, row: Row, workers: Any, tell: Callable[[], None], until: str) -> None:
        tell()
        os._exit(3)

    row = row_of(monkeypatch, leaves)
    assert (row.status, row.reason) == ("fail", "the process ended with exit code 3")


@pytest.mark.parametrize(
    ("what", "value", "reason"),
    [
        ("_memory_bytes", 7 * 2**30, "more than 6 GiB of memory"),
        ("_processor_seconds", 61.0, "no end after 60 s of processor time"),
    ],
)
def test_a_process_that_takes_too_much_is_ended(
    monkeypatch: pytest.MonkeyPatch, what: str, value: float, reason: str
) -> None:
    def waits(name: str, row: Row, workers: Any, tell: Callable[[], None], until: str) -> None:
        row.stage = "run"
        tell()
        signal.pause()

    monkeypatch.setattr(coverage_run, "LOOK_S", 0.05)
    looks = iter([0.0] * 4)
    monkeypatch.setattr(coverage_run, what, lambda pid: next(looks, value))
    row = row_of(monkeypatch, waits)
    assert (row.status, row.reason) == ("fail", reason)


def test_a_process_that_does_nothing_is_ended_and_a_busy_one_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    used = [0.0]
    monkeypatch.setattr(coverage_run, "_processor_seconds", lambda pid: used[0])
    watch = coverage_run._Watch(os.getpid(), 1e9)

    def look(times: int, works: float) -> str:
        for _ in range(times):
            now[0] += coverage_run.LOOK_S
            used[0] += works * coverage_run.LOOK_S
            if said := watch.verdict():
                return said
        return ""

    looks = int(coverage_run.IDLE_S / coverage_run.LOOK_S)
    assert look(3 * looks, 0.5) == ""
    assert look(looks - 1, 0.0) == ""
    assert look(1, 0.5) == ""
    assert look(looks + 1, 0.0) == "nothing happened for 180 s"


def test_tables_show_every_row_and_count_what_passes() -> None:
    good = Row("A", status="pass", stage="done", head="AModel", max_error=1e-7, modes=("eval", "train"))
    bad = Row("B", stage="capture", reason="r" * 500)
    text = table([vars(bad), vars(good)])
    assert "| A | AModel | eval, train | 1.0e-07 | whole |" in text and "1 of 2 pass." in text
    assert f"| B | capture | {'r' * 160} |" in text
