"""Detectors and other models that index pictures by places and masks."""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from zoo.case import Case, case, ids, normal, seeded
from zoo.vision import pictures


class YOLOLayer(nn.Module):
    """YOLOv3's head: grids, anchors, and predictions decoded in eval only."""

    def __init__(self) -> None:
        super().__init__()
        self.na, self.no = 2, 7
        anchors = torch.tensor([[2.0, 3.0], [4.0, 2.0]])
        self.register_buffer("anchors", anchors)
        self.register_buffer("anchor_vec", anchors.clone().view(1, self.na, 1, 1, 2))
        self.conv = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.LeakyReLU(0.1), nn.Conv2d(8, 14, 1))

    def forward(self, p: Tensor) -> Any:
        p = self.conv(p)
        bs, _, ny, nx = p.shape
        yv, xv = torch.meshgrid([torch.arange(ny), torch.arange(nx)], indexing="ij")
        grid = torch.stack((xv, yv), 2).view((1, 1, ny, nx, 2)).float()
        p = p.view(bs, self.na, self.no, ny, nx).permute(0, 1, 3, 4, 2).contiguous()
        if self.training:
            return p
        io = p.clone()
        io[..., :2] = torch.sigmoid(io[..., :2]) + grid
        io[..., 2:4] = torch.exp(io[..., 2:4]) * self.anchor_vec
        io[..., :4] *= 2
        torch.sigmoid_(io[..., 4:])
        return io.view(bs, -1, self.no), p


def yolo_loss(p: Tensor, target: dict[str, Tensor]) -> Any:
    """Boxes where there is an object, objectness everywhere, by boolean indexing with fixed masks."""
    obj = target["obj"]
    obj_mask, noobj_mask = obj > 0, obj == 0
    loss_xy = (F.mse_loss(torch.sigmoid(p[..., :2]), target["xy"], reduction="none").sum(-1) * obj).sum()
    conf = F.binary_cross_entropy_with_logits(p[..., 4], obj, reduction="none")
    loss_conf = (conf * obj_mask).sum() / obj_mask.sum() + 0.5 * (
        conf * noobj_mask
    ).sum() / noobj_mask.sum()
    loss_cls = F.cross_entropy(p[..., 5:].flatten(0, 3), target["cls"].flatten(), ignore_index=-1)
    return loss_xy / obj.sum() + loss_conf + loss_cls


def boxes(samples: int) -> tuple[Any, ...]:
    """Objects at some cells, unequally many in each picture."""
    obj = (torch.rand(samples, 2, 4, 4, generator=seeded(samples)) < 0.3).float()
    obj[:, 0, 0, 0] = 1
    cls = torch.where(obj > 0, ids(samples, 2, 4, 4, high=2), -1)
    return normal(samples, 3, 8, 8), {"obj": obj, "cls": cls, "xy": normal(samples, 2, 4, 4, 2)}


@case
def yolo() -> Case:
    return Case(YOLOLayer(), boxes, yolo_loss)


def yolo_indexed(p: Tensor, target: dict[str, Tensor]) -> Any:
    """The same by boolean indexing, as the public code has it."""
    obj_mask = target["obj"].bool()
    loss_x = F.mse_loss(torch.sigmoid(p[..., 0])[obj_mask], target["xy"][..., 0][obj_mask])
    loss_conf = F.binary_cross_entropy_with_logits(p[..., 4][~obj_mask], target["obj"][~obj_mask])
    loss_cls = F.cross_entropy(p[..., 5:][obj_mask], target["cls"][obj_mask])
    return loss_x + loss_conf + loss_cls


@case
def yolo_boolean() -> Case:
    return Case(YOLOLayer(), boxes, yolo_indexed)


class RoIHead(nn.Module):
    """Crops of features at given boxes by sampling, a head for each, and masks chosen by class."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
        self.box = nn.Linear(8 * 9, 5)
        self.mask = nn.ConvTranspose2d(8, 5, 2, 2)

    def forward(self, x: Tensor, rois: Tensor, labels: Tensor) -> Any:
        feat = self.body(x)
        b, k, _ = rois.shape
        x1, y1, x2, y2 = rois.unbind(-1)
        step = torch.linspace(0, 1, 3, device=x.device)
        gx = (x1[..., None] + (x2 - x1)[..., None] * step)[:, :, None, :].expand(b, k, 3, 3)
        gy = (y1[..., None] + (y2 - y1)[..., None] * step)[:, :, :, None].expand(b, k, 3, 3)
        grid = torch.stack((gx, gy), -1).view(b, k * 3, 3, 2)
        crops = (
            F.grid_sample(feat, grid, align_corners=True)
            .view(b, -1, k, 3, 3)
            .transpose(1, 2)
            .flatten(0, 1)
        )
        logits = self.box(crops.flatten(1))
        masks = self.mask(crops)
        picked = masks[torch.arange(masks.shape[0], device=masks.device), labels.flatten()]
        loss = F.cross_entropy(logits, labels.flatten()) + F.binary_cross_entropy_with_logits(
            picked, torch.ones_like(picked)
        )
        return {"loss": loss, "logits": logits.view(b, k, -1)}


@case
def roi_head() -> Case:
    def batch(n: int) -> tuple[Any, ...]:
        corners = torch.rand(n, 3, 2, generator=seeded(n))
        return normal(n, 3, 8, 8), torch.cat([corners - 1, corners], -1), ids(n, 3, high=5)

    return Case(RoIHead(), batch)


class Deformable(nn.Module):
    """Offsets predicted at each pixel, values gathered there with bilinear weights by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.offset = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 3, padding=1)
        self.weight, self.fc = nn.Linear(12, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x).relu_()
        n, c, h, w = x.size()
        offset = self.offset(x).view(n, 2, 2, h, w)
        base = torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")).to(x)
        p = (base[None, None] + offset.tanh()).permute(0, 1, 3, 4, 2)
        lt = p.detach().floor()
        lt = torch.cat([lt[..., :1].clamp(0, h - 1), lt[..., 1:].clamp(0, w - 1)], -1)
        rb = torch.cat([(lt[..., :1] + 1).clamp(max=h - 1), (lt[..., 1:] + 1).clamp(max=w - 1)], -1)
        out = 0
        flat = x.flatten(2)
        for y, sy in ((lt, 1.0), (rb, -1.0)):
            for z, sz in ((lt, 1.0), (rb, -1.0)):
                index = (y[..., 0] * w + z[..., 1]).long().view(n, 1, -1).expand(-1, c, -1)
                g = (1 + sy * (y[..., 0] - p[..., 0])) * (1 + sz * (z[..., 1] - p[..., 1]))
                out = out + flat.gather(2, index).view(n, c, 2, h, w) * g.unsqueeze(1)
        assert isinstance(out, Tensor)
        y = self.weight(out.permute(0, 3, 4, 2, 1).flatten(3)).amax((1, 2))
        return self.fc(y)


@case
def deformable() -> Case:
    return Case(Deformable(), lambda n: pictures(n, side=6), nn.CrossEntropyLoss())
