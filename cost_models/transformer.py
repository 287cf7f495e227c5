"""Shapes of transformer training runs: work per layer and device under tensor and expert parallelism.

Used where no graph is at hand, only a model's published shape. Sizes: T tokens of a microbatch on one
device, h hidden, f feed-forward, s sequence, d head size, t tensor-parallel width.
"""

from dataclasses import dataclass, field

LATENT_HEAD = 128
ROTARY = 64
"""Head size and rotary part of latent attention (DeepSeek-V2, https://arxiv.org/abs/2405.04434)."""


ROUTER_KERNELS = 40.0
"""Scores, top choices, balance, permutation of tokens and its inverse."""

KERNELS_PER_EXPERT = 4.0
"""Two products and the casts of what they read."""

BIASED_KERNELS_PER_EXPERT = 3.0
"""Per pass, nine in three: the bias weighted and added; backward a cast, two products and four sums."""

BIASED_OUTPUT_BYTES = 28.0
CLAMPED_BYTES = 16.0
"""Memory traffic in forward of experts with biases and clamped activations, per element of their output
and of their width: the bias weighted (4) and added (10) in float32, joined over experts (8) and cast back
(6); gate and values clamped (8) and joined again (8). Counted in Megatron Core
(https://github.com/NVIDIA/Megatron-LM/blob/main/megatron/core/transformer/moe/experts.py, `_apply_bias`,
and fusions/fused_bias_geglu.py)."""


@dataclass(frozen=True)
class MoeShape:
    """A mixture-of-experts layer."""

    experts: int
    topk: int
    ffn: int
    dense_layers: int = 0
    shared_experts: int = 0
    biased: bool = False


@dataclass(frozen=True)
class ModelShape:
    """What a published table says of a transformer."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    seq_len: int
    gated: bool = False
    tied: bool = False
    head_size: int = 0
    moe: MoeShape | None = None
    causal: bool = True
    query_rank: int = 0
    value_rank: int = 0
    labels: int = 0

    @property
    def outputs(self) -> int:
        """Scores per token of the last layer: the vocabulary unless it has its own labels."""
        return self.labels or self.vocab

    @property
    def head(self) -> int:
        """Size of one attention head."""
        return self.head_size or self.hidden // self.heads

    @property
    def attention_parameters(self) -> float:
        """Weights of one layer's attention."""
        return sum(p.columns * p.inner for p in self.attention_products(1.0, 1))

    def attention_products(
        self, tokens: float, tensor: int, separate: bool = False
    ) -> tuple["Product", ...]:
        """Projections before and after attention; queries, keys and values apart or as one product.

        With ranks given it is latent attention: queries, keys and values through low-rank factors,
        with `ROTARY` more elements per head in queries and keys.
        """
        h, t, heads = self.hidden, tensor, self.heads
        if not self.value_rank:
            q, kv = heads * self.head, self.kv_heads * self.head
            widths = (q, kv, kv) if separate else (q + 2 * kv,)
            return (*(Product(tokens, each / t, h) for each in widths), Product(tokens, h, q / t))
        size = LATENT_HEAD
        rank = self.query_rank or h
        down = Product(tokens, self.value_rank + ROTARY + self.query_rank, h)
        queries = Product(tokens, heads * (size + ROTARY) / t, rank)
        keys_values = Product(tokens, heads * 2 * size / t, self.value_rank)
        return (down, queries, keys_values, Product(tokens, h, heads * size / t))

    def mlp_parameters(self, ffn: int) -> float:
        """Weights of one feed-forward block of some width."""
        return float(self.hidden * ffn * (3 if self.gated else 2))

    @property
    def layer_parameters(self) -> float:
        """Weights of an average layer, all experts included."""
        if self.moe is None:
            return self.attention_parameters + self.mlp_parameters(self.ffn)
        m = self.moe
        sparse = self.mlp_parameters(m.ffn) * (m.experts + m.shared_experts)
        sparse += self.hidden * m.experts
        share = m.dense_layers / self.layers
        mixed = (1 - share) * sparse + share * self.mlp_parameters(self.ffn)
        return self.attention_parameters + mixed

    @property
    def routed_parameters(self) -> float:
        """Those of them that are experts to choose from."""
        if self.moe is None:
            return 0.0
        sparse = 1 - self.moe.dense_layers / self.layers
        return sparse * self.moe.experts * self.mlp_parameters(self.moe.ffn)

    @property
    def embedding_parameters(self) -> float:
        """Weights of the input table, and of the output where it is not the same."""
        return float(self.vocab * self.hidden * (1 if self.tied else 2))

    @property
    def parameters(self) -> float:
        """All weights."""
        return self.layers * self.layer_parameters + self.embedding_parameters


@dataclass(frozen=True)
class Product:
    """A matrix product: rows x inner times inner x columns, `count` of them batched."""

    rows: float
    columns: float
    inner: float
    count: float = 1.0

    @property
    def flops(self) -> float:
        """Operations."""
        return 2.0 * self.count * self.rows * self.columns * self.inner

    @property
    def gradients(self) -> tuple["Product", "Product"]:
        """The two products of backward: of the input's gradient and of the weight's.

        >>> Product(8, 4, 2).gradients
        (Product(rows=8, columns=2, inner=4, count=1.0), Product(rows=2, columns=4, inner=8, count=1.0))
        """
        return (
            Product(self.rows, self.inner, self.columns, self.count),
            Product(self.inner, self.columns, self.rows, self.count),
        )

    def bytes(self, itemsize: float) -> float:
        """Operands and result, each moved once."""
        one = self.rows * self.inner + self.inner * self.columns + self.rows * self.columns
        return self.count * one * itemsize


@dataclass(frozen=True)
class LayerWork:
    """One layer's forward on one device: products, attention, plain memory traffic, kernels.

    `routing_kernels` come with experts; how many tokens they work on is known only while they run.
    `input_elements` are those that products read, what several of them read once; `sum_bytes` is what
    backward moves to add up the gradients of such.
    """

    products: tuple[Product, ...]
    attention_flops: float
    traffic_bytes: float
    kernels: float
    score_bytes: float = 0.0
    score_products: tuple[Product, ...] = field(default=())
    routing_kernels: float = 0.0
    sum_bytes: float = 0.0
    input_elements: float = 0.0


def layer_work(
    shape: ModelShape,
    samples: float,
    *,
    tensor: int = 1,
    context: int = 1,
    expert: int = 1,
    fused_attention: bool = True,
    pointwise_traffic: float = 1.0,
    sequence_parallel: bool = False,
    dropout: bool = False,
    expert_passes: float = 4.0,
    separate: bool = False,
    fused_experts: bool = False,
) -> LayerWork:
    """Forward work of one layer for a microbatch of so many samples.

    Args:
        shape: The model.
        samples: Sequences in the microbatch.
        tensor: Tensor-parallel width.
        context: Context-parallel width: tokens of a sequence are divided.
        expert: Expert-parallel width; tokens of the group meet each device's experts.
        fused_attention: Whether scores stay on chip.
        pointwise_traffic: Memory traffic of norms, activations and residuals over fused kernels'.
        sequence_parallel: Whether the parts outside of tensor parallelism are divided too.
        dropout: Whether dropout runs on residuals (and scores).
        expert_passes: Times that routed tokens pass through memory on the way to experts and back.
        separate: Whether queries, keys, values, gate and values of the feed-forward are products each.
        fused_experts: Whether experts' products apply activations, biases and casts themselves.
    """
    tokens = samples * shape.seq_len / context
    h, t = shape.hidden, tensor
    q, kv = shape.heads * shape.head, shape.kv_heads * shape.head
    joined, products = (
        [*shape.attention_products(tokens, t, apart), *_mlp_products(shape, tokens, t, expert, apart)]
        for apart in (False, separate)
    )
    inputs = sum(x.rows * x.inner * x.count for x in joined)
    # Two additions for queries, keys and values, one for the gate: read twice, write.
    additions = (2 + (shape.gated and shape.moe is None)) * (separate and not shape.value_rank)
    summed = additions * 3 * 2.0 * tokens * h
    outer = t if sequence_parallel else 1
    # Two norms (read, write), two residual additions (read twice, write), with bias and dropout mask.
    residual = 4 + 2 * (3.5 if dropout else 3)
    routed = shape.moe.ffn * shape.moe.topk if shape.moe else 0
    wide = (3 if shape.gated else 2) * (routed or shape.ffn)
    if fused_experts and shape.moe:
        wide, inputs = 0, inputs - tokens * routed / t
    heads = 2 * (q + 2 * kv) + 2 * q
    fused = residual * h / outer + wide / t + heads / t
    moved = tokens * 2.0 * fused * pointwise_traffic
    if shape.moe is not None:
        moved += tokens * 2.0 * expert_passes * h * shape.moe.topk / outer
        if shape.moe.biased and not fused_experts:
            moved += tokens * (BIASED_OUTPUT_BYTES * h * shape.moe.topk + CLAMPED_BYTES * routed / t)
    pairs = shape.seq_len * (0.5 if shape.causal and fused_attention else 1.0)
    attention = 4.0 * tokens * pairs * q / t
    if fused_attention:
        kernels = 14.0 if pointwise_traffic == 1 else 22.0
        routing = _routing_kernels(shape, expert, fused_experts)
        return LayerWork(
            tuple(products),
            attention,
            moved,
            kernels,
            routing_kernels=routing,
            sum_bytes=summed,
            input_elements=inputs,
        )
    scores = samples * shape.heads / t * shape.seq_len / context * shape.seq_len
    batch = samples * shape.heads / t
    score_products = (
        Product(shape.seq_len, shape.seq_len, shape.head, batch),
        Product(shape.seq_len, shape.head, shape.seq_len, batch),
    )
    # Softmax reads and writes scores, dropout reads and writes them with a mask of one byte.
    score_bytes = scores * (2 * 2 + (2 * 2 + 1 if dropout else 0))
    kernels = 30.0
    return LayerWork(
        tuple(products),
        0.0,
        moved,
        kernels,
        score_bytes,
        score_products,
        sum_bytes=summed,
        input_elements=inputs,
    )


def _routing_kernels(shape: ModelShape, expert: int, fused: bool) -> float:
    """Kernels of the router, of sorting tokens there and back, and of each expert at hand."""
    if shape.moe is None:
        return 0.0
    each = KERNELS_PER_EXPERT + BIASED_KERNELS_PER_EXPERT * (shape.moe.biased and not fused)
    return ROUTER_KERNELS + (0 if fused else each * max(shape.moe.experts / expert, 1))


def _mlp_products(shape: ModelShape, tokens: float, t: int, expert: int, separate: bool) -> list[Product]:
    widths = 2 if shape.gated else 1
    if shape.moe is None:
        apart, joined = (widths, 1) if separate else (1, widths)
        return [
            *[Product(tokens, joined * shape.ffn / t, shape.hidden)] * apart,
            Product(tokens, shape.hidden, shape.ffn / t),
        ]
    moe = shape.moe
    here = max(moe.experts / expert, 1)
    routed = tokens * moe.topk
    # Each device holds `here` experts and sees the tokens that the group routes to them.
    per_expert = routed / here
    found = [
        Product(tokens, moe.experts, shape.hidden),
        Product(per_expert, widths * moe.ffn / t, shape.hidden, here),
        Product(per_expert, shape.hidden, moe.ffn / t, here),
    ]
    if moe.shared_experts:
        shared = moe.ffn * moe.shared_experts
        found.append(Product(tokens, widths * shared / t, shape.hidden))
        found.append(Product(tokens, shape.hidden, shared / t))
    return found
