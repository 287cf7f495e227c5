"""From a row of a table of published training runs to a `Run` of the cost model."""

import math
import re
from dataclasses import replace
from typing import Any

from published_devices import device_of, die_of, link_of, network_of
from published_frameworks import (
    Traits,
    captures_steps,
    overlaps_experts,
    overlaps_tensor,
    scales_attention,
    sharding_of,
    traits_of,
)
from published_models import shape_of

from graphpar import catalogue
from graphpar.cost_models.training_memory import fits, weights_of_stage
from graphpar.cost_models.training_run import Run
from graphpar.cost_models.transformer import ModelShape


def run_of(row: dict[str, Any]) -> Run | str:
    """The run that a cleaned row describes, or why it cannot be predicted."""
    if row.get("reliability") == "C":
        return "reliability C"
    if unlike := unlike_training(row):
        return unlike
    row = _with_planned_widths(row)
    shape = shape_of(row["model"])
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
    traits = traits_of(row)
    batch = _batches(row, traits)
    if batch is None:
        return "no batch size"
    if not _states_batch(row) and row["measured"].get("step_time_s"):
        return "a step's time, but of how many microbatches is not stated"
    run = replace(_run(row, shape, device, batch, traits), memory_bytes=memory_bytes)
    if refuted(row):
        run = replace(run, recompute="none", pads_vocab=False)
        run = run if fits(run) else replace(run, recompute="full")
    if run.shape.moe is not None and not row["parallel"].get("ep"):
        run = _spread_experts(run)
    return _adapted(run, traits)


ADAPTERS = r"\b(q?lora|peft|adapters?)\b"


def unlike_training(row: dict[str, Any]) -> str:
    """Why a row is no training of all weights on devices alone, or nothing.

    >>> unlike_training({"model": {}, "parallel": {"stage": "LoRA Performance"}})
    'trains adapters and not all weights'
    """
    words = f"{row['parallel'].get('stage')} {row['model'].get('kind')}".lower()
    if re.search(ADAPTERS, words):
        return "trains adapters and not all weights"
    if "inference" in words:
        return "inference"
    return "weights or states on hosts are not predicted" if row["parallel"].get("cpu_offload") else ""


REFUTED = frozenset({"data/ground_truth_single.csv"})
"""Tables that were transcribed with full recomputation assumed, which their times refute: with it a layer
of width 2048 and eight samples would reach 219 of A100's 250 TFLOP/s in spite of its
unfused traffic. Without it, and with the vocabulary as it stands where one rank holds it, steps on one
tensor-parallel rank scatter by 1 % about the prediction at width 2048, and not by 6 %."""


def refuted(row: dict[str, Any]) -> str:
    """What the row's own times say against what it states, or nothing."""
    known = str(row["source"].get("table")) in REFUTED and row["parallel"].get("recompute") == "full"
    return "recomputation is refuted by the table's times; taken only where memory asks for it" * known


def _spread_experts(run: Run) -> Run:
    """The run with the narrowest expert parallelism that fits, where its row does not state any."""
    experts = run.shape.moe.experts if run.shape.moe else 1
    most = math.gcd(experts, run.data * run.context * run.tensor // run.expert_tensor)
    widths = [replace(run, expert=width) for width in range(1, most + 1) if most % width == 0]
    return next((r for r in widths if fits(r)), widths[-1])


ASSUMED = (
    ("parallel", "framework", "eager torch"),
    ("parallel", "precision", "half precision"),
    ("parallel", "recompute", "none"),
    ("hardware", "inter", "the network of the device's reference design"),
)
"""What is taken where a row does not say."""


def assumed(row: dict[str, Any], run: Run) -> list[str]:
    """What the prediction of a cleaned row takes for granted, in words."""
    said = [(row[group].get(key), f"{group}.{key}", text) for group, key, text in ASSUMED]
    unsaid = [
        f"{name} is not stated; {text} assumed"
        for value, name, text in said
        if value in (None, "", "not stated") and (name != "hardware.inter" or run.devices > run.per_node)
    ]
    batch, parallel = row["batch"], row["parallel"]
    if not batch.get("micro_batch"):
        unsaid.append(f"batch.micro_batch is not stated; {run.microbatch:g} assumed")
    if not batch.get("global_batch"):
        unsaid.append(f"batch.global_batch is not stated; {run.batch:g} assumed")
    if run.shape.moe is not None and not parallel.get("ep"):
        unsaid.append(f"parallel.ep is not stated; {run.expert} assumed, the fewest that fit")
    return unsaid


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
    stated = _per_node(row)
    intra = str(hardware.get("intra") or "")
    per_node = 72 if device.startswith("gb") or "NVL72" in intra else stated
    network = network_of(str(hardware.get("inter") or ""), device, stated)
    # What is said of a node holds of so many devices as it has, not of all that NVLink joins.
    network = replace(network, node_bytes_per_s=network.node_bytes_per_s * per_node / stated)
    tensor, replicas = parallel.get("tp") or 1, _data_width(row) * (parallel.get("cp") or 1)
    zero, shard_group = sharding_of(parallel, traits, replicas, max(per_node // tensor, 1))
    captured = captures_steps(row, device, traits)
    return Run(
        shape=shape,
        device=device,
        devices=_count(row),
        per_node=per_node,
        network=network,
        link=link_of(intra, device),
        batch=batch[0],
        microbatch=batch[1],
        tensor=tensor,
        pipeline=parallel.get("pp") or 1,
        data=_data_width(row),
        context=parallel.get("cp") or 1,
        expert=parallel.get("ep") or 1,
        expert_tensor=parallel.get("etp") or 1,
        virtual=parallel.get("virtual_stages") or 1,
        zero=zero,
        recompute=_recompute(parallel.get("recompute")),
        dtype=_dtype(parallel, device),
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
        overlaps_tensor=overlaps_tensor(parallel, device, traits),
        shard_group=shard_group,
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
        overlaps_experts=overlaps_experts(row, device, traits),
        scaled_attention=scales_attention(row, device, traits),
        fused_experts=captured,
        captured=captured,
        sends_apart=traits.sends_apart,
        sends_whole=traits.sends_whole,
        sums_tables=shape.tied or (traits.ties_tables and row["model"].get("tied_embeddings") is None),
    )


def _is_alone(row: dict[str, Any], batch: tuple[float, float]) -> bool:
    """Whether a replica's step is one microbatch, without stages."""
    return (row["parallel"].get("pp") or 1) == 1 and batch[0] <= batch[1] * _data_width(row)


def _count(row: dict[str, Any]) -> int:
    """Devices; where a row does not say, as many as its widths take."""
    hardware, parallel = row["hardware"], row["parallel"]
    widths = [parallel.get(k) or 1 for k in ("tp", "pp", "dp", "cp")]
    return int(hardware.get("count") or math.prod(int(w) for w in widths))


def _per_node(row: dict[str, Any]) -> int:
    hardware, count = row["hardware"], _count(row)
    nodes = hardware.get("nodes") or 1
    usual = count // nodes if nodes > 1 and count % nodes == 0 else min(8, count)
    return int(hardware.get("gpus_per_node") or usual)


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


def _states_batch(row: dict[str, Any]) -> bool:
    return any(row["batch"].get(key) for key in ("global_batch", "local_batch", "grad_accum"))


RECOMPUTED = r"\b(per|true|yes|on|all|every|uniform|block|checkpoint(ing|s|ed)?)\b"
"""Words for recomputation of whole layers that do not say "full"."""

DENIED = r"\b(no|not|without)\b[^,;(]*"


def _recompute(text: Any) -> str:
    """
    >>> [_recompute(said) for said in (None, True, "Full, uniform", "selective op", "per layer", False)]
    ['none', 'full', 'full', 'selective', 'full', 'none']
    >>> [_recompute(said) for said in ("full, no offload", "no activation checkpointing", "layers: off")]
    ['full', 'none', 'none']
    """
    words = re.sub(DENIED, "", str(text or "none").lower())
    if said := next((w for w in ("full", "selective") if w in words), ""):
        return said
    off = re.search(r"\b(none|off|disabled)\b", words)
    return "none" if off or not re.search(RECOMPUTED, words) else "full"


PRECISIONS = (
    ("fp16", "float16"), ("float16", "float16"), ("half", "float16"),
    ("tf32", "tf32"), ("fp32", "float32"), ("float32", "float32"),
)  # fmt: skip


def _dtype(parallel: dict[str, Any], device: str) -> str:
    """The format a row states; what it leaves open is the half precision that its device has."""
    half = "bfloat16" if "bfloat16" in catalogue.devices()[device].peak_flops_per_s else "float16"
    words = str(parallel.get("precision") or half).lower()
    float8 = str(parallel.get("float8") or "").lower()
    if "fp4" in words:
        return "float4"
    if "fp8" in words or float8 not in ("", "none", "false"):
        return "float8_e4m3fn"
    if "bf16" in words or "bfloat16" in words:
        return "bfloat16"
    return next((dtype for word, dtype in PRECISIONS if word in words), half)


def measured_step_s(row: dict[str, Any]) -> float | None:
    """Seconds of one step, from time, tokens per second, or a stated FLOP count."""
    measured, model = row["measured"], row["model"]
    stated = _batches(row, traits_of(row))
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
