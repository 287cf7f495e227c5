"""Predictions follow changes of published rows: more work takes longer, a faster device never does."""

import copy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from published import compare, score  # noqa: E402 - benchmarks are no package
from published_clean import cleaned  # noqa: E402
from published_rows import run_of  # noqa: E402

from graphpar import catalogue  # noqa: E402
from graphpar.cost_models.training import step_time  # noqa: E402
from graphpar.cost_models.training_run import Run, parameters  # noqa: E402

Row = dict[str, Any]

DENSE: Row = {
    "id": "dense",
    "model": {
        "name": "llama3-8b", "layers": 32, "hidden": 4096, "heads": 32, "kv_heads": 8, "ffn": 14336,
        "vocab": 128256, "seq_len": 4096,
    },
    "hardware": {"gpu": "A100-SXM-80GB", "count": 64, "gpus_per_node": 8, "inter": "400Gb/s per GPU"},
    "parallel": {"tp": 2, "pp": 2, "dp": 16, "framework": "megatron-lm", "precision": "bf16"},
    "batch": {"global_batch": 128, "micro_batch": 1},
    "measured": {"tokens_per_s": 1e5},
}  # fmt: skip
OLD: Row = {
    **DENSE,
    "model": {"layers": 24, "hidden": 2048, "heads": 16, "ffn": 8192, "vocab": 50257, "seq_len": 2048},
    "parallel": {"tp": 2, "pp": 2, "dp": 16, "framework": "megatron-deepspeed", "recompute": "full"},
}
SHARDED: Row = {
    **DENSE,
    "parallel": {"fsdp": "FULL_SHARD", "zero": 3, "framework": "torchtitan", "compile": True},
    "batch": {"local_batch": 2, "micro_batch": 2, "global_batch": 128},
}
MIXTURE: Row = {
    **DENSE,
    "model": {
        "name": "qwen3", "layers": 48, "hidden": 2048, "heads": 32, "kv_heads": 4, "ffn": 6144,
        "seq_len": 4096, "moe": {"experts": 128, "topk": 8, "moe_ffn": 768},
    },
    "parallel": {"pp": 2, "dp": 32, "ep": 8, "framework": "megatron-bridge", "precision": "bf16"},
}  # fmt: skip
KINDS = {"dense": DENSE, "old": OLD, "sharded": SHARDED, "mixture": MIXTURE}

FASTER = (
    ("T4", "L4"), ("L4", "L40S"), ("V100-SXM2-32GB", "A100-SXM-40GB"), ("A100-SXM-40GB", "A100-SXM-80GB"),
    ("A100 80GB PCIe", "A100-SXM-80GB"), ("A800", "A100-SXM-80GB"), ("A100-SXM-80GB", "H100-SXM-80GB"),
    ("H100-SXM-80GB", "H200"), ("H20", "H200"), ("H200", "B200-SXM"), ("B200-SXM", "B300-SXM"),
    ("GB200", "GB300"), ("RTX 4080", "RTX 4090"), ("RTX 4090", "RTX 5090"), ("MI250X", "MI300X"),
    ("MI300X", "MI325X"),
)  # fmt: skip


def changed(row: Row, **groups: Row) -> Row:
    """The row with some fields of some groups in place of its own."""
    result = copy.deepcopy(row)
    for group, fields in groups.items():
        result[group] |= fields
    return result


def run(row: Row) -> Run:
    found = run_of(cleaned(row)[0])
    assert not isinstance(found, str), found
    return found


def seconds(row: Row) -> float:
    return step_time(run(row), parameters()).total_s


def remarks(row: Row) -> list[str]:
    found = score(row)
    assert isinstance(found, dict), found
    told: list[str] = found["remarks"]
    return told


@settings(max_examples=40)
@example("old", ("A100-SXM-80GB", "H100-SXM-80GB"), 512, 1, 2)  # its ranks are later than it gains
@given(
    st.sampled_from(sorted(KINDS)),
    st.sampled_from(FASTER),
    st.sampled_from([512, 2048, 8192]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2, 8]),
)
def test_a_faster_device_is_never_slower(
    kind: str, devices: tuple[str, str], length: int, micro: int, tensor: int
) -> None:
    row = changed(KINDS[kind], model={"seq_len": length}, batch={"micro_batch": micro})
    if kind in ("dense", "old"):
        # Kernels of frameworks go by the device's age: what is compared is the device.
        row = changed(row, parallel={"tp": tensor, "dp": 32 // tensor, "framework": "nemo"})
    slow, fast = (seconds(changed(row, hardware={"gpu": gpu})) for gpu in devices)
    assert fast <= slow * (1 + 1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_more_work_takes_longer_and_more_devices_are_no_gift(kind: str) -> None:
    row = KINDS[kind]
    base, data = seconds(row), run(row).data
    assert 1.4 * base < seconds(changed(row, batch={"global_batch": 256})) < 2.05 * base
    assert 1.5 * base < seconds(changed(row, model={"seq_len": 2 * row["model"]["seq_len"]})) < 4 * base
    assert 1.4 * base < seconds(changed(row, model={"layers": 2 * row["model"]["layers"]})) < 2.2 * base
    assert base <= seconds(changed(row, hardware={"inter": "100Gb/s per node"}))
    twice = changed(row, hardware={"count": 128}, parallel={"dp": 2 * data})
    # Each device has its part of the optimiser's state, and twice as many a smaller one.
    assert 0.99 * base < seconds(changed(twice, batch={"global_batch": 256})) < 1.2 * base
    assert 0.45 * base < seconds(twice) < base


def test_experts_of_any_number_cost_what_their_tokens_do() -> None:
    """Half-precision rows of weights are aligned however many tokens an expert gets."""
    base = seconds(MIXTURE)
    for experts in (120, 136, 144, 160, 192):
        moe = {**MIXTURE["model"]["moe"], "experts": experts}
        assert seconds(changed(MIXTURE, model={"moe": moe})) == pytest.approx(base, rel=0.15)
    bare = {"experts": 128, "topk": 8}
    assert run(changed(MIXTURE, model={"moe": bare})).shape.moe.ffn == 6144  # type: ignore[union-attr]


def test_experts_are_spread_as_far_as_memory_asks_where_a_row_does_not_say() -> None:
    row = changed(MIXTURE, parallel={"ep": None})
    few = changed(row, model={"moe": {"experts": 16, "topk": 8, "moe_ffn": 768}})
    assert (run(few).expert, run(row).expert) == (1, 4)
    assert "parallel.ep is not stated; 4 assumed, the fewest that fit" in remarks(row)


def test_gradients_of_experts_are_summed_over_fewer_devices() -> None:
    """With as many groups as devices nothing of them is left to send; each steps its part as before."""
    slow = changed(MIXTURE, hardware={"inter": "10Gb/s per node"}, parallel={"pp": 1, "dp": 64})
    few, many = (step_time(run(changed(slow, parallel={"ep": width})), parameters()) for width in (8, 64))
    assert many.data_s < 0.5 * few.data_s
    assert many.optimizer_s == pytest.approx(few.optimizer_s)


def test_only_neighbours_meet_over_a_bridge() -> None:
    """Tensor-parallel pairs do; replicas, every other card, meet over the bus."""
    row = changed(DENSE, hardware={"gpu": "H100 PCIe", "count": 4}, parallel={"pp": 1, "dp": 2})
    bridge, bus = (
        step_time(replace(run(row), link=link), parameters()) for link in ("nvlink4-bridge", "pcie5")
    )
    assert bridge.tensor_s < 0.7 * bus.tensor_s
    assert bridge.data_s == pytest.approx(bus.data_s)


def test_gaming_cards_reach_each_other_through_main_memory() -> None:
    """GeForce cards since Turing have no access to each other's memory over PCIe."""
    row = changed(DENSE, hardware={"gpu": "RTX 4090", "count": 4}, parallel={"tp": 4, "pp": 1, "dp": 1})
    cards = replace(run(row), overlaps_tensor=False)
    gaming, other = (
        step_time(replace(cards, device=kind, link="pcie4"), parameters())
        for kind in ("rtx-4090", "rtx-6000-ada")
    )
    assert 2 < gaming.tensor_s / other.tensor_s < 0.83 / 0.35 + 1e-9


def test_ranks_of_a_stage_share_the_network_to_the_next() -> None:
    """Each sends its part of a microbatch, divided by tokens or by width."""
    base = changed(DENSE, hardware={"count": 16}, batch={"global_batch": 8})
    sent = [
        step_time(run(changed(base, parallel={"dp": 1, "tp": 1, width: 8})), parameters()).pipeline_s
        for width in ("tp", "cp")
    ]
    assert sent[0] == pytest.approx(sent[1])


def test_keys_and_values_of_long_sequences_cross_a_slow_network() -> None:
    """Context parallelism is no free division of the sequence."""
    fields = {"tp": 1, "pp": 1, "cp": 16, "dp": 4}
    row = changed(DENSE, parallel=fields, batch={"global_batch": 4})
    fast, slow = (changed(row, hardware={"inter": words}) for words in ("8x400Gb/s", "10Gb/s per node"))
    parts = [step_time(run(r), parameters()).tensor_s for r in (fast, slow)]
    assert 0 < parts[0] < 0.1 * parts[1]


def test_hybrid_sharding_sums_its_shards_over_a_slow_network() -> None:
    row = changed(SHARDED, parallel={"fsdp": "HSDP"})
    slow = changed(row, hardware={"inter": "10Gb/s per node"})
    assert seconds(slow) > 1.2 * seconds(row)


@pytest.mark.parametrize(
    ("fields", "devices", "told"),
    [
        ({"fsdp": "HSDP"}, 64, (3, 8)),
        ({"fsdp": "HYBRID_SHARD", "tp": 2}, 64, (3, 4)),
        ({"fsdp": "HSDP", "tp": 8}, 64, (3, 1)),
        ({"fsdp": "HSDP"}, 4, (3, 0)),
        ({"fsdp": "16"}, 64, (3, 16)),
        ({"fsdp": 64}, 64, (3, 0)),
        ({"fsdp": 1}, 64, (3, 0)),
        ({"fsdp": "SHARD_GRAD_OP", "zero": None}, 64, (2, 0)),
        ({"fsdp": "NO_SHARD", "zero": None}, 64, (0, 0)),
        ({"fsdp": "optim_grads_params"}, 64, (3, 0)),
        ({"fsdp": 0, "zero": 1}, 64, (1, 0)),
    ],
)
def test_weights_are_sharded_over_the_ranks_that_a_row_says(
    fields: Row, devices: int, told: tuple[int, int]
) -> None:
    found = run(changed(SHARDED, parallel=fields, hardware={"count": devices}))
    assert (found.zero, found.shard_group) == told
    assert seconds(changed(SHARDED, parallel=fields)) > 0


def test_out_of_memory_is_called_and_how_narrowly() -> None:
    small = changed(DENSE, hardware={"gpu": "T4"}, measured={"oom": True})
    found = compare([DENSE, small])["out_of_memory"]
    assert (found["called_right"], found["missed"], found["called_wrongly"]) == (1, 0, 0)
    assert 0 < found["fullest_that_went_pct"] < 100 < found["emptiest_that_failed_pct"]
    wrong = compare([changed(DENSE, measured={"oom": True}), changed(small, measured={"oom": False})])
    assert (wrong["out_of_memory"]["missed"], wrong["out_of_memory"]["called_wrongly"]) == (1, 1)


def test_widths_that_do_not_fit_the_devices_are_said() -> None:
    odd = changed(MIXTURE, parallel={"ep": 128})
    assert "experts in groups of 128 do not fit the 32 devices of a stage" in remarks(odd)
    assert run(odd).expert == run(changed(odd, parallel={"ep": None})).expert
    odd = changed(DENSE, parallel={"tp": 3})
    assert "the widths make 96 devices, and 64 are stated" in remarks(odd)


def test_words_about_a_tray_are_not_about_all_devices_that_nvlink_joins() -> None:
    """Four cards in a tray of four GB200 are a card each, also among 72 of them."""
    row = changed(MIXTURE, hardware={"gpu": "GB200", "gpus_per_node": 4, "inter": "4x400Gb/s"})
    found = run(row)
    assert found.per_node == 72
    assert found.network.node_bytes_per_s / found.per_node == pytest.approx(50e9)
    nodes = changed(DENSE, hardware={"gpus_per_node": None, "nodes": 16})
    assert run(nodes).per_node == 4


@pytest.mark.parametrize(
    ("name", "fields", "told"),
    [
        ("Kimi_K2", {"attention": "MLA"}, (1536, 512, 160, 1)),
        ("DeepSeek V3", {}, (1536, 512, 160, 1)),
        ("DeepSeek-V2", {"q_lora": 1536, "kv_lora": 512, "shared_experts": 2}, (1536, 512, 160, 2)),
        ("deepseek_v3.1", {}, (1536, 512, 160, 1)),
        ("DeepSeek 33B", {}, (0, 0, 64, 0)),
        ("DeepSeek-R1-Distill-Llama-70B", {}, (0, 0, 64, 0)),
        ("Qwen3 30B-A3B", {}, (0, 0, 128, 0)),
        ("GPT OSS 120B", {}, (0, 0, 64, 0)),
        ("qwen-32b", {}, (0, 0, 64, 0)),
    ],
)
def test_families_are_known_by_their_names_however_written(
    name: str, fields: Row, told: tuple[int, int, int, int]
) -> None:
    moe = {**MIXTURE["model"]["moe"], **fields}
    shape = run(changed(MIXTURE, model={"name": name, "moe": moe})).shape
    assert shape.moe is not None
    assert (shape.query_rank, shape.value_rank, shape.head, shape.moe.shared_experts) == told
    assert shape.moe.biased == name.startswith("GPT")


def test_dense_families_are_gated_unless_their_rows_say_otherwise() -> None:
    assert run(DENSE).shape.gated
    assert not run(changed(DENSE, model={"gated_mlp": False})).shape.gated
    assert not run(changed(DENSE, model={"name": "gpt-8B"})).shape.gated


def test_what_is_taken_for_granted_is_said_and_a_step_of_unknown_size_refused() -> None:
    assert remarks(DENSE) == ["parallel.recompute is not stated; none assumed"]
    silent = changed(DENSE, hardware={"inter": "not stated"}, parallel={"framework": None})
    assert len(remarks(changed(silent, batch={"micro_batch": None}))) == 4
    bare = {**DENSE, "batch": {"micro_batch": 1}, "measured": {"step_time_s": 1.0}}
    assert score(bare) == "a step's time, but of how many microbatches is not stated"
    assert isinstance(score({**bare, "measured": {"tokens_per_s": 1e5}}), dict)


@pytest.mark.parametrize(
    ("gpu", "precision", "dtype"),
    [
        ("V100-SXM2-32GB", None, "float16"),
        ("V100-SXM2-32GB", "mixed", "float16"),
        ("GeForce GTX 1080Ti", "amp", "float16"),
        ("A100-SXM-80GB", None, "bfloat16"),
        ("A100-SXM-80GB", "mixed", "bfloat16"),
        ("A100-SXM-80GB", "fp16 AMP", "float16"),
        ("Quadro RTX 5000", "fp32", "float32"),
    ],
)
def test_half_precision_is_the_one_that_the_device_has(gpu: str, precision: str, dtype: str) -> None:
    row = changed(OLD, hardware={"gpu": gpu}, parallel={"precision": precision})
    assert run(row).dtype == dtype
    # A format that it does not have is computed in the next wider one.
    stated = changed(OLD, hardware={"gpu": "V100-SXM2-32GB"}, parallel={"precision": "bf16"})
    assert seconds(stated) > 3 * seconds(changed(stated, parallel={"precision": "fp16"}))


def test_every_gpu_has_a_rate_in_float32() -> None:
    """What lacks it would be priced at the rate of its tensor cores."""
    for kind, device in catalogue.devices().items():
        if device.vendor in ("NVIDIA", "AMD") and not device.is_cpu:
            assert "float32" in device.peak_flops_per_s, kind
