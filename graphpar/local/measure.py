"""Measure this machine's processor: the curves that the cost models need, in half a minute.

Every kernel is called the way a worker calls it (through `torch.ops.aten`, results freshly allocated),
so the curves hold the launch floor, the caches and the price of new memory alike.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from itertools import cycle, product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from graphpar.calibration import Calibration, Curve, Grid, fingerprint
from graphpar.cluster_build import num_cores
from graphpar.cost import LinkCost
from graphpar.errors import GraphparError
from graphpar.local.probes import (
    BYTES_PER_ELEMENT,
    KERNELS,
    MIXED_ROWS,
    MIXED_WIDTH,
    OPTIMIZED_TENSORS,
    STEPS,
    Work,
    attention,
    attention_flops,
    attention_heads,
    batch_of,
    batched_product,
    matrix_product,
    mixed_backward,
    mixed_forward,
    view,
)
from graphpar.local.worker_memory import measure_worker_bytes
from graphpar.neighbours import measure_slowing, reference_s

SIZES = (256, 4096, 32768, 131072, 524288, 1572864)
"""Elements of the tensors that curves are measured at."""

BUDGET_S = 0.003
MAX_FLOPS = 1.2e9

MATMUL_ROWS = (1, 4, 16, 64, 256, 1024, 4096)
MATMUL_WIDTHS = (32, 64, 128, 256, 512, 1024, 2048)
LOWER_ROWS = (1, 16, 64, 256, 1024)
LOWER_WIDTHS = (32, 64, 128, 256, 512, 1024, 2048)
COARSE_ROWS = (4, 64, 1024)
COARSE_WIDTHS = (64, 256, 1024)
BATCHED_ROWS = (8, 32, 128, 512)
BATCHED_WIDTHS = (16, 32, 64, 128, 256)
ATTENTION_LENGTHS = (16, 64, 128, 256, 512)
ATTENTION_HEADS = (16, 32, 64, 128)
ATTENTION_KINDS = ("full", "causal", "full_backward", "causal_backward")
MEASURED_FORMATS = ("float32", "bfloat16")
"""Formats in which every kind of product is measured."""


@dataclass
class _Samples:
    """Medians by name of the point, one per round; the quietest round counts."""

    rounds: dict[Any, list[float]] = field(default_factory=dict)

    def add(self, point: Any, work: Work) -> None:
        self.rounds.setdefault(point, []).append(time_of(work))

    def best(self, point: Any) -> float:
        return min(self.rounds[point])


_ROUNDS = 2
_RING = 32
_RING_BYTES = 24e6


def _rotated(make: Callable[[], Work], num_bytes: float) -> Work:
    """The same kernel on several sets of operands in turn, its latest results kept alive.

    In a model no kernel finds its operands where the last call of the same kernel left them, and
    results live on for backward; a tight loop over one set would measure the innermost cache.
    """
    count = int(min(_RING, max(_RING_BYTES / num_bytes, 2)))
    turn = cycle([make() for _ in range(count)])
    results: deque[object] = deque(maxlen=count)
    return lambda: results.append(next(turn)())


def time_of(work: Work, budget_s: float = BUDGET_S) -> float:
    """Median seconds of a call, after a warm-up, over at least three calls.

    With one thread the processor time of this thread is taken, so that other processes on the
    machine disturb the result little; torch runs kernels and backward in the calling thread then.
    """
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    work()
    start = clock()
    work()
    first = clock() - start
    times = [first]
    while sum(times) < budget_s or len(times) < 3:
        start = clock()
        work()
        times.append(clock() - start)
    return median(times)


def calibrate(*, threads: int = 1, refresh: bool = False, show_progress: bool = True) -> Calibration:
    """The calibration of this machine: read from the cache, or measured now and kept there.

    Args:
        threads: Threads of one worker.
        refresh: Measure even if a fitting calibration is at hand.
        show_progress: Show a progress bar on standard error if that is a terminal.

    Raises:
        GraphparError: Two processes of this machine could not exchange messages.

    The example is not run by the tests, for it takes half a minute where nothing was measured before:

    >>> graphpar.calibrate().slowing[0]  # doctest: +SKIP
    1.0
    """
    kept = None if refresh else Calibration.cached(threads)
    if kept is not None:
        return kept
    fresh = measure(threads, show_progress=show_progress)
    fresh.save()
    return fresh


def measure(threads: int = 1, *, show_progress: bool = False) -> Calibration:
    """Measure this machine for workers of so many threads.

    Kernels have the machine for themselves; what cores at work cost each other is measured apart.

    Args:
        threads: Threads of one worker.
        show_progress: Show a progress bar on standard error if that is a terminal.

    Raises:
        GraphparError: Two processes of this machine could not exchange messages, or no worker could be
            started.
    """
    loopback, worker_bytes = measure_loopback(), measure_worker_bytes(threads)
    samples = _Samples()
    with _threads(threads), _bar(show_progress) as step, torch.no_grad():
        plan = [point for _ in range(_ROUNDS) for point in _points()]
        for done, point in enumerate(plan):
            step(done, len(plan))
            samples.add(point.key, _rotated(point.make, point.num_bytes))
    return Calibration(
        fingerprint=fingerprint(threads),
        curves=_curves(samples),
        matmul=_matmul_grids(samples),
        batched_matmul={dtype: _batched_grid(samples, dtype) for dtype in MEASURED_FORMATS},
        attention=_attention_grids(samples),
        loopback=loopback.link,
        sum_s_per_byte=loopback.sum_s_per_byte,
        send_s=loopback.send_s,
        receive_s=loopback.receive_s,
        late_s=loopback.late_s,
        worker_bytes=worker_bytes,
        op_s=_mixed_extra(samples, backward=False),
        node_s=_mixed_extra(samples, backward=True),
        memory_bytes_per_s=24 * SIZES[-1] / 2 / samples.best(("pointwise", SIZES[-1])),
        slowing=measure_slowing(num_cores()),
        reference_s=reference_s(),
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


@dataclass(frozen=True)
class _Point:
    """One thing to measure: its key among the samples, how to set it up, bytes of its operands."""

    key: Any
    make: Callable[[], Work]
    num_bytes: float


def _points() -> Iterator[_Point]:
    """Every point to measure."""
    for name, setup in KERNELS.items():
        for size in SIZES:
            yield _Point((name, size), partial(setup, size), 12.0 * size)
    yield _Point(("view", 1), partial(view, 1), 1024.0)
    yield _Point(("mixed", 1), lambda: mixed_forward()[0], 1e6)
    yield _Point(("mixed_backward", 1), mixed_backward, 1e6)
    for name, setup in STEPS.items():
        for size in SIZES:
            yield _Point((name, size), partial(setup, size), 64.0 * size)
    for dtype, rows, widths in _matmul_plans():
        for r, w in product(rows, widths):
            if 2.0 * r * w * w <= _most_flops(dtype):
                key = ("matmul", dtype, r, w)
                yield _Point(key, partial(matrix_product, dtype, r, w), 4.0 * w * (2 * r + w))
    for dtype, r, w in product(MEASURED_FORMATS, BATCHED_ROWS, BATCHED_WIDTHS):
        operands = 4.0 * batch_of(r, w) * w * (2 * r + w)
        yield _Point(("bmm", dtype, r, w), partial(batched_product, r, w, dtype), operands)
    for dtype, length, head in product(MEASURED_FORMATS, ATTENTION_LENGTHS, ATTENTION_HEADS):
        operands = 16.0 * attention_heads(length) * length * head
        for kind in ATTENTION_KINDS:
            key = (kind, dtype, length, head)
            yield _Point(key, partial(attention, kind, length, head, dtype), operands)


def _matmul_plans() -> tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]:
    return (
        ("float32", MATMUL_ROWS, MATMUL_WIDTHS),
        ("bfloat16", LOWER_ROWS, LOWER_WIDTHS),
        ("float64", COARSE_ROWS, COARSE_WIDTHS),
        ("float16", COARSE_ROWS, COARSE_WIDTHS),
    )


def _most_flops(dtype: str) -> float:
    """The largest product that is measured; few processors have fast units for float16."""
    return MAX_FLOPS / 40 if dtype == "float16" else MAX_FLOPS


_MIXED_FORWARD = {"layer_norm": 2, "view": 10, "pointwise": 2, "gelu": 1}
_MIXED_BACKWARD = {
    "layer_norm_backward": 2, "view": 8, "pointwise": 2, "copy": 1, "gelu_backward": 1,
}  # fmt: skip
_MIXED_PRODUCTS = 4


def _mixed_extra(samples: _Samples, *, backward: bool) -> float:
    """What an op costs in a sequence of different ops beyond the same op in a tight loop.

    Cold instruction caches, the tape of autograd, and the Python between calls; spread evenly.
    """
    counts = _MIXED_BACKWARD if backward else _MIXED_FORWARD
    sizes = dict.fromkeys(counts, SIZES[0]) | {"view": 1}
    alone = sum(count * samples.best((name, sizes[name])) for name, count in counts.items())
    products = 2 * _MIXED_PRODUCTS if backward else _MIXED_PRODUCTS
    alone += products * samples.best(("matmul", "float32", MIXED_ROWS, MIXED_WIDTH))
    attention = "causal_backward" if backward else "causal"
    # One call over tiny heads: what is left of it is its floor.
    alone += samples.best((attention, "float32", ATTENTION_LENGTHS[0], ATTENTION_HEADS[0])) * _TINY_SHARE
    calls = sum(counts.values()) + products + 1
    spent = samples.best(("mixed_backward" if backward else "mixed", 1))
    return max((spent - alone) / calls, 0.0)


_TINY_SHARE = MIXED_ROWS / 1024
"""The block's attention has so small a part of the measured one's queries."""


def _curves(samples: _Samples) -> dict[str, Curve]:
    curves = {
        name: Curve(
            tuple(float(size * BYTES_PER_ELEMENT.get(name, 1)) for size in SIZES),
            _increasing(samples.best((name, size)) for size in SIZES),
        )
        for name in KERNELS
    }
    for name in STEPS:
        seconds = _increasing(samples.best((name, size)) / OPTIMIZED_TENSORS for size in SIZES)
        curves[name] = Curve(tuple(map(float, SIZES)), seconds)
    curves["view"] = Curve((1.0,), (samples.best(("view", 1)),))
    return curves


def _increasing(seconds: Iterator[float] | Any) -> tuple[float, ...]:
    """The same times without dips: a larger call never takes less, whatever noise says."""
    result: list[float] = []
    for value in seconds:
        result.append(max(value, result[-1] if result else 0.0))
    return tuple(result)


def _matmul_grids(samples: _Samples) -> dict[str, Grid]:
    grids = {}
    floor = samples.best(("view", 1))
    for dtype, rows, widths in _matmul_plans():
        table: list[tuple[float, ...]] = []
        for r in rows:
            row: list[float] = []
            for j, w in enumerate(widths):
                flops = 2.0 * r * w * w
                if flops <= _most_flops(dtype):
                    spent = samples.best(("matmul", dtype, r, w))
                    row.append(flops / max(spent - floor, spent / 2))
                else:
                    # Beyond what was measured the rate is that of the largest product at hand.
                    row.append(table[-1][j] if table else row[-1])
            table.append(tuple(row))
        grids[dtype] = Grid(tuple(map(float, rows)), tuple(map(float, widths)), tuple(table))
    return grids


def _batched_grid(samples: _Samples, dtype: str) -> Grid:
    table = tuple(
        tuple(
            2.0 * batch_of(r, w) * r * w * w / samples.best(("bmm", dtype, r, w)) for w in BATCHED_WIDTHS
        )
        for r in BATCHED_ROWS
    )
    return Grid(tuple(map(float, BATCHED_ROWS)), tuple(map(float, BATCHED_WIDTHS)), table)


def _attention_grids(samples: _Samples) -> dict[str, Grid]:
    """Grids by kind; those of formats other than float32 by kind and format."""
    lengths, heads = tuple(map(float, ATTENTION_LENGTHS)), tuple(map(float, ATTENTION_HEADS))
    return {
        kind if dtype == "float32" else f"{kind}_{dtype}": Grid(
            lengths,
            heads,
            tuple(
                tuple(
                    attention_flops(kind, s, h) / samples.best((kind, dtype, s, h))
                    for h in ATTENTION_HEADS
                )
                for s in ATTENTION_LENGTHS
            ),
        )
        for kind, dtype in product(ATTENTION_KINDS, MEASURED_FORMATS)
    }


_QUIET_LATENCY_S = 5e-4
_ATTEMPTS = 3
_MOST_ENDS = 4


@dataclass(frozen=True)
class Loopback:
    """Messages between processes of this machine, and what summing costs on top, in seconds per byte."""

    link: LinkCost
    sum_s_per_byte: float
    send_s: float = 0.0
    receive_s: float = 0.0
    late_s: float = 0.0


def measure_loopback() -> Loopback:
    """Latency and bandwidth of gloo between processes of this machine, and its ring all-reduce.

    On a busy machine every message may wait for a time slice of the scheduler, some milliseconds; then
    it is tried again, and the quickest counts.

    Raises:
        GraphparError: The processes could not exchange messages.
    """
    found = _exchange_messages()
    for _ in range(_ATTEMPTS - 1):
        if found.link.latency_s <= _QUIET_LATENCY_S:
            break
        found = min(found, _exchange_messages(), key=lambda loopback: loopback.link.latency_s)
    return found


def _exchange_messages() -> Loopback:
    """Start all ends once; one more than there are cores, as in a job that has more workers."""
    num_ranks = min(num_cores() + 1, _MOST_ENDS)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "graphpar.local.loopback"]
        where = [str(num_ranks), str(Path(folder) / "store")]
        ends = [
            subprocess.Popen(
                [*command, str(rank), *where], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            for rank in range(num_ranks)
        ]
        try:
            outputs = [end.communicate(timeout=90) for end in ends]
        except subprocess.TimeoutExpired as error:
            raise GraphparError("The processes of this machine could not meet in 90 s.") from error
        finally:
            for end in ends:
                end.kill()
                end.wait()
    if any(end.returncode for end in ends):
        told = next((errors for _, errors in outputs if errors), "no message")
        raise GraphparError(f"The loopback measurement failed: {told}")
    found = json.loads(outputs[0][0])
    return Loopback(
        LinkCost(found["latency_s"], found["bytes_per_s"]),
        found["sum_s_per_byte"],
        found["send_s"],
        found["receive_s"],
        found["late_s"],
    )


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _bar(wanted: bool) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on standard error, or nothing."""
    if not (wanted and sys.stderr.isatty()):
        yield lambda done, total: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, transient=True) as progress:
        task = progress.add_task("measuring this machine")
        yield lambda done, total: progress.update(task, completed=done, total=total)
