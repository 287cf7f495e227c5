"""From a row of a table of published training runs to a `Run` of the cost model.

What a framework does (fused attention, overlap, dropout, gradient format) is read from its name and
age, which is public knowledge about the software, the same for every row of every source.
"""

import math
import re
from dataclasses import dataclass, replace
from typing import Any

from published_devices import device_of, die_of, network_of

from graphpar import catalogue
from graphpar.cost_models.training_memory import fits, weights_of_stage
from graphpar.cost_models.training_run import Run
from graphpar.cost_models.transformer import ModelShape, MoeShape


@dataclass(frozen=True)
class Traits:
    """What a training framework does."""

    fused_attention: bool = True
    fused_pointwise: bool = True
    fused_loss: bool = False
    compiled: bool = False
    dropout: bool = False
    overlaps: bool = True
    gradient_bytes: float = 4.0
    state_bytes: float = 12.0
    zero: int = 0
    bucket_elements: float = 0.0
    fallback_softmax: bool = False
    vendor_attention: bool = False
    overlaps_tensor: bool = False
    selects_layers: bool = False
    may_shard: bool = False
    accumulates: bool = False
    logit_bytes: float = 14.0
    selects_products: bool = False
    adds_gradients: bool = False
    stops_early: bool = False
    gathers_late: bool = False
    keeps_outputs: bool = False
    reduces_half: bool = False
    overlaps_alone: bool = False
    separate_projections: bool = False
    growing_segments: bool = False
    keeps_gathered: bool = False
    divides_loss: bool = False


OLD_MEGATRON = Traits(
    False,
    dropout=True,
    overlaps=False,
    gradient_bytes=2.0,
    logit_bytes=13.0,
    fallback_softmax=True,
    adds_gradients=True,
    overlaps_alone=True,
)
"""Before 2023: scores in memory, dropout everywhere, gradients summed after backward, or beside it by
torch's wrapper where one microbatch is all (its README, "Distributed Pretraining")."""

DEEPSPEED = replace(OLD_MEGATRON, bucket_elements=5e8, keeps_outputs=True, overlaps_alone=False)
"""Its buckets hold 5e8 elements unless configured otherwise."""

MODERN_MEGATRON = Traits(
    fused_loss=True,
    compiled=True,
    zero=1,
    vendor_attention=True,
    overlaps_tensor=True,
    may_shard=True,
    accumulates=True,
    reduces_half=True,
)
"""Megatron Core as of 2024: vendor attention, overlapped collectives, the optimiser distributed, weights
sharded where they would not fit."""

TITAN = Traits(
    fused_pointwise=False,
    zero=3,
    selects_products=True,
    stops_early=True,
    separate_projections=True,
    growing_segments=True,
    keeps_gathered=True,
    divides_loss=True,
)
"""Its layers and what it recomputes: https://github.com/pytorch/torchtitan/tree/main/torchtitan/models/llama3.
Its launcher, `run_train.sh`, has the allocator's segments grow; `parallelize_llama.py` keeps weights
gathered in a pipeline and divides the loss by vocabulary (`loss_parallel`)."""

FRAMEWORKS = (
    ("megatron-lm/deepspeed", replace(DEEPSPEED, zero=1)),
    ("megatron-deepspeed", DEEPSPEED),
    ("megatron-bridge", MODERN_MEGATRON),
    ("megatron-core", MODERN_MEGATRON),
    ("megatron core", MODERN_MEGATRON),
    ("nemo", MODERN_MEGATRON),
    ("megatron", OLD_MEGATRON),
    ("composer", Traits(True, False, fused_loss=True, zero=3, stops_early=True, gathers_late=True)),
    ("torchtitan", TITAN),
    (
        "fms-fsdp",
        Traits(compiled=True, gradient_bytes=2.0, zero=3, selects_layers=True, stops_early=True),
    ),
    ("nanotron", Traits(True, False, zero=1)),
    ("nnscaler", Traits(True, False, separate_projections=True)),
    ("deepspeed", DEEPSPEED),
    ("fsdp", Traits(True, False, zero=3, stops_early=True)),
    ("jax", Traits(compiled=True, zero=3)),
    ("maxtext", Traits(compiled=True, zero=3)),
    ("pytorch", Traits(False, False, dropout=True, gradient_bytes=2.0, separate_projections=True)),
)
"""By a part of the framework's name, the first that fits."""

YOUNG_FAMILIES = frozenset({"hopper", "blackwell", "blackwell-sm100", "blackwell-sm103", "cdna3"})

BERT = {
    "bert_base_squad": ModelShape(12, 768, 12, 12, 3072, 30522, 384, tied=True, causal=False, labels=2),
    "bert_large_squad": ModelShape(24, 1024, 16, 16, 4096, 30522, 384, tied=True, causal=False, labels=2),
}

HEAD_SIZES = {"qwen3": 128, "gpt-oss": 64, "deepseek-v3": 160, "kimi-k2": 160, "nemotron4": 0}
"""Attention head sizes of families whose heads do not divide the hidden size; for latent attention the
mean of the query-key and value sizes."""

BIASED_EXPERTS = ("gpt-oss",)
"""Families whose experts have biases and clamped activations (https://arxiv.org/abs/2508.10925)."""

DEVICES_PER_HOST = {"gb200": 4, "gb300": 4}
"""Devices that one operating system drives, where it is not a whole node of eight."""


CAPTURED_STEPS = (
    ("kimi", r"gb[23]00", (26, 8)),
    ("", r"gb[23]00", (26, 6)),
    ("qwen3", "b300", (26, 6)),
    ("qwen3-235b", "b200", (26, 6)),
    ("deepseek", "b300", (26, 6, 1)),
)
"""Models, devices and the NeMo release since which MXFP8 recipes capture whole steps as CUDA graphs,
with products of experts that apply activations and casts, and all-to-alls beside other microbatches
(https://github.com/NVIDIA-NeMo/Megatron-Bridge/pull/3983, 4173, 4226, 4249, 4458, 4606, 5168). gpt-oss's
are for GB200 and GB300 only, and Qwen3's 30B does not fit a B200 (pull/5356)."""


def run_of(row: dict[str, Any]) -> Run | str:
    """The run that a cleaned row describes, or why it cannot be predicted."""
    if row.get("reliability") == "C":
        return "reliability C"
    row = _with_planned_widths(row)
    shape = _shape(row["model"])
    if isinstance(shape, str):
        return shape
    if not row["hardware"].get("gpu"):
        return "no device"
    if (row["parallel"].get("pp") or 1) > shape.layers:
        return f"{row['parallel']['pp']} pipeline stages for {shape.layers} layers"
    try:
        device, memory_bytes, _ = device_of(str(row["hardware"]["gpu"]))
        device = die_of(device, _per_node(row))
    except ValueError as error:
        return str(error)
    traits = _traits(row)
    batch = _batches(row, traits)
    if batch is None:
        return "no batch size"
    run = replace(_run(row, shape, device, batch, traits), memory_bytes=memory_bytes)
    if refuted(row):
        run = replace(run, recompute="none", pads_vocab=False)
        run = run if fits(run) else replace(run, recompute="full")
    return _adapted(run, traits)


REFUTED = frozenset({"data/ground_truth_single.csv"})
"""Tables that were transcribed with full recomputation assumed, which their times refute: with it a layer
of width 2048 and eight samples would reach 219 of A100's 250 TFLOP/s in spite of its
unfused traffic. Without it, and with the vocabulary as it stands where one rank holds it, steps on one
tensor-parallel rank scatter by 1 % about the prediction at width 2048, and not by 6 %."""


def refuted(row: dict[str, Any]) -> str:
    """What the row's own times say against what it states, or nothing."""
    known = str(row["source"].get("table")) in REFUTED and row["parallel"].get("recompute") == "full"
    return "recomputation is refuted by the table's times; taken only where memory asks for it" * known


LAYER_SHARES = tuple(i / 8 for i in range(9))


def _adapted(run: Run, traits: Traits) -> Run:
    """The run with what its framework decides by itself from the memory at hand."""
    capacity = run.memory_bytes or catalogue.devices()[run.device].memory_bytes
    if traits.may_shard and run.zero < 3 and run.data > 1:
        held = weights_of_stage(run, 0) * (2.0 + run.gradient_bytes)
        if held > capacity:
            run = replace(run, zero=3)
    if traits.selects_layers and run.recompute == "selective":
        # Whole layers run again, no more of them than memory asks for.
        shares = [replace(run, recompute="full", recompute_share=share) for share in LAYER_SHARES]
        run = next((r for r in shares if fits(r)), shares[-1])
    return run


def _with_planned_widths(row: dict[str, Any]) -> dict[str, Any]:
    """An automatic plan over some devices: what is no pipeline stage splits layers among its devices."""
    parallel = row["parallel"]
    planned = parallel.get("plan_gpus") or 0
    if not planned or parallel.get("tp"):
        return row
    return {**row, "parallel": {**parallel, "tp": max(planned // (parallel.get("pp") or 1), 1)}}


def _run(
    row: dict[str, Any], shape: ModelShape, device: str, batch: tuple[float, float], traits: Traits
) -> Run:
    parallel, hardware = row["parallel"], row["hardware"]
    per_node = _per_node(row)
    intra = str(hardware.get("intra") or "")
    if device.startswith("gb") or "NVL72" in intra:
        per_node = 72
    zero = parallel.get("zero")
    fsdp = parallel.get("fsdp")
    if fsdp and str(fsdp) not in ("0", "None"):
        zero = 3
    captured = _captures_steps(row, device, traits)
    return Run(
        shape=shape,
        device=device,
        devices=_count(row),
        per_node=per_node,
        network=network_of(str(hardware.get("inter") or ""), device, per_node),
        batch=batch[0],
        microbatch=batch[1],
        tensor=parallel.get("tp") or 1,
        pipeline=parallel.get("pp") or 1,
        data=_data_width(row),
        context=parallel.get("cp") or 1,
        expert=parallel.get("ep") or 1,
        expert_tensor=parallel.get("etp") or 1,
        virtual=parallel.get("virtual_stages") or 1,
        zero=traits.zero if zero is None else zero,
        recompute=_recompute(parallel.get("recompute")),
        dtype=_dtype(parallel),
        fused_attention=traits.fused_attention,
        fused_pointwise=traits.fused_pointwise or bool(parallel.get("compile")),
        fused_loss=traits.fused_loss,
        compiled=traits.compiled or bool(parallel.get("compile")),
        sequence_parallel=_sequence_parallel(parallel),
        dropout=traits.dropout,
        overlaps=traits.overlaps or (traits.overlaps_alone and _is_alone(row, batch)),
        gradient_bytes=2.0 if parallel.get("fsdp_mixed_precision") == "PURE" else traits.gradient_bytes,
        state_bytes=traits.state_bytes,
        bucket_elements=traits.bucket_elements,
        logit_bytes=traits.logit_bytes,
        fallback_softmax=traits.fallback_softmax,
        vendor_attention=traits.vendor_attention,
        overlaps_tensor=_overlaps_tensor(parallel, device, traits),
        shard_group=per_node if fsdp == "HSDP" else 0,
        selects_products=traits.selects_products,
        adds_gradients=traits.adds_gradients,
        pure_half=parallel.get("fsdp_mixed_precision") == "PURE",
        stops_early=traits.stops_early,
        gathers_late=traits.gathers_late,
        keeps_outputs=traits.keeps_outputs,
        row_scales="row" in str(parallel.get("float8")).lower(),
        reduces_half=traits.reduces_half,
        separate_projections=traits.separate_projections,
        growing_segments=traits.growing_segments,
        keeps_gathered=traits.keeps_gathered,
        divides_loss=traits.divides_loss,
        overlaps_experts=captured,
        fused_experts=captured,
        captured=captured,
    )


def _captures_steps(row: dict[str, Any], device: str, traits: Traits) -> bool:
    """Whether a row's recipe captures whole steps, fuses experts and overlaps their all-to-alls."""
    scaled = "mx" in str(row["parallel"].get("precision")).lower()
    since = (
        release
        for model, devices, release in CAPTURED_STEPS
        if model in row["model"]["name"].lower() and re.match(devices, device)
    )
    first = next(since, None)
    return traits is MODERN_MEGATRON and scaled and first is not None and _release(row) >= first


def _is_alone(row: dict[str, Any], batch: tuple[float, float]) -> bool:
    """Whether a replica's step is one microbatch, without stages."""
    return (row["parallel"].get("pp") or 1) == 1 and batch[0] <= batch[1] * _data_width(row)


def _release(row: dict[str, Any]) -> tuple[int, ...]:
    """Year, month and number of a framework's release, where the row or its table's title names one."""
    words = f"{row['parallel'].get('framework')} {row['source'].get('table')}"
    found = re.search(r"\b(2\d)\.(\d\d)(?:\.(\d\d))?\b", words)
    return tuple(int(part) for part in found.groups("0")) if found else ()


def _overlaps_tensor(parallel: dict[str, Any], device: str, traits: Traits) -> bool:
    """Overlap within tensor-parallel groups writes into peers' buffers, which one host maps."""
    fits_host = (parallel.get("tp") or 1) <= DEVICES_PER_HOST.get(device, 8)
    return bool(parallel.get("async_tp")) or (traits.overlaps_tensor and fits_host)


def _count(row: dict[str, Any]) -> int:
    """Devices; where a row does not say, as many as its widths take."""
    hardware, parallel = row["hardware"], row["parallel"]
    widths = [parallel.get(k) or 1 for k in ("tp", "pp", "dp", "cp")]
    return int(hardware.get("count") or math.prod(int(w) for w in widths))


def _per_node(row: dict[str, Any]) -> int:
    return int(row["hardware"].get("gpus_per_node") or min(8, _count(row)))


def _data_width(row: dict[str, Any]) -> int:
    parallel = row["parallel"]
    given = parallel.get("dp")
    if given:
        return int(given)
    model = int((parallel.get("tp") or 1) * (parallel.get("pp") or 1) * (parallel.get("cp") or 1))
    return max(_count(row) // model, 1)


def _sequence_parallel(parallel: dict[str, Any]) -> bool:
    stated = parallel.get("sequence_parallel")
    if stated is not None:
        return bool(stated)
    words = f"{parallel.get('recompute')} {parallel.get('tp_mode')} {parallel.get('framework')}"
    return any(w in words for w in ("sequence", "torchtitan", "bridge", "nemo", "nnscaler"))


def _shape(model: dict[str, Any]) -> ModelShape | str:
    if model.get("name") in BERT:
        return replace(BERT[model["name"]], seq_len=model.get("seq_len", 384))
    if model.get("kind") == "inference":
        return "inference"
    if not all(model.get(k) for k in ("layers", "hidden", "heads", "ffn", "seq_len")):
        return "no model shape"
    if model["heads"] > model["hidden"]:
        return "more heads than elements"
    moe = model.get("moe")
    name = str(model.get("name"))
    head = next((size for key, size in HEAD_SIZES.items() if key in name), 0)
    return ModelShape(
        layers=model["layers"],
        hidden=model["hidden"],
        heads=model["heads"],
        kv_heads=model.get("kv_heads") or model["heads"],
        ffn=model["ffn"],
        vocab=model.get("vocab") or 128256,
        seq_len=model["seq_len"],
        gated=bool(model.get("gated_mlp", moe is not None)),
        tied=bool(model.get("tied_embeddings", False)),
        head_size=head,
        moe=_moe(moe, any(key in name for key in BIASED_EXPERTS)) if moe else None,
        query_rank=(moe or {}).get("q_lora") or 0,
        value_rank=(moe or {}).get("kv_lora") or 0,
    )


def _moe(moe: dict[str, Any], biased: bool) -> MoeShape | None:
    if not moe.get("experts") or not moe.get("topk"):
        return None
    return MoeShape(
        moe["experts"],
        moe["topk"],
        moe.get("moe_ffn") or moe.get("ffn") or 0,
        moe.get("dense_layers") or 0,
        moe.get("shared_experts") or 0,
        biased,
    )


def _batches(row: dict[str, Any], traits: Traits) -> tuple[float, float] | None:
    """Sequences per step, and per microbatch of one replica."""
    batch = row["batch"]
    data = _data_width(row)
    total = batch.get("global_batch")
    if not total:
        one = batch.get("local_batch") or (batch.get("micro_batch") or 1) * (batch.get("grad_accum") or 1)
        total = one * data if batch else 0
    if not total:
        return None
    micro = batch.get("micro_batch")
    if not micro:
        local = batch.get("local_batch") or total / data
        pipeline = row["parallel"].get("pp") or 1
        micro = 1 if pipeline > 1 or traits.accumulates else local / (batch.get("grad_accum") or 1)
    return float(total), float(min(micro, max(total / data, 1)))


def _traits(row: dict[str, Any]) -> Traits:
    """What the framework of a row does.

    Megatron-LM on devices younger than 2022 is Megatron Core; so it is with gated layers or grouped keys,
    for which the older one has no options. A DeepSpeed that has them has fused attention as well.
    """
    name = str(row["parallel"].get("framework")).lower()
    traits = next((traits for key, traits in FRAMEWORKS if key in name), Traits())
    device = device_of(str(row["hardware"].get("gpu")))[0]
    young = catalogue.devices()[device].family in YOUNG_FAMILIES
    model = row["model"]
    heads = model.get("heads", 0)
    recent = bool(model.get("gated_mlp")) or model.get("kv_heads", heads) < heads
    if traits is OLD_MEGATRON and (young or recent):
        return MODERN_MEGATRON
    deepspeed = traits.bucket_elements > 0
    return replace(traits, fused_attention=True, dropout=False) if deepspeed and recent else traits


def _recompute(text: Any) -> str:
    words = str(text or "none").lower()
    return next((w for w in ("full", "selective") if w in words), "full" if "per " in words else "none")


PRECISIONS = (
    ("fp16", "float16"), ("float16", "float16"), ("half", "float16"),
    ("tf32", "tf32"), ("fp32", "float32"), ("float32", "float32"),
)  # fmt: skip


def _dtype(parallel: dict[str, Any]) -> str:
    words = str(parallel.get("precision") or "bf16").lower()
    float8 = str(parallel.get("float8") or "").lower()
    if "fp4" in words:
        return "float4"
    if "fp8" in words or float8 not in ("", "none", "false"):
        return "float8_e4m3fn"
    if "bf16" in words or "mixed" in words:
        return "bfloat16"
    return next((dtype for word, dtype in PRECISIONS if word in words), "bfloat16")


def measured_step_s(row: dict[str, Any]) -> float | None:
    """Seconds of one step, from time, tokens per second, or a stated FLOP count."""
    measured, model = row["measured"], row["model"]
    stated = _batches(row, _traits(row))
    batch = stated[0] if stated else None
    count = _count(row)
    if measured.get("step_time_s"):
        return float(measured["step_time_s"])
    if not batch:
        return None
    if measured.get("samples_per_s"):
        return float(batch / measured["samples_per_s"])
    tokens = batch * (model.get("seq_len") or 0)
    if measured.get("tokens_per_s_per_gpu"):
        return float(tokens / (measured["tokens_per_s_per_gpu"] * count))
    if measured.get("tokens_per_s"):
        return float(tokens / measured["tokens_per_s"])
    if "96*B*s*l*h^2" in str(measured.get("tflops_kind")) and measured.get("tflops_per_gpu"):
        s, h, layers = model["seq_len"], model["hidden"], model["layers"]
        flops = 96 * batch * s * layers * h**2
        flops *= 1 + s / (6 * h) + model["vocab"] / (16 * layers * h)
        return float(flops / (measured["tflops_per_gpu"] * 1e12 * count))
    return None


def in_favour(run: Run, row: dict[str, Any]) -> Run:
    """The run with all that its source leaves open decided so that it needs least memory.

    A source that says nothing of recomputation, sharding or the microbatch may well have used them.
    """
    parallel, batch = row["parallel"], row["batch"]
    if parallel.get("recompute") is None:
        run = replace(run, recompute="full", recompute_share=1.0)
    if parallel.get("zero") is None and run.zero < 1:
        run = replace(run, zero=1)
    if not batch.get("micro_batch") and not batch.get("local_batch"):
        run = replace(run, microbatch=1.0)
    return run


def measured_bytes(row: dict[str, Any]) -> float | None:
    """Peak memory of one device as stated."""
    measured = row["measured"]
    if measured.get("mem_gib"):
        return float(measured["mem_gib"]) * 2**30
    # Tools that print GB on accelerators count in binary units.
    return float(measured["mem_gb"]) * 2**30 if measured.get("mem_gb") else None
