"""Processes that solve scenarios: they do not run the script that asks once more, and may be killed."""

import itertools
import multiprocessing
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import graphpar
from graphpar.errors import RunError
from graphpar.scenarios.solve import solve_together
from graphpar.scenarios.task import Task
from graphpar.scenarios.types import Answer
from graphpar.scenarios.workers import LEAST_AHEAD, Submit, submitted

SCRIPT = """
import torch, graphpar
print("started", flush=True)
model = torch.nn.Sequential(*[torch.nn.Linear(8, 8) for _ in range(3)])
asked = ["set batch=12", "set batch=24", "set batch=4"]
cluster = {"devices": [{"kind": "t4", "count": 2}]}
options = {"args": (torch.randn(6, 8),), "cache": False, "time_limit_s": 0.2, "processes": 2}
print(len(graphpar.what_if(model, cluster, asked, **options).answers))
"""


@pytest.mark.slow
def test_a_script_without_a_guard_runs_once(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    ran = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert ran.stdout.split() == ["started", "3"], ran.stderr


def test_where_one_is_killed_twice_a_study_goes_on_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int | None] = []
    number = itertools.count()

    @contextmanager
    def solving(processes: int | None, tasks: int) -> Iterator[Submit]:
        begun.append(processes)

        def submit(tasks: list[Task]) -> Future[list[Answer]]:
            future: Future[list[Answer]] = Future()
            # The baseline and one scenario, whichever of its futures is looked at first.
            if processes != 1 and next(number) > 1:
                future.set_exception(BrokenProcessPool())
            else:
                future.set_result(solve_together(tasks))
            return future

        try:
            yield submit
        except BrokenProcessPool as error:
            raise RunError("killed") from error

    def priced(*_: object) -> Any:
        raise RunError("killed")

    asked = ["set batch=8", "set batch=32", "set batch=4"]
    cluster = {"devices": [{"kind": "t4", "count": 2}], "link": {"bytes_per_s": 1e9, "latency_s": 1e-5}}
    layers = nn.Sequential(*(nn.Linear(8, 8, device="meta") for _ in range(3)))
    what_if = partial(graphpar.what_if, layers, cluster, args=(torch.empty(8, 8, device="meta"),))
    options: dict[str, Any] = {"tensor": 2, "gap": 0.9, "cache": False, "processes": 1}
    undisturbed = what_if(asked, **options)
    monkeypatch.setattr("graphpar.scenarios.study.solving", solving)
    monkeypatch.setattr("graphpar.scenarios.study.priced_by_several", priced)
    with pytest.warns(UserWarning, match="by this process alone") as told:
        study = what_if(asked, **{**options, "processes": 2})
    twice = ["new ones are started", "by this process alone"]
    assert [words in str(w.message) for w, words in zip(told, 2 * twice, strict=True)] == 4 * [True]
    assert [a.step_s for a in study.answers] == [a.step_s for a in undisturbed.answers]
    assert study.baseline.step_s == undisturbed.baseline.step_s
    assert begun == [2, 2, 2, 1]


def _many() -> None:
    asked = [f"set batch={batch}" for batch in range(4, 4 + LEAST_AHEAD)]
    cluster = {"devices": [{"kind": "t4", "count": 2}]}
    layers = nn.Sequential(*(nn.Linear(8, 8, device="meta") for _ in range(3)))
    args = (torch.empty(4, 8, device="meta"),)
    graphpar.what_if(layers, cluster, asked, args, cache=False, processes=2)


def test_processes_that_others_start_meanwhile_live_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """A caller may have processes of its own, and start some while the model is captured."""
    began: list[Any] = []

    def captured(*_: Any) -> None:
        # Forked, it needs no time to begin, and does nothing that a thread of this one could hold up.
        began.append(multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,)))
        began[0].start()
        raise ValueError("no model")

    monkeypatch.setattr("graphpar.scenarios.api.PriceBook", captured)
    with pytest.raises(ValueError, match="no model"):
        _many()
    try:
        began[0].join(0.5)
        assert began[0].is_alive()
        assert multiprocessing.active_children() == began
    finally:
        began[0].kill()
        began[0].join()


def test_processes_that_are_starting_do_not_hear_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would tell of it where it is, before its initializer has run; this one hears it afterwards."""
    masks: list[set[int]] = []
    pool: Any = SimpleNamespace(
        submit=lambda *_: masks.append(signal.pthread_sigmask(signal.SIG_BLOCK, ()))
    )
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    submitted(pool, list, [])
    assert signal.SIGINT in masks[0]
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


def test_what_was_answered_before_starts_no_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[int] = []

    @contextmanager
    def ahead(_: int | None, tasks: int) -> Iterator[None]:
        begun.append(tasks)
        yield

    monkeypatch.setattr("graphpar.scenarios.api.ahead", ahead)
    args = (torch.empty(4, 8, device="meta"),)
    for layers, asked in ((1, "set batch=8"), (1, "set batch=8"), (1, "set batch=2"), (2, "set batch=8")):
        model = nn.Sequential(*(nn.Linear(8, 8, device="meta") for _ in range(layers)))
        cluster = {"devices": [{"kind": "t4", "count": 2}]}
        graphpar.what_if(model, cluster, [asked], args, cache=tmp_path, processes=1, gap=0.9)
    assert begun == [2, 0, 2, 2]
