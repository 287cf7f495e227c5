"""Plain PyTorch modules of every shape, cut into stages, compute what one device computes."""

import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from by_name import Sign
from helpers import TRAINING, Line, check_inference, check_training, force, straight
from torch import Tensor, nn

from graphpar.training import Training


class Convolutions(nn.Module):
    """Batch statistics in training; a pooled head."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm_a = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.b, self.norm_b = nn.Conv2d(4, 4, 3, stride=2, groups=2), nn.BatchNorm2d(4, affine=False)
        self.up = nn.ConvTranspose2d(4, 3, 2, stride=2)
        self.head = nn.Linear(3, 5)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = self.norm_a(self.a(x)).relu()
        x = nn.functional.max_pool2d(self.norm_b(self.b(x)).relu(), 2)
        return nn.functional.cross_entropy(self.head(self.up(x).mean((2, 3))), y)


class Recurrent(nn.Module):
    """A GRU that runs along the first dimension, from a state that is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 6)
        self.start = nn.Parameter(torch.randn(2, 1, 5))
        self.gru = nn.GRU(6, 5, bidirectional=True)
        self.cell = nn.LSTMCell(10, 4)
        self.head = nn.Linear(4, 12)

    def forward(self, ids: Tensor, y: Tensor) -> Tensor:
        hidden, _ = self.gru(
            self.embed(ids).transpose(0, 1), self.start.expand(2, ids.shape[0], 5).contiguous()
        )
        h = c = hidden.new_zeros(ids.shape[0], 4)
        for part in hidden:
            h, c = self.cell(part, (h, c))
        return nn.functional.cross_entropy(self.head(h), y)


class Fourier(nn.Module):
    """Complex weights and values, some of which cross stages."""

    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.randn(5, dtype=torch.complex64))
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor, phase: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(self.first(x)) * self.filter * phase
        result: Tensor = self.last(torch.fft.irfft(spectrum, n=8)).square().mean()
        size: Tensor = spectrum.abs().mean()
        return result + size


class Counting(nn.Module):
    """Buffers that the forward changes, one of them through a view."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)
        self.last = nn.Linear(4, 4)
        self.mean: Tensor
        self.calls: Tensor
        self.register_buffer("mean", torch.zeros(2, 6))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x).tanh()
        self.calls += 1
        self.mean[1].mul_(0.9).add_(h.detach().mean(0), alpha=0.1)
        result: Tensor = self.last(self.down(h - self.mean[1]).relu()).square().mean()
        return result


def use(function: Any, *args: Any) -> Any:
    """Apply a Function, for which torch has no types."""
    return function.apply(*args)


class Binary(nn.Module):
    """An autograd Function in each of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = use(Sign, layer(x), 0.7)
        result: Tensor = self.layers[-1](x).square().mean()
        return result


class Mixed(nn.Module):
    """Half precision inside, integers and bools beside it; frozen and shared parts."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 6)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.low = nn.Linear(6, 6).to(torch.bfloat16)
        self.head = nn.Linear(6, 1)

    def forward(self, ids: Tensor, keep: Tensor, step: Tensor) -> Tensor:
        h = self.frozen(self.embed(ids))
        h = self.frozen(h.tanh()) + self.low(h.to(torch.bfloat16)).float()
        h = torch.where(keep[..., None], h, -h) * (ids % 3 + step)[..., None]
        result: Tensor = self.head(h).square().mean()
        return result


def pictures() -> tuple[Tensor, Tensor]:
    return torch.randn(5, 2, 8, 8), torch.randint(0, 5, (5,))


def words() -> tuple[Tensor, Tensor]:
    return torch.randint(0, 12, (6, 4)), torch.randint(0, 12, (6,))


def waves() -> tuple[Tensor, Tensor]:
    return torch.randn(6, 8), torch.randn(6, 5, dtype=torch.complex64)


def mixed() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randint(0, 9, (6, 3)), torch.rand(6, 3) > 0.5, torch.tensor(2)


@pytest.mark.parametrize(
    ("model", "batch", "microbatches"),
    [
        (Convolutions, pictures, 1),
        (Recurrent, words, 1),
        (Fourier, waves, 1),
        (Counting, lambda: (torch.randn(6, 4),), 1),
        (Binary, lambda: (torch.randn(6, 5),), 1),
        (Mixed, mixed, 2),
    ],
)
def test_training(model: Any, batch: Any, microbatches: int) -> None:
    torch.manual_seed(3)
    rounding = 1e-3 if model is Mixed else 2e-5  # sums of bfloat16 gradients in another order
    by_op = model is not Counting  # all that touches a buffer which changes stays in one stage
    lines = straight(3 if by_op else 2, microbatches)
    check_training(model(), batch(), lines=lines, by_op=by_op, rounding=rounding)


@pytest.mark.parametrize(
    ("model", "batch"), [(Convolutions, pictures), (Recurrent, words), (Fourier, waves), (Mixed, mixed)]
)
def test_inference(model: Any, batch: Any) -> None:
    torch.manual_seed(3)
    check_inference(model(), batch(), lines=straight(2), by_op=True)


class Nothing(nn.Module):
    """No parameters at all."""

    def forward(self, x: Tensor, *, shift: int) -> tuple[Tensor, Tensor]:
        return x.cumsum(-1).roll(shift, -1), (x > 0).sum(-1)


def test_a_module_without_parameters() -> None:
    check_inference(Nothing(), (torch.randn(6, 4),), {"shift": 2}, lines=straight(1, 2))


@dataclass
class Answer:
    """A plain dataclass, unknown to torch's trees."""

    score: Tensor
    parts: dict[str, Tensor]


class Answering(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Answer:
        h = self.first(x).relu()
        return Answer(self.second(h), {"hidden": h, "positive": h > 0})


def test_a_dataclass_comes_back() -> None:
    check_inference(Answering(), (torch.randn(5, 4),), lines=straight(2, 2), by_op=True)


def test_a_dataclass_may_hold_what_a_loss_needs() -> None:
    def loss(answer: Answer, target: Tensor) -> Tensor:
        return nn.functional.mse_loss(answer.score, target)

    training = Training(optimizer=TRAINING.optimizer, loss=loss)
    batch = torch.randn(6, 4), torch.randn(6, 2)
    check_training(Answering(), batch, lines=straight(2, 3), train=training, by_op=True)
    with force(Answering(), batch, lines=straight(2), train=training, by_op=True).start() as job:
        job.step(*batch)


class Halved(nn.Module):
    """No parameters, and two results."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        low, high = x.chunk(2, -1)
        return low.tanh(), high.sigmoid()


class Nesting(nn.Module):
    """Results in dicts, lists, tuples and a dataclass, and one of them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.split, self.last = nn.Linear(4, 8), Halved(), nn.Linear(4, 3)

    def forward(self, x: Tensor, *, flags: dict[str, Tensor]) -> dict[str, Any]:
        low, high = self.split(self.first(x))
        answer = Answer(self.last(low * high), {"low": low})
        return {"answer": answer, "parts": [low, (high, None, 3)], "on": flags["on"], "again": low}


def test_nested_results_of_modules_without_parameters_train() -> None:
    def loss(given: dict[str, Any], target: Tensor) -> Tensor:
        made: Tensor = nn.functional.mse_loss(given["answer"].score, target)
        made = made + given["parts"][1][0].square().mean() + given["again"].mean()
        return made

    flags = {"flags": {"on": torch.tensor([True, False] * 3)}}
    x, target = torch.randn(6, 4), torch.randn(6, 3)
    training = Training(optimizer=TRAINING.optimizer, loss=loss)
    check_training(Nesting(), (x, target), flags, lines=straight(3, 2), train=training, by_op=True)
    check_inference(Nesting(), (x,), flags, lines=straight(2, 2), by_op=True)


class Tables(nn.Module):
    """Lookups that leave sparse gradients in eager torch."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.bags = nn.Embedding(20, 6, sparse=True), nn.EmbeddingBag(20, 6, sparse=True)
        self.head = nn.Linear(6, 3)

    def forward(self, ids: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.head(self.words(ids).mean(1) + self.bags(ids)), y)


@pytest.mark.parametrize(
    ("training", "zero"),
    [
        (Training(optimizer=partial(torch.optim.SGD, lr=0.1)), 0),
        (Training(optimizer=partial(torch.optim.Adam, eps=1e-3), max_grad_norm=0.3), 2),
    ],
    ids=["SGD", "Adam"],
)
def test_sparse_gradients_are_added_up_and_divided(training: Training, zero: int) -> None:
    """Eager Adam takes no sparse gradients, nor does eager clipping."""
    ids, y = torch.randint(20, (8, 5)), torch.randint(3, (8,))
    check_training(Tables(), (ids, y), lines=(Line((2,), 4),), train=training, zero=zero)


def test_an_optimiser_of_sparse_gradients_alone_is_refused() -> None:
    training = Training(optimizer=torch.optim.SparseAdam)
    with pytest.raises(ValueError, match=r"failed in a step on one parameter.*Gradients are dense here"):
        force(
            Tables(),
            (torch.randint(20, (8, 5)), torch.randint(3, (8,))),
            lines=straight(1),
            train=training,
        )


class Recentred(nn.Module):
    """Buffers that early values change and the last stage reads, also in what depends on no input."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 6)) for _ in range(4)
        )
        self.mean: Tensor
        self.calls: Tensor
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.layers[0](x)
        if self.training:
            self.mean.mul_(0.5).add_(h.detach().mean(0), alpha=0.5)
            self.calls += 1
        for layer in self.layers[1:]:
            h = h + layer(h)
        scaled = (h - self.mean) * (1 + self.mean.abs().sum())
        return {"loss": scaled.square().mean(), "h": h, "calls": self.calls}


def test_what_training_changes_is_read_anywhere_in_evaluation() -> None:
    """After every step again, not as it was when the job began."""
    torch.manual_seed(0)
    model, x = Recentred(), torch.randn(64, 6)
    alone = copy.deepcopy(model)
    optimizer = TRAINING.optimizer(alone.parameters())
    with force(model, (x,), lines=(Line((1, 1), cuts=(3,)),)).start() as job:
        for _ in range(2):
            job.step(x)
            alone.train()(x)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
            got, wanted = job(x), alone.eval()(x)
            torch.testing.assert_close(got, {name: value.detach() for name, value in wanted.items()})
