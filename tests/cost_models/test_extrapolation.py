"""Work far outside of what was measured is told, and only that."""

import pytest

from graphpar.cluster import Cluster
from graphpar.cost_models.extrapolation import described, extrapolations
from graphpar.cost_models.rates import CatalogueRates
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


def sheet(peak_flops_per_s: float, **more: object) -> Cluster:
    kind = {"name": "mine", "peak_flops_per_s": {"float32": peak_flops_per_s}, **more}
    kind |= {"memory_bytes": 1e10, "memory_bytes_per_s": 1e11}
    return Cluster.from_dict({"nodes": [{"name": "a", "devices": {"kind": kind}}]})


@pytest.mark.parametrize(
    ("is_cpu", "family", "peaks", "overhead_s"),
    [(False, "ampere", (5e12, 312e12), 2e-5), (True, "cpu", (5e11, 3.6e12), 5e-6)],
)
def test_a_weak_device_is_saturated_by_little_work(
    is_cpu: bool, family: str, peaks: tuple[float, float], overhead_s: float
) -> None:
    """Sizes of another device's curve would let it wait a millisecond for every small product."""
    weak, strong = (CatalogueRates(sheet(peak, is_cpu=is_cpu).devices[0]) for peak in peaks)

    def seconds(rates: CatalogueRates, flops: float) -> float:
        return flops / rates.matmul_flops_per_s(flops, "float32")

    assert seconds(weak, 1e3) == pytest.approx(seconds(strong, 1e3))
    assert seconds(weak, 1e3) < overhead_s
    ratio = peaks[1] / peaks[0]
    assert seconds(weak, 1e14) == pytest.approx(ratio * seconds(strong, 1e14))
    assert seconds(weak, 1e9) == pytest.approx(seconds(strong, ratio * 1e9))


def test_a_datasheet_says_whose_kernels_it_is_taken_to_have() -> None:
    (said,) = described(sheet(5e12).devices)
    assert "mine" in said and "family ampere" in said
    (said,) = described(sheet(5e11, is_cpu=True).devices)
    assert "family cpu" in said
    assert described(Cluster.from_dict({"devices": [{"kind": "cpu"}]}).devices) == ()
