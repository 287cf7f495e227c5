"""Losses that are modules: what they hold is a constant, and what they would keep or train is refused."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from helpers import check_training, cpus, sgd, straight
from torch import Tensor, nn

import graphpar
from graphpar.errors import CaptureError
from graphpar.training import Training

BATCH = (torch.randn(6, 8), torch.tensor([0, 3, 1, 2, 0, 3]))


class Headed(nn.Module):
    """A loss with a layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 4)

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(self.head(output), target)


class Centred(nn.Module):
    """A loss that follows the mean of what it has seen."""

    centre: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(4))

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        self.centre.mul_(0.9).add_(output.detach().mean(0), alpha=0.1)
        return F.cross_entropy(output - self.centre, target)


class Counting(nn.Module):
    """A loss that weighs more at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        self.calls += 1
        return self.calls * F.cross_entropy(output, target)


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))


@pytest.mark.distributed
@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(torch.tensor([0.5, 1.0, 2.0, 4.0]), ignore_index=1),
        Headed().requires_grad_(False),
    ],
    ids=["weights of classes", "a frozen layer"],
)
def test_what_a_loss_holds_is_a_constant(loss: nn.Module) -> None:
    check_training(model(), BATCH, lines=straight(2, 3), train=Training(optimizer=sgd, loss=loss))


@pytest.mark.parametrize(
    ("loss", "told"),
    [
        (Headed(), r"parameters of its own \(head.weight, head.bias\).*one module of model and loss"),
        (Centred(), "overwrites a constant.*a buffer of one module of both"),
        (Counting(), "Module 'loss' .* changes its attribute 'calls' at every call"),
    ],
)
def test_what_a_loss_would_train_or_keep_is_refused(loss: nn.Module, told: str) -> None:
    training = Training(optimizer=sgd, loss=loss)
    with pytest.raises(CaptureError, match=told):
        graphpar.plan(model(), cpus(2), BATCH, train=training, measure_s=0)


@pytest.mark.distributed
def test_a_module_of_model_and_loss_is_the_way_out() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.loss = model(), Headed()

        def forward(self, x: Tensor, target: Tensor) -> Tensor:
            result: Tensor = self.loss(self.model(x), target)
            return result

    check_training(Both(), BATCH, lines=straight(2, 3))
