"""Stock models give the same graph and the same numbers whether equal blocks are stamped or followed."""

from typing import Any

import pytest
from one_device import assert_close, eagerly
from test_fold import assert_equal, both
from torch import nn

from graphpar.frontend.capture import Captured
from graphpar.preparation import CAPTURE_PASSES, lower
from graphpar.runtime.reference import OneDevice, whole_on_one_device

pytest.importorskip("transformers")

from amounts import exhaustive
from stock_models import batch_of, build, in_turn

STAMPED = {"llama": 2, "gpt2": 2, "t5": 2, "gemma2": 4}
"""How many blocks are stamped: a first one is followed for each kind, and for each way of calling."""


@pytest.mark.parametrize("name", ["llama", "gpt2", *map(exhaustive, ("t5", "gemma2"))])
def test_the_graphs_are_equal_without_weights(name: str) -> None:
    batch = {key: value.to("meta") for key, value in batch_of(name).items()}
    folded, whole = both(build(name, "meta").train(), **batch)
    assert_equal(folded, whole)
    assert folded.stamped == STAMPED[name]


OTHERS_ALIKE = {"llama", "gpt2", "bert", "bart", "mixtral", "qwen3_moe", "vit", "resnet"}
"""Their blocks repeat as those of another model here; test_stock_sizes.py has the numbers of all."""
CASES = in_turn(("train", "eval"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "way"),
    [exhaustive(*case.values, id=case.id) if case.values[0] in OTHERS_ALIKE else case for case in CASES],
)
def test_graphs_and_numbers_are_equal(name: str, way: str) -> None:
    model, batch = build(name).train(way == "train"), batch_of(name)
    folded, whole = both(model, **batch)
    assert_equal(folded, whole)
    # What branches on values (the labels of a CTC loss) is followed in full.
    assert folded.stamped == 0 if name == "wav2vec2" else folded.stamped >= 2
    assert_close(numbers(model, folded, batch), eagerly(model, (), batch), 2e-5)


def numbers(model: nn.Module, captured: Captured, batch: dict[str, Any]) -> Any:
    """The loss and all gradients of a captured model on one device."""
    source, _ = CAPTURE_PASSES.run(captured.graph)
    (lowered,) = lower(source, whole_on_one_device(source), True).graphs
    device = OneDevice(model, captured, lowered, source, 0)
    (value,) = device.forward((), batch)
    value.backward()  # type: ignore[no-untyped-call]
    return value.detach(), device.gradients()
