"""Predict published training runs and compare: `benchmarks/published.py FILE.yaml --json`.

Rows of reliability C, and rows that lack a model shape, a batch or a measured time, are listed as
skipped with the reason. Errors are raw: predicted over measured minus one, nothing shifted or scaled.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from published_clean import cleaned, rows_of
from published_devices import device_of
from published_rows import assumed, in_favour, measured_bytes, measured_step_s, refuted, run_of

from graphpar.cost_models.training import StepTime, step_time
from graphpar.cost_models.training_memory import bound_bytes, filled, stage_parts
from graphpar.cost_models.training_run import parameters

ENOUGH = 5
"""Configurations of one job that a rank correlation needs to mean anything."""


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = rows_of(options.file)
    report = compare(rows)
    if options.json:
        print(json.dumps(report, indent=1))
        return
    columns = {
        "mape_pct": "mape %",
        "bias_pct": "bias %",
        "spearman": "spearman",
        "spearman_within_jobs": "within jobs",
        "memory_mape_pct": "memory mape %",
        "memory_bound_held_pct": "within bound %",
    }
    print(f"{'set':<24}{'n':>5}" + "".join(f"{title:>15}" for title in columns.values()))
    for name, s in report["sets"].items():
        cells = ("-" if s[key] is None else f"{s[key]:.2f}" for key in columns)
        print(f"{name:<24}{s['n']:>5}" + "".join(f"{cell:>15}" for cell in cells))
    called = {k: round(v, 1) if isinstance(v, float) else v for k, v in report["out_of_memory"].items()}
    print(f"out of memory: {called}; skipped: {len(report['skipped'])}")


def compare(rows: list[Any]) -> dict[str, Any]:
    """All rows with their errors, and summaries by set."""
    scored, skipped = [], []
    for row in rows:
        result = score(row)
        if isinstance(result, str):
            given = row if isinstance(row, dict) else {}
            skipped.append({"id": str(given.get("id")), "set": str(given.get("set")), "why": result})
        else:
            scored.append(result)
    names = dict.fromkeys(r["set"] for r in scored)
    return {
        "sets": {name: summary([r for r in scored if r["set"] == name]) for name in names},
        "out_of_memory": out_of_memory(scored),
        "rows": scored,
        "skipped": skipped,
    }


def score(raw: Any) -> dict[str, Any] | str:
    """One row's prediction and errors, or why it cannot be scored."""
    if not isinstance(raw, dict):
        return f"a row is fields with values, not {type(raw).__name__}"
    row, remarks = cleaned(raw)
    run = run_of(row)
    if isinstance(run, str):
        return run
    measured_s, measured_b = measured_step_s(row), measured_bytes(row)
    failed = bool(row["measured"].get("oom"))
    if measured_s is None and measured_b is None and not failed:
        return "no measured time, rate or memory"
    predicted = step_time(run, parameters())
    predicted_b = stage_parts(run, 0).total  # tools report the first rank's memory
    filled_share = filled(in_favour(run, row))
    return {
        "id": row["id"],
        "set": row["set"],
        "job": f"{row['model'].get('name')} s{run.shape.seq_len} n{run.devices} b{run.batch:g}",
        "measured_s": measured_s,
        "predicted_s": predicted.total_s,
        "error_pct": None if measured_s is None else 100 * (predicted.total_s / measured_s - 1),
        "parts_s": parts(predicted),
        "measured_bytes": measured_b,
        "predicted_bytes": predicted_b,
        "bound_bytes": bound_bytes(run, 0),
        "memory_error_pct": None if measured_b is None else 100 * (predicted_b / measured_b - 1),
        "measured_oom": failed,
        "predicted_oom": filled_share > 1,
        "filled_pct": 100 * filled_share,
        "remarks": [
            *remarks,
            *filter(None, [device_of(str(row["hardware"]["gpu"]))[2], refuted(row)]),
            *assumed(row, run),
        ],
    }


def parts(step: StepTime) -> dict[str, float]:
    """The parts of a predicted step."""
    return {name: value for name, value in vars(step).items() if name != "total_s"}


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean absolute error, bias and rank correlation of the step times of one set."""
    timed = [r for r in rows if r["error_pct"] is not None]
    sized = [abs(r["memory_error_pct"]) for r in rows if r["memory_error_pct"] is not None]
    errors = [r["error_pct"] for r in timed]
    pairs = [(r["predicted_s"], r["measured_s"]) for r in timed]
    return {
        "n": len(rows),
        "mape_pct": mean([abs(e) for e in errors]),
        "bias_pct": mean(errors),
        "spearman": spearman(pairs),
        "spearman_within_jobs": within_jobs(timed),
        "memory_mape_pct": mean(sized),
        "memory_bound_held_pct": bound_held_pct(rows),
    }


def bound_held_pct(rows: list[dict[str, Any]]) -> float | None:
    """Per cent of the rows with measured memory that stayed within the predicted bound."""
    sized = [r for r in rows if r["measured_bytes"] is not None]
    return mean([100.0 * (r["measured_bytes"] <= r["bound_bytes"]) for r in sized])


def within_jobs(rows: list[dict[str, Any]]) -> float | None:
    """Mean rank correlation of configurations of one model, batch and number of devices."""
    jobs: dict[str, list[tuple[float, float]]] = {}
    for r in rows:
        jobs.setdefault(r["job"], []).append((r["predicted_s"], r["measured_s"]))
    found = [(spearman(pairs), len(pairs)) for pairs in jobs.values() if len(pairs) >= ENOUGH]
    ranked = [(value, n) for value, n in found if value is not None]
    total = sum(n for _, n in ranked)
    return sum(value * n for value, n in ranked) / total if total else None


def mean(values: list[float]) -> float | None:
    """The mean, None of nothing."""
    return sum(values) / len(values) if values else None


def spearman(pairs: list[tuple[float, float]]) -> float | None:
    """Rank correlation, ties sharing their mean rank; None of fewer than three pairs."""
    if len(pairs) < 3:
        return None
    a, b = ranks([p for p, _ in pairs]), ranks([m for _, m in pairs])
    middle = (len(pairs) - 1) / 2
    top = sum((x - middle) * (y - middle) for x, y in zip(a, b, strict=True))
    spread = [sum((x - middle) ** 2 for x in r) for r in (a, b)]
    return float(top / (spread[0] * spread[1]) ** 0.5) if all(spread) else None


def ranks(values: list[float]) -> list[float]:
    """Ranks from zero; equal values share the mean of theirs."""
    order = sorted(range(len(values)), key=values.__getitem__)
    result = [0.0] * len(values)
    start = 0
    for end in range(1, len(order) + 1):
        if end == len(order) or values[order[end]] != values[order[start]]:
            for place in order[start:end]:
                result[place] = (start + end - 1) / 2
            start = end
    return result


def out_of_memory(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How often running out of memory was called right, missed, and called wrongly, and how narrowly."""
    failed, went = ([r["filled_pct"] for r in rows if r["measured_oom"] is oom] for oom in (True, False))
    return {
        "called_right": sum(r["measured_oom"] and r["predicted_oom"] for r in rows),
        "missed": sum(r["measured_oom"] and not r["predicted_oom"] for r in rows),
        "called_wrongly": sum(not r["measured_oom"] and r["predicted_oom"] for r in rows),
        "fullest_that_went_pct": max(went, default=None),
        "emptiest_that_failed_pct": min(failed, default=None),
    }


if __name__ == "__main__":
    main()
