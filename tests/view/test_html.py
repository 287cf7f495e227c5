"""The page as a file: its policy, its data, its size; what a browser does with it is tested apart."""

import base64
import hashlib
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plan_samples import CLUSTER, partition_of, partitions, sample_plan, stage_links, table_for
from view_samples import HOSTILE, Job, hostile_plan, measured_step

from graphpar import cli
from graphpar.ir.graph import Graph
from graphpar.ir.ops import BatchSize, Op, Ref, TensorType
from graphpar.partition.types import PipelineChoice, Replica, StageChoice
from graphpar.plans.build import PlanSubject, make_plan, predict
from graphpar.plans.diff import diff_plans
from graphpar.plans.plan import Plan, hash_of
from graphpar.runtime.comparison import compare_step
from graphpar.schedule import KINDS
from graphpar.view.api import visualize
from graphpar.view.build import view_of
from graphpar.view.detail import ViewDetail
from graphpar.view.html import render_html, script_json
from graphpar.view.packed import PackedTimeline, pack


class Page(HTMLParser):
    """Elements with their attributes, and what stands in scripts and styles."""

    def __init__(self, data: bytes) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self._inside = ""
        self.feed(data.decode())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        self.texts.setdefault(self._inside, []).append(data)


def data_of(page: bytes) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(Page(page).texts["script"][0])
    return data


def test_the_policy_allows_exactly_the_pages_own_script_and_style() -> None:
    page = Page(render_html(view_of(sample_plan())))
    policy = next(a["content"] for t, a in page.elements if a.get("http-equiv"))
    assert policy is not None and policy.startswith("default-src 'none';")
    assert "unsafe" not in policy and "http" not in policy
    for tag, text in (("script", page.texts["script"][1]), ("style", page.texts["style"][0])):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def test_the_page_asks_for_nothing() -> None:
    page = render_html(view_of(sample_plan())).decode()
    for _, attributes in Page(page.encode()).elements:
        assert "src" not in attributes
        assert not any(name.startswith("on") or name == "style" for name in attributes)
        target = attributes.get("href")
        assert target is None or target.startswith(("#", "data:"))
    loads = {"http://www.w3.org/2000/svg"}  # the name of the SVG namespace, never loaded
    assert set(re.findall(r"https?://[^\s\"'`)]+", page)) <= loads


@pytest.mark.parametrize(
    "call", ["innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("]
)
def test_the_script_never_turns_text_into_elements(call: str) -> None:
    templates = Path(render_html.__code__.co_filename).with_name("templates")
    scripts = sorted(templates.glob("*.js"))
    assert scripts
    assert all(call not in script.read_text(encoding="utf-8") for script in scripts)


def test_the_page_holds_the_plan_and_the_measured_step() -> None:
    plan = sample_plan()
    data = data_of(render_html(view_of(plan, measured_step(plan, until_s=0.1))))
    (shown,) = data["plans"]
    assert [d["name"] for d in shown["devices"]] == [*plan.devices, *plan.left_out]
    assert shown["step_s"] == pytest.approx(plan.predicted_step_s)
    assert shown["measured"]["stopped"] == [0, 1, 2, 3]
    assert data["diff"] is None


def test_the_page_holds_measured_and_predicted_of_each_device_and_why_they_differ(tmp_path: Path) -> None:
    plan = sample_plan()
    step = measured_step(plan, slower=1.4)
    found = compare_step(plan, step.reports, step.seconds)
    job = Job(plan, step, found)
    (shown,) = data_of(visualize(job, tmp_path / "job.html").read_bytes())["plans"]
    assert shown["comparison"]["off"] and shown["comparison"]["reasons"] == list(found.reasons) != []
    assert [d["device"] for d in shown["comparison"]["devices"]] == list(plan.devices)
    for d in shown["comparison"]["devices"]:
        assert d["compute_s"] == pytest.approx(1.4 * d["predicted_compute_s"])


def test_hostile_names_are_data_only() -> None:
    page = render_html(view_of(hostile_plan()))
    tags = [tag for tag, _ in Page(page).elements]
    assert tags.count("script") == 2 and tags.count("b") == 0
    assert data_of(page)["plans"][0]["units"] == list(HOSTILE)
    assert b"<script>alert" not in page


@given(st.text())
def test_no_text_ends_a_script(text: str) -> None:
    written = script_json([text])
    assert not set(written) & set("<>&\u2028\u2029")
    assert json.loads(written) == [text]


def test_scripts_share_one_scope_and_no_name() -> None:
    templates = Path(render_html.__code__.co_filename).with_name("templates")
    texts = [script.read_text(encoding="utf-8") for script in templates.glob("*.js")]
    names = [n for t in texts for n in re.findall(r"^(?:async )?(?:function|const|let) (\w+)", t, re.M)]
    assert len(names) > 50 and len(names) == len(set(names))


def test_templates_are_filled_once() -> None:
    data = data_of(render_html(view_of(_named("@@script@@ @@data@@"))))
    assert data["plans"][0]["model"] == "@@script@@ @@data@@"


def _named(name: str) -> Plan:
    document = json.loads(sample_plan().to_json())
    document["model"] = name
    return Plan.from_json(json.dumps(document).encode())


Unpacked = tuple[str, int, int, float, float]
"""Kind, stage, microbatch (-1 for none), start and duration in seconds."""


def unpack(packed: PackedTimeline, stages_of: Sequence[Sequence[int]]) -> list[list[Unpacked]]:
    """For each lane its events, as the page unpacks them."""
    raw = zlib.decompress(base64.b64decode(packed.data))
    ends = packed.sizes[0], packed.sizes[0] + packed.sizes[1]
    codes, starts, durations = (
        _numbers(part) for part in (raw[: ends[0]], raw[ends[0] : ends[1]], raw[ends[1] :])
    )
    lanes = []
    for count, stages in zip(packed.counts, stages_of, strict=False):
        last_microbatch = dict.fromkeys(KINDS, -1)
        last_start = {True: 0, False: 0}
        lane = []
        for _ in range(count):
            code = next(codes)
            kind = KINDS[code & 0xF]
            step, place = divmod(code >> 4, len(stages))
            last_microbatch[kind] += _unzigzag(step)
            last_start[kind in "SD"] += _unzigzag(next(starts))
            start_s = last_start[kind in "SD"] * packed.tick_s
            duration_s = next(durations) * packed.tick_s
            lane.append((str(kind), stages[place], last_microbatch[kind], start_s, duration_s))
        lanes.append(lane)
    return lanes


def _unzigzag(number: int) -> int:
    return -(number + 1) // 2 if number & 1 else number // 2


def _numbers(data: bytes) -> Iterator[int]:
    number = shift = 0
    for byte in data:
        number |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            yield number
            number = shift = 0


@given(st.data())
def test_packing_keeps_every_event(data: st.DataObject) -> None:
    partition = data.draw(partitions())
    links = data.draw(stage_links(partition))
    table = table_for(partition)
    subject = PlanSubject("m", "ab" * 32, CLUSTER, hash_of(CLUSTER))
    view = view_of(make_plan(subject, table, predict(table, partition, links)))
    stages = [device.stages for device in view.devices]
    packed = pack(view.predicted, stages)
    tick_s = packed.tick_s
    for lane, events in zip(view.predicted.lanes, unpack(packed, stages), strict=True):
        long = [(a, s, e) for a, s, e in lane.events() if a.kind not in "RG" or e - s > tick_s]
        kept = [event for event in events if event[0] not in "RG" or event[4] > tick_s]
        shown = [(k, stage, -1 if m is None else m) for (k, stage, m), _, _ in long]
        assert [e[:3] for e in events if e[0] not in "RG"] == [s for s in shown if s[0] not in "RG"]
        assert {e[:3] for e in kept} <= set(shown)
        for action, start_s, end_s in long:
            if action.kind in "FBIW":
                (found,) = [e for e in events if e[:3] == action]
                assert found[3] == pytest.approx(start_s, abs=tick_s)
                assert found[4] == pytest.approx(end_s - start_s, abs=2 * tick_s)


def test_two_plans_stand_side_by_side(tmp_path: Path) -> None:
    one, two = sample_plan(), sample_plan(head_first=4)
    page = visualize(one, tmp_path / "two.html", compare=two).read_bytes()
    data = data_of(page)
    assert [p["step_s"] for p in data["plans"]] == [pytest.approx(p.predicted_step_s) for p in (one, two)]
    assert len(data["diff"]["moves"]) == len(diff_plans(one, two).moves) > 0
    with pytest.raises(ValueError, match=r"end the name .* in \.html"):
        visualize(one, tmp_path / "two.svg", compare=two)


def test_the_command_compares(tmp_path: Path) -> None:
    one = str(sample_plan().save(tmp_path / "one.json"))
    two = str(sample_plan(head_first=4).save(tmp_path / "two.json"))
    page = tmp_path / "page.html"
    assert cli.run(["view", one, "-o", str(page), "--compare", two], cli.Settings()) == 0
    assert len(data_of(page.read_bytes())["plans"]) == 2


def test_a_wide_plan_stays_small() -> None:
    """512 ranks, 1,024 microbatches."""
    stages = tuple(
        StageChoice(s, s + 1, tuple(Replica(f"n{s * 16 + r // 8}/{r % 8}", 8) for r in range(128)))
        for s in range(4)
    )
    partition = partition_of((PipelineChoice(1024, 1024, stages),))
    table = table_for(partition, num_units=4)
    subject = PlanSubject("wide", "ab" * 32, CLUSTER, hash_of(CLUSTER))
    view = view_of(make_plan(subject, table, predict(table, partition, ())))
    assert view.num_ranks == 512
    assert len(render_html(view)) < 1_500_000


def test_operations_that_find_no_room_are_counted() -> None:
    """Thirty thousand operations that do not repeat: the page stays small and says what it lacks."""
    names = [hashlib.sha256(str(i).encode()).hexdigest() for i in range(30_000)]
    kinds = tuple(tuple((n, "add", "float32[4]", n[::-1], "") for n in names[k::50]) for k in range(50))
    view = view_of(sample_plan())
    page = render_html(view, detail=ViewDetail(tuple(k % 50 for k in range(6)), kinds))
    assert len(page) < 1_500_000
    data = data_of(page)
    kept = json.loads(zlib.decompress(base64.b64decode(data["detail"])))["kinds"]
    assert 0 < sum(map(len, kept)) == 30_000 - data["left_out_ops"] < 30_000


def test_a_graph_of_another_model_is_refused(tmp_path: Path) -> None:
    kind = TensorType((BatchSize(), 4), "float32")
    ops = [
        Op("x", "input", ("x",), types=(kind,)),
        Op("y", "aten.relu.default", (Ref("x"),), types=(kind,), module="relu"),
        Op("output", "output", ((Ref("y"),),)),
    ]
    graph = Graph(ops, level="captured", name="Other", batch=2)
    with pytest.raises(ValueError, match="'Other' is not the one this plan was made for"):
        visualize(sample_plan(), tmp_path / "page.html", graph=graph)
    with pytest.raises(ValueError, match=r"end the name .* in \.html"):
        visualize(sample_plan(), tmp_path / "page.svg", graph=graph)
    assert not list(tmp_path.iterdir())
