"""Tensor groups in running jobs: the numbers of one device, whatever the widths and shares."""

import pytest
import torch
from helpers import Line, check_training
from torch import nn

from graphpar.cost_models.sharding import TensorGroup

pytestmark = pytest.mark.distributed


@pytest.fixture(autouse=True)
def free_links(monkeypatch: pytest.MonkeyPatch) -> None:
    """Links that cost nothing, so that small models are cut wherever they can be."""
    monkeypatch.setattr(TensorGroup, "seconds", lambda self, name, num_bytes: 0.0)


class Mlp(nn.Module):
    """Two layers, dropout and a loss."""

    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        self.up, self.down, self.out = nn.Linear(12, 20), nn.Linear(20, 12), nn.Linear(12, 6)
        self.drop = nn.Dropout(drop)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        h = x + self.drop(self.down(torch.relu(self.drop(self.up(x)))))
        result: torch.Tensor = nn.functional.cross_entropy(self.out(h), y)
        return result


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(8, 12), torch.randint(0, 6, (8,))


UNEVEN = (0.6, 0.4)
ALONE: tuple[float, ...] = ()
CASES = {
    "two": (Line((1,), 2, groups=(UNEVEN,)),),
    "three": (Line((1,), 1, groups=((0.5, 0.3, 0.2),)),),
    "group, then a slow device": (Line((1, 1), 2, cuts=(1,), groups=(UNEVEN, ALONE)),),
    "a slow device, then a group": (Line((1, 1), 2, cuts=(1,), groups=(ALONE, UNEVEN)),),
    "widths 2 and 3": (Line((1, 1), 2, cuts=(1,), groups=(UNEVEN, (0.4, 0.3, 0.3))),),
    "two groups take turns": (Line((2,), 3, groups=(UNEVEN,)),),
    "tensor x pipeline x data": (Line((2, 2), 4, cuts=(1,), groups=((0.5, 0.5), (0.5, 0.5))),),
    "side by side, unlike": (
        Line((1,), 1, samples=4, groups=(UNEVEN,)),
        Line((1,), 2, samples=4, groups=((0.3, 0.3, 0.4),)),
    ),
    "group beside one device": (Line((1,), 1, 4, groups=(UNEVEN,)), Line((1,), 2, 4)),
}


@pytest.mark.parametrize("lines", CASES.values(), ids=CASES.keys())
def test_training(lines: tuple[Line, ...]) -> None:
    check_training(Mlp(0.2), batch(), lines=lines)
