"""Emulated devices take longer for the same work, emulated links for the same message."""

import time

import pytest
import torch
from helpers import Line, force, straight
from torch import nn

from graphpar.runtime.emulate import Pace, SlowLink
from graphpar.runtime.job import CompiledModel


class Wide(nn.Module):
    """Enough work for a clock to see."""

    def __init__(self, layers: int = 4, width: int = 256) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.layers(x).square().mean()
        return result


def compute_s(job: CompiledModel, rank: int, kinds: str) -> float:
    """The shortest of the rank's forwards or backwards in the last step."""
    assert job.last_step is not None
    events = job.last_step.reports[rank].events
    return min(e.end_s - e.start_s for e in events if e.token[1] in kinds)


@pytest.mark.parametrize("kind", ["F", "B"])
def test_slowdown_stretches_the_same_work(kind: str) -> None:
    cluster = {"devices": [{"kind": "cpu", "threads": 1}, {"kind": "cpu", "threads": 1, "slowdown": 4.0}]}
    batch = (torch.randn(256, 256),)
    with force(Wide(), batch, lines=(Line((2,), 8),), cluster=cluster).start() as job:
        for _ in range(2):
            job.step(*batch)
        assert compute_s(job, 1, kind) > 2 * compute_s(job, 0, kind)


def test_pace_adds_to_the_computing_time_only() -> None:
    began, computed = time.perf_counter(), time.thread_time()
    with Pace(3.0, threads=1).work():
        while time.thread_time() - computed < 0.02:
            pass
    assert time.perf_counter() - began >= 0.06
    began = time.perf_counter()
    with Pace(50.0, threads=1).work():
        time.sleep(0.05)
    assert time.perf_counter() - began < 2.0, "sleeping was stretched too"


class LateClock:
    """Time that passes by sleeping alone, a tenth of a millisecond longer than asked for."""

    now_s = 0.0

    def perf_counter(self) -> float:
        return self.now_s

    thread_time = perf_counter

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds + 1e-4


def test_pauses_that_last_too_long_do_not_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = LateClock()
    monkeypatch.setattr("graphpar.runtime.emulate.time", clock)
    pace = Pace(3.0, threads=1)
    for _ in range(100):
        with pace.work():
            clock.now_s += 1e-3
    assert clock.now_s == pytest.approx(100 * 3e-3, abs=2e-4)


def test_message_takes_latency_and_bytes_over_rate() -> None:
    latency_s, rate = 0.05, 1e6
    cluster = {
        "devices": [{"kind": "cpu", "count": 2, "threads": 1}],
        "link": {"latency_s": latency_s, "bytes_per_s": rate},
    }
    model = nn.Sequential(nn.Linear(4, 500), nn.Tanh(), nn.Linear(500, 3))
    batch = (torch.randn(20, 4),)
    forced = force(model, batch, lines=straight(2), train=None, cluster=cluster, by_op=True)
    with forced.start() as job:
        for _ in range(2):
            job(*batch)
        assert job.last_step is not None
        sender, receiver = job.last_step.reports
    (sent,) = (e for e in sender.events if e.token[1] == "S")
    (received,) = (e for e in receiver.events if e.token[1] == "R")
    assert received.end_s - sent.start_s >= latency_s + 20 * 500 * 4 / rate
    assert sent.end_s - sent.start_s < latency_s, "the sender does not wait for the link"


def test_slow_link_carries_one_message_at_a_time_in_order() -> None:
    link = SlowLink(latency_s=0.01, bytes_per_s=1e4)
    arrived: list[tuple[int, float]] = []
    began = time.monotonic()
    for number in range(3):
        link.submit(100, lambda n=number: arrived.append((n, time.monotonic())))  # type: ignore[misc]
    link.drain()
    assert [n for n, _ in arrived] == [0, 1, 2]
    assert all(at - began >= 0.02 * (n + 1) for n, at in arrived)


def test_failure_on_a_slow_link_is_raised_where_it_is_drained() -> None:
    link = SlowLink(0.0, 1e9)

    def fail() -> None:
        raise ConnectionError("gone")

    link.submit(1, fail)
    with pytest.raises(ConnectionError, match="gone"):
        link.drain()
