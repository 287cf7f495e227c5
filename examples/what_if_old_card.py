"""What if, third story: is the old card worth keeping?

A workstation has an RTX 4090 and, from earlier days, a T4. Does the T4 help, and what would?
"""

from typing import Any

import graphpar
from graphpar.examples.what_if import story

WORKSTATION = {
    "nodes": [
        {
            "name": "desk",
            "devices": [{"kind": "rtx-4090", "count": 1}, {"kind": "t4", "count": 1}],
        }
    ]
}

QUESTIONS = {
    "a second RTX 4090": "replace desk/1 with rtx-4090",
    "an RTX 3090 instead": "replace desk/1 with rtx-3090",
}


def main(**options: Any) -> graphpar.Study:
    """Plan, leave each card out, ask, print; `options` are those of `graphpar.what_if`."""
    size = {"width": 768, "layers": 6, "batch": 16, "length": 512}
    return story(WORKSTATION, QUESTIONS, **size, worth=True, leave_out=True, **options)


if __name__ == "__main__":
    main()
