"""The plan as a graph for other tools: Graphviz dot, GraphML, and a Mermaid sketch.

Nodes are stages, edges carry what crosses between them; devices without work stand alone.
"""

import io
import re
from collections.abc import Iterator

import networkx as nx

from graphpar.plans.records import PlanEdge
from graphpar.units import format_bytes, format_rate, format_seconds
from graphpar.view.model import ViewBlock, ViewData, ViewStage
from graphpar.view.palette import device_colour, text_on
from graphpar.view.texts import xml_text

_MOST_STAGES = 200
_MOST_DEVICES = 3


def device_names(view: ViewData, stage: ViewStage) -> str:
    """The names of a stage's devices, the first few and a count."""
    names = [view.devices[rank].name for rank in stage.ranks]
    left = len(names) - _MOST_DEVICES
    return ", ".join(names[:_MOST_DEVICES]) + (f" +{left}" if left > 0 else "")


def block_label(block: ViewBlock) -> str:
    """A folded block with its count."""
    return f"{block.label} x{block.count}" if block.count > 1 else block.label


def edge_label(edge: PlanEdge) -> str:
    """Bytes per sample and the link they take."""
    ahead = format_bytes(edge.forward_bytes_per_sample) + "/sample"
    fixed = f" + {format_bytes(edge.forward_fixed_bytes)}" if edge.forward_fixed_bytes else ""
    return f"{ahead}{fixed} at {format_rate(edge.bytes_per_s, 'B')}"


def _stage_lines(view: ViewData, stage: ViewStage) -> list[str]:
    kinds = dict.fromkeys(view.devices[rank].kind for rank in stage.ranks)
    return [
        f"stage {stage.index}",
        *(block_label(b) for b in stage.blocks[:4]),
        *([f"and {len(stage.blocks) - 4} more"] if len(stage.blocks) > 4 else []),
        f"{device_names(view, stage)} ({', '.join(kinds)})",
        format_bytes(stage.weight_bytes),
    ]


# --- Graphviz ---


def render_dot(view: ViewData) -> bytes:
    """The plan in the dot language of Graphviz, https://graphviz.org/doc/info/lang.html."""
    return ("\n".join(_dot_lines(view)) + "\n").encode()


def _dot_lines(view: ViewData) -> Iterator[str]:
    yield f"digraph {_dot_text(view.model)} {{"
    yield f"  label={_dot_text(view.headline)}; rankdir=LR; fontname=sans;"
    yield "  node [shape=box style=filled fontname=sans];"
    for stage in view.stages:
        fill = device_colour(stage.index)
        label = _dot_text("\n".join(_stage_lines(view, stage)))
        yield f'  s{stage.index} [label={label} fillcolor="{fill}" fontcolor="{text_on(fill)}"];'
    for edge in view.edges:
        yield f"  s{edge.source} -> s{edge.target} [label={_dot_text(edge_label(edge))}];"
    for number, device in enumerate(view.left_out):
        label = _dot_text(f"{device.name}\n{device.kind}\nwithout work")
        yield f'  d{number} [label={label} style=dashed fillcolor="none"];'
    yield "}"


def _dot_text(text: str) -> str:
    """A quoted string; a backslash and a quote are the only characters that mean something in it."""
    plain = text.replace("\0", "\ufffd").replace("\\", "\\\\").replace('"', '\\"')
    return '"' + plain.replace("\r", "").replace("\n", "\\n") + '"'


# --- GraphML ---


def render_graphml(view: ViewData) -> bytes:
    """The plan as GraphML, http://graphml.graphdrawing.org, with numbers as attributes."""
    graph: nx.DiGraph[str] = nx.DiGraph()
    for stage in view.stages:
        graph.add_node(
            f"s{stage.index}",
            label=f"stage {stage.index}",
            pipeline=stage.pipeline,
            units=xml_text(", ".join(map(block_label, stage.blocks))),
            devices=xml_text(", ".join(view.devices[rank].name for rank in stage.ranks)),
            weight_bytes=float(stage.weight_bytes),
        )
    for edge in view.edges:
        graph.add_edge(
            f"s{edge.source}",
            f"s{edge.target}",
            forward_bytes_per_sample=float(edge.forward_bytes_per_sample),
            backward_bytes_per_sample=float(edge.backward_bytes_per_sample),
            bytes_per_s=float(edge.bytes_per_s),
            latency_s=float(edge.latency_s),
        )
    for number, device in enumerate(view.left_out):
        graph.add_node(f"d{number}", label=xml_text(device.name), devices="", kind=xml_text(device.kind))
    buffer = io.BytesIO()
    nx.write_graphml_xml(graph, buffer)
    return buffer.getvalue()


# --- Markdown ---


def render_markdown(view: ViewData) -> bytes:
    """A page with a Mermaid sketch, https://mermaid.js.org, and the table of stages."""
    return ("\n".join(_markdown_lines(view)) + "\n").encode()


def _markdown_lines(view: ViewData) -> Iterator[str]:
    slowest = view.devices[view.bottleneck]
    yield f"# {_markdown_text(view.headline)}"
    yield ""
    yield f"- predicted step: {format_seconds(view.step_s)}"
    if view.measured is not None:
        yield f"- measured step: {format_seconds(view.measured.step_s)}"
        if view.measured.note:
            yield f"- note: {view.measured.note}"
    yield f"- bottleneck: {_markdown_text(slowest.name)}, busy {100 * slowest.busy_share:.0f} %"
    yield (
        f"- device time: {100 * view.shares.compute:.1f} % compute, "
        f"{100 * view.shares.communication:.1f} % communication, "
        f"{100 * view.shares.gradients:.1f} % gradient sums, {100 * view.shares.bubble:.1f} % bubbles"
    )
    certificate = view.certificate
    yield f"- certificate: {certificate.status}, gap {100 * certificate.gap:.3g} %"
    if view.left_out:
        names = ", ".join(_markdown_text(d.name) for d in view.left_out[:8])
        more = f" and {len(view.left_out) - 8} more" if len(view.left_out) > 8 else ""
        yield f"- without work: {names}{more}"
    yield from ["", "```mermaid", "flowchart LR", *_mermaid_lines(view), "```", ""]
    yield "| stage | units | devices | weights | peak memory |"
    yield "| ---: | --- | --- | ---: | ---: |"
    for stage in view.stages:
        blocks = ", ".join(map(block_label, stage.blocks))
        peak = max(view.devices[rank].peak_bytes for rank in stage.ranks)
        yield (
            f"| {stage.index} | {_markdown_text(blocks)} | {_markdown_text(device_names(view, stage))} "
            f"| {format_bytes(stage.weight_bytes)} | {format_bytes(peak)} |"
        )


def _mermaid_lines(view: ViewData) -> Iterator[str]:
    shown = view.stages[:_MOST_STAGES]
    for stage in shown:
        text = "<br>".join(_mermaid_text(line) for line in _stage_lines(view, stage))
        yield f'  s{stage.index}["{text}"]'
    if len(view.stages) > _MOST_STAGES:
        yield f'  more["and {len(view.stages) - _MOST_STAGES} more stages"]'
    for edge in view.edges:
        if edge.target < len(shown):
            yield f'  s{edge.source} -->|"{_mermaid_text(edge_label(edge))}"| s{edge.target}'


_MERMAID_PLAIN = re.compile(r"[^\w .,:/+()-]")


def _mermaid_text(text: str) -> str:
    """Everything but plain characters as Mermaid's character codes, so that names stay names."""
    return _MERMAID_PLAIN.sub(lambda match: f"#{ord(match[0])};", text)


def _markdown_text(text: str) -> str:
    """Text that Markdown and HTML take as it is."""
    escaped = re.sub(r"([\\`*_{}\[\]()#+!|~$])", r"\\\1", " ".join(text.split()))
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
