"""What training frameworks do (fused attention, overlap, dropout, gradient format), by name and age.

That is public knowledge about the software, the same for every row of every source.
"""

import re
from dataclasses import dataclass, replace
from typing import Any

from published_devices import device_of
from published_models import family_name, is_gated

from graphpar import catalogue
from graphpar.cost_models.communication import nodes_for


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
    ties_tables: bool = False
    sends_apart: bool = False
    sends_whole: bool = False


OLD_MEGATRON = Traits(
    False,
    dropout=True,
    overlaps=False,
    gradient_bytes=2.0,
    logit_bytes=13.0,
    fallback_softmax=True,
    adds_gradients=True,
    overlaps_alone=True,
    ties_tables=True,
)
"""Before 2023: scores in memory, dropout everywhere, one table for input and output, gradients summed
after backward, or beside it by torch's wrapper where one microbatch is all (its README, "Distributed
Pretraining")."""

DEEPSPEED = replace(
    OLD_MEGATRON,
    bucket_elements=5e8,
    keeps_outputs=True,
    overlaps_alone=False,
    sends_apart=True,
    sends_whole=True,
)
"""Its buckets hold 5e8 elements unless configured otherwise. Before a forward a stage sends a gradient
and receives an activation, before a backward the other way round, each by itself, and of gradients every
tensor-parallel rank sends all (deepspeed/runtime/pipe, `TrainSchedule.steps` in schedule.py and
`is_grad_partitioned`, which was off in engine.py until 2022)."""

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

DEVICES_PER_HOST = {"gb200": 4, "gb300": 4}
"""Devices that one operating system drives, where it is not a whole node of eight."""


CAPTURED_STEPS = (
    ("kimi", "gb300", (26, 8)),
    (r"(?!kimi)", r"gb[23]00", (26, 6)),
    ("qwen3", "b300", (26, 6)),
    ("qwen3-235b", "b200", (26, 6)),
    ("deepseek", "b300", (26, 6, 1)),
)
"""Models, devices and the NeMo release since which MXFP8 recipes capture whole steps as CUDA graphs,
with products of experts that apply activations and casts, and all-to-alls beside other microbatches
(https://github.com/NVIDIA-NeMo/Megatron-Bridge/pull/3983, 4173, 4226, 4249, 4458, 4606, 5168). gpt-oss's
are for GB200 and GB300 only, Kimi-K2's for GB300, and Qwen3's 30B does not fit a B200 (pull/5356)."""

OVERLAPPED_EXPERTS = (("deepseek-?v3", "b200", (26, 4, 1)),)
"""The same for recipes that run all-to-alls beside other microbatches and capture no whole steps
(https://github.com/NVIDIA-NeMo/Megatron-Bridge/blob/main/scripts/performance/configs/deepseek/deepseek_workload_base_configs.py,
`moe_a2a_overlap`). Of the two for that device only this one interleaves stages."""

SCALED_ATTENTION = (r"deepseek-?v3|kimi-?k2", "blackwell-sm103")
"""Models, and the devices with twice the exponentials, whose captured recipes compute attention in float8
(`fp8_dot_product_attention` in that file and in kimi/kimi_workload_base_configs.py beside it). gpt-oss's
ask for it on every device; its attention has windows and sinks, which are not modelled."""


def traits_of(row: dict[str, Any]) -> Traits:
    """What the framework of a row does.

    Megatron-LM on devices younger than 2022 is Megatron Core; so it is with gated layers or grouped keys,
    for which the older one has no options. A DeepSpeed that has them has fused attention as well, sends
    slices of gradients, and those models have two tables.
    """
    name = str(row["parallel"].get("framework")).lower()
    traits = next((traits for key, traits in FRAMEWORKS if key in name), Traits())
    device = device_of(str(row["hardware"].get("gpu")))[0]
    young = catalogue.devices()[device].family in YOUNG_FAMILIES
    model = row["model"]
    heads = model.get("heads", 0)
    recent = is_gated(model) or model.get("kv_heads", heads) < heads
    if traits is OLD_MEGATRON and (young or recent):
        return MODERN_MEGATRON
    deepspeed = traits.bucket_elements > 0
    if not (deepspeed and recent):
        return traits
    return replace(traits, fused_attention=True, dropout=False, sends_whole=False, ties_tables=False)


UNSHARDED = frozenset({"0", "false", "no", "none", "off", "no_shard", "ddp"})
SHARDING_STAGES = {"optim": 1, "optim_grads": 2, "shard_grad_op": 2}
"""Words of `torch.distributed.fsdp.ShardingStrategy` and of Megatron Core's
`--data-parallel-sharding-strategy` for less than weights."""


def sharding_of(parallel: dict[str, Any], traits: Traits, replicas: int, near: int) -> tuple[int, int]:
    """ZeRO's stage, and the ranks that divide weights where not all replicas do (else 0).

    Rows say it by a stage, a number of ranks or a strategy's name; `near` replicas are in one node.

    >>> [sharding_of({"fsdp": said}, TITAN, 64, 8) for said in ("HYBRID_SHARD", 16, "SHARD_GRAD_OP")]
    [(3, 8), (3, 16), (2, 0)]
    """
    stage = traits.zero if parallel.get("zero") is None else parallel["zero"]
    if parallel.get("fsdp") is None:
        return stage, 0
    words = str(parallel["fsdp"]).lower().rpartition(".")[2]
    if words in UNSHARDED:
        return (0 if stage == 3 and parallel.get("zero") is None else stage), 0
    if "hybrid" in words or "hsdp" in words:
        width = replicas // nodes_for(replicas, near)
        return 3, width if width < replicas else 0
    if words in SHARDING_STAGES:
        return SHARDING_STAGES[words], 0
    width = int(words) if words.isdecimal() else 0
    return 3, width if 1 < width < replicas and replicas % width == 0 else 0


def captures_steps(row: dict[str, Any], device: str, traits: Traits) -> bool:
    """Whether a row's recipe captures whole steps, fuses experts and overlaps their all-to-alls."""
    return _is_recipe(CAPTURED_STEPS, row, device, traits)


def overlaps_experts(row: dict[str, Any], device: str, traits: Traits) -> bool:
    """Whether a row's recipe runs experts' all-to-alls beside the compute of other microbatches."""
    interleaves = (row["parallel"].get("virtual_stages") or 1) > 1
    overlaps = interleaves and _is_recipe(OVERLAPPED_EXPERTS, row, device, traits)
    return overlaps or captures_steps(row, device, traits)


def scales_attention(row: dict[str, Any], device: str, traits: Traits) -> bool:
    """Whether a row's recipe computes attention in float8 as well."""
    latent = re.search(SCALED_ATTENTION[0], family_name(row["model"])) is not None
    newer = catalogue.devices()[device].family == SCALED_ATTENTION[1]
    return latent and newer and captures_steps(row, device, traits)


def _is_recipe(
    table: tuple[tuple[str, str, tuple[int, ...]], ...], row: dict[str, Any], device: str, traits: Traits
) -> bool:
    """Whether a table of MXFP8 recipes names a row's model, device and release."""
    name = family_name(row["model"])
    scaled = "mx" in str(row["parallel"].get("precision")).lower()
    since = (
        release
        for model, devices, release in table
        if re.match(model, name) and re.match(devices, device)
    )
    first = next(since, None)
    return traits is MODERN_MEGATRON and scaled and first is not None and _release(row) >= first


def _release(row: dict[str, Any]) -> tuple[int, ...]:
    """Year, month and number of a framework's release, where the row or its table's title names one."""
    words = f"{row['parallel'].get('framework')} {row['source'].get('table')}"
    found = re.search(r"\b(2\d)\.(\d\d)(?:\.(\d\d))?\b", words)
    return tuple(int(part) for part in found.groups("0")) if found else ()


def overlaps_tensor(parallel: dict[str, Any], device: str, traits: Traits) -> bool:
    """Overlap within tensor-parallel groups writes into peers' buffers, which one host maps."""
    fits_host = (parallel.get("tp") or 1) <= DEVICES_PER_HOST.get(device, 8)
    return bool(parallel.get("async_tp")) or (traits.overlaps_tensor and fits_host)
