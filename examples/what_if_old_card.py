"""What if, third story: is the old card worth keeping?

A workstation has an RTX 4090 and, from earlier days, a T4. Does the T4 help, and what would?
"""

import torch

import graphpar
from graphpar.examples.gpt import GPT, example_inputs

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


def main(*, cache: bool = True, processes: int | None = None) -> graphpar.Study:
    """Plan, leave each card out, ask, print."""
    with torch.device("meta"):
        model = GPT(width=768, layers=6, heads=12, length=512)
        ids, targets = example_inputs(16, 512)
    study = graphpar.what_if(
        model,
        WORKSTATION,
        QUESTIONS,
        args=(ids,),
        kwargs={"targets": targets},
        train=graphpar.Training(optimizer=torch.optim.AdamW),
        worth=True,
        leave_out=True,
        cache=cache,
        processes=processes,
        time_limit_s=1.0,
    )
    print(study)
    return study


if __name__ == "__main__":
    main()
