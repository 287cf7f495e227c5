"""Products in 8 bits on this machine's GPU: time and error beside bfloat16 and float32.

    python benchmarks/float8.py --json

For every shape a layer of that many rows and widths is run forward and backward in bfloat16 and in 8
bits (rounding included; weights are rounded once, as in a step of many microbatches), taking turns; times
are medians over rounds. `products_s` is what the three products alone take in 8 bits, `rounding_s` what
making the 8-bit operands takes. Errors are relative to float32, of result and gradients, in the
Euclidean norm.
"""

import argparse
import json
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import nn

from graphpar.runtime.casts import LowerWeights
from graphpar.runtime.eight_bits import (
    BACKWARD,
    FORWARD,
    EightBitProduct,
    EightBitWeights,
    has_units,
    multiplied,
    scaled,
)

SHAPES = [(8192, 4096, 4096), (8192, 4096, 14336), (8192, 14336, 4096), (2048, 1024, 4096)]


def seconds(call: Callable[[], object], repeats: int) -> float:
    """Of one call, the queue of the GPU emptied before and after."""
    torch.cuda.synchronize()
    began_s = time.perf_counter()
    for _ in range(repeats):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - began_s) / repeats


def error(got: torch.Tensor | None, wanted: torch.Tensor) -> float:
    """Relative, in the Euclidean norm."""
    assert got is not None
    return float((got.float() - wanted).norm() / wanted.norm())


def measured(rows: int, inner: int, columns: int, rounds: int, repeats: int) -> dict[str, Any]:
    """One shape."""
    torch.manual_seed(0)
    x, weight, gradient = (
        torch.randn(*shape, device="cuda") for shape in ((rows, inner), (columns, inner), (rows, columns))
    )
    lower = LowerWeights()
    product = EightBitProduct(EightBitWeights(lower), is_linear=True)
    kept = lower.cast(weight, torch.bfloat16).detach().requires_grad_()
    narrow, back = x.bfloat16().requires_grad_(), gradient.bfloat16()

    def plain() -> torch.Tensor:
        result = nn.functional.linear(narrow, kept)
        torch.autograd.backward(result, back)
        return result.detach()

    def eight() -> torch.Tensor:
        result: torch.Tensor = product(narrow, kept)
        torch.autograd.backward(result, back)
        return result.detach()

    a, b, g = scaled(narrow.detach(), FORWARD), scaled(kept.detach(), FORWARD), scaled(back, BACKWARD)
    at, bt, gt = a.turned(), b.turned(), g.turned()

    def products() -> None:
        multiplied(a, b, torch.bfloat16, by_units=True)
        multiplied(g, bt, torch.bfloat16, by_units=True)
        multiplied(gt, at, torch.bfloat16, by_units=True)

    def rounding() -> None:
        scaled(narrow.detach(), FORWARD).turned()
        scaled(back, BACKWARD).turned()

    calls = {"bfloat16": plain, "float8": eight, "products": products, "rounding": rounding}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            took_s = seconds(call, repeats)
            if number:
                times[name].append(took_s)
    wanted = [nn.functional.linear(x, weight), gradient @ weight, gradient.t() @ x]
    errors: dict[str, list[float]] = {}
    for name, call in (("bfloat16", plain), ("float8", eight)):
        narrow.grad = kept.grad = None
        result = call()
        errors[name] = [
            error(t, w) for t, w in zip((result, narrow.grad, kept.grad), wanted, strict=True)
        ]
    flops = 6.0 * rows * inner * columns
    taken = {f"{name}_s": median(each) for name, each in times.items()}
    return {
        "rows": rows, "inner": inner, "columns": columns, **taken,
        "speed_up": median(a / b for a, b in zip(times["bfloat16"], times["float8"], strict=True)),
        "products_flops_per_s": flops / taken["products_s"],
        "bfloat16_flops_per_s": flops / taken["bfloat16_s"],
        "errors": errors,
    }  # fmt: skip


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    given = parser.parse_args()
    if not torch.cuda.is_available() or not has_units(torch.device("cuda:0")):
        raise SystemExit("no CUDA device with 8-bit units (compute capability 8.9) here")
    # float32 as the reference, not TensorFloat-32.
    torch.set_float32_matmul_precision("highest")
    rows = [measured(*shape, given.rounds, given.repeats) for shape in SHAPES]
    result = {"device": torch.cuda.get_device_name(0), "torch": torch.__version__, "shapes": rows}
    if given.json:
        print(json.dumps(result, indent=2))
        return
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
