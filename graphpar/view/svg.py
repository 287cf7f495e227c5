"""One SVG picture: a lane per device with its memory bar, predicted above measured.

Large plans show one device of every stage and kind, and runs of events too narrow to see are drawn
as one.
"""

from collections.abc import Iterator
from xml.sax.saxutils import escape, quoteattr

from graphpar.schedule import ActionKind
from graphpar.units import format_bytes, format_percent, format_seconds
from graphpar.view.model import ViewData, ViewTimeline
from graphpar.view.palette import ACTION_COLOURS, ACTION_NAMES, DARK_TEXT, text_on
from graphpar.view.rows import Bar, DrawnRow, drawn_rows, joined
from graphpar.view.texts import short, xml_text

WIDTH = 1200
_LEFT, _GRID, _BAR = 190, 780, 110
_TOP, _ROW, _STRIP, _SPACE = 92, 22, 4, 8
_MOST_NAME = 24
_NARROWEST_PX = 0.6
_LABEL_PX = 14
_LINED_PX = 3
_LEGEND_PX = 150
_COMPUTE: tuple[ActionKind, ...] = ("F", "B", "I", "W", "A", "O")


def render_svg(view: ViewData) -> bytes:
    """The picture as an SVG file."""
    rows, hidden = drawn_rows(view)
    height_of_row = _ROW * (2 if view.measured else 1) + _SPACE
    bottom = _TOP + len(rows) * height_of_row
    height = bottom + 92
    label = quoteattr(xml_text(f"Timeline of a plan for {view.headline}"))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        f'viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" role="img" aria-label={label}>',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        *_head(view),
    ]
    parts += _axis(view, bottom)
    for place, row in enumerate(rows):
        parts += _row(view, row, _TOP + place * height_of_row)
    parts += _legend(view, bottom + 44)
    if hidden:
        parts.append(_text(12, bottom + 80, f"{hidden} more kinds of rows are not drawn", size=11))
    parts.append("</svg>")
    return ("\n".join(parts) + "\n").encode()


def _head(view: ViewData) -> Iterator[str]:
    slowest = view.devices[view.bottleneck]
    step = f"predicted step {format_seconds(view.step_s)}"
    if view.measured is not None:
        step += f", measured {format_seconds(view.measured.step_s)}"
    shares = view.shares
    yield _text(12, 26, short(view.headline, 110), size=17, weight="bold")
    yield _text(
        12,
        48,
        f"{step}; compute {format_percent(shares.compute)}, communication "
        f"{format_percent(shares.communication)}, gradient sums {format_percent(shares.gradients)}, "
        f"bubbles {format_percent(shares.bubble)} of device time",
    )
    certificate = view.certificate
    facts = (
        f"bottleneck {short(slowest.name, 40)}, busy {format_percent(slowest.busy_share)}; "
        f"{certificate.status}, gap {format_percent(certificate.gap)}"
    )
    if view.left_out:
        facts += f"; {len(view.left_out)} of {len(view.devices)} devices without work"
    yield _text(12, 66, facts)
    if view.measured is not None and view.measured.note:
        yield _text(12, 82, view.measured.note, fill="#a33a00")
    yield _text(_LEFT + _GRID + 14, _TOP - 8, "peak memory of capacity", size=11)


def _row(view: ViewData, row: DrawnRow, top: int) -> Iterator[str]:
    device = view.devices[row.rank]
    others = f" +{row.others}" if row.others else ""
    yield _text(12, top + 10, short(device.name, _MOST_NAME) + others, title=device.name)
    yield _text(12, top + 22, f"{device.stage_words}, {short(device.kind, 20)}", size=10, fill="#555555")
    step_s = view.scale_s
    yield from _lane(view, view.predicted, row.rank, top, step_s)
    if view.measured is not None:
        yield from _lane(view, view.measured, row.rank, top + _ROW, step_s)
    yield from _memory(view, row.rank, top)


def _lane(view: ViewData, timeline: ViewTimeline, rank: int, top: int, step_s: float) -> Iterator[str]:
    lane = timeline.lanes[rank]
    yield f'<rect x="{_LEFT}" y="{top}" width="{_GRID}" height="{_ROW - 2}" fill="#f2f2f2"/>'
    tall = _ROW - 2 - _STRIP
    narrowest_s = _NARROWEST_PX * step_s / _GRID
    yield from _bars(joined(lane, _COMPUTE, narrowest_s), top, tall, step_s)
    yield from _bars(joined(lane, ("S", "D"), narrowest_s), top + tall, _STRIP, step_s)
    if lane.stopped:
        at = _LEFT + _GRID * max(lane.ends_s, default=0.0) / step_s
        yield (
            f'<line x1="{at:.2f}" y1="{top}" x2="{at:.2f}" y2="{top + _ROW - 2}" stroke="#c00000" '
            'stroke-width="2"/>'
        )
        yield _text(at + 4, top + 13, "stopped", size=10, fill="#c00000")
    if timeline is view.measured:
        yield _text(_LEFT - 6, top + 13, "measured", size=9, anchor="end", fill="#555555")


def _bars(bars: list[Bar], top: int, tall: int, step_s: float) -> Iterator[str]:
    """Wide bars one by one with their microbatch, narrow ones as one path for each kind."""
    paths: dict[ActionKind, list[str]] = {}
    for bar in bars:
        x, width = _LEFT + _GRID * bar.start_s / step_s, _GRID * (bar.end_s - bar.start_s) / step_s
        if width > _LINED_PX:
            yield from _wide_bar(bar, x, width, top, tall)
        else:
            drawn = max(width, 0.3)
            paths.setdefault(bar.kind, []).append(f"M{x:.1f} {top}h{drawn:.1f}v{tall}h-{drawn:.1f}z")
    for kind, pieces in paths.items():
        yield f'<path fill="{ACTION_COLOURS[kind]}" d="{"".join(pieces)}"/>'


def _wide_bar(bar: Bar, x: float, width: float, top: int, tall: int) -> Iterator[str]:
    fill = ACTION_COLOURS[bar.kind]
    yield (
        f'<rect x="{x:.2f}" y="{top}" width="{width:.2f}" height="{tall}" fill="{fill}" '
        'stroke="#ffffff" stroke-width="0.5"/>'
    )
    if tall > _STRIP and width >= _LABEL_PX and bar.microbatch is not None:
        middle, number = x + width / 2, str(bar.microbatch)
        yield _text(middle, top + 12, number, size=10, anchor="middle", fill=text_on(fill))


def _memory(view: ViewData, rank: int, top: int) -> Iterator[str]:
    """Peak by part, left to right: what stays, what is saved, what is worked on."""
    device = view.devices[rank]
    left, tall = _LEFT + _GRID + 14, 12
    scale = max(device.capacity_bytes, device.peak_bytes, 1.0)
    yield f'<rect x="{left}" y="{top}" width="{_BAR}" height="{tall}" fill="#f2f2f2" stroke="#999999"/>'
    x = float(left)
    parts = (
        (device.resident_bytes, "#0072b2", "stays"),
        (device.saved_bytes, "#e69f00", "saved activations"),
        (device.working_bytes, "#009e73", device.working_words),
    )
    for num_bytes, fill, name in parts:
        width = _BAR * num_bytes / scale
        title = escape(f"{name}: {format_bytes(num_bytes)}")
        yield (
            f'<rect x="{x:.2f}" y="{top}" width="{width:.2f}" height="{tall}" fill="{fill}">'
            f"<title>{title}</title></rect>"
        )
        x += width
    text = format_bytes(device.peak_bytes)
    if device.capacity_bytes > 0:
        text += f" of {format_bytes(device.capacity_bytes)}"
    yield _text(left, top + 22, text, size=9)
    if device.measured_peak_bytes is not None:
        yield _text(left, top + 33, f"measured {format_bytes(device.measured_peak_bytes)}", size=9)


def _axis(view: ViewData, top: int) -> Iterator[str]:
    step_s = view.scale_s
    for part in range(6):
        x = _LEFT + _GRID * part / 5
        yield f'<line x1="{x:.2f}" y1="{_TOP}" x2="{x:.2f}" y2="{top + 4}" stroke="#00000033"/>'
        yield _text(x, top + 18, format_seconds(step_s * part / 5), size=10, anchor="middle")


def _legend(view: ViewData, top: int) -> Iterator[str]:
    kinds: list[ActionKind] = ["F", "B", "S", "D", "A", "O"] if view.training else ["F", "S"]
    if view.splits_backward:
        kinds.insert(2, "W")
    for place, kind in enumerate(kinds):
        x = 12 + place * _LEGEND_PX
        yield f'<rect x="{x}" y="{top - 10}" width="12" height="12" fill="{ACTION_COLOURS[kind]}"/>'
        yield _text(x + 18, top, ACTION_NAMES[kind], size=11)
    stays = "memory: blue stays, orange is saved for backwards, green is being worked on"
    yield _text(
        12,
        top + 20,
        f"numbers are microbatches; thin strips are messages; gradient sums include waiting; {stays}",
        size=11,
    )


def _text(
    x: float,
    y: float,
    text: str,
    *,
    size: int = 12,
    anchor: str = "start",
    fill: str = DARK_TEXT,
    weight: str = "normal",
    title: str = "",
) -> str:
    tip = f"<title>{escape(xml_text(title))}</title>" if title else ""
    bold = f' font-weight="{weight}"' if weight != "normal" else ""
    return (
        f'<text x="{x:.7g}" y="{y:.7g}" font-size="{size}" text-anchor="{anchor}" fill="{fill}"{bold}>'
        f"{escape(xml_text(text))}{tip}</text>"
    )
