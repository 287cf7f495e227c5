"""Rows of many samples sorted by a key, worked on one by one, and put back: mixtures of experts.

Tokens that go to the same expert are brought together by sorting. Samples lie in each other's way then,
but what becomes of a row depends on that row and its key alone, so a part of the batch may be sorted on
its own. Values in between are

- *order*: the permutation that sorts the rows of a key; with `every` > 1, divided by that number (the
  token of each row, where a token has several experts);
- *sorted*: rows in that order;
- *unorder*: the permutation that undoes it;
- *rows*: the numbers of all rows;
- *offsets*: where each key's run of sorted rows ends.

Each carries the key it belongs to. Everything not known to be right makes a mixed value. The count of
each key is an ordinary sum over samples (`partial`) that remembers its key.
"""

from dataclasses import replace

from graphpar.ir.chain import RANDOM_TARGETS
from graphpar.ir.ops import Argument, BatchSize, Op
from graphpar.ir.optable import CASTS, packet
from graphpar.passes import positions
from graphpar.passes.samples import (
    DISPATCHED,
    Call,
    Kind,
    Samples,
    by_rule,
    dims_argument,
    settled,
    times,
)

_GROUPED = frozenset({"_grouped_mm", "transformers.grouped_mm_fallback.default"})
"""Products of runs of rows with one matrix each: rows, matrices, ends of the runs."""
_SAME_NUMBERS = CASTS | {"reshape", "view", "flatten", "clone", "contiguous", "alias", "detach"}
_SORTS = frozenset({"sort", "argsort"})


def infer(call: Call) -> Samples:
    """The state of an op's result from the states of its operands."""
    met = any(call.state(r).kind == "mixed" for r in call.operands())
    detour = None if met else _dispatched(call)
    return settled(call.op, by_rule(call) if detour is None else detour)


def _dispatched(call: Call) -> Samples | None:
    """The state of an op that starts, is part of, or ends such a detour; None for all others."""
    kind = packet(call.op)
    states = [call.state(r) for r in call.operands()]
    if any(s.kind in ("starts", "placed") for s in states):
        return positions.followed(call, kind)
    if any(s.kind in DISPATCHED for s in states):
        return positions.rows_of_own(call) or _inside(call, kind)
    if kind in _SORTS and _is_key(call, call.op.args[0]) and _ascending(call.op):
        state = states[0]
        made: Kind = "sorting" if kind == "sort" else "order"
        return Samples(made, 1, times(_size(call, call.op.args[0])), key=_key(call, state))
    if kind == "histc" and _is_key(call, call.op.args[0]) and _counts_each(call.op):
        return Samples("partial", key=_key(call, states[0]))
    if kind == "arange":
        return _all_rows(call) or positions.begun(call, kind)
    if kind == "mul":
        return positions.begun(call, kind)
    if states and states[0].kind == "partial" and states[0].key:
        return _counts(call, kind, states[0])
    return None


def _is_key(call: Call, argument: Argument) -> bool:
    """Whether a value is one number from 0 on for each row, so that counts of keys end at their rows."""
    kind = call.type(argument)
    if call.state(argument).kind != "sample" or kind is None or len(kind.shape) != 1:
        return False
    return _is_choice(call, call.op.operands()[0])


def _is_choice(call: Call, name: str) -> bool:
    """Whether a value is made of places in a row, such as the experts with the best scores."""
    op = call.ops[name]
    while packet(op) in _SAME_NUMBERS and op.operands():
        op = call.ops[op.operands()[0]]
    if op.target == "getitem":
        return op.args[1] == 1 and packet(call.ops[op.operands()[0]]) in ("topk", "max", "min", "sort")
    return packet(op) in ("argmax", "argmin", "argsort")


def _counts_each(op: Op) -> bool:
    """Whether `histc` has a bin of its own for each key; a key beyond the last falls into the last."""
    bins, low, high = (op.argument(i, name) for i, name in ((1, "bins"), (2, "min"), (3, "max")))
    return isinstance(bins, int) and low == 0 and high in (bins - 1, bins)


def _size(call: Call, argument: Argument) -> "int | BatchSize":
    kind = call.type(argument)
    assert kind is not None
    return kind.shape[0]


def _key(call: Call, state: Samples) -> str:
    """The name of the rows' key, seen through casts, and how its samples lie."""
    name = call.op.operands()[0]
    while packet(call.ops[name]) in CASTS and call.ops[name].operands():
        name = call.ops[name].operands()[0]
    return f"{name}:{state.outer}:{state.inner}"


def _layout(key: str) -> tuple[int, int]:
    _, outer, inner = key.rsplit(":", 2)
    return int(outer), int(inner)


def _ascending(op: Op) -> bool:
    return not op.argument(2, "descending", False)


def _all_rows(call: Call) -> Samples | None:
    """`arange` over all rows, of which there are several for each sample."""
    if not call.op.makes_tensor or len(call.op.type.shape) != 1:
        return None
    (size,) = call.op.type.shape
    plain = all(a in (0, 1) or a == size for a in call.op.args)
    if isinstance(size, BatchSize) and size.times > 1 and plain:
        return Samples("rows", inner=size.times)
    return None


def _counts(call: Call, kind: str, state: Samples) -> Samples | None:
    if kind in CASTS:
        return state
    if kind == "cumsum" and dims_argument(call.op.argument(1, "dim"), 1) == (0,):
        return Samples("offsets", key=state.key)
    return None


def _inside(call: Call, kind: str) -> Samples:
    op = call.op
    states = [call.state(r) for r in call.operands()]
    first = states[0]
    if op.target == "getitem" and first.kind == "sorting":
        return replace(first, kind="sorted" if op.args[1] == 0 else "order")
    if op.target == "getitem" and first.kind == "sorted":
        return first
    if first.kind in ("order", "unorder", "offsets") and kind in CASTS | {"clone", "contiguous", "alias"}:
        return first
    if first.kind == "offsets":
        return call.mixed("uses the ends of runs of sorted rows")
    if kind in ("empty_like", "zeros_like", "ones_like", "full_like"):
        return _like(call, first)
    if kind in ("floor_divide", "div") and first.kind == "order":
        return _divided(call, first)
    if kind == "argsort" and first.kind == "order" and first.every == 1 and _ascending(op):
        return replace(first, kind="unorder")
    if kind == "histc" and first.kind == "sorted" and _counts_each(op):
        return _count_of_sorted(call, first)
    if kind in ("index", "index_select"):
        return _picked(call, kind)
    if kind in ("index_put", "index_add", "scatter", "index_copy"):
        return _put_back(call, kind)
    if kind in _GROUPED:
        return _grouped(call)
    return _row_by_row(call)


def _like(call: Call, state: Samples) -> Samples:
    """A constant of the shape of a permutation: uniform over samples, whatever their order."""
    outer, inner = _layout(state.key)
    if state.kind in ("order", "unorder") and call.op.makes_tensor and len(call.op.type.shape) == 1:
        return Samples("sample", outer, inner)
    return call.mixed("makes a constant in the shape of sorted rows")


def _divided(call: Call, order: Samples) -> Samples:
    by = call.op.args[1]
    rounding = call.op.kwarg("rounding_mode")
    floors = packet(call.op) == "floor_divide" or rounding in ("floor", "trunc")
    _, inner = _layout(order.key)
    if isinstance(by, int) and not isinstance(by, bool) and by > 0 and floors:
        if inner % (order.every * by) == 0:
            return replace(order, every=order.every * by)
    return call.mixed("computes with the order of sorted rows")


def _count_of_sorted(call: Call, state: Samples) -> Samples:
    """Counting keys does not mind their order; any other sorted value is no key."""
    name = call.op.operands()[0]
    while packet(call.ops[name]) in CASTS and call.ops[name].operands():
        name = call.ops[name].operands()[0]
    made = call.ops[name]
    source = call.ops[made.operands()[0]] if made.target == "getitem" else None
    if source is not None and packet(source) == "sort":
        return Samples("partial", key=state.key)
    return call.mixed("counts sorted rows")


def _picked(call: Call, kind: str) -> Samples:
    """Rows brought into the order of a key, or back from it; or picked from what all share."""
    op = call.op
    x, index = op.args[0], op.args[1] if kind == "index" else op.args[2]
    if kind == "index" and isinstance(index, tuple):
        (index, *others) = index
        if others and any(other is not None for other in others):
            return call.mixed("picks from sorted rows by several indices")
    if kind == "index_select" and op.args[1] != 0:
        return call.mixed("picks across samples")
    state, by = call.state(x), call.state(index)
    outer, inner = _layout(by.key) if by.key else (1, 1)
    if by.kind == "order" and state.kind == "sample" and call.dim(x) == 0:
        if (state.outer, state.inner * by.every) == (outer, inner):
            return Samples("sorted", inner=outer * inner, key=by.key)
    if by.kind == "unorder" and state.kind == "sorted" and state.key == by.key and call.dim(x) == 0:
        return Samples("sample", outer, inner)
    if by.kind == "sorted" and state.kind == "shared" and call.out_dim() == 0:
        return by
    return call.mixed("picks rows in another order than they were sorted in")


def _put_back(call: Call, kind: str) -> Samples:
    """Sorted rows written to where they came from."""
    op = call.op
    base, index, value = op.args[0], op.args[1], op.args[2]
    if kind == "index_put" and isinstance(index, tuple):
        if len(index) != 1:
            return call.mixed("writes sorted rows by several indices")
        (index,) = index
    elif op.args[1] == 0:
        index, value = op.args[2], op.args[3]
    else:
        return call.mixed("writes across samples")
    by, rows, into = call.state(index), call.state(value), call.state(base)
    if by.kind != "order" or kind == "scatter":
        return call.mixed("writes sorted rows in another order")
    outer, inner = _layout(by.key)
    size = call.type(value)
    if rows.kind in ("rows", "iota") and kind == "index_put" and by.every == 1:
        if size is not None and times(size.shape[0]) == outer * inner:
            return replace(by, kind="unorder")
    target = Samples("sample", outer, inner // by.every)
    fits = into == target and call.dim(base) == 0 and call.out_dim() == 0
    if rows.kind == "sorted" and rows.key == by.key and fits:
        if by.every == 1 or kind == "index_add":
            return target
    return call.mixed("writes sorted rows in another order")


def _grouped(call: Call) -> Samples:
    rows, *rest = call.op.args
    ends = rest[1] if len(rest) > 1 else call.op.kwarg("offs")
    state, limit = call.state(rows), call.state(ends)
    others = [call.state(r) for r in call.operands() if r not in (rows, ends)]
    fits = state.kind == "sorted" and limit.kind == "offsets" and state.key == limit.key
    if fits and call.dim(rows) == 0 == call.out_dim() and all(s.kind == "shared" for s in others):
        return state
    return call.mixed("multiplies rows in groups that are not known to be theirs")


def _row_by_row(call: Call) -> Samples:
    """An op that treats every row alike and for itself: what the rules for samples allow of it."""
    states = {call.state(r) for r in call.operands()} - {Samples("shared")}
    (first, *others) = states
    if others or first.kind != "sorted" or call.op.target in RANDOM_TARGETS:
        return call.mixed("computes with sorted rows of several samples")
    plain = Samples("sample", 1, first.inner)
    seen = {name: plain if state == first else state for name, state in call.states.items()}
    made = by_rule(replace(call, states=seen))
    if made != plain or any(t is None or t.batch_dims != (0,) for t in call.op.types):
        return call.mixed("moves sorted rows of several samples")
    return first
