"""Fit the constants of the training model: `benchmarks/fit_published.py FILE.yaml [--write]`.

Only the sets named in `FITTED` are used for the constants that are kept; the others are held out and
reported apart. With --leave-out every fitted set is also predicted by a fit that has not seen it. The
loss is the log of predicted over measured time, each set with the same weight, with a soft tail because
single rows can be wrong by a factor (a shared network, a full memory).
"""

import argparse
import math
from collections import defaultdict
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from published_rows import measured_step_s, run_of
from scipy.optimize import least_squares

from graphpar import catalogue
from graphpar.cost_models.training import Run, TrainingParameters, parameters, step_time

PLAIN = ("vtrain_single", "vtrain_multi", "mosaic_mpt", "torchtitan", "megatron_jan2021", "lambda_dl")
MODERN = ("megatron_bridge",)
FITTED = (*PLAIN, *MODERN)
"""Sets that the fit may see, in two steps: constants of dense models in eager frameworks first, then,
with those kept, the ones that only compiled, float8 and mixture-of-experts runs exercise."""

MODERN_NAMES = ("float8_share", "vendor_attention_share", "compiled_kernel_s", "expert_traffic")

BOUNDS = {
    "matmul_share": (0.6, 1.0),
    "matmul_half_rows": (1.0, 400.0),
    "float8_share": (0.3, 1.0),
    "attention_share": (0.3, 1.6),
    "vendor_attention_share": (0.5, 2.5),
    "traffic_share": (0.3, 1.1),
    "backward_traffic": (1.2, 2.2),
    "host_kernel_s": (5e-6, 60e-6),
    "compiled_kernel_s": (1e-6, 40e-6),
    "contention": (0.02, 0.5),
    "step_host_s": (1e-3, 5e-2),
    "imbalance": (5e-4, 0.012),
    "expert_traffic": (1.0, 12.0),
    "loss_passes": (4.0, 40.0),
    "unfused_traffic": (1.0, 4.0),
    "wait_s": (1e-6, 1e-4),
}
"""Limits that keep every constant what its name says."""

EXPECTED = {
    "matmul_share": 0.95,
    "matmul_half_rows": 32.0,
    "float8_share": 0.9,
    "attention_share": 0.7,
    "vendor_attention_share": 1.5,
    "traffic_share": 0.95,
    "backward_traffic": 2.0,
    "host_kernel_s": 20e-6,
    "compiled_kernel_s": 5e-6,
    "contention": 0.3,
    "step_host_s": 3e-3,
    "imbalance": 6e-3,
    "expert_traffic": 4.0,
    "loss_passes": 12.0,
    "unfused_traffic": 2.0,
    "wait_s": 1e-5,
}
"""What one would guess without a fit; a constant that the fitted sets do not exercise stays near it."""

PULL = 0.1
"""Weight of that guess: a factor of e costs as much as an error of 10 % in one whole set."""

Samples = dict[str, list[tuple[Run, float]]]


def main() -> None:
    """Fit, print, and with --write keep the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--leave-out", action="store_true")
    options = parser.parse_args()
    table = yaml.load(options.file.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)
    sets = samples(table["rows"])
    fitted = fit_all(sets, FITTED)
    for name, rows in sorted(sets.items()):
        show("fitted" if name in FITTED else "unseen", name, rows, fitted)
    if options.leave_out:
        for left in FITTED:
            others = tuple(name for name in FITTED if name != left)
            show("left out", left, sets[left], fit_all(sets, others))
    for f in fields(fitted):
        print(f"{f.name} = {getattr(fitted, f.name):.4g}")
    if options.write:
        write(fitted)


def show(mark: str, name: str, rows: list[tuple[Run, float]], p: TrainingParameters) -> None:
    """One line of errors."""
    errors = np.array([step_time(run, p).total_s / s - 1 for run, s in rows])
    print(
        f"{mark:<9} {name:<24} n {len(rows):>4}  mape {100 * np.abs(errors).mean():5.1f} %"
        f"  bias {100 * errors.mean():+5.1f} %"
    )


def samples(rows: list[dict[str, Any]]) -> Samples:
    """Runs with their measured step time, by set."""
    sets: Samples = defaultdict(list)
    for row in rows:
        run, seconds = run_of(row), measured_step_s(row)
        if isinstance(run, Run) and seconds is not None:
            sets[row["set"]].append((run, seconds))
    return dict(sets)


def fit_all(sets: Samples, names: tuple[str, ...]) -> TrainingParameters:
    """Both steps of the fit, of the sets among `names` that are at hand."""
    plain = [name for name in BOUNDS if name not in MODERN_NAMES]
    fitted = fit(parameters(), plain, {name: sets[name] for name in PLAIN if name in names})
    modern = {name: sets[name] for name in MODERN if name in names}
    return fit(fitted, list(MODERN_NAMES), modern) if modern else fitted


def fit(start: TrainingParameters, names: list[str], sets: Samples) -> TrainingParameters:
    """The values of the named constants that fit these sets best, all others kept."""
    low, high = (np.array([BOUNDS[n][i] for n in names]) for i in range(2))

    def unpack(x: np.ndarray) -> TrainingParameters:
        values = dict(zip(names, (low + x * (high - low)).tolist(), strict=True))
        return replace(start, **values)

    def residuals(x: np.ndarray) -> np.ndarray:
        p = unpack(x)
        errors = [
            math.log(step_time(run, p).total_s / seconds) / math.sqrt(len(rows))
            for rows in sets.values()
            for run, seconds in rows
        ]
        pulls = [PULL * math.log(max(getattr(p, n), 1e-9) / EXPECTED[n]) for n in names]
        return np.array(errors + pulls)

    first = (np.array([getattr(start, n) for n in names]) - low) / (high - low)
    found = least_squares(
        residuals, first.clip(0.02, 0.98), bounds=(0, 1), loss="soft_l1", f_scale=0.02, diff_step=1e-3
    )
    return unpack(found.x)


def write(p: TrainingParameters) -> None:
    """Keep the constants beside the catalogue."""
    path = catalogue.data_directory() / "training.toml"
    head = path.read_text(encoding="utf-8").split("[parameters]")[0]
    lines = [f"{f.name} = {getattr(p, f.name):.4g}" for f in fields(p)]
    path.write_text(head + "[parameters]\n" + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
