"""Work far outside of what was measured is told, and only that."""

import pytest

from graphpar.cluster import Cluster
from graphpar.cost_models.extrapolation import extrapolations
from graphpar.ir.text import parse_graph


def told(kind: str, width: int, dtype: str = "float32", precision: str = "float32") -> tuple[str, ...]:
    graph = parse_graph(f"""graph captured "Net" batch=4
%x = input("x") : {dtype}[B,{width}]
%w = parameter("0.w") : {dtype}[{width},{width}] {{grad=true}}
%a = aten.linear.default(%x, %w) : {dtype}[B,{width}] {{grad=true}} @ "0" ""
%output = output((%a,))
""")
    cluster = Cluster.from_dict({"nodes": [{"name": "a", "devices": {"kind": kind, "count": 2}}]})
    return extrapolations(graph, cluster, None, precision, 1)


def test_usual_sizes_and_formats_are_not_mentioned() -> None:
    assert told("a100-sxm-80gb", 1024) == ()
    assert told("a100-sxm-80gb", 1024, precision="bfloat16") == ()
    # It has no bfloat16 and stays in float32, of which everything is known.
    assert told("v100-sxm2-16gb", 1024, precision="bfloat16") == ()


@pytest.mark.parametrize(
    ("width", "dtype", "word"),
    [(2**24, "float32", "times as large"), (1024, "float64", "nothing is known of float64")],
)
def test_what_is_guessed_is_told_with_the_kind(width: int, dtype: str, word: str) -> None:
    (remark,) = told("rtx-3090", width, dtype)
    assert word in remark and "rtx-3090" in remark and "error bar widened" in remark
