"""Blocks of a model that are equal but for their weights and their place in a list.

Two modules are equal when their classes, settings, hooks, and the shapes of all their tensors are, all
the way down. A number that differs by just as much as the places of the two in their list
(`layer_idx`) is a *position*: whoever treats the two as one must see to it that it is never read.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn

_LISTS = (nn.ModuleList, nn.Sequential)
_PLAIN = (
    int, float, complex, str, bytes, bool, type(None), torch.dtype, torch.device, torch.layout,
    torch.memory_format,
)  # fmt: skip
_HELD_APART = frozenset({"_parameters", "_buffers", "_modules"})
_MAX_DEPTH = 8
"""How deep settings are compared; what lies deeper counts as different."""


@dataclass(frozen=True)
class Block:
    """One of several equal modules.

    Attributes:
        path: Its name in the model.
        module: The module itself.
        kind: Equal for equal blocks.
        positions: Submodule paths and attributes that hold its place in the list.
    """

    path: str
    module: nn.Module
    kind: int
    positions: tuple[tuple[str, str], ...]

    @property
    def is_trained(self) -> bool:
        """Whether any parameter in it wants a gradient."""
        return any(p.requires_grad for p in self.module.parameters())


def find_blocks(model: nn.Module, least: int) -> tuple[Block, ...]:
    """The outermost modules of which a list holds at least so many equal ones.

    >>> layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
    >>> [block.path for block in find_blocks(nn.Sequential(layers, nn.Linear(4, 2)), 3)]
    ['0.0', '0.1', '0.2']
    """
    held = chain(
        model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    )
    uses = Counter(id(tensor) for _, tensor in held)
    found: list[Block] = []
    taken: list[str] = []
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{other}.") for other in taken)
        if isinstance(module, _LISTS) and not inside:
            for blocks in _kinds(path, module, uses):
                if len(blocks) >= least:
                    kind = len({b.kind for b in found})
                    found += [Block(b.path, b.module, kind, b.positions) for b in blocks]
                    taken += [b.path for b in blocks]
    return tuple(found)


def _kinds(path: str, modules: nn.Module, uses: Mapping[int, int]) -> list[list[Block]]:
    kinds: list[list[Block]] = []
    seen: set[int] = set()
    for place, (name, module) in enumerate(modules.named_children()):
        if id(module) in seen or _shares_tensors(module, uses):
            continue
        seen.add(id(module))
        block = Block(f"{path}.{name}" if path else name, module, 0, ())
        for blocks in kinds:
            first, offset = blocks[0], place - _place(modules, blocks[0].module)
            positions = _differences(first.module, module, offset)
            if positions is not None:
                blocks.append(Block(block.path, module, 0, positions))
                break
        else:
            kinds.append([block])
    return [_with_common_positions(blocks) for blocks in kinds]


def _place(modules: nn.Module, wanted: nn.Module) -> int:
    return next(i for i, module in enumerate(modules.children()) if module is wanted)


def _with_common_positions(blocks: list[Block]) -> list[Block]:
    """The first of a kind differs from itself nowhere: it has the positions of the others."""
    common = tuple(sorted({place for block in blocks for place in block.positions}))
    return [Block(b.path, b.module, b.kind, common) for b in blocks]


def _shares_tensors(module: nn.Module, uses: Mapping[int, int]) -> bool:
    """Whether a tensor in it stands elsewhere in the model, too, or a module in it twice."""
    return any(uses[id(t)] > 1 for t in chain(module.parameters(), module.buffers()))


def _differences(a: nn.Module, b: nn.Module, offset: int) -> tuple[tuple[str, str], ...] | None:
    """Where two modules hold positions; None if they differ in anything else."""
    mine, theirs = dict(a.named_modules()), dict(b.named_modules())
    if list(mine) != list(theirs):
        return None
    positions = []
    for path, module in mine.items():
        other = theirs[path]
        if type(module) is not type(other) or not _same_tensors(module, other):
            return None
        if module.__dict__.keys() != other.__dict__.keys():
            return None
        for name, value in module.__dict__.items():
            if name in _HELD_APART or _same(value, other.__dict__[name]):
                continue
            if not _is_position(value, other.__dict__[name], offset):
                return None
            positions.append((path, name))
    return tuple(positions)


def _is_position(value: Any, other: Any, offset: int) -> bool:
    return type(value) is int and type(other) is int and other - value == offset


def _same_tensors(a: nn.Module, b: nn.Module) -> bool:
    def described(module: nn.Module) -> list[Any]:
        held = (*module._parameters.items(), *module._buffers.items())
        return [(name, None if t is None else _described(t)) for name, t in held]

    return described(a) == described(b) and a._buffers.keys() == b._buffers.keys()


def _described(tensor: torch.Tensor) -> tuple[Any, ...]:
    return type(tensor), tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad


def _same(a: Any, b: Any, depth: int = 0) -> bool:
    """Whether two settings are surely equal."""
    if a is b:
        return not isinstance(a, torch.Tensor)  # a tensor that is no buffer would become a constant
    if type(a) is not type(b) or depth > _MAX_DEPTH:
        return False
    if isinstance(a, _PLAIN):
        return bool(a == b or (a != a and b != b))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(_same(x, y, depth + 1) for x, y in zip(a, b, strict=True))
    if isinstance(a, (set, frozenset)):
        return all(isinstance(x, _PLAIN) for x in a | b) and a == b
    if isinstance(a, Mapping):
        return list(a) == list(b) and all(_same(a[key], b[key], depth + 1) for key in a)
    if isinstance(a, partial):
        return _same((a.func, a.args, a.keywords), (b.func, b.args, b.keywords), depth + 1)
    if isinstance(a, (FunctionType, MethodType, nn.Module, torch.Tensor)):
        return False
    return hasattr(a, "__dict__") and _same(a.__dict__, b.__dict__, depth + 1)
