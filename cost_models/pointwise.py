"""Work of pointwise ops, reductions, views and random ops."""

from collections.abc import Callable, Mapping

from graphpar.cost_models.layout import GROWING, PARTIAL
from graphpar.cost_models.work import Call, Kernel, OpWork
from graphpar.ir.ops import Op
from graphpar.ir.optable import packet

Rule = Callable[[Call], OpWork]

ACTIVATIONS = frozenset(
    """
    gelu silu tanh sigmoid exp relu softplus mish elu log_sigmoid erf sin cos log
    """.split()
)
"""Pointwise ops whose arithmetic may outweigh their memory traffic, with curves of their own."""

_CURVES = {
    "gelu": "gelu", "silu": "silu", "tanh": "tanh", "sigmoid": "sigmoid", "exp": "exp",
    "relu": "relu", "mish": "gelu", "elu": "exp", "softplus": "gelu", "log_sigmoid": "gelu",
    "erf": "gelu", "sin": "exp", "cos": "exp", "log": "exp",
}  # fmt: skip
_SAVES_RESULT = frozenset(
    ["tanh", "sigmoid", "exp", "relu", "sqrt", "rsqrt", "reciprocal", "elu", "hardtanh"]
)
_SAVES_NOTHING = frozenset(
    """
    add sub subtract neg negative rsub _to_copy to type_as clone contiguous fill zeros_like
    ones_like full_like empty_like add_ sub_ positive round floor ceil sign trunc
    """.split()
)
_CHEAP_BACKWARD = frozenset(["add", "sub", "subtract", "neg", "negative", "rsub", "positive", "clone"])
_NO_FLOAT = frozenset(["zeros_like", "ones_like", "full_like", "empty_like", "fill"])


def memory_kernel(call: Call, curve: str, num_bytes: float, elements: float = 0.0) -> Kernel:
    """A kernel that does little but move bytes."""
    return Kernel(curve, elements or num_bytes / 4, num_bytes, elements, call.dtype(call.out))


def view_kernel(call: Call) -> Kernel:
    """A call that touches no data; it costs the host its time."""
    return Kernel("view", 1.0, 0.0, 0.0, call.dtype(call.out))


def pointwise(call: Call) -> OpWork:
    """An op that acts element by element."""
    name = packet(call.op).rstrip("_") or packet(call.op)
    tensors = call.operands()
    if name in ACTIVATIONS:
        return _activation(call, name)
    curve = "fill" if name in _NO_FLOAT else "pointwise"
    first = memory_kernel(call, curve, call.moved(), call.numel(call.out))
    forward = (first, *_pow_extra(call)) if name == "pow" else (first,)
    if not call.grad:
        return OpWork(forward)
    backward: list[Kernel] = []
    for operand in dict.fromkeys(tensors):
        if call.needs_grad(operand):
            backward += _operand_gradient(call, name, operand)
    return OpWork(forward, tuple(backward), _saved(call, name))


def casting(call: Call) -> OpWork:
    """A change of type: backward casts the gradient the other way."""
    one = Kernel("cast", call.numel(call.out), call.moved(), 0.0, call.dtype(call.out))
    return OpWork((one,), (one,) if call.grad and call.out.is_floating else ())


def weight_casting(call: Call) -> OpWork:
    """Its lower copy is made once a step, which `Roofline` adds; its gradient is cast each time."""
    (one,) = casting(call).forward
    return OpWork((), (one,) if call.grad else ())


def _pow_extra(call: Call) -> tuple[Kernel, ...]:
    """Powers other than the square go through a transcendental function."""
    exponent = call.op.argument(1, "exponent")
    if exponent in (2, 2.0, 1, 0.5, -1, 3):
        return ()
    return (Kernel("exp", call.numel(call.out), 0.0, 0.0, call.dtype(call.out)),)


def _activation(call: Call, name: str) -> OpWork:
    curve = _CURVES[name]
    if name == "gelu" and call.op.kwarg("approximate", "none") == "tanh":
        curve = "gelu_tanh"
    elements = call.numel(call.out)
    dtype, width = call.dtype(call.out), call.bytes(call.out)
    forward = (Kernel(curve, elements, 2 * width, 8.0 * elements, dtype),)
    if not call.grad:
        return OpWork(forward)
    backward = (Kernel(f"{curve}_backward", elements, 3 * width, 12.0 * elements, dtype),)
    return OpWork(forward, backward, _saved(call, name))


def _operand_gradient(call: Call, name: str, operand: Op) -> list[Kernel]:
    """Kernels for the gradient of one operand, summing over broadcast dimensions included."""
    size = max(call.numel(operand), call.numel(call.out))
    width = call.bytes(call.out) / max(call.numel(call.out), 1)
    count = {"pow": 3, "div": 2, "true_divide": 2, "divide": 2}.get(name, 1)
    kernels = []
    if name not in _CHEAP_BACKWARD:
        kernels = [memory_kernel(call, "pointwise", 3 * size * width, size)] * count
    if call.numel(operand) < call.numel(call.out):
        kernels.append(memory_kernel(call, "reduce", size * width, size))
    return kernels or [view_kernel(call)]


def _saved(call: Call, name: str) -> tuple[str, ...]:
    """Which values autograd keeps for an op's backward."""
    tensors = list(dict.fromkeys(call.operands()))
    if name in _SAVES_NOTHING:
        return ()
    if name in _SAVES_RESULT:
        return (call.op.name,)
    if name in ("mul", "multiply"):
        others = [b.name for a in tensors for b in tensors if a is not b and call.needs_grad(a)]
        same = [a.name for a in tensors if len(tensors) == 1 and len(call.op.operands()) == 2]
        return tuple(others + same)
    if name in ("div", "true_divide", "divide"):
        top, bottom = call.operand(0), call.operand(1)
        kept = [bottom.name] if bottom is not None else []
        if top is not None and call.needs_grad(bottom):
            kept.append(top.name)
        return tuple(kept)
    if name in ("where", "masked_fill"):
        condition = call.operand(0 if name == "where" else 1)
        return (condition.name,) if condition is not None else ()
    return tuple(o.name for o in tensors)


def view(call: Call) -> OpWork:
    """A view: no data moves unless its operand's layout forces a copy."""
    name = packet(call.op)
    source = call.operands()[0]
    copied = memory_kernel(call, "copy", 2 * call.bytes(call.out), call.numel(call.out))
    if name == "getitem":
        return OpWork(())
    forward = (copied,) if call.copies else (view_kernel(call),)
    if not call.grad:
        return OpWork(forward)
    if name in GROWING and call.numel(call.out) > call.numel(source):
        return OpWork(forward, (memory_kernel(call, "reduce", call.bytes(call.out)),))
    if name in PARTIAL:
        whole = call.bytes(source)
        joins = (memory_kernel(call, "copy", 2 * whole),)
        # A slice's gradient is written into zeros; a split's pieces are joined by one copy.
        is_slice = name in ("slice", "select", "narrow", "diagonal", "unfold")
        return OpWork(forward, joins + ((memory_kernel(call, "fill", whole),) if is_slice else ()))
    return OpWork(forward, (view_kernel(call),))


def reduction(call: Call) -> OpWork:
    """A sum, mean, maximum or similar over some dimensions."""
    name = packet(call.op)
    source = call.operands()[0]
    elements, width = call.numel(source), call.bytes(source)
    passes = 3 if name in ("var", "std", "var_mean", "std_mean", "norm", "logsumexp") else 1
    forward = (memory_kernel(call, "reduce", passes * width, elements),)
    if not call.grad:
        return OpWork(forward)
    linear = name in ("sum", "mean", "nansum")
    backward = (memory_kernel(call, "pointwise", (1 if linear else 3) * width, elements),)
    return OpWork(forward, backward, () if linear else (source.name, call.op.name))


def cumulative(call: Call) -> OpWork:
    """A running sum or product."""
    width, elements = call.bytes(call.out), call.numel(call.out)
    one = memory_kernel(call, "reduce", 2 * width, elements)
    saved = () if packet(call.op) == "cumsum" else tuple(call.op.operands())
    return OpWork((one,), (one, one) if call.grad else (), saved if call.grad else ())


def joining(call: Call) -> OpWork:
    """Concatenation or stacking: every byte is read and written once."""
    one = memory_kernel(call, "copy", 2 * call.bytes(call.out), call.numel(call.out))
    split = tuple(view_kernel(call) for _ in call.op.operands())
    return OpWork((one,), split if call.grad else ())


def gathering(call: Call) -> OpWork:
    """Reads by index; the backward writes into zeros of the source's size."""
    source = call.operands()[0]
    one = memory_kernel(call, "copy", 2 * call.bytes(call.out), call.numel(call.out))
    if not call.grad:
        return OpWork((one,))
    indices = tuple(o.name for o in call.operands() if not o.types[0] or not o.types[0].is_floating)
    return OpWork((one,), (memory_kernel(call, "fill", call.bytes(source)), one), indices)


def creating(call: Call) -> OpWork:
    """A new tensor that depends on no other."""
    return OpWork((memory_kernel(call, "fill", call.bytes(call.out), call.numel(call.out)),))


def dropout(call: Call) -> OpWork:
    """Dropout with a keyed random mask, which is kept as one byte per element."""
    elements, width = call.numel(call.out), call.bytes(call.out)
    dtype = call.dtype(call.out)
    forward = (Kernel("dropout", elements, 2 * width + elements, 2.0 * elements, dtype),)
    if not call.grad:
        return OpWork(forward)
    return OpWork(forward, (memory_kernel(call, "pointwise", 3 * width, elements),), (), width)


def random(call: Call) -> OpWork:
    """A tensor of random numbers."""
    elements, width = call.numel(call.out), call.bytes(call.out)
    return OpWork((Kernel("dropout", elements, width, elements, call.dtype(call.out)),))


def sorting(call: Call) -> OpWork:
    """Sort and top-k: some twenty passes over the data."""
    source = call.operands()[0]
    one = memory_kernel(call, "reduce", 20 * call.bytes(source), call.numel(source))
    back = memory_kernel(call, "fill", call.bytes(source)) if call.grad else None
    return OpWork((one,), (back,) if back else (), saved_bytes=8.0 * call.numel(call.out))


def unknown(call: Call) -> OpWork:
    """An op without a rule: its operands and results are read and written once."""
    moved = call.moved()
    one = memory_kernel(call, "pointwise", moved, call.numel(call.out))
    if not call.grad:
        return OpWork((one,), known=False)
    saved = (*call.op.operands(), call.op.name)
    return OpWork((one,), (one, one), saved, known=False)


POINTWISE_RULES: Mapping[str, Rule] = {
    **dict.fromkeys(
        """
        sum mean amax amin max min any all prod logsumexp var std var_mean std_mean norm
        linalg_vector_norm argmax argmin median nansum nanmean count_nonzero
        """.split(),
        reduction,
    ),
    **dict.fromkeys(("cumsum", "cumprod", "logcumsumexp"), cumulative),
    **dict.fromkeys(("cat", "stack", "concat", "pad", "constant_pad_nd", "roll", "flip"), joining),
    **dict.fromkeys(
        """
        index gather index_select take_along_dim index_put scatter scatter_add index_add index_copy
        masked_select tril triu repeat repeat_interleave tile
        """.split(),
        gathering,
    ),
    **dict.fromkeys(
        """
        zeros ones full empty arange eye linspace new_zeros new_ones new_full new_empty
        scalar_tensor one_hot lift_fresh_copy
        """.split(),
        creating,
    ),
    **dict.fromkeys(("gp.dropout", "dropout", "native_dropout", "feature_dropout"), dropout),
    **dict.fromkeys(("gp.random", "gp.bernoulli", "rand", "randn", "bernoulli"), random),
    **dict.fromkeys(("sort", "topk", "argsort", "unique"), sorting),
    "gp.share": pointwise,
    **dict.fromkeys(("_to_copy", "to", "type_as"), casting),
    "gp.cast_weight": weight_casting,
}
