"""Losses that compare samples, sequences of unlike lengths, and loops over time."""

import copy
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from zoo.case import Case, case, ids, normal


class Siamese(nn.Module):
    """One encoder for anchors, positives and negatives."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 12), nn.PReLU(), nn.Linear(12, 4))
        self.loss = nn.TripletMarginLoss(margin=0.7, p=2)

    def forward(self, anchor: Tensor, positive: Tensor, negative: Tensor) -> Any:
        a, p, n = (F.normalize(self.net(x), p=2, dim=1) for x in (anchor, positive, negative))
        return {"loss": self.loss(a, p, n), "distance": F.pairwise_distance(a, n)}


@case
def siamese_triplets() -> Case:
    return Case(Siamese(), lambda n: (normal(n, 6), normal(n, 6) + 0.3, normal(n, 6) * 1.5))


class SimCLR(nn.Module):
    """Two views joined, similarities of all with all, the diagonal taken out by a boolean mask."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.projector = nn.Linear(6, 12), nn.Sequential(nn.ReLU(), nn.Linear(12, 4))

    def forward(self, x1: Tensor, x2: Tensor) -> Any:
        features = F.normalize(self.projector(self.backbone(torch.cat((x1, x2), dim=0))), dim=1)
        batch = x1.shape[0]
        labels = torch.cat([torch.arange(batch) for _ in range(2)], dim=0)
        labels = (labels.unsqueeze(0) == labels.unsqueeze(1)).float()
        similarity = torch.matmul(features, features.T)
        mask = torch.eye(labels.shape[0], dtype=torch.bool)
        labels = labels[~mask].view(labels.shape[0], -1)
        similarity = similarity[~mask].view(similarity.shape[0], -1)
        positives = similarity[labels.bool()].view(labels.shape[0], -1)
        negatives = similarity[~labels.bool()].view(similarity.shape[0], -1)
        logits = torch.cat([positives, negatives], dim=1) / 0.2
        return F.cross_entropy(logits, torch.zeros(logits.shape[0], dtype=torch.long)), logits


@case
def simclr() -> Case:
    return Case(SimCLR(), lambda n: (normal(n, 6), normal(n, 6) + 0.2))


class BYOL(nn.Module):
    """The target network follows the online one within the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.online = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 4))
        self.target = copy.deepcopy(self.online)
        for p in self.target.parameters():
            p.requires_grad = False
        self.predictor = nn.Linear(4, 4)

    def forward(self, x1: Tensor, x2: Tensor) -> Any:
        p1, p2 = self.predictor(self.online(x1)), self.predictor(self.online(x2))
        with torch.no_grad():
            t1, t2 = self.target(x1).detach(), self.target(x2).detach()
        loss = (2 - 2 * F.cosine_similarity(p1, t2, dim=-1)) + (
            2 - 2 * F.cosine_similarity(p2, t1, dim=-1)
        )
        return loss.mean()


@case
def byol() -> Case:
    return Case(BYOL(), lambda n: (normal(n, 6), normal(n, 6) + 0.2))


class Momentum(nn.Module):
    """An encoder kept in buffers that follows the trained one by an average, in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Linear(6, 4)
        self.register_buffer("ema_w", self.w.weight.detach().clone())
        self.register_buffer("ema_b", self.w.bias.detach().clone())
        self.register_buffer("updates", torch.tensor(0, dtype=torch.long))

    @torch.no_grad()
    def _follow(self) -> None:
        self.ema_w.lerp_(self.w.weight, 0.1)
        self.ema_b.mul_(0.9).add_(self.w.bias, alpha=0.1)
        self.updates += 1

    def forward(self, x: Tensor, y: Tensor) -> Any:
        if self.training:
            self._follow()
        teacher = F.softmax(F.linear(x, self.ema_w, self.ema_b) / 0.5, -1)
        return F.kl_div(F.log_softmax(self.w(x), -1), teacher, reduction="batchmean") + F.cross_entropy(
            self.w(x), y
        )


@case
def mean_teacher() -> Case:
    return Case(Momentum(), lambda n: (normal(n, 6), ids(n, high=4)))


class MoCo(nn.Module):
    """A queue of keys in a buffer, written at a pointer."""

    def __init__(self, size: int = 36) -> None:
        super().__init__()
        self.q, self.k, self.size = nn.Linear(6, 4), nn.Linear(6, 4).requires_grad_(False), size
        self.register_buffer("queue", F.normalize(torch.randn(4, size), dim=0))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    @torch.no_grad()
    def _enqueue(self, keys: Tensor) -> None:
        ptr = int(self.queue_ptr)
        self.queue[:, ptr : ptr + keys.shape[0]] = keys.T
        self.queue_ptr[0] = (ptr + keys.shape[0]) % self.size

    def forward(self, x1: Tensor, x2: Tensor) -> Any:
        q = F.normalize(self.q(x1), dim=1)
        with torch.no_grad():
            k = F.normalize(self.k(x2), dim=1)
        l_pos = torch.einsum("nc,nc->n", [q, k]).unsqueeze(-1)
        l_neg = torch.einsum("nc,ck->nk", [q, self.queue.clone().detach()])
        logits = torch.cat([l_pos, l_neg], dim=1) / 0.07
        if self.training:
            self._enqueue(k)
        return F.cross_entropy(logits, torch.zeros(logits.shape[0], dtype=torch.long))


@case
def moco() -> Case:
    return Case(MoCo(), lambda n: (normal(n, 6), normal(n, 6) + 0.2))


class BarlowTwins(nn.Module):
    """The cross-correlation of features over the batch, its diagonal by flattening."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.bn = (
            nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)),
            nn.BatchNorm1d(4, affine=False),
        )

    def forward(self, x1: Tensor, x2: Tensor) -> Any:
        c = self.bn(self.net(x1)).T @ self.bn(self.net(x2))
        c.div_(x1.shape[0])
        on = torch.diagonal(c).add_(-1).pow_(2).sum()
        n, m = c.shape
        off = c.flatten()[:-1].view(n - 1, n + 1)[:, 1:].flatten().pow_(2).sum()
        assert n == m
        return on + 0.005 * off


@case
def barlow_twins() -> Case:
    return Case(BarlowTwins(), lambda n: (normal(n, 6), normal(n, 6) + 0.2))


class ArcFace(nn.Module):
    """An additive angular margin by scattering into zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.weight = nn.Linear(6, 8), nn.Parameter(torch.randn(5, 8))

    def forward(self, x: Tensor, label: Tensor) -> Any:
        cosine = F.linear(F.normalize(self.body(x)), F.normalize(self.weight))
        sine = torch.sqrt((1.0 - torch.pow(cosine, 2)).clamp(1e-6, 1))
        phi = cosine * 0.9 - sine * 0.43
        phi = torch.where(cosine > -0.9, phi, cosine - 0.2)
        one_hot = torch.zeros(cosine.size(), device=x.device)
        one_hot.scatter_(1, label.view(-1, 1).long(), 1)
        output = (one_hot * phi) + ((1.0 - one_hot) * cosine)
        output *= 8.0
        return F.cross_entropy(output, label)


@case
def arcface() -> Case:
    return Case(ArcFace(), lambda n: (normal(n, 6), ids(n, high=5)))
