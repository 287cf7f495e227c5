"""What cannot be captured is refused with the module, the line, the reason and a remedy."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import check_training, straight
from one_device import Calls, assert_as_eager, ready
from torch import Tensor, nn

from graphpar.errors import CaptureError
from graphpar.frontend.capture import capture

X, Y = torch.randn(4, 4), torch.tensor([0, 1, 2, 3])


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (lambda: torch.jit.script(nn.Sequential(nn.Linear(4, 4))), r"'\(top\)' was made by torch.jit"),
        (lambda: nn.Sequential(nn.LazyLinear(4)), "'0.weight' of the model is lazy"),
    ],
)
def test_models_that_cannot_be_exported_yet(model: Callable[[], nn.Module], why: str) -> None:
    with pytest.raises(CaptureError, match=why):
        capture(model(), (X,), {})


class Force(nn.Module):
    """The derivative of an energy by the places, by autograd or written out."""

    def __init__(self, written_out: bool) -> None:
        super().__init__()
        self.a, self.b, self.written_out = nn.Linear(4, 4), nn.Linear(4, 1), written_out

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.written_out:
            h = self.a(x).tanh()
            force = ((1 - h * h) * self.b.weight) @ self.a.weight
        else:
            x = x.detach().requires_grad_()
            (force,) = torch.autograd.grad(self.b(self.a(x).tanh()).sum(), x, create_graph=True)
        return nn.functional.cross_entropy(force, y)


def test_a_derivative_by_autograd_through_layers_is_refused() -> None:
    with pytest.raises(
        CaptureError, match=r"test_refusals.*torch.autograd.grad looks into layers.*write"
    ):
        ready(Force(written_out=False), (X, Y))
    assert_as_eager(Force(written_out=True), (X, Y))


REFUSED: dict[str, tuple[Callable[[Calls, Tensor, Tensor], Tensor], str]] = {}


def refused(why: str) -> Callable[[Any], Any]:
    def register(function: Any) -> Any:
        REFUSED[function.__name__] = (function, why)
        return function

    return register


@refused("overwrites the parameter vector .* call it once in that mode before")
def writes_parameter(s: Calls, h: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        s.vector.mul_(2)
    return (h * s.vector).sum()


@refused("outside autograd")
def writes_past_autograd(s: Calls, h: Tensor, y: Tensor) -> Tensor:
    a = h * 1
    a.detach().mul_(2)
    return (a * h).sum()


@refused("outside autograd")
def writes_without_grad(s: Calls, h: Tensor, y: Tensor) -> Tensor:
    a = h * 1
    with torch.no_grad():
        a.clamp_(0, 1)
    return (a * h).sum()


@refused("depend on the plan")
def draws_unkeyed(s: Calls, h: Tensor, y: Tensor) -> Tensor:
    return (h * torch.randperm(4)).sum()


@refused("depend")
def shape_by_data(s: Calls, h: Tensor, y: Tensor) -> Tensor:
    return h[torch.unique(y)].sum()


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_followed_is_refused(name: str) -> None:
    function, why = REFUSED[name]
    with pytest.raises(CaptureError, match=why) as caught:
        ready(Calls(function), (X, Y.clone()))
    message = str(caught.value)
    assert "(top)" in message and ".py:" in message


def test_control_flow_names_module_line_and_remedy() -> None:
    class Gate(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.max() > 0 else -x

    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), Gate()))
    with pytest.raises(CaptureError) as caught:  # without memory there are no values to branch on
        capture(model.to("meta"), (X.to("meta"),), {})
    message = str(caught.value)
    assert (
        "module '1.1' (Gate)" in message and "test_refusals.py:" in message and "torch.where" in message
    )


@pytest.mark.parametrize(
    ("output", "shown"),
    [
        (lambda h: h, "a tensor of shape"),
        (lambda h: {"logits": h}, r"dict with keys \['logits'\]"),
        (lambda h: (h, h), "tuple"),
        (lambda h: None, "NoneType"),
    ],
)
def test_a_model_without_a_loss(output: Callable[[Tensor], Any], shown: str) -> None:
    with pytest.raises(CaptureError, match=f"returned {shown}.*Training\\(loss="):
        ready(Calls(lambda s, h, y: output(h)), (X, Y))


@pytest.mark.parametrize(
    ("args", "kwargs", "why"),
    [
        ((X,), {}, "do not match the model's forward signature"),
        ((X, Y), {"z": X}, "do not match the model's forward signature"),
        ((torch.randn(4, 7), Y), {}, "does not fit the model"),
        ((object(), Y), {}, "."),
        ((X.to("meta"), Y), {}, "build model and example inputs on the same device"),
    ],
)
def test_wrong_arguments(args: tuple[Any, ...], kwargs: dict[str, Any], why: str) -> None:
    with pytest.raises(CaptureError, match=why):
        ready(Calls(lambda s, h, y: h.sum()), args, kwargs)


def test_an_empty_batch_is_refused() -> None:
    with pytest.raises(CaptureError, match="empty; give one with at least one sample"):
        ready(Calls(lambda s, h, y: h.sum()), (X[:0], Y[:0]))


class Counting(nn.Module):
    def __init__(self, in_buffer: bool, used: bool = True) -> None:
        super().__init__()
        self.used = used
        self.linear = nn.Linear(4, 4)
        self.length = 0
        self.calls: Any = 0
        if in_buffer:
            del self.calls
            self.register_buffer("calls", torch.tensor(0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.length = x.shape[0]
        self.calls += 1
        result: torch.Tensor = (self.linear(x) * (self.calls if self.used else 1)).sum()
        return result


def test_a_number_that_changes_at_every_call_is_refused_by_name() -> None:
    with pytest.raises(
        CaptureError, match=r"'\(top\)' \(Counting\) changes its attribute 'calls' .*buffer"
    ):
        capture(Counting(in_buffer=False), (torch.randn(3, 4),), {})


def test_the_same_number_in_a_buffer_goes_through() -> None:
    model, x = Counting(in_buffer=True), torch.randn(3, 4)
    check_training(model, (x,), lines=straight(1))


def test_a_number_that_only_counts_goes_through() -> None:
    captured = capture(Counting(in_buffer=False, used=False), (torch.randn(3, 4),), {})
    assert not captured.unsplittable
