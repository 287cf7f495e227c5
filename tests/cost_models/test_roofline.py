"""Pricing: FLOPs, bytes, saved activations and table shape on small graphs whose answers are known."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from plan_samples import calibration

from graphpar.calibration import FORMAT_VERSION, Calibration, Curve, fingerprint
from graphpar.cluster import Cluster
from graphpar.cost import CostTable, LinkCost
from graphpar.cost_models.classes import microbatch_sizes
from graphpar.cost_models.layout import find_layout
from graphpar.cost_models.memory import CPU_RESERVED_BYTES, HALF_CODE_BYTES, ONEDNN_BYTES
from graphpar.cost_models.opcost import fan_out_kernels, work_of
from graphpar.cost_models.roofline import Roofline
from graphpar.cost_models.unit_costs import UnitPricer
from graphpar.cost_models.work import Kernel, OpWork
from graphpar.cost_options import PricingOptions
from graphpar.errors import GraphparError
from graphpar.ir.chain import build_chain
from graphpar.ir.graph import Graph
from graphpar.ir.ops import Op
from graphpar.ir.text import parse_graph
from graphpar.partition.one_unit import as_one_unit
from graphpar.partition.types import PipelineChoice, Replica, StageChoice
from graphpar.precision.formats import rewrite
from graphpar.schedule.simulated import stage_links

NUM_BLOCKS = 9


def block(name: str, x: str) -> str:
    """A wide layer between two narrow ones."""
    return f'''
%w{name} = parameter("{name}.up") : float32[32,8] {{grad=true}}
%v{name} = parameter("{name}.down") : float32[8,32] {{grad=true}}
%a{name} = aten.linear.default(%{x}, %w{name}) : float32[B,32] {{grad=true}} @ "{name}" ""
%b{name} = aten.relu.default(%a{name}) : float32[B,32] {{grad=true}} @ "{name}" ""
%c{name} = aten.linear.default(%b{name}, %v{name}) : float32[B,8] {{grad=true}} @ "{name}" ""'''


BLOCKS = f"""graph captured "Net" batch=4
%x = input("x") : float32[B,8]
{"".join(block(str(i), f"c{i - 1}" if i else "x") for i in range(NUM_BLOCKS))}
%output = output((%c{NUM_BLOCKS - 1},))
"""


def one(line: str, *sources: str) -> tuple[Graph, OpWork]:
    """A graph of some sources and one op, and that op's work for three samples."""
    graph = parse_graph(
        'graph captured "N" batch=2\n' + "\n".join([*sources, line]) + "\n%output = output((%y,))\n"
    )
    return graph, work_of(graph["y"], graph, find_layout(graph), 3)


def price(training: bool = True, text: str = BLOCKS, **options: float) -> CostTable:
    graph = parse_graph(text)
    settings = PricingOptions(batch=4, training=training, **options)  # type: ignore[arg-type]
    cluster = Cluster.of("p4d.24xlarge", 1, "p3.2xlarge", 1)
    return Roofline().price(graph, build_chain(graph), cluster, settings)


def test_equal_units_share_a_price_and_sources_belong_to_the_first_user() -> None:
    table = price()
    assert table.num_units == NUM_BLOCKS
    assert table.units == (0, *[1] * (NUM_BLOCKS - 1))  # the first sends no gradient to its input
    assert table.costs[0].weight_bytes == 2 * 4 * 8 * 32
    assert table.costs[0].gradient_bytes == table.costs[0].weight_bytes
    assert table.costs[0].optimizer_bytes == 2 * table.costs[0].weight_bytes
    assert [c.name for c in table.device_classes] == ["a100-sxm-40gb", "v100-sxm2-16gb"]
    assert len(table.class_of) == 9
    assert all(len(c.forward_s) == 2 for c in table.costs)
    assert all(len(row) == len(table.sizes) for c in table.costs for row in c.backward_s)


def test_edges_hold_bytes_per_sample_and_gradients_where_they_flow() -> None:
    table = price()
    assert [(e.source, e.target) for e in table.edges] == list(pairwise(range(NUM_BLOCKS)))
    assert {e.bytes_per_sample for e in table.edges} == {32.0}
    assert {e.gradient_bytes_per_sample for e in table.edges} == {32.0}
    assert {e.fixed_bytes for e in table.edges} == {0.0}


def test_gradients_of_values_without_samples_go_back_as_well() -> None:
    """A model whose batch stays whole sends such values between all of its stages."""
    table = price(text=BLOCKS.replace("[B,", "[4,"))
    assert {(e.bytes_per_sample, e.gradient_bytes_per_sample) for e in table.edges} == {(0.0, 0.0)}
    assert {(e.fixed_bytes, e.gradient_fixed_bytes) for e in table.edges} == {(128.0, 128.0)}
    assert table.cut_bytes(1, 4) == (128.0, 128.0)
    devices = [device for c in table.device_classes for device in c.devices][:2]
    stages = (
        StageChoice(0, 1, (Replica(devices[0], 1),)),
        StageChoice(1, NUM_BLOCKS, (Replica(devices[1], 1),)),
    )
    (link,) = stage_links(table, (PipelineChoice(4, 1, stages),))
    assert link.backward_bytes(4) == 128.0


def test_inference_has_no_backward_gradients_or_saved_values() -> None:
    table = price(training=False)
    for cost in table.costs:
        assert not any(map(any, cost.backward_s))
        assert not any(cost.saved_bytes)
        assert (cost.gradient_bytes, cost.optimizer_bytes, *cost.optimizer_s) == (0, 0, 0, 0)
        assert all(cost.working_bytes)
    assert all(e.gradient_bytes_per_sample == 0 for e in table.edges)


def test_results_of_inference_stay_beside_what_a_loss_makes_of_them() -> None:
    text = """graph captured "N" batch=4
%w = parameter("w") : float32[1000,8]
%x = input("x") : float32[B,8]
%t = input("t") : int64[B]
%z = aten.linear.default(%x, %w) : float32[B,1000]
%loss = aten.cross_entropy_loss.default(%z, %t, none, 0) : float32[B]
%output = output((%loss, %z))
"""
    table = price(training=False, text=text)
    assert sum(table.result_bytes) == 4 + 4 * 1000
    assert as_one_unit(table).result_bytes == (4 + 4 * 1000,)
    assert max(c.working_bytes[-1] for c in table.costs) >= 2 * 4 * 4 * 1000


def test_a_device_alone_holds_no_buffers_for_messages() -> None:
    graph = parse_graph(BLOCKS)
    reserved = [
        Roofline()
        .price(graph, build_chain(graph), cluster, PricingOptions(batch=4, training=True))
        .reserved_bytes
        for cluster in (Cluster.of("p3.2xlarge", 1), Cluster.of("p3.2xlarge", 2))
    ]
    # Beyond what torch's allocator held, nvidia-smi showed 0.8 GB of a process alone on its device.
    assert reserved[0] == pytest.approx(0.8e9)
    assert reserved[1] > reserved[0]


def test_saved_bytes_are_counted_by_storage() -> None:
    table = price()
    # relu keeps its result, which is also the second product's operand; the input of a unit is kept
    # by its first product, but in the first unit it is a graph input.
    slack = 1.03
    assert table.costs[0].saved_bytes[0] == pytest.approx(32 * 4 * slack)
    assert table.costs[1].saved_bytes[0] == pytest.approx((32 + 8) * 4 * slack)


def test_slowdown_scales_times_and_makes_a_class() -> None:
    graph = parse_graph(BLOCKS)
    cluster = Cluster.from_dict({"devices": [{"kind": "cpu"}, {"kind": "cpu", "slowdown": 3.0}]})
    options = PricingOptions(batch=4, training=True)
    table = Roofline().price(graph, build_chain(graph), cluster, options)
    for cost in table.costs:
        for quick, slow in zip(cost.forward_s[0], cost.forward_s[1], strict=True):
            assert slow == pytest.approx(3 * quick)
    assert [c.name for c in table.device_classes] == ["cpu", "cpu x3 slower"]


@pytest.mark.parametrize("kind", ["h100-sxm-80gb", "v100-sxm2-32gb", "t4", "epyc-9654", "cpu"])
def test_every_kind_of_device_prices_and_larger_batches_cost_no_less(kind: str) -> None:
    graph = parse_graph(BLOCKS)
    cluster = Cluster.from_dict({"nodes": [{"name": "n", "devices": {"kind": kind}}]})
    options = PricingOptions(batch=64, training=True, precision="bfloat16")
    table = Roofline().price(graph, build_chain(graph), cluster, options)
    for cost in table.costs:
        for row in (*cost.forward_s, *cost.backward_s, cost.saved_bytes, cost.working_bytes):
            assert all(value > 0 for value in row)
            assert list(row) == sorted(row)


@given(st.integers(1, 3000))
def test_sizes_cover_one_to_the_batch(batch: int) -> None:
    sizes = microbatch_sizes(PricingOptions(batch=batch, training=True))
    assert sizes[0] == 1
    assert sizes[-1] == batch
    assert len(sizes) <= 25
    assert list(sizes) == sorted(set(sizes))


W = '%w = parameter("w") : float32[8,16] {grad=true}'
X = '%x = input("x") : float32[B,4,16]'
XG = '%x = parameter("x") : float32[B,4,16] {grad=true}'


def test_a_product_makes_gradients_only_where_they_are_needed() -> None:
    line = "%y = aten.linear.default(%x, %w) : float32[B,4,8] {grad=true}"
    flops = 2 * 3 * 4 * 8 * 16
    _, work = one(line, X, W)
    assert [k.flops for k in work.forward] == [flops]
    assert [k.flops for k in work.backward] == [flops]
    assert work.saved == ("x",)
    _, both = one(line, XG, W)
    assert [k.flops for k in both.backward] == [flops, flops]
    assert set(both.saved) == {"x", "w"}


def test_attention_backward_is_two_and_a_half_times_forward() -> None:
    sources = [f'%{n} = parameter("{n}") : float32[B,2,16,8] {{grad=true}}' for n in "qkv"]
    _, work = one(
        "%y = aten.scaled_dot_product_attention.default(%q, %k, %v) : float32[B,2,16,8] {grad=true}",
        *sources,
    )
    (forward,), (backward,) = work.forward, work.backward
    assert forward.flops == 4 * 3 * 2 * 16 * 16 * 8
    assert backward.flops == 2.5 * forward.flops
    assert set(work.saved) == {"q", "k", "v", "y"}


def test_views_share_storage_and_copies_are_seen() -> None:
    graph = parse_graph("""graph captured "N" batch=2
%x = input("x") : float32[B,4,16]
%t = aten.transpose.int(%x, 1, 2) : float32[B,16,4]
%r = aten.reshape.default(%t, (B, 64)) : float32[B,64]
%v = aten.view.default(%x, (B, 64)) : float32[B,64]
%back = aten.transpose.int(%t, 1, 2) : float32[B,4,16]
%s = aten.reshape.default(%back, (B, 64)) : float32[B,64]
%output = output((%r, %v, %s))
""")
    layout = find_layout(graph)
    assert layout.copies == {"r"}
    assert {name for name, root in layout.root.items() if root == "x"} == {"x", "t", "v", "back", "s"}


def test_unknown_operators_are_priced_and_named() -> None:
    graph = parse_graph("""graph captured "N" batch=2
%x = input("x") : float32[B,4]
%y = aten.fft_fft.default(%x) : complex64[B,4]
%output = output((%y,))
""")
    assert Roofline().unpriced(graph) == ("aten.fft_fft.default",)
    work = work_of(graph["y"], graph, find_layout(graph), 2)
    assert work.forward[0].bytes == 2 * 4 * (4 + 8)


def test_a_calibration_prices_this_machine_and_its_loopback() -> None:
    graph = parse_graph(BLOCKS)
    cluster = Cluster.from_dict({"devices": [{"kind": "cpu", "count": 2}]})
    options = PricingOptions(batch=4, training=True)
    measured = calibration()
    table = Roofline(measured).price(graph, build_chain(graph), cluster, options)
    assert table.topology.link("local/0", "local/1") == LinkCost(5e-5, 1e9)
    assert table.sum_s_per_byte == 2e-9
    first = table.costs[0]
    up = 2 * 4 * 32 * 8 / measured.matmul["float32"].at(4, (32 * 8) ** 0.5)
    down = 2 * 4 * 32 * 8 / measured.matmul["float32"].at(4, (32 * 8) ** 0.5)
    relu = measured.curves["relu"].at(4 * 32)
    floors = 2 * measured.curves["view"].seconds[0] + 3 * measured.op_s
    assert first.forward_s[0][-1] == pytest.approx(up + down + relu + floors)


def test_memory_of_workers_and_lateness_of_messages_are_the_measured_ones() -> None:
    measured = replace(calibration(), worker_bytes=3e8, late_s=2e-4)
    alone, pair = {"kind": "cpu"}, {"kind": "cpu", "count": 2}
    link = {"bytes_per_s": 1e8, "latency_s": 1e-3}
    emulated, real, single = (
        Cluster.from_dict(written)
        for written in ({"devices": [pair], "link": link}, {"devices": [pair]}, {"devices": [alone]})
    )
    model = Roofline(measured)
    blocks = parse_graph(BLOCKS)
    assert [model.reserved_bytes(c, blocks) for c in (emulated, real, single)] == [3e8] * 3
    late = [shared.late_s for c in (emulated, real, single) if (shared := model.shared_cores(c))]
    assert late == [2e-4, 0.0, 0.0]
    assert Roofline(calibration()).reserved_bytes(single, blocks) == CPU_RESERVED_BYTES


def test_convolutions_and_recurrent_layers_load_more_code_on_processors() -> None:
    sources = '%x = input("x") : float32[B,3,8,8]', '%w = parameter("w") : float32[4,3,3,3]'
    graph, _ = one("%y = aten.conv2d.default(%x, %w) : float32[B,4,6,6]", *sources)
    cluster, model = Cluster.from_dict({"devices": [{"kind": "cpu"}]}), Roofline()
    assert model.reserved_bytes(cluster, graph) == CPU_RESERVED_BYTES + ONEDNN_BYTES
    cards, blocks = Cluster.of("p4d.24xlarge", 1), parse_graph(BLOCKS)
    assert model.reserved_bytes(cards, graph) == model.reserved_bytes(cards, blocks)


def test_each_kind_of_device_has_its_own_rules_of_memory() -> None:
    graph, options = parse_graph(BLOCKS), PricingOptions(batch=4, training=True)

    def held(*kinds: str) -> list[tuple[object, ...]]:
        cluster = Cluster.from_dict({"devices": [{"kind": kind} for kind in kinds]})
        table = Roofline().price(graph, build_chain(graph), cluster, options)
        modes = table.every_mode[: len(kinds)]
        return [tuple((c.saved_bytes, c.working_bytes) for c in mode.costs) for mode in modes]

    processor, card = held("cpu"), held("h100-sxm-80gb")
    assert processor != card
    assert held("cpu", "h100-sxm-80gb") == processor + card


def test_what_a_graph_of_another_batch_takes_is_that_of_the_batch_asked_for() -> None:
    cluster, known = Cluster.from_dict({"devices": [{"kind": "cpu"}]}), dict[int, UnitPricer]()
    graph = parse_graph(BLOCKS)
    for batch in (4, 8, 2):
        own = parse_graph(BLOCKS.replace("batch=4", f"batch={batch}"))
        asked = PricingOptions(batch=batch, training=True)
        shared = Roofline().price(graph, build_chain(graph), cluster, asked, known=known)
        alone = Roofline().price(own, build_chain(own), cluster, asked)
        assert shared.costs == alone.costs


def test_what_a_unit_takes_at_a_size_is_worked_out_once_for_all_batches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    graph, asked = parse_graph(BLOCKS), set[tuple[str, int]]()

    def noted(op: Op, graph: Graph, batch: int, precision: str) -> tuple[Kernel, ...]:
        assert (op.name, batch) not in asked
        asked.add((op.name, batch))
        return fan_out_kernels(op, graph, batch, precision)

    monkeypatch.setattr("graphpar.cost_models.unit_costs.fan_out_kernels", noted)
    cluster, known = Cluster.from_dict({"devices": [{"kind": "t4"}]}), dict[int, UnitPricer]()
    for batch in (4, 8, 6):
        options = PricingOptions(batch=batch, training=True)
        Roofline().price(graph, build_chain(graph), cluster, options, known=known)
    assert {size for _, size in asked} >= {1, 2, 4, 6, 8}


def test_products_in_16_bits_load_more_code_where_a_processor_has_them() -> None:
    wide = parse_graph(BLOCKS)
    lower, _ = rewrite(wide, build_chain(wide), ("float16",) * NUM_BLOCKS)
    cluster, model = Cluster.from_dict({"devices": [{"kind": "cpu", "count": 2}]}), Roofline()
    runs = {"local/1": (lower, build_chain(lower))}
    for training, passes in ((True, 2), (False, 1)):
        more = model.reserved_bytes(cluster, wide, training, runs) - model.reserved_bytes(cluster, wide)
        assert more == passes * HALF_CODE_BYTES
    cards = Cluster.of("p3.2xlarge", 1)
    runs = {cards.devices[0].name: (lower, build_chain(lower))}
    assert model.reserved_bytes(cards, wide, True, runs) == model.reserved_bytes(cards, wide)


@pytest.mark.parametrize("what", ["clipping", "scaling"])
def test_clipping_and_scaling_of_gradients_are_part_of_the_update(what: str) -> None:
    graph = parse_graph(BLOCKS)
    cluster = Cluster.from_dict({"devices": [{"kind": "cpu"}, {"kind": "v100-sxm2-16gb"}]})

    def priced(clips: bool = False, lower: str = "bfloat16") -> CostTable:
        run = rewrite(graph, build_chain(graph), (lower,) * NUM_BLOCKS)
        options = PricingOptions(batch=4, training=True, clips_gradients=clips)
        runs = {device.name: run for device in cluster.devices}
        return Roofline(calibration()).price(graph, build_chain(graph), cluster, options, runs)

    plain, more = priced(), priced(clips=True) if what == "clipping" else priced(lower="float16")
    assert plain.sum_s_per_byte == 0.0  # one of the devices sums elsewhere
    curve = calibration().curves["clip"]
    for before, after in zip(plain.costs, more.costs, strict=True):
        on_processor, on_gpu = (b - a for a, b in zip(before.optimizer_s, after.optimizer_s, strict=True))
        assert on_processor == pytest.approx(2 * curve.at(8 * 32))
        assert on_gpu > 0


def test_calibration_file_round_trips_and_refuses_damage(tmp_path: Path) -> None:
    path = calibration().save(tmp_path / "sub" / "c.json")
    assert Calibration.load(path) == calibration()
    now = f'"format_version": {FORMAT_VERSION}'
    path.write_text(path.read_text().replace(now, '"format_version": 0'))
    with pytest.raises(GraphparError, match="older version of graphpar"):
        Calibration.load(path)
    path.write_text("{")
    with pytest.raises(GraphparError, match="calibrate"):
        Calibration.load(path)


def test_cached_calibration_is_found_by_fingerprint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert Calibration.look() == (None, "")
    calibration().save()
    assert Calibration.look() == (None, "")  # measured on another machine, which is no news
    assert len(list(tmp_path.rglob("calibration-*.json"))) == 1


def test_a_calibration_that_does_not_count_is_told_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    mine = replace(calibration(), fingerprint=fingerprint())
    path = mine.save()
    assert Calibration.cached() == mine
    replace(mine, fingerprint=msgspec.structs.replace(fingerprint(), torch="1.0")).save()
    assert Calibration.look() == (mine, "")
    # Files of older formats lack what newer ones have.
    path.write_text('{"format_version": 1, "matmul": 3}')
    assert Calibration.cached() is None and Calibration.cached() is None
    (told,) = caplog.messages
    assert str(path) in told and "older version" in told and "graphpar calibrate" in told
    path.unlink()
    found, why_not = Calibration.look()
    assert found is None and "torch 1.0, not" in why_not and "graphpar calibrate" in why_not


def test_sums_over_an_emulated_link_cost_what_they_take_longer_than_it() -> None:
    graph = parse_graph(BLOCKS)

    def extra_s(link: dict[str, float]) -> float:
        cluster = Cluster.from_dict({"devices": [{"kind": "cpu", "count": 2}], "link": link})
        options = PricingOptions(batch=4, training=True)
        return Roofline(calibration()).price(graph, build_chain(graph), cluster, options).sum_s_per_byte

    gathering_s = 2 / 1e10  # each byte is read and written once
    assert extra_s({"bytes_per_s": 1e8, "latency_s": 0.0}) == pytest.approx(gathering_s)
    assert extra_s({"bytes_per_s": 5e8, "latency_s": 0.0}) == pytest.approx(2e-9 + 1e-9 - 2e-9)


@given(st.floats(1e-3, 1e12))
def test_curves_never_fall(size: float) -> None:
    curve = Curve((10.0, 1e3, 1e6), (1e-6, 2e-6, 1e-3))
    assert curve.at(size) <= curve.at(size * 1.5) * (1 + 1e-9)
