"""Inputs that a model refuses, put right by what it says."""

import linecache
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from graphpar.hf.inputs import Wanted, candidate_inputs, further_input
from graphpar.hf.refusal import blamed_fields, blamed_names
from graphpar.hf.repair import with_repairs


def refusing(message: str, wanted: tuple[int, ...]) -> Callable[[dict[str, Any]], str]:
    """A model that takes one shape of an input and says so of others."""

    def attempt(inputs: dict[str, Any]) -> str:
        if tuple(inputs["x"].shape) != wanted:
            raise ValueError(message.format(*inputs["x"].shape))
        return "ran"

    return attempt


@pytest.mark.parametrize(
    ("message", "given", "wanted"),
    [
        ("length must be a multiple of `window * 2` (100), but got {2}.", (4, 8, 128), (4, 8, 200)),
        ("The size of tensor a ({2}) must match the size of tensor b (56)", (4, 8, 12), (4, 8, 56)),
        ("must be a 3D tensor of shape (batch, 2, width)", (4, 8), (4, 2, 8)),
        ("mat1 and mat2 shapes cannot be multiplied (32x{2} and 16x4)", (4, 8, 12), (4, 8, 16)),
    ],
)
def test_shapes_follow_what_is_said(
    message: str, given: tuple[int, ...], wanted: tuple[int, ...]
) -> None:
    repaired, result = with_repairs({"x": torch.randn(given)}, refusing(message, wanted))
    assert result == "ran" and tuple(repaired["x"].shape) == wanted


def test_what_cannot_be_put_right_is_told_as_it_was_first() -> None:
    with pytest.raises(ValueError, match="no help"):
        with_repairs({"x": torch.ones(2)}, refusing("no help", (3,)))


def test_masks_follow_the_length_of_what_they_mask() -> None:
    inputs = {"x": torch.randn(4, 8, 12), "x_mask": torch.ones(4, 12)}
    longer, _ = with_repairs(inputs, refusing("not divisible by 5, got {2}", (4, 8, 15)))
    assert longer["x_mask"].shape == (4, 15)
    wider, _ = with_repairs(inputs, refusing("shapes cannot be multiplied (32x12 and 9x1)", (4, 8, 9)))
    assert wider["x_mask"].shape == (4, 8)


MODEL = """
def outer(x, places=None, ignored=None):
    return inner(
        x,
        marks=places,
    )

def inner(x, marks=None):
    return marks.to(x)

class Part:
    def __init__(self, config):
        self.width = config.inner_width

    def use(self):
        return 2 * self.width
"""


def model_code() -> dict[str, Any]:
    """Functions that seem to come from a model of transformers."""
    file = "/transformers/models/made_up.py"
    lines = MODEL.splitlines(keepends=True)
    linecache.cache[file] = (len(MODEL), None, lines, file)
    names: dict[str, Any] = {}
    exec(compile(MODEL, file, "exec"), names)
    return names


def test_an_input_is_blamed_by_the_name_the_model_knows_it_by() -> None:
    outer = model_code()["outer"]
    with pytest.raises(AttributeError) as caught:
        outer(torch.ones(2))
    assert "places" in blamed_names(caught.value)
    asked: list[str] = []

    def further(name: str) -> Any:
        asked.append(name)
        return torch.ones(2) if name == "places" else None

    repaired, result = with_repairs({"x": torch.ones(2)}, lambda kwargs: outer(**kwargs), further)
    assert set(repaired) == {"x", "places"} and bool((result == 1).all())
    assert "ignored" not in asked


def test_a_field_is_blamed_for_what_was_read_from_it() -> None:
    class Config:
        inner_width = None

    part = model_code()["Part"](Config())
    with pytest.raises(TypeError) as caught:
        part.use()
    assert blamed_fields(caught.value) == ["inner_width"]


def test_words_stay_within_a_vocabulary_that_is_smaller_than_their_range() -> None:
    library = pytest.importorskip("transformers")
    config = library.BertConfig(
        vocab_size=40, hidden_size=8, num_attention_heads=2, num_hidden_layers=1, intermediate_size=8
    )
    made = next(candidate_inputs(library.BertModel(config), Wanted(4, 30, words=(10, 110))))
    assert int(made["input_ids"].min()) >= 10 and int(made["input_ids"].max()) < 40


class Part(nn.Module):
    """A layer that a condition shifts."""

    def forward(self, states: torch.Tensor, t_cond: torch.Tensor | None = None) -> torch.Tensor:
        assert t_cond is not None
        return states + t_cond


class Whole(nn.Module):
    """A model whose signature does not name the condition that its layers need."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(hidden_size=8)
        self.part = Part()

    def forward(self, states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        made: torch.Tensor = self.part(states, **kwargs)
        return made


def test_a_condition_that_only_parts_name_is_one_vector_for_each_sample() -> None:
    made = further_input(Whole(), Wanted(4, 10), "t_cond")
    assert made.shape == (4, 1, 8)
    assert Whole()(torch.zeros(4, 10, 8), t_cond=made).shape == (4, 10, 8)
    assert further_input(Whole(), Wanted(4, 10), "states_mask") is None
    assert further_input(Whole(), Wanted(4, 10), "other_cond") is None
