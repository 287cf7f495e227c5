"""Write the golden files anew: `python tests/view/golden_files.py`, then look at what changed."""

import sys
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from plan_samples import sample_plan  # noqa: E402
from view_samples import explained_plan  # noqa: E402

from graphpar.explanation.page import format_explanation  # noqa: E402
from graphpar.plans.diff import diff_plans  # noqa: E402
from graphpar.view.build import view_of  # noqa: E402
from graphpar.view.svg import render_svg  # noqa: E402
from graphpar.view.trace import render_trace  # noqa: E402

PAGES: dict[str, Callable[[], str]] = {
    "plan.txt": lambda: str(explained_plan()),
    "plan_inference.txt": lambda: str(sample_plan(training=False)),
    "explain.txt": lambda: format_explanation(explained_plan()),
    "explain_block.txt": lambda: format_explanation(explained_plan(), "h.1"),
    "diff.txt": lambda: str(diff_plans(sample_plan(), sample_plan(4, training=False))),
    "diff_none.txt": lambda: str(diff_plans(sample_plan(), sample_plan())),
}
"""Pages of text by the name of their golden file."""


def main() -> None:
    """Draw and print the small plan."""
    view = view_of(sample_plan())
    golden = HERE / "golden"
    golden.mkdir(exist_ok=True)
    (golden / "small.svg").write_bytes(render_svg(view))
    (golden / "small.json").write_bytes(render_trace(view))
    for name, page in PAGES.items():
        (golden / name).write_text(page() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
