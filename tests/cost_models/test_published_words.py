"""Words of published tables: devices, links, networks and flags are read however they are written."""

import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import collectives  # noqa: E402 - benchmarks are no package
from published import score  # noqa: E402
from published_clean import cleaned  # noqa: E402
from published_devices import device_of, network_of  # noqa: E402
from published_rows import run_of  # noqa: E402

from graphpar.cost_models.training_run import Run  # noqa: E402

GPT: dict[str, Any] = {
    "model": {"layers": 24, "hidden": 2048, "heads": 16, "ffn": 8192, "vocab": 50257, "seq_len": 1024},
    "hardware": {"gpu": "A100-SXM-80GB", "gpus_per_node": 8, "count": 8},
    "parallel": {"tp": 2, "pp": 2, "dp": 2, "framework": "megatron-lm"},
    "batch": {"global_batch": 32, "micro_batch": 4},
    "measured": {"step_time_s": 1.0},
}


def run(group: str, **fields: Any) -> Run:
    """That run with some fields of a group in place of its own."""
    found = run_of(cleaned({**GPT, group: {**GPT[group], **fields}})[0])
    assert not isinstance(found, str), found
    return found


def test_variants_have_a_stand_in_with_their_own_memory() -> None:
    kind, memory_bytes, remark = device_of("NVIDIA A100-SXM-64GB")
    assert (kind, memory_bytes, remark) == ("a100-sxm-80gb", 64 * 2**30, "")
    assert device_of("GH200 480GB")[1] == 0  # of its host
    kind, _, remark = device_of("MI300A")
    assert kind == "mi300x"
    assert "MI300A" in remark
    with pytest.raises(ValueError, match="not in the catalogue"):
        device_of("Titan Xp")  # much unlike Titan RTX


@pytest.mark.parametrize(
    ("gpu", "word"),
    [("GeForce RTX 3090 Ti", "ti"), ("H200 NVL", "nvl"), ("4090 D", "d"), ("A800-PCIe", "pcie")],
)
def test_variants_of_cards_are_said_to_be_others(gpu: str, word: str) -> None:
    kind, _, remark = device_of(gpu)
    assert remark == f"{gpu!r} is taken for {kind}, which is not {word}"
    assert not device_of("NVIDIA GeForce RTX 3080 Ti")[2] and not device_of("H100 NVL")[2]


@pytest.mark.parametrize(
    ("gpu", "words", "link"),
    [
        ("RTX A6000", "PCIe 4.0 x16", "pcie4"),
        ("RTX A6000", "NVLink bridge, PCIe 4.0", "nvlink3-bridge"),
        ("H100 PCIe", "no NVLink", "pcie5"),
        ("A100 80GB PCIe", "NVLink not installed", "pcie4"),
        ("A100 80GB PCIe", "NVLink (disabled)", "pcie4"),
        ("A100-SXM-80GB", "NVLink3 (not stated), no PCIe P2P", "nvlink3"),
        ("A100-SXM-80GB", "", "nvlink3"),
    ],
)
def test_links_of_runs_are_read_from_words(gpu: str, words: str, link: str) -> None:
    assert run("hardware", gpu=gpu, intra=words).link == link


def test_devices_are_counted_by_nodes_where_their_number_is_not_stated() -> None:
    row = {**GPT, "hardware": {"gpu": "H100", "nodes": 8, "gpus_per_node": 8}}
    regular, remarks = cleaned(row)
    found = run_of(regular)
    assert not isinstance(found, str)
    assert (found.devices, found.data) == (64, 16)
    assert "hardware.count is not stated; 8 nodes of 8 are 64" in remarks


@pytest.mark.parametrize(
    ("said", "recompute"),
    [
        (True, "full"),
        ("no recompute", "none"),
        ("per layer", "full"),
        ("selective op", "selective"),
        (False, "none"),
        ("full, no offload", "full"),
        ("no activation checkpointing", "none"),
        ("all layers: off", "none"),
    ],
)
def test_flags_and_recomputation_are_read_from_words(said: Any, recompute: str) -> None:
    found = run("parallel", recompute=said, sequence_parallel="not stated", compile="True")
    assert (found.recompute, found.sequence_parallel, found.compiled) == (recompute, False, True)


@pytest.mark.parametrize(
    ("said", "sums"), [(None, True), ("unknown", True), ("-", True), (True, True), ("no", False)]
)
def test_old_frameworks_sum_one_table_unless_a_row_says_that_there_are_two(said: Any, sums: bool) -> None:
    assert run("model", tied_embeddings=said).sums_tables is sums


@pytest.mark.parametrize(
    ("group", "fields", "why"),
    [
        ("parallel", {"stage": "LoRA Performance"}, "trains adapters and not all weights"),
        ("parallel", {"cpu_offload": "true"}, "weights or states on hosts are not predicted"),
        ("model", {"kind": "inference"}, "inference"),
    ],
)
def test_what_is_no_training_of_all_weights_is_refused(
    group: str, fields: dict[str, Any], why: str
) -> None:
    assert score({**GPT, group: {**GPT[group], **fields}}) == why


@pytest.mark.parametrize(
    ("words", "gigabytes_per_s"),
    [
        ("8x200Gb/s HDR IB per node (recalled)", 200),
        ("4x EDR per node (100Gb/s each)", 50),
        ("400Gb/s RDMA per GPU", 400),
        ("3.2 Tb/s EFA", 400),
        ("8x NDR", 400),
        ("100GbE", 12.5),
        ("8x400G", 400),
        ("200 Gb/s x8", 200),
        ("8×200 Gb/s", 200),
        ("4 HCAs of 200 Gb/s", 100),
        ("ConnectX-7, 400G per GPU", 400),
        ("2x HDR100", 25),
        ("not stated", 200),  # the usual build of this device's nodes
    ],
)
def test_networks_are_read_from_words(words: str, gigabytes_per_s: float) -> None:
    assert network_of(words, "a100-sxm-80gb", 8).node_bytes_per_s == gigabytes_per_s * 1e9


@pytest.mark.parametrize(
    ("words", "peer_access", "link"),
    [
        ("PCIe4 with patched P2P driver", True, "pcie4"),
        ("PCIe4 (no P2P)", False, "pcie4"),
        ("PCIe Gen5 x16, P2P disabled", False, "pcie5"),
        ("PCIe 6.0", False, "pcie6"),
        ("", False, "pcie4"),
    ],
)
def test_links_of_collectives_are_read_from_words(words: str, peer_access: bool, link: str) -> None:
    group = collectives.group_of({"gpu": "RTX4090", "intra": words}, 4)
    assert not isinstance(group, str)
    assert (group.peer_access, group.link) == (peer_access, link)
    twins = collectives.group_of({"gpu": "V100-SXM3", "intra": "NVSwitch"}, 16)
    assert not isinstance(twins, str) and twins.nodes == 1
