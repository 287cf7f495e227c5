"""Rows of published tables: whatever one lacks or misspells, it is predicted or refused with a reason."""

import copy
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import collectives  # noqa: E402 - benchmarks are no package
from published import compare, score  # noqa: E402 - benchmarks are no package
from published_clean import cleaned, rows_of  # noqa: E402
from published_devices import device_of, die_of  # noqa: E402
from published_noise import noise  # noqa: E402
from published_rows import run_of  # noqa: E402

from graphpar import catalogue  # noqa: E402
from graphpar.cost_models.training import step_time  # noqa: E402
from graphpar.cost_models.training_run import parameters  # noqa: E402

GPT: dict[str, Any] = {
    "id": "gpt",
    "set": "gpt",
    "model": {"layers": 24, "hidden": 2048, "heads": 16, "ffn": 8192, "vocab": 50257, "seq_len": 1024},
    "hardware": {"gpu": "A100-SXM-80GB", "gpus_per_node": 8, "count": 8, "inter": "800Gb/s per node"},
    "parallel": {"tp": 2, "pp": 2, "dp": 2, "recompute": "full", "framework": "megatron-lm"},
    "batch": {"global_batch": 32, "micro_batch": 4},
    "measured": {"step_time_s": 1.0, "mem_gb": 20},
}
MIXTURE: dict[str, Any] = {
    "id": "mixture",
    "set": "mixture",
    "model": {
        "layers": 36, "hidden": 2880, "heads": 64, "kv_heads": 8, "ffn": 2880, "seq_len": 4096,
        "moe": {"experts": 128, "topk": 4, "moe_ffn": 2880},
    },
    "hardware": {"gpu": "GB200", "gpus_per_node": 72, "count": 64},
    "parallel": {"tp": 1, "ep": 64, "dp": 64, "precision": "MXFP8", "framework": "megatron-bridge"},
    "batch": {"global_batch": 1280, "micro_batch": 4},
    "measured": {"tokens_per_s_per_gpu": 20000.0},
}  # fmt: skip
SHARDED: dict[str, Any] = {
    "id": "sharded",
    "set": "sharded",
    "model": {
        "layers": 32,
        "hidden": 4096,
        "heads": 32,
        "ffn": 14336,
        "gated_mlp": True,
        "seq_len": 8192,
    },
    "hardware": {"gpu": "H100", "count": 64, "inter": "400Gb/s RDMA per GPU"},
    "parallel": {
        "fsdp": "FULL_SHARD",
        "zero": "stage 3",
        "recompute": "selective",
        "framework": "torchtitan",
    },
    "batch": {"local_batch": 2},
    "measured": {"tokens_per_s": "350,000"},
}
ROWS = (GPT, MIXTURE, SHARDED)
FIELDS = [
    (i, group, key) for i, row in enumerate(ROWS) for group in row if isinstance(row[group], dict)
    for key in row[group]
]  # fmt: skip
ODD: tuple[Any, ...] = (
    None,
    0,
    -1,
    "weird",
    "16",
    3,
    7.5,
    [],
    {},
    True,
    float("nan"),
    float("inf"),
    10**400,
    "1e999",
    10**7,
    10**30,
    1e-300,
    b"x",
)


def check(row: dict[str, Any]) -> None:
    result = score(row)
    if isinstance(result, dict):
        assert math.isfinite(result["predicted_s"])
        assert result["predicted_s"] > 0
        assert 0 < result["predicted_bytes"] <= result["bound_bytes"] < math.inf
    else:
        assert result


@pytest.mark.parametrize("row", ROWS, ids=lambda row: str(row["id"]))
def test_whole_rows_are_scored(row: dict[str, Any]) -> None:
    result = score(row)
    assert isinstance(result, dict)
    assert result["error_pct"] is not None


@given(st.lists(st.tuples(st.sampled_from(FIELDS), st.sampled_from(ODD)), max_size=4))
def test_rows_with_odd_fields_are_scored_or_refused_with_a_reason(
    changes: list[tuple[tuple[int, str, str], Any]],
) -> None:
    rows = copy.deepcopy(ROWS)
    for (i, group, key), value in changes:
        rows[i][group][key] = value
    for row in rows:
        check(row)


@pytest.mark.parametrize("value", ODD, ids=str)
@pytest.mark.parametrize("key", ["id", "set", "source", *(k for k in GPT if isinstance(GPT[k], dict))])
def test_rows_with_odd_groups_are_scored_or_refused_with_a_reason(key: str, value: Any) -> None:
    for row in ROWS:
        json.dumps(compare([{**row, key: value}]))
        check({**row, key: value})


@pytest.mark.parametrize("value", ODD, ids=str)
def test_what_is_no_row_is_refused(value: Any) -> None:
    assert len(compare([value])["skipped"]) == 1
    assert len(collectives.compare([value])["skipped"]) == 1


def test_recomputation_that_times_refute_is_left_out_where_memory_allows() -> None:
    refuted = {"table": "data/ground_truth_single.csv"}
    deep = {**GPT["model"], "layers": 60, "hidden": 4096, "heads": 32, "ffn": 16384}
    for model, recompute in ((GPT["model"], "none"), (deep, "full")):
        row, _ = cleaned({**GPT, "model": model, "source": refuted})
        run = run_of(row)
        assert not isinstance(run, str)
        assert run.recompute == recompute


def test_more_stages_than_layers_are_refused() -> None:
    assert score({**GPT, "parallel": {"pp": 25, "dp": 1}}) == "25 pipeline stages for 24 layers"


@pytest.mark.parametrize("text", ["rows: 5", "a: 1", "a: [", "5", ""])
def test_files_that_are_no_tables_are_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "table.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit, match="table"):
        rows_of(path)


@pytest.mark.parametrize(("i", "group", "key"), FIELDS)
def test_rows_without_a_field_are_scored_or_refused_with_a_reason(i: int, group: str, key: str) -> None:
    row = copy.deepcopy(ROWS[i])
    del row[group][key]
    check(row)


def test_a_row_without_groups_is_refused() -> None:
    assert compare([{}, {"id": "x", "reliability": "C"}])["rows"] == []


def test_widths_that_do_not_fit_the_devices_are_put_right_and_said() -> None:
    row, remarks = cleaned({**GPT, "parallel": {**GPT["parallel"], "dp": 4}})
    assert row["parallel"]["dp"] == 2
    assert remarks == ["dp 4 does not fit 8 devices; 2 assumed"]


@pytest.mark.parametrize(
    ("gpu", "kind"),
    [
        ("A800", "a800-sxm-80gb"), ("H800-SXM-80GB", "h800-sxm-80gb"), ("MI250X", "mi250x"),
        ("MI300X", "mi300x"), ("NVIDIA L40S", "l40s"), ("A10G", "a10g"), ("GeForce RTX 4090", "rtx-4090"),
        ("Quadro RTX 6000", "rtx-6000"), ("RTX 6000 Ada", "rtx-6000-ada"),
        ("B200", "b200-sxm"), ("GH200", "gh200-96gb"), ("H100 SXM5", "h100-sxm-80gb"),
        ("NVIDIA A100-PCIE-40GB", "a100-pcie-40gb"), ("A100-40G", "a100-sxm-40gb"),
        ("A100 (40 GB)", "a100-sxm-40gb"), ("tesla v100-pcie-16gb", "v100-pcie-16gb"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("row", ROWS, ids=lambda row: str(row["id"]))
def test_rows_of_other_gpus_are_scored(gpu: str, kind: str, row: dict[str, Any]) -> None:
    assert device_of(gpu)[0] == kind
    assert isinstance(score({**row, "hardware": {**row["hardware"], "gpu": gpu}}), dict)


@pytest.mark.parametrize("gpu", ["TPU v4", "Gaudi2", "Trainium2", "Apple M2 Ultra", "cpu"])
def test_what_is_no_gpu_is_refused(gpu: str) -> None:
    found = score({**GPT, "hardware": {**GPT["hardware"], "gpu": gpu}})
    assert found == f"device {gpu!r} is no GPU; only those are predicted without a graph"
    assert collectives.score({**COLLECTIVE, "gpu": gpu}) == found


@pytest.mark.parametrize("gpu", ["K80", "T400", "B100", "Ascend 910B", "RTX 9999 Super", "?"])
def test_devices_unlike_any_of_the_catalogue_are_refused(gpu: str) -> None:
    found = score({**GPT, "hardware": {**GPT["hardware"], "gpu": gpu}})
    assert found == f"device {gpu!r} is not in the catalogue"
    assert collectives.score({**COLLECTIVE, "gpu": gpu}) == found


def test_the_head_fills_up_a_stage_of_few_layers_first() -> None:
    def step(layers: int) -> float:
        model = {**GPT["model"], "layers": layers}
        result = score({**GPT, "model": model, "parallel": {**GPT["parallel"], "pp": 4, "dp": 1}})
        assert isinstance(result, dict)
        return float(result["predicted_s"])

    even, one_more, full = step(40), step(41), step(44)
    assert full - one_more > 1.05 * (one_more - even)


@pytest.mark.parametrize(
    ("framework", "stages", "samples", "overlaps"),
    [
        ("megatron-lm", 1, 4, True),  # one microbatch: torch's wrapper
        ("megatron-lm", 1, 8, False),
        ("megatron-lm", 2, 4, False),
        ("megatron-deepspeed", 1, 4, False),
    ],
)
def test_old_frameworks_hide_sums_of_gradients_behind_a_single_backward(
    framework: str, stages: int, samples: int, overlaps: bool
) -> None:
    parallel = {"tp": 1, "pp": stages, "dp": 8 // stages, "framework": framework}
    batch = {"global_batch": samples * 8 // stages, "micro_batch": 4}
    run = run_of(cleaned({**GPT, "parallel": parallel, "batch": batch})[0])
    assert not isinstance(run, str)
    assert run.overlaps is overlaps


@pytest.mark.parametrize(
    ("family", "slower"), [("qwen3", {}), ("gpt-oss-120b", {"26.04": True, "26.06": False})]
)
def test_biased_experts_cost_more_until_releases_fuse_them(family: str, slower: dict[str, bool]) -> None:
    """Megatron Core adds biases expert by expert in float32; fused products add them themselves."""

    def seconds(name: str, release: str) -> float:
        row = copy.deepcopy(MIXTURE)
        row["model"]["name"] = name
        row["source"] = {"table": f"{release} NeMo Container"}
        run = run_of(cleaned(row)[0])
        assert not isinstance(run, str)
        plain = replace(run, shape=replace(run.shape, head_size=64))
        return step_time(plain, parameters()).total_s

    for release in ("26.04", "26.06"):
        ratio = seconds(family, release) / seconds("some mixture", release)
        assert (1.1 < ratio < 1.5) if slower.get(release) else ratio == pytest.approx(1.0)
    assert seconds(family, "26.06") < 0.9 * seconds(family, "26.04")


@pytest.mark.parametrize(("change", "said"), [
    ({}, "captured"),
    ({"release": "26.04"}, ""),
    ({"precision": "BF16"}, ""),
    ({"precision": "FP8"}, ""),
    ({"gpu": "H100-SXM-80GB"}, ""),
    ({"framework": "torchtitan"}, ""),
    ({"model": "kimi-k2"}, ""),
    ({"model": "kimi-k2", "gpu": "GB300"}, "captured scaled"),
    ({"model": "kimi-k2", "gpu": "GB300", "release": "26.06"}, ""),
    ({"gpu": "B300"}, ""),
    ({"gpu": "B300", "model": "qwen3-30b-a3b"}, "captured"),
    ({"gpu": "B200", "model": "qwen3-30b-a3b"}, ""),
    ({"gpu": "B300", "model": "deepseek-v3", "release": "26.06"}, ""),
    ({"gpu": "B300", "model": "deepseek-v3", "release": "26.06.01"}, "captured scaled"),
    ({"model": "deepseek-v3"}, "captured"),
    ({"gpu": "GB300", "model": "deepseek-v3", "precision": "BF16"}, ""),
    ({"gpu": "GB300", "model": "deepseek-coder"}, "captured"),
    ({"gpu": "B200", "model": "deepseek-v3", "release": "26.04.01", "virtual_stages": 2}, "overlaps"),
    ({"gpu": "B200", "model": "deepseek-v3", "release": "26.04.01"}, ""),
    ({"gpu": "B200", "model": "deepseek-v3", "release": "26.04", "virtual_stages": 2}, ""),
])  # fmt: skip
def test_recipes_do_what_their_releases_say(change: dict[str, Any], said: str) -> None:
    row = copy.deepcopy(MIXTURE)
    row["source"] = {"table": f"{change.get('release', '26.08')} NeMo Container"}
    row["hardware"]["gpu"] = change.get("gpu", "GB200")
    row["model"]["name"] = change.get("model", "some mixture")
    row["parallel"] |= {k: change[k] for k in ("precision", "framework", "virtual_stages") if k in change}
    run = run_of(cleaned(row)[0])
    assert not isinstance(run, str)
    captured = "captured" in said
    assert (run.captured, run.fused_experts) == (captured, captured)
    assert (run.overlaps_experts, run.scaled_attention) == (bool(said), "scaled" in said)
    if said:
        alone = replace(run, overlaps_experts=False, scaled_attention=False)
        assert step_time(run, parameters()).total_s < step_time(alone, parameters()).total_s


def test_cards_of_two_dies_are_counted_as_tables_count_them() -> None:
    assert (die_of("mi250x", 8), die_of("mi250x", 4), die_of("mi300x", 8)) == (
        "mi250x-gcd",
        "mi250x",
        "mi300x",
    )
    for per_node in (8, None):  # nodes of eight are what is assumed of so many devices
        hardware = {**GPT["hardware"], "gpu": "MI250X", "gpus_per_node": per_node}
        dies = run_of(cleaned({**GPT, "hardware": hardware})[0])
        assert not isinstance(dies, str)
        assert dies.device == "mi250x-gcd"


@pytest.mark.parametrize("framework", ["megatron-lm", "megatron-deepspeed"])
def test_what_old_frameworks_could_not_run_was_run_by_newer_ones(framework: str) -> None:
    parallel = {**GPT["parallel"], "framework": framework}
    plain, gated = (
        run_of(cleaned({**GPT, "model": {**GPT["model"], "gated_mlp": gated}, "parallel": parallel})[0])
        for gated in (False, True)
    )
    assert not isinstance(plain, str) and not isinstance(gated, str)
    assert (plain.fused_attention, gated.fused_attention) == (False, True)
    # Their models have two tables, and since then DeepSpeed's stages send slices of gradients.
    assert plain.sums_tables and not gated.sums_tables and not gated.sends_whole
    assert plain.sends_whole is (framework == "megatron-deepspeed")


LLAMA = {
    "layers": 32, "hidden": 4096, "heads": 32, "kv_heads": 8, "ffn": 14336, "vocab": 128256,
    "gated_mlp": True, "seq_len": 8192,
}  # fmt: skip
EIGHT_EXPERTS = {**LLAMA, "seq_len": 4096, "moe": {"experts": 8, "topk": 2, "moe_ffn": 14336}}


@pytest.mark.parametrize(
    ("gpu", "count", "model", "parallel", "samples"),
    [
        ("A40", 8, LLAMA, {"framework": "fsdp", "zero": 3, "recompute": "full"}, 1),
        ("L40S", 16, LLAMA, {"framework": "fsdp", "zero": 3, "recompute": "full"}, 1),
        ("H200", 8, LLAMA, {"framework": "torchtitan", "compile": True, "recompute": "selective"}, 2),
        ("H20", 16, LLAMA, {"framework": "nemo", "tp": 2, "dp": 8}, 4),
        ("MI250X", 64, LLAMA, {"framework": "torchtitan", "compile": True, "recompute": "selective"}, 1),
        ("MI300X", 64, LLAMA, {"framework": "megatron-lm", "tp": 8, "dp": 8}, 8),
        ("A800", 64, LLAMA, {"framework": "megatron-lm", "tp": 2, "dp": 32, "recompute": "full"}, 16),
        ("B200", 8, LLAMA, {"framework": "megatron-bridge", "dp": 8}, 16),
        ("GB300", 72, LLAMA, {"framework": "megatron-bridge", "tp": 4, "dp": 18}, 16),
        ("V100-SXM2-16GB", 32, GPT["model"], {"framework": "megatron-deepspeed", "pp": 4, "dp": 8}, 64),
        ("H100", 16384, LLAMA, {"framework": "megatron-core", "tp": 8, "dp": 2048}, 16),
        ("H100", 64, EIGHT_EXPERTS, {"framework": "nemo", "pp": 4, "ep": 8, "dp": 16}, 32),
        ("A100-SXM-40GB", 128, EIGHT_EXPERTS, {"framework": "nemo", "tp": 4, "ep": 8, "dp": 32}, 32),
    ],
)  # fmt: skip
def test_made_up_runs_use_a_sensible_share_of_their_devices(
    gpu: str, count: int, model: dict[str, Any], parallel: dict[str, Any], samples: int
) -> None:
    hardware = {"gpu": gpu, "count": count, "gpus_per_node": 8}
    batch = {"global_batch": samples * int(parallel.get("dp", count)), "micro_batch": 1}
    run = run_of(cleaned({"model": model, "hardware": hardware, "parallel": parallel, "batch": batch})[0])
    assert not isinstance(run, str)
    chosen, experts = (2, 8) if run.shape.moe else (1, 1)
    attention = run.shape.attention_parameters
    layer = attention + (run.shape.layer_parameters - attention) * chosen / experts
    weights = run.shape.layers * layer + run.shape.hidden * run.shape.outputs
    scores = run.shape.layers * run.shape.hidden * run.shape.seq_len
    flops = run.batch * run.shape.seq_len * 6 * (weights + scores)
    device = catalogue.devices()[run.device]
    peak = max(device.peak_flops_per_s.get(dtype, 0.0) for dtype in ("bfloat16", "float16"))
    share = flops / (step_time(run, parameters()).total_s * run.devices * peak)
    # One of few multipliers and fast memory (H20: products at 0.96 of the peak) is used more than others.
    assert 0.2 < share < 0.65 * max((device.measured_fraction("bfloat16") or 0.0) / 0.8, 1.0)


def test_noise_is_told_from_repetitions_and_limits_ranks() -> None:
    def row(micro_batch: int, seconds: float) -> dict[str, Any]:
        batch = {"global_batch": 32, "micro_batch": micro_batch}
        return {**GPT, "batch": batch, "measured": {"step_time_s": seconds}}

    times = [1.0, 1.1, 1.2, 1.3, 1.4]
    rows = [row(2**i, t) for i, t in enumerate(times)] + [row(1, 1.0), row(1, 1.1)]
    found = noise(rows)
    assert found["repeated"]["gpt"]["groups"] == 1  # the copy of a measurement is none
    assert found["repeated"]["gpt"]["spread_pct"] == pytest.approx(100 * math.log(1.1) / 2**0.5)
    ceilings = found["jobs"][0]["ceiling"]
    assert 1 > ceilings[2.0] > ceilings[5.0] > 0.5
    (tied,) = noise([row(2**i, 1.0) for i in range(5)])["jobs"]
    assert set(tied["ceiling"].values()) == {None} and tied["reached"] is None


COLLECTIVE = {
    "id": "c", "op": "all-reduce", "gpu": "H100-SXM", "n_gpus": 16, "size_bytes": 2**30,
    "busbw_GBps": 200.0,
}  # fmt: skip


@given(
    st.lists(st.tuples(st.sampled_from([*COLLECTIVE, "nodes", "intra", "inter"]), st.sampled_from(ODD)))
)
@example(changes=[("n_gpus", 3), ("nodes", -1)])
@example(changes=[("nodes", 3)])
def test_odd_collectives_are_scored_or_refused_with_a_reason(changes: list[tuple[str, Any]]) -> None:
    result = collectives.score({**COLLECTIVE, **dict(changes)})
    if isinstance(result, dict):
        assert math.isfinite(result["predicted_s"])
        assert result["predicted_s"] > 0
    else:
        assert result


@pytest.mark.parametrize("nodes", [0, -1, 7.5, float("nan"), "many", True, [], 3, 32])
def test_collectives_over_impossible_nodes_are_refused_with_what_was_said(nodes: Any) -> None:
    assert collectives.score({**COLLECTIVE, "nodes": nodes}) == f"{nodes!r} nodes for 16 ranks"


@pytest.mark.parametrize(
    "name", ["allreduce", "All-Gather", "reduce_scatter", "alltoall", "sendrecv", "reduce"]
)
def test_collectives_are_known_by_their_usual_names(name: str) -> None:
    assert isinstance(collectives.score({**COLLECTIVE, "op": name}), dict)
