"""Check the memory model's constants on sets that they have not seen: `published_memory.py FILE.yaml`.

Peaks are counted result by result but for three constants: what a process takes beside tensors, what
each peer of a communicator takes, and what the allocator cannot use. Expected peaks are linear in them,
so that those of least relative error (each set with the same weight) follow from a linear programme: for
all sets with measured memory, and for all but one in turn.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from published_clean import cleaned, rows_of
from published_rows import measured_bytes, run_of
from scipy.optimize import linprog

from graphpar.cost_models import training_memory as memory
from graphpar.cost_models.training_run import Run

KEPT = (memory.CONTEXT_BYTES, memory.PEER_BYTES, memory.FRAGMENTATION - 1)
NAMES = ("context_bytes", "peer_bytes", "slack")
UNITS = (1e9, 1e9, 1.0)

Peaks = dict[str, list[tuple[Run, float]]]
"""Runs with the measured peak of their first rank, by set."""


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    report = left_out(peaks(rows_of(options.file)))
    if options.json:
        print(json.dumps(report, indent=1))
        return
    print(f"{'set':<16}{'n':>4}{'kept %':>9}{'fitted %':>9}{'left out %':>12}  constants without it")
    for line in report["sets"]:
        told = "  ".join(f"{name} {value:.3g}" for name, value in line["constants"].items())
        errors = f"{line['kept_pct']:>9.1f}{line['fitted_pct']:>9.1f}{line['left_out_pct']:>12.1f}"
        print(f"{line['set']:<16}{line['n']:>4}{errors}  {told}")
    print("of all sets: " + "  ".join(f"{name} {value:.3g}" for name, value in report["fitted"].items()))


def peaks(rows: list[Any]) -> Peaks:
    """Those of a table's rows that state a peak and can be predicted."""
    found: Peaks = defaultdict(list)
    for row in (cleaned(raw)[0] for raw in rows):
        run, measured = run_of(row), measured_bytes(row)
        if isinstance(run, Run) and measured is not None:
            found[row["set"]].append((run, measured))
    return dict(found)


def left_out(sets: Peaks) -> dict[str, Any]:
    """Errors by set of the kept constants, of the best for all sets, and of the best for all others."""
    if len(sets) < 2:
        raise SystemExit("one set with measured memory cannot be left out: at least two are needed")
    fitted = fit(sets)
    lines = []
    for name, rows in sets.items():
        others = fit({other: found for other, found in sets.items() if other != name})
        lines.append(
            {
                "set": name,
                "n": len(rows),
                "kept_pct": error_pct(rows, KEPT),
                "fitted_pct": error_pct(rows, fitted),
                "left_out_pct": error_pct(rows, others),
                "constants": dict(zip(NAMES, others, strict=True)),
            }
        )
    return {"sets": lines, "fitted": dict(zip(NAMES, fitted, strict=True))}


def terms(run: Run) -> tuple[float, tuple[float, float, float]]:
    """Bytes of the first rank's tensors, and by what each constant is multiplied."""
    tensors = memory.stage_parts(run, 0).tensors
    return tensors, (1.0, float(memory.peers(run)), tensors * memory.leaves_holes(run))


def error_pct(rows: list[tuple[Run, float]], constants: tuple[float, ...]) -> float:
    """Mean absolute error in per cent under some constants."""
    errors = []
    for run, measured in rows:
        tensors, factors = terms(run)
        predicted = tensors + sum(f * c for f, c in zip(factors, constants, strict=True))
        errors.append(abs(predicted / measured - 1))
    return 100 * sum(errors) / len(errors)


def fit(sets: Peaks) -> tuple[float, ...]:
    """The constants of least mean absolute relative error, no set weighing more than another."""
    factors, missing, weights = [], [], []
    for rows in sets.values():
        for run, measured in rows:
            tensors, own = terms(run)
            factors.append([f * unit / measured for f, unit in zip(own, UNITS, strict=True)])
            missing.append(1 - tensors / measured)
            weights.append(1 / len(rows))
    # One more variable for each row, no less than its error in either direction.
    a, b, own_error = np.array(factors), np.array(missing), np.eye(len(missing))
    found = linprog(
        np.concatenate([np.zeros(len(UNITS)), weights]),
        A_ub=np.block([[a, -own_error], [-a, -own_error]]),
        b_ub=np.concatenate([b, -b]),
    )
    return tuple(float(x * unit) for x, unit in zip(found.x, UNITS, strict=False))


if __name__ == "__main__":
    main()
