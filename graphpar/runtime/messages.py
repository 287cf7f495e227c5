"""Messages between driver and workers over a private socket: a small header and raw tensor bytes.

The header is msgpack: a kind, plain data, and for each tensor its name, dtype and shape. No pickles
travel but one: the optimiser factory, which the user's own process made and sends over this pipe.
"""

import socket
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
import torch

_LENGTH = struct.Struct("!QQ")
_LINE_BYTES = 64


class _TensorHeader(msgspec.Struct, frozen=True):
    name: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int


class _Header(msgspec.Struct, frozen=True):
    kind: str
    data: dict[str, Any]
    tensors: tuple[_TensorHeader, ...]


@dataclass(frozen=True)
class Message:
    """One message: what it is, plain data, and named tensors (on the CPU)."""

    kind: str
    data: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)


def send(channel: socket.socket, message: Message) -> None:
    """Write one message.

    Raises:
        OSError: The other side is gone.
    """
    for part in _parts(message):
        channel.sendall(part)


def receive(channel: socket.socket) -> Message:
    """Read one message; each tensor has memory of its own and may be kept.

    Raises:
        EOFError: The other side closed the channel.
    """
    length, _ = _LENGTH.unpack(_read(channel, _LENGTH.size))
    header = _decoded(_read(channel, length))
    tensors = {item.name: _tensor_of(_read(channel, item.num_bytes), item) for item in header.tensors}
    return Message(header.kind, header.data, tensors)


def pack(message: Message) -> bytearray:
    """One message as bytes, for collectives.

    >>> unpack(pack(Message("hello", {"x": 1}))).data
    {'x': 1}
    """
    packed = bytearray()
    for part in _parts(message):
        packed += part
    return packed


def unpack(packed: bytes | bytearray | memoryview) -> Message:
    """The inverse of `pack`."""
    view = memoryview(packed)
    length, body = _LENGTH.unpack(view[: _LENGTH.size])
    start = _LENGTH.size + length
    return _assemble(view[_LENGTH.size : start], view[start : start + body])


def _parts(message: Message) -> Iterator[bytes | memoryview]:
    raw = {name: raw_bytes(t) for name, t in message.tensors.items()}
    header = _Header(
        message.kind,
        dict(message.data),
        tuple(
            _TensorHeader(name, _dtype_name(t), tuple(t.shape), raw[name].nbytes)
            for name, t in message.tensors.items()
        ),
    )
    encoded = msgspec.msgpack.encode(header)
    yield _LENGTH.pack(len(encoded), sum(view.nbytes for view in raw.values()))
    yield encoded
    yield from raw.values()


def _assemble(encoded: memoryview, payload: memoryview) -> Message:
    header = _decoded(encoded)
    tensors = {}
    start = 0
    for item in header.tensors:
        tensors[item.name] = _tensor_of(payload[start : start + item.num_bytes], item)
        start += item.num_bytes
    return Message(header.kind, header.data, tensors)


def _decoded(encoded: memoryview) -> _Header:
    return msgspec.msgpack.decode(encoded, type=_Header)


def _read(channel: socket.socket, count: int) -> memoryview:
    """So many bytes, in a place like those of tensors: others would shift the heap's end (`heap`)."""
    # Whatever device the program that asks makes its tensors on.
    lines = -(-count // _LINE_BYTES)
    buffer = torch.empty(lines * _LINE_BYTES, dtype=torch.uint8, device="cpu")
    whole: memoryview = buffer.numpy().data[:count]
    view = whole
    while view.nbytes:
        try:
            got = channel.recv_into(view)
        except ConnectionError:
            got = 0
        if got == 0:
            raise EOFError("the other side closed the channel")
        view = view[got:]
    return whole


def _dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The numbers of a tensor as bytes, in row-major order.

    >>> list(raw_bytes(torch.tensor([[1, 2], [3, 4]], dtype=torch.int16)[:1, 1]))
    [2, 0]
    """
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if flat.numel() == 0:
        return memoryview(b"")
    # A column of a single row counts as contiguous whatever its stride, which cannot be seen as bytes.
    return flat.as_strided((flat.numel(),), (1,)).view(torch.uint8).numpy().data


def _tensor_of(raw: memoryview, header: _TensorHeader) -> torch.Tensor:
    dtype: torch.dtype = getattr(torch, header.dtype)
    if not raw.nbytes:
        return torch.empty(header.shape, dtype=dtype)
    flat = torch.frombuffer(raw, dtype=torch.uint8)
    if dtype != torch.uint8:
        flat = _aligned(flat, dtype).view(dtype)
    return flat.reshape(header.shape)


def _aligned(flat: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Reinterpreting bytes needs an aligned start; copy when the message did not give one."""
    return flat.clone() if flat.data_ptr() % 16 else flat
