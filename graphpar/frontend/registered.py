"""Buffers, weights and submodules that a forward puts others in the place of.

`self.mean = 0.9 * self.mean + 0.1 * x.mean(0)` gives the module another tensor under a buffer's name,
which torch.export drops without a word. One of the same form is followed as what it amounts to: the
forward reads a copy of the buffer, and once it is done the new values are written. The rest is told, or
refused.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from graphpar.errors import CaptureError
from graphpar.frontend.torch_private import memory_of

Names = set[tuple[str, str]]
"""Modules by path, and names in them."""
_KINDS = ("_parameters", "_buffers", "_modules")


@dataclass(frozen=True)
class Registered:
    """What the modules of a model hold under names, by module and kind."""

    held: tuple[tuple[str, nn.Module, dict[str, dict[str, Any]], frozenset[str]], ...]

    @classmethod
    def by(cls, model: nn.Module) -> "Registered":
        """What a model holds now."""
        return cls(
            tuple(
                (
                    path,
                    module,
                    {kind: dict(getattr(module, kind)) for kind in _KINDS},
                    frozenset(module._non_persistent_buffers_set),
                )
                for path, module in model.named_modules()
            )
        )

    def put_back(self) -> None:
        """Let the modules hold it again."""
        for _, module, kinds, fleeting in self.held:
            for kind, before in kinds.items():
                now = getattr(module, kind)
                if not _same(now, before):
                    now.clear()
                    now.update(before)
            module._non_persistent_buffers_set = set(fleeting)

    def write_reassigned(self) -> tuple[Names, Names]:
        """Write tensors that took the place of buffers since into these, which take their place again.

        Returns:
            Module and name of the buffers written to, and of those for which that cannot be done, as of
            another form or also held elsewhere; these are left as they are.

        Raises:
            CaptureError: Another parameter or submodule took a place; names it.
        """
        written: Names = set()
        left: Names = set()
        pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        places = Counter(
            memory_of(buffer)
            for _, _, kinds, _ in self.held
            for buffer in kinds["_buffers"].values()
            if buffer is not None
        )
        for path, module, kinds, _ in self.held:
            for kind in ("_parameters", "_modules"):
                _refuse(path, module, kind, kinds[kind])
            for name, now in list(module._buffers.items()):
                was = kinds["_buffers"].get(name)
                if now is was:
                    continue
                if now is None or was is None or not _fits(now, was) or places[memory_of(was)] > 1:
                    left.add((path, name))
                    continue
                module._buffers[name] = was
                written.add((path, name))
                pairs.append((was, now))
        memory = {memory_of(was) for was, _ in pairs}
        values = [now.detach() for _, now in pairs]
        values = [value.clone() if memory_of(value) in memory else value for value in values]
        for (was, _), value in zip(pairs, values, strict=True):
            was.copy_(value)
        return written, left


def _same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return list(a) == list(b) and all(a[name] is b[name] for name in a)


def _fits(now: torch.Tensor, was: torch.Tensor) -> bool:
    """Whether a tensor can be written into another and be the same for whoever reads it."""
    return now.shape == was.shape and now.dtype == was.dtype and now.device == was.device


def read_copies(model: nn.Module, names: Names) -> None:
    """Let buffers that will be written once the forward is done be read as they are now."""
    for path, name in names:
        held = model.get_submodule(path)._buffers
        tensor = held[name]
        held[name] = None if tensor is None else tensor.clone()


def _refuse(path: str, module: nn.Module, kind: str, before: dict[str, Any]) -> None:
    now = getattr(module, kind)
    others = [n for n, value in now.items() if value is not before.get(n)]
    if kind == "_modules":  # while torch.export traces, stand-ins are told apart that stand for one
        others = [n for n in others if before.get(n) is None]
    name = next(iter(others), "")
    if not name:
        return
    code = getattr(type(module).forward, "__code__", None)
    line = f", {code.co_filename}:{code.co_firstlineno}" if code else ""
    where = f"Module {path or '(top)'!r} ({type(module).__name__}{line})"
    if before.get(name) is None:
        raise CaptureError(
            f"{where} makes its {kind[1:-1]} {name!r} when it is called. Call the model once before, or "
            "make it in __init__."
        )
    raise CaptureError(
        f"{where} puts another parameter in the place of {name!r} when it is called, which no optimiser "
        "knows. Compute with a changed copy instead: F.linear(x, self.weight * 0.9)."
    )


@contextmanager
def registered_left(model: nn.Module) -> Iterator[None]:
    """Within it, a model may put others in the place of what it holds; afterwards it is as before."""
    before = Registered.by(model)
    try:
        yield
    finally:
        before.put_back()
