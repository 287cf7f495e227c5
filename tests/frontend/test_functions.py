"""Custom autograd Functions keep their own backward; what a graph cannot hold is refused."""

import logging
import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from one_device import Calls, assert_as_eager, ready
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from graphpar.errors import CaptureError

X, Y = torch.randn(4, 4), torch.tensor([0, 1, 2, 3])


def use(function: Any, *args: Any) -> Any:
    """Apply a Function, for which torch has no types."""
    return function.apply(*args)


class Reverse(torch.autograd.Function):
    """The usual gradient reversal: its result is a view of its argument."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return -ctx.scale * gradients[0], None


class Straight(torch.autograd.Function):
    """A rounding whose gradient is one inside a range."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.round()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (x,) = ctx.saved_tensors
        return gradients[0] * (x.abs() < 1)


class Several(torch.autograd.Function):
    """Several arguments and results, one without gradient; the forward and the context are apart."""

    @staticmethod
    def forward(x: Tensor, index: Tensor, power: int, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x**power, x.argmax(-1), y[index]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[0], inputs[1], inputs[3])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        x, index, y = ctx.saved_tensors
        return 5 * gradients[0] * x, None, None, torch.zeros_like(y).index_add(0, index, gradients[2])


class Typed(torch.autograd.Function):
    """Goes by type and sign of a number: True, 1 and 1.0, 0.0 and -0.0 are not the same to it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: float) -> Tensor:
        ctx.factor = math.copysign({bool: 2, int: 3, float: 5}[type(kind)], kind)
        result: Tensor = x * ctx.factor
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0] * ctx.factor, None


class Labelled(torch.autograd.Function):
    """One tensor among its results, beside what is none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[int, Tensor, str]:
        return 3, x.view_as(x), "doubled"

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return 2 * gradients[1]


class Again(torch.autograd.Function):
    """A checkpoint of the user's own, as many scripts have it."""

    @staticmethod
    def forward(ctx: Any, run: Callable[[Tensor], Tensor], x: Tensor, *weights: Tensor) -> Tensor:
        ctx.run, ctx.given = run, (x, *weights)
        return run(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        with torch.enable_grad():
            x = ctx.given[0].detach().requires_grad_()
            made = ctx.run(x)
        return None, *torch.autograd.grad(made, (x, *ctx.given[1:]), gradients)


class InPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0] * 2


class Noisy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0]


def several(s: Calls, h: Tensor, y: Tensor) -> Tensor:
    a, b, c = use(Several, h, y, 2, s.table)
    result: Tensor = (a * b[:, None]).mean() + (c * h).sum()
    return result


@pytest.mark.parametrize(
    "function",
    [
        lambda s, h, y: (use(Reverse, h, 0.5) * s.vector).pow(2).mean(),
        lambda s, h, y: (use(Reverse, h, 0.5) * use(Reverse, s.vector, 2.0)).pow(2).mean(),
        lambda s, h, y: use(Straight, h * s.vector).pow(2).mean(),
        several,
        lambda s, h, y: (use(Typed, h, True) * use(Typed, h, 1).sin() * use(Typed, h, 1.0).cos()).mean(),
        lambda s, h, y: (use(Typed, h, 0.0) * use(Typed, h, -0.0).sin()).mean(),
        lambda s, h, y: (use(Labelled, h)[0] * use(Labelled, h)[1]).pow(2).mean(),
        lambda s, h, y: checkpoint(lambda z: s.layer(z).tanh(), h, use_reentrant=True).pow(2).mean(),
        lambda s, h, y: checkpoint(lambda z: s.layer(z).tanh(), h, use_reentrant=False).pow(2).mean(),
    ],
    ids=[
        "reversed",
        "twice",
        "straight-through",
        "several",
        "types",
        "signs",
        "labelled",
        "checkpoint",
        "new checkpoint",
    ],
)
def test_gradients_are_those_of_the_function(function: Callable[[Calls, Tensor, Tensor], Tensor]) -> None:
    assert_as_eager(Calls(function, nn.Linear(4, 4)), (X, Y))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_leave_buffers_and_gradients_as_eager_torch_does(
    reentrant: bool, caplog: pytest.LogCaptureFixture
) -> None:
    def run(s: Calls, h: Tensor, y: Tensor) -> Tensor:
        def part(z: Tensor) -> Tensor:
            result: Tensor = s.layer(z).tanh()
            return result

        h = checkpoint(part, h, use_reentrant=reentrant)
        if not reentrant:
            return h.pow(2).mean()
        no_gradient: Tensor = checkpoint(lambda z: s.vector * z, X, use_reentrant=True)
        return (h * no_gradient).mean()

    model = Calls(run, nn.BatchNorm1d(4, momentum=0.3))
    with caplog.at_level(logging.WARNING, "graphpar.capture"):
        made = assert_as_eager(model, (X, Y))
    assert not caplog.records
    device = made.device()
    for _ in range(2):
        device.forward((X, Y), {})
        model(X, Y).backward()
    for name, wanted in model.named_buffers():
        torch.testing.assert_close(device.tensors[name], wanted)


def test_what_a_checkpoint_changes_in_another_order_is_told(caplog: pytest.LogCaptureFixture) -> None:
    def run(s: Calls, h: Tensor, y: Tensor) -> Tensor:
        for _ in range(2):
            h = checkpoint(lambda z: s.layer(z).tanh(), h, use_reentrant=False)
        return h.mean()

    with caplog.at_level(logging.WARNING, "graphpar.capture"):
        ready(Calls(run, nn.BatchNorm1d(4)), (X, Y))
    assert "changes the buffers layer.num_batches_tracked, layer.running_mean" in caplog.text


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda s, h, y: use(InPlace, h * 1).sum(), "InPlace changes its arguments in place"),
        (lambda s, h, y: use(Noisy, h).sum(), "Noisy draws random numbers"),
        (lambda s, h, y: use(Again, s.linear, h, *s.linear.parameters()).sum(), "Again reads weights"),
        (lambda s, h, y: (h * float(np.random.rand())).sum(), "draws random numbers with NumPy"),
        (lambda s, h, y: (h * random.random()).sum(), r"\(Calls\), .*_functions.py:\d+, draws"),
        (lambda s, h, y: (h.register_hook(lambda g: g * 2), h.sum())[1], "hook on its gradient"),
    ],
    ids=["in place", "random", "weights", "numpy", "random module", "hook"],
)
def test_what_a_graph_cannot_hold_is_refused(function: Any, why: str) -> None:
    with pytest.raises(CaptureError, match=why):
        ready(Calls(function), (X, Y))


def test_hooks_on_parameters_and_modules_are_refused_for_training_alone() -> None:
    hooked = nn.Linear(4, 4)
    handle = hooked.weight.register_hook(lambda g: g * 2)  # type: ignore[no-untyped-call]
    with pytest.raises(CaptureError, match=r"'layer.weight' has a hook on its gradient"):
        ready(Calls(lambda s, h, y: s.layer(h).sum(), hooked), (X, Y))
    ready(Calls(lambda s, h, y: s.layer(h), hooked), (X, Y), loss=None)
    handle.remove()
    hooked.register_full_backward_hook(lambda m, a, b: None)
    with pytest.raises(CaptureError, match=r"'layer' \(Linear\) has a hook"):
        ready(Calls(lambda s, h, y: s.layer(h).sum(), hooked), (X, Y))


def test_the_innermost_module_that_draws_on_the_host_is_named() -> None:
    class Skip(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if np.random.rand() < 0.5 else 2 * x

    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), Skip()))
    with pytest.raises(CaptureError, match=r"'1.1' \(Skip\), .*_functions.py:\d+, draws"):
        ready(model, (X,), loss=None)


def test_a_hook_may_be_registered_again_after_a_capture() -> None:
    ready(Calls(lambda s, h, y: h.sum()), (X, Y))
    x = torch.ones(2, requires_grad=True)
    x.register_hook(lambda g: g * 3)  # type: ignore[no-untyped-call]
    use(Reverse, x, 1.0).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [-3.0, -3.0]
