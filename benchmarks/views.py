"""How large the views of a plan are, how fast they are made, and how fast the page opens.

    python benchmarks/views.py [--json] [--devices N ...]

The plans are those of a decoder of 405 billion parameters (`pipeline_scale.py`). Opening is timed in
headless Chromium through Playwright, from navigation to the page's own sign that it is ready; where
either is missing, that column is empty.
"""

import argparse
import importlib
import json
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline_scale import KINDS, LLAMA_405B, decoder_table

from graphpar.partition.pipeline import partition
from graphpar.plan_build import PlanSubject, make_plan, predict
from graphpar.plans import Plan, hash_of
from graphpar.schedule import StageLink
from graphpar.view.build import view_of
from graphpar.view.html import render_html
from graphpar.view.svg import render_svg
from graphpar.view.trace import render_trace

BATCH = 2048
_RENDERERS = {"html": render_html, "svg": render_svg, "trace": render_trace}


@dataclass(frozen=True)
class Row:
    """One plan and its views."""

    devices: int
    stages: int
    num_actions: int
    view_s: float
    render_s: dict[str, float]
    num_bytes: dict[str, int]
    open_s: float | None


def decoder_plan(num_devices: int) -> Plan:
    """A plan over equal numbers of all kinds of devices."""
    table = decoder_table(LLAMA_405B, {k.name: num_devices // len(KINDS) for k in KINDS}, BATCH)
    found = partition(table, gap=0.02, time_limit_s=60.0)
    edge, links, first = table.edges[0], [], 0
    for pipeline in found.pipelines:
        last = first + len(pipeline.stages)
        links += [
            StageLink(s, s + 1, edge.bytes_per_sample, edge.gradient_bytes_per_sample)
            for s in range(first, last - 1)
        ]
        first = last
    cluster: dict[str, Any] = {"nodes": [{"name": n} for n in table.topology.inside]}
    subject = PlanSubject("decoder, 405B", hash_of(LLAMA_405B), cluster, hash_of(cluster))
    return make_plan(subject, table, predict(table, found, links))


def measure(num_devices: int) -> Row:
    """Draw one plan in every form."""
    plan = decoder_plan(num_devices)
    began_s = time.perf_counter()
    view = view_of(plan)
    view_s = time.perf_counter() - began_s
    render_s, files = {}, {}
    for name, render in _RENDERERS.items():
        began_s = time.perf_counter()
        files[name] = render(view)
        render_s[name] = time.perf_counter() - began_s
    return Row(
        devices=num_devices,
        stages=len(view.stages),
        num_actions=sum(len(lane.actions) for lane in view.predicted.lanes),
        view_s=view_s,
        render_s=render_s,
        num_bytes={name: len(data) for name, data in files.items()},
        open_s=opening_s(files["html"]),
    )


def opening_s(page: bytes) -> float | None:
    """Seconds until the page is ready in a browser that is already running."""
    binary = shutil.which("chromium")
    try:
        api = importlib.import_module("playwright.sync_api")
    except ImportError:
        return None
    if binary is None:
        return None
    with tempfile.TemporaryDirectory() as folder, api.sync_playwright() as playwright:
        target = Path(folder) / "page.html"
        target.write_bytes(page)
        browser = playwright.chromium.launch(executable_path=binary, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1280, "height": 900})
        began_s = time.perf_counter()
        tab.goto(target.as_uri())
        tab.wait_for_selector("html[data-ready=true]", state="attached")
        seconds = time.perf_counter() - began_s
        browser.close()
    return seconds


def main() -> None:
    """Run all sizes and print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--devices", type=int, nargs="+", default=[256, 1024])
    arguments = parser.parse_args()
    rows = [measure(count) for count in arguments.devices]
    if arguments.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
        return
    for row in rows:
        parts = [f"{n} {row.num_bytes[n] / 1e6:.2f} MB in {row.render_s[n]:.2f} s" for n in _RENDERERS]
        opened = "not timed" if row.open_s is None else f"{row.open_s:.2f} s"
        print(
            f"{row.devices} devices, {row.stages} stages, {row.num_actions} actions: simulated and "
            f"read in {row.view_s:.2f} s; {'; '.join(parts)}; page opens in {opened}"
        )


if __name__ == "__main__":
    main()
