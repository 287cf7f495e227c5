"""What if, first story: a lab with two kinds of machines asks what is worth changing.

One machine holds two RTX 3090, another four older V100, over 10 Gbit/s Ethernet. Nothing is run: the
job is planned again under every question, and no card is needed to ask.
"""

from typing import Any

import graphpar
from graphpar.examples.what_if import story

LAB = {
    "nodes": [
        {"name": "new", "devices": {"kind": "rtx-3090", "count": 2}},
        {"name": "old", "devices": {"kind": "v100-sxm2-16gb", "count": 4}},
    ],
    "network": "ethernet-10g",
}

QUESTIONS = {
    "without the old machine": "drop old",
    "without the new machine": "drop new",
    "25 Gbit/s network": "set network.bytes_per_s=3.1e9",
    "one card fails": "down new/1",
    "float16": "set precision=float16",
    "by hand, 6 stages": "pp=6 dp=1",
}


def main(**options: Any) -> graphpar.Study:
    """Plan, ask, print; `options` are those of `graphpar.what_if`."""
    size = {"width": 1024, "layers": 4, "batch": 32, "length": 1024}
    return story(LAB, QUESTIONS, **size, **{"gap": 0.05, **options})


if __name__ == "__main__":
    main()
