"""Which values share storage, and which views have to copy, found without running anything."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from graphpar.ir.graph import Graph
from graphpar.ir.ops import Op, Symbol
from graphpar.ir.optable import POINTWISE, packet

GROWING = frozenset({"expand", "expand_as", "broadcast_to"})
PARTIAL = frozenset(
    "slice select narrow split split_with_sizes chunk unbind unsafe_split unsafe_chunk tensor_split "
    "diagonal unfold as_strided".split()
)
"""Views of a part of the storage: their backward has to fill or join the rest."""

_RESHAPES = frozenset({"view", "reshape", "flatten", "ravel", "unflatten", "_unsafe_view", "view_as"})
VIEWS = (
    GROWING
    | PARTIAL
    | _RESHAPES
    | frozenset(
        "transpose permute t numpy_T mT T unsqueeze squeeze detach alias movedim moveaxis swapaxes "
        "swapdims lift_fresh real imag view_as_real view_as_complex adjoint contiguous getitem "
        "gp.whole_batch".split()
    )
)
"""Operators whose result may share storage with the first operand."""


@dataclass(frozen=True)
class Layout:
    """Storage facts of a whole graph.

    Attributes:
        root: Value name to the name of the value that owns its storage.
        copies: Views that have to copy.
    """

    root: Mapping[str, str]
    copies: frozenset[str]

    @cached_property
    def sharers(self) -> Mapping[str, tuple[str, ...]]:
        """Owner of a storage to all values in it, itself included."""
        found: dict[str, list[str]] = {}
        for name, owner in self.root.items():
            found.setdefault(owner, []).append(name)
        return {owner: tuple(names) for owner, names in found.items()}


@dataclass(frozen=True)
class _Strides:
    """Order of the dimensions in storage, and whether there are holes or repeats."""

    order: tuple[int, ...]
    gaps: bool = False

    @property
    def is_plain(self) -> bool:
        return self.order == tuple(range(len(self.order)))


def find_layout(graph: Graph) -> Layout:
    """Follow storage and order of dimensions through the graph."""
    root: dict[str, str] = {}
    strides: dict[str, _Strides] = {}
    copies: set[str] = set()
    for op in graph.ops:
        name = packet(op)
        source = op.operands()[0] if op.operands() else None
        root[op.name] = op.name
        strides[op.name] = _plain(op)
        if source is None:
            continue
        if is_view(op, graph):
            moved, copied = _view(op, name, strides[source])
            strides[op.name] = moved
            if copied:
                copies.add(op.name)
            else:
                root[op.name] = root[source]
        elif name in POINTWISE:
            strides[op.name] = _pointwise(op, graph, strides)
        elif name in ("scaled_dot_product_attention", "gp.attention") and len(_plain(op).order) == 4:
            # Fused attention writes batch, sequence, heads, size, whatever the order of dimensions.
            strides[op.name] = _Strides((0, 2, 1, 3))
    return Layout(root, frozenset(copies))


def is_view(op: Op, graph: Graph) -> bool:
    """Whether the result may share storage with the first operand."""
    name = packet(op)
    if name in VIEWS:
        return True
    if name in ("to", "_to_copy", "type_as") and op.operands():
        before = graph[op.operands()[0]]
        same = bool(before.types) and op.types == before.types
        return same and name != "_to_copy"
    if name in ("dropout", "feature_dropout"):
        # Dropout that drops nothing hands its argument on.
        return op.argument(2, "train") is False or op.argument(1, "p") == 0
    return False


def _plain(op: Op) -> _Strides:
    rank = max((len(t.shape) for t in op.types if t is not None), default=0)
    return _Strides(tuple(range(rank)))


def _view(op: Op, name: str, before: _Strides) -> tuple[_Strides, bool]:
    plain = _plain(op)
    if name in _RESHAPES:
        return (plain, True) if not before.is_plain else (_Strides(plain.order, before.gaps), False)
    if name == "contiguous":
        return plain, before.gaps or not before.is_plain
    if name in ("transpose", "swapaxes", "swapdims") and len(op.args) > 2:
        return _swapped(before, op.args[1], op.args[2]), False
    if name in ("t", "numpy_T", "T", "mT", "adjoint") and len(before.order) >= 2:
        return _swapped(before, -1, -2), False
    if name == "permute":
        return _permuted(before, op.args[1]), False
    if name in GROWING:
        return _Strides(plain.order, True), False
    if name in PARTIAL:
        same_rank = len(plain.order) == len(before.order)
        return _Strides(before.order if same_rank else plain.order, True), False
    keeps = len(plain.order) == len(before.order)
    return (before if keeps else _Strides(plain.order, before.gaps)), False


def _swapped(before: _Strides, first: object, second: object) -> _Strides:
    order = list(before.order)
    if isinstance(first, int) and isinstance(second, int) and order:
        a, b = first % len(order), second % len(order)
        order[a], order[b] = order[b], order[a]
    return _Strides(tuple(order), before.gaps)


def _permuted(before: _Strides, dims: object) -> _Strides:
    if not isinstance(dims, tuple) or len(dims) != len(before.order):
        return before
    order = tuple(before.order[d % len(before.order)] for d in dims if isinstance(d, int))
    return _Strides(order if len(order) == len(before.order) else before.order, before.gaps)


def _pointwise(op: Op, graph: Graph, strides: Mapping[str, _Strides]) -> _Strides:
    """A pointwise result takes the order of its first operand of full size."""
    plain = _plain(op)
    if Symbol("memory_format", "contiguous_format") in (v for _, v in op.kwargs):
        return plain
    for operand in op.operands():
        kinds = graph[operand].types
        mine = op.types[0]
        if kinds and kinds[0] is not None and mine is not None and kinds[0].shape == mine.shape:
            return _Strides(strides[operand].order)
    return plain
