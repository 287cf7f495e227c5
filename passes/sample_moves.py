"""Rules for ops that move elements about or pick among them (see `samples.py`)."""

from dataclasses import replace
from math import prod

from graphpar.ir.ops import Argument, BatchSize, Dim
from graphpar.ir.optable import packet
from graphpar.passes.samples import (
    PARTIAL,
    Call,
    Samples,
    dims_argument,
    rule,
    times,
    uniform,
)

# --- moving elements about -------------------------------------------------------------------------


@rule("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as",
      "reshape_as")  # fmt: skip
def _view(call: Call) -> Samples:
    x = call.op.args[0]
    state, kind, dim, out = call.state(x), call.type(x), call.dim(x), call.out_dim()
    if state.kind == "partial":
        return PARTIAL
    if kind is None or dim is None or out is None:
        return call.mixed("reshapes samples into each other")
    if state.kind == "iota":
        whole = call.op.type.shape[out] == BatchSize(1)
        return state if whole else call.mixed("reshapes the position in the batch")
    before, after = _around(kind.shape, dim)
    outer, inner = before * state.outer, after * state.inner
    left, right = _around(call.op.type.shape, out)
    if 0 in (left, right) or outer % left or inner % right:
        return call.mixed("reshapes samples into each other")
    return Samples("sample", outer // left, inner // right)


def _around(shape: tuple[Dim, ...], dim: int) -> tuple[int, int]:
    """Numbers of elements before and after the batch dimension."""
    plain = [1 if isinstance(size, BatchSize) else size for size in shape]
    return prod(plain[:dim]), prod(plain[dim + 1 :])


@rule("permute", "transpose", "t", "movedim", "swapaxes", "swapdims", "numpy_T", "mT", "adjoint")
def _permute(call: Call) -> Samples:
    state = call.state(call.op.args[0])
    if state.kind in ("partial", "iota"):
        return state
    return call.like(call.op.args[0])


@rule("unfold")
def _unfold(call: Call) -> Samples:
    """Windows along a dimension; they stand in a new one behind all others."""
    x = call.op.args[0]
    state, kind, dim = call.state(x), call.type(x), call.dim(x)
    if state.kind != "sample" or kind is None or dim is None:
        return call.mixed("takes windows of a sum over the batch")
    if dims_argument(call.op.args[1], len(kind.shape)) == (dim,):
        return call.mixed("takes windows over the batch")
    return call.like(x)


@rule("view_as_complex", "view_as_real")
def _as_complex(call: Call) -> Samples:
    """Pairs in the last dimension are complex numbers, and the other way round."""
    x = call.op.args[0]
    state, dim = call.state(x), call.dim(x)
    if state.kind == "partial":
        return state
    if state.kind != "sample" or dim is None or dim != call.out_dim():
        return call.mixed("makes numbers of samples")
    return state


@rule("expand", "broadcast_to", "expand_as")
def _expand(call: Call) -> Samples:
    x = call.op.args[0]
    state = call.state(x)
    if state.kind == "partial":
        return PARTIAL
    if state.kind == "iota":
        return state if call.out_dim() is not None else call.mixed("repeats the position in the batch")
    return call.like(x) if state.kind == "sample" else uniform(call)


@rule("repeat", "tile")
def _repeat(call: Call) -> Samples:
    x = call.op.args[0]
    kind, dim, out = call.type(x), call.dim(x), call.out_dim()
    if call.state(x).kind != "sample" or kind is None or dim is None or out is None:
        return call.mixed("repeats samples among each other")
    copies = times(call.op.type.shape[out]) // times(kind.shape[dim])
    return replace(call.state(x), outer=call.state(x).outer * copies)


@rule("repeat_interleave")
def _repeat_interleave(call: Call) -> Samples:
    x = call.op.args[0]
    kind, dim, out = call.type(x), call.dim(x), call.out_dim()
    if call.state(x).kind != "sample" or kind is None or dim is None or out is None:
        return call.mixed("repeats samples among each other")
    if call.op.argument(2, "dim") is None and len(kind.shape) != 1:
        return call.mixed("flattens the batch")
    if not isinstance(call.op.argument(1, "repeats"), int):
        return call.mixed("repeats each sample another number of times")
    copies = times(call.op.type.shape[out]) // times(kind.shape[dim])
    return replace(call.state(x), inner=call.state(x).inner * copies)


@rule("cat", "stack", "concat", "concatenate")
def _cat(call: Call) -> Samples:
    given = call.op.args[0]
    assert isinstance(given, tuple)
    parts = [part for part in given if not _is_nothing(call, part)]
    states = [call.state(p) for p in parts]
    out = call.out_dim()
    if any(s.kind == "partial" for s in states):
        same = all(s.kind == "partial" for s in states)
        return PARTIAL if same else call.mixed("joins sums over the batch with other values")
    if out is None or any(s.kind != "sample" for s in states) or len(set(states)) != 1:
        return call.mixed("joins values whose samples are laid out differently")
    if packet(call.op) == "stack":
        return states[0]
    (dim,) = dims_argument(call.op.argument(1, "dim", 0), len(call.op.type.shape))
    if dim != out:
        return states[0]
    if states[0].outer != 1:
        return call.mixed("joins values along the batch")
    return replace(states[0], outer=len(parts))


def _is_nothing(call: Call, part: Argument) -> bool:
    """Whether a part is the empty vector, which `cat` skips whatever the shapes of the others."""
    kind = call.type(part)
    return kind is not None and kind.shape == (0,)


@rule("slice")
def _slice(call: Call) -> Samples:
    x = call.op.args[0]
    kind = call.type(x)
    if kind is None:
        return call.mixed("slices a tuple")
    (dim,) = dims_argument(call.op.argument(1, "dim", 0), len(kind.shape))
    if dim == call.dim(x) and call.op.type.shape != kind.shape:
        return call.mixed("takes part of the batch")
    return call.state(x) if call.state(x).kind in ("partial", "iota") else call.like(x)


def along(call: Call, position: int, default: Argument, why: str) -> Samples:
    """Ops that work along given dimensions: fine along any but the batch."""
    x = call.op.args[0]
    kind = call.type(x)
    others = [r for r in call.operands() if call.state(r).kind not in ("shared", "sample")]
    if kind is None or others:
        return call.mixed("is not linear in a sum over the batch")
    if any(call.state(r) != call.state(x) or call.dim(r) != call.dim(x) for r in call.operands()):
        return call.mixed("combines samples with each other")
    given = call.op.argument(position, "dim", call.op.kwarg("dims", default))
    if call.dim(x) in dims_argument(given, len(kind.shape)):
        return call.mixed(why)
    return call.like(x) if call.op.makes_tensor else call.state(x)


@rule("softmax", "log_softmax", "_softmax", "_log_softmax", "cumsum", "cumprod", "logcumsumexp",
      "cummax", "cummin", "flip", "unbind", "narrow", "glu")  # fmt: skip
def _along_second(call: Call) -> Samples:
    default = -1 if packet(call.op) == "glu" else 0
    return along(call, 1, default, "works along the batch")


@rule("diff")
def _diff(call: Call) -> Samples:
    return along(call, 2, -1, "takes differences along the batch")


@rule("select")
def _select(call: Call) -> Samples:
    if call.state(call.op.args[0]).kind == "partial":
        return PARTIAL
    return along(call, 1, 0, "picks one sample for all")


@rule("quantile", "nanquantile")
def _quantile(call: Call) -> Samples:
    if call.state(call.op.args[1]).kind != "shared":
        return call.mixed("takes another quantile for each sample")
    alone = replace(call.op, args=(call.op.args[0], None, *call.op.args[2:]))
    return along(replace(call, op=alone), 2, None, "takes quantiles of the batch")


@rule("sort", "argsort", "topk", "kthvalue", "split", "chunk", "split_with_sizes")
def _along_third(call: Call) -> Samples:
    kind = packet(call.op)
    default = 0 if kind.startswith(("split", "chunk")) else -1
    position = 1 if kind in ("sort", "argsort") else 2
    return along(call, position, default, "works along the batch")


@rule("roll")
def _roll(call: Call) -> Samples:
    """Without dimensions all elements are rolled as one row."""
    return along(call, 2, None, "rolls the batch")


@rule("tril", "triu")
def _triangle(call: Call) -> Samples:
    kind, dim = call.type(call.op.args[0]), call.dim(call.op.args[0])
    if kind is None or dim is None or dim >= len(kind.shape) - 2:
        return call.mixed("cuts a triangle across samples")
    return call.like(call.op.args[0])


@rule("constant_pad_nd", "pad", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d",
      "replication_pad1d", "replication_pad2d", "replication_pad3d")  # fmt: skip
def _pad(call: Call) -> Samples:
    x, pads = call.op.args[0], call.op.args[1]
    kind, dim = call.type(x), call.dim(x)
    if call.state(x).kind != "sample" or kind is None or dim is None or not isinstance(pads, tuple):
        return call.mixed("pads a sum over the batch")
    pairs = len(kind.shape) - 1 - dim  # the pads go from the last dimension to the first, in pairs
    padded = any(pad != 0 for pad in pads[2 * pairs : 2 * pairs + 2])
    return call.mixed("pads or shifts the batch") if padded else call.like(x)


# --- picking by index ------------------------------------------------------------------------------


@rule("gather", "take_along_dim")
def _gather(call: Call) -> Samples:
    x, index = call.op.args[0], call.op.args[2 if packet(call.op) == "gather" else 1]
    kind = call.type(x)
    dims = call.op.args[1] if packet(call.op) == "gather" else call.op.argument(2, "dim")
    if kind is None or {call.state(x).kind, call.state(index).kind} - {"sample", "shared"}:
        return call.mixed("picks from a sum over the batch")
    if call.state(x).kind == "sample" and call.dim(x) in dims_argument(dims, len(kind.shape)):
        return call.mixed("picks across samples")
    both = call.state(x).kind == call.state(index).kind == "sample"
    if both and (call.dim(x) != call.dim(index) or call.state(x) != call.state(index)):
        return call.mixed("picks across samples")
    from_shared = call.state(x).kind == "shared" and packet(call.op) == "gather"
    if from_shared and dims_argument(dims, len(kind.shape)) != (call.dim(index),):
        return call.mixed("picks by the position in the batch")
    return call.like(call.first_sample())


@rule("index_select")
def _index_select(call: Call) -> Samples:
    x, dim, index = call.op.args
    kind = call.type(x)
    if kind is None or call.state(x).kind == "partial":
        return call.mixed("picks from a sum over the batch")
    if call.state(x).kind == "sample":
        if call.state(index).kind != "shared" or dims_argument(dim, len(kind.shape)) == (call.dim(x),):
            return call.mixed("picks across samples")
        return call.like(x)
    if call.state(index).kind != "sample":
        return call.mixed("picks by the position in the batch")
    return call.like(index)


@rule("scatter", "scatter_add", "scatter_reduce", "masked_scatter")
def _scatter(call: Call) -> Samples:
    if packet(call.op) == "masked_scatter":
        return call.mixed("fills positions in the order of the whole batch")
    x = call.op.args[0]
    kind, out = call.type(x), call.out_dim()
    (dim,) = dims_argument(call.op.args[1], len(kind.shape)) if kind else (0,)
    if any(call.state(r).kind not in ("sample", "shared") for r in call.operands()):
        return call.mixed("writes sums over the batch")
    # A shared index or source stands for its first rows only: rows are told apart by position.
    states = {(call.state(r), call.dim(r)) for r in call.operands()}
    if out is None or dim == out or states != {(call.state(x), out)}:
        return call.mixed("writes across samples")
    return call.like(x)


@rule("index")
def _index(call: Call) -> Samples:
    x, indices = call.op.args[0], call.op.args[1]
    assert isinstance(indices, tuple)
    if call.state(x).kind not in ("shared", "sample"):
        return call.mixed("picks from a sum over the batch")
    dim = call.dim(x) if call.state(x).kind == "sample" else None
    for place, index in enumerate(indices):
        if index is None:
            continue
        at_batch = place == dim
        iota = call.state(index).kind == "iota"
        if at_batch != iota:
            return call.mixed("picks across samples")
    if not call.same_layout(r for r in call.operands() if call.state(r).kind != "iota"):
        return call.mixed("picks with indices whose samples are laid out differently")
    if dim is None:
        first = call.first_sample()
        return call.like(first) if first is not None else call.mixed("picks by position in the batch")
    return call.like(x)


@rule("slice_scatter", "select_scatter")
def _scatter_part(call: Call) -> Samples:
    base, source = call.op.args[0], call.op.args[1]
    kind, out = call.type(base), call.out_dim()
    if {call.state(base).kind, call.state(source).kind} - {"sample", "shared"} or kind is None:
        return call.mixed("writes sums over the batch")
    (dim,) = dims_argument(call.op.argument(2, "dim", 0), len(kind.shape))
    if out is None or dim == out:
        return call.mixed("writes across samples")
    if not call.same_layout():
        return call.mixed("writes values whose samples are laid out differently")
    return call.like(call.first_sample())
