"""Changes in words: what they do to a setting, and what is refused."""

import contextlib
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphpar.cluster import Cluster
from graphpar.scenarios.changes import apply, idle
from graphpar.scenarios.naming import essential
from graphpar.scenarios.prices import instance_price
from graphpar.scenarios.types import Layout, Setting

LAB = Cluster.from_dict(
    {
        "nodes": [
            {"name": "a", "devices": {"kind": "h100-sxm-80gb", "count": 2}},
            {"name": "b", "devices": [{"kind": "t4", "count": 1}, {"kind": "l4", "count": 1}]},
        ],
        "network": {"bytes_per_s": 1e9, "latency_s": 1e-5},
    }
)
BASE = Setting(LAB, batch=16, training=True, usd_per_h=(("a", 4.0), ("b", 1.0)))


def kinds(setting: Setting) -> list[str]:
    return [device.kind for device in setting.cluster.devices]


@pytest.mark.parametrize(
    ("change", "left"),
    [
        ("drop b/0", ["h100-sxm-80gb", "h100-sxm-80gb", "l4"]),
        ("down a", ["t4", "l4"]),
        ("drop h100-sxm-80gb", ["t4", "l4"]),
        ("add 2 t4 to a", ["h100-sxm-80gb", "h100-sxm-80gb", "t4", "t4", "t4", "l4"]),
        ("add l4", ["h100-sxm-80gb", "h100-sxm-80gb", "t4", "l4", "l4"]),
        ("replace b with a100", ["h100-sxm-80gb", "h100-sxm-80gb", "a100-sxm-80gb", "a100-sxm-80gb"]),
        ("set a.count=1", ["h100-sxm-80gb", "t4", "l4"]),
        ("set a.copies=2", ["h100-sxm-80gb"] * 2 + ["t4", "l4"] + ["h100-sxm-80gb"] * 2),
    ],
)
def test_devices_come_and_go(change: str, left: list[str]) -> None:
    assert kinds(apply(BASE, [change])) == left


def test_devices_keep_their_names() -> None:
    names = [d.name for d in apply(BASE, ["drop a/0", "add t4 to a"]).cluster.devices]
    assert names == ["a/1", "a/0", "b/0", "b/1"]
    assert next(d.name for d in apply(BASE, ["set a.count=1"]).cluster.devices) == "a/0"


def test_new_cards_bring_their_link() -> None:
    nodes = apply(BASE, ["replace a with v100"]).cluster.nodes
    assert nodes[0].link.kind == "nvlink2"


def test_links_and_memory_are_set_in_si_units() -> None:
    changed = apply(BASE, ["set network.bytes_per_s=25e9", "set a.link.latency_s=1e-3"])
    assert changed.cluster.network.bytes_per_s == 25e9
    assert changed.cluster.network.latency_s == BASE.cluster.network.latency_s
    assert changed.cluster.node("a").link.latency_s == 1e-3
    assert changed.cluster.node("a").link.bytes_per_s == BASE.cluster.node("a").link.bytes_per_s
    ideal = apply(BASE, ["set network.latency_s=0", "set a.link.latency_s=0"]).cluster
    assert ideal.network.latency_s == ideal.node("a").link.latency_s == 0
    assert apply(BASE, ["set b/1.memory_bytes=1e9"]).cluster.device("b/1").memory_bytes == 10**9


def test_instances_bring_their_price_and_dropped_nodes_take_theirs() -> None:
    more = apply(BASE, ["add g5.12xlarge"])
    added = next(node for node in more.cluster.nodes if node.name not in ("a", "b"))
    assert [d.kind for d in added.devices] == ["a10g"] * 4
    assert dict(more.usd_per_h)[added.name] > 0
    assert dict(apply(BASE, ["drop b"]).usd_per_h) == {"a": 4.0}


def test_scalars_and_configurations() -> None:
    changed = apply(
        BASE, ["set batch=64", "set precision=bfloat16", "set optimizer=sgd", "tp=2 pp=1 m=4"]
    )
    assert (changed.batch, changed.precision, changed.optimizer) == (64, "bfloat16", "sgd")
    assert changed.layout == Layout(tensor=2, microbatches=4)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["drop c/0"], "nearest: .*; nodes: a, b; kinds: "),
        (["drop a", "drop b"], "no device would be left"),
        (["set speed=3"], "cannot be set"),
        (["set a.colour=3"], "cannot be set"),
        (["set batch=none"], "must be a number"),
        (["set batch=1.5"], "whole number"),
        (["set batch=-1"], "must be positive"),
        (["set network.bytes_per_s=0"], "must be positive"),
        (["set network.bytes_per_s=inf"], "and finite"),
        (["set network.latency_s=-1e-6"], "zero, or positive"),
        (["set a.link.latency_s=nan"], "zero, or positive"),
        (["set precision=int3"], "float32"),
        (["set b.count=3"], "unlike"),
        (["add 3 nonsense-9000"], "nearest known"),
        (["juggle a/0"], "not understood"),
        (["replace a/0"], "NAME with KIND"),
        (["drop a/0", "replace a/0 with t4"], "contradict"),
        (["set batch=8", "set batch=9"], "contradict"),
        (["tp=2", "pp=2"], "contradict"),
        (["m=4"], "one device"),
        (["set tensor=0"], "positive"),
        (["set tensor=3x"], "two as in 2x4"),
        (["set precision=auto"], "one format"),
        (["tp=2 tp=4"], "twice"),
    ],
)
def test_senseless_changes_say_what_is_wrong(changes: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        apply(BASE, changes)


@given(st.text(max_size=30))
def test_any_text_is_a_change_or_an_error_that_says_so(text: str) -> None:
    with contextlib.suppress(ValueError):
        assert apply(BASE, [text]).cluster.devices


@given(st.sampled_from([d.name for d in LAB.devices]), st.sampled_from(["t4", "a10", "mi300x"]))
def test_replacing_keeps_the_number_and_dropping_lowers_it(name: str, kind: str) -> None:
    assert len(kinds(apply(BASE, [f"replace {name} with {kind}"]))) == len(kinds(BASE))
    assert len(kinds(apply(BASE, [f"drop {name}"]))) == len(kinds(BASE)) - 1


@pytest.mark.parametrize(
    "changes",
    [
        ["set a.link.bytes_per_s=1e9", "replace a with v100"],
        ["set a.network.bytes_per_s=1e9", "set network.bytes_per_s=5e9"],
        ["set a.count=3", "add 2 h100 to a"],
        ["set a/0.memory_bytes=1e9", "drop a/0"],
        ["set a.usd_per_h=9", "replace a with t4"],
    ],
)
def test_what_a_later_change_takes_back_is_refused_and_the_other_order_is_not(changes: list[str]) -> None:
    with pytest.raises(ValueError, match="is undone by what follows"):
        apply(BASE, changes)
    if "drop a/0" not in changes:
        apply(BASE, changes[::-1])


def test_a_node_of_other_devices_has_no_known_price() -> None:
    for change in ("replace a with t4", "add t4 to a", "set a.count=4", "replace a/0 with t4"):
        assert dict(apply(BASE, [change]).usd_per_h) == {"b": 1.0}, change
    assert dict(apply(BASE, ["drop a/0"]).usd_per_h) == {"a": 4.0, "b": 1.0}
    made = apply(BASE, ["replace b with g5.12xlarge"])
    assert [d.kind for d in made.cluster.node("b").devices] == ["a10g"] * 4
    assert dict(made.usd_per_h)["b"] == instance_price("g5.12xlarge")


def test_a_latency_of_the_network_is_that_of_every_card() -> None:
    cloud = Setting(Cluster.of("g5.12xlarge", 2), batch=8)
    made = apply(cloud, ["set network.latency_s=1e-7"]).cluster.topology()
    assert {link.latency_s for link in (made.network, *made.between.values())} == {1e-7}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["drop b", "set network.bytes_per_s=1e9"], "one node"),
        (["set a.count=1", "set a.link.latency_s=1e-3"], "one device"),
        (["set recompute=on"], "inference"),
        (["set network.latency_s=1e-3"], "links of their own"),
        (["set network.bytes_per_s=1e9", "set batch=8"], None),
    ],
)
def test_what_makes_no_difference_is_told(changes: list[str], words: str | None) -> None:
    pairs = ((("a", "b"), LAB.network),) if words == "links of their own" else ()
    base = replace(BASE, training=words != "inference", cluster=replace(LAB, pairs=pairs))
    asked = apply(base, changes)
    told = idle(asked, changes)
    assert words in told[0] if words else not told
    without = apply(base, changes[:-1]) if changes[1:] else base
    assert (essential(asked) == essential(without)) == (words in ("one node", "inference"))
