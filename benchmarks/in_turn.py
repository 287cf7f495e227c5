"""Contestants that take turns step by step in the same two ranks, and how their times are compared."""

import json
import os
import socket
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

RANKS = 2
WARM_UP = 3
"""First rounds, which do not count."""


def begin_rank(rank: int, port: int) -> None:
    """Join the other rank over the loopback device, on one thread."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(RANKS), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(RANKS),
        GROUP_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo",
    )  # fmt: skip
    dist.init_process_group("gloo")
    torch.manual_seed(0)


def end_rank(folder: str, result: dict[str, Any] | None) -> None:
    """Leave the other rank; the one with a result writes it down."""
    if result is not None:
        Path(folder, "result.json").write_text(json.dumps(result), encoding="utf-8")
    dist.destroy_process_group()


def result_of(work: Callable[..., None], *args: Any) -> Any:
    """What the two ranks of `work(rank, *args, port, folder)` found."""
    with TemporaryDirectory() as folder:
        spawn(work, (*args, _free_port(), folder), nprocs=RANKS)  # type: ignore[no-untyped-call]
        return json.loads(Path(folder, "result.json").read_text(encoding="utf-8"))


def timed(step: Callable[[], float]) -> tuple[float, float, float]:
    """The loss of a step, seconds of the slower rank's clock, and of both ranks' processors."""
    dist.barrier()
    began, computed = time.perf_counter(), time.process_time()
    loss = step()
    own = torch.tensor([time.perf_counter() - began, time.process_time() - computed], dtype=torch.float64)
    slowest, total = own.clone(), own.clone()
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    dist.all_reduce(total)
    return loss, float(slowest[0]), float(total[1])


def ratios(seconds: dict[str, list[float]]) -> dict[str, float]:
    """The median over rounds of graphpar's time over each other's."""
    ours = seconds["graphpar"]
    return {
        name: median(a / b for a, b in zip(ours, theirs, strict=True))
        for name, theirs in seconds.items()
        if name != "graphpar"
    }


def furthest_apart(losses: dict[str, list[float]]) -> float:
    """The largest relative difference between graphpar's losses and another's."""
    return max(
        abs(a - b) / abs(b)
        for name, others in losses.items()
        if name != "graphpar"
        for a, b in zip(losses["graphpar"], others, strict=True)
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
