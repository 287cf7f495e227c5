"""Peak memory of one device in a training run, from shapes: weights, states, activations, workspace.

Activations per layer follow Korthikanti et al. (https://arxiv.org/abs/2205.05198), section 4: with s
tokens, b samples, h hidden, a heads, t tensor width, a layer keeps s b h (10 + 24/t + 5 a s / (h t))
bytes in half precision without fused attention.
"""

import math

from graphpar import catalogue
from graphpar.cost_models.training import Run

FRAMEWORK_BYTES = 3.5e9
"""CUDA context, cuBLAS workspaces and NCCL buffers of one process."""

FRAGMENTATION = 1.1
"""Reserved over allocated: holes that the caching allocator cannot use."""


def memory_bytes(run: Run) -> float:
    """Expected peak of the fullest device."""
    return FRAGMENTATION * needed_bytes(run) + FRAMEWORK_BYTES


def needed_bytes(run: Run) -> float:
    """What the tensors alone take: the first stage keeps most, the last has the logits."""
    if run.pipeline == 1:
        return state_bytes(run) + activation_bytes(run, 1) + logits_bytes(run)
    last = activation_bytes(run, 1) + logits_bytes(run)
    return state_bytes(run) + max(activation_bytes(run, run.pipeline), last)


def fits(run: Run) -> bool:
    """Whether the expected peak is within the device's memory."""
    return memory_bytes(run) <= catalogue.devices()[run.device].memory_bytes


def weights_per_device(run: Run) -> float:
    """Elements of weights that one device of the fullest stage computes with."""
    shape = run.shape
    per_layer = shape.layer_parameters
    if shape.moe is not None:
        attention = shape.attention_parameters
        per_layer = attention + (per_layer - attention) / max(run.expert, 1)
    layers = per_layer * math.ceil(shape.layers / run.pipeline)
    tables = shape.embedding_parameters if run.pipeline == 1 else shape.vocab * shape.hidden
    return (layers + tables) / run.tensor


def state_bytes(run: Run) -> float:
    """Weights, gradients and optimiser state: Adam keeps 12 bytes per element in float32."""
    elements = weights_per_device(run)
    shards = max(run.data, 1)
    if run.zero >= 3:
        gathered = 2 * 2.0 * run.shape.layer_parameters / run.tensor
        return elements * (2.0 + run.gradient_bytes + run.state_bytes) / shards + gathered
    states = run.state_bytes / (shards if run.zero >= 1 else 1)
    gradients = run.gradient_bytes / (shards if run.zero >= 2 else 1)
    return elements * (2.0 + gradients + states)


def activation_bytes(run: Run, stages_ahead: int) -> float:
    """What forward keeps for the microbatches in flight on a stage, and one layer's work.

    Args:
        run: The run.
        stages_ahead: Stages from this one to the last, itself included: as many microbatches wait.
    """
    shape = run.shape
    layers = math.ceil(shape.layers / run.pipeline)
    microbatches = max(round(run.batch / (run.data * run.microbatch)), 1)
    in_flight = min(float(stages_ahead), microbatches)
    if run.virtual > 1:
        # Interleaving holds more: Narayanan et al. 2021, https://arxiv.org/abs/2104.04473, section 2.2.
        in_flight = min(in_flight * (1 + (run.pipeline - 1) / (run.pipeline * run.virtual)), microbatches)
    tokens = run.microbatch * shape.seq_len / run.context
    full = layer_activation_bytes(run)
    if run.recompute == "full":
        kept = tokens * shape.hidden * 2.0 / (run.tensor if run.sequence_parallel else 1)
        return in_flight * layers * kept + full
    return in_flight * layers * full


def layer_activation_bytes(run: Run) -> float:
    """What one layer keeps of one microbatch without full recomputation."""
    shape, t = run.shape, run.tensor
    tokens = run.microbatch * shape.seq_len / run.context
    outer = t if run.sequence_parallel else 1
    q, kv = shape.heads * shape.head, shape.kv_heads * shape.head
    wide = shape.moe.ffn * shape.moe.topk if shape.moe else shape.ffn
    # Inputs of two norms and of the products behind them, dropout masks; queries, keys, values and the
    # attention result; the feed-forward's inner values before and after the activation.
    residual = (8.0 + (2.0 if run.dropout else 0.0)) * shape.hidden / outer
    heads = 2.0 * (2 * q + 2 * kv) / t
    inner = 2.0 * (3 if shape.gated else 2) * wide / t
    routed = 4.0 * shape.hidden * shape.moe.topk / outer if shape.moe else 0.0
    total = tokens * (residual + heads + inner + routed)
    if not run.fused_attention and run.recompute != "selective":
        scores = run.microbatch * shape.heads / t * shape.seq_len * shape.seq_len / run.context
        total += scores * (5.0 if run.dropout else 4.0)
    if run.recompute == "selective" and run.fused_attention:
        total *= 0.7
    return total


def logits_bytes(run: Run) -> float:
    """Logits of one microbatch and their gradient; without a fused loss also in float32, twice."""
    tokens = run.microbatch * run.shape.seq_len / run.context
    per_logit = 4.0 if run.fused_loss else 10.0
    return tokens * run.shape.outputs / run.tensor * per_logit
