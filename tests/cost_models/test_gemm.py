"""Products in waves of tiles: near published measurements, and laws that any product obeys."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphpar.cost_models import gemm

A100_FLOPS_PER_S, A100_BYTES_PER_S, A100_MULTIPROCESSORS = 312e12 * 0.83, 2.039e12 * 0.83, 108
LAUNCH_S = 3e-6
SIZES = st.integers(64, 20_000)


def seconds(rows: int, columns: int, inner: int) -> float:
    return gemm.product_s(
        rows,
        columns,
        inner,
        1,
        flops_per_s=A100_FLOPS_PER_S,
        multiprocessors=A100_MULTIPROCESSORS,
        bytes_per_s=A100_BYTES_PER_S,
    )


@pytest.mark.parametrize(
    ("rows", "columns", "inner", "tflops"),
    [
        # float16 on A100-SXM-80GB: https://github.com/Azure/AI-benchmarking-guide/tree/main/Azure_Results
        (1024, 1024, 1024, 119.4),
        (2048, 2048, 2048, 221.8),
        (4096, 4096, 4096, 228.0),
        (8192, 8192, 8192, 253.7),
        (16384, 16384, 16384, 256.5),
        (1024, 2145, 1024, 132.8),
        (6144, 12288, 12288, 250.8),
        (802816, 192, 768, 157.8),
    ],
)
def test_products_take_about_what_was_measured(
    rows: int, columns: int, inner: int, tflops: float
) -> None:
    measured_s = 2 * rows * columns * inner / (tflops * 1e12)
    assert LAUNCH_S + seconds(rows, columns, inner) == pytest.approx(measured_s, rel=0.2)


@given(SIZES, SIZES, SIZES)
def test_no_product_beats_the_best_rate_and_more_work_never_takes_less(
    rows: int, columns: int, inner: int
) -> None:
    taken_s = seconds(rows, columns, inner)
    assert taken_s >= 2 * rows * columns * inner / A100_FLOPS_PER_S
    assert taken_s <= seconds(2 * rows, columns, inner)
    assert taken_s <= seconds(rows, 2 * columns, inner)
    assert taken_s == pytest.approx(seconds(columns, rows, inner))


def test_one_tile_too_many_costs_a_whole_wave() -> None:
    full = seconds(256 * 12, 128 * 9, 8192)  # 108 tiles of the largest kind
    assert seconds(256 * 12, 128 * 18, 8192) == pytest.approx(2 * full, rel=0.01)
    assert seconds(256 * 12 + 256, 128 * 9, 8192) > 1.1 * full
