"""How large the views of a plan are, how fast they are made, and how fast the page opens.

    python benchmarks/views.py [--json] [--plans NAME ...] [--keep FOLDER]

Plans: `bert` and `gpt2-xl` as the planner finds them for unlike GPUs, `gpt2-groups` by hand with two
tensor groups, `t5` cut evenly over five devices (its encoder's result skips stages), and `405b-256`,
`405b-1024`: a decoder of 405 billion parameters (`pipeline_scale.py`) over so many devices of four kinds.
All but the last two need transformers. Opening is
timed in headless Chromium through Playwright, from navigation to the page's own sign that it is ready,
the median of five; where either is missing, that column is empty.
"""

import argparse
import importlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from pipeline_cases import ALL_OPTIONS, FOUR, LLAMA_405B, decoder_table

from graphpar.cluster import Cluster
from graphpar.commands.training import default_training
from graphpar.cost import CostTable
from graphpar.groups.modes import with_group_modes
from graphpar.ir.graph import Graph
from graphpar.model_spec import load_model
from graphpar.partition.baselines import even_split
from graphpar.partition.handmade import evaluate
from graphpar.partition.pipeline import partition
from graphpar.partition.types import Partition, PipelineChoice, Replica, StageChoice
from graphpar.planner import plan_of, plan_prepared, price
from graphpar.plans.build import PlanSubject, make_plan, predict
from graphpar.plans.plan import Plan, hash_of
from graphpar.preparation import Prepared, prepare
from graphpar.schedule import StageLink
from graphpar.view.build import view_of
from graphpar.view.detail import detail_of
from graphpar.view.html import render_html
from graphpar.view.svg import render_svg
from graphpar.view.trace import render_trace

BATCH = 2048
OPENINGS = 5
CLUSTER = """
nodes:
  - {name: tower, devices: {kind: v100-sxm2-16gb, count: 2}, link: nvlink2}
  - {name: shelf, devices: {kind: t4, count: 2}, link: pcie3-x16}
  - {name: attic, devices: {kind: v100-sxm2-32gb, count: 1}}
network: {bytes_per_s: 1.25e9, latency_s: 50e-6}
"""


@dataclass(frozen=True)
class Row:
    """One plan and its views; the page opens down to operations where there is a graph."""

    name: str
    devices: int
    stages: int
    num_actions: int
    view_s: float
    render_s: dict[str, float]
    num_bytes: dict[str, int]
    open_s: float | None


Sample = tuple[Plan, Graph | None]


ByHand = Callable[[CostTable, Prepared, Cluster], tuple[CostTable, Partition]]


def stock_plan(model: str, batch: int, length: int, by_hand: ByHand | None = None) -> Sample:
    """A training plan of a model built from its configuration, found by the planner or by hand."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(CLUSTER)
        file.flush()
        cluster = Cluster.load(file.name)
    loaded = load_model(f"hf:{model}", batch_size=batch, seq_len=length, train=True, weights=False)
    training = default_training()
    prepared = prepare(loaded.model, loaded.args, loaded.kwargs, training)
    if by_hand is None:
        found = plan_prepared(
            prepared, cluster, train=training, precision="float32", calibration=None,
            time_limit_s=20.0, gap=0.02,
        )  # fmt: skip
        return found, prepared.graph
    table = price(prepared, cluster, train=training, precision="float32", calibration=None)
    return plan_of(prepared, cluster, *by_hand(table, prepared, cluster)), prepared.graph


def evenly(table: CostTable, prepared: Prepared, cluster: Cluster) -> tuple[CostTable, Partition]:
    """The same number of units on every device."""
    return table, even_split(table)


def in_groups(table: CostTable, prepared: Prepared, cluster: Cluster) -> tuple[CostTable, Partition]:
    """A device alone, then two tensor groups of two."""
    units = len(prepared.chain.units)
    cuts = units // 3, units // 3 + units // 5
    groups = [Replica(f"{node}/0", 8, others=(f"{node}/1",)) for node in ("shelf", "tower")]
    stages = (
        StageChoice(0, cuts[0], (Replica("attic/0", 8),)),
        StageChoice(cuts[0], cuts[1], (groups[0],)),
        StageChoice(cuts[1], units, (groups[1],)),
    )
    table = with_group_modes(table, prepared.graph, cluster, groups, None)
    return table, evaluate(table, [PipelineChoice(table.batch, 8, stages)])


def decoder_plan(num_devices: int) -> Plan:
    """A plan over equal numbers of all kinds of devices."""
    counts = {k.name: num_devices // len(FOUR) for k in FOUR}
    table = decoder_table(LLAMA_405B, counts, BATCH, ALL_OPTIONS)
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


PLANS: dict[str, Callable[[], Sample]] = {
    "bert": partial(stock_plan, "bert-base", 64, 128),
    "gpt2-xl": partial(stock_plan, "gpt2-xl", 32, 256),
    "gpt2-groups": partial(stock_plan, "gpt2", 32, 256, in_groups),
    "t5": partial(stock_plan, "t5-base", 32, 128, evenly),
    "405b-256": lambda: (decoder_plan(256), None),
    "405b-1024": lambda: (decoder_plan(1024), None),
}


def measure(name: str, keep: Path | None) -> Row:
    """Draw one plan in every form."""
    plan, graph = PLANS[name]()
    began_s = time.perf_counter()
    view = view_of(plan)
    view_s = time.perf_counter() - began_s
    detail = detail_of(graph, plan.units) if graph is not None else None
    renderers: dict[str, Callable[[], bytes]] = {
        "html": lambda: render_html(view, detail=detail),
        "svg": lambda: render_svg(view),
        "trace": lambda: render_trace(view),
    }
    render_s, files = {}, {}
    for kind, render in renderers.items():
        began_s = time.perf_counter()
        files[kind] = render()
        render_s[kind] = time.perf_counter() - began_s
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        plan.save(keep / f"{name}.json")
        (keep / f"{name}.html").write_bytes(files["html"])
    return Row(
        name=name,
        devices=len(plan.devices) + len(plan.left_out),
        stages=len(view.stages),
        num_actions=sum(len(lane.actions) for lane in view.predicted.lanes),
        view_s=view_s,
        render_s=render_s,
        num_bytes={kind: len(data) for kind, data in files.items()},
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
        seconds = []
        for _ in range(OPENINGS):
            began_s = time.perf_counter()
            tab.goto(target.as_uri())
            tab.wait_for_selector("html[data-ready=true]", state="attached")
            seconds.append(time.perf_counter() - began_s)
        browser.close()
    return median(seconds)


def main() -> None:
    """Draw all plans and print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--plans", nargs="+", choices=PLANS, default=list(PLANS))
    parser.add_argument("--keep", type=Path, help="write plans and pages here")
    arguments = parser.parse_args()
    rows = [measure(name, arguments.keep) for name in arguments.plans]
    if arguments.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
        return
    print("| plan | devices | stages | actions | page | drawn in | opens in | SVG | trace |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for row in rows:
        size = {kind: f"{num / 1e6:.2f} MB" for kind, num in row.num_bytes.items()}
        opened = "not timed" if row.open_s is None else f"{row.open_s:.2f} s"
        print(
            f"| {row.name} | {row.devices} | {row.stages} | {row.num_actions:,} | {size['html']} "
            f"| {row.view_s + row.render_s['html']:.2f} s | {opened} | {size['svg']} | {size['trace']} |"
        )


if __name__ == "__main__":
    main()
