"""Products in 8 bits on a GPU that has units for them: the emulation's numbers, and a job with them."""

from functools import partial

import pytest
import torch
from torch import nn

import graphpar
from graphpar.runtime.casts import LowerWeights
from graphpar.runtime.eight_bits import (
    BACKWARD,
    FORWARD,
    EightBitProduct,
    EightBitWeights,
    has_units,
    multiplied,
    scaled,
)
from graphpar.training import Training

GPU = torch.device("cuda:0") if torch.cuda.is_available() else None
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(GPU is None, reason="no CUDA device"),
    pytest.mark.skipif(
        GPU is not None and not has_units(GPU), reason="the CUDA device has no 8-bit units (needs 8.9)"
    ),
]


def matrix(rows: int, columns: int, seed: int, size: float = 1.0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * size


@pytest.mark.parametrize("dtype", [FORWARD, BACKWARD])
def test_a_gpu_rounds_as_a_cpu_does(dtype: torch.dtype) -> None:
    for size in (1e-20, 1e-3, 1.0, 1e4):
        x = matrix(37, 64, 0, size).bfloat16()
        here, there = scaled(x, dtype), scaled(x.to("cuda"), dtype)
        assert float(here.unit) == float(there.unit)
        assert torch.equal(here.numbers.float(), there.numbers.float().cpu())


@pytest.mark.parametrize("sizes", [(16, 16, 16), (37, 64, 48), (1, 128, 256), (512, 1024, 768)])
@pytest.mark.parametrize("kind", [FORWARD, BACKWARD])
def test_units_give_the_emulations_products(sizes: tuple[int, int, int], kind: torch.dtype) -> None:
    rows, inner, columns = sizes
    left = scaled(matrix(rows, inner, 0).bfloat16().to("cuda"), kind)
    right = scaled(matrix(columns, inner, 1).bfloat16().to("cuda"), FORWARD)
    got = multiplied(left, right, torch.bfloat16, by_units=True)
    wanted = multiplied(left, right, torch.bfloat16, by_units=False)
    # One place of bfloat16 for the order of sums.
    assert (got.float() - wanted.float()).abs().max() <= 2.0**-7 * wanted.float().abs().max()


@pytest.mark.parametrize("is_linear", [True, False])
@pytest.mark.parametrize("rows", [37, 512])
def test_gradients_are_the_emulations(is_linear: bool, rows: int) -> None:
    """With rows that are no multiple of 16 too, which the gradient of a weight is summed over."""
    found = []
    for where in ("cpu", "cuda"):
        x, weight, bias = (
            t.bfloat16().to(where).requires_grad_()
            for t in (matrix(rows, 128, 0), matrix(96, 128, 1), matrix(1, 96, 2)[0])
        )
        product = EightBitProduct(EightBitWeights(LowerWeights()), is_linear=is_linear)
        result = product(x, weight, bias) if is_linear else product(bias, x, weight.t())
        result.backward(matrix(rows, 96, 3, 1e-3).bfloat16().to(where))
        found.append([result.detach(), *(t.grad for t in (x, weight, bias))])
    for here, there in zip(*found, strict=True):
        assert here is not None and there is not None
        off = (here.float() - there.float().cpu()).norm() / here.float().norm()
        assert float(off) < 2.0**-8


class Blocks(nn.Module):
    """Residual perceptrons, wide enough for 8-bit units, with a head that is not."""

    def __init__(self, width: int = 128, layers: int = 3) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers))
        self.up = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(layers))
        self.down = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(layers))
        self.head = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        for norm, up, down in zip(self.norms, self.up, self.down, strict=True):
            x = x + down(nn.functional.gelu(up(norm(x))))
        return nn.functional.cross_entropy(self.head(x), y)


def losses(kind: str, precision: str) -> list[float]:
    """Of five steps on one device."""
    torch.manual_seed(0)
    model = Blocks()
    batch = (matrix(32, 128, 7), torch.arange(32) % 10)
    training = Training(optimizer=partial(torch.optim.SGD, lr=0.1))
    cluster = {"devices": [{"kind": kind}]}
    with graphpar.compile(model, cluster, batch, train=training, precision=precision) as job:
        formats = {f for p in job.plan.partition.pipelines for s in p.stages for f in s.formats}
        assert formats == {precision}
        return [float(job.step(*batch)) for _ in range(5)]


@pytest.mark.distributed
def test_a_job_on_the_gpu_gives_the_emulations_losses() -> None:
    on_gpu = losses("h100-sxm-80gb", "float8_e4m3fn")
    emulated, wide = losses("cpu", "float8_e4m3fn"), losses("cpu", "float32")
    assert on_gpu == pytest.approx(emulated, rel=5e-3)
    assert on_gpu == pytest.approx(wide, rel=0.05) and on_gpu != wide
    assert on_gpu[-1] < on_gpu[0]
