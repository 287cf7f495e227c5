"""Models of likelihood: autoregressive, flows, mixtures, critics."""

import math
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from zoo.case import Case, case, ids, normal, seeded


class WaveNet(nn.Module):
    """Dilated causal convolutions with gates, residuals, skips, and weight norm."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.start = norm(nn.Conv1d(8, 8, 1))
        self.dilated = nn.ModuleList(norm(nn.Conv1d(8, 16, 2, dilation=2**i)) for i in range(3))
        self.res = nn.ModuleList(norm(nn.Conv1d(8, 16, 1)) for _ in range(3))
        self.end = nn.Conv1d(8, 8, 1)

    def forward(self, x: Tensor) -> Any:
        x = self.start(F.one_hot(x, 8).float().transpose(1, 2))
        output = torch.zeros_like(x)
        for i, (conv, res) in enumerate(zip(self.dilated, self.res, strict=True)):
            in_act = conv(F.pad(x, (2**i, 0)))
            acts = torch.tanh(in_act[:, :8, :]) * torch.sigmoid(in_act[:, 8:, :])
            res_skip = res(acts)
            x = x + res_skip[:, :8, :]
            output = output + res_skip[:, 8:, :]
        return self.end(F.relu(output))


def next_sample(out: Tensor, y: Tensor) -> Any:
    """Cross entropy over channels, positions last."""
    return F.cross_entropy(out, y)


@case
def wavenet() -> Case:
    return Case(WaveNet(parametrizations.weight_norm), lambda n: (ids(n, 10, high=8),) * 2, next_sample)


@case
def old_weight_norm() -> Case:
    return Case(WaveNet(nn.utils.weight_norm), lambda n: (ids(n, 10, high=8),) * 2, next_sample)


class MaskedConv2d(nn.Conv2d):
    """PixelCNN's convolution, which multiplies its own weights in the forward."""

    def __init__(self, kind: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("mask", self.weight.data.clone())
        _, _, kh, kw = self.weight.size()
        self.mask.fill_(1)
        self.mask[:, :, kh // 2, kw // 2 + (kind == "B") :] = 0
        self.mask[:, :, kh // 2 + 1 :] = 0

    def forward(self, x: Tensor) -> Any:
        self.weight.data *= self.mask
        return super().forward(x)


@case
def pixel_cnn() -> Case:
    model = nn.Sequential(
        MaskedConv2d("A", 1, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(True),
        MaskedConv2d("B", 8, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(True),
        nn.Conv2d(8, 4, 1),
    )  # fmt: skip
    return Case(model, lambda n: (normal(n, 1, 6, 6), ids(n, 6, 6, high=4)), next_sample)


class Coupling(nn.Module):
    """RealNVP's coupling with an alternating mask, and an invertible linear map as Glow has it."""

    def __init__(self, dim: int, flip: bool) -> None:
        super().__init__()
        mask = torch.arange(dim) % 2 == int(flip)
        self.register_buffer("mask", mask.float())
        self.s = nn.Sequential(nn.Linear(dim, 8), nn.Tanh(), nn.Linear(8, dim), nn.Tanh())
        self.t = nn.Sequential(nn.Linear(dim, 8), nn.ReLU(), nn.Linear(8, dim))
        q, _ = torch.linalg.qr(torch.randn(dim, dim))
        self.W = nn.Parameter(q)
        self.loc, self.log_scale = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor, logdet: Tensor) -> tuple[Tensor, Tensor]:
        x = (x + self.loc) * torch.exp(self.log_scale)
        x = x @ self.W
        logdet = logdet + self.log_scale.sum() + torch.slogdet(self.W)[1]
        x_ = x * self.mask
        s, t = self.s(x_) * (1 - self.mask), self.t(x_) * (1 - self.mask)
        return x_ + (1 - self.mask) * (x * torch.exp(s) + t), logdet + s.sum(dim=1)


class RealNVP(nn.Module):
    def __init__(self, dim: int = 4) -> None:
        super().__init__()
        self.flows = nn.ModuleList(Coupling(dim, bool(i % 2)) for i in range(3))
        self.register_buffer("eye", torch.eye(dim))

    def forward(self, x: Tensor) -> Any:
        logdet = x.new_zeros(x.shape[0])
        for flow in self.flows:
            x, logdet = flow(x, logdet)
        prior = torch.distributions.MultivariateNormal(
            torch.zeros(4).to(x), self.eye, validate_args=False
        )
        return -(prior.log_prob(x) + logdet).mean()


@case
def real_nvp() -> Case:
    return Case(RealNVP(), lambda n: (normal(n, 4),))


class MDN(nn.Module):
    """A mixture density network with a logsumexp over components."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(3, 12), nn.Tanh())
        self.pi, self.mu, self.sigma = nn.Linear(12, 4), nn.Linear(12, 8), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Any:
        h = self.hidden(x)
        return F.softmax(self.pi(h), -1), self.mu(h).view(-1, 4, 2), torch.exp(self.sigma(h))


def mixture_loss(out: tuple[Tensor, Tensor, Tensor], y: Tensor) -> Any:
    """Negative log likelihood; by sample weights of the target's sign."""
    pi, mu, sigma = out
    z = (y.unsqueeze(1).expand_as(mu) - mu) * torch.reciprocal(sigma).unsqueeze(2)
    logp = -0.5 * (z**2).sum(-1) - 2 * torch.log(sigma) - math.log(2 * math.pi)
    nll = -torch.logsumexp(torch.log(pi) + logp, 1)
    weight = 1 + (y[:, 0] > 0).float()
    return torch.sum(nll * weight) / weight.sum()


@case
def mixture_density() -> Case:
    return Case(MDN(), lambda n: (normal(n, 3), normal(n, 2)), mixture_loss)


class GumbelAutoencoder(nn.Module):
    """Gumbel softmax, hard in eval, with a temperature in a buffer that is annealed at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.enc, self.dec = nn.Linear(8, 12), nn.Linear(12, 8)
        self.register_buffer("temperature", torch.tensor(1.0))

    def forward(self, x: Tensor) -> Any:
        q = self.enc(x).view(-1, 3, 4)
        if self.training:
            z = F.gumbel_softmax(q, tau=self.temperature.clone(), hard=True)
            self.temperature.mul_(0.99).clamp_(min=0.5)
        else:
            z = F.one_hot(q.argmax(-1), 4).to(q.dtype)
        out = self.dec(z.flatten(1))
        log_ratio = torch.log(F.softmax(q, -1) * 4 + 1e-20)
        kld = torch.sum(F.softmax(q, -1) * log_ratio, dim=(-1, -2)).mean()
        return F.mse_loss(out, x) + kld, out


@case
def gumbel() -> Case:
    return Case(GumbelAutoencoder(), lambda n: (normal(n, 8),))


class WassersteinCritic(nn.Module):
    """WGAN-GP: the gradient penalty differentiates the critic inside of the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Softplus(), nn.Linear(8, 1))

    def forward(self, real: Tensor, fake: Tensor, alpha: Tensor) -> Any:
        between = (alpha * real + (1 - alpha) * fake).requires_grad_(True)
        (gradient,) = torch.autograd.grad(self.net(between).sum(), between, create_graph=True)
        penalty = ((gradient.norm(2, dim=1) - 1) ** 2).mean()
        return self.net(fake).mean() - self.net(real).mean() + 10 * penalty


@case
def wgan_gp() -> Case:
    def batch(n: int) -> tuple[Any, ...]:
        return normal(n, 6), normal(n, 6) * 2, torch.rand(n, 1, generator=seeded(n))

    return Case(WassersteinCritic(), batch, trains=True)
