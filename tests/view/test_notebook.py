"""Plans, graphs, jobs and reports that show themselves in a notebook."""

import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from plan_samples import sample_plan
from view_samples import HOSTILE, hostile_plan

from graphpar.ir.graph import Graph
from graphpar.ir.ops import BatchSize, Op, Ref, TensorType
from graphpar.view.build import view_of
from graphpar.view.html import render_html
from graphpar.view.notebook import attach


class Frames(HTMLParser):
    """The elements of a piece of HTML."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))


def test_a_plan_shows_itself_as_page_and_picture() -> None:
    attach()
    plan: Any = sample_plan()
    ElementTree.fromstring(plan._repr_svg_())
    ((tag, attributes),) = Frames(plan._repr_html_()).elements
    assert tag == "iframe"
    assert attributes["srcdoc"] == render_html(view_of(plan)).decode()


def test_the_frame_may_run_scripts_and_nothing_else() -> None:
    attach()
    plan: Any = hostile_plan()
    ((_, attributes),) = Frames(plan._repr_html_()).elements
    assert attributes["sandbox"] == "allow-scripts"


def test_the_public_plan_knows_how_to_show_itself() -> None:
    code = (
        "import sys, graphpar; shown = hasattr(graphpar.Plan, '_repr_html_'); "
        "sys.exit(0 if shown and 'torch' not in sys.modules else 1)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.distributed
@pytest.mark.slow
def test_the_example_notebook_runs_and_everything_in_it_shows_itself() -> None:
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    path = Path(__file__).resolve().parents[2] / "examples" / "see_a_plan.ipynb"
    book = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(book, timeout=300, kernel_name="python3").execute()
    shown: dict[str, set[str]] = {}
    for cell in book.cells:
        for output in cell.get("outputs", []):
            assert output["output_type"] in ("execute_result", "stream"), output
            if output["output_type"] == "execute_result":
                shown[cell["source"].splitlines()[-1]] = set(output["data"])
    assert {"text/html", "image/svg+xml", "text/plain"} <= shown["plan"]
    assert {"text/html", "image/svg+xml", "text/plain"} <= shown["job"]
    assert "text/html" in shown["job.last_step"]
    assert "image/svg+xml" in shown["job.graph"]
    assert {"text/html", "image/svg+xml", "text/plain"} <= shown["study"]


def test_a_graph_draws_itself_whatever_its_names() -> None:
    attach()
    graph: Any = hostile_graph()
    root = ElementTree.fromstring(graph._repr_svg_())
    texts = [e.text or "" for e in root.iter("{http://www.w3.org/2000/svg}text")]
    assert any(HOSTILE[0] in text for text in texts)
    assert {e.tag.partition("}")[2] for e in root.iter()} <= {"svg", "rect", "path", "text", "title"}


@pytest.mark.slow
def test_a_graph_of_a_hundred_thousand_operations_is_a_small_picture() -> None:
    attach()
    graph: Any = chain_graph([f"layers.{i // 100}.part{i % 7}" for i in range(100_000)])
    picture = graph._repr_svg_()
    assert "×1000" in picture and len(picture) < 100_000


def hostile_graph() -> Graph:
    return chain_graph(list(HOSTILE))


def chain_graph(modules: list[str]) -> Graph:
    """One operation per module path, each reading the one before and the very first."""
    kind = TensorType((BatchSize(), 4), "float32")
    ops = [Op("x", "input", ("x",), types=(kind,))]
    for number, module in enumerate(modules):
        reads = (Ref(ops[-1].name), Ref("op0" if number > 1 else "x"))
        ops.append(Op(f"op{number}", "aten.add.Tensor", reads, types=(kind,), module=module))
    ops.append(Op("output", "output", ((Ref(ops[-1].name),),)))
    return Graph(ops, level="captured", name=modules[0], batch=2)
