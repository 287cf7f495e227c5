"""Which format runs where, and what is refused."""

import pytest
import torch
from torch import nn

import graphpar
from graphpar.errors import ClusterError

MODEL = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
ARGS = (torch.randn(4, 8),)


def plan(kind: str, precision: str, count: int = 1) -> graphpar.Plan:
    return graphpar.plan(MODEL, {"devices": [{"kind": kind, "count": count}]}, ARGS, precision=precision)


@pytest.mark.parametrize(
    ("asked", "meant"),
    [("bf16", "bfloat16"), ("fp16", "float16"), ("bfloat", "bfloat16"), ("float8", "float8_e4m3fn")],
)
def test_unknown_precision(asked: str, meant: str) -> None:
    with pytest.raises(ValueError, match=rf"Unknown precision '{asked}'.*Did you mean '{meant}'"):
        plan("cpu", asked)


def test_a_format_no_device_has() -> None:
    with pytest.raises(ClusterError, match=r"no device of the cluster computes in it.*float16"):
        plan("v100-sxm2-32gb", "bfloat16")
    with pytest.raises(ClusterError, match="'float16': no device"):
        plan("gaudi2", "float16")
    with pytest.raises(ClusterError, match="'float8_e4m3fn': no device"):
        plan("a100-sxm-80gb", "float8_e4m3fn")


@pytest.mark.parametrize("kind", ["h100-sxm-80gb", "v100-sxm2-32gb", "t4"])
def test_a_lower_format_is_predicted_to_help_large_products(kind: str) -> None:
    model = nn.Sequential(
        nn.Linear(4096, 4096, device="meta"), nn.ReLU(), nn.Linear(4096, 4096, device="meta")
    )
    args = (torch.empty(512, 4096, device="meta"),)
    times = {
        precision: graphpar.plan(
            model, {"devices": [{"kind": kind}]}, args, precision=precision
        ).predicted_step_s
        for precision in ("float32", "float16")
    }
    assert times["float16"] < times["float32"] / 2


def test_eight_bits_are_predicted_to_help_large_products() -> None:
    with torch.device("meta"):
        model, args = (
            nn.Sequential(nn.Linear(8192, 8192), nn.ReLU(), nn.Linear(8192, 8192)),
            torch.empty(8192, 8192),
        )
    cluster = {"devices": [{"kind": "h100-sxm-80gb"}]}
    times = {
        precision: graphpar.plan(model, cluster, (args,), precision=precision).predicted_step_s
        for precision in ("bfloat16", "float8_e4m3fn")
    }
    assert times["float8_e4m3fn"] < times["bfloat16"]


def test_float32_plans_are_what_they_were() -> None:
    """Nothing of the lower formats touches a plan that asks for none."""
    made = plan("h100-sxm-80gb", "float32", count=2)
    assert {s.precision for p in made.partition.pipelines for s in p.stages} == {"float32"}
    assert made.notes == ()
