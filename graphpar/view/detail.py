"""The operations inside a plan's units, for a page that opens blocks down to them.

Units that are alike but for their weights share one list, so that a model of eighty equal layers costs
one. What would make the page too large is left out, and the page says so.
"""

import base64
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from graphpar.ir.chain import Chain, build_chain
from graphpar.ir.graph import Graph
from graphpar.ir.ops import Op

MOST_PACKED_BYTES = 600_000
"""Of the deflated lists in one page, which is to stay below 1.5 MB."""
_MOST_OPERANDS = 8

OpRow = tuple[str, str, str, str, str]
"""Name, what it does, type of its result, what it reads, module and source line."""


@dataclass(frozen=True)
class ViewDetail:
    """Operations by kind of unit.

    Attributes:
        kind_of: For each unit the index of its list.
        kinds: The lists; empty for a kind that was left out.
        left_out: Operations that are not listed for want of room.
    """

    kind_of: tuple[int, ...]
    kinds: tuple[tuple[OpRow, ...], ...]
    left_out: int = 0


def detail_of(graph: Graph, units: Sequence[str]) -> ViewDetail | None:
    """The operations of a captured graph under a plan's units; None if the units are not this graph's."""
    chain = build_chain(graph)
    if tuple(unit.name for unit in chain.units) != tuple(units):
        return None
    return ViewDetail(tuple(unit.kind for unit in chain.units), tuple(_kinds(graph, chain)))


def _kinds(graph: Graph, chain: Chain) -> list[tuple[OpRow, ...]]:
    kinds: dict[int, tuple[OpRow, ...]] = {}
    for unit in chain.units:
        if unit.kind not in kinds:
            kinds[unit.kind] = tuple(_row(graph[name]) for name in unit.ops)
    return [kinds[kind] for kind in range(len(kinds))]


def _row(op: Op) -> OpRow:
    target = op.target.removeprefix("aten.").removesuffix(".default")
    operands = list(dict.fromkeys(op.operands()))
    more = f" and {len(operands) - _MOST_OPERANDS} more" if len(operands) > _MOST_OPERANDS else ""
    reads = ", ".join(f"%{name}" for name in operands[:_MOST_OPERANDS]) + more
    result = ", ".join("" if t is None else str(t) for t in op.types)
    return op.name, target, result, reads, " ".join(filter(None, (op.module, op.source)))


def pack_detail(detail: ViewDetail) -> tuple[str, int]:
    """The lists as deflated JSON in base64, and how many operations found no room.

    The longest lists are left out first.
    """
    kinds = list(detail.kinds)
    left_out = detail.left_out
    while True:
        plain = msgspec.json.encode({"kind_of": detail.kind_of, "kinds": kinds})
        packed = zlib.compress(plain, 9)
        if len(packed) <= MOST_PACKED_BYTES:
            return base64.b64encode(packed).decode("ascii"), left_out
        longest = sorted(range(len(kinds)), key=lambda k: -len(kinds[k]))[: max(1, len(kinds) // 4)]
        left_out += sum(len(kinds[k]) for k in longest)
        for kind in longest:
            kinds[kind] = ()
