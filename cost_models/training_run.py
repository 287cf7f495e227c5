"""What a training run is, and the constants by which `training.py` prices one."""

import tomllib
from dataclasses import dataclass, fields
from functools import cache

from graphpar import catalogue
from graphpar.cost_models.communication import Network
from graphpar.cost_models.transformer import ModelShape


@dataclass(frozen=True)
class TrainingParameters:
    """Fitted constants, all dimensionless shares unless the name says otherwise.

    Attributes:
        attention_share: Reached over the family's fused-attention fraction.
        vendor_attention_share: The same for the vendor's tuned attention kernels.
        backward_traffic: Backward's memory traffic over forward's.
        host_kernel_s: Seconds the host needs per kernel in eager frameworks.
        compiled_kernel_s: The same where steps are compiled or captured as CUDA graphs.
        step_host_s: Fixed seconds per step: data, clipping, logging, synchronisation.
        imbalance: Relative loss per doubling of the devices (stragglers, clocks, jitter).
        unfused_traffic: Memory traffic of pointwise work in eager kernels over that of fused ones.
        wait_s: Seconds that hosts of tensor-parallel ranks wait at each collective, per doubling of them.
        start_s: Seconds that a tensor-parallel collective in a node takes more where the host issues
            kernels no faster than the device works: events of two streams, ranks that arrive late.
        expert_traffic: Times that routed tokens pass through memory on the way to experts and back.
        sustained_share: Of the rate of single products in 16 bits, what steps hold on devices that run at
            their power's limit then.
    """

    attention_share: float = 1.0
    vendor_attention_share: float = 1.5
    backward_traffic: float = 1.8
    host_kernel_s: float = 25e-6
    compiled_kernel_s: float = 6e-6
    step_host_s: float = 0.01
    imbalance: float = 0.01
    expert_traffic: float = 4.0
    unfused_traffic: float = 1.6
    wait_s: float = 5e-5
    start_s: float = 1e-4
    sustained_share: float = 1.0


@dataclass(frozen=True)
class Run:
    """One training configuration.

    Attributes:
        shape: The model.
        device: Kind of the devices, by the catalogue's name.
        devices: How many.
        per_node: Devices per node that share the fast link.
        network: What joins nodes.
        tensor, pipeline, data: Widths of tensor, pipeline and data parallelism.
        context, expert: Widths of context and expert parallelism.
        virtual: Model chunks per pipeline stage.
        zero: 0 replicated, 1 optimiser state sharded, 3 weights sharded too.
        recompute: `none`, `selective` (attention) or `full`.
        dtype: `float16`, `bfloat16`, `float8_e4m3fn`, `float4`, `tf32` or `float32`.
        batch, microbatch: Sequences per step and per microbatch on one replica.
        fused_attention, fused_pointwise, fused_loss: Which parts run as fused kernels.
        compiled, sequence_parallel, dropout: What else the framework does.
        overlaps: Whether gradients' and shards' collectives run beside compute.
        gradient_bytes: Bytes per gradient element as accumulated.
        reduces_half: Whether gradients are sent in half precision, however they are accumulated.
        bucket_elements: Elements of the flat buffers that reduce gradients and gather weights.
        logit_bytes: Bytes per logit at the peak of an unfused loss.
        state_bytes: Bytes of optimiser state per element, the float32 master included.
        recompute_share: Share of the layers that run again under full recomputation.
        fallback_softmax: Whether the fused softmax needs heads times samples divisible by four.
        vendor_attention: Whether attention runs in the vendor's tuned kernels, not FlashAttention-2.
        overlaps_tensor: Whether tensor-parallel collectives and stage messages run beside compute.
        shard_group: Ranks over which sharded weights are divided where not over all (hybrid sharding).
        memory_bytes: Memory of a device where it is not the kind's own.
        link: Kind of the link inside nodes where it is not the device's usual one.
        adds_gradients: Whether gradients of microbatches are added by kernels of their own.
        row_scales: Whether float8 operands have a scale for each row.
        keeps_outputs: Whether a pipeline stage keeps what it has sent until the gradient comes back.
        expert_tensor: Width of tensor parallelism inside experts; their groups are next to each other.
        gathers_late: Whether backward asks for a layer's sharded weights no earlier than it needs them.
        overlaps_experts: Whether experts' all-to-alls run beside other microbatches' compute.
        pure_half: Whether pointwise work too is in half precision, with no casts to float32.
        pads_vocab: Whether the vocabulary is padded on one tensor-parallel rank too.
        stops_early: Whether recomputation ends with the last result that is needed.
        selects_products: Whether selective recomputation keeps every second product, else all but scores.
        fused_experts: Whether experts' products apply activations, biases and casts themselves.
        captured: Whether whole steps are captured as CUDA graphs, routing of experts included.
        scaled_attention: Whether fused attention of runs in 8 or 4 bits multiplies in float8, too.
        separate_projections: Whether queries, keys, values and the gate are products of their own.
        growing_segments: Whether the allocator's segments grow, which leaves few holes.
        keeps_gathered: Whether a pipeline stage keeps sharded weights gathered, and its gradients whole,
            from the first microbatch to the last.
        divides_loss: Whether torch's own operators divide the loss by vocabulary in tensor groups.
        sends_apart: Whether a stage sends and receives in turn, never both ways at once.
        sends_whole: Whether each tensor-parallel rank sends gradients of activations whole, no slice.
        sums_tables: Whether input and output use one table, of which two pipeline stages hold a copy.
    """

    shape: ModelShape
    device: str
    devices: int
    per_node: int
    network: Network
    batch: float
    microbatch: float
    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    context: int = 1
    expert: int = 1
    virtual: int = 1
    zero: int = 0
    recompute: str = "none"
    dtype: str = "bfloat16"
    fused_attention: bool = True
    fused_pointwise: bool = True
    fused_loss: bool = False
    compiled: bool = False
    sequence_parallel: bool = False
    dropout: bool = False
    overlaps: bool = False
    gradient_bytes: float = 2.0
    state_bytes: float = 12.0
    link: str = ""
    recompute_share: float = 1.0
    fallback_softmax: bool = False
    vendor_attention: bool = False
    overlaps_tensor: bool = False
    shard_group: int = 0
    memory_bytes: float = 0.0
    bucket_elements: float = 0.0
    logit_bytes: float = 14.0
    selects_products: bool = False
    adds_gradients: bool = False
    row_scales: bool = False
    keeps_outputs: bool = False
    expert_tensor: int = 1
    gathers_late: bool = False
    reduces_half: bool = False
    overlaps_experts: bool = False
    pure_half: bool = False
    stops_early: bool = False
    pads_vocab: bool = True
    separate_projections: bool = False
    growing_segments: bool = False
    keeps_gathered: bool = False
    divides_loss: bool = False
    fused_experts: bool = False
    captured: bool = False
    scaled_attention: bool = False
    sends_apart: bool = False
    sends_whole: bool = False
    sums_tables: bool = False

    @property
    def sent_bytes(self) -> float:
        """Bytes per gradient element on the wire."""
        return 2.0 if self.reduces_half else self.gradient_bytes


@cache
def parameters() -> TrainingParameters:
    """The fitted constants that come with the catalogue."""
    path = catalogue.data_directory() / "training.toml"
    table = tomllib.loads(path.read_text(encoding="utf-8"))["parameters"]
    known = {f.name for f in fields(TrainingParameters)}
    assert set(table) == known, set(table) ^ known
    return TrainingParameters(**table)
