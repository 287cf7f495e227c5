"""Measuring: the pieces, at sizes that take no time."""

import pytest
import torch
from helpers import force, straight
from torch import nn

from graphpar import Training
from graphpar.cost_models.memory import CPU_RESERVED_BYTES
from graphpar.cost_models.pointwise import _CURVES, ACTIVATIONS
from graphpar.cost_models.work import MEMORY_CURVES
from graphpar.local import measure, probes
from graphpar.local.worker_memory import measure_worker_bytes


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


@pytest.mark.slow
@pytest.mark.distributed
def test_workers_hold_what_their_tensors_and_an_empty_worker_take() -> None:
    # Large tensors of few sizes: where a heap has holes that none of them fits into, they are large.
    layers = (nn.Sequential(nn.Linear(512, 2048), nn.GELU(), nn.Linear(2048, 512)) for _ in range(4))
    model = nn.Sequential(*layers)
    batch = (torch.randn(64, 512), torch.randn(64, 512))
    empty_bytes = measure_worker_bytes()
    training = Training(optimizer=torch.optim.AdamW, loss=nn.functional.mse_loss)
    job = force(model, batch, lines=straight(2, microbatches=4), train=training)
    with job.start() as running:
        for _ in range(8):
            running.step(*batch)
        assert running.last_step is not None
        peaks = [report.peak_bytes for report in running.last_step.reports]
        expected = running.plan.predicted_peak_bytes.values()
    ratios = [
        (peak - empty_bytes) / (predicted - CPU_RESERVED_BYTES)
        for peak, predicted in zip(peaks, expected, strict=True)
    ]
    assert all(0.85 < ratio < 1.15 for ratio in ratios), ratios


def test_times_are_positive_and_grow() -> None:
    small, large = torch.zeros(100), torch.zeros(1_000_000)
    assert 0 < measure.time_of(lambda: small + 1, 1e-3) < measure.time_of(lambda: large + 1, 1e-3)


def test_curve_names_of_memory_kernels_agree() -> None:
    assert {n.removesuffix("_bfloat16") for n in probes.BYTES_PER_ELEMENT} == MEMORY_CURVES
