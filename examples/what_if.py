"""What the what-if stories share: a GPT that is only shape, AdamW, and the printed study."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

import graphpar
from graphpar.examples.gpt import GPT, example_inputs


def story(
    cluster: graphpar.Cluster | Mapping[str, Any],
    questions: Mapping[str, str | Sequence[str]],
    *,
    width: int,
    layers: int,
    batch: int,
    length: int,
    **options: Any,
) -> graphpar.Study:
    """Ask about training a GPT, and print the answers; `options` are those of `graphpar.what_if`.

    The model is built on the meta device: no weights are made and nothing is run.
    """
    with torch.device("meta"):
        model = GPT(width=width, layers=layers, heads=width // 64, length=length)
        ids, targets = example_inputs(batch, length)
    study = graphpar.what_if(
        model,
        cluster,
        questions,
        args=(ids,),
        kwargs={"targets": targets},
        train=graphpar.Training(optimizer=torch.optim.AdamW),
        **options,
    )
    print(study)
    return study
