"""Sharding and stages decided one after the other, against both at once, exactly."""

import runpy
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "joint_loss.py"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_what_deciding_apart_loses(seed: int) -> None:
    losses = runpy.run_path(str(BENCHMARK))["losses"]
    found = losses(seed)
    if found is not None:
        fastest, either = found
        assert -1e-9 <= either <= fastest + 1e-9
    # With memory enough the fastest way of every block is the best: nothing is lost.
    assert losses(seed, 100.0) == pytest.approx((0.0, 0.0), abs=1e-9)
