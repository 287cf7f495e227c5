"""What if, first story: a lab with two kinds of machines asks what is worth changing.

One machine holds two RTX 3090, another four older V100, over 10 Gbit/s Ethernet. Nothing is run: the
job is planned again under every question, and no card is needed to ask.
"""

import torch

import graphpar
from graphpar.examples.gpt import GPT, example_inputs

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


def main(*, cache: bool = True, processes: int | None = None) -> graphpar.Study:
    """Plan, ask, print."""
    with torch.device("meta"):
        model = GPT(width=1024, layers=4, heads=16, length=1024)
        ids, targets = example_inputs(32, 1024)
    study = graphpar.what_if(
        model,
        LAB,
        QUESTIONS,
        args=(ids,),
        kwargs={"targets": targets},
        train=graphpar.Training(optimizer=torch.optim.AdamW),
        cache=cache,
        processes=processes,
        time_limit_s=1.0,
        gap=0.05,
    )
    print(study)
    return study


if __name__ == "__main__":
    main()
