"""The model's units as a tree of modules, with repeated siblings folded: 32 alike blocks are one.

Units are named after the module paths they come from (`encoder.layer.3`, `encoder.layer 4/11`). The tree
keeps the order of execution, so a module whose parts do not run one after another shows up more than
once.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby, takewhile

from graphpar.view.model import ViewModule

_NUMBER = re.compile(r"\d+")
_LONGEST_PERIOD = 6
_FEW = 8
_DEEPEST = 32
"""Names may be anything; a path of ten thousand dots must not exhaust the stack."""


@dataclass(frozen=True)
class _Unit:
    index: int
    path: tuple[str, ...]
    part: str

    def label(self, depth: int) -> str:
        """The name from a depth of the tree on."""
        rest = ".".join(self.path[depth:]) or self.path[-1]
        return f"{rest} {self.part}" if self.part else rest


def outline(units: Sequence[str], first: int, last: int, *, most: int = _FEW) -> tuple[ViewModule, ...]:
    """The tree of units `first` to `last - 1`.

    Modules at the top that only hold others are replaced by those while there are at most `most`.

    >>> blocks = outline(["embed", "h.0 1/2", "h.0 2/2", "h.1 1/2", "h.1 2/2", "head"], 0, 6)
    >>> [(b.label, b.count, len(b.children)) for b in blocks]
    [('embed', 1, 0), ('h.0 .. h.1', 2, 2), ('head', 1, 0)]
    """
    return _unwrapped(_modules([_parse(i, units[i]) for i in range(first, last)], 0), most)


def _unwrapped(modules: tuple[ViewModule, ...], most: int) -> tuple[ViewModule, ...]:
    """Few modules that only hold others are replaced by those, so that a stage shows what it runs."""
    while True:
        room = most + 1 - len(modules)
        holder = next((m for m in modules if m.count == 1 and 0 < len(m.children) <= room), None)
        if holder is None:
            return modules
        at = modules.index(holder)
        inner = tuple(replace(c, label=_prefixed(holder.label, c)) for c in holder.children)
        modules = modules[:at] + inner + modules[at + 1 :]


def _prefixed(name: str, module: ViewModule) -> str:
    """The longer name of a module's child; a unit of the module itself has that one's name already."""
    stem, _, part = module.label.partition(" ")
    if stem == name.rpartition(".")[2] and module.count == 1:
        return f"{name} {part}" if part else name
    return " .. ".join(f"{name}.{end}" for end in module.label.split(" .. "))


def _parse(index: int, name: str) -> _Unit:
    """`encoder.layer 3/11` is part 3 of `encoder.layer`; joined modules stay one name."""
    base, _, part = name.partition(" ")
    path = (base,) if "+" in base or not base.strip(".") else tuple(base.split("."))
    return _Unit(index, path, part)


def _modules(units: Sequence[_Unit], depth: int) -> tuple[ViewModule, ...]:
    """Modules at a depth of the tree; inside `block.3` a `layer.0` and a `layer.1` are seldom alike."""
    found = []
    for _, run in groupby(units, key=lambda u: _head(u, depth)):
        alike = list(run)
        if len(alike) == 1:
            found.append(_leaf(alike[0], depth))
        elif depth >= _DEEPEST or len(alike[0].path) <= depth:
            found += [_leaf(unit, depth) for unit in alike]
        else:
            found.append(_joined(alike[0].path[depth], _modules(alike, depth + 1)))
    numbered = any(part.isdecimal() for part in units[0].path[:depth])
    return tuple(found) if numbered else _folded(found)


def _head(unit: _Unit, depth: int) -> str:
    """What units of one module have in common at a depth."""
    return unit.path[depth] if len(unit.path) > depth else ""


def _leaf(unit: _Unit, depth: int) -> ViewModule:
    return ViewModule(unit.label(depth), 1, unit.index, unit.index + 1)


def _joined(name: str, children: tuple[ViewModule, ...]) -> ViewModule:
    """A module; one with a single child takes its place under the longer name."""
    if len(children) == 1 and children[0].children:
        (only,) = children
        return ViewModule(_prefixed(name, only), only.count, only.first, only.last, only.children)
    return ViewModule(name, 1, children[0].first, children[-1].last, children)


def _folded(modules: Sequence[ViewModule]) -> tuple[ViewModule, ...]:
    """Neighbours that repeat with a short period become one module with a count."""
    patterns = [_pattern(module) for module in modules]
    stems = [_stem(module) for module in modules]
    out: list[ViewModule] = []
    at = 0
    while at < len(modules):
        period, count = _repeat(patterns, stems, at)
        if count > 1:
            run = tuple(modules[at : at + period * count])
            out.append(ViewModule(_span(run[0], run[-period]), count, run[0].first, run[-1].last, run))
        else:
            out.append(modules[at])
        at += period * count
    return tuple(out)


def _repeat(patterns: Sequence[str], stems: Sequence[str], at: int) -> tuple[int, int]:
    """The period and the number of repetitions that cover most from a place on.

    Parts of one module (`h.3 1/2`, `h.3 2/2`) are no repetition; something else must count up, too.
    """
    best = (1, 1)
    for period in range(1, _LONGEST_PERIOD + 1):
        block, count = patterns[at : at + period], 1
        if stems[at : at + period] == stems[at + period : at + 2 * period]:
            continue
        while patterns[at + count * period : at + (count + 1) * period] == block:
            count += 1
        if count > 1 and count * period > best[0] * best[1]:
            best = (period, count)
    return best


def _stem(module: ViewModule) -> str:
    """The name of a module without its part; of repeated ones what their names begin with."""
    if module.count == 1:
        return module.label.partition(" ")[0]
    parts = zip(*(end.split(".") for end in module.label.split(" .. ")), strict=False)
    return ".".join(part[0] for part in takewhile(lambda p: len(set(p)) == 1, parts))


def _span(first: ViewModule, last: ViewModule) -> str:
    """`0.attn .. 5.attn` is told as `0 .. 5`: up to the first number that differs."""
    ends = _stem(first), _stem(last)
    numbers = zip(_NUMBER.finditer(ends[0]), _NUMBER.finditer(ends[1]), strict=False)
    for one, other in numbers:
        if one[0] != other[0]:
            return f"{ends[0][: one.end()]} .. {ends[1][: other.end()]}"
    return f"{first.label} .. {last.label}"


def _pattern(module: ViewModule) -> str:
    """What alike modules have in common: names without numbers, all the way down."""
    inner = ",".join(_pattern(child) for child in module.children)
    return f"{_NUMBER.sub('#', module.label)}x{module.count}({inner})"
