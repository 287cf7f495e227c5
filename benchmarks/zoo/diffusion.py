"""Diffusion models and a spatial transformer."""

import math
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from zoo.case import Case, case, ids, normal
from zoo.vision import pictures


def timestep_embedding(timesteps: Tensor, dim: int, max_period: int = 10000) -> Tensor:
    """Sinusoids of time, as in guided diffusion."""
    half = dim // 2
    freqs = torch.exp(-math.log(max_period) * torch.arange(0, half, dtype=torch.float32) / half)
    args = timesteps[:, None].float() * freqs.to(timesteps.device)[None]
    embedding = torch.cat([torch.cos(args), torch.sin(args)], dim=-1)
    if dim % 2:
        embedding = torch.cat([embedding, torch.zeros_like(embedding[:, :1])], dim=-1)
    return embedding


class ResBlock(nn.Module):
    def __init__(self, channels: int, emb: int, out: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(2, channels), nn.SiLU(), nn.Conv2d(channels, out, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb, 2 * out))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(2, out), nn.SiLU(), nn.Dropout(p=0.1), nn.Conv2d(out, out, 3, padding=1)
        )
        self.skip = nn.Identity() if out == channels else nn.Conv2d(channels, out, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Any:
        h = self.in_layers(x)
        emb_out = self.emb_layers(emb).type(h.dtype)
        while len(emb_out.shape) < len(h.shape):
            emb_out = emb_out[..., None]
        out_norm, out_rest = self.out_layers[0], self.out_layers[1:]
        scale, shift = torch.chunk(emb_out, 2, dim=1)
        h = out_rest(out_norm(h) * (1 + scale) + shift)
        return self.skip(x) + h


class AttentionBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, channels)
        self.qkv, self.proj = nn.Conv1d(channels, channels * 3, 1), nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Any:
        b, c, *spatial = x.shape
        x = x.reshape(b, c, -1)
        qkv = self.qkv(self.norm(x)).reshape(b * 2, -1, x.shape[-1])
        q, k, v = torch.split(qkv, qkv.shape[1] // 3, dim=1)
        scale = 1 / math.sqrt(math.sqrt(q.shape[1]))
        weight = torch.einsum("bct,bcs->bts", q * scale, k * scale)
        weight = torch.softmax(weight.float(), dim=-1).type(weight.dtype)
        h = torch.einsum("bts,bcs->bct", weight, v).reshape(b, -1, x.shape[-1])
        return (x + self.proj(h)).reshape(b, c, *spatial)


class TimestepSequential(nn.Sequential):
    """Hands time to those children that take it."""

    def forward(self, x: Tensor, emb: Tensor) -> Any:  # type: ignore[override]
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
        return x


class DiffusionUNet(nn.Module):
    """A U-Net with time, whose training draws times and noise; the loss is that of DDPM."""

    def __init__(self) -> None:
        super().__init__()
        self.time_embed = nn.Sequential(nn.Linear(9, 16), nn.SiLU(), nn.Linear(16, 16))
        self.label_emb = nn.Embedding(5, 16)
        self.input_blocks = nn.ModuleList([
            TimestepSequential(nn.Conv2d(3, 8, 3, padding=1)),
            TimestepSequential(ResBlock(8, 16, 8), AttentionBlock(8)),
            TimestepSequential(nn.Conv2d(8, 8, 3, stride=2, padding=1)),
            TimestepSequential(ResBlock(8, 16, 12)),
        ])  # fmt: skip
        self.middle_block = TimestepSequential(ResBlock(12, 16, 12), AttentionBlock(12))
        self.output_blocks = nn.ModuleList([
            TimestepSequential(ResBlock(24, 16, 8)),
            TimestepSequential(ResBlock(16, 16, 8), nn.Upsample(scale_factor=2, mode="nearest")),
            TimestepSequential(ResBlock(16, 16, 8)),
            TimestepSequential(ResBlock(16, 16, 8)),
        ])  # fmt: skip
        self.out = nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 3, 3, padding=1))
        betas = torch.linspace(1e-4, 0.02, 10)
        self.register_buffer("alphas_cumprod", torch.cumprod(1 - betas, 0))

    def predict(self, x: Tensor, t: Tensor, y: Tensor) -> Any:
        emb = self.time_embed(timestep_embedding(t, 9)) + self.label_emb(y)
        hs, h = [], x
        for module in self.input_blocks:
            h = module(h, emb)
            hs.append(h)
        h = self.middle_block(h, emb)
        for module in self.output_blocks:
            h = module(torch.cat([h, hs.pop()], dim=1), emb)
        return self.out(h)

    def forward(self, x: Tensor, t: Tensor, noise: Tensor, y: Tensor) -> Any:
        shape = (x.shape[0], *((1,) * (len(x.shape) - 1)))
        a = self.alphas_cumprod.gather(-1, t).reshape(shape)
        noisy = a.sqrt() * x + (1 - a).sqrt() * noise
        error = (self.predict(noisy, t, y) - noise) ** 2
        per_sample = error.mean(dim=list(range(1, len(error.shape))))
        snr = (a / (1 - a)).reshape(-1)
        return {"loss": (per_sample * torch.clamp(snr, max=5.0) / snr).mean(), "mse": per_sample}


@case
def diffusion_unet() -> Case:
    def batch(n: int) -> tuple[Any, ...]:
        return normal(n, 3, 8, 8), ids(n, high=10), normal(n, 3, 8, 8) + 1, ids(n, high=5)

    return Case(DiffusionUNet(), batch)


class NoisyDiffusion(DiffusionUNet):
    """The same, with times and noise drawn inside."""

    def forward(self, x: Tensor, y: Tensor) -> Any:  # type: ignore[override]
        t = torch.randint(0, 10, (x.shape[0],), device=x.device).long()
        return super().forward(x, t, torch.randn_like(x), y)


@case
def diffusion_drawn() -> Case:
    return Case(NoisyDiffusion(), lambda n: (normal(n, 3, 8, 8), ids(n, high=5)))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class DiTBlock(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = nn.MultiheadAttention(dim, 2, batch_first=True)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(dim, 4 * dim), nn.GELU(approximate="tanh"), nn.Linear(4 * dim, dim)
        )
        self.ada = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Any:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.ada(c).chunk(6, dim=1)
        h = modulate(self.norm1(x), shift_a, scale_a)
        x = x + gate_a.unsqueeze(1) * self.attn(h, h, h, need_weights=False)[0]
        return x + gate_m.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_m, scale_m))


class DiT(nn.Module):
    """Patches, frozen positions, classes dropped at random for guidance."""

    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.x_embedder = nn.Conv2d(3, dim, 4, 4)
        self.pos_embed = nn.Parameter(torch.randn(1, 4, dim), requires_grad=False)
        self.y_embedder = nn.Embedding(6, dim)
        self.blocks = nn.ModuleList(DiTBlock(dim) for _ in range(3))
        self.final = nn.Linear(dim, 4 * 4 * 3)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Any:
        x = self.x_embedder(x).flatten(2).transpose(1, 2) + self.pos_embed
        if self.training:
            drop_ids = torch.rand(y.shape[0], device=y.device) < 0.1
            y = torch.where(drop_ids, 5, y)
        c = timestep_embedding(t, 8) + self.y_embedder(y)
        for block in self.blocks:
            x = block(x, c)
        x = self.final(x)
        h = w = int(x.shape[1] ** 0.5)
        assert h * w == x.shape[1]
        x = x.reshape(shape=(x.shape[0], h, w, 4, 4, 3))
        return torch.einsum("nhwpqc->nchpwq", x).reshape(shape=(x.shape[0], 3, h * 4, w * 4))


@case
def dit() -> Case:
    return Case(
        DiT(),
        lambda n: (normal(n, 3, 8, 8), ids(n, high=9), ids(n, high=5), normal(n, 3, 8, 8)),
        nn.MSELoss(),
    )


class SpatialTransformer(nn.Module):
    """The tutorial's STN: localisation, affine grid, sampling."""

    def __init__(self) -> None:
        super().__init__()
        self.localization = nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2, stride=2), nn.ReLU(True))
        self.fc_loc = nn.Sequential(nn.Linear(4 * 7 * 7, 8), nn.ReLU(True), nn.Linear(8, 3 * 2))
        self.fc_loc[2].bias.data.copy_(torch.tensor([1, 0, 0, 0, 1, 0], dtype=torch.float))
        self.conv, self.drop, self.fc = nn.Conv2d(3, 4, 5), nn.Dropout2d(), nn.Linear(4 * 36, 5)

    def forward(self, x: Tensor) -> Any:
        xs = self.localization(x).view(-1, 4 * 7 * 7)
        theta = self.fc_loc(xs).view(-1, 2, 3)
        x = F.grid_sample(x, F.affine_grid(theta, x.size(), align_corners=False), align_corners=False)
        x = F.relu(F.max_pool2d(self.drop(self.conv(x)), 2))
        return F.log_softmax(self.fc(x.view(-1, 4 * 36)), dim=1)


@case
def spatial_transformer() -> Case:
    return Case(SpatialTransformer(), pictures, F.nll_loss)
