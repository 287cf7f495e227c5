"""A pipeline over three devices, solved once so that every loop of the search is compiled."""

import numpy as np

from graphpar.cost import CostTable, CutEdge, DeviceClass, LinkCost, Topology, UnitCost
from graphpar.partition import memory_fit
from graphpar.partition.cells import count_vectors, find_cells, plain_option
from graphpar.partition.chains.columns import StagePrices
from graphpar.partition.chains.swept import SweptProgram
from graphpar.partition.option_rows import OptionRows
from graphpar.partition.unit_arrays import Cache, Setting, run_ranges


def run_example() -> None:
    """Find the best pipeline of a small table, with all bounds."""
    table = _table()
    cells = find_cells(table)
    options = [plain_option(cells, take) for take in count_vectors(cells.counts, 2)]
    setting, runs = Setting(6, 4, "1f1b"), run_ranges(table.num_units)
    cache: Cache = {}
    rows = OptionRows(table, cells, options, setting, runs, cache)
    prices = StagePrices(table, rows, setting, runs, cache, loops=True)
    program = SweptProgram(prices, cells.counts, table.num_units, np.ones(len(cells.counts)))
    memory_fit.rehearse()
    program.rehearse()


def _table() -> CostTable:
    speeds, number = (1.0, 2.0, 3.0), 3
    link = LinkCost(0.1, 10.0)
    costs = tuple(
        UnitCost(
            name=f"unit {i}",
            forward_s=tuple((s, 4.0 * s) for s in speeds),
            backward_s=tuple((s, 4.0 * s) for s in speeds),
            optimizer_s=speeds,
            weight_bytes=1.0,
            gradient_bytes=1.0,
            optimizer_bytes=1.0,
            saved_bytes=(1.0, 4.0),
            working_bytes=(1.0, 4.0),
        )
        for i in range(number)
    )
    return CostTable(
        batch=6,
        training=True,
        sizes=(1, 4),
        units=tuple(range(number)),
        unit_names=tuple(c.name for c in costs),
        costs=costs,
        edges=tuple(CutEdge(i, i + 1, 1.0, 1.0) for i in range(number - 1)),
        device_classes=tuple(DeviceClass(f"kind {i}", (f"d{i}",), 30.0) for i in range(len(speeds))),
        topology=Topology({f"d{i}": f"d{i}" for i in range(3)}, {f"d{i}": link for i in range(3)}, link),
        max_microbatches=6,
        max_replicas=6,
    )
