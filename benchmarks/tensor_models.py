"""Transformer blocks in three forms: stock, split by hand among processes, and for torch's DTensor.

The split is Megatron's (Shoeybi et al. 2019, arXiv:1909.08053): columns, then rows, in attention and in
the perceptron; two sums over the group in forward and two in backward.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the usual name


@dataclass(frozen=True)
class Size:
    """How large blocks and batch are; 16 heads of which Llama has 4 for keys."""

    width: int = 512
    heads: int = 8
    layers: int = 2
    length: int = 256
    batch: int = 4


class GPTBlock(nn.Module):
    """GPT-2's block; queries, keys and values of a head stand together, so that columns are heads."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.head_size = size.width // size.heads
        self.norm1, self.norm2 = nn.LayerNorm(size.width), nn.LayerNorm(size.width)
        self.qkv, self.out = nn.Linear(size.width, 3 * size.width), nn.Linear(size.width, size.width)
        self.up, self.down = nn.Linear(size.width, 4 * size.width), nn.Linear(4 * size.width, size.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, length, width) to the same."""
        batch, length, _ = x.shape
        mixed = self.qkv(self.norm1(x)).view(batch, length, -1, 3, self.head_size)
        q, k, v = mixed.permute(3, 0, 2, 1, 4).unbind(0)
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(h.transpose(1, 2).reshape(batch, length, -1))
        wide = F.gelu(self.up(self.norm2(x)), approximate="tanh")
        result: torch.Tensor = x + self.down(wide)
        return result


class LlamaBlock(nn.Module):
    """Llama's block without its rotation: grouped queries, gated perceptron, norms by the mean square."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.head_size = size.width // size.heads
        keys, inner = size.width // 4, size.width * 11 // 4
        self.norm1, self.norm2 = nn.RMSNorm(size.width), nn.RMSNorm(size.width)
        self.q = nn.Linear(size.width, size.width, bias=False)
        self.k = nn.Linear(size.width, keys, bias=False)
        self.v = nn.Linear(size.width, keys, bias=False)
        self.out = nn.Linear(size.width, size.width, bias=False)
        self.gate = nn.Linear(size.width, inner, bias=False)
        self.up = nn.Linear(size.width, inner, bias=False)
        self.down = nn.Linear(inner, size.width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, length, width) to the same."""
        batch, length, _ = x.shape
        h = self.norm1(x)
        q, k, v = (
            made.view(batch, length, -1, self.head_size).transpose(1, 2)
            for made in (self.q(h), self.k(h), self.v(h))
        )
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.out(h.transpose(1, 2).reshape(batch, length, -1))
        h = self.norm2(x)
        result: torch.Tensor = x + self.down(F.silu(self.gate(h)) * self.up(h))
        return result


BLOCKS: dict[str, Any] = {"gpt": GPTBlock, "llama": LlamaBlock}
COLUMNS = {"qkv", "up", "q", "k", "v", "gate"}
ROWS = {"out", "down"}


class Stack(nn.Module):
    """Blocks with a loss: the mean square distance to a target."""

    def __init__(self, name: str, size: Size) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(BLOCKS[name](size) for _ in range(size.layers))

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The loss of a batch."""
        for block in self.blocks:
            x = block(x)
        return F.mse_loss(x, target)


# --- by hand ---


class _Copied(torch.autograd.Function):
    """The same value for all; gradients are summed."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        gradient = gradients[0].contiguous()
        dist.all_reduce(gradient)
        return gradient


class _Summed(torch.autograd.Function):
    """Values are summed; the same gradient for all."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(x)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return gradients[0]


class RowLinear(nn.Module):
    """A member's rows of a linear layer, summed over the group; the bias enters once."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(bias) if bias is not None else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The whole result on every member."""
        total: torch.Tensor = _Summed.apply(F.linear(x, self.weight))  # type: ignore[no-untyped-call]
        return total if self.bias is None else total + self.bias


class CopyingNorm(nn.Module):
    """A norm whose result all members read."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The norm; its gradient is summed over the members."""
        copied: torch.Tensor = _Copied.apply(self.norm(x))  # type: ignore[no-untyped-call]
        return copied


def split_by_hand(model: Stack, member: int, members: int) -> Stack:
    """One member's part of the blocks."""
    model = copy.deepcopy(model)
    for block in model.blocks:
        for name, layer in list(block.named_children()):
            if not isinstance(layer, nn.Linear):
                setattr(block, name, CopyingNorm(layer))
            elif name in COLUMNS:
                layer.weight = nn.Parameter(_part(layer.weight, 0, member, members))
                if layer.bias is not None:
                    layer.bias = nn.Parameter(_part(layer.bias, 0, member, members))
            else:
                setattr(block, name, RowLinear(_part(layer.weight, 1, member, members), layer.bias))
    return model


def _part(tensor: torch.Tensor, dim: int, member: int, members: int) -> torch.Tensor:
    return tensor.detach().chunk(members, dim)[member].clone()


# --- DTensor ---


def split_by_dtensor(model: Stack, members: int) -> Stack:
    """torch's own: `parallelize_module` with column-wise and row-wise styles."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    model = copy.deepcopy(model)
    mesh = init_device_mesh("cpu", (members,))
    for block in model.blocks:
        styles: dict[str, Any] = {}
        for name, _ in block.named_children():
            if name in COLUMNS:
                styles[name] = ColwiseParallel()
            elif name in ROWS:
                styles[name] = RowwiseParallel()
        parallelize_module(block, mesh, styles)
    return model
