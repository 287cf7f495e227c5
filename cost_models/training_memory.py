"""Peak memory of one device in a training run, from shapes: weights, states, activations, workspace.

Activations per layer start from Korthikanti et al. (https://arxiv.org/abs/2205.05198), section 4: with s
tokens, b samples, h hidden, a heads, t tensor width, a layer keeps s b h (10 + 24/t + 5 a s / (h t))
bytes in half precision without fused attention. What frameworks differ in (gated feed-forwards, unfused
activations, grouped keys, which results selective recomputation keeps, how states are held) is counted
result by result.
"""

from dataclasses import dataclass, replace

from graphpar import catalogue
from graphpar.cost_models.training_run import Run

CONTEXT_BYTES = 0.9e9
"""CUDA context, loaded kernels and cuBLAS workspaces of one process."""

PEER_BYTES = 0.21e9
"""Buffers of the channels to one peer of a communicator."""

MOST_PEERS = 8
"""Ranks that a communicator connects one with at most: two of the ring, and a parent and two children in
each of two trees (https://developer.nvidia.com/blog/massively-scale-deep-learning-training-nccl-2-4/)."""

FRAGMENTATION = 1.10
"""Reserved over allocated: holes that the caching allocator cannot use in eager execution."""

WORST_FRAGMENTATION = 1.25
"""The most to reckon with: 56 of 57 measured peaks of BLOOM's runs stayed below it."""

DENSE_FRAGMENTATION = 1.0
"""The same where a compiler has planned the buffers, or where the allocator's segments grow as needed."""

USABLE = 0.945
"""Share of a device's memory that tensors can fill: driver and display take some, and what is left in
single pages helps nobody. Under pressure the caching allocator gives its cached blocks back, so its slack
does not count against it."""


@dataclass(frozen=True)
class MemoryParts:
    """Expected peak bytes of one device, by part; `slack` is what the allocator cannot use."""

    weights: float
    gradients: float
    optimizer: float
    gathered: float
    activations: float
    logits: float
    overhead: float
    slack: float

    @property
    def tensors(self) -> float:
        """What tensors take."""
        state = self.weights + self.gradients + self.optimizer + self.gathered
        return state + self.activations + self.logits

    @property
    def total(self) -> float:
        """The sum."""
        return self.tensors + self.overhead + self.slack


def memory_bytes(run: Run) -> float:
    """Expected peak of the fullest device."""
    return memory_parts(run).total


def bound_bytes(run: Run, stage: int) -> float:
    """Peak of one device of a stage if everything comes together at its worst.

    Beyond the expected peak: the loss's logits while one layer is recomputed, no fused loss, the
    allocator's worst slack in spite of a compiler's plan, and twice all that is no tensor.
    """
    expected = stage_parts(run, stage)
    kept, working = _activation_bytes(run, stage)
    logits = logits_bytes(replace(run, fused_loss=False)) if stage == run.pipeline - 1 else 0.0
    tensors = expected.tensors - expected.activations - expected.logits + kept + working + logits
    return tensors * WORST_FRAGMENTATION + 2 * expected.overhead


def fits(run: Run) -> bool:
    """Whether the run would go through on the fullest stage."""
    return filled(run) <= 1.0


def filled(run: Run) -> float:
    """What the fullest stage needs, over what a device has for it."""
    parts = memory_parts(run)
    capacity = run.memory_bytes or catalogue.devices()[run.device].memory_bytes
    return (parts.total - parts.slack) / (USABLE * capacity)


def memory_parts(run: Run) -> MemoryParts:
    """The fullest stage's peak by part: the first keeps most microbatches, the last has the logits."""
    return max((stage_parts(run, stage) for stage in range(run.pipeline)), key=lambda p: p.total)


def stage_layers(run: Run, stage: int) -> int:
    """Layers that a stage holds; where they do not divide, the first stages hold one more."""
    base, extra = divmod(run.shape.layers, run.pipeline)
    return base + (1 if stage < extra else 0)


def weights_of_stage(run: Run, stage: int) -> float:
    """Elements of weights that one device of a stage computes with."""
    return sum(stage_elements(run, stage))


def stage_elements(run: Run, stage: int) -> tuple[float, float]:
    """Elements of a stage that one device holds: what all tensor-parallel ranks divide, and experts."""
    shape, layers = run.shape, stage_layers(run, stage)
    tables = shape.vocab * shape.hidden * (stage == 0) + shape.outputs * shape.hidden * (
        stage == run.pipeline - 1 and not (shape.tied and run.pipeline == 1)
    )
    dense, experts = layer_elements(run)
    return dense * layers + tables / run.tensor, experts * layers


def layer_elements(run: Run) -> tuple[float, float]:
    """The same of an average layer; experts are divided by groups of their own."""
    routed = run.shape.routed_parameters
    return (run.shape.layer_parameters - routed) / run.tensor, routed / (run.expert * run.expert_tensor)


def dense_copies(run: Run) -> int:
    """Devices among which what each of them holds of a stage, but experts, is divided or summed."""
    return max(run.shard_group or run.data * run.context, 1)


def expert_copies(run: Run) -> int:
    """The same of experts: what their own groups leave of those devices."""
    return max(dense_copies(run) * run.tensor // (run.expert * run.expert_tensor), 1)


def stage_parts(run: Run, stage: int) -> MemoryParts:
    """The peak of one device of a stage by part."""
    weights, gradients, optimizer, gathered = _state_bytes(run, stage)
    kept, working = _activation_bytes(run, stage)
    logits = logits_bytes(run) if stage == run.pipeline - 1 else 0.0
    # One layer's recomputation and the loss do not happen at the same time.
    activations, logits = (kept + working, 0.0) if working > logits else (kept, logits)
    tensors = weights + gradients + optimizer + gathered + activations + logits
    slack = FRAGMENTATION if leaves_holes(run) else DENSE_FRAGMENTATION
    overhead = CONTEXT_BYTES + peers(run) * PEER_BYTES
    return MemoryParts(
        weights, gradients, optimizer, gathered, activations, logits, overhead, tensors * (slack - 1)
    )


def leaves_holes(run: Run) -> bool:
    """Whether the allocator keeps holes: no compiler has planned buffers, and segments do not grow."""
    return not (run.compiled or run.growing_segments)


def peers(run: Run) -> int:
    """Ranks that one device's communicators connect it with: tensor, pipeline and data groups.

    >>> from graphpar.cost_models.communication import Network
    >>> from graphpar.cost_models.transformer import ModelShape
    >>> gpt = ModelShape(24, 2048, 16, 16, 8192, 50257, 1024)
    >>> peers(Run(gpt, "a100-sxm-80gb", 64, 8, Network(200e9), 64, 2, tensor=2, data=32))
    9
    """
    widths = (run.tensor, run.pipeline, run.data * run.context)
    return sum(min(width - 1, MOST_PEERS) for width in widths)


def _state_bytes(run: Run, stage: int) -> tuple[float, float, float, float]:
    """Weights, gradients, optimiser state, and buffers of whole layers where weights are sharded."""
    dense, experts = stage_elements(run, stage)
    elements = dense + experts
    sharded = dense / dense_copies(run) + experts / expert_copies(run)
    if run.zero >= 3:
        # The shard itself is the master in full precision.
        gathered = _gathered_bytes(run, stage, elements)
        return 4.0 * sharded, 4.0 * sharded, (run.state_bytes - 4.0) * sharded, gathered
    stepped = sharded if run.zero >= 1 else elements
    summed = sharded if run.zero >= 2 else elements
    if is_wide(run):
        # No second copy of anything, however the optimiser would hold that of half precision.
        return 4.0 * elements, 4.0 * summed, (run.state_bytes - 4.0) * stepped, 0.0
    optimizer = run.state_bytes * stepped
    if run.gradient_bytes < 4:
        # Half-precision gradients are unscaled into float32 before the update.
        optimizer += 4.0 * stepped
    if run.bucket_elements and run.zero == 0:
        # DeepSpeed's optimiser without sharding copies all gradients into one flat buffer.
        optimizer += run.gradient_bytes * elements
    gathered = 2 * 2.0 * min(elements, run.bucket_elements)
    return 2.0 * elements, run.gradient_bytes * summed, optimizer, gathered


def is_wide(run: Run) -> bool:
    """Whether values are held in float32."""
    return run.dtype in ("float32", "tf32")


def _gathered_bytes(run: Run, stage: int, elements: float) -> float:
    """Whole weights and gradients of a stage whose state is sharded.

    Layers in half precision come and go: one in use, one on its way, one's gradient on its way out, in
    half precision and as it is summed. The tables are one unit with the model itself, which is there from
    forward to the end of backward, and the head's gradient with it. A pipeline stage that gathered its
    layers for each microbatch would do little else: some keep them, and gradients as they are summed, to
    the last one.
    """
    word = 4.0 if is_wide(run) else 2.0
    if run.keeps_gathered and run.pipeline > 1:
        return elements * (word + (run.gradient_bytes if microbatches(run) > 1 else word))
    layer = sum(layer_elements(run))
    tables = run.shape.embedding_parameters / run.tensor
    head = run.shape.outputs * run.shape.hidden / run.tensor * (stage == run.pipeline - 1)
    return layer * (3 * word + run.gradient_bytes) + (tables + head) * word


def microbatches(run: Run) -> int:
    """Microbatches of a replica's step."""
    return max(round(run.batch / (run.data * run.microbatch)), 1)


def in_flight(run: Run, stage: int) -> float:
    """Microbatches whose activations a stage holds at once under 1F1B or its interleaved form."""
    ahead = float(run.pipeline - stage)
    if run.virtual > 1:
        # Narayanan et al. 2021, https://arxiv.org/abs/2104.04473, section 2.2.
        ahead *= 1 + (run.pipeline - 1) / (run.pipeline * run.virtual)
    return min(ahead, microbatches(run))


def _activation_bytes(run: Run, stage: int) -> tuple[float, float]:
    """What waits for backward on a stage, and what of one layer is computed again beside it."""
    layers = stage_layers(run, stage)
    tokens = run.microbatch * run.shape.seq_len / run.context
    outer = run.tensor if run.sequence_parallel else 1
    full = layer_activation_bytes(run)
    # What a stage has sent on stays with DeepSpeed until its gradient is back.
    sent = tokens * run.shape.hidden * 2.0 if run.keeps_outputs and run.pipeline > 1 else 0.0
    one = {
        "none": full,
        "full": tokens * run.shape.hidden * 2.0 / outer,
        "selective": min(tokens * _selected_bytes_per_token(run), full),
    }[run.recompute]
    share = run.recompute_share if run.recompute == "full" else 1.0
    kept = in_flight(run, stage) * (layers * (share * one + (1 - share) * full) + sent)
    # What runs again is there beside the gradient of its result.
    passing = tokens * run.shape.hidden * 2.0 / outer
    again = 0.0 if run.recompute == "none" or not share else full - one + passing
    # Counted for half precision; a mask of bits is the same in both, and little.
    wide = 2.0 if is_wide(run) else 1.0
    return wide * kept, wide * again


def _selected_bytes_per_token(run: Run) -> float:
    """What selective recomputation keeps of one layer per token.

    Without fused attention it drops the scores alone (Korthikanti et al., section 4.2). Torchtitan's
    policy keeps, besides the layer's input, the attention's result, every second product's (queries,
    values, the feed-forward's first and last) and what was reduced and scattered. Nothing in backward
    reads the last product's result: eager torch keeps it all the same, a compiler drops it.
    """
    shape, t = run.shape, run.tensor
    outer = t if run.sequence_parallel else 1
    if not run.fused_attention or not run.selects_products:
        return _dense_bytes_per_token(run)
    q, kv = shape.heads * shape.head, shape.kv_heads * shape.head
    wide = shape.moe.ffn * shape.moe.topk if shape.moe else shape.ffn
    scattered = shape.hidden / outer if t > 1 else 0.0
    unread = 0.0 if run.compiled else shape.hidden + scattered
    return 2.0 * (shape.hidden / outer + scattered + unread + (2 * q + kv + wide) / t)


def _dense_bytes_per_token(run: Run) -> float:
    """What one layer keeps per token besides scores."""
    shape, t = run.shape, run.tensor
    outer = t if run.sequence_parallel else 1
    q, kv = shape.heads * shape.head, shape.kv_heads * shape.head
    wide = shape.moe.ffn * shape.moe.topk if shape.moe else shape.ffn
    # Inputs of two norms and of the products behind them, dropout masks.
    residual = (8.0 + (2.0 if run.dropout else 0.0)) * shape.hidden / outer
    # Queries, keys, values, the attention's result. Eager kernels of gated models keep queries and keys
    # again after rotation, the gate again after its activation, and float32 copies of the norms' inputs.
    heads = 2.0 * (2 * q + 2 * kv)
    results = 3.0 if shape.gated else 2.0
    if shape.gated and not run.fused_pointwise:
        heads += 2.0 * (q + kv)
        results += 1.0
        residual += 8.0 * shape.hidden / outer
    routed = 4.0 * shape.hidden * shape.moe.topk / outer if shape.moe else 0.0
    return residual + (heads + 2.0 * results * wide) / t + routed


def layer_activation_bytes(run: Run) -> float:
    """What one layer keeps of one microbatch without recomputation."""
    shape = run.shape
    tokens = run.microbatch * shape.seq_len / run.context
    total = tokens * _dense_bytes_per_token(run)
    if not run.fused_attention:
        scores = run.microbatch * shape.heads / run.tensor * shape.seq_len * shape.seq_len / run.context
        total += scores * (5.0 if run.dropout else 4.0)
    return total


def logits_bytes(run: Run) -> float:
    """Logits of one microbatch: in half precision, in float32, their logarithms, and the gradient.

    A fused loss keeps them in half precision with their gradient in place of them. Torch's loss of logits
    that are divided by vocabulary works out their exponentials anew in backward, beside all else.
    """
    tokens = run.microbatch * run.shape.seq_len / run.context
    apart = 4.0 if run.divides_loss and run.tensor > 1 else 0.0
    per_logit = 4.0 if run.fused_loss else run.logit_bytes + apart
    return tokens * run.shape.outputs / run.tensor * per_logit
