"""Keep the other cores busy while something is measured, as the other workers of a job will.

Workers share caches, memory bandwidth and, on rented machines, the cores themselves; a kernel timed on
an idle machine is faster than it will ever be in a job. `python -m graphpar.neighbours` is one neighbour:
it trains some layers, too large for a core's own caches, until its standard input is closed.
"""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

MOST = 7
"""More neighbours than this are not started, however many cores there are."""


@contextmanager
def busy_neighbours(count: int) -> Iterator[None]:
    """Run up to `count` neighbours beside the body; none is left behind."""
    command = [sys.executable, "-m", "graphpar.neighbours"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    running = [subprocess.Popen(command, **pipes) for _ in range(min(count, MOST))]  # type: ignore[call-overload]
    try:
        for process in running:
            process.stdout.readline()
        yield
    finally:
        for process in running:
            process.kill()
            process.communicate()


def main() -> None:
    """Train until standard input is closed."""
    torch.set_num_threads(1)
    blocks = [
        (nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256), nn.LayerNorm(256)) for _ in range(4)
    ]
    layers = nn.Sequential(*(layer for block in blocks for layer in block))
    x = torch.randn(1024, 256)

    def leave_with_the_parent() -> None:
        sys.stdin.read()
        os._exit(0)

    threading.Thread(target=leave_with_the_parent, daemon=True).start()
    print("ready", flush=True)
    while True:
        layers(x).sum().backward()


if __name__ == "__main__":
    main()
