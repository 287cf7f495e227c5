"""The page in a real browser: Chromium without a window, driven by Playwright.

Both are optional; without them these tests are skipped and say what is missing.
"""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from plan_samples import CLUSTER, partition_of, sample_plan, table_for
from view_samples import HOSTILE, Job, explained_plan, hostile_plan, measured_step

from graphpar.cluster import Cluster
from graphpar.examples.gpt import GPT, example_inputs
from graphpar.ir.graph import Graph
from graphpar.partition.baselines import even_split
from graphpar.partition.types import PipelineChoice, Replica, StageChoice
from graphpar.planner import plan_of, price
from graphpar.plans.build import PlanSubject, make_plan, predict
from graphpar.plans.plan import Plan, hash_of
from graphpar.plans.records import PlanBudget, PlanPrecision, PlanUnitFormat
from graphpar.preparation import prepare
from graphpar.runtime.comparison import compare_step
from graphpar.runtime.true_error import TrueError
from graphpar.schedule.simulated import stage_links
from graphpar.view.api import Drawable, visualize
from graphpar.view.build import view_of
from graphpar.view.notebook import framed

pytestmark = pytest.mark.browser

DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A running browser."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    binary = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if binary is None:
        pytest.skip("no chromium on the path (Debian: apt-get install chromium)")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=binary, args=["--no-sandbox", "--disable-gpu"]
        )
        yield browser
        browser.close()


Open = Callable[..., Any]


@pytest.fixture
def opened(chromium: Any, tmp_path: Path) -> Iterator[Open]:
    """Draws, opens the file, and at the end makes sure that nothing was asked for or complained of."""
    pages: list[tuple[Any, list[str], list[str]]] = []

    def opener(
        drawable: Drawable,
        *,
        compare: Drawable | None = None,
        graph: Graph | None = None,
        **options: Any,
    ) -> Any:
        name = tmp_path / f"page{len(pages)}.html"
        target = visualize(drawable, name, compare=compare, graph=graph)
        page = chromium.new_page(**{"viewport": DESKTOP, **options})
        requests: list[str] = []
        complaints: list[str] = []
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append(dialog.message))
        page.goto(target.as_uri())
        page.wait_for_selector("html[data-ready=true]", state="attached")
        pages.append((page, requests, complaints))
        return page

    yield opener
    for page, requests, complaints in pages:
        assert complaints == []
        asked = [url for url in requests if not url.startswith(("data:", "blob:"))]
        assert len(asked) == 1 and asked[0].startswith("file:")
        page.close()


def span_of(page: Any, canvas: str = "#timeline-canvas") -> float:
    data = page.eval_on_selector(canvas, "c => [Number(c.dataset.from), Number(c.dataset.to)]")
    return float(data[1] - data[0])


def width_of(page: Any) -> int:
    return int(page.evaluate("document.documentElement.scrollWidth"))


def test_the_page_shows_what_the_plan_says(opened: Open) -> None:
    plan = sample_plan()
    page = opened(plan)
    assert page.locator(".stage").count() == len(plan.stages)
    assert page.locator(".chip").count() == len(plan.devices) + len(plan.left_out)
    assert page.locator(".chip.idle").count() == len(plan.left_out)
    assert "191 ms" in page.inner_text("#overview")
    assert page.get_attribute("#timeline-canvas", "data-rows") == str(len(plan.devices))
    assert "time limit" in page.inner_text("#certificate")
    assert page.locator("#compare").count() == 0


def test_a_block_opens_and_lists_its_units(opened: Open) -> None:
    page = opened(sample_plan())
    block = page.locator("#stage-0 .block", has_text="h.0 .. h.1").first
    name = block.locator("> .name")
    assert "×2" in name.inner_text() and name.get_attribute("aria-expanded") == "false"
    name.click()
    assert name.get_attribute("aria-expanded") == "true"
    assert block.locator("> .blocks > .block > .name").all_inner_texts() == ["0", "1"]
    page.locator("#model button", has_text="Close all").click()
    assert block.locator(".block").count() == 0


def test_skip_edges_are_arcs(opened: Open) -> None:
    page = opened(sample_plan())
    assert page.locator(".flow > svg path.head").count() == 1
    assert "skips to stage 2" in page.inner_text("#stages")


def test_a_block_tells_what_the_other_choices_cost(opened: Open) -> None:
    page = opened(explained_plan())
    assert "memory of slow bounds stage 2" in page.inner_text("#why")
    assert page.locator(".choice").count() == 3
    page.locator("#stage-1 button", has_text="why?").click()
    assert page.locator(".choice").count() == 1
    choice = page.locator(".choice")
    choice.locator("summary").press("Enter")
    assert "+4 ms" in choice.inner_text() and "not possible: memory of p0s0/0" in choice.inner_text()
    page.fill("#why-unit", "h.1")
    assert page.locator(".choice").count() == 1
    page.fill("#why-unit", "no such block")
    assert "No block has a name like that" in page.inner_text("#choices")


def test_blocks_open_down_to_operations(opened: Open) -> None:
    model = GPT(width=16, layers=2, heads=2, length=8)
    prepared = prepare(model, example_inputs(2, 8), {}, None)
    cluster = Cluster.from_dict({"devices": [{"kind": "cpu"}]})
    table = price(prepared, cluster, train=None, precision="float32", calibration=None)
    plan = plan_of(prepared, cluster, table, even_split(table))
    page = opened(plan, graph=prepared.graph)
    leaf = page.locator("#stage-0 .block", has_text="ln+head").last
    leaf.locator("> .name").click()
    assert "linear" in leaf.locator(".ops").inner_text()


def test_search_finds_a_module(opened: Open) -> None:
    page = opened(sample_plan())
    page.fill("#search", "H.3")
    assert "1 unit found" in page.inner_text("#found")
    assert "p0s1/0" in page.inner_text("#found")
    page.fill("#search", "nothing of that name")
    assert "0 units found" in page.inner_text("#found")


def test_the_timeline_zooms_and_pans_with_keys_and_buttons(opened: Open) -> None:
    page = opened(sample_plan())
    whole = span_of(page)
    page.focus("#timeline-canvas")
    page.keyboard.press("+")
    assert span_of(page) < whole
    page.keyboard.press("ArrowRight")
    page.keyboard.press("n")
    assert "microbatch" in page.inner_text("#timeline-live")
    page.keyboard.press("ArrowDown")
    assert "rank 1" in page.inner_text("#timeline-live")
    page.keyboard.press("0")
    assert span_of(page) == pytest.approx(whole)
    page.locator("#timeline button[aria-label='Zoom in']").click()
    assert span_of(page) < whole


def test_hovering_names_stage_microbatch_and_time(opened: Open) -> None:
    page = opened(sample_plan())
    canvas = page.locator("#timeline-canvas")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    page.mouse.move(box["x"] + 180, box["y"] + 30)
    told = page.inner_text("#timeline .tip")
    assert "forward, stage 0 on p0s0/0" in told
    assert "microbatch 0 (2 samples)" in told
    assert "ms" in told


def _check_curves(page: Any, plan: Plan) -> None:
    """The highest point of memory over time, as it is drawn, is the predicted peak."""
    drawn = page.evaluate(
        """() => [...document.querySelectorAll("#memory .row")].map((row) => {
          row.click();
          const curve = document.getElementById("curve");
          const [zero, one] = [...curve.querySelectorAll(".grid")].map((line) => line.y1.baseVal.value);
          const labels = [...curve.querySelectorAll("text")].map((text) => text.textContent);
          const label = labels.find((each) => each.endsWith("iB"));
          const top = Math.min(...[...curve.querySelectorAll("path")].map((path) => path.getBBox().y));
          return [Number(row.dataset.rank), (zero - top) / (zero - one), label];
        })"""
    )
    units = {"KiB": 2**10, "MiB": 2**20}
    for rank, steps, label in drawn:
        amount, unit = label.split()
        peak = plan.predicted_peak_bytes[plan.devices[rank]]
        assert steps * float(amount) * units[unit] == pytest.approx(peak, rel=2e-3)


def test_stages_and_halves_of_a_device_are_told_apart(opened: Open) -> None:
    """An interleaved zero-bubble plan: the tip names the stage of an action, memory has all its parts."""
    replicas = [(Replica(f"p0s0/{i}", 4),) for i in (0, 1)]
    stages = tuple(StageChoice(s, s + 1, replicas[s % 2]) for s in range(6))
    partition = partition_of((PipelineChoice(4, 4, stages),), "zero-bubble")
    table = table_for(partition)
    links = stage_links(table, partition.pipelines)
    subject = PlanSubject("m", "ab" * 32, CLUSTER, hash_of(CLUSTER))
    plan = make_plan(subject, table, predict(table, partition, links))
    page = opened(plan)
    _check_curves(page, plan)
    assert "gradients of weights" in page.locator("#timeline").inner_text()
    canvas = page.locator("#timeline-canvas")
    canvas.focus()
    told = set()
    for _ in range(40):
        canvas.press("n")
        told |= {line for line in page.locator("#timeline-live").all_inner_texts() if "stage" in line}
    assert any("stage 4" in line for line in told) and any("stage 0" in line for line in told)


def test_a_run_that_failed_is_marked(opened: Open) -> None:
    plan = sample_plan()
    page = opened(Job(plan, measured_step(plan, until_s=0.1)))
    assert "the run failed" in page.inner_text("#timeline")
    assert "measured" in page.inner_text("#memory")
    _check_curves(page, plan)


def test_a_step_that_differs_is_shown_with_the_likely_reason(opened: Open) -> None:
    plan = sample_plan()
    for slower, off in ((1.0, False), (1.4, True)):
        step = measured_step(plan, slower=slower)
        reports = tuple(
            msgspec.structs.replace(r, peak_bytes=int(timing))
            for r, timing in zip(
                step.reports, (d.peak_bytes for d in view_of(plan).devices), strict=False
            )
        )
        found = compare_step(plan, reports, step.seconds)
        page = opened(Job(plan, step, found))
        rows = page.locator("#differences tbody tr").all_inner_texts()
        assert [row.split()[0] for row in rows] == list(plan.devices)
        assert page.locator("#differs").count() == off
        if off:
            assert "40 % longer" in page.inner_text("#differs") and "Likely:" in page.inner_text(
                "#differs"
            )
            assert all("+40 %" in row for row in rows)


def test_two_plans_are_compared(opened: Open) -> None:
    page = opened(sample_plan(), compare=sample_plan(head_first=4))
    text = page.inner_text("#compare")
    assert "h.3" in text and "predicted step" in text
    assert span_of(page, "#compare-0-canvas") == pytest.approx(span_of(page, "#compare-1-canvas"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_dark_mode_darkens_page_and_canvas(opened: Open, scheme: str) -> None:
    page = opened(sample_plan(), color_scheme=scheme)
    colours = page.evaluate(
        """() => {
          const canvas = document.getElementById("timeline-canvas");
          const pixel = canvas.getContext("2d").getImageData(canvas.width - 2, canvas.height - 2, 1, 1);
          return [getComputedStyle(document.body).backgroundColor, pixel.data[0]];
        }"""
    )
    assert (colours[0] == "rgb(255, 255, 255)") == (scheme == "light")
    assert (colours[1] > 128) == (scheme == "light")


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("hostile", [False, True], ids=["plain", "hostile"])
def test_nothing_sticks_out_of_the_screen(opened: Open, viewport: dict[str, int], hostile: bool) -> None:
    plan = hostile_plan() if hostile else sample_plan()
    page = opened(Job(plan, measured_step(plan)), viewport=viewport)
    assert width_of(page) <= viewport["width"]


def test_hostile_names_stay_text(opened: Open) -> None:
    page = opened(hostile_plan())
    assert page.locator("script").count() == 2
    assert page.locator("main .node b", has_text="quotes").count() >= 1
    page.fill("#search", HOSTILE[0])
    assert "1 unit found" in page.inner_text("#found")


def test_it_prints(opened: Open) -> None:
    page = opened(sample_plan())
    page.emulate_media(media="print")
    assert not page.locator(".tools").first.is_visible()
    assert page.pdf(format="A4")[:5] == b"%PDF-"


def test_the_frame_of_a_notebook_draws(chromium: Any, tmp_path: Path) -> None:
    book = tmp_path / "book.html"
    book.write_text(f"<!doctype html><meta charset=utf-8>{framed(view_of(hostile_plan()))}")
    page = chromium.new_page(viewport=DESKTOP)
    page.goto(book.as_uri())
    frame = page.frame_locator("iframe")
    frame.locator("html[data-ready=true]").wait_for(state="attached")
    assert frame.locator(".stage").count() == 3
    page.close()


def test_a_long_model_is_shown_in_portions(opened: Open) -> None:
    """A thousand unlike blocks in one stage: few are built at once, all can be reached and found."""
    page = opened(_one_stage(_words(1000)))
    assert page.locator(".block").count() < 100
    page.fill("#search", _words(1000)[999])
    assert "1 unit found" in page.inner_text("#found")
    more = page.locator("#stages button", has_text="Show more blocks")
    for _ in range(39):
        more.click()
    assert page.locator(".block").count() == 1000
    assert not more.is_visible()


@pytest.mark.slow
def test_never_more_than_a_thousand_blocks_at_once(opened: Open) -> None:
    """Sixty modules of forty parts each: opening all of them closes those opened first."""
    names = _parts(60, 40)
    page = opened(_one_stage(names))
    tops = page.locator("#stage-0 > .blocks > .block")
    page.locator("#stage-0 > button", has_text="Show more blocks").click()
    page.locator("#stage-0 > button", has_text="Show more blocks").click()
    assert tops.count() == 60
    for place in range(60):
        tops.nth(place).locator("> .name").click()
        more = tops.nth(place).locator("> button", has_text="Show more blocks")
        more.click()
        assert page.locator(".block").count() <= 1000
    assert tops.last.locator(".block").count() == 40
    assert tops.first.locator(".block").count() == 0


def test_search_leads_to_a_block_deep_inside(opened: Open) -> None:
    names = _parts(60, 40)
    page = opened(_one_stage(names))
    page.fill("#search", names[-1])
    page.locator("#found button.go").click()
    found = page.locator(".block.found")
    assert found.locator("> .name").inner_text() == _words(40)[-1]
    assert found.is_visible()


def _parts(modules: int, parts: int) -> list[str]:
    """Names without numbers in two levels."""
    return [f"{word}.part.{part}" for word in _words(modules) for part in _words(parts)]


def _one_stage(names: list[str]) -> Plan:
    stages = (StageChoice(0, len(names), (Replica("a/0", 1),)),)
    partition = partition_of((PipelineChoice(1, 1, stages),))
    table = replace(table_for(partition, num_units=len(names)), unit_names=tuple(names))
    subject = PlanSubject("long", "ab" * 32, CLUSTER, hash_of(CLUSTER))
    return make_plan(subject, table, predict(table, partition, ()))


def _words(count: int) -> list[str]:
    """Names without numbers, all unlike."""
    return ["".join("abcdefghij"[int(digit)] for digit in f"{i:04d}") for i in range(count)]


def test_two_fingers_zoom(opened: Open) -> None:
    page = opened(sample_plan(), viewport=PHONE, has_touch=True)
    whole = span_of(page)
    page.evaluate(
        """() => {
          const canvas = document.getElementById("timeline-canvas");
          canvas.setPointerCapture = () => {};
          const box = canvas.getBoundingClientRect();
          const send = (kind, id, x) => canvas.dispatchEvent(new PointerEvent(kind,
            { pointerId: id, clientX: box.left + x, clientY: box.top + 30, pointerType: "touch" }));
          send("pointerdown", 1, 180); send("pointerdown", 2, 220);
          send("pointermove", 1, 140); send("pointermove", 2, 260);
          send("pointerup", 1, 140); send("pointerup", 2, 260);
        }"""
    )
    assert span_of(page) == pytest.approx(whole / 3, rel=0.01)


def test_an_error_budget_is_shown_with_what_others_would_buy(opened: Open) -> None:
    plan = sample_plan()
    row = PlanUnitFormat(
        unit=1, format="bfloat16", output_error=1e-3, gradient_error=4e-3,
        source="measured", saved_s=0.25, saved_bytes=-2048.0,
    )  # fmt: skip
    report = PlanPrecision(
        budget=1e-2, output_error=1e-3, gradient_error=4e-3,
        measured_output_error=1.1e-3, measured_gradient_error=5e-3, step_s=0.5,
        looser=PlanBudget(budget=0.02, step_s=0.4), tighter=PlanBudget(budget=0.004, step_s=0.8),
        units=(row, msgspec.structs.replace(row, unit=2)), note="errors measured on 8 samples",
    )  # fmt: skip
    plan = msgspec.structs.replace(plan, error_budget=report)
    text = opened(plan).inner_text("#errors")
    rows = [line.split("\t") for line in text.splitlines()]
    assert ["result", "0.001", "0.0011", "–", "0.01"] in [r[:5] for r in rows]
    assert ["gradient", "0.004", "0.005", "–", "0.01"] in [r[:5] for r in rows]
    assert ["the next tighter", "0.004", "800 ms", "+300 ms"] in rows
    assert ["the next looser", "0.02", "400 ms", "−100 ms"] in rows
    units = f"{plan.units[1]} … {plan.units[2]}"
    assert [units, "bfloat16", "0.0014", "0.0057", "measured", "500 ms", "−4 KiB"] in rows
    broken = Job(plan, measured_step(plan), true_error=TrueError(1e-2, (1e-3, 4e-3), 2e-3, 0.03))
    page = opened(broken)
    assert "gradient (of its norm in the first step)\t0.004\t0.005\t0.03" in page.inner_text("#errors")
    assert "further off than the budget" in page.inner_text("#errors .alert")
    assert opened(sample_plan()).locator("#errors").count() == 0


def test_number_formats_are_hatched_and_named(opened: Open) -> None:
    data: Any = msgspec.to_builtins(sample_plan())
    stages = data["partition"]["pipelines"][0]["stages"]
    stages[0]["precision"] = "bfloat16"
    stages[1]["precision"] = "float16"
    stages[1]["unit_formats"] = ["float16", "float32"]
    stages[1]["recompute"] = True
    page = opened(msgspec.convert(data, Plan))
    assert page.locator("#stage-0 > .head.hatch1").count() == 1
    page.locator("#stage-1 .block > .name").click()
    assert page.locator("#stage-1 .block .block > .name.hatch2").count() == 1
    assert {"bfloat16", "float16", "float32"} == set(page.locator("#formats span").all_inner_texts())
    assert "recompute" in page.inner_text("#stage-1")
