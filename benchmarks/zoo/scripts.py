"""What scripts do with state, labels and sharing: norms called thrice, risk sets, samples left out."""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from zoo.case import Case, case, ids, normal


class RunningMean(nn.Module):
    """Statistics assigned anew at each call, the first time without a past."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 2)
        self.mean: Tensor
        self.calls: Tensor
        self.register_buffer("mean", torch.zeros(5))
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x: Tensor, y: Tensor) -> Any:
        h = self.first(x)
        if self.training:
            now = h.detach().mean(0)
            self.mean = torch.where(self.calls < 1, now, 0.9 * self.mean + 0.1 * now)
            self.calls = self.calls + 1
        return F.cross_entropy(self.last((h - self.mean).relu()), y)


@case
def buffers_assigned() -> Case:
    return Case(RunningMean(), lambda n: (normal(n, 4), ids(n, high=2)))


class SharedNorm(nn.Module):
    """One batch normalisation on three things, one of them without gradient; another counts batches."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 3)
        self.norm, self.counting = nn.BatchNorm1d(6), nn.BatchNorm1d(6, momentum=None)

    def forward(self, a: Tensor, b: Tensor, y: Tensor) -> Any:
        left, right = self.norm(self.body(a)).relu(), self.norm(self.body(b)).relu()
        with torch.no_grad():
            apart = self.norm(self.body(a - b))
        h = self.counting(left - right + apart)
        return F.cross_entropy(self.head(h), y, ignore_index=2, label_smoothing=0.1)


@case
def shared_norm() -> Case:
    return Case(SharedNorm(), lambda n: (normal(n, 4), normal(n, 4) * 2 + 1, torch.arange(n) % 3))


class SupervisedContrast(nn.Module):
    """Pairs of one class attract each other; samples without a class take no part."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 5)

    def forward(self, x: Tensor, y: Tensor) -> Any:
        z = F.normalize(self.body(x), dim=1)
        logits = z @ z.t() / 0.1
        logits = logits - logits.max(1, keepdim=True).values.detach()
        others = ~torch.eye(len(x), dtype=torch.bool)
        pairs = (y[:, None] == y[None]) & others & (y >= 0)[:, None]
        log_p = logits - torch.log((logits.exp() * others).sum(1, keepdim=True))
        count = pairs.sum(1)
        return -((log_p * pairs).sum(1) / count.clamp_min(1)).sum() / (count > 0).sum().clamp_min(1)


@case
def supervised_contrast() -> Case:
    return Case(SupervisedContrast(), lambda n: (normal(n, 4), torch.tensor([0, 0, 1, 1, -1, 0, 1])[:n]))


class Survival(nn.Module):
    """Cox' partial likelihood: a risk set for each event, by sorted times."""

    def __init__(self) -> None:
        super().__init__()
        self.risk = nn.Sequential(nn.Linear(4, 6), nn.SELU(), nn.Linear(6, 1))

    def forward(self, x: Tensor, time: Tensor, event: Tensor) -> Any:
        order = time.argsort(descending=True)
        risk, event = self.risk(x).squeeze(-1)[order], event[order]
        return -((risk - risk.logcumsumexp(0)) * event).sum() / event.sum()


@case
def survival() -> Case:
    return Case(Survival(), lambda n: (normal(n, 4), normal(n).abs(), (torch.arange(n) % 3 != 1).float()))


class Sentences(nn.Module):
    """A packed LSTM of several layers with dropout in between, from trained states; the last decide."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 6, padding_idx=0)
        self.lstm = nn.LSTM(6, 5, 2, bidirectional=True, batch_first=True, dropout=0.3)
        self.start, self.cells = nn.Parameter(torch.randn(4, 1, 5)), nn.Parameter(torch.randn(4, 1, 5))
        self.head = nn.Linear(10, 3)

    def forward(self, words: Tensor, lengths: Tensor, y: Tensor) -> Any:
        packed = pack_padded_sequence(self.embed(words), lengths, batch_first=True, enforce_sorted=False)
        states = tuple(s.repeat(1, len(words), 1) for s in (self.start, self.cells))
        _, (last, _) = self.lstm(packed, states)
        return F.cross_entropy(self.head(torch.cat([last[-2], last[-1]], 1)), y, ignore_index=-100)


@case
def packed_layers() -> Case:
    def batch(n: int) -> tuple[Tensor, ...]:
        lengths = torch.tensor([5, 3, 4, 2, 5, 1, 4])[:n]
        words = torch.where(torch.arange(5) < lengths[:, None], ids(n, 5, low=1), 0)
        return words, lengths, torch.where(torch.arange(n) == 1, -100, ids(n, high=3))

    return Case(Sentences(), batch)


class Uncertain(nn.Module):
    """Means and variances under a Gaussian likelihood, classes weighted by numbers made on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.classes = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor, target: Tensor, y: Tensor) -> Any:
        h = self.body(x)
        weight = torch.tensor([1.0, 2.0, 0.5], device=x.device, dtype=x.dtype)
        return F.gaussian_nll_loss(h[:, :3], target, h[:, 3:].exp()) + F.cross_entropy(
            self.classes(h), y, weight=weight, ignore_index=2
        )


@case
def uncertain() -> Case:
    return Case(Uncertain(), lambda n: (normal(n, 4), normal(n, 3), ids(n, high=3)))
