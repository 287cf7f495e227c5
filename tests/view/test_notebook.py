"""Plans that show themselves in a notebook."""

import subprocess
import sys
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

from plan_samples import sample_plan
from view_samples import hostile_plan

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
