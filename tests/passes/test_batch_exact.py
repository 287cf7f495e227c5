"""Losses that may be split over unequal microbatches: the parts add up to the whole batch's numbers."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from one_device import Calls, assert_close, in_parts, ready
from torch import Tensor, arange, nn

from graphpar.ir.whole import tail_reason

BATCH, PARTS = 6, (1, 3, 2)
Loss = Callable[[Calls, Tensor, Tensor], Tensor]

ROWS: dict[str, Loss] = {
    "mean": lambda s, h, y: h.mean(),
    "mean over classes": lambda s, h, y: F.cross_entropy(h, y),
    "sum over classes": lambda s, h, y: F.cross_entropy(h, y, reduction="sum"),
    "one loss per sample": lambda s, h, y: F.cross_entropy(h, y, reduction="none").mean(),
    "class weights": lambda s, h, y: F.cross_entropy(h, y, weight=s.buffer[0].abs()),
    "label smoothing": lambda s, h, y: F.cross_entropy(h, y, label_smoothing=0.2),
    "log likelihood": lambda s, h, y: F.nll_loss(h.log_softmax(-1), y),
    "pick own class": lambda s, h, y: -h.log_softmax(-1)[arange(h.size(0)), y].mean(),
    "pick with more dims": lambda s, h, y: (
        h[arange(h.size(0))[:, None], y[:, None].expand(-1, 3)].pow(2).sum()
    ),
    "pick from transposed": lambda s, h, y: h.t()[y, arange(h.size(0))].pow(2).sum(),
    "weight decay": lambda s, h, y: F.cross_entropy(h, y) + 0.1 * s.linear.weight.pow(2).sum(),
    "decay minus loss": lambda s, h, y: 0.1 * s.linear.weight.pow(2).sum() - F.cross_entropy(h, y),
    "decay with alpha": lambda s, h, y: torch.add(F.cross_entropy(h, y), s.vector.norm(), alpha=0.3),
    "only decay": lambda s, h, y: s.linear.weight.pow(2).sum(),
    "constant added": lambda s, h, y: h.mean() + 1.0,
    "constant minus": lambda s, h, y: 1 - h.mean(),
    "one minus, scaled": lambda s, h, y: torch.rsub(h.mean(), 1.0, alpha=2),
    "product with shared": lambda s, h, y: (h * s.vector.sum()).mean() * s.vector.norm(),
    "sum of sums": lambda s, h, y: (h.sum(0) * s.vector).sum(),
    "mean of means": lambda s, h, y: h.mean(0).mean(),
    "detached sum": lambda s, h, y: h.sum() + h.mean().detach(),
    "over batch size": lambda s, h, y: h.pow(2).sum() / h.size(0),
    "over element count": lambda s, h, y: h.pow(2).sum() / h.numel(),
    "over filled number": lambda s, h, y: h.sum() / torch.full((), h.size(0)),
    "alpha is the batch size": lambda s, h, y: torch.add(h, h, alpha=h.size(0)).sum(),
    "over count of ones": lambda s, h, y: h.sum() / torch.ones(h.size(0)).sum(),
    "masked mean": lambda s, h, y: (h * (y > 1)[:, None]).sum() / (y > 1).sum(),
    "label count plus shared": lambda s, h, y: h.sum() / ((y > 0).sum() + s.vector.numel()),
    "type of samples": lambda s, h, y: (h * s.vector.double().type_as(h[:, :1])).sum(),
    "sum with the type of samples": lambda s, h, y: h.sum().type_as(s.buffer[0] * h) / y.numel(),
    "label mean truncated": lambda s, h, y: h.sum() + (y.float().sum() / 7).long() * s.vector.sum(),
    "squeezed": lambda s, h, y: F.mse_loss(h[:, :1].squeeze(), y.float()),
    "squeezed by dim": lambda s, h, y: (h.squeeze(0).softmax(-1) * s.vector).sum(),
    "squeezed twice": lambda s, h, y: (h[:, None, :1].squeeze((0, 1, 2)) * y).sum(),
    "broadcast loss": lambda s, h, y: F.mse_loss(h[:, :1], y.float()[:, None].expand(-1, 3)),
    "loss to a shared target": lambda s, h, y: torch.ops.aten.mse_loss(h, s.vector),
    "loss of a shared value": lambda s, h, y: torch.ops.aten.mse_loss(s.vector[:1], h),
    "huber": lambda s, h, y: F.huber_loss(h, s.table[y]),
    "gaussian": lambda s, h, y: F.gaussian_nll_loss(h, s.table[y], h.exp()),
    "smooth l1": lambda s, h, y: F.smooth_l1_loss(h, s.table[y], beta=0.5),
    "binary, pos_weight": lambda s, h, y: F.binary_cross_entropy_with_logits(
        h, F.one_hot(y, 4).float(), weight=s.buffer[0].abs(), pos_weight=s.buffer[1].abs()
    ),
    "binary, weight per sample": lambda s, h, y: F.binary_cross_entropy_with_logits(
        h, F.one_hot(y, 4).float(), weight=y[:, None].float()
    ),
    "binary of chances": lambda s, h, y: F.binary_cross_entropy(h.sigmoid(), F.one_hot(y, 4).float()),
    "kl": lambda s, h, y: F.kl_div(h.log_softmax(-1), s.table[y].softmax(-1)),
    "kl per sample": lambda s, h, y: F.kl_div(
        h.log_softmax(-1), s.vector.softmax(-1), reduction="batchmean"
    ),
    "cosine": lambda s, h, y: 1 - F.cosine_similarity(h, s.table[y]).mean(),
    "normalized": lambda s, h, y: F.normalize(h, dim=-1).pow(3).sum(),
    "norm per sample": lambda s, h, y: h.norm(dim=1).mean(),
    "nan-safe sum per sample": lambda s, h, y: torch.nansum(h, dim=1).pow(2).sum(),
    "count per sample": lambda s, h, y: (torch.count_nonzero(h > 0, dim=1) * h[:, 0]).sum(),
    "std per sample": lambda s, h, y: h.std(-1).mean(),
    "max per sample": lambda s, h, y: h.max(1)[0].sum(),
    "prod per sample": lambda s, h, y: h.prod(1).sum(),
    "sort per sample": lambda s, h, y: (h.sort(1)[0] * s.vector).sum(),
    "topk per sample": lambda s, h, y: h.topk(2)[0].pow(2).sum(),
    "cumsum per sample": lambda s, h, y: h.cumsum(1).pow(2).sum(),
    "logsumexp per sample": lambda s, h, y: h.logsumexp(-1).mean(),
    "gather per sample": lambda s, h, y: h.gather(1, y[:, None]).pow(2).mean(),
    "gather from a table": lambda s, h, y: (s.table.gather(0, y[:, None].expand(-1, 4)) * h).sum(),
    "take along dim": lambda s, h, y: torch.take_along_dim(h, y[:, None], 1).pow(2).mean(),
    "scatter per sample": lambda s, h, y: h.scatter(1, y[:, None], 1.0).pow(2).sum(),
    "scatter add per sample": lambda s, h, y: h.scatter_add(1, y[:, None], h[:, :1]).pow(2).sum(),
    "embedding": lambda s, h, y: (F.embedding(y, s.table, padding_idx=0) * h).sum(),
    "roll per sample": lambda s, h, y: (h.roll(1, 1) * s.vector).pow(2).sum(),
    "where": lambda s, h, y: torch.where(y[:, None] > 1, h, s.vector).pow(2).mean(),
    "bias per sample": lambda s, h, y: torch.addmm(h, h, s.linear.weight, beta=2).pow(2).sum(),
    "bias per sample, vector": lambda s, h, y: torch.addmv(h[:, 0], h, s.vector).pow(2).sum(),
    "gram matrix": lambda s, h, y: (torch.einsum("bd,be->de", h, h) * s.linear.weight).sum(),
    "einsum without arrow": lambda s, h, y: torch.einsum("bd,de", h, s.linear.weight).pow(2).sum(),
    "two views joined": lambda s, h, y: F.cross_entropy(torch.cat([h, -h]), torch.cat([y, y])),
    "repeated samples": lambda s, h, y: F.cross_entropy(
        h.repeat_interleave(2, 0), y.repeat_interleave(2)
    ),
    "tiled samples": lambda s, h, y: F.cross_entropy(h.repeat(2, 1), y.repeat(2)),
    "dropout": lambda s, h, y: F.dropout(h, 0.5).pow(2).sum(),
    "dropout of tiled samples": lambda s, h, y: F.dropout(h.repeat(2, 1), 0.5).pow(2).sum(),
    "dropout of weights": lambda s, h, y: (h @ F.dropout(s.linear.weight, 0.5)).pow(2).sum(),
    "noise": lambda s, h, y: (h + torch.randn_like(h)).pow(2).sum(),
    "noise for all": lambda s, h, y: (h * torch.rand(1)).pow(2).sum(),
    "noise per sample": lambda s, h, y: (h * torch.rand(h.size(0), 1)).pow(2).sum(),
    "coin per element": lambda s, h, y: (h * torch.bernoulli(h.sigmoid().detach())).pow(2).sum(),
    "drop path": lambda s, h, y: (h * h.new_empty(h.size(0), 1).bernoulli_(0.5)).pow(2).sum(),
}


def neighbours(h: Tensor) -> Tensor:
    """Each point's two nearest points, looked up in the batch laid flat."""
    points = torch.stack([h, h.flip(1), h * 2], 1)
    nearest = torch.cdist(points, points).topk(2, largest=False).indices
    starts = torch.arange(h.size(0))[:, None, None] * 3
    return points.flatten(0, 1)[(nearest + starts).view(-1)].view(-1, 3, 2, 4)


ROWS |= {
    "spectrum": lambda s, h, y: (torch.fft.rfft(h) * s.vector[:3]).abs().mean(),
    "spectrum of pictures": lambda s, h, y: (
        torch.fft.irfft2(torch.fft.rfft2(h.view(-1, 2, 2))).pow(3).sum()
    ),
    "a system per sample": lambda s, h, y: torch.linalg.solve(
        torch.eye(2) + h.view(-1, 2, 2).pow(2), h.view(-1, 2, 2)
    ).sum(),
    "one system for all": lambda s, h, y: torch.linalg.solve_triangular(
        s.linear.weight.tril() + torch.eye(4), h.t(), upper=False
    ).mean(),
    "distances to codes": lambda s, h, y: torch.cdist(h, s.table).amin(1).mean(),
    "nearest neighbours": lambda s, h, y: (neighbours(h) * s.vector).pow(2).mean(),
    "triplets": lambda s, h, y: F.triplet_margin_loss(h, s.table[y], h.flip(1)),
    "margins of classes": lambda s, h, y: F.multi_margin_loss(h, y, weight=s.buffer[0].abs()),
    "margins of cosines": lambda s, h, y: F.cosine_embedding_loss(h, s.table[y], y.sign() * 2 - 1),
    "adding along rows": lambda s, h, y: h.index_add(1, torch.tensor([0, 2]), h[:, :2]).pow(2).sum(),
    "writing to own places": lambda s, h, y: (
        (h.index_put((arange(h.size(0)), y), s.vector[0]) * s.vector).pow(2).sum()
    ),
    "bags of words": lambda s, h, y: (
        F.embedding_bag(torch.stack([y, y + 1], 1), s.table, mode="mean") * h
    ).sum(),
    "quantiles": lambda s, h, y: torch.quantile(h, 0.3, dim=1).pow(2).sum(),
    "a row for each of several": lambda s, h, y: (
        h.view(-1, 2)[arange(2 * len(y)), y.repeat_interleave(2) % 2].pow(2).sum()
    ),
}

SEQUENCES: dict[str, Loss] = {
    "ignored labels": lambda s, h, y: F.cross_entropy(h.view(-1, 4), y.view(-1)),
    "ignored, weighted, smoothed": lambda s, h, y: F.cross_entropy(
        h.view(-1, 4), y.view(-1), weight=s.buffer[0].abs(), label_smoothing=0.1
    ),
    "classes second": lambda s, h, y: F.cross_entropy(h.transpose(1, 2), y),
    "time first": lambda s, h, y: F.cross_entropy(h.transpose(0, 1).reshape(-1, 4), y.t().reshape(-1)),
    "images": lambda s, h, y: F.nll_loss(
        h[:, :4].reshape(-1, 4, 2, 2).log_softmax(1), y[:, :4].reshape(-1, 2, 2)
    ),
    "soft labels of the model": lambda s, h, y: F.cross_entropy(
        h.transpose(1, 2), h.detach().transpose(1, 2).softmax(1)
    ),
    "sum over valid labels": lambda s, h, y: (
        F.cross_entropy(h.view(-1, 4), y.view(-1), reduction="sum") / (y != -100).sum().clamp(min=1)
    ),
    "mean over valid times": lambda s, h, y: (
        ((h * (y != -100)[..., None]).sum(1) / (y != -100).sum(1, keepdim=True)).pow(2).mean()
    ),
    "mean over a mask of floats": lambda s, h, y: (
        ((h.softmax(-1) - s.vector).square().sum(-1) * (y > 0).float()).sum()
        / (y > 0).float().sum().clamp(min=1.0)
    ),
    "weights per label, normalised": lambda s, h, y: (
        (F.cross_entropy(h.transpose(1, 2), y, reduction="none") * s.buffer[:5, 0].abs()).sum()
        / (s.buffer[:5, 0].abs() * (y != -100)).sum()
    ),
    "ignored and smoothed, another index": lambda s, h, y: F.cross_entropy(
        h.view(-1, 4), y.clamp(min=-1).view(-1), ignore_index=-1, label_smoothing=0.1
    ),
    "divergence over a mask": lambda s, h, y: (
        (
            F.kl_div(h.log_softmax(-1), s.table[y.clamp(min=0)].softmax(-1), reduction="none").sum(-1)
            * (y >= 0)
        ).sum()
        / (y >= 0).sum()
    ),
    "binary over a mask": lambda s, h, y: (
        F.binary_cross_entropy_with_logits(
            h[..., 0], (y > 1).float(), weight=(y >= 0).float(), reduction="sum"
        )
        / (y >= 0).sum()
    ),
    "packed": lambda s, h, y: _packed(s, h, y),
    "turned as complex numbers": lambda s, h, y: (
        torch.view_as_real(_complex(h) * _complex(s.table[:5])).pow(3).sum()
    ),
    "windows in time": lambda s, h, y: (h.unfold(1, 2, 1) * s.vector[:2]).pow(2).sum(),
    "shaped alike": lambda s, h, y: (h.flatten(0, 1).reshape_as(h * 2) * s.vector).pow(2).sum(),
    "last time": lambda s, h, y: h[:, -1].pow(2).sum(),
    "shift in time": lambda s, h, y: (F.pad(h, (0, 0, 1, -1)) * h).sum(),
    "time differences": lambda s, h, y: h.diff(dim=1).pow(2).sum(),
    "merge and part again": lambda s, h, y: (
        h.transpose(0, 1).reshape(-1, 4).softmax(1).reshape(5, -1, 4).pow(2).sum()
    ),
    "reset in time": lambda s, h, y: _written(h, s).pow(2).sum(),
    "attention": lambda s, h, y: F.scaled_dot_product_attention(h, h, h, is_causal=True).pow(2).sum(),
    "attention, dropout": lambda s, h, y: (
        F.scaled_dot_product_attention(h, h, h, dropout_p=0.3).pow(2).sum()
    ),
    "attention, heads in batch": lambda s, h, y: (
        self_attention(h.repeat_interleave(2, 0), visible(y).repeat_interleave(2, 0)).pow(2).sum()
    ),
    "attention, shared keys": lambda s, h, y: (
        F.scaled_dot_product_attention(h, s.table[None], s.buffer[None]).pow(2).sum()
    ),
    "attention, batch second": lambda s, h, y: self_attention(h.transpose(0, 1)[:, :, None]).pow(2).sum(),
    "batched product": lambda s, h, y: (
        torch.baddbmm(s.vector, h, s.linear.weight.expand(h.size(0), -1, -1)).pow(2).sum()
    ),
    "maps in place of channels": lambda s, h, y: (
        F.interpolate(h[None], size=(7, 2))[0].mul(F.max_pool1d(h[:, 0], 2)[:, None]).pow(2).sum()
    ),
    "channels dropped": lambda s, h, y: F.dropout2d(h[..., None], 0.5).pow(2).sum(),
}


def self_attention(x: Tensor, mask: Tensor | None = None) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x, attn_mask=mask)


def _complex(x: Tensor) -> Tensor:
    return torch.view_as_complex(x.reshape(*x.shape[:-1], 2, 2))


def _packed(s: Calls, h: Tensor, y: Tensor) -> Tensor:
    """Several documents in each row: a label of zero ends one; places and attention start afresh."""
    document = (y == 0).long().cumsum(1)
    times = arange(5)
    starts = torch.where(y == 0, times, torch.zeros_like(times)).cummax(1).values
    h = h + s.table[times - starts]
    same = (document[:, None] == document[:, :, None]) & (times <= times[:, None])
    scores = self_attention(h, same)
    return F.cross_entropy(scores.flatten(0, 1), torch.where(starts == times, -100, y).flatten())


def visible(y: Tensor) -> Tensor:
    """Which times may be attended to: labels above zero, and always the first."""
    return ((y > 0) | (arange(5) == 0))[:, None, :].expand(-1, 5, -1)


def _written(h: Tensor, s: Calls) -> Tensor:
    made = torch.zeros(h.size(0), 5, 4)
    for t in range(5):
        made[:, t] = h[:, t] * t
    made[:, 1:].mul_(s.vector)
    return made


LAYERS: dict[str, tuple[Callable[[], nn.Module], Loss]] = {
    "lstm": (lambda: nn.LSTM(4, 3, batch_first=True), lambda s, h, y: s.layer(h)[0].pow(2).sum()),
    "lstm, time first": (
        lambda: nn.LSTM(4, 3, 2, bidirectional=True),
        lambda s, h, y: s.layer(h.transpose(0, 1))[0].pow(2).sum(),
    ),
    "gru with own state": (
        lambda: nn.GRU(4, 4, batch_first=True),
        lambda s, h, y: s.layer(h, h[None, :, 0])[1].pow(2).sum(),
    ),
    "lstm cell": (
        lambda: nn.LSTMCell(4, 4),
        lambda s, h, y: s.layer(h[:, 1], s.layer(h[:, 0]))[0].pow(2).sum(),
    ),
    "gru cell": (lambda: nn.GRUCell(4, 4), lambda s, h, y: s.layer(h[:, 1], h[:, 0]).pow(2).sum()),
    "multi-head attention": (
        lambda: nn.MultiheadAttention(4, 2, batch_first=True),
        lambda s, h, y: s.layer(h, h, h)[0].pow(2).sum(),
    ),
    "multi-head, time first": (
        lambda: nn.MultiheadAttention(4, 2),
        lambda s, h, y: s.layer(*[h.transpose(0, 1)] * 3)[1].pow(2).sum(),
    ),
    "encoder layer": (
        lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, dropout=0.3),
        lambda s, h, y: s.layer(h).pow(2).sum(),
    ),
    "batch norm, frozen": (
        lambda: nn.BatchNorm1d(5).eval(),
        lambda s, h, y: s.layer(h).pow(2).sum(),
    ),
    "instance norm": (lambda: nn.InstanceNorm1d(5), lambda s, h, y: s.layer(h).pow(3).sum()),
    "group norm": (lambda: nn.GroupNorm(1, 5), lambda s, h, y: s.layer(h).pow(3).sum()),
    "convolution": (lambda: nn.Conv1d(5, 3, 2), lambda s, h, y: s.layer(h).pow(2).sum()),
}


def rows() -> tuple[Tensor, Tensor]:
    return torch.randn(BATCH, 4), torch.tensor([0, 1, 2, 3, 2, 0])


def sequences() -> tuple[Tensor, Tensor]:
    """Labels with very unequal counts of ignored ones."""
    y = torch.randint(0, 4, (BATCH, 5))
    y[0, 1:] = -100
    y[2, :2] = -100
    return torch.randn(BATCH, 5, 4), y


def check(model: nn.Module, args: tuple[Tensor, Tensor]) -> None:
    made = ready(model, args)
    assert made.reason == tail_reason(made.source) == "" and made.source.output.attr("in_step") is None
    assert_close(in_parts(made, args, PARTS), in_parts(made, args, (BATCH,)))


@pytest.mark.filterwarnings("ignore:An output with one or more elements was resized")
@pytest.mark.parametrize("name", ROWS)
def test_rows(name: str) -> None:
    if name == "quantiles" and torch.__version__.startswith("2.11"):
        pytest.skip("torch.quantile of torch 2.11 reads its argument, which no export follows")
    check(Calls(ROWS[name]), rows())


@pytest.mark.parametrize("name", SEQUENCES)
def test_sequences(name: str) -> None:
    check(Calls(SEQUENCES[name]), sequences())


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str) -> None:
    make, loss = LAYERS[name]
    check(Calls(loss, make()), sequences())
