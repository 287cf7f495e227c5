"""Recurrent layers over sequences of unlike lengths, as an operator of static shapes.

`torch.nn.utils.rnn.pack_padded_sequence` makes a tensor of as many rows as there are steps in the batch.
Here sequences stay padded from outside, and are packed and padded again within the operator.
"""

from typing import Any

import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

_Results = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _run(
    x: torch.Tensor,
    lengths: torch.Tensor,
    hidden: torch.Tensor,
    cells: torch.Tensor,
    weights: list[torch.Tensor],
    kind: str,
    layers: int,
    biases: bool,
    bidirectional: bool,
) -> _Results:
    """What the layer makes of each sequence's own steps, zero behind them; its last states and cells.

    Args:
        x: [N, T, C].
        lengths: [N], each from 1 to T.
        hidden: States to start from, [layers (twice if bidirectional), N, H].
        cells: Cells to start from, of the same shape; used by an LSTM alone.
        weights: The layer's flat weights.
        kind: "LSTM", "GRU", "tanh" or "relu".
        layers: How many layers lie above each other.
        biases: Whether the weights have biases among them.
        bidirectional: Whether each layer runs back as well.
    """
    packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
    order, back = packed.sorted_indices, packed.unsorted_indices
    assert order is not None and back is not None
    sizes = packed.batch_sizes
    start = hidden.index_select(1, order)
    options = weights, biases, layers, 0.0, False, bidirectional
    if kind == "LSTM":
        data, h, c = torch.lstm(packed.data, sizes, [start, cells.index_select(1, order)], *options)
        c = c.index_select(1, back)
    else:
        run = {"GRU": torch.gru, "tanh": torch.rnn_tanh, "relu": torch.rnn_relu}[kind]
        data, h = run(packed.data, sizes, start, *options)
        c = cells.clone()
    made = PackedSequence(data, sizes, order, back)
    out, _ = pad_packed_sequence(made, batch_first=True, total_length=x.shape[1])
    return out, h.index_select(1, back), c


packed_rnn = torch.library.custom_op("graphpar::packed_rnn", _run, mutates_args=())


@packed_rnn.register_fake
def _(
    x: torch.Tensor, lengths: torch.Tensor, hidden: torch.Tensor, cells: torch.Tensor, *rest: Any
) -> _Results:
    bidirectional = rest[-1]
    out = x.new_empty(*x.shape[:2], hidden.shape[-1] * (2 if bidirectional else 1))
    return out, torch.empty_like(hidden), torch.empty_like(cells)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, lengths, hidden, cells, weights, *options = inputs
    ctx.save_for_backward(x, lengths, hidden, cells, *weights)
    ctx.options = options


def _backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[Any, ...]:
    x, lengths, *rest = ctx.saved_tensors
    given = [t.detach().requires_grad_() for t in (x, *rest)]
    with torch.enable_grad():
        made = _run(given[0], lengths, given[1], given[2], given[3:], *ctx.options)
        pairs = [(m, g) for m, g in zip(made, gradients, strict=True) if g is not None]
        outputs, starts = zip(*pairs, strict=True)
        found = torch.autograd.grad(outputs, given, starts, allow_unused=True)
    return found[0], None, found[1], found[2], list(found[3:]), *[None] * len(ctx.options)


packed_rnn.register_autograd(_backward, setup_context=_keep)
