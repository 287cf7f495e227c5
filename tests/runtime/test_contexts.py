"""Jobs start from anywhere: from stdin, without a main guard, in a folder full of unlucky names."""

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import logging
logging.getLogger("graphpar").setLevel(logging.ERROR)  # how a busy machine compares with the plan
import torch
from torch import nn
import graphpar

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 4))
x, y = torch.randn(8, 4), torch.randn(8, 4)
rate = 0.1
training = graphpar.Training(optimizer=lambda p: torch.optim.SGD(p, lr=rate), loss=nn.functional.mse_loss)
job = graphpar.compile(model, {"devices": [{"kind": "cpu", "threads": 1}]}, (x, y), train=training)
losses = [float(job.step(x, y)) for _ in range(3)]
assert losses[2] < losses[0]
print("fell")
"""


@pytest.mark.slow
def test_without_a_script_in_a_folder_with_unlucky_names(tmp_path: Path) -> None:
    """And a `random.py` that stands before the standard library only after torch was imported."""
    for name in ("passes", "cost_models", "tests", "runtime", "graphpar_user"):
        package = tmp_path / name
        package.mkdir()
        (package / "__init__.py").write_text("raise SystemExit('the wrong module was imported')\n")
    for name in ("messages", "worker", "schedule", "solver", "cluster"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong module was imported')\n")
    late = tmp_path / "late"
    late.mkdir()
    (late / "random.py").write_text("raise SystemExit('the wrong module was imported')\n")
    (late / "rates.py").write_text("import torch\n\nmake = lambda p: torch.optim.SGD(p, lr=0.1)\n")
    text = PROGRAM.replace("rate = 0.1", f"import sys; sys.path.insert(0, {str(late)!r}); import rates")
    text = text.replace("lambda p: torch.optim.SGD(p, lr=rate)", "lambda p: rates.make(p)")
    done = subprocess.run(
        [sys.executable, "-"], cwd=tmp_path, input=text, capture_output=True, text=True, timeout=90
    )
    assert (done.returncode, done.stdout) == (0, "fell\n"), done.stderr
    assert not done.stderr, "nothing is to be said about a job that was left open"
