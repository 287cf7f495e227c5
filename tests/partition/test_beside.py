"""A whole model in every node: what is met is a plan that fits, with shares as each node is fast."""

from dataclasses import replace

from amounts import examples
from cost_tables import make_table, small_tables
from hypothesis import given, settings
from hypothesis import strategies as st

from graphpar.cost import CostTable, Topology
from graphpar.partition.beside import nodes_beside
from graphpar.partition.check import check_partition
from graphpar.partition.handmade import excess_bytes


@settings(max_examples=examples(60), deadline=None)
@given(small_tables(max_units=3, max_devices=4, max_batch=6, modes=True), st.integers(1, 6))
def test_what_is_met_is_a_plan_of_one_stage_in_each_node(table: CostTable, most: int) -> None:
    table = replace(table, max_replicas=min(most, table.max_replicas))
    found = nodes_beside(table, "1f1b" if table.training else "gpipe")
    if found is None:
        return
    check_partition(table, found)
    assert excess_bytes(table, found) <= 0
    assert sum(p.samples for p in found.pipelines) == table.batch
    for (stage,) in (p.stages for p in found.pipelines):
        devices = [name for replica in stage.replicas for name in replica.devices]
        assert len({table.topology.node_of[name] for name in devices}) == 1
        assert (stage.first, stage.last) == (0, table.num_units)


def test_a_node_twice_as_fast_gets_twice_the_samples() -> None:
    table = make_table([1.0] * 6, (1.0, 2.0), (1, 1), batch=12)
    link, names = table.topology.network, list(table.class_of)
    topology = Topology(dict(zip(names, "ab", strict=True)), {"a": link, "b": link}, link)
    found = nodes_beside(replace(table, topology=topology), "1f1b")
    assert found is not None
    assert sorted(pipeline.samples for pipeline in found.pipelines) == [4, 8]


def test_no_more_copies_than_the_table_allows() -> None:
    """Two devices in each of two nodes; of each unit two or three copies may be."""
    table = make_table([1.0] * 3, (1.0, 2.0), (2, 2), batch=12)
    link = table.topology.network
    topology = Topology({name: name[0] for name in table.class_of}, {"0": link, "1": link}, link)
    for most in (2, 3):
        found = nodes_beside(replace(table, topology=topology, max_replicas=most), "1f1b")
        assert found is not None
        assert [len(p.stages[0].replicas) for p in found.pipelines] == [1, 1]
