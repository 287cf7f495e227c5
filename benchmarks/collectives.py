"""Predict every measured collective of a table and compare: `benchmarks/collectives.py FILE.yaml --json`.

A row gives the collective, the GPU, ranks, nodes, message size, and a bus bandwidth or a time. Rows of
reliability C are left out.
"""

import argparse
import json
import math
import re
from dataclasses import asdict, dataclass, fields
from operator import attrgetter
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import published_devices
from published_clean import number, rows_of
from published_devices import device_of, link_of
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
    nodes_for,
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
    rows = rows_of(options.file)
    report = cross_validate(rows) if options.fit else compare(rows)
    if options.json:
        print(json.dumps(report, indent=1))
        return
    if options.fit:
        show_fits(report)
        return
    for name, summary in report["sets"].items():
        print(f"{name:<40} n {summary['n']:>4}  median {summary['median_ape_pct']:6.1f} %")
    print(f"all: median {report['median_ape_pct']:.1f} % of {report['n']} rows")


def compare(rows: list[Any]) -> dict[str, Any]:
    """Raw relative error of each scoreable row, and medians by source, GPU and collective."""
    scored: list[dict[str, Any]] = []
    skipped: list[dict[str, str]] = []
    for row in rows:
        result = score(row)
        if isinstance(result, str):
            given = row if isinstance(row, dict) else {}
            skipped.append({"id": str(given.get("id")), "why": result})
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


OPERATIONS: dict[str, CollectiveName] = {
    "allreduce": "all_reduce", "allgather": "all_gather", "reducescatter": "reduce_scatter",
    "alltoall": "all_to_all", "broadcast": "broadcast", "reduce": "broadcast", "send": "send",
    "sendrecv": "send", "sendreceive": "send", "p2p": "send",
}  # fmt: skip
"""Operations by their names without punctuation; a reduce moves what a broadcast does."""


def score(row: Any) -> dict[str, Any] | str:
    """One row's prediction and error, or why it cannot be scored."""
    found = sample(row)
    if isinstance(found, str):
        return found
    predicted_s = found.predicted_s(PROTOCOLS)
    return {
        "id": str(row.get("id")),
        "set": f"{row['gpu']} {found.name} n={found.group.ranks}",
        "size_bytes": found.num_bytes,
        "measured_s": found.seconds,
        "predicted_s": predicted_s,
        "error_pct": 100 * (predicted_s / found.seconds - 1),
    }


def sample(row: Any) -> Sample | str:
    """What a row measured, or why it cannot be scored."""
    if not isinstance(row, dict):
        return f"a row is fields with values, not {type(row).__name__}"
    if row.get("reliability") == "C":
        return "reliability C"
    name = OPERATIONS.get(re.sub(r"[^a-z0-9]", "", str(row.get("op")).lower()))
    if name is None:
        return "unknown operation"
    gpu = str(row.get("gpu") or "not stated")
    if gpu == "not stated":
        return "no device"
    ranks = whole(row.get("n_gpus"))
    if ranks is None or ranks < 2:
        return f"{row.get('n_gpus')!r} ranks: two or more are needed"
    size = LARGE_BYTES if row.get("size_bytes") is None else number(row["size_bytes"])
    if size is None or size <= 0:
        return f"a size of {row['size_bytes']!r} bytes"
    seconds = _measured_s(row, name, size, ranks)
    if seconds is None:
        return "no time or bandwidth"
    try:
        kind = device_of(SHORT_NAMES.get(gpu, gpu))[0]
    except ValueError as error:
        return str(error)
    group = group_of(row, ranks)
    if isinstance(group, str):
        return group
    return Sample(kind, name, size, group, str(row.get("algo") or ""), seconds)


def whole(value: Any) -> int | None:
    """A whole number, from text too; None of anything else.

    >>> whole("16"), whole(2.0), whole(7.5), whole(float("nan")), whole(True)
    (16, 2, None, None, None)
    """
    found = number(value)
    return int(found) if found is not None and found == int(found) else None


def samples(rows: list[Any]) -> list[Sample]:
    """Scoreable rows with what the model needs of them."""
    return [found for found in map(sample, rows) if isinstance(found, Sample)]


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


def cross_validate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The fit of all rows, and what fits say of GPU kinds, counts and sizes that they have not seen."""
    known = samples(rows)
    if not known:
        raise SystemExit("no row of the table can be scored; without --fit each one's reason is told")
    everything = fit(known)
    folds = []
    axes = (("device", attrgetter("device")), ("ranks", attrgetter("group.ranks")), ("size", decade))
    for kind, value_of in axes:
        for value in dict.fromkeys(value_of(s) for s in known):
            seen = [s for s in known if value_of(s) != value]
            left = [s for s in known if value_of(s) == value]
            error = median_error(left, fit(seen))
            folds.append({"kind": kind, "name": str(value), "n": len(left), "median_ape_pct": error})
    return {
        "n": len(known),
        "median_ape_pct": median_error(known, everything),
        "protocols": asdict(everything),
        "folds": folds,
    }


def decade(sample: Sample) -> str:
    """The power of ten that a sample's size begins with.

    >>> decade(Sample("a100-sxm-80gb", "all_reduce", 2**20, Group(8, "nvlink3"), "", 1e-4))
    '1e6 bytes'
    """
    return f"1e{math.floor(math.log10(sample.num_bytes))} bytes"


def show_fits(report: dict[str, Any]) -> None:
    """That as lines."""
    print(f"all rows fitted: median {report['median_ape_pct']:.1f} % of {report['n']} rows")
    for name, value in report["protocols"].items():
        print(f"{name} = {value:.4g}")
    for fold in report["folds"]:
        name = f"{fold['kind']} {fold['name']}"
        print(f"left out {name:<28} n {fold['n']:>3}  median {fold['median_ape_pct']:5.1f} %")


def median_error(rows: list[Sample], p: Protocols) -> float:
    """Median absolute error in per cent."""
    return 100 * median(abs(s.predicted_s(p) / s.seconds - 1) for s in rows)


def _measured_s(row: dict[str, Any], name: CollectiveName, size: float, ranks: int) -> float | None:
    for key in ("time_us", "time_us_derived"):
        if (microseconds := number(row.get(key))) and microseconds > 0:
            return microseconds * 1e-6
    for key, factor in (("busbw_GBps", bus_factor(name, ranks)), ("algbw_GBps", 1.0)):
        if (rate := number(row.get(key))) and rate > 0:
            return size * factor / (rate * 1e9)
    return None


def group_of(row: dict[str, Any], ranks: int) -> Group | str:
    """The group of ranks a row describes, or why there can be no such group."""
    gpu = SHORT_NAMES.get(str(row["gpu"]), str(row["gpu"]))
    kind = device_of(gpu)[0]
    intra = str(row.get("intra") or "").lower()
    nodes = _nodes(row, ranks, DEVICES_PER_NODE.get(kind, 8))
    if isinstance(nodes, str):
        return nodes
    patched = "p2p" in intra and re.search(r"\b(no|without|off|disabled)\b", intra) is None
    return Group(
        ranks=ranks,
        link=link_of(intra, kind),
        nodes=nodes,
        network=network_of(str(row.get("inter") or ""), kind, ranks // nodes) if nodes > 1 else None,
        peer_access=patched or catalogue.devices()[kind].peer_access,
    )


DEVICES_PER_NODE = {"gb200": 72, "gb300": 72, "v100-sxm3-32gb": 16}


def _nodes(row: dict[str, Any], ranks: int, per_node: int) -> int | str:
    """Over how many nodes a row's ranks are spread, or what is wrong with what it says of that.

    A row that says nothing lies in as few nodes as its devices usually come in.
    """
    given = row.get("nodes")
    if given is None:
        return nodes_for(ranks, per_node)
    nodes = whole(given)
    if nodes is None or not 1 <= nodes <= ranks or ranks % nodes:
        return f"{given!r} nodes for {ranks} ranks"
    return nodes


def network_of(text: str, kind: str, per_node: int) -> Network:
    """A node's network; of several cards only those that a row says were used."""
    used = re.search(r"(\d+) of (\d+)\s*x", text)
    words = text.replace(used[0], f"{used[1]}x") if used else text
    return published_devices.network_of(words, kind, per_node)


if __name__ == "__main__":
    main()
