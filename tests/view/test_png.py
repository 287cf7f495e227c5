"""The PNG, with and without matplotlib."""

import struct
import sys
import warnings
from pathlib import Path

import pytest
from plan_samples import sample_plan
from view_samples import Job, hostile_plan, measured_step

from graphpar import cli
from graphpar.view.api import visualize
from graphpar.view.build import view_of
from graphpar.view.png import render_png

MAGIC = b"\x89PNG\r\n\x1a\n"


def height_of(png: bytes) -> int:
    """From the header chunk, https://www.w3.org/TR/png-3/#11IHDR."""
    height: int = struct.unpack(">I", png[20:24])[0]
    return height


def test_a_measured_step_makes_the_picture_taller(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plan = sample_plan()
    alone = visualize(plan, tmp_path / "plan.png").read_bytes()
    both = visualize(Job(plan, measured_step(plan, until_s=0.1)), tmp_path / "job.png").read_bytes()
    assert alone[:8] == both[:8] == MAGIC
    assert height_of(both) > height_of(alone)


def test_hostile_names_are_drawn_without_a_word() -> None:
    pytest.importorskip("matplotlib")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert render_png(view_of(hostile_plan()))[:8] == MAGIC


def test_without_matplotlib_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    plan = sample_plan().save(tmp_path / "plan.json")
    assert cli.run(["view", str(plan), "-o", str(tmp_path / "plan.png")], cli.Settings()) == 2
    assert "pip install 'graphpar[viz]'" in capsys.readouterr().err
    assert not (tmp_path / "plan.png").exists()
