"""Which dimensions of what an op reads and makes run together: one rule for each kind of op.

A rule knows no group and no cost. It says "the rows of the result are the rows of the first operand";
what may be cut, and into what, follows from that (`strategies`). An op without a rule has no ties and
is computed whole by every member, which is always right.
"""

from collections.abc import Callable, Iterator, Sequence

from graphpar.ir.graph import Graph
from graphpar.ir.more_links import rule_for
from graphpar.ir.ops import BatchSize, Dim, Op
from graphpar.ir.optable import POINTWISE, packet
from graphpar.ir.tie import RESULT, Link, Rule, Side, as_dims, dim_of, shape_of, slot_of

_BIG = 1_000_003


def links_of(op: Op, graph: Graph) -> tuple[Link, ...]:
    """The ties of one op; none where there is no rule for it."""
    own = _RULES.get(packet(op)) or rule_for(op)
    rule = own or (_pointwise if packet(op) in POINTWISE else None)
    if rule is None or not any(t is not None for t in op.types):
        return ()
    return tuple(link for link in rule(op, graph) if len(link.sides) > 0)


def _joined(op: Op, graph: Graph, pairs: Sequence[tuple[int, int]], result_dim: int) -> Link:
    return Link((Side(RESULT, (result_dim,)), *(Side(slot, (d,)) for slot, d in pairs)))


def _pointwise(op: Op, graph: Graph) -> Iterator[Link]:
    result = shape_of(op, graph, RESULT)
    shapes = [shape_of(op, graph, slot) for slot in range(len(op.operands()))]
    for d, size in enumerate(result):
        pairs = []
        for slot, shape in enumerate(shapes):
            own = d - len(result) + len(shape)
            if own >= 0 and shape[own] == size:
                pairs.append((slot, own))
        if size != 1 and pairs:
            yield _joined(op, graph, pairs, d)


def _dropout(op: Op, graph: Graph) -> Iterator[Link]:
    if op.args[2] is True:
        return  # whole channels are dropped: the mask has another shape
    yield from (_joined(op, graph, [(0, d)], d) for d in range(len(shape_of(op, graph, RESULT))))


def _along(op: Op, graph: Graph, blocked: Sequence[int]) -> Iterator[Link]:
    """The first operand and every result share all dimensions but the blocked ones."""
    rank = len(shape_of(op, graph, 0))
    for d in range(rank):
        if d not in blocked:
            results = [Side(-1 - i, (d,)) for i, t in enumerate(op.types) if t is not None]
            yield Link((Side(0, (d,)), *results))


def _softmax(op: Op, graph: Graph) -> Iterator[Link]:
    rank = len(shape_of(op, graph, 0))
    yield from _along(op, graph, [dim_of(op.argument(1, "dim"), rank)])


def _last_by_default(position: int) -> Rule:
    def rule(op: Op, graph: Graph) -> Iterator[Link]:
        rank = len(shape_of(op, graph, 0))
        yield from _along(op, graph, [dim_of(op.argument(position, "dim", -1), rank)])

    return rule


def _norm(op: Op, graph: Graph) -> Iterator[Link]:
    normalized = op.argument(1, "normalized_shape")
    rank = len(shape_of(op, graph, 0))
    count = len(normalized) if isinstance(normalized, tuple) else 1
    for d in range(rank - count):
        yield Link((Side(RESULT, (d,)), Side(0, (d,))))


def _linear(op: Op, graph: Graph) -> Iterator[Link]:
    rank = len(shape_of(op, graph, 0))
    for d in range(rank - 1):
        yield Link((Side(RESULT, (d,)), Side(0, (d,))))
    bias = slot_of(op, 2, "bias")
    columns = [Side(RESULT, (rank - 1,)), Side(1, (0,))]
    yield Link((*columns, *([Side(bias, (0,))] if bias is not None else [])))
    yield Link((Side(0, (rank - 1,)), Side(1, (1,))), True, "", (bias,) if bias is not None else ())


def _addmm(op: Op, graph: Graph) -> Iterator[Link]:
    yield from _product_with_bias(op, graph, ())


def _baddbmm(op: Op, graph: Graph) -> Iterator[Link]:
    yield from _product_with_bias(op, graph, (0,))


def _product_with_bias(op: Op, graph: Graph, batch: tuple[int, ...]) -> Iterator[Link]:
    """`bias + a @ b` with the bias broadcast to the result."""
    rank = len(batch) + 2
    bias = shape_of(op, graph, 0)

    def with_bias(d: int, *sides: Side) -> Link:
        own = d - rank + len(bias)
        more = [Side(0, (own,))] if own >= 0 and bias[own] != 1 else []
        return Link((Side(RESULT, (d,)), *sides, *more))

    for d in batch:
        yield with_bias(d, Side(1, (d,)), Side(2, (d,)))
    yield with_bias(rank - 2, Side(1, (rank - 2,)))
    yield with_bias(rank - 1, Side(2, (rank - 1,)))
    if not op.kwargs:
        yield Link((Side(1, (rank - 1,)), Side(2, (rank - 2,))), True, "", (0,))


def _matmul(op: Op, graph: Graph) -> Iterator[Link]:
    a, b = shape_of(op, graph, 0), shape_of(op, graph, 1)
    if len(a) < 2 or len(b) < 2:
        return
    result = shape_of(op, graph, RESULT)
    for d in range(len(result) - 2):
        sides = [Side(RESULT, (d,))]
        for slot, shape in enumerate((a, b)):
            own = d - len(result) + len(shape)
            if own >= 0 and shape[own] == result[d]:
                sides.append(Side(slot, (own,)))
        yield Link(tuple(sides))
    rank = len(result)
    yield Link((Side(RESULT, (rank - 2,)), Side(0, (len(a) - 2,))))
    yield Link((Side(RESULT, (rank - 1,)), Side(1, (len(b) - 1,))))
    yield Link((Side(0, (len(a) - 1,)), Side(1, (len(b) - 2,))), True)


def _attention(op: Op, graph: Graph) -> Iterator[Link]:
    """Query (..., H, L, E), key and value (..., H, S, E), mask broadcast to (..., H, L, S)."""
    query = shape_of(op, graph, 0)
    enable_gqa = op.argument(7, "enable_gqa", False) if op.target == "gp.attention" else False
    enable_gqa = enable_gqa or op.kwarg("enable_gqa", False)
    mask = slot_of(op, 3, "attn_mask")
    key, value = shape_of(op, graph, 1), shape_of(op, graph, 2)
    if not len(key) == len(value) == len(query):
        return
    for d in range(len(query) - 2):
        repeats = _number(query[d]) // max(_number(key[d]), 1)
        if repeats != 1 and not (enable_gqa and d == len(query) - 3):
            return
        own = d - len(query) + len(shape_of(op, graph, mask)) if mask is not None else -1
        sides = [
            Side(RESULT, (d,), tail=repeats),
            Side(0, (d,), tail=repeats),
            Side(1, (d,)),
            Side(2, (d,)),
        ]
        if mask is not None and own >= 0 and shape_of(op, graph, mask)[own] != 1:
            sides.append(Side(mask, (own,), tail=repeats))
        yield Link(tuple(sides))


def _embedding(op: Op, graph: Graph) -> Iterator[Link]:
    rank = len(shape_of(op, graph, 1))
    for d in range(rank):
        yield Link((Side(RESULT, (d,)), Side(1, (d,))))
    yield Link((Side(RESULT, (rank,)), Side(0, (1,))))
    if not op.argument(3, "scale_grad_by_freq", False):
        yield Link((Side(0, (0,)),), True, "lookup")


def _cross_entropy(op: Op, graph: Graph) -> Iterator[Link]:
    """Sums over samples only: a mean's denominator is of all of them."""
    scores = shape_of(op, graph, 0)
    target = shape_of(op, graph, 1)
    plain = op.argument(2, "weight") is None and op.argument(5, "label_smoothing", 0.0) == 0.0
    by_index = len(scores) == 2 and len(target) == 1
    if plain and by_index and op.argument(3, "reduction", 1) == 2:
        yield Link((Side(0, (0,)), Side(1, (0,))), True)
    if plain and by_index and op.argument(3, "reduction", 1) in (1, 2):
        yield Link((Side(0, (1,)),), False, "classes")


def _grouped_product(op: Op, graph: Graph) -> Iterator[Link]:
    """Rows (M, K) sorted by expert, weights (experts, K, N), ends of the experts' rows."""
    if len(shape_of(op, graph, 0)) != 2 or len(shape_of(op, graph, 1)) != 3:
        return
    yield Link((Side(RESULT, (1,)), Side(1, (2,))))
    yield Link((Side(0, (1,)), Side(1, (1,))), True)
    yield Link((Side(1, (0,)),), True, "experts")


def _reduction(op: Op, graph: Graph) -> Iterator[Link]:
    shape = shape_of(op, graph, 0)
    gone = as_dims(op.argument(1, "dim"), len(shape))
    if len(op.args) < 2 and op.kwarg("dim") is None:
        gone = tuple(range(len(shape)))
    keep = op.argument(2, "keepdim", False) is True
    place = 0
    for d in range(len(shape)):
        if d in gone:
            if packet(op) == "sum":
                yield Link((Side(0, (d,)),), True)
            place += keep
        else:
            yield Link((Side(RESULT, (place,)), Side(0, (d,))))
            place += 1


def _view(op: Op, graph: Graph) -> Iterator[Link]:
    """Groups of dimensions whose products are equal."""
    before, after = shape_of(op, graph, 0), shape_of(op, graph, RESULT)
    i = j = 0
    while i < len(before) and j < len(after):
        left, right = [i], [j]
        a, b = _number(before[i]), _number(after[j])
        i, j = i + 1, j + 1
        while a != b:
            if a < b and i < len(before):
                a *= _number(before[i])
                left.append(i)
                i += 1
            elif b < a and j < len(after):
                b *= _number(after[j])
                right.append(j)
                j += 1
            else:
                return
        yield Link((Side(RESULT, tuple(right)), Side(0, tuple(left))))


def _number(size: Dim) -> int:
    return size.times * _BIG if isinstance(size, BatchSize) else size


def _permuted(order: Callable[[Op, int], Sequence[int]]) -> Rule:
    def rule(op: Op, graph: Graph) -> Iterator[Link]:
        rank = len(shape_of(op, graph, 0))
        for d, source in enumerate(order(op, rank)):
            yield Link((Side(RESULT, (d,)), Side(0, (source,))))

    return rule


def _transposed(op: Op, rank: int) -> list[int]:
    order = list(range(rank))
    if rank >= 2:
        a, b = (
            (dim_of(op.argument(k, f"dim{k - 1}"), rank) for k in (1, 2)) if packet(op) != "t" else (0, 1)
        )
        order[a], order[b] = order[b], order[a]
    return order


def _expand(op: Op, graph: Graph) -> Iterator[Link]:
    """A dimension that is repeated may be cut too: each member repeats less often."""
    before, after = shape_of(op, graph, 0), shape_of(op, graph, RESULT)
    for d, size in enumerate(after):
        own = d - len(after) + len(before)
        same = own >= 0 and before[own] == size
        yield Link((Side(RESULT, (d,)), *([Side(0, (own,))] if same else [])))


def _squeeze_like(op: Op, graph: Graph) -> Iterator[Link]:
    yield from _view(op, graph)


def _split(op: Op, graph: Graph) -> Iterator[Link]:
    shape = shape_of(op, graph, 0)
    dim = dim_of(op.argument(2, "dim", 0), len(shape))
    sizes = {t.shape[dim] for t in op.types if t is not None}
    for d in range(len(shape)):
        results = tuple(Side(-1 - i, (d,)) for i in range(len(op.types)))
        if d != dim:
            yield Link((Side(0, (d,)), *results))
        elif len(sizes) == 1:
            yield Link((Side(0, (d,), lead=len(op.types)), *results))


def _slice(op: Op, graph: Graph) -> Iterator[Link]:
    before, after = shape_of(op, graph, 0), shape_of(op, graph, RESULT)
    dim = dim_of(op.argument(1, "dim", 0), len(before))
    for d in range(len(before)):
        if d != dim and before[d] == after[d]:
            yield Link((Side(RESULT, (d,)), Side(0, (d,))))


def _select(op: Op, graph: Graph) -> Iterator[Link]:
    rank = len(shape_of(op, graph, 0))
    dim = dim_of(op.argument(1, "dim"), rank)
    for d in range(rank):
        if d != dim:
            yield Link((Side(RESULT, (d - (d > dim),)), Side(0, (d,))))


def _cat(op: Op, graph: Graph) -> Iterator[Link]:
    """Operands without elements count for nothing, as in torch."""
    result = shape_of(op, graph, RESULT)
    dim = dim_of(op.argument(1, "dim", 0), len(result))
    slots = [s for s in range(len(op.operands())) if len(shape_of(op, graph, s)) == len(result)]
    for d in range(len(result)):
        if d != dim:
            yield Link((Side(RESULT, (d,)), *(Side(s, (d,)) for s in slots)))


def _pad(op: Op, graph: Graph) -> Iterator[Link]:
    before, after = shape_of(op, graph, 0), shape_of(op, graph, RESULT)
    amounts = op.argument(1, "pad")
    padded = len(amounts) // 2 if isinstance(amounts, tuple) else len(before)
    for d in range(len(before) - padded):
        if before[d] == after[d]:
            yield Link((Side(RESULT, (d,)), Side(0, (d,))))


def _index(op: Op, graph: Graph) -> Iterator[Link]:
    """One tensor of positions along the first dimension, as in a lookup of rows."""
    positions = op.args[1]
    if not isinstance(positions, tuple) or len(positions) != 1 or len(op.operands()) != 2:
        return
    if graph[op.operands()[1]].type.dtype == "bool":
        return
    rows, source = len(shape_of(op, graph, 1)), len(shape_of(op, graph, 0))
    for d in range(rows):
        yield Link((Side(RESULT, (d,)), Side(1, (d,))))
    for d in range(1, source):
        yield Link((Side(RESULT, (rows + d - 1,)), Side(0, (d,))))


def _convolution(op: Op, graph: Graph) -> Iterator[Link]:
    position = {"convolution": 8}.get(packet(op), 6)
    if op.argument(position, "groups", 1) != 1 or op.argument(6, "transposed", False) is True:
        return
    bias = slot_of(op, 2, "bias")
    yield Link((Side(RESULT, (0,)), Side(0, (0,))))
    columns = [Side(RESULT, (1,)), Side(1, (0,))]
    yield Link((*columns, *([Side(bias, (0,))] if bias is not None else [])))
    yield Link((Side(0, (1,)), Side(1, (1,))), True, "", (bias,) if bias is not None else ())


_RULES: dict[str, Rule] = {
    "gp.cast_weight": _pointwise, "gp.dropout": _dropout,
    "softmax": _softmax, "_softmax": _softmax, "log_softmax": _softmax,
    "_log_softmax": _softmax, "layer_norm": _norm, "rms_norm": _norm, "linear": _linear,
    "addmm": _addmm, "baddbmm": _baddbmm, "mm": _matmul, "bmm": _matmul, "matmul": _matmul,
    "scaled_dot_product_attention": _attention, "gp.attention": _attention, "embedding": _embedding,
    "cross_entropy_loss": _cross_entropy, "sum": _reduction, "mean": _reduction, "amax": _reduction,
    "amin": _reduction, "view": _view, "reshape": _view, "_unsafe_view": _view, "flatten": _view,
    "unflatten": _view, "unsqueeze": _squeeze_like, "squeeze": _squeeze_like,
    "transpose": _permuted(_transposed), "t": _permuted(_transposed),
    "permute": _permuted(lambda op, rank: as_dims(op.argument(1, "dims"), rank)),
    "expand": _expand, "split": _split, "chunk": _split, "split_with_sizes": _split,
    "unsafe_split": _split, "slice": _slice, "select": _select, "cat": _cat, "pad": _pad,
    "constant_pad_nd": _pad, "index": _index, "topk": _last_by_default(2),
    "sort": _last_by_default(1), "cumsum": _last_by_default(1),
    "conv1d": _convolution, "conv2d": _convolution, "conv3d": _convolution,
    "convolution": _convolution, "transformers.grouped_mm_fallback.default": _grouped_product,
    "_grouped_mm": _grouped_product,
}  # fmt: skip
