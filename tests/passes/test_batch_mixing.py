"""Losses in which samples meet: exact all the same, or whole; the reason names module and line."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from one_device import Calls, assert_close, eagerly, in_parts, ready
from test_batch_exact import PARTS, Loss, rows, self_attention, sequences, visible
from torch import Tensor, arange, nn

from graphpar.ir.whole import tail_reason
from graphpar.runtime.reference import draws_at_random

ROWS: dict[str, Loss] = {
    "position table": lambda s, h, y: (h + s.table[: h.size(0)]).pow(2).mean(),
    "position buffer": lambda s, h, y: (h + s.buffer[: h.size(0)]).pow(2).mean(),
    "position by index": lambda s, h, y: (h * s.table[arange(h.size(0))]).sum(),
    "position by select": lambda s, h, y: (h * s.table.index_select(0, arange(h.size(0)))).sum(),
    "position by embedding": lambda s, h, y: (h * F.embedding(arange(h.size(0)), s.table)).sum(),
    "position by gather": lambda s, h, y: (s.table.gather(1, y[:, None]) * h[:, :1]).sum(),
    "row by batch size": lambda s, h, y: (h * s.table[h.size(0)]).sum(),
    "ramp": lambda s, h, y: (h * torch.linspace(0, 1, h.size(0))[:, None]).sum(),
    "unit matrix": lambda s, h, y: (h * torch.eye(h.size(0), 4)).sum(),
    "expanded position": lambda s, h, y: (h * arange(h.size(0))[:, None].expand(-1, 4)).sum(),
    "first samples": lambda s, h, y: (h * (arange(h.size(0)) > 2)[:, None]).sum(),
    "position as bias": lambda s, h, y: (
        torch.addmm(arange(h.size(0), dtype=torch.float32)[:, None], h, s.linear.weight).pow(2).sum()
    ),
    "interleaved weights": lambda s, h, y: (s.vector.repeat_interleave(h.size(0)).view(-1, 4) * h).sum(),
    "numbers from the batch": lambda s, h, y: (h * torch.tensor(list(range(h.size(0))))[:, None]).sum(),
    "layouts added": lambda s, h, y: (h.repeat(2, 1) * h.repeat_interleave(2, 0)).sum(),
    "layouts multiplied": lambda s, h, y: torch.bmm(
        h.repeat(2, 1)[:, None], h.repeat_interleave(2, 0)[..., None]
    ).sum(),
    "layouts of indices": lambda s, h, y: s.table[y.repeat(2), y.repeat_interleave(2, 0)].sum() + h.sum(),
    "layouts of labels": lambda s, h, y: F.cross_entropy(torch.cat([h, -h]), y.repeat_interleave(2, 0)),
    "joined twice": lambda s, h, y: torch.cat([torch.cat([h, -h]), torch.cat([h, h])]).pow(3).sum(),
    "scrambled": lambda s, h, y: h.reshape(4, -1).softmax(0).pow(2).sum(),
    "scrambled by transpose": lambda s, h, y: h.t().reshape(-1, 4).softmax(1).pow(2).sum(),
    "scrambled inside": lambda s, h, y: (
        h.view(-1, 2, 2).transpose(0, 1).reshape(-1, 4).softmax(1).pow(2).sum()
    ),
    "softmax over merged": lambda s, h, y: (h.reshape(-1).softmax(0) * h.reshape(-1)).sum(),
    "softmax over one dim": lambda s, h, y: F.cross_entropy(h[:, 0], y.float().softmax(0)),
    "column times row": lambda s, h, y: (h[:, :1] * y).sum(),
    "column minus row loss": lambda s, h, y: torch.ops.aten.mse_loss(h[:, :1], y.float()),
    "every pair": lambda s, h, y: (h[:, None] * h[None]).sum(),
    "contrastive": lambda s, h, y: F.cross_entropy(h @ h.t(), arange(h.size(0))),
    "counted pairs": lambda s, h, y: (
        ((h @ h.t()).softmax(1) * (y[:, None] == y)).sum() / ((y[:, None] == y).sum(1) > 1).sum()
    ),
    "distances": lambda s, h, y: torch.cdist(h, h).sum(),
    "put at every pair": lambda s, h, y: (
        h.index_put((arange(h.size(0))[None], y[:, None]), torch.tensor(0.0)).pow(2).sum()
    ),
    "cross product of what has size 3": lambda s, h, y: torch.cross(h[:, :3], 2 * h[:, 1:]).pow(2).sum(),
    "matrix or vectors": lambda s, h, y: torch.linalg.solve(
        torch.diag_embed(h.pow(2) + 1) + h[:, None], s.buffer[:4]
    ).sum(),
    "one for all": lambda s, h, y: (h[0] * h).sum(),
    "others by index": lambda s, h, y: h[y].pow(2).sum(),
    "wrong place of the index": lambda s, h, y: h[y, arange(h.size(0)) % 4].pow(2).sum(),
    "written across": lambda s, h, y: h.scatter(0, y[:, None], 1.0).pow(2).sum(),
    "written by first rows": lambda s, h, y: h.scatter(1, s.buffer[:2, :1].long() * 0, 5.0).pow(2).sum(),
    "written from a table": lambda s, h, y: h.scatter(1, y[:, None], s.buffer[:, :1]).pow(2).sum(),
    "put by index": lambda s, h, y: h.clone().index_put((y, y), torch.tensor(1.0)).pow(2).sum(),
    "shifted": lambda s, h, y: (F.pad(h, (0, 0, 1, -1)) * h).sum(),
    "neighbours": lambda s, h, y: F.mse_loss(h[1:], h[:-1]),
    "windows": lambda s, h, y: h.unfold(0, 2, 1).prod(-1).sum(),
    "rolled": lambda s, h, y: (h.roll(1, 0) * s.vector).pow(2).sum(),
    "rolled flat": lambda s, h, y: (h.roll(1) * s.vector).pow(2).sum(),
    "flipped": lambda s, h, y: (h.flip(0) * h).sum(),
    "sorted": lambda s, h, y: (h.sort(0)[0] * s.table[:1]).pow(2).sum(),
    "top of the batch": lambda s, h, y: h.topk(2, 0)[0].pow(2).sum(),
    "running sum": lambda s, h, y: h.cumsum(0).sum(),
    "largest": lambda s, h, y: h.max(0)[0].sum(),
    "product": lambda s, h, y: h.prod(0).sum(),
    "variance": lambda s, h, y: h.var(),
    "norm": lambda s, h, y: h.norm(),
    "logsumexp": lambda s, h, y: h.logsumexp(0).mean(),
    "square of a mean": lambda s, h, y: h.mean(0).pow(2).sum(),
    "centred": lambda s, h, y: (h - h.mean(0)).pow(2).mean(),
    "share of the sum": lambda s, h, y: (h / h.sum(0, keepdim=True)).pow(2).sum(),
    "product of sums": lambda s, h, y: h.sum() * h.mean(),
    "rounded sum": lambda s, h, y: s.vector.sum() * (h.detach().sum() * 10).long() + h.sum(),
    "mask of the model": lambda s, h, y: (h * (h > 0)).sum() / (h > 0).sum(),
    "labels of the model": lambda s, h, y: F.cross_entropy(h, h.detach().argmax(-1)),
    "class weights of the model": lambda s, h, y: F.cross_entropy(h, y, weight=s.vector.detach().abs()),
    "norm with weights of the batch": lambda s, h, y: F.layer_norm(h, (4,), h.mean(0)).pow(2).sum(),
    "table of the batch": lambda s, h, y: F.embedding(y, h.t() @ h).pow(2).sum(),
    "layer of the batch": lambda s, h, y: F.linear(h, h[:4]).sum(),
    "gradient by frequency": lambda s, h, y: (F.embedding(y, s.table, scale_grad_by_freq=True) * h).sum(),
    "triangle": lambda s, h, y: h.triu().sum(),
    "halves": lambda s, h, y: torch.mul(*h.chunk(2)).sum(),
    "half of the batch": lambda s, h, y: h.pow(2).sum() / (h.size(0) // 2),
    "pairs": lambda s, h, y: h.view(-1, 2, 4).prod(1).sum(),
    "pooled": lambda s, h, y: F.avg_pool1d(h.t(), 2).pow(2).sum(),
    "attends": lambda s, h, y: F.scaled_dot_product_attention(h[None], h[None], h[None]).pow(2).sum(),
}

SEQUENCES: dict[str, Loss] = {
    "labels in another order": lambda s, h, y: F.cross_entropy(
        h.transpose(0, 1).reshape(-1, 4), y.reshape(-1)
    ),
    "keys in another order": lambda s, h, y: (
        F.scaled_dot_product_attention(
            h.repeat_interleave(2, 0), h.repeat_interleave(2, 0), h.repeat(2, 1, 1)
        )
        .pow(2)
        .sum()
    ),
    "mask in another order": lambda s, h, y: (
        self_attention(h.repeat_interleave(2, 0), visible(y).repeat(2, 1, 1)).pow(2).sum()
    ),
    "bias from the batch": lambda s, h, y: (
        torch.baddbmm(h.mean(0), h, s.linear.weight.expand(h.size(0), -1, -1)).pow(2).sum()
    ),
    "channels of all samples": lambda s, h, y: (
        F.dropout2d(h.permute(1, 2, 0)[..., None], 0.5).pow(2).sum()
    ),
}

LAYERS: dict[str, tuple[Callable[[], nn.Module], Loss]] = {
    "batch norm": (lambda: nn.BatchNorm1d(5), lambda s, h, y: s.layer(h).pow(2).sum()),
    "batch norm without memory": (
        lambda: nn.BatchNorm1d(5, track_running_stats=False),
        lambda s, h, y: s.layer(h).pow(2).sum(),
    ),
    "lstm along the batch": (lambda: nn.LSTM(4, 3), lambda s, h, y: s.layer(h)[0].pow(2).sum()),
    "state from the batch": (
        lambda: nn.GRU(4, 4, batch_first=True),
        lambda s, h, y: s.layer(h, h[:, 0].mean(0).expand(1, h.size(0), 4).contiguous())[0].pow(2).sum(),
    ),
    "attention along the batch": (
        lambda: nn.MultiheadAttention(4, 2),
        lambda s, h, y: s.layer(h, h, h)[0].pow(2).sum(),
    ),
}


def check(model: Calls, args: tuple[Tensor, Tensor]) -> None:
    """Exact with a tail that runs on the whole batch, or the batch is kept whole; either way told."""
    made = ready(model, args)
    told = made.reason or str(made.source.output.attr("in_step", "")) or tail_reason(made.source)
    by_analysis = " at (top) (" in told or " at layer (" in told
    by_capture = "for a batch of" in told or "changes with the batch size" in told
    assert by_analysis or by_capture, told
    if by_analysis:
        assert "(one_device.py:" in told, told
    if not made.reason:
        whole = in_parts(made, args, (len(args[0]),))
        assert_close(in_parts(made, args, PARTS), whole)
        if not draws_at_random(made.source):
            assert_close(whole, eagerly(model, args))


@pytest.mark.parametrize("name", ROWS)
def test_rows(name: str) -> None:
    check(Calls(ROWS[name]), rows())


@pytest.mark.parametrize("name", SEQUENCES)
def test_sequences(name: str) -> None:
    check(Calls(SEQUENCES[name]), sequences())


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str) -> None:
    make, loss = LAYERS[name]
    check(Calls(loss, make()), sequences())
