"""What if, second story: rent A or B? The best cluster for twelve dollars an hour.

Two ready-made offers are compared, then every mix of the instance types that uses the budget up is
considered; bounds rule most of them out before they are planned.
"""

import torch

import graphpar
from graphpar.examples.gpt import GPT, example_inputs

BUDGET_USD_PER_H = 12.0
TYPES = ("g5.12xlarge", "g6.12xlarge", "p3.8xlarge")


def main(*, cache: bool = True, processes: int | None = None) -> graphpar.Study:
    """Plan on offer A, ask for offer B and for the best of all, print."""
    with torch.device("meta"):
        model = GPT(width=1024, layers=4, heads=16, length=1024)
        ids, targets = example_inputs(64, 1024)
    study = graphpar.what_if(
        model,
        graphpar.Cluster.of("g5.12xlarge", 2),
        {"B: one p3.8xlarge": ["add p3.8xlarge", "drop g5-0", "drop g5-1"]},
        args=(ids,),
        kwargs={"targets": targets},
        train=graphpar.Training(optimizer=torch.optim.AdamW),
        precision="float16",
        budget_usd_per_h=BUDGET_USD_PER_H,
        instances=TYPES,
        cache=cache,
        processes=processes,
        time_limit_s=1.0,
        gap=0.05,
    )
    print(study)
    return study


if __name__ == "__main__":
    main()
