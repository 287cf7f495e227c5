"""Measuring: the pieces, at sizes that take no time."""

import pytest
import torch

from graphpar import measure, probes
from graphpar.cost_models.pointwise import _CURVES, ACTIVATIONS
from graphpar.cost_models.work import MEMORY_CURVES


def test_every_kernel_the_rules_name_is_measured() -> None:
    measured = {*probes.KERNELS, "view", "adamw", "sgd"}
    wanted = {_CURVES[name] for name in ACTIVATIONS} | {
        "pointwise", "accumulate", "copy", "fill", "reduce", "dropout", "softmax",
        "softmax_backward", "layer_norm", "layer_norm_backward", "cross_entropy",
        "cross_entropy_backward", "embedding", "embedding_backward",
    }  # fmt: skip
    assert wanted <= measured
    assert {f"{_CURVES[n]}_backward" for n in ACTIVATIONS} - measured == {"exp_backward"}


def test_every_kind_of_point_can_be_set_up_and_run() -> None:
    # Large points run the same code as their smaller neighbours.
    small = [point for point in measure._points() if point.num_bytes < 8e6]
    assert {point.key[0] for point in small} == {point.key[0] for point in measure._points()}
    with torch.no_grad():
        for point in small:
            measure._rotated(point.make, 1e7)()


@pytest.mark.slow
@pytest.mark.distributed
def test_loopback_is_measured_between_processes() -> None:
    loopback = measure.measure_loopback()
    assert 1e-6 < loopback.link.latency_s < 1
    assert loopback.link.bytes_per_s > 1e6
    assert 0 <= loopback.sum_s_per_byte < 1e-6


def test_times_are_positive_and_grow() -> None:
    small, large = torch.zeros(100), torch.zeros(1_000_000)
    assert 0 < measure.time_of(lambda: small + 1, 1e-3) < measure.time_of(lambda: large + 1, 1e-3)


def test_curve_names_of_memory_kernels_agree() -> None:
    assert {n.removesuffix("_bfloat16") for n in probes.BYTES_PER_ELEMENT} == MEMORY_CURVES
