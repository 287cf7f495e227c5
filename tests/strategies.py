"""Hypothesis strategies shared by the tests: arguments, ops, graphs, and small models."""

from hypothesis import strategies as st

from graphpar.ir.graph import LEVELS, Graph
from graphpar.ir.ops import (
    DTYPE_BYTES,
    Argument,
    Attribute,
    BatchSize,
    Op,
    Ref,
    Symbol,
    TensorType,
)

TEXTS = st.text(max_size=12) | st.sampled_from(
    [
        '"',
        "\\",
        "\n",
        "a\u2028b",
        "\x85",
        "%x = y",
        'h.0 @ "f"',
        "naïve/путь",
        "\ud800",
        "\x00",
        "#",
        "\t",
    ]
)
WORDS = st.from_regex(r"[a-z][a-z0-9_]{0,6}", fullmatch=True)
SYMBOLS = st.sampled_from(
    [
        Symbol("dtype", "float32"),
        Symbol("device", "cuda:0"),
        Symbol("layout", "strided"),
        Symbol("memory_format", "channels_last"),
        Symbol("batch", "12"),
    ]
)
BATCH_SIZES = st.integers(1, 2**20).map(BatchSize)
SCALARS: st.SearchStrategy[Argument] = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.complex_numbers(),
    TEXTS,
    SYMBOLS,
    BATCH_SIZES,
)
TYPES = st.builds(
    TensorType,
    st.lists(st.integers(0, 9) | BATCH_SIZES, max_size=4).map(tuple),
    st.sampled_from(sorted(DTYPE_BYTES)),
)
ATTRIBUTES: st.SearchStrategy[Attribute] = st.one_of(
    st.booleans(), st.integers(), TEXTS, st.lists(st.integers(), max_size=3).map(tuple)
)


_ARGUMENTS: st.SearchStrategy[Argument] = st.recursive(
    SCALARS | st.integers(0, 4).map(lambda place: Ref(str(place))),
    lambda inner: st.lists(inner, max_size=3).map(tuple),
    max_leaves=5,
)
"""Arguments in which a reference holds a number that stands for one of the ops before."""


def _resolved(argument: Argument, before: list[str]) -> Argument:
    if isinstance(argument, tuple):
        return tuple(_resolved(a, before) for a in argument)
    if isinstance(argument, Ref):
        return Ref(before[int(argument.name) % len(before)]) if before else None
    return argument


_ARGS = st.lists(_ARGUMENTS, max_size=3)
_KWARGS = st.dictionaries(WORDS, _ARGUMENTS, max_size=2)
_ATTRS = st.dictionaries(WORDS, ATTRIBUTES, max_size=2)


@st.composite
def ops(draw: st.DrawFn, name: str, before: list[str]) -> Op:
    """Any op that reads some of the ops before it."""
    several = draw(st.booleans())
    types = (
        draw(st.lists(st.none() | TYPES, max_size=3)) if several else draw(st.lists(TYPES, max_size=1))
    )
    return Op(
        name,
        draw(st.sampled_from(["aten.add.Tensor", "getitem", "gp.dropout", "mine.op_2.default"])),
        tuple(_resolved(a, before) for a in draw(_ARGS)),
        tuple((key, _resolved(a, before)) for key, a in draw(_KWARGS).items()),
        tuple(types),
        several,
        draw(TEXTS),
        draw(TEXTS),
        tuple(draw(st.lists(WORDS, max_size=2))),
        draw(st.sampled_from(["capture", "place"]) | TEXTS),
        tuple(sorted(draw(_ATTRS).items())),
    )


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    """Any graph, legal or not."""
    made: list[Op] = []
    for index in range(draw(st.integers(1, 4))):
        name = draw(st.sampled_from(["x", "größe", "a.b", "_", "B", "inf"])) + str(index)
        made.append(draw(ops(name, [op.name for op in made])))
    others = st.lists(TEXTS, min_size=1, max_size=2).map(tuple)
    return Graph(
        made,
        level=draw(st.sampled_from(LEVELS)),
        name=draw(TEXTS),
        batch=draw(st.integers(1, 64)),
        aliases=draw(st.dictionaries(TEXTS, others, max_size=2)),
    )
