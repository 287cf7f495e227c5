"""What one device's own rounding explains, and what it does not."""

import copy

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from helpers import Line, cpus, force, sgd
from torch import nn

import graphpar
from graphpar.runtime.numbers import FLOAT32_ROUNDING, compare_gradients
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
