"""Products in 8 bits: what is rounded, that units and their emulation agree, and jobs that use them."""

import contextlib
import math
from dataclasses import replace

import pytest
import torch
from helpers import TRAINING, Forced, Line, force
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import graphpar
from graphpar.cost_models.group_times import OpTimes, TensorGroup
from graphpar.groups.modes import with_group_modes
from graphpar.planner import plan_of, price
from graphpar.precision.formats import Formats, labelled, rewritten_by_device
from graphpar.runtime import eight_bits
from graphpar.runtime.casts import LowerWeights
from graphpar.runtime.eight_bits import BACKWARD, FORWARD, EightBitProduct, EightBitWeights, scaled
from graphpar.verify import verify

SIZES = st.floats(2.0**-60, 2.0**60)


def matrix(rows: int, columns: int, seed: int, size: float = 1.0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * size


@given(st.integers(0, 10**6), SIZES, st.sampled_from((FORWARD, BACKWARD)))
@settings(max_examples=30, deadline=None)
def test_rounding_is_the_formats_own_and_scales_are_powers_of_two(
    seed: int, size: float, dtype: torch.dtype
) -> None:
    x = matrix(6, 5, seed, size)
    found = scaled(x, dtype)
    assert math.frexp(float(found.unit))[0] == 0.5
    back = found.numbers.double() * found.unit.double()
    roundoff = torch.finfo(dtype).eps / 2
    tiny = x.abs().double().max() * 2.0**-14
    assert (back - x.double()).abs().le(x.double().abs() * roundoff + tiny * roundoff).all()


@given(st.integers(0, 10**6), st.floats(1.0, 64.0))
@settings(max_examples=30, deadline=None)
def test_rounding_does_not_depend_on_the_company(seed: int, larger: float) -> None:
    """So microbatches and members of a group round as one device does."""
    x = matrix(3, 4, seed).clamp(min=0.05)
    alone = scaled(x, FORWARD)
    together = scaled(torch.cat([x, matrix(2, 4, seed + 1, larger)]), FORWARD)
    assert torch.equal(
        alone.numbers.float() * alone.unit, (together.numbers.float() * together.unit)[: len(x)]
    )


def exact(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    found = scaled(x, dtype)
    return found.numbers.double() * found.unit.double()


def multiplies_on_cpu() -> bool:
    """Whether this torch has units' product for CPUs too."""
    with contextlib.suppress(NotImplementedError):
        one = scaled(torch.ones(16, 16), FORWARD)
        eight_bits.multiplied(one, one, torch.bfloat16, by_units=True)
        return True
    return False


BY_UNITS = pytest.mark.skipif(
    not multiplies_on_cpu(), reason="this torch multiplies in 8 bits on CUDA only"
)


@pytest.mark.parametrize(
    "by_units", [False, pytest.param(True, marks=BY_UNITS)], ids=["emulated", "by units"]
)
@pytest.mark.parametrize("is_linear", [True, False])
@given(seed=st.integers(0, 10**6), rows=st.integers(1, 40), has_bias=st.booleans())
@settings(max_examples=10, deadline=None)
def test_products_are_those_of_the_rounded_operands(
    is_linear: bool, by_units: bool, seed: int, rows: int, has_bias: bool
) -> None:
    """Torch multiplies 8-bit numbers on a CPU too; there only for this test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eight_bits, "has_units", lambda device: by_units)
        x = matrix(rows, 32, seed).bfloat16().requires_grad_()
        weight = matrix(48, 32, seed + 1).bfloat16().requires_grad_()
        bias = (
            matrix(1, 48, seed + 2)[0].bfloat16().requires_grad_() if has_bias or not is_linear else None
        )
        product = EightBitProduct(EightBitWeights(LowerWeights()), is_linear=is_linear)
        result = product(x, weight, bias) if is_linear else product(bias, x, weight.t())
        gradient = matrix(rows, 48, seed + 3, 1e-4).bfloat16()
        result.backward(gradient)
    a, w, g = exact(x.detach(), FORWARD), exact(weight.detach(), FORWARD), exact(gradient, BACKWARD)
    wanted = a @ w.t() + (0 if bias is None else bias.detach().double())
    assert x.grad is not None and weight.grad is not None
    # One rounding to bfloat16, a second where a bias is added, and the order of float32's sums.
    room = 2.0**-8
    for got, expected in ((result.detach(), wanted), (x.grad, g @ w), (weight.grad, g.t() @ a)):
        assert (got.double() - expected).abs().max() <= 2 * room * expected.abs().max()
    if bias is not None:
        assert bias.grad is not None
        torch.testing.assert_close(bias.grad, gradient.sum(0))


def test_what_is_not_finite_stays_so() -> None:
    product = EightBitProduct(EightBitWeights(LowerWeights()), is_linear=True)
    x, weight = matrix(4, 16, 0).bfloat16(), matrix(16, 16, 1).bfloat16()
    for value in (math.inf, math.nan):
        x[1, 2] = value
        assert not torch.isfinite(product(x, weight)).all()
    assert torch.equal(product(torch.zeros_like(x), weight), torch.zeros_like(x))


@pytest.mark.parametrize("shape", [(4, 24, 16), (4, 16, 8), (0, 16, 16)])
def test_what_units_do_not_take_is_left_as_it_is(shape: tuple[int, int, int]) -> None:
    rows, inner, columns = shape
    product = EightBitProduct(EightBitWeights(LowerWeights()), is_linear=True)
    x, weight = matrix(rows, inner, 0), matrix(columns, inner, 1)
    assert torch.equal(product(x, weight), nn.functional.linear(x, weight))


def test_weights_are_rounded_once_a_step() -> None:
    lower = LowerWeights()
    weights = EightBitWeights(lower)
    weight = nn.Parameter(matrix(16, 16, 0))
    first = weights.of(lower.cast(weight, torch.bfloat16))
    assert weights.of(lower.cast(weight, torch.bfloat16)) is first
    with torch.no_grad():
        weight.mul_(3.0)
    again = weights.of(lower.cast(weight, torch.bfloat16))
    assert again is not first and not torch.equal(
        again.upright.numbers.float(), first.upright.numbers.float()
    )
    foreign = matrix(16, 16, 1).bfloat16()
    assert weights.of(foreign) is not weights.of(foreign), "memory that others may get is not remembered"


# --- jobs ---


class Residual(nn.Module):
    """A residual of two layers wide enough for units of 8 bits, and a head that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(32, 48), nn.Linear(48, 32), nn.Linear(32, 3)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = x + self.two(self.one(x).relu())
        return nn.functional.cross_entropy(self.head(x), y)


BATCH = (matrix(6, 32, 5), torch.tensor([0, 1, 2, 0, 1, 2]))


def in_format(forced: Forced, precision: str) -> Forced:
    """The same job with all stages in a format."""
    prepared, (pipeline,) = forced.prepared, forced.plan.partition.pipelines
    formats = Formats({d.name: (precision,) * len(prepared.chain.units) for d in forced.cluster.devices})
    stages = tuple(replace(s, precision=precision) for s in pipeline.stages)
    table = price(prepared, forced.cluster, train=TRAINING, calibration=None, formats=formats)
    groups = [r for s in stages for r in s.replicas if r.others]
    lower = rewritten_by_device(prepared.graph, prepared.chain, formats)
    table = with_group_modes(table, prepared.graph, forced.cluster, groups, None, TRAINING, lower)
    found = replace(forced.plan.partition, pipelines=(replace(pipeline, stages=stages),), shardings=())
    return replace(
        forced, plan=plan_of(prepared, forced.cluster, labelled(table, formats), found, train=TRAINING)
    )


@pytest.mark.distributed
@pytest.mark.parametrize(
    "line",
    [
        pytest.param(Line((1, (2, 1)), 3, cuts=(1,)), id="pipeline with replicas"),
        pytest.param(Line((1, 1), 2, cuts=(1,), groups=((0.5, 0.5), ())), id="tensor group"),
    ],
)
def test_jobs_give_one_devices_numbers(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut into stages, microbatches and shards, all sums are of the same rounded numbers."""
    monkeypatch.setattr(TensorGroup, "seconds", lambda self, name, num_bytes: 0.0)
    monkeypatch.setattr(OpTimes, "host_seconds", lambda self, name, num_bytes: 0.0)
    torch.manual_seed(0)
    model = Residual()
    single, parallel = (
        in_format(force(model, BATCH, lines=(how,)), "float8_e4m3fn") for how in (Line((1,)), line)
    )
    losses = []
    for forced in (single, parallel):
        with forced.start() as job:
            losses.append([float(job.step(*BATCH)) for _ in range(4)])
    with in_format(force(model, BATCH, lines=(Line((1,)),)), "float32").start() as job:
        wide = [float(job.step(*BATCH)) for _ in range(4)]
    assert losses[1] == pytest.approx(losses[0], rel=3e-3)
    assert losses[0] == pytest.approx(wide, rel=0.1) and losses[0] != wide
    assert losses[0][-1] < losses[0][0]


@pytest.mark.distributed
def test_compile_runs_8_bits_and_says_that_they_are_emulated() -> None:
    model, cluster = Residual(), {"devices": [{"kind": "cpu"}]}
    with graphpar.compile(model, cluster, BATCH, train=TRAINING, precision="float8_e4m3fn") as job:
        assert any("multiplies in float32" in note for note in job.plan.notes)
        assert torch.isfinite(job.step(*BATCH))
        report = verify(model, cluster, BATCH, train=TRAINING, plan=job.plan)
    assert report.equal
