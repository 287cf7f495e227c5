"""The catalogue's GPUs against kernels measured on two of them (`benchmarks/device_curves.py`).

Rates that are not published were fitted to the H200's run; the H100's was measured afterwards.
"""

import json
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from graphpar.cluster import Cluster
from graphpar.cost_models.rates import CatalogueRates
from graphpar.cost_models.work import Kernel

RUNS = Path(__file__).parents[2] / "benchmarks" / "device_curves_runs"
LAUNCH_BOUND = 1 << 20
"""Elements below which a kernel's time is its launch."""


def run(card: str) -> tuple[dict[str, Any], CatalogueRates]:
    measured: dict[str, Any] = json.loads((RUNS / f"{card}.json").read_text(encoding="utf-8"))
    return measured, CatalogueRates(
        Cluster.from_dict({"devices": [{"kind": measured["device"]}]}).devices[0]
    )


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


def errors(card: str, kind: str) -> list[float]:
    """Relative errors of predictions of large kernels of a kind."""
    measured, rates = run(card)
    found = []
    for row in measured["rows"]:
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


@pytest.mark.parametrize("card", ["h200", "h100"])
@pytest.mark.parametrize(
    ("kind", "typical", "most"), [("matmul", 0.10, 0.8), ("attention", 0.08, 0.15), ("memory", 0.10, 1.0)]
)
def test_kernels_of_measured_gpus(kind: str, typical: float, most: float, card: str) -> None:
    found = errors(card, kind)
    assert len(found) > 15
    assert median(found) <= typical
    assert max(found) <= most


@pytest.mark.parametrize("card", ["h200", "h100"])
def test_optimizers_of_measured_gpus(card: str) -> None:
    states = {"sgd": 0.0, "adamw": 2.0}
    measured, rates = run(card)
    for row in measured["optimizers"]:
        if not row["fused"]:  # graphpar runs the optimiser it is given, with torch's defaults
            said = rates.optimizer_seconds(row["elements"], 64, states[row["name"]])
            assert said == pytest.approx(row["measured_s"], rel=0.25)
