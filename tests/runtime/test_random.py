"""Keyed random numbers: the same whatever the split, and as random as they should be."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from hypothesis import given, settings
from hypothesis import strategies as st
from one_device import ready
from torch import Tensor, nn

from graphpar.runtime.own_ops import Attention, Bernoulli, Dropout, Random, Share
from graphpar.runtime.random import Layout, StepContext, keep_factors, normal, random_bits, uniform

CPU = torch.device("cpu")
SHAPE = torch.Size((64, 1024))


def bits(stream: int = 0, shape: torch.Size = SHAPE, **where: int) -> Tensor:
    return random_bits(shape, stream, StepContext(**where), None, CPU)


@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=4),
    st.lists(st.integers(1, 3), max_size=2),
    st.lists(st.integers(1, 3), max_size=2),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(0, 2**40),
)
@settings(max_examples=80, deadline=None)
def test_parts_draw_what_the_whole_draws(
    parts: list[int], before: list[int], after: list[int], outer: int, inner: int, seed: int
) -> None:
    batch, dim = sum(parts), len(before)
    layout = Layout(dim, outer, inner)

    def draw(first: int, samples: int) -> Tensor:
        shape = torch.Size((*before, outer * samples * inner, *after))
        context = StepContext(seed, 3, batch, first, samples)
        made = random_bits(shape, 5, context, layout, CPU)
        return made.view(*before, outer, samples, inner, *after)

    starts = [sum(parts[:i]) for i in range(len(parts))]
    joined = torch.cat([draw(a, n) for a, n in zip(starts, parts, strict=True)], dim + 1)
    assert torch.equal(joined, draw(0, batch))


def test_shared_tensors_do_not_depend_on_the_split() -> None:
    assert torch.equal(bits(batch=8, samples=8), bits(batch=8, samples=2, first_sample=4))
    assert bits(shape=torch.Size(())).shape == () and bits(shape=torch.Size((0, 3))).shape == (0, 3)


def test_every_key_draws_another_tensor() -> None:
    base = bits(seed=1, step=1, stream=1)
    for other in (
        bits(seed=2, step=1, stream=1), bits(seed=1, step=2, stream=1), bits(seed=1, step=1, stream=2),
        bits(seed=1 + 2**32, step=1, stream=1), bits(seed=-1, step=1, stream=1),
    ):  # fmt: skip
        assert float((base == other).double().mean()) < 1e-3
    assert torch.equal(base, bits(seed=1, step=1, stream=1))


def correlation(a: Tensor, b: Tensor) -> float:
    """Of two sets of signs; the standard error over n pairs is 1 / sqrt(n)."""
    return float((a.double() * b.double()).mean())


@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_bits_are_uncorrelated(seed: int) -> None:
    def signs(**where: int) -> Tensor:
        stream = where.pop("stream", 0)
        return (bits(stream, SHAPE, seed=seed, **where) >= 0).double() * 2 - 1

    base = signs()
    limit = 4.5 / math.sqrt(base.numel())
    assert abs(float(base.mean())) < limit
    for shift in (1, 2, 7, 32):
        assert abs(correlation(base[:, shift:], base[:, :-shift])) < limit * 1.2
        assert abs(correlation(base[shift:], base[:-shift])) < limit * 1.5
    for other in (signs(stream=1), signs(step=1), signs(stream=2, step=1)):
        assert abs(correlation(base, other)) < limit
        assert abs(correlation(base[1:], other[:-1])) < limit * 1.2
    rows = base.mean(1) * math.sqrt(base.shape[1])
    columns = base.mean(0) * math.sqrt(base.shape[0])
    assert float(rows.abs().max()) < 4.5 and float(columns.abs().max()) < 5
    assert 0.5 < float(rows.var()) < 1.6 and 0.85 < float(columns.var()) < 1.15


@pytest.mark.parametrize("bit", [0, 1, 7, 15, 16, 24, 31])
def test_each_bit_is_fair(bit: int) -> None:
    ones = ((bits(seed=3) >> bit) & 1).double().mean()
    assert abs(float(ones) - 0.5) < 4.5 * 0.5 / math.sqrt(SHAPE.numel())


@pytest.mark.parametrize("drop", [0.0, 0.001, 0.1, 0.5, 0.9, 1.0])
def test_masks_keep_the_share_asked_for(drop: float) -> None:
    factors = keep_factors(SHAPE, drop, 1, StepContext(7), None, CPU, torch.float64)
    kept = float((factors > 0).double().mean())
    assert abs(kept - (1 - drop)) <= 4.5 * math.sqrt(drop * (1 - drop) / SHAPE.numel())


def distance(sample: Tensor, distribution: Tensor) -> float:
    """Largest difference between the empirical distribution and the given one (Kolmogorov, Smirnov)."""
    steps = torch.arange(1, sample.numel() + 1, dtype=torch.float64) / sample.numel()
    return float((distribution - steps).abs().max())


def test_uniform_and_normal_numbers_are_distributed_so() -> None:
    critical = 1.95 / math.sqrt(SHAPE.numel())  # significance 0.001, and the seeds are fixed
    flat = uniform(SHAPE, 2, StepContext(1), None, CPU).double().flatten().sort().values
    assert float(flat[0]) >= 0 and float(flat[-1]) < 1
    assert distance(flat, flat) < critical
    bell = normal(SHAPE, 2, StepContext(1), None, CPU).double().flatten().sort().values
    assert bool(torch.isfinite(bell).all())
    assert distance(bell, torch.special.ndtr(bell)) < critical
    other = normal(SHAPE, 3, StepContext(1), None, CPU).double().flatten()
    unsorted = normal(SHAPE, 2, StepContext(1), None, CPU).double().flatten()
    assert abs(float((other * unsorted).mean())) < 4.5 / math.sqrt(SHAPE.numel())


def test_dropout_scales_what_it_keeps() -> None:
    x = torch.rand(32, 64) + 1
    y = Dropout(StepContext(1), 0, None)(x, 0.25, False)
    kept = y != 0
    torch.testing.assert_close(y[kept], x[kept] / 0.75)
    assert 0.65 < float(kept.double().mean()) < 0.85
    assert not Dropout(StepContext(1), 0, None)(x, 1.0, False).any()


def test_channels_drop_together() -> None:
    y = Dropout(StepContext(1, batch=8, samples=8), 0, Layout(0))(torch.ones(8, 16, 5, 3), 0.5, True)
    assert torch.equal(y, y[:, :, :1, :1].expand_as(y)) and 0 < float((y == 0).double().mean()) < 1


def test_coins_follow_their_chances() -> None:
    chances = torch.tensor([0.0, 0.2, 0.8, 1.0]).repeat(2000, 1)
    drawn = Bernoulli(StepContext(1), 0, None)(chances, chances)
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    assert (drawn.mean(0) - chances[0]).abs().max() < 4.5 * 0.4 / math.sqrt(2000)
    assert abs(float(Bernoulli(StepContext(1), 0, None)(chances, 0.3).mean()) - 0.3) < 0.03


def test_random_tensors_have_the_type_asked_for() -> None:
    made = Random(StepContext(1), 0, None)("normal", (3, 4), torch.float64, CPU)
    assert made.shape == (3, 4) and made.dtype == torch.float64


def test_a_share_is_the_part_of_the_batch() -> None:
    assert float(Share(StepContext(batch=8, samples=2))(torch.tensor(4.0))) == 1.0


@pytest.mark.parametrize("mask", ["none", "causal", "bool", "float"])
@pytest.mark.parametrize("heads", [4, 2])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention_without_dropout_is_torchs(mask: str, heads: int, scale: float | None) -> None:
    query = torch.randn(3, 4, 5, 8)
    key, value = torch.randn(3, heads, 6, 8), torch.randn(3, heads, 6, 8)
    given = None
    if mask == "bool":
        given = torch.rand(3, 1, 5, 6) > 0.3
        given[..., 0] = True
    elif mask == "float":
        given = torch.randn(5, 6)
    arguments = (query, key, value, given, 0.0, mask == "causal")
    grouped = heads != 4
    own = Attention(StepContext(1), 0, None)(*arguments, scale, grouped)
    wanted = F.scaled_dot_product_attention(*arguments, scale=scale, enable_gqa=grouped)
    torch.testing.assert_close(own, wanted)


def test_attention_with_dropout_keeps_the_mean() -> None:
    query, key, value = (torch.randn(1, 2, 4, 8) for _ in range(3))
    wanted = F.scaled_dot_product_attention(query, key, value)
    arguments = (query, key, value, None, 0.3, False, None, False)
    drawn = torch.stack([Attention(StepContext(1, step), 0, None)(*arguments) for step in range(1000)])
    error = drawn.std(0) / math.sqrt(len(drawn))
    assert bool(((drawn.mean(0) - wanted).abs() < 5 * error + 1e-6).all())


@pytest.mark.parametrize(
    ("draw", "mean", "deviation"),
    [
        (lambda x: torch.empty_like(x).uniform_(-1, 3), 1.0, 4 / 12**0.5),
        (lambda x: torch.empty_like(x).normal_(2, 0.5), 2.0, 0.5),
        (lambda x: torch.normal(2.0, 0.5, x.shape), 2.0, 0.5),
        (lambda x: torch.empty_like(x).exponential_(4.0), 0.25, 0.25),
        (lambda x: torch.randint(3, 7, x.shape).float(), 4.5, 1.118),
        (lambda x: torch.randint(5, x.shape).float(), 2.0, 2**0.5),
        (lambda x: torch.randint_like(x, 5), 2.0, 2**0.5),
        (lambda x: torch.randint_like(x, 3, 7), 4.5, 1.118),
    ],
)
def test_random_tensors_have_their_distribution_in_any_parts(
    draw: Callable[[Tensor], Tensor], mean: float, deviation: float
) -> None:
    class Drawing(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return draw(x) + 0 * x

    model, x = Drawing(), torch.zeros(6, 5000)
    made = ready(model, (x,), loss=None)
    assert not made.reason
    (whole,) = made.device(seed=1).forward((x,), {})
    assert float(whole.mean()) == pytest.approx(mean, abs=0.04 * max(deviation, 1))
    assert float(whole.std()) == pytest.approx(deviation, rel=0.04)
    device = made.device(seed=1)
    context, builder = device._context, device._builder
    context.batch, parts = 6, []
    for first, size in ((0, 2), (2, 4)):
        context.first_sample, context.samples = first, size
        _, (part,) = builder.module(size, 6)(x[first : first + size])
        parts.append(part)
    assert torch.equal(torch.cat(parts), whole)
