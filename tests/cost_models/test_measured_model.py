"""The measured model: exact where it was measured, scaled between, kept by structure."""

from pathlib import Path

import pytest

from graphpar.calibration import Fingerprint
from graphpar.cluster import Cluster
from graphpar.cost import CostTable, PricingOptions
from graphpar.cost_models.measured import Measured, load_timings, measure_units, save_timings
from graphpar.cost_models.roofline import Roofline
from graphpar.ir.chain import build_chain
from graphpar.ir.text import parse_graph

GRAPH = parse_graph("""graph captured "Net" batch=4
%x = input("x") : float32[B,8]
%w = parameter("0.w") : float32[8,8] {grad=true}
%v = parameter("1.w") : float32[8,8] {grad=true}
%u = parameter("2.w") : float32[8,8] {grad=true}
%a = aten.linear.default(%x, %w) : float32[B,8] {grad=true} @ "0" ""
%b = aten.linear.default(%a, %v) : float32[B,8] {grad=true} @ "1" ""
%c = aten.linear.default(%b, %u) : float32[B,8] {grad=true} @ "2" ""
%output = output((%c,))
""")
CHAIN = build_chain(GRAPH)


def run(index: int, size: int) -> tuple[float, float]:
    return (index + 1) * size * 1e-3, (index + 1) * size * 2e-3


def price(model: Roofline | Measured) -> CostTable:
    cluster = Cluster.from_dict({"devices": [{"kind": "cpu"}, {"kind": "cpu", "slowdown": 2.0}]})
    return model.price(GRAPH, CHAIN, cluster, PricingOptions(batch=8, training=True))


def test_measured_sizes_are_exact_and_slowdown_applies() -> None:
    table = price(Measured(Roofline(), measure_units(GRAPH, CHAIN, run, (2, 8))))
    for unit, factor in ((0, 1), (1, 2), (2, 2)):
        for size in (2, 8):
            assert table.forward_s(unit, 0, size) == pytest.approx(factor * size * 1e-3)
            assert table.backward_s(unit, 1, size) == pytest.approx(2 * factor * size * 2e-3)
        assert table.forward_s(unit, 0, 2) < table.forward_s(unit, 0, 4) < table.forward_s(unit, 0, 8)


def test_everything_but_time_is_the_roofline_s() -> None:
    plain, table = price(Roofline()), price(Measured(Roofline(), {}))
    assert table == plain


def test_equal_units_are_measured_once_and_known_sizes_not_again() -> None:
    calls: list[tuple[int, int]] = []

    def counted(index: int, size: int) -> tuple[float, float]:
        calls.append((index, size))
        return run(index, size)

    timings = measure_units(GRAPH, CHAIN, counted, (1, 4))
    assert sorted(calls) == [(0, 1), (0, 4), (1, 1), (1, 4)]
    again = measure_units(GRAPH, CHAIN, counted, (4, 8), timings)
    assert sorted(calls[4:]) == [(0, 8), (1, 8)]
    assert all(timing.sizes == (1, 4, 8) for timing in again.values())


def test_timings_are_kept_by_fingerprint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    mine, other = Fingerprint("a", 2, "2.13", 1), Fingerprint("b", 2, "2.13", 1)
    timings = measure_units(GRAPH, CHAIN, run, (1,))
    path = save_timings(mine, timings)
    assert load_timings(mine) == timings
    assert load_timings(other) == {}
    path.write_text("{")
    assert load_timings(mine) == {}
