"""The measured model: exact where it was measured, scaled between, kept by structure."""

from pathlib import Path

import pytest
from msgspec.structs import replace

from graphpar.calibration import Fingerprint
from graphpar.cluster import Cluster
from graphpar.cost import CostTable
from graphpar.cost_models.measured import (
    Halves,
    ModelTiming,
    Pause,
    UnitTiming,
    load_timing,
    save_timing,
    unit_hash,
    with_timing,
)
from graphpar.cost_models.roofline import Roofline
from graphpar.cost_options import PricingOptions
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


def timing(*sizes: int, optimizer_s: float = 0.0) -> ModelTiming:
    """Unit number u takes u + 1 ms per sample forward, twice that backward."""
    units = {
        unit_hash(GRAPH, CHAIN, u): UnitTiming(
            sizes,
            tuple((u + 1) * n * 1e-3 for n in sizes),
            tuple((u + 1) * n * 2e-3 for n in sizes),
        )
        for u in (0, 1)
    }
    return ModelTiming(units, (1.0, 1.25), 1e-3, optimizer_s)


CLUSTER = Cluster.from_dict({"devices": [{"kind": "cpu"}, {"kind": "cpu", "slowdown": 2.0}]})


def priced(found: ModelTiming | None = None) -> CostTable:
    table = Roofline().price(GRAPH, CHAIN, CLUSTER, PricingOptions(batch=8, training=True))
    return table if found is None else with_timing(table, GRAPH, CHAIN, CLUSTER, found)


def test_measured_sizes_are_exact_and_slowdown_applies() -> None:
    table = priced(timing(2, 8))
    for unit, factor in ((0, 1), (1, 2), (2, 2)):
        for size in (2, 8):
            assert table.forward_s(unit, 0, size) == pytest.approx(factor * size * 1e-3)
            assert table.backward_s(unit, 1, size) == pytest.approx(2 * factor * size * 2e-3)
        assert table.forward_s(unit, 0, 2) < table.forward_s(unit, 0, 4) < table.forward_s(unit, 0, 8)


def test_waiting_costs_workers_that_are_slowed_down() -> None:
    plain = priced(timing(2, 8))
    table = priced(replace(timing(2, 8), pauses=(Pause(2.0, 1e-4, 1.1),)))
    for unit in range(3):
        assert table.forward_s(unit, 0, 2) == plain.forward_s(unit, 0, 2)
        assert table.backward_s(unit, 1, 2) == pytest.approx(1.1 * plain.backward_s(unit, 1, 2))
    overheads = [
        b.stage_overhead_s - a.stage_overhead_s
        for a, b in zip(plain.device_classes, table.device_classes, strict=True)
    ]
    assert overheads == pytest.approx([0.0, 2e-4])


def test_halves_have_their_share_at_each_size_that_was_timed() -> None:
    halves = Halves((2, 8), (0.75, 0.5), (1e-3, 3e-3))
    table = priced(replace(timing(2, 8), halves=halves))
    for size, share, more_s in ((1, 0.75, 1e-3), (2, 0.75, 1e-3), (5, None, 2e-3), (8, 0.5, 3e-3)):
        for device, slowdown in enumerate((1, 2)):
            units = range(table.num_units)
            weights_s = sum(table.weight_s(u, device, size) for u in units)
            backward_s = sum(table.backward_s(u, device, size) for u in units)
            assert sum(table.split_s(u, device, size) for u in units) == pytest.approx(slowdown * more_s)
            assert share is None or weights_s == pytest.approx(share * backward_s)
            assert 0.5 <= weights_s / backward_s <= 0.75


def test_everything_but_time_is_the_roofline_s() -> None:
    plain, table = priced(), priced(ModelTiming({}, (), 1e-3))
    assert table == plain


def test_the_optimizer_is_divided_among_units_as_predicted() -> None:
    plain, table = priced(), priced(timing(2, optimizer_s=0.3))
    total_s = [sum(table.costs[kind].optimizer_s[k] for kind in table.units) for k in (0, 1)]
    assert total_s == pytest.approx([0.3, 0.6])
    ratios = {b.optimizer_s[0] / a.optimizer_s[0] for a, b in zip(plain.costs, table.costs, strict=True)}
    assert max(ratios) == pytest.approx(min(ratios))


def test_timings_are_kept_by_machine_and_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    mine, other = Fingerprint("a", 2, "2.13", 1), Fingerprint("b", 2, "2.13", 1)
    path = save_timing(mine, "m", timing(1))
    assert load_timing(mine, "m", ModelTiming) == timing(1)
    assert load_timing(other, "m", ModelTiming) is None and load_timing(mine, "n", ModelTiming) is None
    path.write_text("{")
    assert load_timing(mine, "m", ModelTiming) is None
