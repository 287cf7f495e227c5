"""How things show themselves in a notebook: a page in a sandboxed frame, a picture, or text.

`attach` gives plans and graphs the methods that IPython looks for, so that they need not know their
views. Jobs and reports call `framed` and `preformatted` themselves.
"""

from html import escape
from typing import TYPE_CHECKING

from graphpar.ir.graph import Graph
from graphpar.plans.plan import Plan
from graphpar.view.build import view_of
from graphpar.view.detail import ViewDetail, detail_of
from graphpar.view.graph_svg import render_graph_svg
from graphpar.view.html import render_html
from graphpar.view.model import ViewData
from graphpar.view.svg import render_svg

if TYPE_CHECKING:
    from graphpar.runtime.last_step import LastStep

_FRAME_PX = 680


def attach() -> None:
    """Make plans and graphs show themselves in notebooks; calling it again changes nothing."""
    for name, method in (("_repr_html_", _repr_html_), ("_repr_svg_", _repr_svg_)):
        setattr(Plan, name, method)
    Graph._repr_svg_ = _repr_graph_svg_  # type: ignore[attr-defined]


def framed(view: ViewData, detail: ViewDetail | None = None) -> str:
    """The page in a frame that may run its script and nothing else: no access to the notebook.

    The sandbox leaves the frame without an origin, so that nothing in a plan can reach the page
    around it.
    """
    page = escape(render_html(view, detail=detail).decode(), quote=True)
    title = escape(view.headline, quote=True)
    return (
        f'<iframe sandbox="allow-scripts" title="{title}" width="100%" height="{_FRAME_PX}" '
        f'frameborder="0" srcdoc="{page}"></iframe>'
    )


def framed_job(plan: Plan, graph: Graph, step: "LastStep | None") -> str:
    """The page of a job in a frame: its plan, its operations, its last step if it made one."""
    return framed(view_of(plan, step), detail_of(graph, plan.units))


def drawn_job(plan: Plan, step: "LastStep | None") -> str:
    """The picture of a job as SVG."""
    return render_svg(view_of(plan, step)).decode()


def preformatted(text: str) -> str:
    """A page of text for a notebook."""
    return f"<pre>{escape(text)}</pre>"


def _repr_html_(plan: Plan) -> str:
    return framed(view_of(plan))


def _repr_svg_(plan: Plan) -> str:
    return render_svg(view_of(plan)).decode()


def _repr_graph_svg_(graph: Graph) -> str:
    return render_graph_svg(graph).decode()
