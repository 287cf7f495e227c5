"""Batch normalisation with a cumulative average, in a form that a graph can hold.

`BatchNorm(momentum=None)` reads how many batches it has seen as a Python number, which a graph would hold
for ever. While a model is captured, such a layer updates its running statistics with tensors instead.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

_LAYERS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@contextmanager
def averages_as_tensors() -> Iterator[None]:
    """Batch norms without momentum count batches with tensors."""
    before = {layer: layer.forward for layer in _LAYERS}
    try:
        for layer in _LAYERS:
            layer.forward = _forward  # type: ignore[method-assign, assignment]
        yield
    finally:
        for layer, forward in before.items():
            layer.forward = forward  # type: ignore[method-assign]


def _forward(self: nn.BatchNorm1d, x: Tensor) -> Tensor:
    """What the layer computes in training without momentum; in any other case the layer itself."""
    counted = self.num_batches_tracked
    if self.momentum is not None or not self.training or counted is None:
        return nn.modules.batchnorm._BatchNorm.forward(self, x)
    self._check_input_dim(x)
    with torch.no_grad():
        others = [d for d in range(x.ndim) if d != 1]
        mean = x.mean(others)
        squares = (x - mean.view(1, -1, *[1] * (x.ndim - 2))).square().sum(others)
        counted.add_(1)
        share = 1 / counted.to(x.dtype)
        values = x.new_full((), x.numel() // x.shape[1])
        assert self.running_mean is not None and self.running_var is not None
        self.running_mean.mul_(1 - share).add_(mean * share)
        self.running_var.mul_(1 - share).add_(squares / (values - 1) * share)
    return functional.batch_norm(x, None, None, self.weight, self.bias, training=True, eps=self.eps)
