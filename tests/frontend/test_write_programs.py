"""Random programs of views and writes in place: the graph's numbers and gradients are eager's."""

import random
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from one_device import Calls, assert_as_eager
from torch import Tensor

X, Y = torch.randn(4, 4), torch.tensor([0, 1, 2, 3])
View = Callable[[random.Random, Tensor, int], Tensor]
VIEWS: tuple[View, ...] = (
    lambda draw, x, d: x.narrow(d, draw.randrange(x.shape[d]), 1),
    lambda draw, x, d: x.select(d, draw.randrange(x.shape[d])) if x.ndim > 1 else x[1:],
    lambda draw, x, d: x.transpose(0, x.ndim - 1),
    lambda draw, x, d: x.diagonal(0, 0, 1) if x.ndim > 1 else x[:2],
    lambda draw, x, d: x.view(-1) if x.is_contiguous() else x,
    lambda draw, x, d: x.unsqueeze(d),
)
PARTS: tuple[View, ...] = (
    lambda draw, x, d: draw.choice(x.unbind(d)) if x.ndim > 1 else x,
    lambda draw, x, d: draw.choice(torch.split(x, 1, d)),
)
"""Of what wants no gradient, for torch allows no writes beside them otherwise."""


def written(draw: random.Random, x: Tensor) -> list[Tensor]:
    """A value and views of it, of which some were written to; all see what was written."""
    values, views = [x], VIEWS if x.requires_grad else VIEWS + PARTS
    for _ in range(draw.randint(3, 8)):
        value = draw.choice(values)
        if draw.random() < 0.55 and value.numel() > 1:
            values.append(draw.choice(views)(draw, value, draw.randrange(value.ndim)))
        else:
            draw.choice((lambda v: v.add_(1.5), lambda v: v.mul_(3.0), lambda v: v.sub_(0.25)))(value)
    return [v for v in values if v.numel()]


@pytest.mark.slow
@settings(max_examples=2, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_programs_of_views_and_writes_have_eagers_numbers(seed: int) -> None:
    def run(s: Calls, h: Tensor, y: Tensor) -> Tensor:
        draw, total = random.Random(seed), h.new_zeros(())
        for number in range(10):
            x = h * s.vector if number % 2 else h.detach() * 2
            for place, value in enumerate(written(draw, x)):
                total = total + (value * (place + 1) * s.vector[0]).pow(2).mean()
        return total

    assert_as_eager(Calls(run), (X, Y))
