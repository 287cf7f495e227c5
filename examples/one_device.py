"""The other half of each example: the same steps in plain PyTorch on one device, and a comparison."""

import copy
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn


def train_alone(
    model: nn.Module,
    batches: Iterable[Mapping[str, torch.Tensor]],
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
    max_grad_norm: float,
) -> list[float]:
    """Losses of an ordinary training loop on a copy of the model."""
    model = copy.deepcopy(model).train()
    update = optimizer(model.parameters())
    losses = []
    for batch in batches:
        loss = model(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        update.step()
        update.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def compare(losses: list[float], alone: list[float], devices: Iterable[str], out: Path | None) -> None:
    """Print how far the losses are from one device's, and write them to `out` as JSON."""
    difference = max(abs(a - b) / abs(b) for a, b in zip(losses, alone, strict=True))
    say(f"loss {losses[0]:.4f} -> {losses[-1]:.4f} in {len(losses)} steps, over {', '.join(devices)}")
    say(f"largest difference from one device {difference:.1e} (relative; float32 rounds at 6e-08)")
    save({"devices": list(devices), "losses": losses, "alone": alone, "difference": difference}, out)


def say(line: str) -> None:
    """Print once, however many processes torchrun started."""
    if _is_first_rank():
        print(line, flush=True)


def save(report: Mapping[str, Any], out: Path | None) -> None:
    """Write a report as JSON once, if a file is given."""
    if out is not None and _is_first_rank():
        out.write_text(json.dumps(report, indent=2), encoding="utf-8")


def _is_first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"
