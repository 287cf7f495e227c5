"""Predict every measured collective of a table and compare: `benchmarks/collectives.py FILE.yaml --json`.

A row gives the collective, the GPU, ranks, nodes, message size, and a bus bandwidth or a time. Rows of
reliability C are left out.
"""

import argparse
import json
import math
import re
from dataclasses import dataclass, fields
from operator import attrgetter
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import yaml
from published_devices import device_of
from scipy.optimize import least_squares

from graphpar import catalogue
from graphpar.cost_models.communication import (
    PROTOCOLS,
    CollectiveName,
    Group,
    Network,
    Protocols,
    bus_factor,
    collective_s,
)

LARGE_BYTES = 8 << 30
"""Size assumed where a row states only the best bandwidth."""

SHORT_NAMES = {
    "A100-SXM": "a100-sxm-80gb",
    "A100": "a100-sxm-80gb",
    "A100-PCIe": "a100-pcie-80gb",
    "V100-SXM2": "v100-sxm2-32gb",
    "V100": "v100-sxm2-32gb",
    "H100-SXM": "h100-sxm-80gb",
    "H100": "h100-sxm-80gb",
    "H100-PCIe": "h100-pcie-80gb",
    "H200": "h200-sxm-141gb",
    "B200": "b200-sxm",
}


@dataclass(frozen=True)
class Sample:
    """One measured collective."""

    device: str
    name: CollectiveName
    num_bytes: float
    group: Group
    algo: str
    seconds: float

    def predicted_s(self, p: Protocols) -> float:
        """What the model says under some constants."""
        return collective_s(self.name, self.num_bytes, self.group, self.algo, p)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--fit", action="store_true", help="Fit the protocols' constants, and leave out.")
    options = parser.parse_args()
    table = yaml.load(options.file.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)
    if options.fit:
        report_fits(table["rows"])
        return
    report = compare(table["rows"])
    if options.json:
        print(json.dumps(report, indent=1))
        return
    for name, summary in report["sets"].items():
        print(f"{name:<40} n {summary['n']:>4}  median {summary['median_ape_pct']:6.1f} %")
    print(f"all: median {report['median_ape_pct']:.1f} % of {report['n']} rows")


def compare(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Raw relative error of each scoreable row, and medians by source, GPU and collective."""
    scored: list[dict[str, Any]] = []
    skipped: list[dict[str, str]] = []
    for row in rows:
        result = score(row)
        if isinstance(result, str):
            skipped.append({"id": row["id"], "why": result})
        else:
            scored.append(result)
    sets: dict[str, list[float]] = {}
    for result in scored:
        sets.setdefault(result["set"], []).append(abs(result["error_pct"]))
    return {
        "n": len(scored),
        "median_ape_pct": median(abs(r["error_pct"]) for r in scored) if scored else None,
        "sets": {k: {"n": len(v), "median_ape_pct": median(v)} for k, v in sets.items()},
        "rows": scored,
        "skipped": skipped,
    }


def score(row: dict[str, Any]) -> dict[str, Any] | str:
    """One row's prediction and error, or why it cannot be scored."""
    if row.get("reliability") == "C":
        return "reliability C"
    name: CollectiveName = row["op"].replace("-", "_")
    size = row.get("size_bytes") or LARGE_BYTES
    ranks = row["n_gpus"]
    measured_s = _measured_s(row, name, size, ranks)
    if measured_s is None:
        return "no time or bandwidth"
    if str(row.get("gpu") or "not stated") == "not stated":
        return "no device"
    group = group_of(row)
    predicted_s = collective_s(name, size, group, str(row.get("algo") or ""))
    return {
        "id": row["id"],
        "set": f"{row['gpu']} {name} n={ranks}",
        "size_bytes": size,
        "measured_s": measured_s,
        "predicted_s": predicted_s,
        "error_pct": 100 * (predicted_s / measured_s - 1),
    }


def samples(rows: list[dict[str, Any]]) -> list[Sample]:
    """Scoreable rows with what the model needs of them."""
    found = []
    for row in rows:
        if isinstance(score(row), str):
            continue
        name: CollectiveName = row["op"].replace("-", "_")
        size = row.get("size_bytes") or LARGE_BYTES
        seconds = _measured_s(row, name, size, row["n_gpus"])
        assert seconds is not None
        gpu = SHORT_NAMES.get(row["gpu"], row["gpu"])
        kind = device_of(gpu)[0]
        found.append(Sample(kind, name, size, group_of(row), str(row.get("algo") or ""), seconds))
    return found


def fit(rows: list[Sample]) -> Protocols:
    """The constants with the least error, in a loss that single rows cannot dominate."""
    start = np.array([getattr(PROTOCOLS, f.name) for f in fields(Protocols)])

    def residuals(x: np.ndarray) -> np.ndarray:
        p = Protocols(*(start * np.exp(x)).tolist())
        errors = [math.log(s.predicted_s(p) / s.seconds) for s in rows]
        # A constant that no row exercises stays where it was.
        return np.array([*errors, *(0.3 * x)])

    found = least_squares(
        residuals, np.zeros(len(start)), loss="soft_l1", f_scale=0.05, bounds=(-1.5, 1.5)
    )
    return Protocols(*(start * np.exp(found.x)).tolist())


def report_fits(rows: list[dict[str, Any]]) -> None:
    """The fit of all rows, and what fits say of the GPU kinds and counts that they have not seen."""
    known = samples(rows)
    everything = fit(known)
    print(f"all rows fitted: median {median_error(known, everything):.1f} % of {len(known)} rows")
    print(everything)
    for path in ("device", "group.ranks"):
        value_of = attrgetter(path)
        for value in dict.fromkeys(value_of(s) for s in known):
            seen = [s for s in known if value_of(s) != value]
            left = [s for s in known if value_of(s) == value]
            error = median_error(left, fit(seen))
            print(f"left out {path} {value!s:<20} n {len(left):>3}  median {error:5.1f} %")


def median_error(rows: list[Sample], p: Protocols) -> float:
    """Median absolute error in per cent."""
    return 100 * median(abs(s.predicted_s(p) / s.seconds - 1) for s in rows)


def _measured_s(row: dict[str, Any], name: CollectiveName, size: float, ranks: int) -> float | None:
    for key in ("time_us", "time_us_derived"):
        if row.get(key):
            return float(row[key]) * 1e-6
    if row.get("busbw_GBps"):
        return size * bus_factor(name, ranks) / (float(row["busbw_GBps"]) * 1e9)
    return None


def group_of(row: dict[str, Any]) -> Group:
    """The group of ranks a row describes."""
    gpu = SHORT_NAMES.get(row["gpu"], row["gpu"])
    device = catalogue.devices()[device_of(gpu)[0]]
    intra = str(row.get("intra") or "").lower()
    link = device.link
    if "pcie" in intra:
        link = next((k for k in ("pcie3", "pcie4", "pcie5") if k[-1] in intra), "pcie4")
    elif device.link.endswith("-bridge") and "bridge" not in intra and row["n_gpus"] > 2:
        link = "pcie4"
    patched = "p2p" in intra
    # GeForce cards since Turing reach each other's memory over NVLink only.
    gaming = re.match(r"(NVIDIA )?(GEFORCE )?(RTX)?[ -]?[2-5]0[5-9]0", gpu.upper()) is not None
    nodes = row.get("nodes") or 1
    return Group(
        ranks=row["n_gpus"],
        link=link,
        nodes=nodes,
        network=network_of(str(row.get("inter") or "")) if nodes > 1 else None,
        peer_access=patched or not gaming,
    )


def network_of(text: str) -> Network:
    """A node's network from words such as "8x200Gb/s HDR IB per node" or "400Gb/s RDMA per GPU"."""
    match = re.search(r"(?:(\d+)\s*x\s*)?(?:.*?)(\d+)\s*Gb", text)
    if match is None:
        return Network(400e9)  # eight ports of 400 Gbit/s, the usual build of recent GPU nodes
    cards = int(match.group(1) or 1)
    if "per GPU" in text:
        cards = 8
    if re.search(r"1 of \d", text):
        cards = 1
    return Network(cards * int(match.group(2)) * 1e9 / 8)


if __name__ == "__main__":
    main()
