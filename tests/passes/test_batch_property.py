"""Random models: wherever the analysis lets the batch be split, the parts give the whole's numbers.

Steps move, mix and reduce dimensions without regard to what they mean, so that most programs do
something nobody meant; those are the ones that an analysis gets wrong.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from amounts import examples
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from one_device import Calls, assert_close, in_parts, ready
from torch import Tensor, arange

BATCH, TIMES, WIDTH = 6, 3, 4
Step = Callable[[Calls, Tensor, Tensor, int], Tensor]


def _dim(x: Tensor, k: int) -> int:
    return k % x.ndim


def _attend(x: Tensor, mask: Tensor | None = None) -> Tensor:
    return F.scaled_dot_product_attention(x, x.flip(-1), x, attn_mask=mask)


def _own_rows(x: Tensor) -> tuple[Tensor, ...]:
    return (arange(x.size(0)), *(torch.zeros(x.size(0), dtype=torch.long) for _ in range(x.ndim - 2)))


STEPS: dict[str, Step] = {
    "tanh": lambda s, x, y, k: x.tanh(),
    "transpose": lambda s, x, y, k: x.transpose(_dim(x, k), _dim(x, k + 1)),
    "merge": lambda s, x, y, k: x.flatten(k % (x.ndim - 1), k % (x.ndim - 1) + 1),
    "part front": lambda s, x, y, k: torch.unflatten(x, _dim(x, k), (2, -1)),
    "part back": lambda s, x, y, k: torch.unflatten(x, _dim(x, k), (-1, 2)),
    "part batch": lambda s, x, y, k: x.reshape(y.size(0), -1, WIDTH),
    "part time": lambda s, x, y, k: x.reshape(TIMES, -1, WIDTH),
    "unsqueeze": lambda s, x, y, k: x.unsqueeze(_dim(x, k)),
    "squeeze": lambda s, x, y, k: x[..., :1].squeeze(),
    "softmax": lambda s, x, y, k: x.softmax(_dim(x, k)),
    "cumsum": lambda s, x, y, k: x.cumsum(_dim(x, k)),
    "flip": lambda s, x, y, k: x.flip(_dim(x, k)),
    "roll": lambda s, x, y, k: x.roll(1, _dim(x, k)),
    "sort": lambda s, x, y, k: x.sort(_dim(x, k))[0],
    "normalize": lambda s, x, y, k: F.normalize(x, dim=_dim(x, k)),
    "layer norm": lambda s, x, y, k: F.layer_norm(x, x.shape[-1:]),
    "norm last two": lambda s, x, y, k: F.layer_norm(x, x.shape[-2:]),
    "batch norm": lambda s, x, y, k: F.batch_norm(x, None, None, training=True),
    "instance norm": lambda s, x, y, k: F.instance_norm(x),
    "group norm": lambda s, x, y, k: F.group_norm(x, 1),
    "linear": lambda s, x, y, k: F.linear(x, s.linear.weight, s.vector),
    "vector": lambda s, x, y, k: x * s.vector,
    "product": lambda s, x, y, k: x @ s.linear.weight,
    "product from left": lambda s, x, y, k: s.table[:3, : x.size(-2)] @ x,
    "gram": lambda s, x, y, k: x @ x.transpose(-1, -2) / x.size(-1),
    "gram over first": lambda s, x, y, k: torch.einsum("a...d,a...e->de", x, x.tanh()),
    "labels": lambda s, x, y, k: x * y.reshape(-1, *[1] * (x.ndim - 1)),
    "labels last": lambda s, x, y, k: x * y,
    "label rows": lambda s, x, y, k: x + s.table[y.clamp(min=0)].mean(-1),
    "positions": lambda s, x, y, k: x + s.table[: x.size(0)].mean(1).reshape(-1, *[1] * (x.ndim - 1)),
    "select": lambda s, x, y, k: x.select(_dim(x, k), 0),
    "drop first": lambda s, x, y, k: x.narrow(_dim(x, k), 0, x.size(_dim(x, k)) - 1),
    "chunk": lambda s, x, y, k: torch.mul(*x.chunk(2, _dim(x, k))),
    "shift": lambda s, x, y, k: F.pad(x, [0, 0] * (k % x.ndim) + [1, -1]),
    "own rows": lambda s, x, y, k: x[_own_rows(x)],
    "rows by label": lambda s, x, y, k: x[y.clamp(min=0)],
    "mean": lambda s, x, y, k: x.mean(_dim(x, k), keepdim=k > 3),
    "sum": lambda s, x, y, k: x.sum(_dim(x, k), keepdim=k > 3),
    "max": lambda s, x, y, k: x.amax(_dim(x, k), keepdim=k > 3),
    "std": lambda s, x, y, k: x.std(_dim(x, k), keepdim=k > 3),
    "centre": lambda s, x, y, k: x - x.mean(_dim(x, k), keepdim=True),
    "join": lambda s, x, y, k: torch.cat([x, x.tanh()], _dim(x, k)),
    "stack": lambda s, x, y, k: torch.stack([x, -x], _dim(x, k)),
    "repeat": lambda s, x, y, k: x.repeat(*[2 if d == _dim(x, k) else 1 for d in range(x.ndim)]),
    "interleave": lambda s, x, y, k: x.repeat_interleave(2, _dim(x, k)),
    "both repeats": lambda s, x, y, k: (
        x.repeat_interleave(2, 0) * x.tanh().repeat(2, *[1] * (x.ndim - 1))
    ),
    "pairs": lambda s, x, y, k: x.unsqueeze(0) * x.unsqueeze(1),
    "attend": lambda s, x, y, k: _attend(x),
    "attend, masked": lambda s, x, y, k: _attend(
        x, (y.reshape(-1, *[1] * (x.ndim - 1)) > 0) | torch.eye(x.size(-2), dtype=torch.bool)
    ),
    "pool": lambda s, x, y, k: F.avg_pool1d(x, 2, 1),
    "convolve": lambda s, x, y, k: F.conv1d(x, s.table[: x.size(-2) * 2].view(2, -1, 4)[..., :2]),
    "look up": lambda s, x, y, k: s.table[x.argmax(-1)],
    "pick": lambda s, x, y, k: x.gather(_dim(x, k), (x > 0).long()),
    "scatter": lambda s, x, y, k: x.scatter(_dim(x, k), (x > 0).long()[:1], x),
    "dropout": lambda s, x, y, k: F.dropout(x, 0.4),
    "by total": lambda s, x, y, k: x / (x.abs().sum() + 1),
    "by count": lambda s, x, y, k: x / (y >= 0).sum(),
    "by size": lambda s, x, y, k: x / x.size(_dim(x, k)),
    "where": lambda s, x, y, k: torch.where(x > 0, x, s.vector.mean()),
}


def _scores(x: Tensor, y: Tensor) -> Tensor:
    return x.reshape(y.size(0), -1)[:, :WIDTH]


LOSSES: dict[str, Callable[[Calls, Tensor, Tensor], Tensor]] = {
    "mean": lambda s, x, y: x.pow(2).mean(),
    "sum": lambda s, x, y: x.pow(3).sum(),
    "sum over batch": lambda s, x, y: x.sin().sum() / y.size(0),
    "sum over first": lambda s, x, y: x.pow(2).sum() / x.size(0),
    "sum over labels": lambda s, x, y: (_scores(x, y) * (y >= 0)[:, None]).sum() / (y >= 0).sum(),
    "per sample first": lambda s, x, y: x.reshape(y.size(0), -1).pow(2).mean(1).sqrt().mean(),
    "decay": lambda s, x, y: x.mean() + 0.1 * s.linear.weight.pow(2).sum(),
    "one minus": lambda s, x, y: 1 - x.tanh().mean(),
    "mean of mean": lambda s, x, y: x.mean(0).mean(),
    "square of mean": lambda s, x, y: x.mean(0).pow(2).sum(),
    "times mean": lambda s, x, y: x.sum() * s.vector.norm() * x.detach().mean(),
    "largest": lambda s, x, y: x.max(),
    "norm": lambda s, x, y: x.norm(),
    "classes": lambda s, x, y: F.cross_entropy(_scores(x, y), y),
    "classes, sum": lambda s, x, y: F.cross_entropy(_scores(x, y), y, reduction="sum"),
    "classes, none": lambda s, x, y: F.cross_entropy(_scores(x, y), y, reduction="none").mean(),
    "classes, weighted": lambda s, x, y: F.cross_entropy(_scores(x, y), y, weight=s.buffer[0].abs()),
    "classes, smooth": lambda s, x, y: F.cross_entropy(
        _scores(x, y), y, weight=s.buffer[1].abs(), label_smoothing=0.2
    ),
    "classes, repeated": lambda s, x, y: F.cross_entropy(
        x.reshape(2 * y.size(0), -1)[:, :WIDTH], y.repeat(2)
    ),
    "classes, last": lambda s, x, y: F.cross_entropy(x.reshape(-1, WIDTH), y.repeat_interleave(TIMES)),
    "contrast": lambda s, x, y: F.cross_entropy(
        x.reshape(y.size(0), -1) @ x.reshape(y.size(0), -1).t(), arange(y.size(0))
    ),
    "distance": lambda s, x, y: F.mse_loss(x, s.table[0, 0].expand_as(x)),
    "distance of sums": lambda s, x, y: F.mse_loss(x.sum(0), x.detach().mean(0)),
    "kl": lambda s, x, y: F.kl_div(x.log_softmax(-1), x.tanh().softmax(-1), reduction="batchmean"),
}


@dataclass(frozen=True)
class Program:
    """Steps in order, and the loss of what they make."""

    steps: tuple[tuple[str, int], ...]
    loss: str
    time_first: bool

    def __call__(self, s: Calls, x: Tensor, y: Tensor) -> Tensor:
        if self.time_first:
            x = x.transpose(0, 1)
        for name, k in self.steps:
            x = STEPS[name](s, x, y, k)
        return LOSSES[self.loss](s, x, y)


PROGRAMS = st.builds(
    Program,
    st.lists(st.tuples(st.sampled_from(sorted(STEPS)), st.integers(0, 7)), max_size=5).map(tuple),
    st.sampled_from(sorted(LOSSES)),
    st.booleans(),
)
PARTS = st.sampled_from([(1, 5), (2, 1, 3), (1, 1, 4), (3, 3)])
EXAMPLES = int(os.environ.get("GRAPHPAR_EXAMPLES", examples(60)))


@given(PROGRAMS, PARTS)
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=EXAMPLES <= 60,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)
def test_parts_add_up_wherever_the_batch_may_be_split(program: Program, parts: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, TIMES, WIDTH, generator=generator, dtype=torch.float64)
    y = torch.tensor([0, -100, 2, 3, 2, 1])
    model = Calls(program).double()
    assume(_runs(model, x, y))
    made = ready(model, (x, y))
    if made.reason:
        assert "(one_device.py:" in made.reason or "for a batch of" in made.reason, made.reason
        return
    whole = in_parts(made, (x, y), (BATCH,))
    assert_close(in_parts(made, (x, y), parts), whole, 1e-7)


def _runs(model: Calls, x: Tensor, y: Tensor) -> bool:
    """Whether the program fits the shapes it makes, and has finite numbers."""
    try:
        loss: Tensor = model(x, y)
        loss.backward()  # type: ignore[no-untyped-call]
    except (RuntimeError, ValueError, IndexError, TypeError, ArithmeticError):
        return False
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return loss.numel() == 1 and all(bool(torch.isfinite(t).all()) for t in (loss, *gradients))
