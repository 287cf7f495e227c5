"""How a plan shows itself in a notebook: the page in a sandboxed frame, and the picture.

`attach` gives `Plan` the methods that IPython looks for, so that plans need not know their views.
"""

from html import escape

from graphpar.plans import Plan
from graphpar.view.build import view_of
from graphpar.view.html import render_html
from graphpar.view.model import ViewData
from graphpar.view.svg import render_svg

_FRAME_PX = 680


def attach() -> None:
    """Make plans show themselves in notebooks; calling it again changes nothing."""
    for name, method in (("_repr_html_", _repr_html_), ("_repr_svg_", _repr_svg_)):
        setattr(Plan, name, method)


def framed(view: ViewData) -> str:
    """The page in a frame that may run its script and nothing else: no access to the notebook.

    The sandbox leaves the frame without an origin, so that nothing in a plan can reach the page
    around it.
    """
    page = escape(render_html(view).decode(), quote=True)
    title = escape(view.headline, quote=True)
    return (
        f'<iframe sandbox="allow-scripts" title="{title}" width="100%" height="{_FRAME_PX}" '
        f'frameborder="0" srcdoc="{page}"></iframe>'
    )


def _repr_html_(plan: Plan) -> str:
    return framed(view_of(plan))


def _repr_svg_(plan: Plan) -> str:
    return render_svg(view_of(plan)).decode()
