"""Rules for arithmetic and layers: what they make of values per sample (see `samples.py`)."""

import re

from graphpar.ir.ops import Argument, BatchSize
from graphpar.ir.optable import packet
from graphpar.passes.samples import PARTIAL, SHARED, Call, Samples, dims_argument, rule, scales, uniform

# --- creation -------------------------------------------------------------------------------------


@rule("arange")
def _arange(call: Call) -> Samples:
    if not scales(call.op):
        sized = any(isinstance(a, BatchSize) for a in call.op.args)
        return call.mixed("counts with the size of the batch") if sized else SHARED
    (size,) = call.op.type.shape
    counts = [a for a in call.op.args if isinstance(a, BatchSize)]
    plain = counts == [BatchSize(1)] and all(a in (0, 1) for a in call.op.args if a not in counts)
    if size == BatchSize(1) and plain:
        return Samples("iota")
    return call.mixed("counts through the batch")


@rule("new_zeros", "new_ones", "new_full", "new_empty", "zeros_like", "ones_like", "full_like",
      "empty_like")  # fmt: skip
def _constant_like(call: Call) -> Samples:
    return uniform(call) if scales(call.op) else SHARED


# --- element by element ---------------------------------------------------------------------------


@rule("add", "copy")
def pointwise(call: Call) -> Samples:
    """Operands broadcast against each other from the right; batch dimensions must line up."""
    kinds = {call.state(r).kind for r in call.operands()}
    if "partial" in kinds:
        return _linear(call)
    if "iota" in kinds:
        return call.mixed("computes with the position in the batch")
    dim = call.out_dim()
    if dim is None:
        return call.mixed("combines samples with each other")
    from_right = dim - len(call.op.type.shape)
    layout: Samples | None = None
    for operand in call.operands():
        if call.state(operand).kind != "sample":
            continue
        kind, own = call.type(operand), call.dim(operand)
        if kind is None or own is None or own - len(kind.shape) != from_right:
            return call.mixed("combines samples with each other")
        if layout is not None and layout != call.state(operand):
            return call.mixed("combines values whose samples are laid out differently")
        layout = call.state(operand)
    assert layout is not None
    return layout


@rule("type_as")
def _type_as(call: Call) -> Samples:
    """Nothing but the type is taken from the second operand."""
    first = call.op.args[0]
    kind = call.state(first).kind
    if kind == "partial":
        return _linear(call)
    if kind == "iota":
        return call.mixed("computes with the position in the batch")
    return call.like(first) if kind == "sample" else call.state(first)


def _linear(call: Call) -> Samples:
    """Sums over samples stay sums under linear ops only."""
    kind = packet(call.op)
    states = [call.state(a) for a in call.op.args[: 1 if kind == "type_as" else None]]
    partial = [s.kind == "partial" for s in states]
    if any(s.kind not in ("partial", "shared") for s in states):
        return call.mixed("applies a sum over the batch to single samples")
    if kind in ("_to_copy", "to", "type_as"):
        before = call.type(call.op.args[0])
        rounds = before is not None and before.is_floating and not call.op.type.is_floating
        narrows = call.op.type.dtype == "bool"
        return call.mixed("rounds a sum over the batch") if rounds or narrows else PARTIAL
    if kind in ("neg", "clone", "contiguous", "alias", "positive", "detach"):
        return PARTIAL
    if kind in ("add", "sub", "rsub") and (all(partial[:2]) or call.op.type.is_floating):
        return PARTIAL
    if kind == "mul" and sum(partial) == 1:
        return PARTIAL
    if kind in ("div", "true_divide", "divide") and partial[0] and sum(partial) == 1:
        return PARTIAL if call.op.kwarg("rounding_mode") is None else call.mixed("rounds a sum")
    return call.mixed("is not linear in a sum over the batch")


# --- matrix products ------------------------------------------------------------------------------


@rule("linear")
def _linear_layer(call: Call) -> Samples:
    x, weights = call.op.args[0], call.op.args[1:]
    if any(call.state(w).kind != "shared" for w in weights):
        return call.mixed("has weights that depend on the batch")
    kind = call.type(x)
    if call.state(x).kind != "sample" or kind is None or call.dim(x) == len(kind.shape) - 1:
        return call.mixed("sums over samples inside a linear layer")
    return call.like(x)


@rule("matmul", "mm", "bmm", "mv", "dot")
def _matmul(call: Call) -> Samples:
    return _product(call, call.op.args[0], call.op.args[1])


@rule("addmm", "baddbmm", "addbmm", "addmv")
def _add_product(call: Call) -> Samples:
    bias, *factors = call.op.args[:3]
    if call.state(bias).kind not in ("shared", "sample") or packet(call.op) == "addbmm":
        return call.mixed("adds to a sum over the batch")
    result = SHARED
    if any(call.state(factor) != SHARED for factor in factors):
        result = _product(call, *factors)
    if result.kind == "partial":
        return call.mixed("adds a constant to a sum over the batch")
    if result.kind == "mixed" or call.state(bias) == SHARED:
        return result
    kind, own, out = call.type(bias), call.dim(bias), call.out_dim()
    if kind is None or own is None or out is None or not call.same_layout():
        return call.mixed("combines samples with each other")
    if own - len(kind.shape) != out - len(call.op.type.shape):
        return call.mixed("combines samples with each other")
    return call.like(bias)


def _product(call: Call, a: Argument, b: Argument) -> Samples:
    states = (call.state(a), call.state(b))
    if any(s.kind not in ("shared", "sample") for s in states):
        return call.mixed("multiplies a sum over the batch")
    kinds = (call.type(a), call.type(b))
    if kinds[0] is None or kinds[1] is None:
        return call.mixed("multiplies tuples")
    contracted = (
        call.dim(a) == len(kinds[0].shape) - 1,
        call.dim(b) == max(len(kinds[1].shape) - 2, 0),
    )
    if all(contracted) and all(s.kind == "sample" for s in states) and states[0] == states[1]:
        return PARTIAL
    if any(c and s.kind == "sample" for c, s in zip(contracted, states, strict=True)):
        return call.mixed("sums over samples in a matrix product")
    if not call.same_layout((a, b)):
        return call.mixed("multiplies values whose samples are laid out differently")
    return call.like(a if states[0].kind == "sample" else b)


@rule("einsum")
def _einsum(call: Call) -> Samples:
    equation, tensors = call.op.args[0], call.op.args[1]
    assert isinstance(equation, str) and isinstance(tensors, tuple)
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    if not arrow:  # the rule of einsum: every letter that stands once, in the alphabet's order
        output = "".join(c for c in inputs if c.isalpha() and inputs.count(c) == 1)
    labels = set()
    for text, tensor in zip(inputs.split(","), tensors, strict=True):
        if call.state(tensor).kind == "sample":
            dim = call.dim(tensor)
            if dim is None or "." in text:
                return call.mixed("uses an ellipsis over the batch")
            labels.add(text[dim])
        elif call.state(tensor).kind != "shared":
            return call.mixed("multiplies a sum over the batch")
    if len(labels) != 1 or not call.same_layout():
        return call.mixed("combines samples with each other")
    first = call.first_sample()
    assert first is not None
    return call.like(first) if labels.pop() in output else PARTIAL


@rule("scaled_dot_product_attention", "gp.attention")
def _attention(call: Call) -> Samples:
    q = call.op.args[0]
    for operand in call.operands():
        kind, own = call.type(operand), call.dim(operand)
        if call.state(operand).kind == "sample":
            if kind is None or own is None or own >= len(kind.shape) - 2:
                return call.mixed("attends across samples")
            if own - len(kind.shape) != (call.out_dim() or 0) - len(call.op.type.shape):
                return call.mixed("attends across samples")
        elif call.state(operand).kind != "shared":
            return call.mixed("attends to a sum over the batch")
    if not call.same_layout():
        return call.mixed("attends to values whose samples are laid out differently")
    return call.like(q if call.state(q).kind == "sample" else call.first_sample())


# --- layers whose first dimension is the batch -----------------------------------------------------


@rule(
    "conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d",
    "conv_transpose3d", "pixel_shuffle", "pixel_unshuffle", "group_norm", "im2col", "col2im",
    "grid_sampler", "channel_shuffle", "prelu", "affine_grid_generator", "max_unpool2d",
    "max_unpool3d", "grid_sampler_2d", "grid_sampler_3d",
)  # fmt: skip
def _batch_first(call: Call) -> Samples:
    x = call.op.args[0]
    others = [r for r in call.operands()[1:] if call.state(r).kind != "shared"]
    if call.state(x).kind != "sample" or call.dim(x) != 0:
        return call.mixed("does not have the batch as its first dimension")
    if any(call.state(r) != call.state(x) or call.dim(r) != 0 for r in others):
        return call.mixed("has weights that depend on the batch")
    return call.like(x)


@rule(
    "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d",
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool1d",
    "adaptive_max_pool2d", "adaptive_max_pool3d", "max_pool2d_with_indices", "max_pool3d_with_indices",
    "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_linear1d",
    "upsample_bilinear2d", "upsample_bicubic2d", "upsample_trilinear3d", "_upsample_nearest_exact1d",
    "_upsample_nearest_exact2d", "_upsample_nearest_exact3d", "_upsample_bilinear2d_aa",
    "_upsample_bicubic2d_aa",
)  # fmt: skip
def _maps(call: Call) -> Samples:
    """Every map of features is worked on alone, so that samples may stand where channels do as well."""
    x = call.op.args[0]
    kind, dim = call.type(x), call.dim(x)
    if call.state(x).kind != "sample" or kind is None or dim is None:
        return call.mixed("makes a map of a sum over the batch")
    if dim >= len(kind.shape) - int(re.findall(r"(\d)d", packet(call.op))[0]):
        return call.mixed("makes a map across samples")
    return call.like(x)


@rule("batch_norm", "_native_batch_norm_legit_no_training", "native_batch_norm", "instance_norm")
def _batch_norm(call: Call) -> Samples:
    if packet(call.op).endswith("batch_norm") and call.op.argument(5, "training"):
        return call.mixed("takes its statistics over the whole batch")
    if packet(call.op) == "instance_norm" and call.type(call.op.argument(3, "running_mean")):
        return call.mixed("updates its statistics from the whole batch")
    return _batch_first(call)


@rule("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm")
def _layer_norm(call: Call) -> Samples:
    x, shape = call.op.args[0], call.op.args[1]
    kind, dim = call.type(x), call.dim(x)
    normalized = len(shape) if isinstance(shape, tuple) else 1
    if call.state(x).kind != "sample" or kind is None or dim is None:
        return call.mixed("normalizes a sum over the batch")
    if any(call.state(r) != SHARED for r in call.operands()[1:]):
        return call.mixed("has weights that depend on the batch")
    if dim >= len(kind.shape) - normalized:
        return call.mixed("normalizes over the batch")
    return call.like(x) if call.op.makes_tensor else call.state(x)


@rule("embedding", "one_hot")
def _embedding(call: Call) -> Samples:
    by_table = packet(call.op) == "embedding"
    indices = call.op.args[1] if by_table else call.op.args[0]
    if call.state(indices).kind == "iota":
        return call.mixed("looks up the position in the batch")
    if call.state(indices).kind != "sample" or (by_table and call.state(call.op.args[0]) != SHARED):
        return call.mixed("looks up in a table that depends on the batch")
    if by_table and call.op.argument(3, "scale_grad_by_freq"):
        return call.mixed("scales gradients by how often an index stands in the whole batch")
    return call.like(indices)


@rule("lstm", "gru", "rnn_tanh", "rnn_relu")
def _recurrent(call: Call) -> Samples:
    x, before, *weights = call.op.args
    batch_first = call.op.args[-1] is True
    packed = not call.op.target.endswith(".input")
    if packed or call.state(x).kind != "sample" or call.dim(x) != (0 if batch_first else 1):
        return call.mixed("runs along the batch")
    hidden = before if isinstance(before, tuple) else (before,)
    if any(call.state(h) != call.state(x) or call.dim(h) != 1 for h in hidden):
        return call.mixed("starts from a state that is not one for each sample")
    for group in weights:
        if isinstance(group, tuple) and any(call.state(w) != SHARED for w in group):
            return call.mixed("has weights that depend on the batch")
    return call.state(x)


@rule("gp.dropout", "gp.bernoulli")
def _random_like(call: Call) -> Samples:
    by_channel = call.op.target == "gp.dropout" and call.op.args[2] is True
    if by_channel and (call.out_dim() or 0) > 1:
        return call.mixed("drops the same channels of all samples")
    return pointwise(call)


@rule("broadcast_tensors")
def _broadcast_tensors(call: Call) -> Samples:
    """The results are alike: what all samples share is repeated for each."""
    first = call.first_sample()
    if first is None or not call.same_layout() or any(t is None for t in call.op.types):
        return call.mixed("combines samples with each other")
    if any(len(t.batch_dims) != 1 for t in call.op.types if t is not None):
        return call.mixed("combines samples with each other")
    return call.state(first)


@rule("cosine_similarity")
def _cosine_similarity(call: Call) -> Samples:
    a, b = call.op.args[:2]
    kinds, dims = (call.type(a), call.type(b)), (call.dim(a), call.dim(b))
    if kinds[0] is None or kinds[1] is None or not call.same_layout():
        return call.mixed("compares samples with each other")
    if len(kinds[0].shape) != len(kinds[1].shape) or len({d for d in dims if d is not None}) != 1:
        return call.mixed("compares samples with each other")
    (along,) = dims_argument(call.op.argument(2, "dim", 1), len(kinds[0].shape))
    if along in dims:
        return call.mixed("compares along the batch")
    return call.like(call.first_sample())
