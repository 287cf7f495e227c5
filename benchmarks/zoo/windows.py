"""Attention in windows, masked patches, capsules, volumes."""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from zoo.case import Case, case, ids, normal, seeded
from zoo.vision import pictures


class WindowAttention(nn.Module):
    """Swin: windows by view, a cyclic shift, a mask made of slices in the constructor."""

    def __init__(self, dim: int, size: int, window: int, shift: int) -> None:
        super().__init__()
        self.window, self.shift = window, shift
        self.norm, self.qkv, self.proj = nn.LayerNorm(dim), nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, 2))
        nn.init.trunc_normal_(self.table, std=0.5)
        grid = torch.stack(torch.meshgrid([torch.arange(window)] * 2, indexing="ij")).flatten(1)
        relative = (grid[:, :, None] - grid[:, None, :]).permute(1, 2, 0).contiguous()
        relative[:, :, 0] += window - 1
        relative[:, :, 1] += window - 1
        relative[:, :, 0] *= 2 * window - 1
        self.register_buffer("relative_position_index", relative.sum(-1))
        mask = None
        if shift > 0:
            img, cnt = torch.zeros((1, size, size, 1)), 0
            for hs in (slice(0, -window), slice(-window, -shift), slice(-shift, None)):
                for ws in (slice(0, -window), slice(-window, -shift), slice(-shift, None)):
                    img[:, hs, ws, :] = cnt
                    cnt += 1
            windows = self.partition(img).view(-1, window * window)
            mask = windows.unsqueeze(1) - windows.unsqueeze(2)
            mask = mask.masked_fill(mask != 0, -100.0).masked_fill(mask == 0, 0.0)
        self.register_buffer("attn_mask", mask)

    def partition(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        x = x.view(b, h // self.window, self.window, w // self.window, self.window, c)
        return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, self.window, self.window, c)

    def forward(self, x: Tensor) -> Any:
        b, size, _, c = x.shape
        shortcut = x
        x = self.norm(x)
        if self.shift > 0:
            x = torch.roll(x, shifts=(-self.shift, -self.shift), dims=(1, 2))
        windows = self.partition(x).view(-1, self.window**2, c)
        n = windows.shape[1]
        qkv = self.qkv(windows).reshape(-1, n, 3, 2, c // 2).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        attn = (q * (c // 2) ** -0.5) @ k.transpose(-2, -1)
        bias = self.table[self.relative_position_index.view(-1)].view(n, n, -1)
        attn = attn + bias.permute(2, 0, 1).contiguous().unsqueeze(0)
        if self.attn_mask is not None:
            nw = self.attn_mask.shape[0]
            attn = attn.view(-1, nw, 2, n, n) + self.attn_mask.unsqueeze(1).unsqueeze(0)
            attn = attn.view(-1, 2, n, n)
        x = (attn.softmax(-1) @ v).transpose(1, 2).reshape(-1, n, c)
        x = self.proj(x).view(-1, self.window, self.window, c)
        b = int(x.shape[0] / (size * size / self.window / self.window))
        x = x.view(b, size // self.window, size // self.window, self.window, self.window, -1)
        x = x.permute(0, 1, 3, 2, 4, 5).contiguous().view(b, size, size, -1)
        if self.shift > 0:
            x = torch.roll(x, shifts=(self.shift, self.shift), dims=(1, 2))
        return shortcut + x


class PatchMerging(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Any:
        parts = [x[:, i::2, j::2, :] for j in (0, 1) for i in (0, 1)]
        return self.reduction(torch.cat(parts, -1))


class ChannelsLast(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return x.permute(0, 2, 3, 1)


@case
def swin() -> Case:
    layers = (
        nn.Conv2d(3, 8, 2, 2), ChannelsLast(), WindowAttention(8, 8, 4, 0), WindowAttention(8, 8, 4, 2),
        PatchMerging(8), WindowAttention(16, 4, 4, 0), nn.Flatten(1, 2), nn.LayerNorm(16),
    )  # fmt: skip
    return Case(nn.Sequential(*layers, nn.Linear(16, 5)), swin_batch, swin_loss)


def swin_batch(n: int) -> tuple[Tensor, Tensor]:
    return normal(n, 3, 16, 16), ids(n, high=5)


def swin_loss(out: Tensor, y: Tensor) -> Any:
    """Mixed labels, as timm's Mixup makes them: the batch reversed, one weight for all."""
    target = F.one_hot(y, 5).float()
    mixed = target * 0.7 + target.flip(0) * 0.3
    return torch.sum(-mixed * F.log_softmax(out.mean(1), dim=-1), dim=-1).mean()


class MAE(nn.Module):
    """Masked autoencoder: noise is sorted, kept patches are gathered, order is restored."""

    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.patch, self.mask_token = nn.Conv2d(3, dim, 4, 4), nn.Parameter(torch.randn(1, 1, dim))
        self.cls_token, self.pos = (
            nn.Parameter(torch.randn(1, 1, dim)),
            nn.Parameter(torch.randn(1, 17, dim)),
        )
        self.block = nn.TransformerEncoderLayer(dim, 2, 16, 0.0, batch_first=True, norm_first=True)
        self.decoder = nn.TransformerEncoderLayer(dim, 2, 16, 0.0, batch_first=True, activation="gelu")
        self.pred = nn.Linear(dim, 48)

    def patchify(self, imgs: Tensor) -> Tensor:
        h = w = imgs.shape[2] // 4
        x = imgs.reshape(shape=(imgs.shape[0], 3, h, 4, w, 4))
        return torch.einsum("nchpwq->nhwpqc", x).reshape(shape=(imgs.shape[0], h * w, 48))

    def forward(self, imgs: Tensor, noise: Tensor) -> Any:
        x = self.patch(imgs).flatten(2).transpose(1, 2) + self.pos[:, 1:, :]
        n, length, d = x.shape
        keep = int(length * 0.25)
        ids_shuffle = torch.argsort(noise, dim=1)
        ids_restore = torch.argsort(ids_shuffle, dim=1)
        kept = torch.gather(x, dim=1, index=ids_shuffle[:, :keep].unsqueeze(-1).repeat(1, 1, d))
        mask = torch.ones([n, length], device=x.device)
        mask[:, :keep] = 0
        mask = torch.gather(mask, dim=1, index=ids_restore)
        cls_tokens = (self.cls_token + self.pos[:, :1, :]).expand(n, -1, -1)
        latent = self.block(torch.cat((cls_tokens, kept), dim=1))
        tokens = self.mask_token.repeat(n, ids_restore.shape[1] + 1 - latent.shape[1], 1)
        x_ = torch.cat([latent[:, 1:, :], tokens], dim=1)
        x_ = torch.gather(x_, dim=1, index=ids_restore.unsqueeze(-1).repeat(1, 1, d))
        pred = self.pred(self.decoder(torch.cat([latent[:, :1, :], x_], dim=1)))[:, 1:, :]
        loss = ((pred - self.patchify(imgs)) ** 2).mean(dim=-1)
        return (loss * mask).sum() / mask.sum(), pred, mask


@case
def masked_autoencoder() -> Case:
    return Case(MAE(), lambda n: (normal(n, 3, 16, 16), torch.rand(n, 16, generator=seeded(n))))


class CapsNet(nn.Module):
    """Capsules with routing by agreement, three rounds, and a reconstruction of the right class."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.primary = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, 2)
        self.W = nn.Parameter(torch.randn(1, 18, 5, 6, 4) * 0.3)
        self.decoder = nn.Sequential(
            nn.Linear(30, 16), nn.ReLU(inplace=True), nn.Linear(16, 192), nn.Sigmoid()
        )

    @staticmethod
    def squash(s: Tensor, dim: int = -1) -> Tensor:
        squared = (s**2).sum(dim=dim, keepdim=True)
        return squared / (1 + squared) * s / (torch.sqrt(squared) + 1e-8)

    def forward(self, x: Tensor, y: Tensor) -> Any:
        u = self.primary(F.relu(self.conv(x)))
        batch = u.size(0)
        u = self.squash(u.view(batch, -1, 4))[:, None].transpose(1, 2).unsqueeze(-1)
        u_hat = torch.matmul(self.W[:, : u.size(1)], u).squeeze(-1)
        detached = u_hat.detach()
        b = torch.zeros(batch, u.size(1), 5, 1, device=x.device)
        for it in range(2):
            c = b.softmax(dim=2)
            v = self.squash((c * detached).sum(dim=1))
            b += (
                torch.matmul(detached, v.unsqueeze(-1).transpose(1, 1)).sum(-1, keepdim=True)
                if it < 0
                else (detached * v.unsqueeze(1)).sum(-1, keepdim=True)
            )
        v = self.squash((b.softmax(dim=2) * u_hat).sum(dim=1))
        lengths = torch.norm(v, dim=-1)
        target = torch.eye(5, device=x.device).index_select(dim=0, index=y)
        left = F.relu(0.9 - lengths) ** 2
        right = F.relu(lengths - 0.1) ** 2
        margin = (target * left + 0.5 * (1 - target) * right).sum(dim=1).mean()
        rec = self.decoder((v * target[:, :, None]).view(batch, -1))
        return {
            "loss": margin + 0.0005 * F.mse_loss(rec, x.view(batch, -1), reduction="sum"),
            "pred": lengths.argmax(1),
        }


@case
def capsules() -> Case:
    return Case(CapsNet(), lambda n: pictures(n, side=8))


@case
def volumes() -> Case:
    model = nn.Sequential(
        nn.Conv3d(2, 4, 3, padding=1), nn.BatchNorm3d(4), nn.ReLU(), nn.AdaptiveMaxPool3d(2),
        nn.Flatten(), nn.Linear(32, 4),
    )  # fmt: skip
    return Case(model, lambda n: (normal(n, 2, 4, 4, 4), ids(n, high=4)), nn.MultiMarginLoss())
