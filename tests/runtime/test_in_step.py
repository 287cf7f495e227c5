"""Statistics of the whole batch within the model, in running jobs: the numbers of one device."""

import copy

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from helpers import TRAINING, Line, check_inference, check_training, force
from torch import Tensor, nn

from graphpar.preparation import prepare

pytestmark = pytest.mark.distributed


class Images(nn.Module):
    """Convolutions with batch normalisation and a skip edge; some labels are ignored."""

    def __init__(self, momentum: float | None = 0.1, affine: bool = True) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4, momentum=momentum, affine=affine) for _ in range(2))
        self.last = nn.BatchNorm1d(6, track_running_stats=False)
        self.up, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        h = self.norms[0](self.first(x)).relu()
        h = (h + self.norms[1](self.second(h))).relu().mean((2, 3))
        scores: Tensor = self.head(self.last(self.up(h)))
        return scores if y is None else F.cross_entropy(scores, y)


class Centred(nn.Module):
    """Statistics written out by hand, a buffer that follows them, and a contrast at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.middle: Tensor
        self.register_buffer("middle", torch.zeros(6))
        self.seen: Tensor
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = torch.tanh(self.layers[0](x))
        mean = h.mean(0)
        with torch.no_grad():
            self.middle.mul_(0.9).add_(mean, alpha=0.1)
            self.seen += len(x)
        h = h - mean
        h = self.layers[1](h / (h.square().mean(0) + 0.1).sqrt())
        h = self.layers[2](h + self.middle)
        return F.cross_entropy(h @ h.t(), torch.arange(len(x))) + F.cross_entropy(h, y)


def images(batch: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(batch, 2, 4, 4, generator=generator) * 2 + 5
    return x, torch.tensor([1, -100, 2, 0, -100, 1, 2, 0, 1][:batch])


def rows(batch: int = 7) -> tuple[Tensor, Tensor]:
    x = torch.randn(batch, 6, generator=torch.Generator().manual_seed(3))
    return x, torch.tensor([1, -100, 2, 0, -100, 1, 2, 0, 1][:batch])


LINES = {
    "unlike shares": (Line((1,), 1, samples=5), Line((1,), 1, samples=2)),
    "cut at unlike places": (
        Line((1, 1), 1, samples=3, cuts=(1,)),
        Line((1, 1), 1, samples=2, cuts=(2,)),
        Line((1,), 1, samples=2),
    ),
}


def check(model: nn.Module, args: tuple[Tensor, Tensor], lines: tuple[Line, ...]) -> None:
    prepared = prepare(model, args, {}, TRAINING)
    assert prepared.in_step_reason and not prepared.batch_reason
    check_training(model, args, lines=lines, schedule="gpipe", prepared=prepared)


@pytest.mark.parametrize("lines", LINES.values(), ids=LINES.keys())
def test_batch_normalisation(lines: tuple[Line, ...]) -> None:
    torch.manual_seed(0)
    check(Images(), images(), lines)


@pytest.mark.parametrize("lines", LINES.values(), ids=LINES.keys())
def test_statistics_by_hand_and_a_contrast(lines: tuple[Line, ...]) -> None:
    torch.manual_seed(0)
    check(Centred(), rows(), lines)


def test_cumulative_average_and_no_weights() -> None:
    torch.manual_seed(0)
    check(Images(momentum=None, affine=False), images(), LINES["unlike shares"])


def test_statistics_of_the_batch_in_evaluation() -> None:
    torch.manual_seed(0)
    model = Images()
    check_inference(model, images()[:1], lines=LINES["cut at unlike places"])


def test_other_batch_sizes_and_evaluation_between_steps() -> None:
    torch.manual_seed(0)
    model = Images()
    reference = copy.deepcopy(model)
    optimizer = TRAINING.optimizer(reference.parameters())
    lines = (Line((1, 1), 1, samples=4, cuts=(1,)), Line((1,), 1, samples=3))
    with force(model, images(), lines=lines, schedule="gpipe").start() as job:
        for batch in (7, 9, 2):
            loss = job.step(*images(batch))
            wanted = reference(*images(batch))
            wanted.backward()
            optimizer.step()
            optimizer.zero_grad()
            torch.testing.assert_close(loss, wanted.detach(), rtol=1e-4, atol=1e-5)
        got = job.state_dict()
    for name, tensor in reference.state_dict().items():
        torch.testing.assert_close(got[name], tensor, rtol=2e-3, atol=2e-4)
