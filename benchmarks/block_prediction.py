"""Predicted against measured time of GPT's forward and backward on one core of this machine.

`benchmarks/block_prediction.py [--json] [--quick]` uses the cached calibration, or measures one first.
Times are processor time of one thread (lower quartile of some calls), so that other work on the machine
disturbs them little; errors are raw.
"""

import argparse
import json
import time
from statistics import median
from typing import Any

import torch

from graphpar.calibration import Calibration
from graphpar.cluster import Cluster
from graphpar.cost import CostTable
from graphpar.cost_models.roofline import Roofline
from graphpar.cost_options import PricingOptions
from graphpar.examples.gpt import GPT, example_inputs
from graphpar.frontend.capture import capture
from graphpar.ir.chain import build_chain
from graphpar.local.measure import calibrate

SHAPES = tuple((width, length) for width in (128, 256, 512) for length in (64, 256))
MICROBATCHES = (1, 4, 16)
LAYERS = 3
CALLS = 12


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="leave out the largest shapes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    calibration = calibrate()
    rows = [
        compare(width, length, microbatch, calibration)
        for width, length in SHAPES
        for microbatch in MICROBATCHES
        if not options.quick or width * length * microbatch <= 600_000
    ]
    errors = [abs(row["error_pct"]) for row in rows]
    report = {"median_ape_pct": median(errors), "max_ape_pct": max(errors), "rows": rows}
    if options.json:
        print(json.dumps(report, indent=1))
        return
    for row in rows:
        print(
            f"width {row['width']:>4} length {row['length']:>4} microbatch {row['microbatch']:>3}  "
            f"measured {row['measured_s'] * 1e3:8.2f} ms  predicted {row['predicted_s'] * 1e3:8.2f} ms  "
            f"{row['error_pct']:+6.1f} %"
        )
    print(f"median {report['median_ape_pct']:.1f} %, largest {report['max_ape_pct']:.1f} %")


def compare(width: int, length: int, microbatch: int, calibration: Calibration) -> dict[str, Any]:
    """One shape: predicted and measured seconds of forward plus backward."""
    model = GPT(width=width, layers=LAYERS, heads=width // 32, length=length)
    graph = capture(model, example_inputs(2, length), {}).graph
    cluster = Cluster.from_dict({"devices": [{"kind": "cpu"}]})
    options = PricingOptions(batch=microbatch, training=True, max_microbatches=1)
    table = Roofline(calibration).price(graph, build_chain(graph), cluster, options)
    predicted_s = predicted(table, microbatch)
    measured_s = measured(model, example_inputs(microbatch, length))
    return {
        "width": width,
        "length": length,
        "microbatch": microbatch,
        "measured_s": measured_s,
        "predicted_s": predicted_s,
        "error_pct": 100 * (predicted_s / measured_s - 1),
    }


def predicted(table: CostTable, microbatch: int) -> float:
    """Forward and backward of all units."""
    return sum(
        table.forward_s(unit, 0, microbatch) + table.backward_s(unit, 0, microbatch)
        for unit in range(table.num_units)
    )


def measured(model: GPT, inputs: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Lower quartile of the processor time of forward and backward."""
    times = []
    for _ in range(CALLS):
        model.zero_grad(set_to_none=True)
        start = time.thread_time()
        model(*inputs).backward()
        times.append(time.thread_time() - start)
    return sorted(times)[CALLS // 4]


if __name__ == "__main__":
    main()
