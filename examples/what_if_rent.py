"""What if, second story: rent A or B? The best cluster for twelve and a half dollars an hour.

Two ready-made offers are compared, then every mix of the instance types that uses the budget up is
considered; bounds rule most of them out before they are planned.
"""

from typing import Any

import graphpar
from graphpar.examples.what_if import story

BUDGET_USD_PER_H = 12.5
TYPES = ("g5.12xlarge", "g6.12xlarge", "p3.8xlarge")


def main(**options: Any) -> graphpar.Study:
    """Plan on offer A, ask for offer B and for the best of all, print; with options of `what_if`."""
    size = {"width": 1024, "layers": 4, "batch": 64, "length": 1024}
    return story(
        graphpar.Cluster.of("g5.12xlarge", 2),
        {"B: one p3.8xlarge": ["add p3.8xlarge", "drop g5-0", "drop g5-1"]},
        **size,
        precision="float16",
        budget_usd_per_h=BUDGET_USD_PER_H,
        instances=TYPES,
        **{"gap": 0.05, **options},
    )


if __name__ == "__main__":
    main()
