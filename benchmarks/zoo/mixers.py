"""More classifiers: auxiliary heads, stochastic depth, mixers."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from zoo.case import Case, case
from zoo.vision import pictures


class GoogLeNetOutputs(NamedTuple):
    """What Inception returns in training."""

    logits: Tensor
    aux_logits: Tensor | None


class Inception(nn.Module):
    """Branches by convolution, an auxiliary head and a NamedTuple in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8, eps=0.001))
        self.branch1 = nn.Conv2d(8, 4, 1)
        self.branch3 = nn.Sequential(
            nn.Conv2d(8, 4, (1, 3), padding=(0, 1)), nn.Conv2d(4, 4, (3, 1), padding=(1, 0))
        )
        self.branch_pool = nn.Conv2d(8, 4, 1)
        self.aux = nn.Linear(12, 5)
        self.fc = nn.Linear(12, 5)
        self.transform_input = True

    def forward(self, x: Tensor) -> Any:
        if self.transform_input:
            x_ch0 = torch.unsqueeze(x[:, 0], 1) * (0.229 / 0.5) + (0.485 - 0.5) / 0.5
            x_ch1 = torch.unsqueeze(x[:, 1], 1) * (0.224 / 0.5) + (0.456 - 0.5) / 0.5
            x_ch2 = torch.unsqueeze(x[:, 2], 1) * (0.225 / 0.5) + (0.406 - 0.5) / 0.5
            x = torch.cat((x_ch0, x_ch1, x_ch2), 1)
        x = F.relu(self.stem(x), inplace=True)
        pooled = self.branch_pool(F.avg_pool2d(x, kernel_size=3, stride=1, padding=1))
        x = torch.cat([self.branch1(x), self.branch3(x), pooled], 1)
        aux = None
        if self.training:
            aux = self.aux(F.adaptive_avg_pool2d(x, 1).flatten(1))
        x = F.dropout(F.adaptive_avg_pool2d(x, (1, 1)), training=self.training, p=0.0)
        x = self.fc(torch.flatten(x, 1))
        return GoogLeNetOutputs(x, aux) if self.training else x


def with_auxiliary(out: GoogLeNetOutputs, y: Tensor) -> Any:
    """The usual sum of both losses."""
    assert out.aux_logits is not None
    return F.cross_entropy(out.logits, y) + 0.4 * F.cross_entropy(out.aux_logits, y)


@case
def inception() -> Case:
    return Case(Inception(), pictures, with_auxiliary)


class DropPath(nn.Module):
    """timm's stochastic depth by sample."""

    def __init__(self, drop_prob: float = 0.2) -> None:
        super().__init__()
        self.drop_path = drop_prob

    def forward(self, x: Tensor) -> Any:
        if self.drop_path == 0.0 or not self.training:
            return x
        keep_prob = 1 - self.drop_path
        shape = (x.shape[0],) + (1,) * (x.ndim - 1)
        random_tensor = x.new_empty(shape).bernoulli_(keep_prob)
        if keep_prob > 0.0:
            random_tensor.div_(keep_prob)
        return x * random_tensor


class ConvNeXtBlock(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, kernel_size=7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1, self.pwconv2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.gamma = nn.Parameter(1e-1 * torch.ones(dim))
        self.grn = nn.Parameter(torch.randn(1, 1, 1, 4 * dim))
        self.drop = DropPath()

    def forward(self, x: Tensor) -> Any:
        shortcut = x
        x = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        x = F.gelu(self.pwconv1(x))
        gx = torch.norm(x, p=2, dim=(1, 2), keepdim=True)
        x = self.grn * (x * (gx / (gx.mean(dim=-1, keepdim=True) + 1e-6))) + x
        x = (self.gamma * self.pwconv2(x)).permute(0, 3, 1, 2)
        return shortcut + self.drop(x)


@case
def convnext() -> Case:
    layers = (nn.Conv2d(3, 8, 4, 4), ConvNeXtBlock(8), ConvNeXtBlock(8), nn.AdaptiveAvgPool2d(1))
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0]), reduction="mean")
    return Case(nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 5)), pictures, loss)


class MixerBlock(nn.Module):
    def __init__(self, tokens: int, dim: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.tokens = nn.Sequential(nn.Linear(tokens, 8), nn.GELU(), nn.Dropout(), nn.Linear(8, tokens))
        self.channels = nn.Sequential(nn.Linear(dim, 16), nn.GELU(), nn.Dropout(), nn.Linear(16, dim))

    def forward(self, x: Tensor) -> Any:
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class Patches(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(48, dim)

    def forward(self, x: Tensor) -> Any:
        b, c, h, w = x.shape
        x = x.reshape(b, c, h // 4, 4, w // 4, 4).permute(0, 2, 4, 3, 5, 1).reshape(b, -1, 16 * c)
        return self.proj(x)


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return x.mean(dim=1)


@case
def mlp_mixer() -> Case:
    model = nn.Sequential(
        Patches(8), MixerBlock(16, 8), MixerBlock(16, 8), nn.LayerNorm(8), Mean(), nn.Linear(8, 5)
    )
    return Case(model, pictures, nn.CrossEntropyLoss(reduction="sum"))
