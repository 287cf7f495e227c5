"""Time and memory of a whole training step from a model's shape, the hardware and a configuration.

The step is built from parts with physical meaning:

    stage = layers x max(device time, host time) + tensor-parallel collectives       per microbatch
    step  = m x slowest stage + other stages / v + what is not hidden of the gradients' collective
            + optimiser

with m microbatches and v chunks per stage. A stage exchanges activations and gradients with its
neighbours; the slowest one holds most layers, or the head, or has more to exchange. What devices send
each other is in `training_exchanges.py`.

`TrainingParameters` are the few numbers that no datasheet gives; `benchmarks/fit_published.py` fits
them and `training.toml` keeps them.
"""

import math
from dataclasses import dataclass, replace

from graphpar.cost_models import gemm
from graphpar.cost_models.rates import interpolate
from graphpar.cost_models.training_exchanges import SCALED, Exchanges
from graphpar.cost_models.training_memory import (
    dense_copies,
    expert_copies,
    stage_elements,
    stage_layers,
    weights_of_stage,
)
from graphpar.cost_models.training_run import Run, TrainingParameters
from graphpar.cost_models.transformer import LayerWork, Product, layer_work

LOSS_PASSES = 13.0
"""Times that float32 logits pass through memory: cast from half precision (1.5), maximum (1), less it
(2), exponentials (2), sum (1), quotient (2), gradient (2), cast back (1.5), counted in Megatron-LM's loss
(https://github.com/NVIDIA/Megatron-LM/blob/main/megatron/core/tensor_parallel/cross_entropy.py)."""

FUSED_LOSS_PASSES = 1.5
"""A fused loss reads half-precision logits twice and writes their gradient over them once."""

POINTWISE_SHARE = 0.91
"""Of the datasheet's memory bandwidth, reached by large pointwise kernels: measured on H100 and on H200
(`benchmarks/device_curves_runs/`); what A100's steps tell by themselves is 0.91 too. For other vendors'
devices the family's fraction stands."""

SHARPNESS = 8
"""Norm by which a layer's times on device and host are joined: the longer one, and a little more where
they are near each other, for which of them leads changes from kernel to kernel."""

HALF = ("float16", "bfloat16")
WIDE = ("float32", "tf32")
WIDE_RESULT = 2**14
"""Columns beyond which a result is the scores of a vocabulary; widths of layers are averages over devices
and need not be whole."""

PLAIN_SHARE = 0.8
"""Reached of the float32 units' peak by batched products."""

CAST_TRAFFIC = 1.5
"""Memory traffic of eager pointwise work under automatic casts, half of it in float32, over without."""

ROW_SCALED = 0.5
"""Rate of float8 products with a scale for each row over that with one scale, by torchtitan's runs
(https://github.com/pytorch/torchtitan/tree/main/benchmarks)."""

UNALIGNED_SHARE = 0.3
"""Rate of half-precision products whose result has rows that are no multiple of 16 bytes, over others:
what steps take beside their layers, told from such that differ in depth alone, with 50257 outputs
(https://github.com/VIA-Research/vTrain/tree/main/data)."""

FALLBACK_KERNELS = 5.0
"""Kernels of an unfused scaled and masked softmax (scale, mask, to float32, softmax, back) beyond one."""


@dataclass(frozen=True)
class StepTime:
    """A predicted step with its parts, all in seconds."""

    total_s: float
    compute_s: float
    host_s: float
    tensor_s: float
    pipeline_s: float
    data_s: float
    optimizer_s: float
    bubble_s: float


def step_time(run: Run, p: TrainingParameters) -> StepTime:
    """Predict one step."""
    machine = _Machine(run, p)
    # A last microbatch that is smaller than the others takes its part of their time.
    passes = max(run.batch / (run.data * run.microbatch), 1.0)
    layers = math.ceil(run.shape.layers / run.pipeline)
    layer = machine.layer_time()
    shard_s = machine.shard_collectives_s(layer.device_s)
    shards_s = layers * shard_s
    gradients_s = machine.accumulation_s() if passes > 1 else 0.0
    each_s = layer.total_s + shard_s
    stages_s = [stage_layers(run, stage) * each_s for stage in range(run.pipeline)]
    stages_s[-1] += machine.head_seconds()
    slowest_s, exchange_s = max(zip(stages_s, machine.exchanges_s(), strict=True), key=sum)
    bubble_s = (sum(stages_s) - slowest_s) / run.virtual
    # The first microbatch's first chunk is part of what fills the pipeline, its other chunks are not.
    pipeline_s = (passes - 1 / run.virtual) * exchange_s + machine.filling_s()
    work_s = passes * (slowest_s + gradients_s)
    data_s = machine.gradient_collective_s(work_s)
    optimizer_s = machine.optimizer_s() + p.step_host_s
    total_s = work_s + bubble_s + pipeline_s + data_s + optimizer_s
    total_s *= 1 + p.imbalance * math.log2(max(run.devices, 1))
    return StepTime(
        total_s,
        passes * layers * layer.device_s,
        passes * layers * layer.host_s,
        passes * layers * layer.collectives_s,
        pipeline_s,
        data_s + passes * shards_s,
        optimizer_s,
        bubble_s,
    )


@dataclass(frozen=True)
class _LayerTime:
    """One layer and microbatch, forward and backward."""

    device_s: float
    host_s: float
    collectives_s: float
    total_s: float


def _either(first_s: float, second_s: float) -> float:
    return math.sqrt(math.hypot(first_s**2, second_s**2))


@dataclass(frozen=True)
class _Machine(Exchanges):
    """One run on its devices."""

    @property
    def bytes_per_s(self) -> float:
        share = POINTWISE_SHARE if self.kind.vendor == "NVIDIA" else self.family.bandwidth_fraction
        return self.kind.memory_bytes_per_s * share

    def peak(self, dtype: str) -> float:
        """Dense peak for a dtype; formats that the device lacks run in the next wider one it has."""
        peaks = self.kind.peak_flops_per_s
        if dtype in peaks:
            return peaks[dtype]
        if dtype == "float4" and "float8_e4m3fn" in peaks:
            return peaks["float8_e4m3fn"]
        if dtype == "bfloat16":
            return peaks.get("float32", max(peaks.values()))
        half = max(peaks.get(d, 0.0) for d in ("float16", "bfloat16", "float32"))
        if dtype == "tf32":
            return max(half / 2, peaks.get("float32", 0.0)) if "bfloat16" in peaks else peaks["float32"]
        return half

    @property
    def itemsize(self) -> float:
        """Bytes of an activation element."""
        return 4.0 if self.run.dtype in WIDE else 2.0

    def product_s(self, product: Product, dtype: str) -> float:
        """A matrix product: arithmetic and memory traffic, partly overlapped."""
        memory_s = product.bytes(self.itemsize) / (
            self.kind.memory_bytes_per_s * self.family.bandwidth_fraction
        )
        arithmetic_s = self._arithmetic_s(product, dtype)
        if dtype in HALF and product.columns > WIDE_RESULT and product.columns % 8:
            arithmetic_s /= UNALIGNED_SHARE
        return _either(arithmetic_s, memory_s)

    def _arithmetic_s(self, product: Product, dtype: str) -> float:
        points = self.family.matmul_efficiency
        top = self.kind.measured_fraction(dtype) or points[-1][1]
        held = self.p.sustained_share if dtype in HALF and gemm.is_power_bound(self.kind) else 1.0
        share = ROW_SCALED if self.run.row_scales and dtype in SCALED else held
        if self.kind.multiprocessors:
            return gemm.product_s(
                product.rows,
                product.columns,
                product.inner,
                product.count,
                flops_per_s=self.peak(dtype) * top * share,
                multiprocessors=self.kind.multiprocessors,
                bytes_per_s=self.kind.memory_bytes_per_s * self.family.bandwidth_fraction,
            )
        efficiency = interpolate(points, product.flops) * top / points[-1][1] * share
        return product.flops / (self.peak(dtype) * efficiency)

    def _score_product_s(self, product: Product, dtype: str) -> float:
        """A product with scores that lie in memory.

        Where the rows of half-precision matrices are no multiples of 16 bytes, tensor cores cannot load
        them, and the plain float32 units do the work.
        """
        if dtype in HALF and (product.columns % 8 or product.inner % 8):
            return product.flops / (self.peak("float32") * PLAIN_SHARE)
        return self.product_s(product, dtype)

    def work(self) -> LayerWork:
        run = self.run
        work = layer_work(
            run.shape,
            run.microbatch,
            tensor=run.tensor,
            context=run.context,
            expert=run.expert,
            fused_attention=run.fused_attention,
            pointwise_traffic=self._pointwise_traffic(),
            sequence_parallel=run.sequence_parallel,
            dropout=run.dropout,
            expert_passes=self.p.expert_traffic,
            separate=run.separate_projections,
            fused_experts=run.fused_experts,
        )
        if run.fallback_softmax and run.shape.heads // run.tensor * run.microbatch % 4:
            kernels = work.kernels + FALLBACK_KERNELS
            return replace(work, kernels=kernels, score_bytes=3 * work.score_bytes)
        return work

    def _pointwise_traffic(self) -> float:
        if self.run.fused_pointwise:
            return 1.0
        return max(self.p.unfused_traffic / (CAST_TRAFFIC if self.run.pure_half else 1.0), 1.0)

    def layer_time(self) -> _LayerTime:
        """One layer, forward and backward, recomputation included.

        Kernels and collectives are issued ahead by the host, which alone bounds small layers. On the
        device each kernel costs its launch beside its work.
        """
        work, run = self.work(), self.run
        products_s = sum(self.product_s(x, run.dtype) for x in work.products)
        traffic_s = work.traffic_bytes * self.itemsize / 2 / self.bytes_per_s
        if run.dtype in SCALED:
            # Operands are read once more to be scaled and cast, along both directions for scales by row.
            casts = 3 * work.input_elements * (2 if run.row_scales else 1)
            traffic_s += casts / self.bytes_per_s
        attention_s = self._attention_s(work)
        forward_s = products_s + traffic_s + attention_s
        backward_s = sum(self.product_s(x, run.dtype) for p in work.products for x in p.gradients)
        backward_s += (
            self.p.backward_traffic * traffic_s + work.sum_bytes * self.itemsize / 2 / self.bytes_per_s
        )
        backward_s += (2.5 if run.fused_attention else 2.0) * attention_s
        again = run.recompute_share if run.recompute == "full" else 0.0
        # Stopped once nothing more is missing, recomputation leaves out the layer's last product.
        spared_s = self.product_s(work.products[-1], run.dtype) if run.stops_early else 0.0
        again_s = again * (forward_s - spared_s)
        if run.recompute == "selective":
            again_s = attention_s if not run.fused_attention else 0.3 * forward_s
        passes = 3.0 + again
        kernels = work.kernels + work.routing_kernels
        device_s = forward_s + backward_s + again_s + kernels * passes * self.family.launch_s
        each = self.p.compiled_kernel_s if run.compiled else self.p.host_kernel_s
        # What routing decides is captured only where nothing of it comes back to the host.
        routed = each if run.captured else self.p.host_kernel_s
        issue_s = each * work.kernels + routed * work.routing_kernels
        count = self._tensor_collectives()
        host_s = issue_s * passes + count * self._wait_s()
        collectives_s = count * self.tensor_collective_s(device_s / max(count, 1))
        collectives_s += (4 + 2 * again) * self.expert_collective_s(device_s / 4)
        collectives_s += (3 + again) * self.context_collective_s(attention_s)
        collectives_s += self._late_s(count, host_s, device_s + collectives_s)
        longer_s, shorter_s = sorted((device_s + collectives_s, host_s), reverse=True)
        total_s = longer_s * (1 + (shorter_s / longer_s) ** SHARPNESS) ** (1 / SHARPNESS)
        return _LayerTime(device_s, host_s, collectives_s, total_s)

    def _wait_s(self) -> float:
        """What hosts of a tensor-parallel group wait for the slowest: the most of so many jitters."""
        return self.p.wait_s * math.log2(self.run.tensor)

    def _late_s(self, count: int, host_s: float, device_s: float) -> float:
        """What a layer's collectives inside a node begin later than alone, by the host's share of the
        device's time: a host far ahead has issued them long before. Over nodes latency covers it. A
        faster device is never later by more than it gains, for it could as well have been slower."""
        if not count or self.run.tensor > self.run.per_node:
            return 0.0
        most_s = count * self.p.start_s
        late_s = most_s * min(host_s / device_s, 1.0)
        # Where device and lateness together are least.
        least_s = math.sqrt(most_s * host_s)
        return min(late_s, 2 * least_s - device_s) if least_s > max(device_s, host_s) else late_s

    def _tensor_collectives(self) -> int:
        """All-reduces of one layer: two forward, two backward, two more where forward runs again.

        Selective recomputation that keeps what was reduced and scattered gathers again: half of two.
        """
        run = self.run
        if run.tensor == 1:
            return 0
        gathers = run.recompute == "selective" and run.selects_products and run.sequence_parallel
        return 4 + (2 if run.recompute == "full" else 1 if gathers else 0)

    def _attention_s(self, work: LayerWork) -> float:
        scaled = "float8_e4m3fn" if self.run.scaled_attention else "bfloat16"
        dtype = scaled if self.run.dtype in SCALED else self.run.dtype
        if work.score_products:
            products = sum(self._score_product_s(x, dtype) for x in work.score_products)
            return products + work.score_bytes / self.bytes_per_s
        share = self.p.vendor_attention_share if self.run.vendor_attention else self.p.attention_share
        rate = self.peak(dtype) * self.family.attention_fraction * share
        return work.attention_flops / rate

    def head_seconds(self) -> float:
        """The output layer with its loss, forward and backward."""
        run, shape = self.run, self.run.shape
        tokens = run.microbatch * shape.seq_len / run.context
        # Vocabularies are padded to multiples of 128 per tensor-parallel rank.
        outputs = math.ceil(shape.outputs / (128 * run.tensor)) * 128 if shape.outputs > 128 else 2
        if not run.pads_vocab and run.tensor == 1:
            outputs = shape.outputs
        product = Product(tokens, outputs, shape.hidden)
        dtype = "bfloat16" if run.dtype in SCALED else run.dtype
        passes = FUSED_LOSS_PASSES if run.fused_loss else LOSS_PASSES
        itemsize = 2 if run.pure_half else 4
        loss_bytes = tokens * shape.outputs / run.tensor * itemsize * passes
        return 3 * self.product_s(product, dtype) + loss_bytes / self.bytes_per_s

    def accumulation_s(self) -> float:
        """One microbatch's gradients added to those before: read both, write the sum."""
        if not self.run.adds_gradients:
            return 0.0
        return 3 * self.run.gradient_bytes * weights_of_stage(self.run, 0) / self.bytes_per_s

    def optimizer_s(self) -> float:
        """Adam in float32 with half-precision copies: 12 bytes of state read and written, and more."""
        run = self.run
        dense, experts = stage_elements(run, 0)
        if run.zero >= 1:
            dense, experts = dense / dense_copies(run), experts / expert_copies(run)
        return (dense + experts) * 34.0 / self.bytes_per_s
