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
    """The forward of recurrent layers, which takes sequences that only seem to be packed as well.

    Layers that drop out in between run one by one, so that what is dropped is keyed as everywhere else.
    """

    def forward(self: nn.RNNBase, input: Any, hx: Any = None) -> Any:
        drops = bool(self.dropout and self.training and self.num_layers > 1)
        if not isinstance(input, Packed):
            return _dropping(self, input, hx) if drops else original(self, input, hx)
        x, lengths = input.padded, input.lengths
        states = _states(self, x, x.shape[0], hx)

        def run(x: torch.Tensor, states: _States, weights: list[torch.Tensor], layers: int) -> _Layers:
            hidden, cells = (*states, states[0])[:2]
            options = _kind(self), layers, self.bias, self.bidirectional
            out, h, c = packed_rnn(x, lengths, hidden, cells, weights, *options)
            return out, (h, c)[: len(states)]

        out, ends = _stacked(self, x, states, run, drops)
        return Packed(out, lengths), ends if len(ends) > 1 else ends[0]

    return forward


_States = tuple[torch.Tensor, ...]
"""Hidden states, and of an LSTM cells behind them, [layers (twice if bidirectional), N, H] each."""
_Layers = tuple[torch.Tensor, _States]


def _kind(layer: nn.RNNBase) -> str:
    """What `packed_rnn` calls a layer."""
    if isinstance(layer, nn.RNN):
        return str(layer.nonlinearity)
    return "LSTM" if isinstance(layer, nn.LSTM) else "GRU"


def _states(layer: nn.RNNBase, x: torch.Tensor, samples: int, given: Any) -> _States:
    """States to start from: those given, or zeros."""
    is_lstm = isinstance(layer, nn.LSTM)
    if given is not None:
        return tuple(given) if is_lstm else (given,)
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    sizes = [layer.proj_size or layer.hidden_size, layer.hidden_size][: 2 if is_lstm else 1]
    return tuple(x.new_zeros(count, samples, size) for size in sizes)


def _stacked(
    layer: nn.RNNBase, x: torch.Tensor, states: _States, run: Callable[..., _Layers], drops: bool
) -> _Layers:
    """All layers at once, or one by one with dropout in between."""
    directions, at_once = 2 if layer.bidirectional else 1, 1 if drops else layer.num_layers
    ends = []
    for first in range(0, layer.num_layers, at_once):
        if first:
            x = nn.functional.dropout(x, layer.dropout, training=True)
        rows = slice(first * directions, (first + at_once) * directions)
        # By name, for the list that the layer keeps of them is not that of the export.
        weights = [weight for group in layer.all_weights[rows] for weight in group]
        x, last = run(x, tuple(state[rows] for state in states), weights, at_once)
        ends.append(last)
    return x, ends[0] if len(ends) == 1 else tuple(torch.cat(parts) for parts in zip(*ends, strict=True))


def _dropping(layer: nn.RNNBase, x: torch.Tensor, hx: Any) -> Any:
    """The forward of a layer that drops out in between, of one sequence or of several."""
    alone, samples_dim = x.ndim == 2, 0 if layer.batch_first else 1
    if alone:
        x = x.unsqueeze(samples_dim)
        hx = _each(hx, lambda state: state.unsqueeze(1))
    kind = _kind(layer)

    def run(x: torch.Tensor, states: _States, weights: list[torch.Tensor], layers: int) -> _Layers:
        options = weights, layer.bias, layers, 0.0, True, layer.bidirectional, layer.batch_first
        if kind == "LSTM":
            out, h, c = torch.lstm(x, list(states), *options)
            return out, (h, c)
        functions = {"GRU": torch.gru, "tanh": torch.rnn_tanh, "relu": torch.rnn_relu}
        out, h = functions[kind](x, states[0], *options)
        return out, (h,)

    out, ends = _stacked(layer, x, _states(layer, x, x.shape[samples_dim], hx), run, drops=True)
    if alone:
        out, ends = out.squeeze(samples_dim), _each(ends, lambda state: state.squeeze(1))
    return out, ends if kind == "LSTM" else ends[0]


def _each(states: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A state or several, or None, with each of them changed."""
    if isinstance(states, tuple):
        return tuple(map(change, states))
    return states if states is None else change(states)
