"""Kernels to measure: how to set each up, so that one call of the result is one call of the kernel.

Sizes are counted in elements of the principal tensor, which has rows of `WIDTH`.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch

from graphpar.runtime.own_ops import Dropout
from graphpar.runtime.random import Layout, StepContext

Work = Callable[[], object]

WIDTH = 256

aten = torch.ops.aten


def _table(size: int, dtype: str = "float32") -> torch.Tensor:
    """A table of noise; repeated, because drawing it afresh would take most of the time."""
    rows = size // WIDTH
    table = torch.randn(min(rows, 16), WIDTH).repeat(-(-rows // 16), 1)[:rows].contiguous()
    return table.to(getattr(torch, dtype))


def _unary(function: Callable[[torch.Tensor], object], dtype: str = "float32") -> Callable[[int], Work]:
    def setup(size: int) -> Work:
        x = _table(size, dtype)
        return lambda: function(x)

    return setup


def _binary(
    function: Callable[[torch.Tensor, torch.Tensor], object], dtype: str = "float32"
) -> Callable[[int], Work]:
    def setup(size: int) -> Work:
        x, y = _table(size, dtype), _table(size, dtype)
        return lambda: function(x, y)

    return setup


def _layer_norm(size: int) -> Work:
    x, weight, bias = _table(size), torch.ones(WIDTH), torch.zeros(WIDTH)
    return lambda: aten.layer_norm.default(x, [WIDTH], weight, bias)


def _layer_norm_backward(size: int) -> Work:
    x, weight, bias = _table(size), torch.ones(WIDTH), torch.zeros(WIDTH)
    _, mean, rstd = aten.native_layer_norm.default(x, [WIDTH], weight, bias, 1e-5)
    every = [True, True, True]
    return lambda: aten.native_layer_norm_backward.default(x, x, [WIDTH], mean, rstd, weight, bias, every)


def _softmax_backward(size: int) -> Work:
    x = _table(size)
    y = torch.softmax(x, -1)
    return lambda: aten._softmax_backward_data.default(x, y, -1, torch.float32)


def _labels(size: int) -> torch.Tensor:
    return torch.randint(0, WIDTH, (size // WIDTH,))


def _cross_entropy(size: int) -> Work:
    x, target = _table(size), _labels(size)
    return lambda: aten.cross_entropy_loss.default(x, target)


def _cross_entropy_backward(size: int) -> Work:
    return _backward_of(lambda x: aten.cross_entropy_loss.default(x, _labels(size)), _table(size))


def _backward_of(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> Work:
    x.requires_grad_()
    with torch.enable_grad():
        out = function(x)
    seed = torch.ones_like(out)
    return lambda: torch.autograd.grad(out, x, seed, retain_graph=True)


def _embedding(size: int) -> Work:
    table, rows = torch.randn(WIDTH, WIDTH), _labels(size)
    return lambda: aten.embedding.default(table, rows)


def _embedding_backward(size: int) -> Work:
    x, rows = _table(size), _labels(size)
    return lambda: aten.embedding_dense_backward.default(x, rows, WIDTH, -1, False)


def _accumulate(size: int) -> Work:
    x, y = _table(size), torch.zeros(size // WIDTH, WIDTH)
    return lambda: aten.add_.Tensor(x, y)


def view(_: int) -> Work:
    x = _table(WIDTH)
    return lambda: aten.view.default(x, [WIDTH])


def _dropout(size: int) -> Work:
    """The keyed dropout that workers run in place of torch's."""
    x = _table(size)
    rows = x.shape[0]
    module = Dropout(StepContext(batch=rows, samples=rows), 0, Layout(0))
    return lambda: module(x, 0.1, False)


def _copy_of(dtype: str) -> Callable[[int], Work]:
    def setup(size: int) -> Work:
        x = _table(size, dtype).view(-1, 16, WIDTH // 16)
        turned = x.transpose(0, 1)
        return lambda: aten.contiguous.default(turned)

    return setup


def _followers(dtype: str = "float32") -> dict[str, Callable[[int], Work]]:
    """Kernels that units of lower formats run in them."""
    return {
        "pointwise": _binary(lambda x, y: aten.add.Tensor(x, y), dtype),
        "copy": _copy_of(dtype),
        "reduce": _unary(lambda x: aten.sum.dim_IntList(x, [0]), dtype),
        "relu": _unary(lambda x: aten.relu.default(x), dtype),
        "relu_backward": _binary(lambda x, y: aten.threshold_backward.default(x, y, 0), dtype),
        "gelu": _unary(lambda x: aten.gelu.default(x), dtype),
        "gelu_backward": _binary(lambda x, y: aten.gelu_backward.default(x, y), dtype),
        "gelu_tanh": _unary(lambda x: aten.gelu.default(x, approximate="tanh"), dtype),
        "gelu_tanh_backward": _binary(
            lambda x, y: aten.gelu_backward.default(x, y, approximate="tanh"), dtype
        ),
        "silu": _unary(lambda x: aten.silu.default(x), dtype),
        "silu_backward": _binary(lambda x, y: aten.silu_backward.default(x, y), dtype),
        "tanh": _unary(lambda x: aten.tanh.default(x), dtype),
        "tanh_backward": _binary(lambda x, y: aten.tanh_backward.default(x, y), dtype),
    }


KERNELS: Mapping[str, Callable[[int], Work]] = {
    **_followers(),
    "accumulate": _accumulate,
    "fill": _unary(lambda x: aten.zeros_like.default(x)),
    "sigmoid": _unary(lambda x: aten.sigmoid.default(x)),
    "sigmoid_backward": _binary(lambda x, y: aten.sigmoid_backward.default(x, y)),
    "exp": _unary(lambda x: aten.exp.default(x)),
    "softmax": _unary(lambda x: aten.softmax.int(x, -1)),
    "softmax_backward": _softmax_backward,
    "layer_norm": _layer_norm,
    "layer_norm_backward": _layer_norm_backward,
    "cross_entropy": _cross_entropy,
    "cross_entropy_backward": _cross_entropy_backward,
    "embedding": _embedding,
    "embedding_backward": _embedding_backward,
    "dropout": _dropout,
    "cast": _unary(lambda x: aten._to_copy.default(x, dtype=torch.bfloat16)),
    **{f"{name}_bfloat16": setup for name, setup in _followers("bfloat16").items()},
}
BYTES_PER_ELEMENT = {
    "pointwise": 12, "accumulate": 12, "copy": 8, "fill": 4, "reduce": 4, "cast": 6,
    "pointwise_bfloat16": 6, "copy_bfloat16": 4, "reduce_bfloat16": 2,
}  # fmt: skip
"""What the curves over bytes move per element of the measured tensor."""

MIXED_WIDTH = 64
MIXED_ROWS = 4


def mixed_forward() -> tuple[Callable[[], torch.Tensor], list[torch.Tensor]]:
    """A tiny transformer block with its tape: many different ops, none of them large."""
    d, rows = MIXED_WIDTH, MIXED_ROWS
    x = torch.randn(1, rows, d, requires_grad=True)
    wide, back = torch.randn(3 * d, d), torch.randn(d, d)
    up, down = torch.randn(d, d), torch.randn(d, d)
    ones, zeros = torch.ones(d), torch.zeros(d)
    leaves = [t.requires_grad_() for t in (wide, back, up, down, ones, zeros)]

    def run() -> torch.Tensor:
        with torch.enable_grad():
            h = aten.layer_norm.default(x, [d], ones, zeros)
            parts = aten.split.Tensor(aten.linear.default(h, wide), d, 2)
            q, k, v = (
                aten.transpose.int(aten.view.default(p, [1, rows, 4, d // 4]), 1, 2) for p in parts
            )
            y = aten.scaled_dot_product_attention.default(q, k, v, is_causal=True)
            y = aten.reshape.default(aten.transpose.int(y, 1, 2), [1, rows, d])
            z = aten.add.Tensor(x, aten.linear.default(y, back))
            h = aten.layer_norm.default(z, [d], ones, zeros)
            h = aten.gelu.default(aten.linear.default(h, up))
            out: torch.Tensor = aten.add.Tensor(z, aten.linear.default(h, down))
            return out

    return run, [x, *leaves]


def mixed_backward() -> Work:
    run, leaves = mixed_forward()
    out = run()
    seed = torch.ones_like(out)
    return lambda: torch.autograd.grad(out, leaves, seed, retain_graph=True)


OPTIMIZED_TENSORS = 4


def optimizer_step(kind: Callable[..., torch.optim.Optimizer], size: int) -> Work:
    """One step over several equal tensors."""
    optimizer = kind(_trained_tensors(size), lr=1e-9)
    return lambda: optimizer.step()


def clipping(size: int) -> Work:
    """The gradients' norm, and their scaling by a factor, as workers do it."""
    gradients = [tensor.grad for tensor in _trained_tensors(size) if tensor.grad is not None]

    def work() -> None:
        float(torch.nn.utils.get_total_norm(gradients))
        for gradient in gradients:
            gradient.mul_(1.0)

    return work


def _trained_tensors(size: int) -> list[torch.Tensor]:
    tensors = [torch.zeros(size // WIDTH, WIDTH, requires_grad=True) for _ in range(OPTIMIZED_TENSORS)]
    for tensor in tensors:
        tensor.grad = torch.ones_like(tensor)
    return tensors


STEPS: Mapping[str, Callable[[int], Work]] = {
    "adamw": partial(optimizer_step, torch.optim.AdamW),
    "sgd": partial(optimizer_step, torch.optim.SGD),
    "clip": clipping,
}
"""What happens to parameters after backward."""


def matrix_product(dtype: str, rows: int, width: int) -> Work:
    kind = getattr(torch, dtype)
    x, weight = torch.randn(rows, width, dtype=kind), torch.randn(width, width, dtype=kind)
    bias = torch.zeros(width, dtype=kind)
    return lambda: aten.linear.default(x, weight, bias)


def batch_of(rows: int, width: int) -> int:
    """A batch that makes about 20 MFLOP."""
    return max(int(1e7 / (rows * width * width)), 2)


def batched_product(rows: int, width: int, dtype: str = "float32") -> Work:
    batch, kind = batch_of(rows, width), getattr(torch, dtype)
    x, y = torch.randn(batch, rows, width).to(kind), torch.randn(batch, width, width).to(kind)
    return lambda: aten.bmm.default(x, y)


def attention_heads(length: int) -> int:
    return max(1024 // length, 2)


def attention_flops(kind: str, length: int, head: int) -> float:
    flops = 4.0 * attention_heads(length) * length * length * head
    return 2.5 * flops if kind.endswith("backward") else flops


def attention(kind: str, length: int, head: int, dtype: str = "float32") -> Work:
    shape = (1, length, attention_heads(length), head)
    q, k, v = (torch.randn(shape).to(getattr(torch, dtype)).transpose(1, 2) for _ in range(3))
    causal = kind.startswith("causal")
    if not kind.endswith("backward"):
        return lambda: aten.scaled_dot_product_attention.default(q, k, v, is_causal=causal)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    with torch.enable_grad():
        out = aten.scaled_dot_product_attention.default(q, k, v, is_causal=causal)
    seed = torch.ones_like(out)
    return lambda: torch.autograd.grad(out, leaves, seed, retain_graph=True)
