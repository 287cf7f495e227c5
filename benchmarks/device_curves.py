"""Kernels of this machine's CUDA device against the catalogue: `benchmarks/device_curves.py --json`.

Each kernel is called as a worker calls it and timed with device events over many calls, on several sets
of operands in turn. Beside the measured time stands what the cost model predicts for it from the
device's entry in the catalogue, the host's pace left out. Besides: the host's time to issue an op, copies
between the device and main memory, and optimisers over many tensors.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import cycle, product
from statistics import median
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from graphpar.cluster import Cluster
from graphpar.cluster_build import cuda_devices
from graphpar.cost_models.rates import CatalogueRates
from graphpar.cost_models.work import Kernel
from graphpar.local import probes
from graphpar.local.probes import BYTES_PER_ELEMENT, KERNELS

Call = Callable[[], object]
aten = torch.ops.aten

SHAPES = ((1024, 1024), (4096, 4096), (4096, 11008), (8192, 8192))
"""Inner size and columns of matrix products."""
ROWS = (16, 256, 2048, 8192)
FORMATS = {"bfloat16": 2, "float16": 2, "tf32": 4, "float32": 4, "float8_e4m3fn": 1}
"""Formats of products and the bytes of an operand's element."""
MOST_FLOPS = 3e11
"""Products in the slower formats stop here."""
ELEMENTS = (4096, 1 << 20, 1 << 24, 1 << 27)
WIDTH = 2048
"""Elements of a row, as wide as rows of language models."""
ATTENTION = ((1024, 64), (2048, 64), (2048, 128), (8192, 128))
"""Length and head size; all heads and sequences together have 2^17 positions."""
RING_BYTES = 2e8
"""Operands of several calls together: more than the caches hold."""
BUDGET_S = 0.05
ROUNDS = 5


@dataclass(frozen=True)
class Case:
    """A kernel as the cost model sees it, its shape for people, and how to set it up."""

    kernel: Kernel
    shape: tuple[int, ...]
    make: Callable[[], Call]


@dataclass(frozen=True)
class Row:
    """One kernel: what was measured and what the cost model says."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    measured_s: float
    predicted_s: float
    flops: float
    bytes: float

    @property
    def error_pct(self) -> float:
        """Raw error of the prediction."""
        return 100 * (self.predicted_s / self.measured_s - 1)


def device_s(calls: Sequence[Call]) -> float:
    """Median seconds of a call on the device, over batches of calls between two events."""
    turn = cycle(calls)
    for _ in range(len(calls) + 1):
        next(turn)()
    torch.cuda.synchronize()
    began_s = time.perf_counter()
    next(turn)()
    torch.cuda.synchronize()
    count = max(1, min(200, int(BUDGET_S / ROUNDS / (time.perf_counter() - began_s))))
    plug = torch.ones(8192, 8192, device="cuda")
    times = []
    for _ in range(ROUNDS):
        start, end = event(), event()
        # Calls wait on the device behind long kernels, so that the host's pace does not count.
        for _ in range(1 + count // 100):
            torch.mm(plug, plug)
        start.record()
        for _ in range(count):
            next(turn)()
        end.record()
        torch.cuda.synchronize()
        times.append(float(start.elapsed_time(end)) / 1e3 / count)
    return median(times)


def event() -> torch.cuda.Event:
    """A mark in the device's queue that knows when it was passed."""
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def host_s(call: Call, count: int = 300) -> float:
    """Median seconds the host needs to issue a call."""
    call()
    times = []
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        began_s = time.perf_counter()
        for _ in range(count):
            call()
        times.append((time.perf_counter() - began_s) / count)
    torch.cuda.synchronize()
    return median(times)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Noise on the device."""
    return torch.randn(shape, device="cuda", dtype=dtype)


def linear(dtype: str, rows: int, columns: int, inner: int) -> Call:
    """A linear layer without bias: rows x inner by inner x columns."""
    kind = {"tf32": torch.float32, "float8_e4m3fn": torch.bfloat16}.get(dtype) or getattr(torch, dtype)
    x, weight = normal(rows, inner, dtype=kind), normal(columns, inner, dtype=kind)
    if dtype != "float8_e4m3fn":
        return partial(aten.linear.default, x, weight)
    one = torch.ones((), device="cuda")
    a, b = x.to(torch.float8_e4m3fn), weight.to(torch.float8_e4m3fn).t()
    return partial(torch._scaled_mm, a, b, one, one, out_dtype=torch.bfloat16)


def products() -> Iterator[Case]:
    """Matrix products."""
    for (dtype, size), (inner, columns), rows in product(FORMATS.items(), SHAPES, ROWS):
        flops = 2.0 * rows * columns * inner
        if dtype in ("float32", "tf32") and flops > MOST_FLOPS:
            continue
        moved = float(size * (rows * inner + inner * columns)) + 2.0 * rows * columns
        kernel = Kernel("matmul", rows * columns, moved, flops, dtype, (1, rows, columns, inner))
        yield Case(kernel, (rows, columns, inner), partial(linear, dtype, rows, columns, inner))


PASSES = {
    "layer_norm_backward": 4.0, "cross_entropy": 3.0, "cross_entropy_backward": 4.0, "embedding": 2.0,
    "embedding_backward": 3.0, "dropout": 2.25,
}  # fmt: skip
"""How often the cost model says that a kernel passes over its elements; else 2 forward, 3 backward."""


def memory_bound() -> Iterator[Case]:
    """Every kernel that a calibration of a processor measures, on the device."""
    probes.WIDTH = WIDTH
    for (name, setup), n in product(KERNELS.items(), ELEMENTS):
        low = name.endswith("_bfloat16")
        curve, dtype = name.removesuffix("_bfloat16"), "bfloat16" if low else "float32"
        passes = PASSES.get(curve, 3.0 if curve.endswith("_backward") else 2.0)
        moved = n * BYTES_PER_ELEMENT.get(name, passes * (2 if low else 4))
        yield Case(Kernel(curve, n, float(moved), 0.0, dtype), (n,), partial(setup, n))


def attentions() -> Iterator[Case]:
    """Fused attention: forward, and backward alone; causal ones skip half of what is counted."""
    for (length, head), causal, backward in product(ATTENTION, (False, True), (False, True)):
        heads = (1 << 17) // length
        flops = 4.0 * heads * length * length * head * (2.5 if backward else 1.0)
        moved = 2.0 * heads * length * head * (8 if backward else 4)
        name = "attention_backward" if backward else "attention"
        shape = (length, head, causal)
        kernel = Kernel(name, heads * length * head, moved, flops, "bfloat16", attention=shape)
        make = partial(attention, heads, length, head, causal, backward)
        yield Case(kernel, (heads, length, head, int(causal)), make)


def attention(heads: int, length: int, head: int, causal: bool, backward: bool) -> Call:
    """Scaled dot-product attention over so many heads in one call."""
    torch.set_grad_enabled(backward)
    q, k, v = (normal(1, heads, length, head, dtype=torch.bfloat16) for _ in range(3))
    if not backward:
        return partial(scaled_dot_product_attention, q, k, v, is_causal=causal)
    every = [t.requires_grad_() for t in (q, k, v)]
    out = scaled_dot_product_attention(q, k, v, is_causal=causal)
    return partial(torch.autograd.grad, out, every, torch.ones_like(out), retain_graph=True)


GROUPS: dict[str, Callable[[], Iterator[Case]]] = {
    "products": products,
    "memory": memory_bound,
    "attention": attentions,
}


def rows_of(rates: CatalogueRates, groups: Sequence[str]) -> Iterator[Row]:
    """Every kernel of some groups, measured and predicted."""
    for group in groups:
        for case in GROUPS[group]():
            kernel = case.kernel
            torch.backends.cuda.matmul.allow_tf32 = kernel.dtype == "tf32"
            count = max(1, min(8, int(RING_BYTES / kernel.bytes)))
            try:
                spent_s = device_s([case.make() for _ in range(count)])
            except RuntimeError as error:
                print(f"{kernel.curve} {kernel.dtype} {case.shape}: {error}", file=sys.stderr)
                continue
            said_s = rates.device_seconds([kernel])
            yield Row(kernel.curve, kernel.dtype, case.shape, spent_s, said_s, kernel.flops, kernel.bytes)
            torch.cuda.empty_cache()


def host_times() -> dict[str, float]:
    """The host's seconds for one op of small tensors, and for one step of optimisers."""
    x, w, ones = normal(8, 64), normal(64, 64), torch.ones(64, device="cuda")
    taped = x.clone().requires_grad_()
    found = {
        "add_s": host_s(partial(aten.add.Tensor, x, x)),
        "linear_s": host_s(partial(aten.linear.default, x, w)),
        "layer_norm_s": host_s(partial(aten.layer_norm.default, x, [64], ones, ones)),
        "add_with_tape_s": host_s(partial(aten.add.Tensor, taped, x)),
        "view_s": host_s(partial(aten.view.default, x, [64, 8])),
        "synchronize_s": host_s(torch.cuda.synchronize, 100),
    }
    for count, (name, kind) in product((10, 200), optimizers().items()):
        found[f"{name}_{count}_tensors_s"] = host_s(kind(parameters(count, 64)).step, 20)
    return found


def optimizers() -> dict[str, Callable[..., torch.optim.Optimizer]]:
    """Optimisers with their defaults."""
    return {"adamw": partial(torch.optim.AdamW, lr=1e-3), "sgd": partial(torch.optim.SGD, lr=1e-3)}


def parameters(count: int, width: int) -> list[torch.nn.Parameter]:
    """Square parameters with gradients."""
    made = [torch.nn.Parameter(normal(width, width)) for _ in range(count)]
    for parameter in made:
        parameter.grad = torch.ones_like(parameter)
    return made


def steps(rates: CatalogueRates) -> list[dict[str, Any]]:
    """One step over 64 parameters of 4 million elements each, predicted and measured on the device."""
    rows = []
    for name, kind in optimizers().items():
        states = 2.0 if name == "adamw" else 0.0
        predicted_s = rates.optimizer_seconds(64 * 2048**2, 64, states)
        measured_s = device_s([kind(parameters(64, 2048)).step])
        rows.append({"name": name, "measured_s": measured_s, "predicted_s": predicted_s})
    return rows


def copies() -> list[dict[str, Any]]:
    """Copies between the device and pageable or pinned main memory."""
    rows = []
    for n in (1 << 12, 1 << 16, 1 << 20, 1 << 24, 1 << 28):
        there = torch.empty(n, dtype=torch.uint8, device="cuda")
        pageable = torch.ones(n, dtype=torch.uint8)
        pinned = torch.ones(n, dtype=torch.uint8, pin_memory=True)
        calls: dict[str, Call] = {
            "to fresh memory": there.cpu,
            "to pageable": partial(pageable.copy_, there),
            "to pinned": partial(pinned.copy_, there),
            "from pageable": partial(there.copy_, pageable),
            "from pinned": partial(there.copy_, pinned),
        }
        for name, call in calls.items():
            rows.append({"name": name, "bytes": n, "seconds": copy_s(call)})
    return rows


def copy_s(call: Call) -> float:
    """Median seconds of a copy, until it is over."""
    times = []
    for _ in range(1 + ROUNDS):
        began_s = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began_s)
    return median(times[1:])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("This benchmark measures a CUDA device, and there is none.")
    device = Cluster.from_dict({"devices": cuda_devices()[:1]}).devices[0]
    rates = CatalogueRates(device)
    with torch.device("cuda"), torch.no_grad():
        rows = list(rows_of(rates, arguments.groups))
    result = {
        "device": device.kind,
        "name": torch.cuda.get_device_name(0),
        "torch": torch.__version__,
        "date": datetime.now(UTC).date().isoformat(),
        "rows": [{**asdict(row), "error_pct": row.error_pct} for row in rows],
        "host": host_times(),
        "copies": copies(),
        "optimizers": steps(rates),
    }
    if arguments.json:
        print(json.dumps(result))
        return
    for row in rows:
        compute, traffic = (n / row.measured_s / 1e12 for n in (row.flops, row.bytes))
        print(
            f"{row.name:20} {row.dtype:14} {row.shape!s:24} {row.measured_s * 1e6:10.1f} us "
            f"{row.predicted_s * 1e6:10.1f} us {row.error_pct:+7.1f} % "
            f"{compute:7.1f} TFLOP/s {traffic:6.3f} TB/s"
        )
    print(f"median error {median(abs(row.error_pct) for row in rows):.1f} %")
    print(json.dumps({k: result[k] for k in ("host", "copies", "optimizers")}, indent=1))


if __name__ == "__main__":
    main()
