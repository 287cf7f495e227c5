"""Regular plans of large clusters of like devices: found whatever the time, and the best."""

from collections.abc import Iterator
from itertools import pairwise

import pytest

from graphpar.cost import (
    CostTable,
    CutEdge,
    DeviceClass,
    LinkCost,
    Topology,
    UnitCost,
)
from graphpar.cost_models.modes import with_modes
from graphpar.cost_options import StageOptions
from graphpar.partition.counting.options import widths
from graphpar.partition.family import choose_family
from graphpar.partition.pipeline import partition
from graphpar.partition.pipeline_price import price, share_microbatches
from graphpar.partition.regular import regular_plans, stage_blocks
from graphpar.partition.types import PipelineChoice, Replica, StageChoice

DEVICES, BLOCKS, BATCH, IN_NODE = 64, 12, 8, 4
AT_ONCE = 1e-3
"""Seconds in which no search gets anywhere."""


def like_table(memory_bytes: float, inside_bytes_per_s: float) -> CostTable:
    """Like devices; links inside nodes are next to no better than the network."""
    sizes = (1, 2, BATCH)

    def unit(name: str, weight: float, seconds: float) -> UnitCost:
        return UnitCost(
            name=name,
            forward_s=(tuple(seconds * s for s in sizes),),
            backward_s=(tuple(2 * seconds * s for s in sizes),),
            optimizer_s=(0.1,),
            weight_bytes=weight,
            gradient_bytes=weight,
            optimizer_bytes=2 * weight,
            saved_bytes=tuple(6.0 * s for s in sizes),
            working_bytes=tuple(2.0 * s for s in sizes),
        )

    names = tuple(f"n{i // IN_NODE}/{i % IN_NODE}" for i in range(DEVICES))
    network, inside = LinkCost(1e-3, 1e3), LinkCost(1e-3, inside_bytes_per_s)
    node_of = {n: n.split("/")[0] for n in names}
    units = (0, *(1,) * BLOCKS, 2)
    table = CostTable(
        batch=BATCH,
        training=True,
        sizes=sizes,
        units=units,
        unit_names=tuple(map(str, range(len(units)))),
        costs=(unit("head", 30.0, 0.3), unit("block", 40.0, 1.0), unit("tail", 30.0, 0.4)),
        edges=tuple(CutEdge(i, i + 1, 1.0, 1.0) for i in range(len(units) - 1)),
        device_classes=(DeviceClass("like", names, memory_bytes, 1e-3, update_share=6.0),),
        topology=Topology(node_of, dict.fromkeys(node_of.values(), inside), network),
        max_microbatches=BATCH,
        max_replicas=BATCH,
    )
    return with_modes(table, StageOptions(recompute=True, zero=(1, 2, 3), tensor_widths=(2, 4)))


@pytest.fixture(scope="module")
def every_regular() -> list[tuple[float, float]]:
    """Largest peak and step time of all regular plans under 1F1B."""
    return list(priced_one_by_one(like_table(1e9, 1.001e3)))


def priced_one_by_one(table: CostTable) -> Iterator[tuple[float, float]]:
    """What no array has a part in."""
    (kind,) = table.device_classes
    for mode in table.every_mode:
        group = len(mode.members)
        for stages in range(1, BLOCKS + 1):
            cuts = [0]
            for blocks in stage_blocks(BLOCKS, stages):
                cuts.append(max(cuts[-1], 1) + blocks)
            cuts[-1] = table.num_units
            for width in widths(min(DEVICES // group // stages, BATCH)):
                if width == 1 and mode.zero:
                    continue
                free = iter(kind.devices)
                choices = tuple(
                    StageChoice(
                        first,
                        last,
                        tuple(
                            Replica(
                                next(free), 0, tuple(next(free) for _ in range(group - 1)), mode.shares
                            )
                            for _ in range(width)
                        ),
                        mode.precision,
                        mode.recompute,
                        mode.zero,
                    )
                    for first, last in pairwise(cuts)
                )
                for count in (c for c in (1, 2, 4, 8) if c >= width):
                    whole = share_microbatches(table, PipelineChoice(BATCH, count, choices), "1f1b")
                    cost = price(table, [whole], "1f1b")
                    yield max(cost.peak_bytes.values()), cost.objective_s


@pytest.mark.parametrize("memory_bytes", [3000.0, 400.0, 150.0, 110.0])
@pytest.mark.parametrize("inside_bytes_per_s", [1e3, 1.001e3])
def test_no_answer_is_worse_than_a_regular_plan(
    memory_bytes: float, inside_bytes_per_s: float, every_regular: list[tuple[float, float]]
) -> None:
    """Both where stages are placed and where they are counted."""
    table = like_table(memory_bytes, inside_bytes_per_s)
    least_s = min(step for peak, step in every_regular if peak <= memory_bytes)
    assert (choose_family(table, "auto", "auto").repeats is None) == (inside_bytes_per_s == 1e3)
    found = partition(table, time_limit_s=AT_ONCE)
    assert found.objective_s <= least_s * 1.001
    assert found.bound_s <= found.objective_s


def test_nothing_regular_is_found_where_nothing_regular_fits(
    every_regular: list[tuple[float, float]],
) -> None:
    least_bytes = min(peak for peak, _ in every_regular)
    for factor, fits in ((1.001, True), (0.999, False)):
        family = choose_family(like_table(factor * least_bytes, 1.001e3), "auto", "auto")
        assert any(True for _ in regular_plans(family)) == fits
