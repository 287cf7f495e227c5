"""What cores at work cost each other, and the reference that tells how fast the machine is just now.

Workers share caches, memory bandwidth and, on rented machines, the cores themselves; a kernel timed on
an idle machine is faster than beside others. `python -m graphpar.neighbours` is one neighbour: it trains
some layers, too large for a core's own caches, until its standard input is closed.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

import torch
from torch import nn

MOST = 7
"""More neighbours than this are not started, however many cores there are."""


ROUNDS = 5
"""Pairs of times, alone and beside neighbours, that `slowing_by` takes."""


@contextmanager
def busy_neighbours(count: int) -> Iterator[list[int]]:
    """Run up to `count` neighbours beside the body, which gets their process numbers; none is left."""
    command = [sys.executable, "-m", "graphpar.neighbours"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    running = [subprocess.Popen(command, **pipes) for _ in range(min(count, MOST))]  # type: ignore[call-overload]
    try:
        for process in running:
            process.stdout.readline()
        yield [process.pid for process in running]
    finally:
        for process in running:
            process.kill()
            process.communicate()


def slowing_by(pids: Sequence[int], work: Callable[[], float]) -> float:
    """How many times longer some work takes beside these processes than while they stand still.

    Times are taken in turn, so that a machine whose speed drifts slows both alike.
    """
    ratios = []
    try:
        for _ in range(ROUNDS):
            _signal(pids, signal.SIGSTOP)
            alone_s = work()
            _signal(pids, signal.SIGCONT)
            ratios.append(work() / alone_s)
    finally:
        _signal(pids, signal.SIGCONT)
    return max(median(ratios), 1.0)


def _signal(pids: Sequence[int], number: signal.Signals) -> None:
    for pid in pids:
        os.kill(pid, number)
    time.sleep(_SETTLES_S)


_SETTLES_S = 0.01


def up_to(cores: int, all_at_work: float) -> tuple[float, ...]:
    """Factors for 1, 2, ... cores at work, in even steps to that of all of them.

    >>> up_to(3, 1.5)
    (1.0, 1.25, 1.5)
    """
    steps = max(cores - 1, 1)
    return tuple(1.0 + (all_at_work - 1.0) * k / steps for k in range(cores))


def measure_slowing(cores: int) -> tuple[float, ...]:
    """What this machine's cores cost each other in training some layers."""
    train = training(rows=64)
    train()
    with busy_neighbours(cores - 1) as pids:
        found = slowing_by(pids, train) if pids else 1.0
    return up_to(cores, found)


def reference_s() -> float:
    """Processor time of a reference, a short training step on one thread: the median of some."""
    train = training(rows=64)
    train()
    return median(train() for _ in range(_REFERENCES))


_REFERENCES = 9


@dataclass
class OtherWork:
    """Cores that others than this process kept busy; None where the system does not tell."""

    cores: float | None = None


@contextmanager
def other_work() -> Iterator[OtherWork]:
    """While the body runs, find out how many cores others keep busy (on Linux)."""
    found = OtherWork()
    before, own_s, began_s = _busy_s(), time.process_time(), time.perf_counter()
    yield found
    after = _busy_s()
    if before is None or after is None:
        return
    mine_s, passed_s = time.process_time() - own_s, time.perf_counter() - began_s
    # The system counts in ticks: over a shorter time than some tens of them nothing is known.
    if passed_s * os.sysconf("SC_CLK_TCK") >= _LEAST_TICKS:
        found.cores = max(after - before - mine_s, 0.0) / passed_s


_LEAST_TICKS = 5


def _busy_s() -> float | None:
    """Seconds that all cores together have been at work since the machine started."""
    try:
        with open("/proc/stat", encoding="ascii") as stat:
            user, nice, system, _, _, irq, softirq, steal = map(int, stat.readline().split()[1:9])
    except (OSError, ValueError):
        return None
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def training(rows: int) -> Callable[[], float]:
    """Trains some layers on one thread; a call gives the processor time of one pass."""
    blocks = [
        (nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256), nn.LayerNorm(256)) for _ in range(4)
    ]
    layers = nn.Sequential(*(layer for block in blocks for layer in block))
    x = torch.ones(rows, 256)

    def work() -> float:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        with torch.enable_grad():
            began_s = time.thread_time()
            layers(x).sum().backward()
            spent_s = time.thread_time() - began_s
        torch.set_num_threads(threads)
        return spent_s

    return work


def main() -> None:
    """Train until standard input is closed."""
    work = training(rows=256)

    def leave_with_the_parent() -> None:
        sys.stdin.read()
        os._exit(0)

    threading.Thread(target=leave_with_the_parent, daemon=True).start()
    print("ready", flush=True)
    while True:
        work()


if __name__ == "__main__":
    main()
