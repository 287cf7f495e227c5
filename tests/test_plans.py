"""Plans: the page, the file, what a damaged file is answered with, differences."""

import json
import math
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plan_samples import CLUSTER, partitions, sample_plan, stage_links, table_for

from graphpar.errors import PlanError
from graphpar.plans.build import PlanSubject, make_plan, predict
from graphpar.plans.diff import diff_plans
from graphpar.plans.plan import Plan, hash_of, plan_schema

PAGE = """\
plan for tiny-gpt, training, float32, on 2 fast + 2 of 3 slow
predicted step 191 ms, 83.7 sample/s
bottleneck p0s0/0, busy 77 %; bubbles 38.4 % of device time
feasible, gap 5 %: programme's objective 200 ms, its bound 190 ms, bound for any
  plan 100 ms; search cut short by time limit
batch of 16, schedule 1f1b: 8 microbatches of 2

stage device kind units mb forward backward    comm peak memory
    0 p0s0/0 fast   0-2  8 48.1 ms  96.1 ms 23.1 us 13.9 MiB 1%
    1 p0s1/0 slow   3-4  3   36 ms    72 ms  223 us 8.67 MiB 3%
    1 p0s1/1 fast   3-4  5   20 ms  40.1 ms  230 us 8.86 MiB 1%
    2 p0s2/0 slow     5  8 48.1 ms  96.1 ms 14.6 us 3.79 MiB 1%

units and weights
    0 embed .. h.1 (3 of 6), 2.5 MiB
    1 h.2 .. h.3 (2 of 6), 2 MiB
    2 head (1 of 6), 512 KiB

cut edges, bytes per sample
    0 > 1  4 KiB forward, 4 KiB back, p0s0/0 - p0s1/0 at 10 GB/s, 1 us
    0 > 2  64 B + 512 B fixed forward, p0s0/0 - p0s2/0 at 10 GB/s, 1 us
    1 > 2  4 KiB forward, 4 KiB back, p0s1/0 - p0s2/0 at 10 GB/s, 1 us

timeline, 2.69 ms per column
p0s0/0 |001122233....aaaaa44......bbbbccccc5566ddddd77eeeeeffff......gggghhhhh#|
p0s1/0 |....111113333....bbbbbbbbb....ddddddddd66666........ggggggggg+##.......|
p0s1/1 |..00...2..aaa...........ccc4.........55eee...fff77.........hhh#........|
p0s2/0 |....00aaaa111bbbb22ccccc33dddd444eeee..55ffff666gggg77hhhhh#...........|
digit: forward of a microbatch (its last digit), letter: its backward (a is 0),
  +: gradient sum, #: optimiser, dot: waits

without work: spare/0 (slow)
note: layer norms stay in float32
assumed: sends overlap with compute; a device sends one message at a time, links
  are not shared
assumed: gradients are summed by a ring all-reduce after the last backward
certified among: pipelines of contiguous stages with replicas
"""

DIFFERENCE = """\
predicted step  191 ms -> 315 ms (+64.9 %)
peak of p0s1/0  8.67 MiB -> 4.48 MiB
peak of p0s1/1  8.86 MiB -> 4.48 MiB
peak of p0s2/0  3.79 MiB -> 7.98 MiB
moved unit 4 (h.3): p0s1/0, p0s1/1 -> p0s2/0
"""


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    partition = draw(partitions())
    table = table_for(partition, training=draw(st.booleans()))
    links = draw(stage_links(partition))
    subject = PlanSubject("any", "0" * 64, CLUSTER, hash_of(CLUSTER))
    return make_plan(subject, table, predict(table, partition, links))


def test_the_page() -> None:
    assert str(sample_plan()) == PAGE.rstrip("\n")


def test_the_page_of_inference_has_no_backward() -> None:
    page = str(sample_plan(training=False))
    assert "backward" not in page
    assert "inference" in page


def test_the_repr_is_one_line() -> None:
    assert repr(sample_plan()) == (
        "Plan(tiny-gpt: 3 stages on 4 devices, 191 ms per step predicted, feasible, gap 5 %)"
    )


@given(plans())
def test_pages_keep_to_eighty_columns(plan: Plan) -> None:
    assert max(len(line) for line in str(plan).splitlines()) <= 80


@given(plans())
def test_plans_survive_the_file(plan: Plan) -> None:
    loaded = Plan.from_json(plan.to_json())
    assert loaded == plan
    assert loaded.to_json() == plan.to_json()
    assert str(loaded) == str(plan)
    assert loaded.timeline().step_s == plan.predicted_step_s


def test_saving_and_loading(tmp_path: Path) -> None:
    plan = sample_plan()
    path = plan.save(tmp_path / "new" / "plan.json")
    assert Plan.load(path) == plan
    assert [p.name for p in path.parent.iterdir()] == ["plan.json"]


def test_the_file_is_sorted_and_carries_its_version(tmp_path: Path) -> None:
    text = sample_plan().save(tmp_path / "plan.json").read_text()
    data = json.loads(text)
    assert (data["format"], data["version"]) == ("graphpar-plan", 1)
    assert list(data) == sorted(data)
    assert text.endswith("}\n")


def test_what_users_were_promised() -> None:
    plan = sample_plan()
    assert plan.status == "feasible"
    assert (plan.gap, plan.bound_s) == (0.05, 0.19)
    assert set(plan.predicted_peak_bytes) == set(plan.devices)
    assert [s.devices for s in plan.stages] == [
        ("p0s0/0",),
        ("p0s1/0", "p0s1/1"),
        ("p0s2/0",),
    ]
    assert plan.left_out == {"spare/0": "slow"}
    busiest = max(plan.replicas, key=lambda r: r.forward_s + r.backward_s)
    assert plan.bottleneck.device == busiest.device


def test_the_schema_names_every_field() -> None:
    schema = plan_schema()
    properties = schema["$defs"]["Plan"]["properties"]
    assert set(properties) == set(json.loads(sample_plan().to_json()))


def test_the_published_schema_is_up_to_date() -> None:
    path = Path(__file__).parent.parent / "docs" / "plan.schema.json"
    published = without_descriptions(json.loads(path.read_text()))
    assert published == without_descriptions(plan_schema()), (
        "write it anew: graphpar show --schema > docs/plan.schema.json"
    )


def without_descriptions(data: Any) -> Any:
    if isinstance(data, dict):
        return {k: without_descriptions(v) for k, v in data.items() if k != "description"}
    if isinstance(data, list | tuple):
        return [without_descriptions(v) for v in data]
    return data


def changed(**changes: Any) -> bytes:
    """The sample's file with some values replaced, each given as a path of keys."""
    data = json.loads(sample_plan().to_json())
    for path, value in changes.items():
        *parents, last = [int(k) if k.isdigit() else k for k in path.split("__")]
        place = data
        for key in parents:
            place = place[key]
        place[last] = value
    return json.dumps(data).encode()


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        ("version", 2, "field version: 2 is newer than 1.*upgrade graphpar"),
        ("version", "1", "field version: expected a positive integer"),
        ("format", "other", "is not a plan: field format must be 'graphpar-plan', found 'other'"),
        ("batch", "16", "field batch: Expected `int`, got `str`"),
        ("batch", 17, "field partition.pipelines: take 16 samples of a batch of 17"),
        ("batch", 0, "field batch: 0 samples"),
        ("unknown", 1, "unknown field `unknown`"),
        ("predicted_step_s", None, "field predicted_step_s: Expected `float`, got `null`"),
        ("predicted_step_s", -1, "field predicted_step_s: -1.0 is negative"),
        ("units", [], r"field partition.pipelines\[0\].stages: cover 6 of 0 units"),
        ("timing__ranks__0__node", 3, r"field timing.ranks\[0\].node: Expected `str`"),
        ("timing__ranks__0__device", "x", "field timing.ranks: are not the devices"),
        ("timing__ranks__0__sizes", [], r"field timing.ranks\[0\].sizes: lacks microbatches of 2"),
        ("timing__gradient_groups__0__ranks", [9], r"gradient_groups\[0\].ranks: ranks are 0 to 3"),
        ("stages__0__last", 4, r"field stages\[0\]: says"),
        ("stages", [], "field stages: 0 rows for 3 stages"),
        ("edges__0__target", 7, r"field edges\[0\]: from stage 0 to 7"),
        ("edges__1__target", 1, r"field edges\[1\]: from stage 0 to 1"),
        ("partition__status", "fine", "field partition.status: Invalid enum value 'fine'"),
        ("partition__pipelines", [], "field partition.pipelines: is empty"),
        ("partition__pipelines__0__microbatches", 0, "0 microbatches of 16 samples"),
        ("partition__pipelines__0__stages__1__first", 2, "must begin at unit 3"),
        (
            "partition__pipelines__0__stages__1__replicas__0__microbatches",
            9,
            r"stages\[1\].replicas: take \[9, 5\]",
        ),
        (
            "partition__pipelines__0__stages__1__replicas__0__device",
            "p0s0/0",
            "device p0s0/0 runs two stages",
        ),
        (
            "partition__pipelines__0__stages__1__replicas__0__shares",
            [0.5, 0.5],
            r"replicas\[0\].shares: 2 shares for 1 members",
        ),
        (
            "partition__pipelines__0__stages__1__replicas__0__shares",
            [0.5],
            "each must be positive and all add up to 1",
        ),
        ("predicted_peak_bytes", {}, "field predicted_peak_bytes"),
        ("left_out", {"p0s0/0": "slow"}, "field left_out: p0s0/0 is used"),
    ],
)
def test_a_wrong_field_is_named(path: str, value: Any, told: str) -> None:
    with pytest.raises(PlanError, match=told) as caught:
        Plan.from_json(changed(**{path: value}), name="plan file p.json")
    assert str(caught.value).startswith("plan file p.json: ")


@pytest.mark.parametrize(
    "data", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"format": "graphpar-plan", "version": NaN}']
)
def test_what_is_not_json_is_told(data: bytes) -> None:
    with pytest.raises(PlanError, match="is not valid JSON"):
        Plan.from_json(data)


@pytest.mark.parametrize("data", [b"[]", b"1", b"null", b"{}", b'"plan"'])
def test_other_json_is_no_plan(data: bytes) -> None:
    with pytest.raises(PlanError, match="is not a plan"):
        Plan.from_json(data)


@given(st.data())
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_no_damage_is_answered_with_anything_but_a_plan_error(data: st.DataObject) -> None:
    tree = json.loads(sample_plan().to_json())
    place: Any = tree
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = data.draw(st.sampled_from(keys))
        below = place[key]
        if not isinstance(below, dict | list) or not below or data.draw(st.booleans()):
            break
        place = below
    if data.draw(st.booleans()):
        del place[key]
    else:
        place[key] = data.draw(
            st.none()
            | st.booleans()
            | st.integers(-3, 99)
            | st.floats(-1, 1e9)
            | st.text(max_size=3)
            | st.just([])
            | st.just({})
        )
    try:
        plan = Plan.from_json(json.dumps(tree).encode())
    except PlanError:
        return
    assert str(plan)
    assert plan.timeline().step_s >= 0


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"nothing.json: cannot be read: No such file.*graphpar plan"):
        Plan.load(tmp_path / "nothing.json")


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PlanError, match="cannot be written"):
        sample_plan().save(tmp_path / "file" / "plan.json")


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_numbers_that_json_has_not_are_refused(number: float) -> None:
    plan = msgspec.structs.replace(sample_plan(), predicted_step_s=number)
    with pytest.raises(PlanError, match=f"field predicted_step_s is {number}"):
        plan.to_json()


def test_a_plan_for_another_model() -> None:
    plan = sample_plan()
    plan.check_model("renamed", plan.model_hash)
    with pytest.raises(PlanError, match=r"made for model tiny-gpt .* given is gpt2 .*new plan"):
        plan.check_model("gpt2", "cd" * 32)


def test_a_plan_for_another_mode() -> None:
    sample_plan().check_mode(training=True)
    with pytest.raises(PlanError, match="made for training, but inference is asked for"):
        sample_plan().check_mode(training=False)
    with pytest.raises(PlanError, match="ask for inference, or make a new plan for training"):
        sample_plan(training=False).check_mode(training=True)


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (
            {"nodes": [{"name": "p0", "devices": [{"kind": "cpu", "count": 4}]}]},
            r"cluster.nodes\[0\].devices\[0\].count is 5 in the plan, 4 in the given one",
        ),
        ({"nodes": []}, "cluster.nodes has 1 entries in the plan, 0"),
        (CLUSTER | {"network": {}}, "cluster.network stands only in the given one"),
        (CLUSTER, "its hash differs"),
    ],
)
def test_a_plan_for_another_cluster(other: dict[str, Any], told: str) -> None:
    plan = sample_plan()
    plan.check_cluster(CLUSTER, hash_of(CLUSTER))
    with pytest.raises(PlanError, match=told):
        plan.check_cluster(other, "another")


def test_equal_plans_do_not_differ() -> None:
    assert str(diff_plans(sample_plan(), sample_plan())) == "no differences"


def test_the_page_of_a_difference() -> None:
    assert str(diff_plans(sample_plan(5), sample_plan(4))) == DIFFERENCE.rstrip("\n")


def test_a_difference_tells_moved_units() -> None:
    (move,) = diff_plans(sample_plan(5), sample_plan(4)).moves
    assert (move.first, move.last, move.names) == (4, 5, "h.3")
    assert (move.before, move.after) == (("p0s1/0", "p0s1/1"), ("p0s2/0",))


def test_unlike_models_cannot_be_compared_unit_by_unit() -> None:
    other = msgspec.structs.replace(sample_plan(), units=tuple("abcdef"), model="other")
    diff = diff_plans(sample_plan(), other)
    assert not diff.comparable
    assert "moves cannot be told" in str(diff)
