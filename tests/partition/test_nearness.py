"""Which nodes are close: zones, stages in them, and devices that change places."""

import itertools
import random
import time
from collections.abc import Sequence
from dataclasses import replace

import pytest
from cost_tables import make_table

from graphpar.cost import CostTable, LinkCost, Topology
from graphpar.partition.assign import name_devices
from graphpar.partition.cells import class_cells, make_option
from graphpar.partition.chains.limits import ChainAnswer, Stage
from graphpar.partition.counting.options import counting_options
from graphpar.partition.nearer import brought_nearer
from graphpar.partition.pipeline_price import price, share_microbatches
from graphpar.partition.search import Found
from graphpar.partition.types import PipelineChoice, ScheduleName
from graphpar.partition.unit_arrays import Setting
from graphpar.partition.zones import Zone, find_zones

NEAR, FAR, FARTHEST = LinkCost(0.0, 100.0), LinkCost(0.0, 20.0), LinkCost(0.0, 4.0)


def in_tree(table: CostTable, per_node: int, per_rack: int, order: int = 0) -> CostTable:
    """Racks of nodes, two racks to a room; the names of nodes say nothing of where they stand."""
    node_of = {d: f"n{i // per_node}" for i, d in enumerate(table.class_of)}
    nodes = sorted(set(node_of.values()))
    random.Random(order).shuffle(nodes)
    between = {}
    for (i, a), (j, b) in itertools.combinations(enumerate(nodes), 2):
        near = i // per_rack == j // per_rack
        if near or i // (2 * per_rack) == j // (2 * per_rack):
            between[a, b] = NEAR if near else FAR
    inside = dict.fromkeys(nodes, LinkCost(0.0, 1e4))
    return replace(table, topology=Topology(node_of, inside, FARTHEST, between))


def named(table: CostTable, widths: Sequence[int], schedule: ScheduleName) -> tuple[PipelineChoice, ...]:
    """Stages of so many replicas over a unit each, counted and then named."""
    cells = class_cells(table)
    options = [make_option(cells, [(0,)] * w, [0] * w) for w in widths]
    ends = [*range(1, len(widths)), table.num_units]
    stages = tuple(
        Stage(a, b, option) for a, b, option in zip([0, *ends[:-1]], ends, options, strict=True)
    )
    setting = Setting(table.batch, table.batch, schedule)
    return name_devices(table, cells, [Found(setting, ChainAnswer(0.0, 0.0, 0.0, 0.0, stages))])


def test_zones_are_what_hangs_below_a_switch() -> None:
    table = in_tree(make_table([1.0] * 2, (1.0,), (8,)), 1, 2)
    whole = find_zones(table.topology, sorted(table.topology.inside))

    def shape(zone: Zone) -> list[object]:
        return [shape(part) for part in zone.parts] if zone.parts else [len(zone.nodes)]

    rack = [[1], [1]]
    assert shape(whole) == [[rack, rack], [rack, rack]]


@pytest.mark.parametrize("order", range(4))
def test_wide_stages_stay_in_their_rack(order: int) -> None:
    """A stage of two nodes fits into a rack of two, though a node of another rack is as free."""
    table = in_tree(make_table([1.0] * 4, (1.0,), (16,), batch=8, gradient_bytes=10.0), 2, 2, order)
    (pipeline,) = named(table, (4, 4, 4, 4), "1f1b")
    for stage in pipeline.stages:
        nodes = {table.topology.node_of[r.device] for r in stage.replicas}
        assert table.topology.between_nodes(nodes, nodes) == {NEAR}


def best_names_s(
    table: CostTable, pipelines: tuple[PipelineChoice, ...], schedule: ScheduleName
) -> float:
    """The shortest step of any naming."""
    names = list(table.class_of)
    (pipeline,) = pipelines
    steps = []
    for order in itertools.permutations(names):
        to = dict(zip(names, order, strict=True))
        stages = tuple(
            replace(s, replicas=tuple(replace(r, device=to[r.device]) for r in s.replicas))
            for s in pipeline.stages
        )
        tried = share_microbatches(table, replace(pipeline, stages=stages), schedule)
        steps.append(price(table, (tried,), schedule).objective_s)
    return min(steps)


@pytest.mark.parametrize("seed", range(6))
def test_devices_change_places_until_names_are_nearly_the_best(seed: int) -> None:
    """Five devices, links of all pairs drawn: all 120 namings are priced besides."""
    draw = random.Random(seed)
    table = make_table([1.0] * 4, (1.0,), (5,), cut_bytes=draw.choice([1.0, 10.0]), gradient_bytes=10.0)
    nodes = list(table.class_of)
    between = {
        pair: LinkCost(0.0, 10 ** draw.uniform(0.5, 2.5)) for pair in itertools.combinations(nodes, 2)
    }
    links = Topology({d: d for d in nodes}, dict.fromkeys(nodes, NEAR), FARTHEST, between)
    table = replace(table, topology=links)
    schedule: ScheduleName = draw.choice(["1f1b", "gpipe"])
    first = named(table, draw.choice([(2, 1, 1), (1, 1, 1, 1), (2, 2), (1, 3, 1)]), schedule)
    near = brought_nearer(table, first, schedule, time.monotonic() + 60)
    before_s, after_s = (price(table, p, schedule).objective_s for p in (first, near))
    assert after_s <= before_s
    assert after_s <= 1.05 * best_names_s(table, first, schedule)


def test_wide_sums_cross_racks_in_the_bound() -> None:
    """Eight replicas in racks of four sum over a link between racks, of which the bound knows."""
    table = in_tree(make_table([1.0] * 2, (1.0,), (8,), batch=8, gradient_bytes=10.0), 1, 4)
    cells = class_cells(table)
    links = {o.width: o.ring for o in counting_options(table, cells, 8)}
    assert links[4] == {NEAR}
    assert links[6] == links[8] == {FAR}
