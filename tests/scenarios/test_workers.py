"""Processes that solve scenarios do not run the script that asks once more."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import torch, graphpar
print("started", flush=True)
model = torch.nn.Sequential(*[torch.nn.Linear(8, 8) for _ in range(3)])
asked = ["set batch=12", "set batch=24", "drop local/1"]
cluster = {"devices": [{"kind": "t4", "count": 2}]}
options = {"args": (torch.randn(6, 8),), "cache": False, "time_limit_s": 0.2, "processes": 2}
print(len(graphpar.what_if(model, cluster, asked, **options).answers))
"""


@pytest.mark.slow
def test_a_script_without_a_guard_runs_once(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    ran = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert ran.stdout.split() == ["started", "3"], ran.stderr
