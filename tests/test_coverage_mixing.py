"""Stock models in which samples meet, on pipelines side by side, compared as by the coverage harness."""

import sys
from pathlib import Path

import pytest
import torch
from helpers import Line, force

pytest.importorskip("transformers")

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from coverage_model import BATCH, Built, build_tiny, mean_loss, settled

from graphpar.preparation import prepare
from graphpar.runtime.hold import HoldStill
from graphpar.runtime.numbers import (
    FLOAT32_ROUNDING,
    compare_gradients,
    relative_difference,
)
from graphpar.runtime.reference import EagerModel
from graphpar.training import Training

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


def check(built: Built, microbatches: int, way: str, rounding: float = FLOAT32_ROUNDING) -> None:
    """Loss, gradients and buffers of two unlike pipelines are those of the eager model."""
    assert BATCH >= 4
    model = settled(built.model.train(), built.kwargs)
    train = Training(optimizer=HoldStill, loss=None if built.loss else mean_loss)
    args = () if built.loss else (torch.zeros(BATCH),)
    prepared = prepare(model, args, built.kwargs, train)
    assert prepared.batch_reason == ""
    assert bool(prepared.tail_reason) == (way == "tail")
    assert bool(prepared.in_step_reason) == (way == "in step")
    lines = (Line((1, 1), microbatches, samples=BATCH - 1), Line((1,), 1, samples=1))
    reference = EagerModel(model, train)
    (wanted,) = reference.forward(args, built.kwargs)
    wanted.backward()  # type: ignore[no-untyped-call]
    forced = force(
        model, args, built.kwargs, lines=lines, train=train, schedule="gpipe", prepared=prepared
    )
    with forced.start() as job:
        loss = job.step(*args, **built.kwargs)
        gradients, state = job.gradients(), job.state_dict()
    assert relative_difference(loss, wanted.detach()) <= rounding
    name, error = compare_gradients(gradients, reference.gradients())
    assert error <= rounding, name
    for name, tensor in reference.model.state_dict().items():
        assert relative_difference(state[name], tensor) <= rounding, name


@pytest.mark.parametrize("name", ["CLIP", "Siglip"])
def test_contrastive_losses(name: str) -> None:
    check(build_tiny(name), 3, "tail")


@pytest.mark.parametrize("name", ["Mixtral", "Qwen2Moe"])
def test_balancing_losses(name: str) -> None:
    built = build_tiny(name)
    built.kwargs["output_router_logits"] = True
    check(built, 2, "tail")


@pytest.mark.parametrize("name", ["ResNet", "MobileNetV2"])
def test_batch_normalisation(name: str) -> None:
    """In float64: statistics over few values make float32's rounding large on one device already."""
    built = build_tiny(name)
    built.model.double()
    built.kwargs["pixel_values"] = built.kwargs["pixel_values"].double()
    check(built, 1, "in step", 1e-9)
