"""Emulated devices take longer for the same work, emulated links for the same message."""

import time

import pytest
import torch
from helpers import Line, force, straight
from torch import nn

from graphpar.runtime.emulate import LinkTime, Pace
from graphpar.runtime.player import SlowLink


class Wide(nn.Module):
    """Enough work for a clock to see."""

    def __init__(self, layers: int = 4, width: int = 256) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.layers(x).square().mean()
        return result


def test_a_slowed_device_takes_longer_for_the_same_work() -> None:
    cluster = {
        "devices": [{"kind": "cpu", "threads": 1}, {"kind": "cpu", "threads": 1, "slowdown": 12.0}]
    }
    batch = (torch.randn(512, 256),)
    with force(Wide(), batch, lines=(Line((2,), 8),), cluster=cluster).start() as job:
        for _ in range(2):
            job.step(*batch)
        assert job.last_step is not None
        fast, slow = job.last_step.reports
    # Single actions may be late, and shorter for that; the device as a whole is as slow as described.
    computing = sum(e.end_s - e.start_s for e in fast.events if e.token[1] in "FB")
    computing_slowly = max(e.end_s for e in slow.events if e.token[1] in "FB") - slow.start_s
    alone = min(e.end_s - e.start_s for e in fast.events if e.token[1] == "B") * 8
    assert computing_slowly > 4 * min(computing, alone)


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
    """Time that passes by sleeping alone, somewhat longer than asked for."""

    def __init__(self) -> None:
        self.now_s = self.late_s = 0.0

    def monotonic(self) -> float:
        return self.now_s

    thread_time = perf_counter = monotonic

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds + self.late_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> LateClock:
    """The time that emulated devices live in."""
    made = LateClock()
    monkeypatch.setattr("graphpar.runtime.emulate.time", made)
    return made


@pytest.mark.parametrize("late_s", [1e-4, 1.5e-3])
def test_pauses_that_last_too_long_do_not_add_up(clock: LateClock, late_s: float) -> None:
    clock.late_s = late_s
    pace = Pace(3.0, threads=1)
    pace.restart(0.0)
    for _ in range(100):
        with pace.work():
            clock.now_s += 1e-3
    assert clock.now_s == pytest.approx(100 * 3e-3, abs=late_s + 1e-6)


def test_an_action_begins_when_its_message_is_due_not_when_the_worker_looks(clock: LateClock) -> None:
    pace = Pace(3.0, threads=1)
    pace.restart(0.0)
    clock.now_s = 0.012
    pace.ready(0.010)
    assert pace.now_s() == pytest.approx(0.010)
    with pace.work():
        clock.now_s += 2e-3
    assert clock.now_s == pytest.approx(0.016)


def test_a_device_whose_work_failed_keeps_its_time_in_the_next_step(clock: LateClock) -> None:
    pace = Pace(3.0, threads=1)
    with pytest.raises(ValueError, match="no shape"), pace.work():
        raise ValueError("no shape")
    pace.restart(0.010)
    clock.now_s = 0.5
    assert pace.now_s() == pytest.approx(0.010)


def test_a_device_that_is_not_slowed_down_lives_in_the_machines_time(clock: LateClock) -> None:
    pace = Pace(1.0, threads=1)
    pace.restart(0.0)
    clock.now_s = 0.5
    assert pace.now_s() == 0.5


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


def test_link_carries_one_message_at_a_time_in_order() -> None:
    link = LinkTime(latency_s=0.01, bytes_per_s=1e4)
    assert [link.due_s(100, 5.0) for _ in range(3)] == pytest.approx([5.02, 5.04, 5.06])
    assert link.due_s(100, 6.0) == pytest.approx(6.02)


def test_deliveries_come_one_after_another() -> None:
    link = SlowLink()
    arrived: list[tuple[int, float]] = []
    began = time.monotonic()
    for number in range(3):
        link.carry(0.02, lambda n=number: arrived.append((n, time.monotonic())))  # type: ignore[misc]
    link.drain()
    assert [n for n, _ in arrived] == [0, 1, 2]
    assert all(at - began >= 0.02 * (n + 1) for n, at in arrived)


def test_a_failed_delivery_is_raised_where_it_is_waited_for() -> None:
    link = SlowLink()

    def fail() -> None:
        raise ConnectionError("gone")

    link.carry(0.0, fail)
    with pytest.raises(ConnectionError, match="gone"):
        link.drain()
