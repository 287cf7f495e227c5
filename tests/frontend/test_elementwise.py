"""Custom autograd Functions that act element by element let the batch be split."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_functions import Straight
from torch import Tensor, nn

from graphpar.frontend.elementwise import acts_by_element
from graphpar.frontend.functions import FunctionCall
from graphpar.frontend.torch_private import flatten
from graphpar.preparation import prepare
from graphpar.runtime.hold import HoldStill
from graphpar.training import Training

X = torch.randn(4, 4)


def use(function: Any, *args: Any) -> Any:
    """Apply a Function, for which torch has no types."""
    return function.apply(*args)


def centred(x: Any) -> Any:
    return x - x.mean()


def _reversed_in_place(x: Tensor) -> Tensor:
    x.numpy()[:] = x.numpy()[::-1].copy()
    return x


ELEMENTWISE: dict[str, tuple[Callable[..., Tensor], Callable[..., Any], bool]] = {
    "gelu": (lambda x: 0.5 * x * (1 + torch.tanh(x)), lambda x, g: g * torch.where(x > 0, x, 2.0), True),
    "in place on its own": (lambda x: x.exp().mul_(2), lambda x, g: g.clone().add_(1), True),
    "a derivative of torch's": (
        torch.relu,
        lambda x, g: torch.ops.aten.threshold_backward(g, x, 0),
        True,
    ),
    "samples meet in the forward": (centred, lambda x, g: g, False),
    "samples meet in the backward": (torch.sin, lambda x, g: centred(g), False),
    "divides by the batch": (torch.sin, lambda x, g: g / x.shape[0], False),
    "looks at values": (lambda x: x * 2 if x.sum() > 0 else x * 3, lambda x, g: g, False),
    "another shape": (lambda x: x.sum(-1, keepdim=True), lambda x, g: g.expand_as(x), False),
    "numpy in the backward": (
        torch.sin,
        lambda x, g: torch.from_numpy(g.numpy() - g.numpy().mean()),
        False,
    ),
    "numpy in place": (torch.sin, lambda x, g: _reversed_in_place(g.clone()), False),
    "sums where tensors are large": (
        lambda x: x - x.mean() if x.numel() > 99 else x.sin(),
        lambda x, g: g,
        False,
    ),
    "looks whether shapes are equal": (
        torch.sin,
        lambda x, g: g if x.shape == g.shape else g.sum(),
        True,
    ),
    "does otherwise for one shape": (torch.sin, lambda x, g: g if x.shape != (64, 4) else g - 1, False),
    "divides where the batch is large": (torch.sin, lambda x, g: g / max(1, len(x) - 9), False),
    "order": (lambda x: x.flip(0), lambda x, g: g.flip(0), False),
}


@pytest.mark.parametrize("case", list(ELEMENTWISE))
def test_the_batch_is_split_through_functions_that_act_by_element(case: str) -> None:
    forward, backward, splits = ELEMENTWISE[case]

    class Made(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return forward(x)

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            return backward(*ctx.saved_tensors, gradients[0])

    assert acts_by_element(*_as_call(Made), (X,), use(Made, X)) == splits


def test_functions_of_operands_that_are_broadcast_do_not_act_by_element() -> None:
    class Times(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
            ctx.save_for_backward(x, y)
            return x * y

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            x, y = ctx.saved_tensors
            return gradients[0] * y, (gradients[0] * x).sum_to_size(y.shape)

    for y, splits in ((X + 1, True), (X[0], False)):
        made = use(Times, X, y)
        assert acts_by_element(*_as_call(Times, 2), (X, y), made) == splits


def _as_call(function: Any, tensors: int = 1) -> tuple[Any, Any]:
    spec = flatten((0,) * tensors)[1]
    call = FunctionCall(function, spec, (None,) * tensors, tuple(range(tensors)), None)
    return call.forward, call.gradients


class Centred(torch.autograd.Function):
    """Its backward takes the mean over the batch away."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x + 1

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0] - gradients[0].mean(0)


class Between(nn.Module):
    """A Function between two layers."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.before, self.after, self.function = nn.Linear(4, 4), nn.Linear(4, 4), function

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.after(use(self.function, self.before(x)))
        return made.pow(2).mean()


@pytest.mark.parametrize(("function", "splits"), [(Straight, True), (Centred, False)])
def test_a_batch_is_split_through_a_function_where_samples_keep_apart(
    function: Any, splits: bool
) -> None:
    training = Training(optimizer=HoldStill, loss=None)
    prepared = prepare(Between(function), (X,), {}, training)
    assert ("keep samples apart" not in (prepared.batch_reason or "")) == splits
    if splits:
        assert not prepared.batch_reason
