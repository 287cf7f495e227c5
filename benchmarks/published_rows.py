"""From a row of a table of published training runs to a `Run` of the cost model.

What a framework does (fused attention, overlap, dropout, gradient format) is read from its name and
age, which is public knowledge about the software, the same for every row of every source.
"""

import re
from dataclasses import dataclass, replace
from typing import Any

from graphpar import catalogue
from graphpar.cost_models.communication import Network
from graphpar.cost_models.training import Run
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


FRAMEWORKS = (
    # Before 2023: scores in memory, dropout everywhere, gradients summed after backward.
    ("megatron-lm/deepspeed", Traits(False, dropout=True, overlaps=False, gradient_bytes=2.0, zero=1)),
    ("megatron-deepspeed", Traits(False, dropout=True, overlaps=False, gradient_bytes=2.0)),
    ("megatron-lm", Traits(False, dropout=True, overlaps=False, gradient_bytes=2.0)),
    ("composer", Traits(True, False, fused_loss=True)),
    ("torchtitan", Traits(True, False, gradient_bytes=4.0)),
    ("fms-fsdp", Traits(compiled=True, gradient_bytes=2.0)),
    ("megatron-bridge", Traits(fused_loss=True, compiled=True, zero=1)),
    ("nemo", Traits(fused_loss=True, compiled=True, zero=1)),
    ("nanotron", Traits(True, False, gradient_bytes=4.0, zero=1)),
    ("pytorch", Traits(False, False, dropout=True, gradient_bytes=2.0)),
    ("nnscaler", Traits(True, False)),
)

BERT = {
    "bert_base_squad": ModelShape(12, 768, 12, 12, 3072, 30522, 384, tied=True, causal=False, labels=2),
    "bert_large_squad": ModelShape(24, 1024, 16, 16, 4096, 30522, 384, tied=True, causal=False, labels=2),
}

HEAD_SIZES = {"qwen3": 128, "gpt-oss": 64, "deepseek-v3": 160, "kimi-k2": 160, "nemotron4": 0}
"""Attention head sizes of families whose heads do not divide the hidden size; for latent attention the
mean of the query-key and value sizes."""

NETWORK_PER_DEVICE = {
    "V100": 3.125e9, "A100": 25e9, "H100": 50e9, "H200": 50e9, "B200": 50e9, "B300": 100e9,
    "GB200": 50e9, "GB300": 100e9, "MI300X": 50e9,
}  # fmt: skip
"""Usual network per device of that generation's reference design, where a row does not state it."""


def run_of(row: dict[str, Any]) -> Run | str:
    """The run a row describes, or why it cannot be predicted."""
    if row.get("reliability") == "C":
        return "reliability C"
    shape = _shape(row["model"])
    if isinstance(shape, str):
        return shape
    device = _device(row["hardware"]["gpu"])
    if device is None:
        return f"device {row['hardware']['gpu']!r} is not in the catalogue"
    batch = _batches(row)
    if batch is None:
        return "no batch size"
    traits = _traits(row["parallel"])
    return _run(row, shape, device, batch, traits)


def _run(
    row: dict[str, Any], shape: ModelShape, device: str, batch: tuple[float, float], traits: Traits
) -> Run:
    parallel, hardware = row["parallel"], row["hardware"]
    per_node = hardware.get("gpus_per_node") or min(8, hardware["count"])
    intra = str(hardware.get("intra") or "")
    if device.startswith("gb") or "NVL72" in intra:
        per_node = 72
    zero = parallel.get("zero")
    fsdp = parallel.get("fsdp")
    if fsdp and str(fsdp) not in ("0", "None"):
        zero = 3
    return Run(
        shape=shape,
        device=device,
        devices=hardware["count"],
        per_node=per_node,
        network=network_of(str(hardware.get("inter") or ""), device, per_node),
        batch=batch[0],
        microbatch=batch[1],
        tensor=parallel.get("tp") or 1,
        pipeline=parallel.get("pp") or 1,
        data=_data_width(row),
        context=parallel.get("cp") or 1,
        expert=parallel.get("ep") or 1,
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
        overlaps=traits.overlaps,
        gradient_bytes=2.0 if parallel.get("fsdp_mixed_precision") == "PURE" else traits.gradient_bytes,
        state_bytes=traits.state_bytes,
    )


def _data_width(row: dict[str, Any]) -> int:
    parallel = row["parallel"]
    given = parallel.get("dp")
    if given:
        return int(given)
    model = int((parallel.get("tp") or 1) * (parallel.get("pp") or 1) * (parallel.get("cp") or 1))
    return max(int(row["hardware"]["count"]) // model, 1)


def _sequence_parallel(parallel: dict[str, Any]) -> bool:
    stated = parallel.get("sequence_parallel")
    if stated is not None:
        return bool(stated)
    words = f"{parallel.get('recompute')} {parallel.get('tp_mode')} {parallel['framework']}"
    return any(w in words for w in ("sequence", "torchtitan", "bridge", "nemo"))


def _shape(model: dict[str, Any]) -> ModelShape | str:
    if model.get("name") in BERT:
        return replace(BERT[model["name"]], seq_len=model.get("seq_len", 384))
    if model.get("kind") == "inference":
        return "inference"
    if not all(model.get(k) for k in ("layers", "hidden", "heads", "ffn", "seq_len")):
        return "no model shape"
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
        moe=_moe(moe) if moe else None,
        query_rank=(moe or {}).get("q_lora") or 0,
        value_rank=(moe or {}).get("kv_lora") or 0,
    )


def _moe(moe: dict[str, Any]) -> MoeShape | None:
    if not moe.get("experts") or not moe.get("topk"):
        return None
    return MoeShape(
        moe["experts"],
        moe["topk"],
        moe.get("moe_ffn") or moe.get("ffn") or 0,
        moe.get("dense_layers") or 0,
        moe.get("shared_experts") or 0,
    )


_DEVICE_WORDS = (
    ("GB200", "gb200"), ("GB300", "gb300"), ("B200", "b200-sxm"), ("B300", "b300-sxm"),
    ("H200", "h200-sxm-141gb"), ("96GB-HBM2e", "h100-sxm-96gb-hbm2e"),
    (r"H100.*PCIe", "h100-pcie-80gb"), (r"H100.*NVL", "h100-nvl-94gb"), ("H100", "h100-sxm-80gb"),
    (r"A100.*40GB.*PCIe", "a100-pcie-40gb"), (r"A100.*80GB.*PCIe", "a100-pcie-80gb"),
    (r"A100.*PCIe.*40", "a100-pcie-40gb"), (r"A100.*PCIe", "a100-pcie-80gb"),
    (r"A100.*40GB", "a100-sxm-40gb"), ("A100", "a100-sxm-80gb"),
    ("SXM3", "v100-sxm3-32gb"), ("RTX 8000", "rtx-8000"), ("6000 Ada", "rtx-6000-ada"),
    (r"V100.*PCIe.*16", "v100-pcie-16gb"), (r"V100.*16", "v100-sxm2-16gb"),
    ("V100", "v100-sxm2-32gb"), ("A6000", "rtx-a6000"), ("A10G", "a10g"), ("A10", "a10"),
    ("A40", "a40"), ("A30", "a30"), ("L40S", "l40s"), ("L4", "l4"), ("T4", "t4"),
    ("3090", "rtx-3090"), ("4090", "rtx-4090"), ("5090", "rtx-5090"), ("2080 ?Ti", "rtx-2080-ti"),
    ("MI300X", "mi300x"), ("MI325X", "mi325x"), ("MI355X", "mi355x"), ("MI250", "mi250x"),
)  # fmt: skip


def _device(name: str) -> str | None:
    for pattern, kind in _DEVICE_WORDS:
        if re.search(pattern, name):
            return kind if kind in catalogue.devices() else None
    return None


def _batches(row: dict[str, Any]) -> tuple[float, float] | None:
    """Sequences per step, and per microbatch of one replica."""
    batch = row["batch"]
    data = _data_width(row)
    total = batch.get("global_batch")
    if not total:
        return None
    micro = batch.get("micro_batch")
    if not micro:
        local = batch.get("local_batch") or total / data
        pipeline = row["parallel"].get("pp") or 1
        micro = 1 if pipeline > 1 else local / (batch.get("grad_accum") or 1)
    return float(total), float(min(micro, max(total / data, 1)))


def _traits(parallel: dict[str, Any]) -> Traits:
    name = str(parallel["framework"]).lower()
    return next((traits for key, traits in FRAMEWORKS if name.startswith(key)), Traits())


def _recompute(text: Any) -> str:
    words = str(text or "none").lower()
    return next((w for w in ("full", "selective") if w in words), "full" if "per " in words else "none")


def _dtype(parallel: dict[str, Any]) -> str:
    words = str(parallel["precision"]).lower()
    float8 = str(parallel.get("float8") or "").lower()
    if "fp4" in words:
        return "float4"
    if "fp8" in words or float8 not in ("", "none", "false"):
        return "float8_e4m3fn"
    return "float16" if "fp16" in words and "bf16" not in words else "bfloat16"


def network_of(text: str, device: str, per_node: int) -> Network:
    """A node's network from words such as "8x200Gb/s HDR IB per node" or "400Gb/s RDMA per GPU"."""
    match = re.search(r"(?:(\d+)\s*x\s*)?\D*?(\d+)\s*Gb", text)
    if match is None:
        short = device.split("-")[0].upper()
        return Network(NETWORK_PER_DEVICE.get(short, 12.5e9) * per_node)
    cards = per_node if "per GPU" in text else int(match.group(1) or 1)
    return Network(cards * int(match.group(2)) * 1e9 / 8)


def measured_step_s(row: dict[str, Any]) -> float | None:
    """Seconds of one step, from time, tokens per second, or a stated FLOP count."""
    measured, model = row["measured"], row["model"]
    batch = row["batch"].get("global_batch")
    count = row["hardware"]["count"]
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
    if "96*B*s*l*h^2" in str(measured.get("tflops_kind")):
        s, h, layers = model["seq_len"], model["hidden"], model["layers"]
        flops = 96 * batch * s * layers * h**2
        flops *= 1 + s / (6 * h) + model["vocab"] / (16 * layers * h)
        return float(flops / (measured["tflops_per_gpu"] * 1e12 * count))
    return None


def measured_bytes(row: dict[str, Any]) -> float | None:
    """Peak memory of one device as stated."""
    measured = row["measured"]
    if measured.get("mem_gib"):
        return float(measured["mem_gib"]) * 2**30
    # Tools that print GB on accelerators count in binary units.
    return float(measured["mem_gb"]) * 2**30 if measured.get("mem_gb") else None
