"""The catalogue's GPUs against kernels measured on one of them (`benchmarks/device_curves.py`)."""

import json
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from graphpar.cluster import Cluster
from graphpar.cost_models.rates import CatalogueRates
from graphpar.cost_models.work import Kernel

RUN = Path(__file__).parents[2] / "benchmarks" / "device_curves_runs" / "h200.json"
MEASURED: dict[str, Any] = json.loads(RUN.read_text(encoding="utf-8"))
DEVICE = Cluster.from_dict({"devices": [{"kind": MEASURED["device"]}]}).devices[0]
LAUNCH_BOUND = 1 << 20
"""Elements below which a kernel's time is its launch."""


def kernel(row: dict[str, Any]) -> Kernel:
    matrix = attention = None
    elements = float(row["shape"][0])
    if row["name"] == "matmul":
        rows, columns, inner = row["shape"]
        matrix, elements = (1, rows, columns, inner), float(rows * columns)
    if row["name"].startswith("attention"):
        heads, length, head, causal = row["shape"]
        attention, elements = (length, head, bool(causal)), float(heads * length * head)
    flops, moved = row["flops"] if matrix or attention else 0.0, row["bytes"]
    return Kernel(row["name"], elements, moved, flops, row["dtype"], matrix, attention)


def errors(kind: str) -> list[float]:
    """Relative errors of predictions of large kernels of a kind."""
    rates = CatalogueRates(DEVICE)
    found = []
    for row in MEASURED["rows"]:
        is_kind = kind == (
            "matmul"
            if row["name"] == "matmul"
            else "attention"
            if row["name"].startswith("attention")
            else "memory"
        )
        if is_kind and (kind != "memory" or row["shape"][0] > LAUNCH_BOUND):
            found.append(abs(rates.device_seconds([kernel(row)]) / row["measured_s"] - 1))
    return found


@pytest.mark.parametrize(
    ("kind", "typical", "most"), [("matmul", 0.10, 0.8), ("attention", 0.08, 0.15), ("memory", 0.10, 1.0)]
)
def test_kernels_of_a_measured_gpu(kind: str, typical: float, most: float) -> None:
    found = errors(kind)
    assert len(found) > 15
    assert median(found) <= typical
    assert max(found) <= most


def test_optimizers_of_a_measured_gpu() -> None:
    states = {"sgd": 0.0, "adamw": 2.0}
    for row in MEASURED["optimizers"]:
        if not row["fused"]:  # graphpar runs the optimiser it is given, with torch's defaults
            said = CatalogueRates(DEVICE).optimizer_seconds(row["elements"], 64, states[row["name"]])
            assert said == pytest.approx(row["measured_s"], rel=0.25)
