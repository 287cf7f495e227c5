"""How good can a rank correlation get? `benchmarks/published_noise.py FILE.yaml --json`.

Some configurations were measured more than once. How far those repetitions differ is the noise of the
measurements, and a prediction without any error would still meet the order of such measurements only in
part: the printed ceiling is the mean rank correlation of each job's measured times with themselves under
that noise. Beside it stands what the predictions reach. Repetitions that agree to the last digit are
copies and do not count.
"""

import argparse
import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from published import ENOUGH, spearman
from published_clean import cleaned, rows_of
from published_rows import measured_step_s, run_of

from graphpar.cost_models.training import step_time
from graphpar.cost_models.training_run import Run, parameters

DRAWS = 200
Times = dict[str, list[float]]


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    report = noise(rows_of(options.file))
    if options.json:
        print(json.dumps(report, indent=1))
        return
    for name, found in report["repeated"].items():
        print(
            f"{name:<20} {found['groups']:>3} configurations repeated, spread {found['spread_pct']:.1f} %"
        )
    for job in report["jobs"]:
        cells = "  ".join(f"{sigma} %: {_told(value)}" for sigma, value in job["ceiling"].items())
        reached = f"reached: {_told(job['reached'])}  ceiling at {cells}"
        print(f"{job['set']:<16} {job['job']:<32} n {job['n']:>3}  {reached}")


def _told(correlation: float | None) -> str:
    return "-" if correlation is None else f"{correlation:.2f}"


def noise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The spread of repetitions by set, and each job's ceiling under it and under 2 and 5 %."""
    repeated: dict[str, Times] = defaultdict(lambda: defaultdict(list))
    jobs: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    for raw in rows:
        row, _ = cleaned(raw)
        run = run_of(row)
        if not isinstance(run, Run) or (seconds := measured_step_s(row)) is None:
            continue
        repeated[row["set"]][configuration(row, run)].append(seconds)
        job = f"{row['model'].get('name')} s{run.shape.seq_len} n{run.devices} b{run.batch:g}"
        jobs[row["set"], job].append((seconds, step_time(run, parameters()).total_s))
    spreads = {name: spread(groups) for name, groups in repeated.items()}
    known = {name: found for name, found in spreads.items() if found is not None}
    sizes = sorted({2.0, 5.0} | {round(found["spread_pct"], 1) for found in known.values()})
    return {
        "repeated": known,
        "jobs": [
            {
                "set": name,
                "job": job,
                "n": len(pairs),
                "reached": spearman(pairs),
                "ceiling": {sigma: ceiling([m for m, _ in pairs], sigma / 100) for sigma in sizes},
            }
            for (name, job), pairs in jobs.items()
            if len(pairs) >= ENOUGH
        ],
    }


def configuration(row: dict[str, Any], run: Run) -> str:
    """What two repetitions have in common."""
    parallel = {k: v for k, v in row["parallel"].items() if k not in ("framework", "schedule")}
    groups = (row["model"], parallel, row["batch"], row["hardware"].get("inter"), run.device, run.devices)
    return json.dumps(groups, sort_keys=True, default=str)


def spread(groups: Times) -> dict[str, float] | None:
    """Standard deviation of one measurement about its configuration's mean, by all repetitions."""
    several = [logs for times in groups.values() if len(logs := np.log(np.unique(times))) > 1]
    if not several:
        return None
    squares = sum(float(((logs - logs.mean()) ** 2).sum()) for logs in several)
    freedom = sum(len(logs) - 1 for logs in several)
    return {"groups": len(several), "spread_pct": 100 * math.sqrt(squares / freedom)}


def ceiling(times: list[float], sigma: float) -> float | None:
    """Mean rank correlation of times with themselves under relative noise; None where all are equal."""
    if len(set(times)) == 1:
        return None
    generator = np.random.default_rng(0)
    noisy = (np.array(times) * np.exp(generator.normal(0, sigma, len(times))) for _ in range(DRAWS))
    found = [spearman(list(zip(times, draw.tolist(), strict=True))) for draw in noisy]
    return float(np.mean([value for value in found if value is not None]))


if __name__ == "__main__":
    main()
