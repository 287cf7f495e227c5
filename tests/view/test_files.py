"""The files that are drawn: SVG, graphs, pages; hostile names, wrong arguments."""

import io
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import msgspec
import networkx as nx
import pytest
from plan_samples import sample_plan
from view_samples import HOSTILE, Job, hostile_plan, measured_step

import graphpar
from graphpar import cli
from graphpar.errors import PlanError
from graphpar.view.api import SUFFIXES, visualize
from graphpar.view.build import view_of
from graphpar.view.graphs import render_dot, render_graphml, render_markdown
from graphpar.view.svg import render_svg

GOLDEN = Path(__file__).with_name("golden") / "small.svg"
_SVG = "{http://www.w3.org/2000/svg}"


def texts(svg: bytes) -> list[str]:
    return [e.text or "" for e in ElementTree.fromstring(svg).iter(f"{_SVG}text")]


def test_the_picture_of_a_small_plan_is_golden() -> None:
    assert render_svg(view_of(sample_plan())).decode() == GOLDEN.read_text(encoding="utf-8")


def test_the_picture_has_every_device_and_microbatch() -> None:
    shown = texts(render_svg(view_of(sample_plan())))
    assert {"p0s0/0", "p0s1/0", "p0s1/1", "p0s2/0"} <= set(shown)
    assert shown.count("7") == 2 * 3  # forward and backward of microbatch 7 in three stages


def test_the_picture_says_where_a_run_stopped() -> None:
    plan = sample_plan()
    shown = texts(render_svg(view_of(plan, measured_step(plan, until_s=0.1))))
    assert shown.count("stopped") == 4 and shown.count("measured") == 4
    assert any("the run failed" in text for text in shown)


def test_hostile_names_stay_text_in_the_picture() -> None:
    svg = render_svg(view_of(hostile_plan()))
    root = ElementTree.fromstring(svg)
    kinds = {element.tag.removeprefix(_SVG) for element in root.iter()}
    assert kinds <= {"svg", "rect", "path", "text", "title", "line"}
    titles = [e.text for e in root.iter(f"{_SVG}title")]
    assert f"{HOSTILE[0]}#0" in titles


def test_hostile_names_stay_text_in_graphs() -> None:
    view = view_of(hostile_plan())
    back = nx.read_graphml(io.BytesIO(render_graphml(view)))
    assert HOSTILE[0] in back.nodes["s0"]["devices"]
    assert len(back) == len(view.stages) + len(view.left_out)
    assert list(back.edges) == [("s0", "s1"), ("s0", "s2"), ("s1", "s2")]
    dot = render_dot(view).decode()
    assert dot.count("\n") == 3 + len(view.stages) + len(view.edges) + len(view.left_out) + 1
    page = render_markdown(view).decode()
    assert "<script" not in page
    sketch = page.split("```")[1]
    assert "`" not in sketch and "%%" not in sketch and "<b>" not in sketch


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_plan_and_a_job_are_drawn_by_suffix(suffix: str, tmp_path: Path) -> None:
    plan = sample_plan()
    for name, drawable in (("plan", plan), ("job", Job(plan, measured_step(plan)))):
        target = visualize(drawable, tmp_path / "new" / f"{name}{suffix}")
        assert target.stat().st_size > 100
    assert not list((tmp_path / "new").glob(".*")), "a temporary file is left"


def test_a_job_that_made_no_step_is_drawn_as_its_plan(tmp_path: Path) -> None:
    plan = sample_plan()
    first, second = tmp_path / "a.svg", tmp_path / "b.svg"
    graphpar.visualize(plan, first)
    graphpar.visualize(Job(plan, None), second)
    assert first.read_bytes() == second.read_bytes()


def test_what_cannot_be_drawn_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ends in .*\.svg"):
        visualize(sample_plan(), tmp_path / "plan.bmp")
    wrong: Any = {"a": "dict"}
    with pytest.raises(ValueError, match="a plan or a job can be drawn, not a dict"):
        visualize(wrong, tmp_path / "plan.svg")
    (tmp_path / "file").write_text("")
    with pytest.raises(PlanError, match="cannot be written"):
        visualize(sample_plan(), tmp_path / "file" / "plan.svg")


def test_the_command_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = sample_plan().save(tmp_path / "plan.json")
    assert cli.run(["view", str(plan), "-o", str(tmp_path / "plan.svg")], cli.Settings()) == 0
    assert (tmp_path / "plan.svg").read_bytes() == render_svg(view_of(sample_plan()))
    assert "view written to" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["{}", "[1]", "not json", '{"format": "graphpar-plan"}'])
def test_the_command_refuses_a_file_that_is_no_plan(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.json").write_text(content)
    assert cli.run(["view", str(tmp_path / "x.json"), "-o", str(tmp_path / "x.svg")], cli.Settings()) == 2
    assert "plan file" in capsys.readouterr().err
    assert not (tmp_path / "x.svg").exists()


def test_the_command_does_not_overwrite_the_plan(tmp_path: Path) -> None:
    plan = sample_plan().save(tmp_path / "plan.json")
    before = plan.read_bytes()
    detour = str(tmp_path / "sub" / ".." / "plan.json")
    (tmp_path / "sub").mkdir()
    assert cli.run(["view", str(plan), "-o", detour], cli.Settings()) == 2
    assert plan.read_bytes() == before


def test_a_step_that_takes_no_time_is_drawn(tmp_path: Path) -> None:
    timing = sample_plan(training=False).timing
    plan = msgspec.structs.replace(
        sample_plan(training=False),
        edges=(),
        predicted_step_s=0.0,
        timing=replace(
            timing,
            ranks=tuple(
                replace(rank, sizes=tuple(replace(s, forward_s=0.0) for s in rank.sizes))
                for rank in timing.ranks
            ),
        ),
    )
    assert plan.timeline().step_s == 0
    for suffix in SUFFIXES:
        assert visualize(plan, tmp_path / f"plan{suffix}").stat().st_size > 100


def test_drawing_needs_no_torch() -> None:
    code = "import sys, graphpar.view.api, graphpar.commands.view; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
