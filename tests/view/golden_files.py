"""Write the golden files anew: `python tests/view/golden_files.py`, then look at what changed."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from plan_samples import sample_plan  # noqa: E402

from graphpar.view.build import view_of  # noqa: E402
from graphpar.view.svg import render_svg  # noqa: E402
from graphpar.view.trace import render_trace  # noqa: E402


def main() -> None:
    """Draw the small plan."""
    view = view_of(sample_plan())
    (HERE / "golden").mkdir(exist_ok=True)
    (HERE / "golden" / "small.svg").write_bytes(render_svg(view))
    (HERE / "golden" / "small.json").write_bytes(render_trace(view))


if __name__ == "__main__":
    main()
