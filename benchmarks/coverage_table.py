"""Turns rows that `coverage.py --json` printed into the tables of docs/coverage.md.

python benchmarks/coverage_table.py benchmarks/coverage_runs/seed-2.json
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table in Markdown with a line for each row, those that pass first.

    >>> row = {"name": "A", "status": "pass", "stage": "done", "head": "AModel", "max_error": 1e-7,
    ...        "modes": ["eval"]}
    >>> print(table([row]).splitlines()[-3])
    | A | AModel | eval | 1.0e-07 |  |
    """
    passed = [r for r in rows if r["status"] == "pass"]
    failed = [r for r in rows if r["status"] != "pass"]
    lines = ["| architecture | class | modes | largest difference | batch |", "|---|---|---|---|---|"]
    lines += [
        f"| {r['name']} | {r['head']} | {', '.join(r['modes'])} | {r['max_error']:.1e} | {_batch(r)} |"
        for r in passed
    ]
    lines += ["", f"{len(passed)} of {len(rows)} pass."]
    if failed:
        lines += ["", "| fails | stage | reason |", "|---|---|---|"]
        lines += [
            f"| {r['name']} | {r['stage']} | {r.get('summary') or r['reason'][:160]} |" for r in failed
        ]
    return "\n".join(lines)


def _batch(row: Mapping[str, Any]) -> str:
    if row.get("side_by_side"):
        return "side by side"
    if "train" not in row["modes"]:
        return ""
    return "split" if row.get("split") else "whole"


if __name__ == "__main__":
    print(table(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["rows"]))
