"""Pictures in, pictures or boxes out: segmentation, diffusion, detection, and other geometry."""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from zoo.case import Case, case, ids, normal


class DoubleConv(nn.Module):
    def __init__(self, inp: int, out: int) -> None:
        super().__init__()
        self.double_conv = nn.Sequential(
            nn.Conv2d(inp, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True),
            nn.Conv2d(out, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Any:
        return self.double_conv(x)


class Up(nn.Module):
    def __init__(self, inp: int, out: int, bilinear: bool) -> None:
        super().__init__()
        self.up: nn.Module = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
        if not bilinear:
            self.up = nn.ConvTranspose2d(inp // 2, inp // 2, kernel_size=2, stride=2)
        self.conv = DoubleConv(inp, out)

    def forward(self, x1: Tensor, x2: Tensor) -> Any:
        x1 = self.up(x1)
        dy, dx = x2.size()[2] - x1.size()[2], x2.size()[3] - x1.size()[3]
        x1 = F.pad(x1, [dx // 2, dx - dx // 2, dy // 2, dy - dy // 2])
        return self.conv(torch.cat([x2, x1], dim=1))


class UNet(nn.Module):
    """milesial's U-Net: skips, padding by computed differences."""

    def __init__(self, bilinear: bool) -> None:
        super().__init__()
        self.inc = DoubleConv(3, 4)
        self.down1 = nn.Sequential(nn.MaxPool2d(2), DoubleConv(4, 8))
        self.down2 = nn.Sequential(nn.MaxPool2d(2), DoubleConv(8, 8))
        self.up1, self.up2 = Up(16, 4, bilinear), Up(8, 4, bilinear)
        self.outc = nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Any:
        x1 = self.inc(x)
        x2 = self.down1(x1)
        x3 = self.down2(x2)
        return self.outc(self.up2(self.up1(x3, x2), x1))


def dice_loss(pred: Tensor, target: Tensor) -> Any:
    """Cross entropy with an ignored class, and dice over the batch as milesial writes it."""
    mask = target != 255
    loss = F.cross_entropy(pred, target, ignore_index=255)
    one_hot = F.one_hot(target.masked_fill(~mask, 0), 3).permute(0, 3, 1, 2).float() * mask.unsqueeze(1)
    prob = F.softmax(pred, dim=1).float() * mask.unsqueeze(1)
    inter = 2 * (prob.flatten(0, 1) * one_hot.flatten(0, 1)).sum(dim=(-1, -2))
    sets_sum = prob.flatten(0, 1).sum(dim=(-1, -2)) + one_hot.flatten(0, 1).sum(dim=(-1, -2))
    sets_sum = torch.where(sets_sum == 0, inter, sets_sum)
    dice = (inter + 1e-6) / (sets_sum + 1e-6)
    return loss + 1 - dice.mean()


def masks(samples: int) -> tuple[Tensor, Tensor]:
    """Pictures of an odd size, and a class for each pixel, some of them ignored."""
    target = ids(samples, 10, 10, high=3)
    target[:, 0] = 255
    target[::2, 3:5] = 255
    return normal(samples, 3, 10, 10), target


@case
def unet_bilinear() -> Case:
    return Case(UNet(True), masks, dice_loss)


def global_dice(pred: Tensor, target: Tensor) -> Any:
    """Dice over all pixels of the batch at once: a quotient of sums over samples; Tversky's as well."""
    prob = torch.sigmoid(pred[:, 0]).reshape(-1)
    truth = (target == 1).float().reshape(-1)
    tp = (prob * truth).sum()
    fp = ((1 - truth) * prob).sum()
    fn = (truth * (1 - prob)).sum()
    dice = 1 - (2.0 * tp + 1) / (prob.sum() + truth.sum() + 1)
    return dice + (1 - (tp + 1) / (tp + 0.3 * fp + 0.7 * fn + 1)) ** 0.75


class SmallSegmenter(nn.Module):
    """Instance and group norms, atrous pyramid, transposed convolution, pixel shuffle."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1), nn.InstanceNorm2d(8, affine=True), nn.PReLU(8)
        )
        self.atrous = nn.ModuleList(nn.Conv2d(8, 4, 3, padding=d, dilation=d) for d in (1, 2))
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 4, 1), nn.ReLU())
        self.project = nn.Sequential(nn.Conv2d(12, 8, 1), nn.GroupNorm(2, 8), nn.ELU(), nn.Dropout2d(0.1))
        self.shuffle = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.PixelShuffle(2))
        self.head = nn.ConvTranspose2d(2, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Any:
        size = x.shape[-2:]
        x = self.stem(x)
        res = [conv(x) for conv in self.atrous]
        res.append(F.interpolate(self.pool(x), size=x.shape[-2:], mode="bilinear", align_corners=False))
        x = self.shuffle(self.project(torch.cat(res, dim=1)))
        return F.interpolate(self.head(x), size=size, mode="nearest")


@case
def segmenter_dice() -> Case:
    return Case(SmallSegmenter(), masks, global_dice)


class FocalLoss(nn.Module):
    """Focal loss as most repositories have it, normalised by the number of positives."""

    def __init__(self, gamma: float = 2.0, alpha: float = 0.25) -> None:
        super().__init__()
        self.gamma, self.alpha = gamma, alpha

    def forward(self, pred: Tensor, target: Tensor) -> Any:
        target = (target == 1).float()
        pred = pred[:, 0]
        ce = F.binary_cross_entropy_with_logits(pred, target, reduction="none")
        p = torch.sigmoid(pred)
        p_t = p * target + (1 - p) * (1 - target)
        alpha_t = self.alpha * target + (1 - self.alpha) * (1 - target)
        loss = alpha_t * ce * ((1 - p_t) ** self.gamma)
        return loss.sum() / target.sum().clamp(min=1)


@case
def segmenter_focal() -> Case:
    return Case(SmallSegmenter(), masks, FocalLoss())
