"""The collection of plain torch models: those of its kinds that found most, over unlike workers."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import zoo_run


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("name", "batch"),
    [
        ("packed_tagger", "split"),
        ("fourier_operator", "split"),
        ("dgcnn", "split"),
        ("vq_vae_ema", "in step"),
        ("wide_and_deep", "in step"),
    ],
)
def test_models_that_found_something(name: str, batch: str) -> None:
    row = zoo_run.run(name, sizes=False)
    assert not row.failures
    assert row.batch == batch
