"""The picture as PNG, drawn by matplotlib (the optional extra `viz`)."""

import io
import warnings
from typing import Any

from graphpar.schedule import ActionKind
from graphpar.units import format_bytes, format_percent, format_seconds
from graphpar.view.model import Lane, ViewData
from graphpar.view.palette import ACTION_COLOURS, ACTION_NAMES, text_on
from graphpar.view.rows import DrawnRow, drawn_rows, joined
from graphpar.view.texts import short, xml_text

_WIDTH_IN, _ROW_IN, _EDGES_IN = 12.0, 0.36, 2.0
_DPI = 150
_TALL = 0.8
_MOST_NAME = 24
_MOST_TITLE = 90
_LABEL_SHARE = 0.018
_EDGE_POINTS, _MANY_BARS = 0.3, 100
_NARROWEST_SHARE = 0.6 / 780
_KINDS: tuple[ActionKind, ...] = ("F", "B", "I", "W", "A", "O")


def render_png(view: ViewData) -> bytes:
    """The picture as a PNG file.

    Raises:
        ValueError: matplotlib is not installed.
    """
    figure_class, patch_class = _matplotlib()
    rows, _ = drawn_rows(view)
    lanes = 2 if view.measured else 1
    figure = figure_class(figsize=(_WIDTH_IN, _EDGES_IN + _ROW_IN * lanes * len(rows)), dpi=_DPI)
    figure.set_layout_engine("constrained")
    grid, memory = figure.subplots(1, 2, sharey=True, width_ratios=(6, 1))
    for place, row in enumerate(rows):
        _draw_lane(grid, view.predicted.lanes[row.rank], place * lanes, view)
        if view.measured is not None:
            _draw_lane(grid, view.measured.lanes[row.rank], place * lanes + 1, view)
        _draw_memory(memory, view, row, place * lanes)
    _label(grid, view, rows, lanes)
    memory.set_xlim(0, max(100.0, memory.get_xlim()[1]))
    memory.set_xlabel("peak memory, %", fontsize=8)
    memory.tick_params(labelsize=8)
    halves = "IW" if not view.splits_backward else "I"
    kinds = [k for k in _KINDS if k not in halves] if view.training else _KINDS[:1]
    patches = [patch_class(color=ACTION_COLOURS[k], label=ACTION_NAMES[k]) for k in kinds]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), frameon=False)
    figure.suptitle(_title(view), fontsize=11, parse_math=False)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # A letter that the font lacks is drawn as a box; that is no reason to bother the user.
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _matplotlib() -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as error:
        raise ValueError(
            "a .png needs matplotlib, which is not installed; "
            "`pip install 'graphpar[viz]'` installs it, and .svg needs nothing more"
        ) from error
    return Figure, Patch


def _title(view: ViewData) -> str:
    step = f"predicted step {format_seconds(view.step_s)}"
    if view.measured is not None:
        step += f", measured {format_seconds(view.measured.step_s)}"
        step += f"; {view.measured.note}" if view.measured.note else ""
    shares = (
        f"compute {format_percent(view.shares.compute)}, bubbles {format_percent(view.shares.bubble)}"
    )
    return f"{_plain(view.headline, _MOST_TITLE)}\n{step}; {shares}"


def _plain(text: str, most: int) -> str:
    """One short line of what a font may draw."""
    return short(" ".join(xml_text(text).split()), most)


def _draw_lane(axes: Any, lane: Lane, place: int, view: ViewData) -> None:
    scale_s = view.scale_s
    for kind in _KINDS:
        bars = joined(lane, (kind,), _NARROWEST_SHARE * scale_s)
        line = _EDGE_POINTS if len(bars) < _MANY_BARS else 0
        spans = [(bar.start_s, bar.end_s - bar.start_s) for bar in bars]
        axes.broken_barh(
            spans,
            (place - _TALL / 2, _TALL),
            color=ACTION_COLOURS[kind],
            edgecolor="white",
            linewidth=line,
        )
        for bar in bars:
            if bar.microbatch is not None and bar.end_s - bar.start_s > _LABEL_SHARE * scale_s:
                middle = (bar.start_s + bar.end_s) / 2
                colour = text_on(ACTION_COLOURS[kind])
                axes.text(
                    middle, place, str(bar.microbatch), ha="center", va="center", fontsize=6, color=colour
                )
    if lane.stopped:
        end_s = max(lane.ends_s, default=0.0)
        axes.plot([end_s, end_s], [place - 0.5, place + 0.5], color="#c00000", linewidth=2)
        axes.text(end_s, place, " stopped", va="center", fontsize=7, color="#c00000")


def _draw_memory(axes: Any, view: ViewData, row: DrawnRow, place: int) -> None:
    device = view.devices[row.rank]
    whole = device.capacity_bytes or device.peak_bytes or 1.0
    left = 0.0
    for num_bytes, fill in (
        (device.resident_bytes, "#0072b2"),
        (device.saved_bytes, "#e69f00"),
        (device.working_bytes, "#009e73"),
    ):
        axes.barh(place, 100 * num_bytes / whole, left=left, height=_TALL / 2, color=fill)
        left += 100 * num_bytes / whole
    axes.text(2, place + _TALL / 2, format_bytes(device.peak_bytes), fontsize=6, va="center")


def _label(axes: Any, view: ViewData, rows: list[DrawnRow], lanes: int) -> None:
    names = []
    for row in rows:
        others = f" +{row.others}" if row.others else ""
        names.append(f"{_plain(view.devices[row.rank].name, _MOST_NAME)}{others}")
        names += ["measured"] * (lanes - 1)
    axes.set_yticks(range(len(names)), names, fontsize=8, parse_math=False)
    axes.set_ylim(len(rows) * lanes - 0.5, -0.7)
    axes.set_xlim(0, view.scale_s)
    axes.xaxis.set_major_formatter(lambda value, _: format_seconds(value))
    axes.spines[["top", "right"]].set_visible(False)
