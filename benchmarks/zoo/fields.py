"""Functions of coordinates, operators of fields, and tables seen by attention."""

import itertools
import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from zoo.case import Case, case, ids, normal


class TabNet(nn.Module):
    """Ghost batch normalisation of chunks and sparsemax by sorting."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.fc = nn.BatchNorm1d(8), nn.Linear(8, 8)
        self.att, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def ghost(self, x: Tensor) -> Tensor:
        chunks = x.chunk(int(np.ceil(x.shape[0] / 3)), 0)
        return torch.cat([self.bn(x_) for x_ in chunks], dim=0)

    @staticmethod
    def sparsemax(z: Tensor) -> Tensor:
        z = z - z.max(dim=-1, keepdim=True).values
        zs = torch.sort(z, dim=-1, descending=True)[0]
        r = torch.arange(1, z.shape[-1] + 1, device=z.device, dtype=z.dtype)
        bound = 1 + r * zs
        cumsum = zs.cumsum(-1)
        k = (bound > cumsum).sum(-1, keepdim=True)
        tau = (cumsum.gather(-1, k - 1) - 1) / k.to(z.dtype)
        return torch.clamp(z - tau, min=0)

    def forward(self, x: Tensor) -> Any:
        h = F.glu(torch.cat([self.fc(self.ghost(x)), x], -1), -1)
        mask = self.sparsemax(self.att(h))
        return self.head(h * mask)


@case
def tabnet() -> Case:
    return Case(TabNet(), lambda n: (normal(n, 8), ids(n, high=3)), nn.CrossEntropyLoss())


class NeRF(nn.Module):
    """Positional encoding by powers, a skip in the middle, and the volume rendering of rays."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("freqs", 2.0 ** torch.linspace(0, 2, 3), persistent=False)
        self.pts = nn.ModuleList([nn.Linear(21, 12), nn.Linear(33, 12)])
        self.alpha, self.rgb = nn.Linear(12, 1), nn.Linear(12 + 3, 3)

    def embed(self, x: Tensor) -> Tensor:
        xf = x[..., None, :] * self.freqs[:, None]
        return torch.cat([x, torch.sin(xf).flatten(-2), torch.cos(xf).flatten(-2)], -1)

    def forward(self, rays_o: Tensor, rays_d: Tensor) -> Any:
        t = torch.linspace(0.0, 1.0, steps=6, device=rays_o.device)
        z = (1.0 * (1 - t) + 4.0 * t).expand([rays_o.shape[0], 6])
        if self.training:
            mids = 0.5 * (z[..., 1:] + z[..., :-1])
            upper, lower = torch.cat([mids, z[..., -1:]], -1), torch.cat([z[..., :1], mids], -1)
            z = lower + (upper - lower) * torch.rand(z.shape, device=z.device)
        pts = rays_o[..., None, :] + rays_d[..., None, :] * z[..., :, None]
        h = emb = self.embed(pts)
        h = F.relu(self.pts[0](h))
        h = F.relu(self.pts[1](torch.cat([emb, h], -1)))
        sigma = self.alpha(h)[..., 0]
        rgb = torch.sigmoid(self.rgb(torch.cat([h, rays_d[:, None].expand(pts.shape)], -1)))
        dists = z[..., 1:] - z[..., :-1]
        dists = torch.cat([dists, torch.Tensor([1e10]).to(dists).expand(dists[..., :1].shape)], -1)
        alpha = 1.0 - torch.exp(-F.relu(sigma) * dists * torch.norm(rays_d[..., None, :], dim=-1))
        trans = torch.cumprod(
            torch.cat([torch.ones((alpha.shape[0], 1)).to(alpha), 1.0 - alpha + 1e-10], -1), -1
        )
        weights = alpha * trans[:, :-1]
        acc = torch.sum(weights, -1)
        return torch.sum(weights[..., None] * rgb, -2) + (1 - acc[..., None]), acc


def img2mse(out: tuple[Tensor, Tensor], y: Tensor) -> Any:
    """The loss, and PSNR from it as a number that nobody differentiates."""
    return torch.mean((out[0] - y) ** 2)


@case
def nerf() -> Case:
    return Case(NeRF(), lambda n: (normal(n, 3), normal(n, 3) + 1, normal(n, 3)), img2mse)


class Sine(nn.Module):
    def __init__(self, w0: float = 1.0) -> None:
        super().__init__()
        self.w0 = w0

    def forward(self, x: Tensor) -> Any:
        return torch.sin(self.w0 * x)


class SIREN(nn.Module):
    """Sines, and a loss on the gradient by coordinates, by autograd within the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 12), Sine(3.0), nn.Linear(12, 12), Sine(), nn.Linear(12, 1))

    def forward(self, coords: Tensor) -> Any:
        coords = coords.clone().detach().requires_grad_(True)
        out = self.net(coords)
        grad = torch.autograd.grad(out, [coords], grad_outputs=torch.ones_like(out), create_graph=True)[0]
        return out, grad


@case
def siren() -> Case:
    return Case(
        SIREN(),
        lambda n: (normal(n, 2), normal(n, 2)),
        lambda out, y: F.mse_loss(out[1], y) + out[0].abs().mean(),
    )


class KANLinear(nn.Module):
    """efficient-kan: B-splines by recursion on a grid in a buffer."""

    def __init__(self, inp: int, out: int, grid_size: int = 4, order: int = 2) -> None:
        super().__init__()
        self.order = order
        grid = (
            (torch.arange(-order, grid_size + order + 1) * (2 / grid_size) - 1)
            .expand(inp, -1)
            .contiguous()
        )
        self.register_buffer("grid", grid)
        self.base_weight = nn.Parameter(torch.randn(out, inp) * 0.3)
        self.spline_weight = nn.Parameter(torch.randn(out, inp, grid_size + order) * 0.3)
        self.scaler = nn.Parameter(torch.rand(out, inp))

    def b_splines(self, x: Tensor) -> Tensor:
        assert x.dim() == 2
        grid = self.grid
        x = x.unsqueeze(-1)
        bases = ((x >= grid[:, :-1]) & (x < grid[:, 1:])).to(x.dtype)
        for k in range(1, self.order + 1):
            left = (x - grid[:, : -(k + 1)]) / (grid[:, k:-1] - grid[:, : -(k + 1)]) * bases[:, :, :-1]
            right = (grid[:, k + 1 :] - x) / (grid[:, k + 1 :] - grid[:, 1:(-k)]) * bases[:, :, 1:]
            bases = left + right
        return bases.contiguous()

    def forward(self, x: Tensor) -> Any:
        base = F.linear(F.silu(x), self.base_weight)
        weight = (self.spline_weight * self.scaler.unsqueeze(-1)).view(self.base_weight.shape[0], -1)
        return base + F.linear(self.b_splines(x).view(x.size(0), -1), weight)


@case
def kan() -> Case:
    return Case(
        nn.Sequential(KANLinear(3, 6), KANLinear(6, 2)),
        lambda n: (normal(n, 3), normal(n, 2)),
        nn.HuberLoss(),
    )


class SpectralConv2d(nn.Module):
    """FNO's layer: complex weights for low modes of both signs, written into zeros."""

    def __init__(self, width: int, modes: int) -> None:
        super().__init__()
        self.width, self.modes = width, modes
        scale = 1 / (width * width)
        self.weights1 = nn.Parameter(scale * torch.rand(width, width, modes, modes, dtype=torch.cfloat))
        self.weights2 = nn.Parameter(scale * torch.rand(width, width, modes, modes, dtype=torch.cfloat))

    def forward(self, x: Tensor) -> Any:
        batchsize = x.shape[0]
        x_ft = torch.fft.rfft2(x)
        out_ft = torch.zeros(
            batchsize, self.width, x.size(-2), x.size(-1) // 2 + 1, dtype=torch.cfloat, device=x.device
        )
        m = self.modes
        out_ft[:, :, :m, :m] = torch.einsum("bixy,ioxy->boxy", x_ft[:, :, :m, :m], self.weights1)
        out_ft[:, :, -m:, :m] = torch.einsum("bixy,ioxy->boxy", x_ft[:, :, -m:, :m], self.weights2)
        return torch.fft.irfft2(out_ft, s=(x.size(-2), x.size(-1)))


class FNO(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.p = nn.Linear(3, width)
        self.convs = nn.ModuleList(SpectralConv2d(width, 2) for _ in range(2))
        self.ws = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in range(2))
        self.q = nn.Conv2d(width, 1, 1)

    def get_grid(self, shape: torch.Size, device: torch.device) -> Tensor:
        b, sx, sy = shape[0], shape[1], shape[2]
        gx = (
            torch.tensor(np.linspace(0, 1, sx), dtype=torch.float)
            .reshape(1, sx, 1, 1)
            .repeat([b, 1, sy, 1])
        )
        gy = (
            torch.tensor(np.linspace(0, 1, sy), dtype=torch.float)
            .reshape(1, 1, sy, 1)
            .repeat([b, sx, 1, 1])
        )
        return torch.cat((gx, gy), dim=-1).to(device)

    def forward(self, x: Tensor) -> Any:
        x = torch.cat((x, self.get_grid(x.shape, x.device)), dim=-1)
        x = F.pad(self.p(x).permute(0, 3, 1, 2), [0, 2, 0, 2])
        for conv, w in zip(self.convs, self.ws, strict=True):
            x = F.gelu(conv(x) + w(x))
        return self.q(x[..., :-2, :-2]).permute(0, 2, 3, 1)


def relative_l2(out: Tensor, y: Tensor) -> Any:
    """The usual loss of operators: relative norms by sample, added up."""
    n = out.size(0)
    diff = torch.norm(out.reshape(n, -1) - y.reshape(n, -1), 2, 1)
    return torch.sum(diff / torch.norm(y.reshape(n, -1), 2, 1))


@case
def fourier_operator() -> Case:
    return Case(FNO(), lambda n: (normal(n, 6, 6, 1), normal(n, 6, 6, 1)), relative_l2)


class ODEFunc(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))
        self.nfe = 0

    def forward(self, t: Tensor, y: Tensor) -> Any:
        self.nfe += 1
        return self.net(y**3) * (1 + t)


class NeuralODE(nn.Module):
    """Runge-Kutta with a fixed number of steps, counting calls in a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.func, self.head = ODEFunc(), nn.Linear(4, 2)

    def forward(self, y: Tensor) -> Any:
        t = torch.linspace(0.0, 1.0, 4)
        for t0, t1 in itertools.pairwise(t):
            h = t1 - t0
            k1 = self.func(t0, y)
            k2 = self.func(t0 + h / 2, y + h * k1 / 2)
            k3 = self.func(t0 + h / 2, y + h * k2 / 2)
            k4 = self.func(t1, y + h * k3)
            y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return self.head(y)


@case
def neural_ode() -> Case:
    return Case(NeuralODE(), lambda n: (normal(n, 4), normal(n, 2)), nn.SmoothL1Loss(beta=math.pi))
