"""Real text that every Python installation carries: its language reference and its sources."""

import pydoc_data.topics
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch


def standard_library_text(limit: int = 1_000_000) -> bytes:
    """The language reference that `help()` shows, then the standard library's own sources."""
    parts = [text.encode() for _, text in sorted(pydoc_data.topics.topics.items())]
    size = sum(map(len, parts))
    for source in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        if size >= limit:
            break
        parts.append(source.read_bytes())
        size += len(parts[-1])
    return b"\n".join(parts)[:limit]


def batches(
    text: bytes, batch_size: int, length: int, seed: int = 0
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless random (inputs, targets), each (batch_size, length); equal for equal seeds."""
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(0, len(data) - length - 1, (batch_size,), generator=generator)
        rows = torch.stack([data[s : s + length + 1] for s in starts.tolist()]).long()
        yield rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
