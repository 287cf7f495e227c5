"""Work of matrix products, attention, normalisation, softmax, losses and lookups."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from graphpar.cost_models.pointwise import Rule, memory_kernel, view_kernel
from graphpar.cost_models.work import Call, Kernel, OpWork
from graphpar.ir.formats import EIGHT_BIT_MULTIPLE, format_of, multiplies_8_bits
from graphpar.ir.ops import Op
from graphpar.ir.optable import packet


def product(call: Call, batch: int, rows: int, columns: int, inner: int) -> Kernel:
    """A (batched) matrix product: rows x inner times inner x columns."""
    dtype = call.dtype(call.out)
    width = call.bytes(call.out) / max(call.numel(call.out), 1)
    elements = batch * (rows * inner + inner * columns + rows * columns)
    return Kernel(
        "matmul" if batch == 1 else "batched_matmul",
        batch * rows * columns,
        elements * width,
        2 * batch * rows * columns * inner,
        dtype,
        matrix=(batch, rows, columns, inner),
    )


def linear(call: Call) -> OpWork:
    """x W^T + b, with any number of leading dimensions."""
    return _weighted(call, call.operand(0), call.operand(1), call.operand(2, "bias"))


def addmm(call: Call) -> OpWork:
    """b + x W."""
    return _weighted(call, call.operand(1), call.operand(2), call.operand(0))


def _weighted(call: Call, x: Op | None, weight: Op | None, bias: Op | None) -> OpWork:
    assert x is not None
    assert weight is not None
    inner = call.sizes(x)[-1]
    columns = call.sizes(call.out)[-1]
    rows = call.numel(call.out) // max(columns, 1)
    forward: tuple[Kernel, ...] = (product(call, 1, rows, columns, inner),)
    backward, saved = _product_backward(call, x, weight, 1, rows, columns, inner)
    if multiplies_8_bits(call.op) and inner % EIGHT_BIT_MULTIPLE == columns % EIGHT_BIT_MULTIPLE == 0:
        return _in_8_bits(call, rows, columns, inner, forward, backward)
    late = _of_weight(call, x, weight, backward)
    if call.needs_grad(bias):
        backward.append(memory_kernel(call, "reduce", call.bytes(call.out), call.numel(call.out)))
        late = (*late, backward[-1]) if late else ()
    return OpWork(forward, tuple(backward), saved, late=late)


def _of_weight(call: Call, x: Op, weight: Op, backward: Sequence[Kernel]) -> tuple[Kernel, ...]:
    """The kernels of a product's backward that make the gradient of its right side."""
    if not call.needs_grad(weight):
        return ()
    both = call.needs_grad(x)
    return tuple(backward[len(backward) // 2 :] if both else backward)


def _in_8_bits(
    call: Call, rows: int, columns: int, inner: int, forward: Sequence[Kernel], backward: Sequence[Kernel]
) -> OpWork:
    """Three products in 8 bits; activations and gradients are rounded before them and kept so.

    Rounding reads a matrix for its largest element, scales it and casts it; for the gradient of the
    weight both operands are turned besides. Biases are added after, and one node makes both gradients.
    """

    def rounding(elements: float) -> list[Kernel]:
        return [
            Kernel("reduce", elements, 2 * elements, elements),
            Kernel("pointwise", elements, 4 * elements, elements),
            Kernel("cast", elements, 3 * elements, elements),
        ]

    def narrow(products: Sequence[Kernel]) -> list[Kernel]:
        return [replace(one, dtype=format_of(call.op), bytes=one.bytes / 2) for one in products]

    x, made = float(rows * inner), float(rows * columns)
    ahead, back = [*rounding(x), *narrow(forward)], narrow(backward)
    if len(call.op.operands()) > 2:
        ahead.append(memory_kernel(call, "pointwise", 2 * call.bytes(call.out), made))
        back.append(memory_kernel(call, "reduce", call.bytes(call.out), made))
    if not backward:
        return OpWork(tuple(ahead))
    turned = [Kernel("copy", x, 2 * x), Kernel("copy", made, 2 * made)]
    return OpWork(tuple(ahead), (*rounding(made), *turned, *back), saved_bytes=x)


def _product_backward(
    call: Call, left: Op, right: Op, batch: int, rows: int, columns: int, inner: int
) -> tuple[list[Kernel], tuple[str, ...]]:
    """Two more products, each only where an operand needs its gradient."""
    backward, saved = [], []
    if call.needs_grad(left):
        backward.append(product(call, batch, rows, inner, columns))
        saved.append(right.name)
    if call.needs_grad(right):
        backward.append(product(call, batch, inner, columns, rows))
        saved.append(left.name)
    return backward, tuple(saved)


def matmul(call: Call) -> OpWork:
    """A product of two tensors whose leading dimensions are batches."""
    first, second = (1, 2) if packet(call.op) == "baddbmm" else (0, 1)
    left, right = call.operand(first), call.operand(second)
    assert left is not None
    assert right is not None
    a, b = call.sizes(left), call.sizes(right)
    inner = a[-1]
    rows = a[-2] if len(a) > 1 else 1
    columns = b[-1] if len(b) > 1 else 1
    batch = max(call.numel(call.out) // max(rows * columns, 1), 1)
    if len(b) <= 2 and batch > 1:
        # A shared right side makes one tall product of the whole batch.
        rows, batch = rows * batch, 1
    forward = (product(call, batch, rows, columns, inner),)
    backward, saved = _product_backward(call, left, right, batch, rows, columns, inner)
    return OpWork(forward, tuple(backward), saved, late=_of_weight(call, left, right, backward))


def einsum(call: Call) -> OpWork:
    """A contraction, priced as one product of its operands' sizes."""
    operands = call.operands()
    if len(operands) != 2:
        one = memory_kernel(call, "pointwise", call.moved())
        return OpWork((one,), (one, one) if call.grad else (), tuple(o.name for o in operands))
    left, right = operands
    x, y, out = call.numel(left), call.numel(right), call.numel(call.out)
    inner = max(round(math.sqrt(x * y / max(out, 1))), 1)
    rows, columns = max(x // inner, 1), max(y // inner, 1)
    backward, saved = _product_backward(call, left, right, 1, rows, columns, inner)
    return OpWork((product(call, 1, rows, columns, inner),), tuple(backward), saved)


def grouped_matmul(call: Call) -> OpWork:
    """Products of groups of rows with one matrix each: every row meets one matrix."""
    left, right = call.operands()[:2]
    inner, columns = call.sizes(left)[-1], call.sizes(call.out)[-1]
    rows = call.numel(call.out) // max(columns, 1)
    backward, saved = _product_backward(call, left, right, 1, rows, columns, inner)
    return OpWork((product(call, 1, rows, columns, inner),), tuple(backward), saved)


def convolution(call: Call) -> OpWork:
    """A convolution as the matrix product it unfolds to."""
    x, weight = call.operand(0), call.operand(1)
    assert x is not None
    assert weight is not None
    kernel = call.sizes(weight)
    columns = kernel[0]
    inner = call.numel(weight) // max(columns, 1)
    rows = call.numel(call.out) // max(columns, 1)
    backward, saved = _product_backward(call, x, weight, 1, rows, columns, inner)
    late = _of_weight(call, x, weight, backward)
    if call.needs_grad(call.operand(2, "bias")):
        backward.append(memory_kernel(call, "reduce", call.bytes(call.out)))
        late = (*late, backward[-1]) if late else ()
    return OpWork((product(call, 1, rows, columns, inner),), tuple(backward), saved, late=late)


def attention(call: Call) -> OpWork:
    """Fused attention: two products forward, five backward, nothing of size sequence squared kept.

    Backward recomputes the scores: 2.5 times the forward's FLOPs (Dao et al. 2022,
    https://arxiv.org/abs/2205.14135).
    """
    q, k, v = call.operand(0), call.operand(1), call.operand(2)
    assert q is not None
    assert k is not None
    assert v is not None
    *lead, queries, head = call.sizes(q)
    keys = call.sizes(k)[-2]
    causal = call.op.argument(5, "is_causal", False) is True
    flops = 4.0 * math.prod(lead) * queries * keys * head
    if packet(call.op) == "gp.attention":
        return _plain_attention(call, math.prod(lead), queries, keys, head)
    dtype, elements = call.dtype(call.out), float(call.numel(q))
    shape = (keys, head, causal)
    moved = sum(call.bytes(o) for o in (q, k, v)) + call.bytes(call.out)
    forward = (Kernel("attention", elements, moved, flops, dtype, attention=shape),)
    if not call.grad:
        return OpWork(forward)
    back = Kernel("attention_backward", elements, 2 * moved, 2.5 * flops, dtype, attention=shape)
    statistics = 4.0 * math.prod(lead) * queries
    saved = (q.name, k.name, v.name, call.op.name)
    return OpWork(forward, (back,), saved, statistics)


def _plain_attention(call: Call, heads: int, queries: int, keys: int, head: int) -> OpWork:
    """Attention with dropout, written out: scores, softmax, mask, weighted sum."""
    scores = float(heads * queries * keys)
    dtype = call.dtype(call.out)
    width = call.bytes(call.out) / max(call.numel(call.out), 1)
    first = product(call, heads, queries, keys, head)
    second = product(call, heads, queries, head, keys)
    mask = memory_kernel(call, "pointwise", (2 * width + 1) * scores, scores)
    forward = (
        memory_kernel(call, "pointwise", 2 * call.bytes(call.out), call.numel(call.out)),
        first,
        mask,
        Kernel("softmax", scores, 2 * scores * width, 8 * scores, dtype),
        Kernel("dropout", scores, 3 * scores * width, scores, dtype),
        second,
    )
    if not call.grad:
        return OpWork(forward)
    backward = (
        *(first, first, second, second),
        memory_kernel(call, "pointwise", 3 * scores * width, scores),
        Kernel("softmax_backward", scores, 3 * scores * width, 6 * scores, dtype),
        mask,
    )
    saved = tuple(o.name for o in call.operands()[:3])
    return OpWork(forward, backward, saved, 3 * scores * width)


def normalization(call: Call) -> OpWork:
    """Layer, group, instance and batch norm; statistics are kept in float32."""
    source = call.operands()[0]
    elements, width = call.numel(call.out), call.bytes(call.out)
    dtype = call.dtype(call.out)
    forward = (Kernel("layer_norm", elements, 2 * width, 8.0 * elements, dtype),)
    if not call.grad:
        return OpWork(forward)
    groups = elements / max(call.sizes(call.out)[-1], 1)
    backward = (Kernel("layer_norm_backward", elements, 4 * width, 12.0 * elements, dtype),)
    return OpWork(forward, backward, (source.name,), 8.0 * groups)


def rms_norm(call: Call) -> OpWork:
    """Root-mean-square norm, which runs as several pointwise kernels."""
    source = call.operands()[0]
    elements, width = call.numel(call.out), call.bytes(call.out)
    square = memory_kernel(call, "pointwise", 2 * width, elements)
    scale = memory_kernel(call, "pointwise", 2 * width, elements)
    forward = (square, memory_kernel(call, "reduce", width, elements), scale, scale)
    if not call.grad:
        return OpWork(forward)
    step = memory_kernel(call, "pointwise", 3 * width, elements)
    return OpWork(forward, (step,) * 5, (source.name, call.op.name))


def softmax(call: Call) -> OpWork:
    """Softmax and log-softmax; the result is kept."""
    elements, width = call.numel(call.out), call.bytes(call.out)
    dtype = call.dtype(call.out)
    forward = (Kernel("softmax", elements, 2 * width, 8.0 * elements, dtype),)
    if not call.grad:
        return OpWork(forward)
    back = Kernel("softmax_backward", elements, 3 * width, 6.0 * elements, dtype)
    return OpWork(forward, (back,), (call.op.name,))


def cross_entropy(call: Call) -> OpWork:
    """Cross-entropy from logits; log-probabilities of the logits' size are kept."""
    logits, target = call.operand(0), call.operand(1)
    assert logits is not None
    elements, width = call.numel(logits), call.bytes(logits)
    kind = logits.types[0]
    dtype = call.dtype(kind) if kind is not None else "float32"
    forward = (Kernel("cross_entropy", elements, 3 * width, 10.0 * elements, dtype),)
    if not call.grad:
        return OpWork(forward)
    back = Kernel("cross_entropy_backward", elements, 4 * width, 8.0 * elements, dtype)
    saved = (target.name,) if target is not None else ()
    return OpWork(forward, (back,), saved, width)


def element_loss(call: Call) -> OpWork:
    """A loss of one term per element."""
    source = call.operands()[0]
    elements, width = call.numel(source), call.bytes(source)
    forward = (memory_kernel(call, "pointwise", 3 * width, elements),)
    if not call.grad:
        return OpWork(forward)
    return OpWork(forward, (memory_kernel(call, "pointwise", 4 * width, elements),), call.op.operands())


def embedding(call: Call) -> OpWork:
    """Rows of a table; the backward fills a table of zeros and adds rows into it."""
    table, indices = call.operand(0), call.operand(1)
    assert table is not None
    elements, width = call.numel(call.out), call.bytes(call.out)
    dtype = call.dtype(call.out)
    forward = (Kernel("embedding", elements, 2 * width, 0.0, dtype),)
    if not call.grad:
        return OpWork(forward)
    backward = (
        memory_kernel(call, "fill", call.bytes(table), call.numel(table)),
        Kernel("embedding_backward", elements, 3 * width, elements, dtype),
    )
    return OpWork(forward, backward, (indices.name,) if indices is not None else ())


def pooling(call: Call) -> OpWork:
    """Pooling and interpolation: one pass over operand and result."""
    one = memory_kernel(call, "pointwise", call.moved())
    saved = tuple(call.op.operands()[:1])
    return OpWork((one,), (one,) if call.grad else (), saved if call.grad else ())


def recurrent(call: Call) -> OpWork:
    """A recurrent layer as the products of its weights with every step's input."""
    weights = [o for o in call.operands() if o.target == "parameter"]
    steps = call.numel(call.operands()[0]) // max(call.sizes(call.operands()[0])[-1], 1)
    forward = []
    for weight in weights:
        shape = call.sizes(weight)
        if len(shape) == 2:
            forward.append(product(call, 1, steps, shape[0], shape[1]))
    forward.append(view_kernel(call))
    saved = 8.0 * call.bytes(call.out)
    return OpWork(tuple(forward), tuple(forward) * 2 if call.grad else (), saved_bytes=saved)


PRODUCT_RULES: Mapping[str, Rule] = {
    "linear": linear,
    "addmm": addmm,
    **dict.fromkeys(("matmul", "mm", "bmm", "baddbmm", "mv", "dot"), matmul),
    "einsum": einsum,
    **dict.fromkeys(("_grouped_mm", "grouped_mm"), grouped_matmul),
    **dict.fromkeys(("convolution", "conv1d", "conv2d", "conv3d", "_convolution"), convolution),
    **dict.fromkeys(("scaled_dot_product_attention", "gp.attention"), attention),
    **dict.fromkeys(
        ("layer_norm", "native_layer_norm", "group_norm", "batch_norm", "instance_norm"),
        normalization,
    ),
    **dict.fromkeys(("rms_norm", "_fused_rms_norm"), rms_norm),
    **dict.fromkeys(("softmax", "_softmax", "log_softmax", "_log_softmax"), softmax),
    **dict.fromkeys(("cross_entropy_loss", "nll_loss", "nll_loss_nd"), cross_entropy),
    **dict.fromkeys(
        """
        mse_loss l1_loss smooth_l1_loss huber_loss kl_div binary_cross_entropy
        binary_cross_entropy_with_logits soft_margin_loss
        """.split(),
        element_loss,
    ),
    "embedding": embedding,
    **dict.fromkeys(
        """
        max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d
        adaptive_avg_pool2d upsample_nearest2d upsample_bilinear2d
        """.split(),
        pooling,
    ),
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), recurrent),
}
