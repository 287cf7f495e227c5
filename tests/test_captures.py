"""Tests share a capture of equal models alone, and none that was changed since."""

from copy import deepcopy

import torch
from captures import prepared_once
from helpers import TRAINING
from torch import nn


class Scaled(nn.Module):
    """A layer, a constant and a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.drop, self.scale = nn.Linear(3, 3), nn.Dropout(0.5), torch.full((3,), 2.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = (self.drop(self.layer(x)) * self.scale).square().mean()
        return result


def test_only_what_is_equal_shares_a_capture() -> None:
    model, x = Scaled(), torch.randn(2, 3)
    first = prepared_once(model, (x,), {}, TRAINING)
    assert prepared_once(deepcopy(model), (x.clone(),), {}, TRAINING) is first
    with torch.no_grad():
        assert prepared_once(model, (x,), {}, TRAINING) is not first
    others = [deepcopy(model) for _ in range(4)]
    others[0].layer.weight.data += 1
    others[1].drop.p = 0.25
    others[2].layer.bias.requires_grad_(False)
    others[3].eval()
    for other in others:
        assert prepared_once(other, (x,), {}, TRAINING) is not first
    assert prepared_once(model, (x + 1,), {}, TRAINING) is not first
    equal = deepcopy(model)
    (constant,) = first.captured.constants.values()
    constant += 1
    assert prepared_once(equal, (x,), {}, TRAINING) is not first
