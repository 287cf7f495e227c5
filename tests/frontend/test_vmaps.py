"""`torch.vmap` in a model: captured as batched operators, with eager's numbers whole and in parts."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from hypothesis import given, settings
from hypothesis import strategies as st
from one_device import Calls, assert_as_eager, assert_close, eagerly, in_parts, ready
from torch import Tensor, nn

from graphpar.errors import CaptureError

X, Y = torch.randn(4, 4), torch.tensor([0, 1, 2, 3])


def layers(s: Calls, h: Tensor, y: Tensor) -> Any:
    norm = F.layer_norm
    made = torch.vmap(lambda v: torch.softmax(s.linear(norm(v, (4,), s.vector)), -1))(h)
    return F.cross_entropy(made, y)


def mask_by_index(s: Calls, h: Tensor, y: Tensor) -> Any:
    """As transformers makes masks: a function of four indices, with tables it holds."""
    batch, keys = torch.arange(h.shape[0]), torch.arange(4)
    real, groups = h > -0.5, torch.tensor([0, 0, 1, 1])

    def allowed(b: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        same = groups[q] == groups[k]
        return ((k <= q) | same) & real[b, k] & (head >= 0)

    mask: Any = allowed
    for place in (3, 2, 1, 0):
        mask = torch.vmap(mask, in_dims=tuple(0 if i == place else None for i in range(4)), out_dims=0)
    chosen = mask(batch, torch.arange(1), keys, keys)
    scores = (h[:, :, None] * h[:, None, :])[:, None].masked_fill(~chosen, -1e9)
    return F.cross_entropy(torch.softmax(scores, -1).sum((1, 2)) @ s.table[:4], y)


def no_gradient_inside(s: Calls, h: Tensor, y: Tensor) -> Any:
    def one(v: Tensor, w: Tensor) -> Tensor:
        with torch.no_grad():
            kept = (v * w).exp()
        return v * kept + w

    return torch.vmap(one, in_dims=(0, None))(h, s.vector).square().mean()


def inside_no_gradient(s: Calls, h: Tensor, y: Tensor) -> Any:
    with torch.no_grad():
        scale = torch.vmap(lambda v: v.norm())(h)
    return (h * scale[:, None]).square().mean()


def written_in_place(s: Calls, h: Tensor, y: Tensor) -> Any:
    def one(v: Tensor) -> Tensor:
        made = torch.zeros_like(v)
        made[1:] += v[:-1] * s.vector[1:]
        return made.mul_(2)

    return torch.vmap(one)(h).square().mean()


def over_experts(s: Calls, h: Tensor, y: Tensor) -> Any:
    """Mapped over weights instead of samples, twice in a row, in pieces."""
    weights = s.table[:12].view(3, 4, 4)
    made = torch.vmap(lambda w: torch.tanh(h @ w), out_dims=1)(weights)
    again = torch.vmap(lambda v, w: v @ w, in_dims=(1, 0), out_dims=2, chunk_size=2)(made, weights)
    return F.cross_entropy(again.sum(2), y)


def several_results(s: Calls, h: Tensor, y: Tensor) -> Any:
    made = torch.vmap(lambda d: {"a": d["x"] * 2, "b": (d["x"].sum(), d["y"])})({"x": h, "y": y})
    return made["a"].square().mean() + (made["b"][0] * made["b"][1]).mean()


FUNCTIONS: tuple[Callable[[Calls, Tensor, Tensor], Any], ...] = (
    layers, mask_by_index, no_gradient_inside, inside_no_gradient, written_in_place, over_experts,
    several_results,
)  # fmt: skip


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_numbers_are_those_of_eager_whole_and_in_parts(function: Callable[..., Tensor]) -> None:
    model = Calls(function)
    made = ready(model, (X, Y))
    assert_close(in_parts(made, (X, Y), (4,)), eagerly(model, (X, Y)))
    assert not made.captured.unsplittable
    for sizes in ((1, 3), (2, 2, 3)):
        batch = sum(sizes)
        x, y = torch.randn(batch, 4), torch.arange(batch) % 4
        assert_close(in_parts(made, (x, y), sizes), eagerly(model, (x, y)))


def test_places_in_the_users_code_are_kept() -> None:
    made = ready(Calls(layers), (X, Y))
    added = next(op for op in made.source.ops if op.name.startswith("add"))
    assert added.module == "linear" and added.source
    assert not any("vmap" in op.target or "batch_dim" in op.target for op in made.source.ops)


def no_batched_form(s: Calls, h: Tensor, y: Tensor) -> Any:
    return torch.vmap(lambda v: v.nonzero().sum())(h).float().mean() + h.mean()


def test_what_has_no_batched_form_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"\(Calls\).*\.py:\d+.*inside torch.vmap"):
        ready(Calls(no_batched_form), (X, Y))


class Dropping(nn.Module):
    """Dropout inside of a vmap."""

    def __init__(self, randomness: str) -> None:
        super().__init__()
        self.linear, self.randomness, self.p = nn.Linear(16, 16), randomness, 0.5

    def forward(self, x: Tensor) -> Tensor:
        def drop(v: Tensor) -> Tensor:
            return F.dropout(v, self.p)

        made: Any = torch.vmap(drop, randomness=self.randomness)(self.linear(x))
        result: Tensor = made.square().mean()
        return result


@pytest.mark.parametrize("randomness", ["different", "same"])
def test_dropout_in_a_vmap_does_not_depend_on_the_plan(randomness: str) -> None:
    model, x = Dropping(randomness), torch.randn(6, 16)
    made = ready(model, (x,))
    assert not made.reason
    whole = in_parts(made, (x,), (6,))
    for sizes in ((1, 5), (2, 3, 1)):
        assert_close(in_parts(made, (x,), sizes), whole)
    (drawn,) = (op for op in made.source.ops if "bernoulli" in op.target)
    (mask,) = drawn.types
    assert mask is not None and len(mask.shape) == (2 if randomness == "different" else 1)
    model.p = 0.0
    assert abs(float(whole[0] - eagerly(model, (x,))[0])) > 1e-3, "nothing was dropped"


def test_dropout_in_a_vmap_that_was_not_told_how_is_refused_with_a_remedy() -> None:
    with pytest.raises(CaptureError, match=r"\(Dropping\).*\.py:\d+.*randomness='different'"):
        ready(Dropping("error"), (torch.randn(6, 16),))


BODIES: tuple[Callable[..., Tensor], ...] = (
    lambda a, w: torch.tanh(a * w),
    lambda a, w: a.cumsum(-1) if a.ndim else a.exp(),
    lambda a, w: F.layer_norm(a, a.shape[-1:]) if a.ndim else a - w.sum(),
    lambda a, w: torch.where(a > 0, a, w),
    lambda a, w: a.flip(0) if a.ndim else a.clamp(min=0),
    lambda a, w: torch.stack([a, a * 2]).amax(0),
    lambda a, w: a.softmax(-1) if a.ndim else a.sigmoid(),
)


class Nested(nn.Module):
    """Vmaps in one another over a tensor of three dimensions, then a linear layer."""

    def __init__(self, axes: list[tuple[int, int]], bodies: list[int]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(torch.randn((), generator=generator))
        self.linear = nn.Linear(3, 3)
        self.axes, self.bodies = axes, bodies

    def forward(self, x: Tensor) -> Tensor:
        def body(a: Tensor, w: Tensor) -> Tensor:
            for number in self.bodies:
                a = BODIES[number](a, w)
            return a

        mapped: Any = body
        for ndim, (into, out) in enumerate(self.axes, start=3 - len(self.axes)):
            axis, place = into % (ndim + 1), out % (ndim + 1)
            mapped = torch.vmap(mapped, in_dims=(axis, None), out_dims=place)
        made: Tensor = mapped(self.linear(x), self.weight)
        return made.square().mean()


@settings(max_examples=8, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=3),
    st.lists(st.integers(0, len(BODIES) - 1), min_size=1, max_size=3),
)
def test_any_nesting_is_as_in_eager(axes: list[tuple[int, int]], bodies: list[int]) -> None:
    torch.manual_seed(0)
    # Some bodies leave gradients that all but cancel, of which float32 keeps its rounding.
    model = Nested(axes, bodies).double()
    made = assert_as_eager(model, (torch.randn(2, 5, 3).double(),))
    if not made.reason:
        other = torch.randn(3, 5, 3).double()
        assert_close(in_parts(made, (other,), (1, 2)), eagerly(model, (other,)))
