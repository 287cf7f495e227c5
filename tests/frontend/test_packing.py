"""Packed sequences: recurrent layers give eager's numbers, and the batch can be split."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from one_device import assert_as_eager, assert_close, in_parts, ready
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from graphpar.errors import CaptureError


class Tagger(nn.Module):
    """Tags for the words of sentences of unlike lengths; its loss reads outputs and last states."""

    def __init__(self, layer: nn.RNNBase, total: int | None) -> None:
        super().__init__()
        self.embed, self.layer, self.total = nn.Embedding(20, 4), layer, total
        self.head = nn.Linear(3 * (1 + layer.bidirectional), 4)

    def forward(self, words: Tensor, lengths: Tensor, tags: Tensor) -> Tensor:
        first = self.layer.batch_first
        x = self.embed(words if first else words.t())
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=first, enforce_sorted=False)
        out, state = self.layer(packed)
        out, _ = pad_packed_sequence(out, batch_first=first, total_length=self.total)
        last: Tensor = sum(s.pow(2).mean() for s in (state if isinstance(state, tuple) else (state,)))
        logits = self.head(out if first else out.transpose(0, 1))
        return F.cross_entropy(logits.flatten(0, 1), tags.flatten(), ignore_index=-1) + last


def sentences() -> tuple[Tensor, Tensor, Tensor]:
    lengths = torch.tensor([5, 3, 4, 2, 5, 1])
    tags = torch.randint(0, 4, (6, 5)).masked_fill(torch.arange(5) >= lengths[:, None], -1)
    return torch.randint(0, 20, (6, 5)), lengths, tags


@pytest.mark.parametrize(
    ("layer", "options", "total"),
    [(nn.LSTM, {"batch_first": True, "bidirectional": True}, 5), (nn.GRU, {"num_layers": 2}, None)],
)
def test_packed_sequences(layer: Any, options: dict[str, Any], total: int | None) -> None:
    batch = sentences()
    made = assert_as_eager(Tagger(layer(4, 3, **options), total), batch)
    assert not made.reason
    assert_close(in_parts(made, batch, (1, 3, 2)), in_parts(made, batch, (6,)))


class Reading(nn.Module):
    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return pack_padded_sequence(x, lengths, batch_first=True).data.pow(2).mean()


def test_the_rows_of_a_packed_sequence_are_refused() -> None:
    x = torch.randn(3, 4, 2, requires_grad=True)
    with pytest.raises(CaptureError, match=r"reads 'data' of a packed sequence at .*pad_packed_sequence"):
        ready(Reading(), (x, torch.tensor([4, 2, 1])))


class Cut(nn.Module):
    """Sets to zero what lies behind the end of each sequence, whatever its steps are made of."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.linear, self.shape = nn.Linear(8, 8), shape

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        steps = self.linear(x).view(-1, *self.shape)
        packed = pack_padded_sequence(steps, lengths, batch_first=True, enforce_sorted=False)
        return pad_packed_sequence(packed, batch_first=True, total_length=9)[0].pow(2).sum()


@pytest.mark.parametrize("shape", [(8,), (2, 2, 2)])
def test_steps_of_other_ranks(shape: tuple[int, ...]) -> None:
    assert_as_eager(Cut(shape), (torch.randn(3, 8), torch.tensor([1, 2, 1])))
