"""The commands that plan and run a model, on a small model of two layers and local workers."""

import json
from pathlib import Path

import pytest

from graphpar import cli
from graphpar.plans.plan import Plan
from graphpar.verify import VerifyReport

MODEL = """
import torch
from torch import nn

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(16, 32)
        self.second = nn.Linear(32, 4)

    def forward(self, x, y):
        return nn.functional.cross_entropy(self.second(self.first(x).relu()), y)

def build():
    torch.manual_seed(0)
    return Model()

def example_inputs(batch_size, seq_len):
    torch.manual_seed(1)
    return torch.randn(batch_size, 16), torch.randint(0, 4, (batch_size,))
"""

CLUSTER = "devices: [{kind: cpu, count: 1}, {kind: cpu, count: 1, slowdown: 2.0}]\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("job")
    (path / "small_model.py").write_text(MODEL)
    (path / "cluster.yaml").write_text(CLUSTER)
    return path


@pytest.mark.distributed
def test_plan_then_run_then_refuse_another_use(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    common = ("small_model:build", "--cluster", "cluster.yaml", "--batch-size", "6")
    monkeypatch.chdir(folder)
    wished = ("--train", "-o", "plan.json", "--json", "--view", "plan.html")
    assert cli.run(("plan", *common, *wished), cli.Settings()) == 0
    printed = capfd.readouterr().out
    plan = Plan.load(folder / "plan.json")
    assert json.loads(printed) == json.loads(plan.to_json())
    assert plan.training
    assert plan.batch == 6
    assert '"detail":"' in (folder / "plan.html").read_text(encoding="utf-8")

    drawn = ("--view", "run.json", "--profile")
    with_plan = ("run", *common, "--plan", "plan.json", "--train", "--json")
    assert cli.run((*with_plan, *drawn), cli.Settings()) == 0
    ran = capfd.readouterr()
    assert "step 5/5  loss " in ran.err
    trace = json.loads((folder / "run.json").read_text(encoding="utf-8"))["traceEvents"]
    assert {"F", "B", "kernel"} <= {event.get("cat") for event in trace}
    result = json.loads(ran.out)
    assert len(result["losses"]) == 5
    assert result["losses"] == sorted(result["losses"], reverse=True)
    assert result["predicted_step_s"] == plan.predicted_step_s

    assert cli.run(("run", *common, "--profile"), cli.Settings()) == 2
    assert "say where with --view FILE.json" in capfd.readouterr().err
    refused = ("run", *common, "--plan", "plan.json", "--inference")
    assert cli.run(refused, cli.Settings()) == 2
    assert "made for training, but inference is asked for" in capfd.readouterr().err


def test_a_truncated_search_is_told_by_plan(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    arguments = ("plan", "small_model:build", "--cluster", "cluster.yaml", "--batch-size", "6")
    short = ("--train", "--time-limit", "1e-6", "--gap", "0")
    assert cli.run((*arguments, *short), cli.Settings()) == 0
    assert "search cut short by time limit" in capsys.readouterr().out
    assert cli.run((*arguments, *short, "--json"), cli.Settings()) == 0
    partition = json.loads(capsys.readouterr().out)["partition"]
    assert any("time limit" in reason for reason in partition["truncated_by"])


@pytest.mark.parametrize(("equal", "code"), [(True, 0), (False, 6)])
def test_verify_tells_by_its_exit_code(
    equal: bool,
    code: int,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    report = VerifyReport(
        equal=equal,
        reference="eager model",
        output_difference=0.0 if equal else 0.5,
        loss_difference=None,
        gradient_difference=None,
        worst_gradient="",
        losses=(),
        reference_losses=(),
        devices=("local/0",),
    )
    monkeypatch.setattr("graphpar.verify.verify", lambda *_, **__: report)
    monkeypatch.chdir(folder)
    arguments = ("verify", "small_model:build", "--cluster", "cluster.yaml", "--json")
    assert cli.run(arguments, cli.Settings()) == code
    captured = capsys.readouterr()
    assert json.loads(captured.out)["equal"] == equal
    assert ("more than rounding explains" in captured.err) != equal


def test_a_missing_cluster_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    wrong = ("plan", "small_model:build", "--cluster", "nothing.yaml")
    assert cli.run(wrong, cli.Settings()) == 2
    captured = capsys.readouterr()
    assert "nothing.yaml" in captured.err
    assert captured.out == ""
