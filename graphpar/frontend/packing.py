"""Packed sequences, in a form that a graph can hold.

A packed sequence has as many rows as there are steps in the batch, a size that depends on the data. While
a model is captured, packing keeps the padded sequences with their lengths instead, recurrent layers take
them by an operator that packs within (`graphpar.runtime.packed`), and padding gives them back.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn.utils import rnn

from graphpar.errors import CaptureError
from graphpar.frontend.frames import users_line
from graphpar.runtime.packed import packed_rnn

_LAYERS = (nn.LSTM, nn.GRU, nn.RNN)


class Packed:
    """Padded sequences [N, T, ...] and how long each is, in the place of a packed sequence."""

    def __init__(self, padded: torch.Tensor, lengths: torch.Tensor) -> None:
        self.padded, self.lengths = padded, lengths

    def __getattr__(self, name: str) -> Any:
        raise CaptureError(
            f"The model reads {name!r} of a packed sequence at {users_line()}, which has as many rows as "
            "there are steps in the batch. Call pad_packed_sequence first, and work on the padded tensor."
        )


@contextmanager
def packed_as_padded(modules: Sequence[ModuleType]) -> Iterator[None]:
    """Within it, packing and padding by the user's modules keep shapes static."""
    stand_ins: dict[Any, Callable[..., Any]] = {
        rnn.pack_padded_sequence: _pack,
        rnn.pad_packed_sequence: _pad,
    }
    with ExitStack() as stack:
        for module in {rnn, nn.utils.rnn, *modules}:
            for name, value in list(vars(module).items()):
                if callable(value) and (made := _stand_in(stand_ins, value)) is not None:
                    stack.callback(setattr, module, name, value)
                    setattr(module, name, made)
        for layer in _LAYERS:
            before = layer.__dict__["forward"]
            stack.callback(setattr, layer, "forward", before)
            layer.forward = _forward(before)  # type: ignore[method-assign]
        yield


def _stand_in(stand_ins: dict[Any, Callable[..., Any]], value: Any) -> Callable[..., Any] | None:
    return next((made for original, made in stand_ins.items() if value is original), None)


def _pack(
    input: torch.Tensor,
    lengths: Any,
    batch_first: bool = False,
    enforce_sorted: bool = True,
) -> Packed:
    x = input if batch_first else input.transpose(0, 1)
    return Packed(x, torch.as_tensor(lengths, dtype=torch.int64, device="cpu"))


def _pad(
    sequence: Packed,
    batch_first: bool = False,
    padding_value: float = 0.0,
    total_length: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    x, lengths = sequence.padded, sequence.lengths
    size = int(lengths.max()) if total_length is None else total_length
    x = x[:, :size]
    if size > x.shape[1]:
        x = nn.functional.pad(x, (*(0, 0) * (x.ndim - 2), 0, size - x.shape[1]))
    there = torch.arange(size, device=lengths.device) < lengths[:, None]
    there = there.to(x.device).reshape(*there.shape, *(1,) * (x.ndim - 2))
    x = torch.where(there, x, padding_value)
    return (x if batch_first else x.transpose(0, 1)), lengths


def _forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of recurrent layers, which takes sequences that only seem to be packed as well."""

    def forward(self: nn.RNNBase, input: Any, hx: Any = None) -> Any:
        if not isinstance(input, Packed):
            return original(self, input, hx)
        if self.proj_size or (self.dropout and self.training and self.num_layers > 1):
            what = "dropout between its layers" if self.dropout else "proj_size"
            raise CaptureError(
                f"A {type(self).__name__} with {what} takes a packed sequence at {users_line()}, which a "
                "graph cannot hold. Use one layer each, with nn.Dropout between them."
            )
        x, directions = input.padded, 2 if self.bidirectional else 1
        zeros = x.new_zeros(self.num_layers * directions, x.shape[0], self.hidden_size)
        is_lstm = isinstance(self, nn.LSTM)
        hidden, cells = (hx if is_lstm else (hx, zeros)) if hx is not None else (zeros, zeros)
        kind = type(self).__name__ if not isinstance(self, nn.RNN) else self.nonlinearity
        kind = "LSTM" if is_lstm else "GRU" if isinstance(self, nn.GRU) else kind
        # By name, for the list that the layer keeps of them is not that of the export.
        weights = [weight for group in self.all_weights for weight in group]
        out, h, c = packed_rnn(
            x, input.lengths, hidden, cells, weights, kind, self.num_layers, self.bias, self.bidirectional
        )
        return Packed(out, input.lengths), (h, c) if is_lstm else h

    return forward
