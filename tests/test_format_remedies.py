"""A model too large in float32 is told the lower formats in which it would fit, and does fit there."""

from typing import Any

import pytest
import torch
from torch import nn

import graphpar
from graphpar.errors import InfeasibleError


class Wide(nn.Module):
    """Activations far larger than weights: what a lower format halves."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 4096), nn.Linear(4096, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = self.last(self.first(x).tanh()).sum()
        return loss


def cluster(memory_bytes: float) -> dict[str, Any]:
    kind = {
        "name": "small",
        "peak_flops_per_s": {"float32": 1e12, "bfloat16": 2e12, "float16": 2e12},
        "memory_bytes": memory_bytes,
        "memory_bytes_per_s": 1e11,
        "family": "ampere",
    }
    return {"devices": [{"kind": kind, "count": 1}]}


def planned(memory_bytes: float, precision: str) -> graphpar.Plan:
    return graphpar.plan(
        Wide(),
        cluster(memory_bytes),
        (torch.randn(1, 4096, 8),),
        train=graphpar.Training(optimizer=lambda p: torch.optim.SGD(p, lr=0.1)),
        precision=precision,
    )


def peak_bytes(precision: str, memory_bytes: float = 1e12) -> float:
    (peak,) = planned(memory_bytes, precision).partition.peak_bytes.values()
    return peak


def test_a_lower_format_is_among_the_remedies() -> None:
    # One sample in one microbatch on one device: nothing but the format can make it smaller.
    whole, half = peak_bytes("float32"), peak_bytes("bfloat16")
    assert half < whole
    between = (half + whole) / 2
    with pytest.raises(InfeasibleError) as caught:
        planned(between, "float32")
    assert 'precision="bfloat16"' in str(caught.value)
    assert peak_bytes("bfloat16", between) <= between
