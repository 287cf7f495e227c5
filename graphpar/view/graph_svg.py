"""A captured graph as one picture: its modules in order, repeated ones folded, and what skips some.

However many operations there are, a picture has few rows: modules hold operations, and neighbours that
are alike but for a number are one row with a count.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import log2
from xml.sax.saxutils import escape, quoteattr

from graphpar.ir.graph import Graph
from graphpar.ir.ops import SOURCES, Op
from graphpar.units import format_bytes
from graphpar.view.model import ViewModule
from graphpar.view.outline import outline
from graphpar.view.palette import DARK_TEXT, device_colour
from graphpar.view.texts import short, xml_text

_MOST_ROWS = 40
_OPEN_ROWS = 16
_MOST_ARCS = 60
_WIDTH, _BOX, _TALL, _GAP, _TOP = 820, 430, 30, 10, 64
_MOST_NAME = 52
_OUTSIDE = "(no module)"


@dataclass(frozen=True)
class GraphRow:
    """A row of the picture: operations of one module, `count` times alike."""

    label: str
    count: int
    num_ops: int
    weight_bytes: float


@dataclass(frozen=True)
class Arc:
    """Values that skip rows: made in one row, read in a later one that is not the next."""

    source: int
    target: int
    num_bytes: float


def graph_rows(graph: Graph) -> tuple[tuple[GraphRow, ...], tuple[Arc, ...], int]:
    """Rows and arcs of a graph, and how many modules found no room."""
    core = [op for op in graph.ops if op.target not in (*SOURCES, "output")]
    runs = [list(run) for _, run in groupby(core, key=lambda op: op.module or _OUTSIDE)]
    modules = outline([run[0].module or _OUTSIDE for run in runs], 0, len(runs), most=_OPEN_ROWS)
    shown = modules[:_MOST_ROWS]
    row_of = {op.name: i for i, m in enumerate(shown) for run in runs[m.first : m.last] for op in run}
    rows = tuple(_row(graph, module, runs) for module in shown)
    return rows, tuple(_arcs(graph, row_of)), len(modules) - len(shown)


def _row(graph: Graph, module: ViewModule, runs: Sequence[Sequence[Op]]) -> GraphRow:
    ops = [op for run in runs[module.first : module.last] for op in run]
    weights = {name for op in ops for name in op.operands() if graph[name].target == "parameter"}
    total = sum(_bytes(graph, graph[name]) for name in weights)
    return GraphRow(module.label, module.count, len(ops), total)


def _bytes(graph: Graph, op: Op) -> float:
    return float(sum(t.bytes(graph.batch) for t in op.types if t is not None))


def _arcs(graph: Graph, row_of: dict[str, int]) -> Iterator[Arc]:
    """The heaviest of the values that skip rows, those of one pair of rows together."""
    totals: dict[tuple[int, int], float] = {}
    for name, source in row_of.items():
        readers = {row_of[user.name] for user in graph.users(name) if user.name in row_of}
        for target in readers:
            if target > source + 1:
                key = (source, target)
                totals[key] = totals.get(key, 0.0) + _bytes(graph, graph[name])
    heaviest = sorted(totals.items(), key=lambda item: -item[1])[:_MOST_ARCS]
    for (source, target), num_bytes in sorted(heaviest):
        yield Arc(source, target, num_bytes)


def render_graph_svg(graph: Graph) -> bytes:
    """The picture as an SVG file."""
    rows, arcs, hidden = graph_rows(graph)
    height = _TOP + len(rows) * (_TALL + _GAP) + (36 if hidden else 12)
    title = f"{graph.name or 'graph'}, {graph.level}: {len(graph)} operations"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" '
        f'viewBox="0 0 {_WIDTH} {height}" font-family="sans-serif" role="img" '
        f"aria-label={quoteattr(xml_text(title))}>",
        f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>',
        _text(14, 28, short(title, 80), size=17, weight="bold"),
        _text(14, 48, "modules in order of execution; arcs are values that skip modules, for the "
              f"example batch of {graph.batch}", size=11, fill="#59626d"),
    ]  # fmt: skip
    for place, row in enumerate(rows):
        parts += _drawn_row(place, row, last=place + 1 == len(rows))
    parts += _drawn_arcs(arcs)
    if hidden:
        parts.append(_text(14, height - 12, f"{hidden} more modules are not drawn", size=11))
    parts.append("</svg>")
    return ("\n".join(parts) + "\n").encode()


def _top(place: int) -> int:
    return _TOP + place * (_TALL + _GAP)


def _drawn_row(place: int, row: GraphRow, *, last: bool) -> Iterator[str]:
    top = _top(place)
    shape = f'x="14" y="{top}" width="{_BOX}" height="{_TALL}" rx="6"'
    yield f'<rect {shape} fill="#f5f7f9" stroke="#c9d0d7"/>'
    yield f'<rect x="14" y="{top}" width="5" height="{_TALL}" fill="{device_colour(0)}"/>'
    count = f" ×{row.count}" if row.count > 1 else ""
    yield _text(28, top + 20, short(row.label, _MOST_NAME) + count, size=13, title=row.label)
    weights = f", {format_bytes(row.weight_bytes)}" if row.weight_bytes else ""
    yield _text(
        14 + _BOX + 12,
        top + 20,
        f"{row.num_ops} op{'' if row.num_ops == 1 else 's'}{weights}",
        size=11,
        fill="#59626d",
    )
    if not last:
        x, end = 34, top + _TALL + _GAP
        yield f'<path d="M{x} {top + _TALL}V{end - 1}m-4 -5l4 5l4 -5" fill="none" stroke="#8b95a0"/>'


def _drawn_arcs(arcs: Sequence[Arc]) -> Iterator[str]:
    """Arcs that would lie on each other stand apart; more lanes than there is room for share the last."""
    left = 14 + _BOX + 120
    free: list[int] = []
    for arc in arcs:
        lane = next((i for i, until in enumerate(free) if until <= arc.source), len(free))
        free[lane : lane + 1] = [arc.target]
        reach = left + 10 + min(lane, 12) * 14
        start, end = _top(arc.source) + _TALL - 8, _top(arc.target) + 8
        wide = max(1.0, min(4.0, log2(arc.num_bytes + 2) / 7))
        label = f"{format_bytes(arc.num_bytes)}"
        yield (
            f'<path d="M{left} {start}H{reach - 8}q8 0 8 8V{end - 8}q0 8 -8 8H{left + 4}" fill="none" '
            f'stroke="#d55e00" stroke-opacity="0.75" stroke-width="{wide:.1f}">'
            f"<title>{label}</title></path>"
        )
        yield f'<path d="M{left} {end}l7 -4v8z" fill="#d55e00"/>'


def _text(
    x: int, y: int, text: str, *, size: int, fill: str = DARK_TEXT, weight: str = "", title: str = ""
) -> str:
    bold = f' font-weight="{weight}"' if weight else ""
    tip = f"<title>{escape(xml_text(title))}</title>" if title else ""
    inner = escape(xml_text(text)) + tip
    return f'<text x="{x}" y="{y}" font-size="{size}" fill="{fill}"{bold}>{inner}</text>'
