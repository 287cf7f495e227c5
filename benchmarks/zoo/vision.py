"""Networks for pictures: classifiers with every sort of normalisation and skip."""

from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils import checkpoint as cp

from zoo.case import Case, case, ids, normal


def pictures(samples: int, channels: int = 3, side: int = 16) -> tuple[Tensor, Tensor]:
    """Pictures and one of five classes each."""
    return normal(samples, channels, side, side), ids(samples, high=5)


def _make_divisible(v: float, divisor: int = 4) -> int:
    new_v = max(divisor, int(v + divisor / 2) // divisor * divisor)
    return new_v + divisor if new_v < 0.9 * v else new_v


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int, gate: type[nn.Module] = nn.Hardsigmoid) -> None:
        super().__init__()
        squeeze = _make_divisible(channels / 4)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1, self.fc2 = nn.Conv2d(channels, squeeze, 1), nn.Conv2d(squeeze, channels, 1)
        self.relu, self.gate = nn.ReLU(inplace=True), gate()

    def forward(self, x: Tensor) -> Any:
        return x * self.gate(self.fc2(self.relu(self.fc1(self.avgpool(x)))))


class InvertedResidual(nn.Module):
    def __init__(self, inp: int, hidden: int, oup: int, stride: int, act: type[nn.Module]) -> None:
        super().__init__()
        self.use_res_connect = stride == 1 and inp == oup
        self.conv = nn.Sequential(
            nn.Conv2d(inp, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden, eps=0.001, momentum=0.01),
            act(),
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden, eps=0.001, momentum=0.01),
            act(),
            SqueezeExcite(hidden),
            nn.Conv2d(hidden, oup, 1, bias=False),
            nn.BatchNorm2d(oup, eps=0.001, momentum=0.01),
        )

    def forward(self, x: Tensor) -> Any:
        return x + self.conv(x) if self.use_res_connect else self.conv(x)


@case
def mobilenet_v3() -> Case:
    layers = [
        nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.Hardswish(inplace=True),
        InvertedResidual(8, 16, 8, 1, nn.ReLU), InvertedResidual(8, 16, 12, 2, nn.Hardswish),
        InvertedResidual(12, 24, 12, 1, nn.Hardswish), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(12, 16), nn.Hardswish(), nn.Dropout(0.2), nn.Linear(16, 5),
    ]  # fmt: skip
    return Case(nn.Sequential(*layers), pictures, nn.CrossEntropyLoss(label_smoothing=0.1))


class Swish(torch.autograd.Function):
    """The memory-efficient swish of the EfficientNet port."""

    @staticmethod
    def forward(ctx: Any, i: Tensor) -> Any:
        result = i * torch.sigmoid(i)
        ctx.save_for_backward(i)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        i = ctx.saved_tensors[0]
        sigmoid_i = torch.sigmoid(i)
        return grads[0] * (sigmoid_i * (1 + i * (1 - sigmoid_i)))


def swish(x: Tensor) -> Any:
    """Apply the Function, for which torch has no types."""
    return Swish.apply(x)


def drop_connect(inputs: Tensor, p: float, training: bool) -> Tensor:
    if not training:
        return inputs
    batch_size = inputs.shape[0]
    keep_prob = 1 - p
    random_tensor = torch.tensor(keep_prob) + torch.rand([batch_size, 1, 1, 1], dtype=inputs.dtype)
    return inputs / keep_prob * torch.floor(random_tensor)


class MBConv(nn.Module):
    def __init__(self, inp: int, oup: int, expand: int, drop: float, norm: type[nn.Module]) -> None:
        super().__init__()
        mid = inp * expand
        self.drop_rate = drop
        self._expand_conv, self._bn0 = nn.Conv2d(inp, mid, 1, bias=False), norm(mid)
        self._depthwise = nn.Conv2d(mid, mid, 3, padding=1, groups=mid, bias=False)
        self._bn1 = norm(mid)
        self._se_reduce, self._se_expand = nn.Conv2d(mid, 2, 1), nn.Conv2d(2, mid, 1)
        self._project_conv, self._bn2 = nn.Conv2d(mid, oup, 1, bias=False), norm(oup)
        self.id_skip = inp == oup

    def forward(self, inputs: Tensor) -> Any:
        x = swish(self._bn0(self._expand_conv(inputs)))
        x = swish(self._bn1(self._depthwise(x)))
        x_squeezed = F.adaptive_avg_pool2d(x, 1)
        x = torch.sigmoid(self._se_expand(swish(self._se_reduce(x_squeezed)))) * x
        x = self._bn2(self._project_conv(x))
        if self.id_skip:
            if self.drop_rate:
                x = drop_connect(x, p=self.drop_rate, training=self.training)
            x = x + inputs
        return x


def _efficientnet(norm: type[nn.Module]) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1, bias=False), norm(8), MBConv(8, 8, 2, 0.2, norm),
        MBConv(8, 12, 2, 0.2, norm), MBConv(12, 12, 2, 0.2, norm), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Dropout(0.2), nn.Linear(12, 5),
    )  # fmt: skip


@case
def efficientnet() -> Case:
    return Case(_efficientnet(nn.BatchNorm2d), pictures, nn.CrossEntropyLoss())


@case
def efficientnet_sync() -> Case:
    return Case(
        nn.SyncBatchNorm.convert_sync_batchnorm(_efficientnet(nn.BatchNorm2d)),
        pictures,
        nn.CrossEntropyLoss(),
    )


class DenseLayer(nn.Module):
    """DenseNet's layer that recomputes its concatenation and first convolution."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.add_module("norm1", nn.BatchNorm2d(inputs))
        self.add_module("relu1", nn.ReLU(inplace=True))
        self.add_module("conv1", nn.Conv2d(inputs, 2 * growth, 1, bias=False))
        self.add_module("norm2", nn.BatchNorm2d(2 * growth))
        self.add_module("relu2", nn.ReLU(inplace=True))
        self.add_module("conv2", nn.Conv2d(2 * growth, growth, 3, padding=1, bias=False))
        self.drop_rate = 0.0

    def forward(self, *prev_features: Tensor) -> Any:
        def bn_function(*inputs: Tensor) -> Any:
            return self.conv1(self.relu1(self.norm1(torch.cat(inputs, 1))))

        if any(f.requires_grad for f in prev_features):
            bottleneck = cp.checkpoint(bn_function, *prev_features, use_reentrant=False)
        else:
            bottleneck = bn_function(*prev_features)
        new_features = self.conv2(self.relu2(self.norm2(bottleneck)))
        if self.drop_rate > 0:
            new_features = F.dropout(new_features, p=self.drop_rate, training=self.training)
        return new_features


class DenseBlock(nn.ModuleDict):
    def __init__(self, layers: int, inputs: int, growth: int) -> None:
        super().__init__()
        for i in range(layers):
            self.add_module(f"denselayer{i + 1}", DenseLayer(inputs + i * growth, growth))

    def forward(self, init_features: Tensor) -> Any:
        features = [init_features]
        for _, layer in self.items():
            features.append(layer(*features))
        return torch.cat(features, 1)


@case
def densenet() -> Case:
    features = OrderedDict(
        conv0=nn.Conv2d(3, 8, 3, padding=1), block1=DenseBlock(2, 8, 4), norm=nn.BatchNorm2d(16),
        relu=nn.ReLU(), pool=nn.AvgPool2d(2), block2=DenseBlock(2, 16, 4), last=nn.BatchNorm2d(24),
        act=nn.ReLU(inplace=True), out=nn.AdaptiveAvgPool2d((1, 1)), flat=nn.Flatten(),
        fc=nn.Linear(24, 5),
    )  # fmt: skip
    return Case(nn.Sequential(features), lambda n: pictures(n, side=8), nn.CrossEntropyLoss())


class Bottleneck(nn.Module):
    """ResNeXt's: groups, one in-place activation that is used three times, zero-initialised gamma."""

    def __init__(self, inp: int, width: int, groups: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inp, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 2, 1, groups=groups, bias=False)
        self.bn2, self.bn3 = nn.BatchNorm2d(width), nn.BatchNorm2d(width * 2)
        self.conv3 = nn.Conv2d(width, width * 2, 1, bias=False)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = nn.Sequential(nn.Conv2d(inp, width * 2, 1, 2), nn.BatchNorm2d(width * 2))
        nn.init.constant_(self.bn3.weight, 0.2)

    def forward(self, x: Tensor) -> Any:
        identity = self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += identity
        return self.relu(out)


@case
def resnext() -> Case:
    layers = (nn.Conv2d(3, 8, 3), Bottleneck(8, 8, 4), Bottleneck(16, 8, 2), nn.AdaptiveAvgPool2d(1))
    return Case(nn.Sequential(*layers, nn.Flatten(1), nn.Linear(16, 5)), pictures, nn.CrossEntropyLoss())
