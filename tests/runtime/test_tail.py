"""Losses in which samples meet at the end, in running jobs: the numbers of one device however split."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from helpers import TRAINING, Line, check_inference, check_training, force, straight
from torch import Tensor, nn

from graphpar.preparation import prepare

pytestmark = pytest.mark.distributed


class Towers(nn.Module):
    """Two towers and a contrastive loss with a trained temperature, as CLIP has."""

    def __init__(self, loss: bool = True) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 8))
        self.second = nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 8))
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.loss = loss

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        a, b = F.normalize(self.first(x), dim=-1), F.normalize(self.second(y), dim=-1)
        logits = self.scale.exp() * a @ b.t()
        if not self.loss:
            return logits
        labels = torch.arange(len(x))
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), labels)) / 2


class Experts(nn.Module):
    """Layers of soft experts, a loss with ignored labels, and a balancing loss over all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.routers = nn.ModuleList(nn.Linear(8, 3) for _ in range(2))
        self.experts = nn.ModuleList(nn.Linear(8, 24) for _ in range(2))
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(8, 20)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        h, balance = self.embed(ids), torch.zeros(())
        for router, experts in zip(self.routers, self.experts, strict=True):
            gates = router(h).softmax(-1)
            chosen = F.one_hot(gates.argmax(-1), 3).float().flatten(0, 1).mean(0)
            balance = balance + 3 * (chosen * gates.flatten(0, 1).mean(0)).sum()
            each = experts(h).unflatten(-1, (3, 8))
            h = h + self.drop(torch.tanh((gates[..., None] * each).sum(-2)))
        return F.cross_entropy(self.head(h).flatten(0, 1), labels.flatten()) + 0.1 * balance


def pairs(batch: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(batch, 6, generator=generator), torch.randn(batch, 5, generator=generator)


def tokens(batch: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 20, (batch, 5), generator=generator)
    labels = ids.clone()
    for row, kept in enumerate((5, 1, 4, 0, 3, 2, 5)[:batch]):
        labels[row, kept:] = -100
    return ids, labels


LINES = {
    "a line": straight(2, microbatches=3),
    "replicas of both stages": (Line((2, (2, 1)), 3),),
    "side by side, unlike shares": (Line((1, 1), 2, samples=4), Line((1,), 1, samples=2)),
    "a tensor group": (Line((1, 1), 2, groups=((), (0.6, 0.4))),),
    "groups take turns": (Line((2,), 3, groups=((0.5, 0.5),)),),
}


def check_split(model: nn.Module, args: tuple[Tensor, Tensor], lines: tuple[Line, ...]) -> None:
    prepared = prepare(model, args, {}, TRAINING)
    assert prepared.tail_reason and not prepared.batch_reason
    check_training(model, args, lines=lines, schedule="gpipe", prepared=prepared)


@pytest.mark.parametrize("lines", LINES.values(), ids=LINES.keys())
def test_contrastive_loss(lines: tuple[Line, ...]) -> None:
    torch.manual_seed(0)
    check_split(Towers(), pairs(), lines)


@pytest.mark.parametrize("lines", list(LINES.values())[:3], ids=list(LINES)[:3])
def test_balancing_loss_with_ignored_labels(lines: tuple[Line, ...]) -> None:
    torch.manual_seed(0)
    check_split(Experts(), tokens(), lines)


def test_results_that_compare_all_samples() -> None:
    torch.manual_seed(0)
    check_inference(Towers(loss=False), pairs(), lines=(Line((2, 1), 3),))


@pytest.mark.parametrize("batch", [7, 2, 1])
def test_other_batch_sizes(batch: int) -> None:
    torch.manual_seed(0)
    model = Towers()
    with force(model, pairs(), lines=(Line((1, 2), 4),), schedule="gpipe").start() as job:
        loss = job.step(*pairs(batch))
    torch.testing.assert_close(loss, model(*pairs(batch)).detach())
