"""Clusters: reading, round trips, links, names, and what is refused."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphpar import catalogue, cluster_build
from graphpar.cluster import Cluster
from graphpar.errors import ClusterError

DESIGN_YAML = """
nodes:
  - {name: a, devices: {kind: h100-sxm-80gb, count: 8}, link: nvlink4}
  - {name: b, devices: [{kind: v100-sxm2-32gb, count: 4}, {kind: cpu, count: 1}], link: nvlink2}
network: {bytes_per_s: 12.5e9, latency_s: 10e-6}
"""

KIND = {
    "name": "mine",
    "peak_flops_per_s": {"float32": 1e12},
    "memory_bytes": 8e9,
    "memory_bytes_per_s": 1e11,
}


def local(*devices: dict[str, Any], **more: Any) -> Cluster:
    return Cluster.from_dict({"devices": [{"kind": "cpu", **d} for d in devices], **more})


def test_yaml_file_gives_devices_in_node_order(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(DESIGN_YAML)
    cluster = Cluster.load(path)
    names = [device.name for device in cluster.devices]
    assert names == [f"a/{i}" for i in range(8)] + [f"b/{i}" for i in range(5)]
    assert cluster.link("a/0", "b/0").bytes_per_s == 12.5e9
    assert cluster.link("a/0", "b/0").latency_s == 10e-6
    assert cluster.link("a/0", "a/1").kind == "nvlink4"
    assert cluster.devices[-1].is_cpu
    assert not cluster.devices[0].is_cpu


@st.composite
def written_clusters(draw: st.DrawFn) -> dict[str, Any]:
    kinds = ["cpu", "h100-sxm-80gb", "rtx-4090", "epyc-9654", KIND]
    links = [None, "nvlink4", "pcie4", {"bytes_per_s": 1e9}, {"kind": "loopback", "latency_s": 1e-3}]

    def group() -> dict[str, Any]:
        return {
            "kind": draw(st.sampled_from(kinds)),
            "count": draw(st.integers(1, 3)),
            "slowdown": draw(st.sampled_from([1.0, 2.5])),
            "memory_bytes": draw(st.sampled_from([1e9, 4e9])),
        }

    nodes = []
    for index in range(draw(st.integers(1, 3))):
        node: dict[str, Any] = {"name": f"n{index}", "devices": [group(), group()]}
        link = draw(st.sampled_from(links))
        if link is not None:
            node["link"] = link
        if draw(st.booleans()):
            node["network"] = {"bytes_per_s": 5e8}
        nodes.append(node)
    network: Any = draw(st.sampled_from(["ethernet-25g", {"bytes_per_s": 1e9, "latency_s": 0}]))
    if len(nodes) > 1 and isinstance(network, dict):
        network = {**network, "pairs": [{"nodes": ["n0", "n1"], "bytes_per_s": 2e9}]}
    return {"nodes": nodes, "network": network}


@given(written_clusters())
def test_written_form_round_trips_and_is_canonical(data: dict[str, Any]) -> None:
    cluster = Cluster.from_dict(data)
    again = Cluster.from_dict(cluster.to_dict())
    assert again == cluster
    assert again.to_dict() == cluster.to_dict()
    assert hash(again) == hash(cluster)


@given(written_clusters())
def test_topology_says_the_same_as_link(data: dict[str, Any]) -> None:
    cluster = Cluster.from_dict(data)
    topology = cluster.topology()
    for a in cluster.devices:
        for b in cluster.devices:
            assert topology.link(a.name, b.name) == cluster.link(a.name, b.name).cost


def test_short_form_is_one_local_node_that_shares_the_memory() -> None:
    one, three = local({}), local({"count": 2}, {"slowdown": 3.0})
    assert [d.name for d in three.devices] == ["local/0", "local/1", "local/2"]
    assert three.devices[2].slowdown == 3.0
    assert three.devices[0].memory_bytes == pytest.approx(one.devices[0].memory_bytes / 3, rel=1e-6)


def test_links_are_emulated_only_where_numbers_are_given_for_this_machine() -> None:
    assert not local({"count": 2}).link("local/0", "local/1").emulated
    slow = local({"count": 2}, link={"bytes_per_s": 1e8, "latency_s": 1e-3})
    assert slow.link("local/0", "local/1").emulated
    assert slow.link("local/0", "local/1").cost.seconds(1e8) == pytest.approx(1.001)
    remote = Cluster.from_dict({"nodes": [{"name": "a", "devices": {"kind": "t4", "count": 2}}]})
    assert not remote.link("a/0", "a/1").emulated


def test_the_slower_network_card_of_two_nodes_counts() -> None:
    cluster = Cluster.from_dict(
        {
            "nodes": [
                {"name": "a", "devices": {"kind": "t4"}, "network": {"bytes_per_s": 1e9}},
                {"name": "b", "devices": {"kind": "t4"}},
            ],
            "network": {"bytes_per_s": 5e9, "latency_s": 1e-5},
        }
    )
    assert cluster.link("a/0", "b/0").bytes_per_s == 1e9


def test_missing_network_between_nodes_warns() -> None:
    nodes = [{"name": name, "devices": {"kind": "t4"}} for name in "ab"]
    with pytest.warns(UserWarning, match="network"):
        Cluster.from_dict({"nodes": nodes})


def test_instances_bring_devices_links_and_network() -> None:
    cluster = Cluster.of("p4d.24xlarge", 2, "g5.48xlarge", 1)
    assert len(cluster.devices) == 24
    assert cluster.link("p4d-0/0", "p4d-0/1").kind == "nvlink3"
    fast = cluster.link("p4d-0/0", "p4d-1/0").bytes_per_s
    assert cluster.link("p4d-0/0", "g5-2/0").bytes_per_s < fast * 1.01


def test_bridges_join_two_devices_of_a_node_and_no_more() -> None:
    for link in (None, "nvlink3-bridges", {"kind": "nvlink3-bridges", "latency_s": 6e-6}):
        node = {"name": "a", "devices": {"kind": "a100-pcie-80gb", "count": 2}, "link": link}
        node = {key: value for key, value in node.items() if value}
        pair = Cluster.from_dict({"nodes": [node]}).link("a/0", "a/1")
        assert pair.bytes_per_s == pytest.approx(0.39 * 300e9)
        node["devices"] = {"kind": "a100-pcie-80gb", "count": 4}
        four = Cluster.from_dict({"nodes": [node]}).link("a/0", "a/1")
        assert four.bytes_per_s == pytest.approx(0.83 * 31e9)
    # Numbers are taken as they are.
    node["link"] = {"kind": "nvlink3-bridges", "bytes_per_s": 1e11}
    assert Cluster.from_dict({"nodes": [node]}).link("a/0", "a/3").bytes_per_s == 1e11
    (azure,) = Cluster.of("standard_nc96ads_a100_v4", 1).nodes
    assert azure.link.kind == "pcie4"


def test_cards_without_peer_access_meet_by_way_of_main_memory() -> None:
    def rate(devices: Any, **link: Any) -> float:
        return (
            Cluster.from_dict({"nodes": [{"name": "a", "devices": devices, **link}]})
            .link("a/0", "a/1")
            .bytes_per_s
        )

    gaming, other = ({"kind": kind, "count": 2} for kind in ("rtx-4090", "rtx-6000-ada"))
    assert rate(gaming) == rate(gaming, link="pcie4") == pytest.approx(0.35 * 31e9)
    assert rate(other) == pytest.approx(0.83 * 31e9)
    assert rate([other, gaming]) == rate(gaming)
    # Neither a bridge nor a patched driver's numbers are touched by it.
    assert rate({"kind": "rtx-3090", "count": 2}) == pytest.approx(0.4 * 56.25e9)
    assert rate({"kind": "rtx-3090", "count": 4}) == rate(gaming)
    assert rate(gaming, link={"kind": "pcie4", "bytes_per_s": 25e9}) == 25e9


def test_local_looks_for_cuda_devices_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "graphpar.cluster.cuda_devices", lambda: [{"kind": "h100-sxm-80gb", "memory_bytes": 8 << 30}]
    )
    assert [d.kind for d in Cluster.local().devices] == ["h100-sxm-80gb"]
    assert [d.kind for d in Cluster.local(slowdowns=(1, 2)).devices] == ["cpu", "cpu"]
    with pytest.raises(ClusterError, match="1 CUDA"):
        Cluster.local(2)


def test_local_without_cuda_is_one_worker_per_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphpar.cluster.cuda_devices", list)
    assert len(Cluster.local().devices) == cluster_build.num_cores()
    assert len(Cluster.local(5).devices) == 5


def test_text_forms() -> None:
    cluster = Cluster.from_dict(
        {
            "nodes": [
                {"name": "a", "devices": {"kind": "h100", "count": 4}, "link": "nvlink4"},
                {"name": "b", "devices": [{"kind": "t4", "slowdown": 2.0}], "link": "pcie3"},
            ],
            "network": {"bytes_per_s": 1e9, "latency_s": 1e-5},
        }
    )
    assert repr(cluster) == "Cluster(2 nodes, 5 devices: 4 x h100-sxm-80gb, 1 x t4)"
    assert str(cluster).splitlines() == [
        "devices  kind           memory  bandwidth  peak                  slowdown  link in node",
        "a/0..3   h100-sxm-80gb  80 GiB  3.35 TB/s  989 TFLOP/s bfloat16  1         "
        "nvlink4 (364 GB/s, 3 us)",
        "b/0      t4             16 GiB  320 GB/s   65 TFLOP/s float16    2         "
        "pcie3 (13.1 GB/s, 10 us)",
        "network between nodes: 1 GB/s, 10 us",
    ]


CPU = {"kind": "cpu"}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"devices": [{"kind": "h10-sxm"}]}, r"nodes\[0\].devices\[0\].kind.*h100-sxm-80gb, \S+, \S+\."),
    ({"devices": [CPU], "link": "nvlnk3"}, "nearest known: nvlink"),
    ({"nodes": []}, "no nodes"),
    ({}, "nodes"),
    ({"devices": []}, "no devices"),
    ({"devices": [{"kind": "cpu", "memory": 3}]}, r"`memory`.*devices\[0\]"),
    ({"devices": [{"kind": "cpu", "memory_bytes": -3}]}, "memory_bytes is -3"),
    ({"devices": [{"kind": "cpu", "memory_bytes": float("nan")}]}, "memory_bytes is nan"),
    ({"devices": [{"kind": "cpu", "slowdown": 0}]}, "slowdown is 0"),
    ({"devices": [{"kind": "cpu", "slowdown": 0.5}]}, "can only wait"),
    ({"devices": [{"kind": "cpu", "count": 0}]}, "count is 0"),
    ({"devices": [{"kind": "cpu", "threads": 0}]}, "threads is 0"),
    ({"devices": [{"kind": "cpu", "compute": "dreamt"}]}, "compute"),
    ({"devices": [CPU], "link": {"bytes_per_s": 0}}, "link.bytes_per_s is 0"),
    ({"devices": [CPU], "link": {"latency_s": -1}}, "latency_s is -1"),
    ({"nodes": [{"name": "a", "devices": CPU}, {"name": "a", "devices": CPU}]}, "two nodes"),
    ({"nodes": [{"name": "a/b", "devices": CPU}]}, "no '/'"),
    ({"devices": [{"kind": {**KIND, "peak_flops_per_s": {}}}]}, "is empty"),
    (
        {"devices": [{"kind": {**KIND, "peak_flops_per_s": {"float32": 1e12, "bf16": 4e12}}}]},
        r"devices.*peak_flops_per_s has a peak for 'bf16'.*formats are bfloat16, .*float32",
    ),
    ({"devices": [{"kind": {**KIND, "powr_w": 300.0}}]}, "powr_w.*kind: name, .*power_w"),
    ({"devices": [{"kind": {**KIND, "family": "amper"}}]}, "known families"),
    (
        {
            "nodes": [{"name": "a", "devices": CPU}, {"name": "b", "devices": CPU}],
            "network": {"bytes_per_s": 1e9, "pairs": [{"nodes": ["a", "c"]}]},
        },
        "'c', which is no node",
    ),
]


@pytest.mark.parametrize(("data", "message"), REFUSED)
def test_what_is_refused_says_where_and_why(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ClusterError, match=message):
        Cluster.from_dict(data)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nodes: [", "no valid YAML"),
        ("- 1", "a mapping"),
        ("devices: [{kind: cpu, kind: t4}]", "'kind' is given twice"),
        ("devices: [{kind: cpu, memory_bytes: 16 GB}]", "memory_bytes is a plain number.*not 16 GB"),
        ("devices: [{kind: cpu, count: 100000000}]", "count is 100000000; it must be at most"),
        ("devices: &d [*d]", "refers to itself in line 1"),
        ("devices: " + "[" * 5000, "too deep"),
        (
            "a: &a [x, x, x, x, x, x, x, x]\n"
            + "".join(
                f"{k}: &{k} [{', '.join([f'*{j}'] * 8)}]\n"
                for j, k in zip("abcdef", "bcdefg", strict=True)
            ),
            "stands for [0-9]+ entries",
        ),
    ],
)
def test_damaged_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ClusterError, match=message):
        Cluster.load(path)
    with pytest.raises(ClusterError, match="Cannot read"):
        Cluster.load(tmp_path / "none.yaml")


def test_unknown_device_and_wrong_counts() -> None:
    with pytest.raises(ClusterError, match="nearest names: local/0"):
        local({}).device("local/7")
    with pytest.raises(ValueError, match=r"Cluster\.of"):
        Cluster.of("p4d.24xlarge")
    with pytest.raises(ClusterError, match="instance type"):
        Cluster.of("p4.24xlarge", 1)


def test_products_reach_in_narrow_formats_what_was_measured_in_float8() -> None:
    h100, a100 = (catalogue.devices()[name] for name in ("h100-sxm-80gb", "a100-sxm-80gb"))
    assert h100.measured_fraction("bfloat16") == pytest.approx(794.5 / 989, rel=0.01)
    assert h100.measured_fraction("float8_e4m3fn") == pytest.approx(1402.6 / 1979, rel=0.01)
    assert a100.measured_fraction("float8_e4m3fn") == a100.measured_matmul_fraction
    card = catalogue.devices()["rtx-3090"]  # above the stated clock where products run at half rate
    fractions = [card.measured_fraction(dtype) for dtype in ("bfloat16", "tf32", "float32")]
    assert fractions == [pytest.approx(76.7 / 71, rel=0.01)] * 2 + [pytest.approx(24.8 / 35.6, rel=0.01)]


def sources(table: str) -> dict[str, str]:
    """What the numbers of a catalogue's file were taken from, by the words that its entries use."""
    text = (Path(__file__).parents[1] / "cost_models" / f"{table}.toml").read_text(encoding="utf-8")
    found: dict[str, str] = tomllib.loads(text)["sources"]
    return found


def test_catalogue_is_consistent_and_sourced() -> None:
    assert len(catalogue.devices()) >= 50
    assert len(catalogue.instances()) >= 50
    for name, device in catalogue.devices().items():
        assert device.link in catalogue.links(), name
        assert device.family in catalogue.families(), name
        assert device.source in sources("devices"), name
        assert all(peak > 0 for peak in device.peak_flops_per_s.values()), name
    for name, instance in catalogue.instances().items():
        assert instance.device in catalogue.devices(), name
        assert instance.link in catalogue.links(), name
        assert instance.source in sources("instances"), name
        assert (instance.usd_per_h is None) == (instance.price_date is None), name
    for name, link in catalogue.links().items():
        assert link.source in sources("links"), name
        assert link.pair_bytes_per_s <= link.bytes_per_s, name
        assert 0 < link.efficiency <= 1, name
        assert (link.beyond_pairs or name) in catalogue.links(), name


def test_no_two_entries_share_a_name() -> None:
    for table in (catalogue.devices(), catalogue.links(), catalogue.instances()):
        names = [
            catalogue.normalize(name) for key, entry in table.items() for name in (key, *entry.aliases)
        ]
        doubled = {name for name in names if names.count(name) > 1}
        own = {catalogue.normalize(key) for key in table}
        assert doubled <= own


def test_efficiency_curves_rise_and_stay_below_the_peak() -> None:
    for name, family in catalogue.families().items():
        sizes = [size for size, _ in family.matmul_efficiency]
        shares = [share for _, share in family.matmul_efficiency]
        assert sizes == sorted(sizes), name
        assert shares == sorted(shares), name
        assert 0 < shares[0] <= shares[-1] < 1, name
