"""Tensors in safetensors files, read one at a time without mapping a file into memory.

A mapped file counts against the memory limit of a process as far as it is touched; a rank that holds a
small part of a large model reads just the bytes of that part. The format is eight bytes of header
length, a JSON header, and the tensors' bytes (https://huggingface.co/docs/safetensors).
"""

import json
import os
import sys
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import msgspec
import torch

from graphpar.runtime.pieces import sliced
from graphpar.runtime.program import Slice
from graphpar.runtime.slices import take

INDEX_SUFFIX = ".safetensors.index.json"
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "BOOL": torch.bool,
}  # fmt: skip
_MAX_HEADER_BYTES = 100 * 2**20
_PIECE_BYTES = 16 * 2**20
"""Bytes converted to another type at a time."""


class Stored(msgspec.Struct, frozen=True):
    """Where a tensor lies: the file, its first byte there, element type and shape."""

    path: str
    start: int
    dtype: str
    shape: tuple[int, ...]


def find_tensors(source: str | os.PathLike[str]) -> dict[str, Stored]:
    """All tensors by name of a safetensors file, of an index of several, or of a folder.

    Raises:
        ValueError: There are none, or a file is damaged; names it.
    """
    path = Path(source)
    if path.is_dir():
        indices = sorted(path.glob(f"*{INDEX_SUFFIX}"))
        files = [path / name for name in _indexed(indices[0])] if indices else _alone(path)
    elif path.name.endswith(".json"):
        files = [path.parent / name for name in _indexed(path)]
    else:
        files = [path]
    found: dict[str, Stored] = {}
    for file in files:
        found.update(_header(file))
    if not found:
        raise ValueError(
            f"{path} holds no tensors; give a .safetensors file, an index {INDEX_SUFFIX}, or a folder "
            "with either."
        )
    return found


def _alone(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _indexed(index: Path) -> list[str]:
    try:
        names = json.loads(index.read_bytes())["weight_map"].values()
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{index} is no index of safetensors files: {error!r}.") from error
    if any(os.path.basename(name) != name for name in names):
        raise ValueError(f"{index} names files in other folders; they must stand beside it.")
    return sorted(set(names))


def _header(file: Path) -> dict[str, Stored]:
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if not 0 < length <= min(_MAX_HEADER_BYTES, size - 8):
                raise ValueError(f"its header would take {length} bytes")
            header = json.loads(opened.read(length))
        return {
            name: _entry(file, entry, 8 + length, size)
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is no safetensors file, or a damaged one: {error}.") from error


def _entry(file: Path, entry: Mapping[str, Any], first: int, size: int) -> Stored:
    begin, end = entry["data_offsets"]
    dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
    count = prod(shape)
    if not 0 <= begin <= end <= size - first or end - begin != count * dtype.itemsize:
        raise ValueError(f"a tensor of {list(shape)} takes bytes {begin} to {end} of {size - first}")
    return Stored(str(file.resolve()), first + begin, str(dtype).removeprefix("torch."), shape)


def write_tensors(file: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a safetensors file, one tensor after another, and see it to the disk."""
    names = {str(dtype): name for name, dtype in _DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for label, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[label] = {
            "dtype": names[str(tensor.dtype)],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            flat = tensor.detach().cpu().contiguous().view(-1)
            if flat.numel():
                opened.write(flat.view(torch.uint8).numpy().data)
        opened.flush()
        os.fsync(opened.fileno())


def read_tensor(
    stored: Stored, dtype: torch.dtype | None = None, cut: Slice | None = None
) -> torch.Tensor:
    """A stored tensor, or a slice of it, on the CPU; at most a piece is held twice.

    Args:
        stored: Where it lies.
        dtype: Another element type to have it in.
        cut: The slice to read; None for all of it.

    Raises:
        ValueError: The file ends too early, or cannot be opened.
    """
    try:
        with open(stored.path, "rb", buffering=0) as opened:
            if cut is not None:
                return sliced(_read_slice(opened, stored, dtype, cut), cut.rows)
            result = torch.empty(stored.shape, dtype=dtype or getattr(torch, stored.dtype))
            _read_run(opened, stored, 0, result.view(-1))
            return result
    except OSError as error:
        raise ValueError(f"{stored.path} cannot be read: {error}.") from error


def _read_slice(opened: Any, stored: Stored, dtype: torch.dtype | None, cut: Slice) -> torch.Tensor:
    """Whole runs where the first dimension is cut, else rows a few at a time, cut in memory."""
    own = dtype or getattr(torch, stored.dtype)
    rows, size, after = (
        prod(stored.shape[: cut.dim]),
        stored.shape[cut.dim],
        prod(stored.shape[cut.dim + 1 :]),
    )
    run, length = sum(cut.counts) * cut.inner, cut.counts[cut.member] * cut.inner
    shape = (*stored.shape[: cut.dim], size // run * length, *stored.shape[cut.dim + 1 :])
    result = torch.empty(shape, dtype=own)
    if cut.dim == 0:
        first = sum(cut.counts[: cut.member]) * cut.inner
        for number, part in enumerate(result.view(size // run, -1)):
            _read_run(opened, stored, (number * run + first) * after, part)
        return result
    flat = result.view(rows, -1, after)
    step = max(1, _PIECE_BYTES // max(1, size * after * own.itemsize))
    for begin in range(0, rows, step):
        whole = torch.empty(min(step, rows - begin), size, after, dtype=own)
        _read_run(opened, stored, begin * size * after, whole.view(-1))
        flat[begin : begin + step] = take(whole, 1, cut.counts, cut.inner, cut.member)
    return result


def _read_run(opened: Any, stored: Stored, first: int, into: torch.Tensor) -> None:
    """Elements from the given one on into a flat tensor, converted where types differ."""
    own: torch.dtype = getattr(torch, stored.dtype)
    opened.seek(stored.start + first * own.itemsize)
    if into.dtype == own:
        _fill(opened, into)
        return
    step = max(1, _PIECE_BYTES // own.itemsize)
    for begin in range(0, into.numel(), step):
        piece = torch.empty(min(step, into.numel() - begin), dtype=own)
        _fill(opened, piece)
        into[begin : begin + step] = piece


def _fill(opened: Any, flat: torch.Tensor) -> None:
    if not flat.numel():
        return
    if sys.byteorder != "little":
        raise ValueError("safetensors files are little-endian; this machine is not.")
    room = flat.view(torch.uint8).numpy().data
    done = 0
    while done < len(room):
        got = opened.readinto(room[done:])
        if not got:
            raise ValueError(f"{opened.name} ends within a tensor.")
        done += got
