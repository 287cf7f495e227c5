"""Parts of a stage whose results are not kept for the backward but computed again.

A part is one unit of the chain. Its values live inside a module of its own that runs under
`torch.utils.checkpoint`: only what enters it is kept. Random ops inside draw the same bits again, for
their streams are keyed by step, op and position in the batch; the executor sets those before a backward.
A unit that writes into a buffer (batch normalisation in training) is left as it is, since running it
twice would write twice.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from graphpar.frontend.torch_private import lookup_op
from graphpar.ir.ops import SOURCES, Op
from graphpar.ir.recomputed import Units


@dataclass(frozen=True)
class UnitPart:
    """Ops that run as one; `reads` come from outside, `gives` are wanted outside, in order."""

    ops: tuple[Op, ...]
    reads: tuple[str, ...]
    gives: tuple[str, ...]


class Recomputed(nn.Module):
    """Runs a module without keeping its inner values, and once more for the backward."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *arguments: Any) -> Any:
        """What the inner module gives."""
        if not torch.is_grad_enabled():
            return self.inner(*arguments)
        # Streams of random ops are keyed: there is no state to put back.
        return checkpoint(self.inner, *arguments, use_reentrant=False, preserve_rng_state=False)


def cut_out(
    ops: Sequence[Op], units: Units, results: Iterable[str], buffers: Mapping[str, Any]
) -> list[Op | UnitPart]:
    """The ops of a stage in an order that runs, those of recomputed units gathered into parts.

    Args:
        ops: The stage's ops in order.
        units: Ops of the units that are computed again.
        results: Names of values that leave the stage as results.
        buffers: Names of the stage's buffers.
    """
    unit_of = {name: number for number, names in enumerate(units) for name in names}
    last = {unit_of[op.name]: op.name for op in ops if op.name in unit_of}
    found: list[Op | list[Op]] = []
    gathering = _Gathering()
    for op in ops:
        inside = op.name in unit_of or (op.target != "gp.send" and gathering.feeds(op))
        if op.target in SOURCES or op.target in ("gp.recv", "input") or not inside:
            (gathering.after if gathering.feeds(op) else found).append(op)
            continue
        gathering.add(op)
        if op.name in unit_of and op.name == last[unit_of[op.name]]:
            found += gathering.finish()
    found += gathering.finish()
    return list(_parts(found, set(results), set(buffers)))


@dataclass
class _Gathering:
    """Ops of the unit at hand, and those that wait for it to end."""

    ops: list[Op] = field(default_factory=list)
    names: set[str] = field(default_factory=set)
    after: list[Op] = field(default_factory=list)

    def feeds(self, op: Op) -> bool:
        """Whether an op reads what is being gathered or waits for it."""
        waiting = {o.name for o in self.after}
        return any(name in self.names or name in waiting for name in op.operands())

    def add(self, op: Op) -> None:
        self.ops.append(op)
        self.names.add(op.name)

    def finish(self) -> list[Op | list[Op]]:
        done: list[Op | list[Op]] = [self.ops] if self.ops else []
        done += self.after
        self.ops, self.names, self.after = [], set(), []
        return done


def _parts(
    found: Sequence[Op | list[Op]], results: set[str], buffers: set[str]
) -> Iterator[Op | UnitPart]:
    readers: dict[str, int] = {}
    for item in found:
        for op in item if isinstance(item, list) else [item]:
            for name in op.operands():
                readers[name] = readers.get(name, 0) + 1
    for item in found:
        if not isinstance(item, list):
            yield item
        elif any(_writes(op, buffers) for op in item):
            yield from item
        else:
            yield _part(item, results, readers)


def _part(ops: list[Op], results: set[str], readers: Mapping[str, int]) -> UnitPart:
    own = {op.name for op in ops}
    inner: dict[str, int] = {}
    for op in ops:
        for name in op.operands():
            inner[name] = inner.get(name, 0) + 1
    reads = tuple(dict.fromkeys(n for op in ops for n in op.operands() if n not in own))
    gives = tuple(n for n in own if n in results or readers.get(n, 0) > inner.get(n, 0))
    order = {op.name: i for i, op in enumerate(ops)}
    return UnitPart(tuple(ops), reads, tuple(sorted(gives, key=order.__getitem__)))


def _writes(op: Op, buffers: set[str]) -> bool:
    """Whether running an op twice would change a buffer twice."""
    if not any(name in buffers for name in op.operands()):
        return False
    if "batch_norm" in op.target or not op.target.startswith("aten."):
        return True
    schema = lookup_op(op.target)._schema
    return any(a.alias_info is not None and a.alias_info.is_write for a in schema.arguments)
