"""What members of a tensor group compute whole is told, with its place and the reason."""

import pytest
import torch
from helpers import Line, force
from torch import nn

from graphpar.cost_models.group_times import OpTimes, TensorGroup
from graphpar.cost_models.whole_ops import UNKNOWN
from graphpar.view.build import view_of


class Odd(nn.Module):
    """A layer that no rule knows, and a last one of fewer columns than the group has members."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.out = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 1)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        h = self.down(torch.relu(self.up(x))).view(-1, 8, 2, 2)
        h = nn.functional.pixel_shuffle(h, 2).flatten(1)
        result: torch.Tensor = nn.functional.mse_loss(self.out(h), y)
        return result


def test_an_op_without_a_rule_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TensorGroup, "seconds", lambda self, name, num_bytes: 0.0)
    monkeypatch.setattr(OpTimes, "host_seconds", lambda self, name, num_bytes: 0.0)
    batch = torch.randn(2, 32), torch.randn(2, 1)
    forced = force(Odd(), batch, lines=(Line((1,), groups=((0.4, 0.3, 0.3),)),))
    (sharding,) = forced.plan.partition.shardings
    (unknown,) = (whole for whole in sharding.whole if whole.reason == UNKNOWN)
    assert unknown.target == "aten.pixel_shuffle.default" and unknown.count == 1 and unknown.seconds > 0
    assert "test_whole_ops.py:2" in unknown.source
    cut = {name for name, number in sharding.chosen.items() if sharding.strategies[number].shares}
    assert {"linear", "linear_1"} <= cut
    told = "every member of the tensor group computes aten.pixel_shuffle.default"
    assert told in str(forced.plan) and any(told in note for note in view_of(forced.plan).notes)
    assert type(forced.plan).from_json(forced.plan.to_json()).partition == forced.plan.partition
