"""Positions in the list of all rows of all samples: where each sample's rows start, and rows among them.

Neighbours of points, and bags of words, are often looked up in the batch laid flat: row `i` of sample `s`
is row `every * s + i` of the list. Such a number is good for nothing but picking from that list, and
picks from its own sample if `i` is known to be a row. Values in between are

- *starts*: the number of each sample's first row, `every * s`;
- *placed*: numbers of rows, each in its own sample.
"""

from dataclasses import replace

from graphpar.ir.ops import Argument, BatchSize, Op
from graphpar.ir.optable import CASTS, packet
from graphpar.passes.samples import Call, Samples, by_rule, dims_argument, times

_SHAPED = frozenset({
    "view", "reshape", "_unsafe_view", "flatten", "unflatten", "unsqueeze", "squeeze", "expand",
    "permute", "transpose", "clone", "contiguous", "alias", "detach", "slice", "select",
}) | CASTS  # fmt: skip


def begun(call: Call, kind: str) -> Samples | None:
    """What starts as such a position: `arange(0, B * every, every)`, or samples' own times `every`."""
    op = call.op
    if kind == "arange" and op.makes_tensor and op.type.shape == (BatchSize(1),):
        start, end, step = (*op.args, None, None)[:3]
        if start == 0 and isinstance(step, int) and step > 1 and end == BatchSize(step):
            return Samples("starts", every=step)
    if kind == "mul" and len(op.args) == 2 and isinstance(op.args[1], int):
        if call.state(op.args[0]).kind == "iota" and op.args[1] > 0:
            return Samples("starts", every=op.args[1])
    return None


def followed(call: Call, kind: str) -> Samples:
    """What an op makes of such positions."""
    op = call.op
    found = next(s for r in call.operands() if (s := call.state(r)).kind in ("starts", "placed"))
    if kind in ("add", "add_") and found.kind == "starts":
        return _placed(call, found)
    if kind in _SHAPED:
        made = by_rule(_as_samples(call))
        return replace(made, kind=found.kind, every=found.every) if made.kind == "sample" else made
    if kind == "embedding_bag" and found.kind == "starts":
        return _bags(call, found)
    if kind in ("index", "index_select") and found.kind == "placed":
        x = op.args[0]
        index = op.args[1] if kind == "index" else op.args[2]
        alone = (index == (index[0],)) if isinstance(index, tuple) else op.args[1] == 0
        if alone and call.dim(x) == 0 and call.state(x) == Samples("sample", 1, found.every):
            return Samples("sample", found.outer, found.inner)
    return call.mixed("computes with the position in the batch")


def rows_of_own(call: Call) -> Samples | None:
    """What is picked from rows by the number of each row and by a second index of its own."""
    if packet(call.op) != "index":
        return None
    x, indices = call.op.args[:2]
    if not isinstance(indices, tuple) or len(indices) < 2:
        return None
    first, *others = indices
    rows, state = call.state(first), call.state(x)
    if rows.kind != "rows" or state != Samples("sample", 1, rows.inner) or call.dim(x) != 0:
        return None
    kinds = [call.type(i) for i in others if i is not None]
    fits = all(i is None or (call.state(i) == state and call.dim(i) == 0) for i in others)
    fits = fits and all(kind is not None and len(kind.shape) == 1 for kind in kinds)
    return state if fits and call.out_dim() == 0 else None


def _as_samples(call: Call) -> Call:
    plain = {
        name: replace(state, kind="sample", every=1) if state.kind in ("starts", "placed") else state
        for name, state in call.states.items()
    }
    return replace(call, states=plain)


def _placed(call: Call, starts: Samples) -> Samples:
    """A sample's first row and the number of a row in it, added up."""
    a, b = call.op.args[:2]
    number = b if call.state(a) == starts else a
    if call.op.argument(2, "alpha", 1) != 1 or call.state(number).kind != "sample":
        return call.mixed("computes with the position in the batch")
    if _rows(call, number) != starts.every:
        return call.mixed("computes with the position in the batch")
    made = by_rule(_as_samples(call))
    return replace(made, kind="placed", every=starts.every) if made.kind == "sample" else made


def _rows(call: Call, number: Argument) -> int | None:
    """Of how many rows a value is one for sure: a place among the best, say; None where nobody knows."""
    (name,) = [r.name for r in call.operands() if r == number]
    op = call.ops[name]
    while packet(op) in _SHAPED and op.operands():
        op = call.ops[op.operands()[0]]
    if op.target == "getitem":
        if op.args[1] != 1:
            return None
        op = call.ops[op.operands()[0]]
        position = {"topk": 2, "kthvalue": 2, "sort": 1, "max": 1, "min": 1, "median": 1}.get(packet(op))
    else:
        position = {"argmax": 1, "argmin": 1, "argsort": 1}.get(packet(op))
    return None if position is None else _size_along(call, op, position)


def _size_along(call: Call, op: Op, position: int) -> int | None:
    searched = call.ops[op.operands()[0]]
    default = -1 if packet(op) in ("topk", "kthvalue", "sort", "argsort") else None
    dims = op.argument(position, "dim", default)
    if not searched.makes_tensor or not isinstance(dims, int):
        return None
    size = searched.type.shape[dims_argument(dims, len(searched.type.shape))[0]]
    return size if isinstance(size, int) else None


def _bags(call: Call, starts: Samples) -> Samples:
    """Bags of equally many words, laid out one after the other."""
    op = call.op
    table, words = op.args[:2]
    weights = op.argument(6, "per_sample_weights")
    plain = not op.argument(3, "scale_grad_by_freq", False) and not op.argument(
        7, "include_last_offset", False
    )
    own = Samples("sample", 1, starts.every)
    fits = call.state(words) == own and call.state(table).kind == "shared"
    if call.type(weights) is not None and call.state(weights) != own:
        fits = False
    kind = call.type(words)
    if (
        fits
        and plain
        and kind is not None
        and times(kind.shape[0]) == starts.every
        and len(kind.shape) == 1
    ):
        return Samples("sample")
    return call.mixed("puts words of several samples into a bag")
