"""The one call that draws: a plan or a job, and a path whose suffix says what to make."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from graphpar.files import write_asked
from graphpar.ir.graph import Graph
from graphpar.plans.diff import diff_plans
from graphpar.plans.plan import Plan
from graphpar.view.build import view_of
from graphpar.view.detail import ViewDetail, detail_of
from graphpar.view.graphs import render_dot, render_graphml, render_markdown
from graphpar.view.html import render_html
from graphpar.view.model import ViewData
from graphpar.view.png import render_png
from graphpar.view.svg import render_svg
from graphpar.view.trace import render_trace

if TYPE_CHECKING:
    from graphpar.runtime.last_step import LastStep


class Job(Protocol):
    """What is drawn of a job: its plan, and its last step if it has made one."""

    @property
    def plan(self) -> Plan: ...
    @property
    def last_step(self) -> "LastStep | None": ...


Drawable = Plan | Job

_RENDERERS: dict[str, Callable[[ViewData], bytes]] = {
    ".html": render_html,
    ".svg": render_svg,
    ".png": render_png,
    ".json": render_trace,
    ".md": render_markdown,
    ".dot": render_dot,
    ".graphml": render_graphml,
}
SUFFIXES = tuple(_RENDERERS)


def visualize(
    plan_or_job: Drawable,
    path: str | os.PathLike[str],
    *,
    compare: Drawable | None = None,
    graph: Graph | None = None,
) -> Path:
    """Draw a plan, or a job with its last measured step, into one file; returns its path.

    Args:
        plan_or_job: A `Plan`, or what `graphpar.compile` returns.
        path: Where to write. The suffix says what: `.html` an interactive page, `.svg` and `.png`
            (needs matplotlib) a picture, `.json` a trace for Perfetto, `.md` a page with a Mermaid
            sketch, `.dot` and `.graphml` the graph of stages.
        compare: Another plan or job, which the page then sets beside the first; `.html` only.
        graph: The captured graph that the plan is for; blocks of an `.html` page then open down to
            their operations. A job knows its own.

    Raises:
        ValueError: The suffix is unknown, an argument is neither plan nor job, `compare` or `graph`
            is given for something else than a page, the graph is not the plan's, or a `.png` is
            asked for without matplotlib.
        PlanError: The file cannot be written.

    >>> import tempfile, torch, graphpar
    >>> plan = graphpar.plan(torch.nn.Linear(4, 2), {"devices": [{"kind": "cpu"}]}, (torch.randn(6, 4),))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     graphpar.visualize(plan, f"{folder}/plan.svg").read_text()[:4]
    '<svg'
    """
    target = Path(path)
    check_suffix(target)
    render = _RENDERERS[target.suffix.lower()]
    if compare is not None and render is not render_html:
        raise ValueError(f"two plans are compared in a page; end the name {str(target)!r} in .html")
    if graph is not None and render is not render_html:
        raise ValueError(f"operations are shown in a page; end the name {str(target)!r} in .html")
    view = _view(plan_or_job)
    if render is not render_html:
        write_asked(target, render(view), "view")
        return target
    detail = _detail(_plan_of(plan_or_job), graph, plan_or_job)
    if compare is None:
        write_asked(target, render_html(view, detail=detail), "view")
    else:
        diff = diff_plans(_plan_of(plan_or_job), _plan_of(compare))
        write_asked(target, render_html(view, _view(compare), diff, detail), "view")
    return target


def check_suffix(path: str | os.PathLike[str]) -> None:
    """Make sure that a file's name says what to draw; ValueError otherwise."""
    if Path(path).suffix.lower() not in _RENDERERS:
        raise ValueError(
            f"cannot tell what to draw from the name {os.fspath(path)!r}; "
            f"give one that ends in {', '.join(SUFFIXES)}"
        )


def _detail(plan: Plan, graph: Graph | None, drawable: Drawable) -> ViewDetail | None:
    """Operations by unit, from the graph that was given or the one the job runs."""
    if graph is not None:
        detail = detail_of(graph, plan.units)
        if detail is None:
            raise ValueError(
                f"graph {graph.name!r} is not the one this plan was made for: its units differ; "
                "capture the model with the inputs the plan was made with"
            )
        return detail
    own = getattr(drawable, "graph", None)
    return detail_of(own, plan.units) if isinstance(own, Graph) else None


def _view(drawable: Drawable) -> ViewData:
    plan = _plan_of(drawable)
    if isinstance(drawable, Plan):
        return view_of(plan)
    told = (getattr(drawable, name, None) for name in ("comparison", "true_error"))
    return view_of(plan, drawable.last_step, *told)


def _plan_of(drawable: Drawable) -> Plan:
    plan = drawable if isinstance(drawable, Plan) else getattr(drawable, "plan", None)
    if not isinstance(plan, Plan):
        raise ValueError(
            f"a plan or a job can be drawn, not a {type(drawable).__name__}; "
            "`graphpar.Plan.load` reads a plan from a file"
        )
    return plan
