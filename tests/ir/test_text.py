"""The text form of a graph parses back to an equal graph, and tells where it does not parse."""

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import graphs

from graphpar.errors import VerifyError
from graphpar.ir.graph import Graph
from graphpar.ir.ops import BatchSize, Op, Ref, Symbol, TensorType
from graphpar.ir.text import format_argument, format_graph, parse_graph, parse_op

HEAD = 'graph captured "N" batch=2\n'


@given(graphs())
@settings(max_examples=80, deadline=None)
def test_a_graph_parses_back_to_itself(graph: Graph) -> None:
    text = format_graph(graph)
    again = parse_graph(text)
    assert format_graph(again) == text
    if "nan" not in text:  # NaN is not equal to itself
        assert again == graph
    assert len(text.splitlines()) == 1 + len(graph) + sum(map(len, graph.aliases.values()))


def test_one_line_shows_everything() -> None:
    op = Op(
        "y", "aten.add.Tensor", (Ref("x"), (1, (2.5,)), BatchSize(3)),
        (("alpha", Symbol("dtype", "int8")),), (TensorType((BatchSize(), 4), "float32"),), False,
        'a"b\nc', "f.py:3", ("z",), "place", (("grad", True), ("stage", 1)),
    )  # fmt: skip
    line = (
        "%y = aten.add.Tensor(%x, (1, (2.5,)), 3*B, alpha=dtype:int8) : float32[B,4] "
        '{grad=true, stage=1} @ "a\\"b\\nc" "f.py:3" from(%z) by("place")'
    )
    from_text = parse_op(line)
    assert from_text == op


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (float("inf"), "inf"),
        (-float("inf"), "-inf"),
        (float("nan"), "nan"),
        (1e-12, "1e-12"),
        (1e22, "1e+22"),
        (complex(1, -2), "complex(1.0, -2.0)"),
        ((), "()"),
        ((1,), "(1,)"),
        (True, "true"),
        ("none", '"none"'),
    ],
)
def test_arguments(value: float | complex | str | tuple[int, ...], text: str) -> None:
    assert format_argument(value) == text
    assert format_argument(parse_op(f"%y = f({text})").args[0]) == text


@pytest.mark.parametrize(
    "line",
    [
        "%y aten.relu.default(%x)",
        "%y = aten.relu.default(%x",
        "%y = aten.relu.default(%x) : float32[B,x]",
        "%y = aten.relu.default(%x) : float32[B,",
        "%y = aten.relu.default(%x) {grad=1.5}",
        "%y = aten.relu.default(%x) {grad}",
        "%y = aten.relu.default(§)",
        "%y = aten.relu.default(word)",
        "%y = aten.relu.default(complex(1))",
        '%y = aten.relu.default("\\q")',
        "%y = aten.relu.default(5j)",
        "%y = aten.relu.default(,)",
        "%y =",
        'alias "a"',
        'alias "a" = "b" "c"',
        "nonsense",
    ],
)
def test_errors_name_the_line(line: str) -> None:
    with pytest.raises(VerifyError, match="line 3"):
        parse_graph(f'{HEAD}%x = input("x") : float32[B]\n{line}\n')


@pytest.mark.parametrize(
    "head",
    [
        "",
        "graph",
        'graph melted "N" batch=2',
        'graph captured "N" batch=1.5',
        'graph captured "N" batch=2 x',
    ],
)
def test_a_broken_head_is_line_1(head: str) -> None:
    with pytest.raises(VerifyError, match="line 1"):
        parse_graph(head + "\n")


@given(graphs(), st.data())
@settings(max_examples=80, deadline=None)
def test_broken_text_gives_no_other_error(graph: Graph, data: st.DataObject) -> None:
    text = format_graph(graph)
    at = data.draw(st.integers(0, len(text)))
    junk = data.draw(st.text(max_size=3) | st.sampled_from(list('(),=:{}%"')))
    broken = text[:at] + junk + text[at + data.draw(st.integers(0, 3)) :]
    with contextlib.suppress(VerifyError):
        format_graph(parse_graph(broken))
