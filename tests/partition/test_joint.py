"""Sharding and stages decided one after the other, against both at once, exactly."""

import runpy
from dataclasses import replace
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "joint_loss.py"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_what_deciding_apart_loses(seed: int) -> None:
    benchmark = runpy.run_path(str(BENCHMARK))
    found = benchmark["losses"](seed)
    if found is not None:
        fastest, either = found
        assert -1e-9 <= either <= fastest + 1e-9
    # With memory enough the fastest way of every block is the best: neither steps nor bounds differ.
    table, every = benchmark["drawn"](seed)
    roomy = tuple(replace(c, memory_bytes=100 * c.memory_bytes) for c in table.device_classes)
    table, blocks = replace(table, device_classes=roomy), benchmark["BLOCKS"]
    ways = [every[:blocks], every[blocks:]]
    fastest_alone = [[[own[0]] for own in row] for row in ways]
    assert benchmark["step_s"](table, fastest_alone) == pytest.approx(benchmark["step_s"](table, ways))
