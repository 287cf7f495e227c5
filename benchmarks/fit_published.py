"""Fit the constants of the training model: `benchmarks/fit_published.py FILE.yaml [--write]`.

Only the sets named in `FITTED` are used for the constants that are kept; the others are held out and
reported apart. With --cross-validate fits are made that have not seen a set, a device, some models,
the largest models or the runs on most devices, and say what they make of those. With --only the constants
of eager frameworks see some sets alone, which tells how near the model's form comes to them. The loss is
the log of predicted over measured time, each set with the same weight, with a soft tail because single
rows can be wrong by a factor (a shared network, a full memory).
"""

import argparse
import json
import math
from collections import defaultdict
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from published_clean import cleaned, rows_of
from published_folds import Fold, Samples, folds
from published_rows import measured_step_s, run_of
from scipy.optimize import least_squares

from graphpar import catalogue
from graphpar.cost_models.training import step_time
from graphpar.cost_models.training_run import Run, TrainingParameters, parameters

PLAIN = ("vtrain_single", "vtrain_multi", "mosaic_mpt", "torchtitan", "megatron_jan2021", "lambda_dl")
MODERN = ("megatron_bridge", "dgxc_2505")
FITTED = (*PLAIN, *MODERN)
"""Sets that the fit may see, in two steps: constants of dense models in eager frameworks first, then,
with those kept, the ones that only compiled, float8 and mixture-of-experts runs exercise."""

MODERN_NAMES = ("vendor_attention_share", "compiled_kernel_s", "expert_traffic")

BOUNDS = {
    "attention_share": (0.3, 1.6),
    "vendor_attention_share": (0.5, 2.5),
    "backward_traffic": (1.2, 2.5),
    "host_kernel_s": (5e-6, 60e-6),
    "compiled_kernel_s": (1e-6, 40e-6),
    "step_host_s": (1e-3, 5e-2),
    "imbalance": (5e-4, 0.012),
    "expert_traffic": (1.0, 12.0),
    "unfused_traffic": (1.0, 5.0),
    "wait_s": (1e-6, 3e-4),
    "start_s": (1e-5, 5e-4),
    "sustained_share": (0.8, 1.1),
}
"""Limits that keep every constant what its name says."""

EXPECTED = {
    "attention_share": 0.7,
    "vendor_attention_share": 1.5,
    "backward_traffic": 2.0,
    "host_kernel_s": 30e-6,
    "compiled_kernel_s": 5e-6,
    "step_host_s": 3e-3,
    "imbalance": 6e-3,
    "expert_traffic": 4.0,
    "unfused_traffic": 2.0,
    "wait_s": 5e-5,
    "start_s": 1e-4,
    "sustained_share": 1.0,
}
"""What one would guess without a fit; a constant that the fitted sets do not exercise stays near it."""

PULL = 0.03
"""Weight of that guess: a factor of e costs as much as an error of 3 % in one whole set."""

THIN = 45
"""Rows of a set, about, that fits of the cross-validation see."""

SOFT = 0.05
"""Error beyond which a row counts in proportion to its error, no longer to its square."""


def main() -> None:
    """Fit, print, and with --write keep the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--write", action="store_true", help="Keep the constants in training.toml.")
    parser.add_argument("--cross-validate", action="store_true", help="Leave runs out of fits, too.")
    parser.add_argument("--only", nargs="+", metavar="SET", help="Fit to these sets alone.")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = rows_of(options.file)
    sets = samples(rows)
    if unknown := set(options.only or ()) - set(sets):
        parser.error(f"no set {', '.join(sorted(unknown))}; there are {', '.join(sorted(sets))}")
    if options.only and (options.write or options.cross_validate):
        parser.error("--only tells how near one source can be met; nothing is kept or left out then")
    fitted = fit_only(sets, options.only) if options.only else fit_all(sets)
    seen = options.only or FITTED
    report: dict[str, Any] = {
        "parameters": {f.name: getattr(fitted, f.name) for f in fields(fitted)},
        "sets": [summary(name, rows, fitted, name in seen) for name, rows in sorted(sets.items())],
    }
    if options.cross_validate:
        report["folds"] = cross_validate(sets, fitted)
    if options.write:
        write(fitted)
    if options.json:
        print(json.dumps(report, indent=1))
        return
    show(report)


def show(report: dict[str, Any]) -> None:
    """The report as lines."""
    for s in report["sets"]:
        mark = "fitted" if s["fitted"] else "unseen"
        print(f"{mark:<8} {s['set']:<24} n {s['n']:>4}  {s['mape_pct']:5.1f} %  {s['bias_pct']:+6.1f} %")
    for fold in report.get("folds", ()):
        name = f"{fold['kind']}: {fold['name']}"
        print(
            f"left out {name:<30} {fold['set']:<18} n {fold['n']:>4}  {fold['mape_pct']:5.1f} %"
            f"  {fold['bias_pct']:+6.1f} %  (seen {fold['seen_mape_pct']:.1f} %)"
        )
    for name, value in report["parameters"].items():
        print(f"{name} = {value:.4g}")


def summary(
    name: str, rows: list[tuple[Run, float]], p: TrainingParameters, seen: bool
) -> dict[str, Any]:
    """Errors of one set."""
    return {"set": name, "fitted": seen, "n": len(rows), **errors(rows, p)}


def errors(rows: list[tuple[Run, float]], p: TrainingParameters) -> dict[str, float]:
    """Mean absolute error and bias in per cent."""
    found = [100 * (step_time(run, p).total_s / seconds - 1) for run, seconds in rows]
    return {"mape_pct": float(np.abs(found).mean()), "bias_pct": float(np.mean(found))}


def cross_validate(sets: Samples, fitted: TrainingParameters) -> list[dict[str, Any]]:
    """Errors of every fold's left-out runs, by set, beside the errors of the fit that saw them."""
    known = {name: rows for name, rows in sets.items() if name in FITTED}
    return [line for fold in folds(known) for line in validate(fold, known, fitted)]


def validate(fold: Fold, sets: Samples, fitted: TrainingParameters) -> list[dict[str, Any]]:
    """One fold's errors, by set."""
    seen, left = fold.split(sets)
    p = fit_all({name: thinned(rows) for name, rows in seen.items()})
    return [
        {
            "kind": fold.kind,
            "name": fold.name,
            "set": name,
            "n": len(rows),
            **errors(rows, p),
            "seen_mape_pct": errors(rows, fitted)["mape_pct"],
        }
        for name, rows in left.items()
    ]


def thinned(rows: list[tuple[Run, float]]) -> list[tuple[Run, float]]:
    """Evenly spaced rows, so that many fits stay affordable."""
    return rows[:: max(len(rows) // THIN, 1)]


def samples(rows: list[Any]) -> Samples:
    """Runs with their measured step time, by set."""
    sets: Samples = defaultdict(list)
    for row in (cleaned(raw)[0] for raw in rows):
        run = run_of(row)
        if isinstance(run, Run) and (seconds := measured_step_s(row)) is not None:
            sets[row["set"]].append((run, seconds))
    return dict(sets)


def fit_all(sets: Samples) -> TrainingParameters:
    """Both steps of the fit, of those sets at hand that it may see."""
    fitted = fit_only(sets, [name for name in PLAIN if name in sets])
    modern = {name: sets[name] for name in MODERN if name in sets}
    return fit(fitted, list(MODERN_NAMES), modern) if modern else fitted


def fit_only(sets: Samples, names: list[str]) -> TrainingParameters:
    """What the first step finds when it sees these sets and no others."""
    plain = [name for name in BOUNDS if name not in MODERN_NAMES]
    return fit(replace(parameters(), **EXPECTED), plain, {name: sets[name] for name in names})


def fit(start: TrainingParameters, names: list[str], sets: Samples) -> TrainingParameters:
    """The values of the named constants that fit these sets best, all others kept."""
    low, high = (np.array([BOUNDS[n][i] for n in names]) for i in range(2))

    def unpack(x: np.ndarray) -> TrainingParameters:
        values = dict(zip(names, (low + x * (high - low)).tolist(), strict=True))
        return replace(start, **values)

    def residuals(x: np.ndarray) -> np.ndarray:
        p = unpack(x)
        found = []
        for rows in sets.values():
            errors = np.array([math.log(step_time(run, p).total_s / seconds) for run, seconds in rows])
            found.append(softened(errors) / math.sqrt(len(rows)))
        found.append(np.array([PULL * math.log(getattr(p, n) / EXPECTED[n]) for n in names]))
        return np.concatenate(found)

    first = (np.array([getattr(start, n) for n in names]) - low) / (high - low)
    found = least_squares(residuals, first.clip(0.02, 0.98), bounds=(0, 1), diff_step=1e-3)
    return unpack(found.x)


def softened(errors: np.ndarray) -> np.ndarray:
    """Residuals whose squares grow like the error itself beyond `SOFT`, as those of soft L1 do."""
    size = SOFT * np.sqrt(2 * (np.sqrt(1 + (errors / SOFT) ** 2) - 1))
    signed: np.ndarray = np.copysign(size, errors)
    return signed


def write(p: TrainingParameters) -> None:
    """Keep the constants beside the catalogue."""
    path = catalogue.data_directory() / "training.toml"
    head = path.read_text(encoding="utf-8").split("[parameters]")[0]
    lines = [f"{f.name} = {getattr(p, f.name):.4g}" for f in fields(p)]
    path.write_text(head + "[parameters]\n" + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
