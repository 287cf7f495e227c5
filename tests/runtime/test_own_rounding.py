"""What one device's own rounding explains, and what it does not."""

import copy

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from helpers import Line, cpus, force, sgd
from torch import nn

import graphpar
from graphpar.runtime import first_step
from graphpar.runtime.first_step import FirstStepCheck
from graphpar.runtime.numbers import FLOAT32_ROUNDING, compare_gradients, relative_difference
from graphpar.runtime.own_rounding import own_rounding
from graphpar.runtime.reference import EagerModel
from graphpar.training import Training
from graphpar.verify import verify

TRAINING = Training(optimizer=sgd, loss=F.cross_entropy)
LINES = (Line((1,), 1, 12),) * 2


def convolutions() -> nn.Module:
    """Gradients of the convolutions' biases are zero but for rounding."""
    layers = [
        t
        for a, b in ((3, 8), (8, 8), (8, 16))
        for t in (nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU())
    ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(24, 3, 32, 32), torch.randint(0, 10, (24,))


def gradients(
    model: nn.Module, x: torch.Tensor, y: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    own = copy.deepcopy(model)
    loss = F.cross_entropy(own(x), y)
    loss.backward()  # type: ignore[no-untyped-call]
    named = {name: p.grad.float() for name, p in own.named_parameters() if p.grad is not None}
    return loss.detach(), named


def test_another_rounding_is_explained_and_an_error_is_not() -> None:
    model, (x, y) = convolutions(), batch()
    loss, wanted = gradients(model, x, y)
    _, exact = gradients(copy.deepcopy(model).double(), x.double(), y)
    assert compare_gradients(exact, wanted)[1] > FLOAT32_ROUNDING, "float32 itself is not so close"

    in_loss, explained = own_rounding(lambda: EagerModel(model, TRAINING), (x, y), {}, loss, wanted)
    assert in_loss < 1e-4
    assert compare_gradients(exact, wanted, explained)[1] <= FLOAT32_ROUNDING
    for name in ("0.weight", "7.bias", "11.weight"):
        wrong = exact | {name: exact[name] * 1.1}
        worst, difference = compare_gradients(wrong, wanted, explained)
        assert worst == name and difference == pytest.approx(0.1, rel=0.1)


def test_what_is_no_number_is_not_explained() -> None:
    fine, odd = torch.ones(2), torch.tensor([1.0, torch.nan])
    assert max(relative_difference(fine, fine), relative_difference(odd, fine)) == torch.inf
    assert (
        compare_gradients({"a": fine, "b": odd}, {"a": fine, "b": fine}, {"b": torch.inf})[1] == torch.inf
    )


class Overflows(nn.Module):
    """In float32, not in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 1e20]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ((self.weight * x) ** 2).sum()


def test_an_overflow_explains_nothing() -> None:
    model, x = Overflows(), torch.tensor([1.0, 1e20])
    model(x).backward()
    wanted = {"weight": torch.tensor([2.0, torch.inf])}
    assert model.weight.grad is not None and torch.equal(model.weight.grad, wanted["weight"])
    loss = torch.tensor(torch.inf)
    in_loss, explained = own_rounding(lambda: EagerModel(model, None), (x,), {}, loss, wanted)
    assert in_loss == 0.0 and explained == {"weight": 0.0}


@pytest.mark.parametrize(("times", "levels"), [(1.0, {"INFO"}), (1.5, {"WARNING"})])
def test_an_error_that_may_pass_for_rounding_is_told(
    times: float, levels: set[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, given = nn.Linear(3, 1), (torch.randn(4, 3), torch.zeros(4, 1))
    training = Training(optimizer=sgd, loss=F.mse_loss)
    check = FirstStepCheck(model, None, None, training, None)  # type: ignore[arg-type]
    monkeypatch.setattr(FirstStepCheck, "_reference", lambda *_: EagerModel(model, training))
    explains_all = {"weight": torch.inf, "bias": torch.inf}
    monkeypatch.setattr(first_step, "own_rounding", lambda *_: (1.0, explains_all))
    (loss,) = (reference := EagerModel(model, training)).forward(given, {})
    loss.backward()  # type: ignore[no-untyped-call]
    found = {name: gradient * times for name, gradient in reference.gradients().items()}
    with caplog.at_level("INFO", "graphpar"):
        check.compare(loss.detach(), found, {}, given, {})
    assert {record.levelname for record in caplog.records} == levels
    assert ("would not be noticed" in caplog.text) == (levels == {"WARNING"})


@pytest.mark.distributed
def test_biases_before_normalisations_are_no_difference() -> None:
    model, given = convolutions(), batch()
    forced = force(model, given, lines=LINES, train=TRAINING)
    with graphpar.compile(
        model, cpus(2), given, train=TRAINING, plan=forced.plan, verify_first_step=True
    ) as job:
        job.step(*given)


@pytest.mark.distributed
@pytest.mark.slow
def test_verify_tells_so() -> None:
    model, given = convolutions(), batch()
    forced = force(model, given, lines=LINES, train=TRAINING)
    report = verify(model, cpus(2), given, train=TRAINING, plan=forced.plan)
    assert report.equal and report.is_own_rounding and "from float64" in str(report)
