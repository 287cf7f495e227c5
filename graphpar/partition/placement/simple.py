"""Placements that take no search: there is an answer before anything long begins."""

from collections.abc import Iterator

import networkx as nx
import numpy as np

from graphpar.partition.placement.graph import Blocks
from graphpar.partition.problems import NodeId, PlacementProblem


def simple_placements(problem: PlacementProblem, blocks: Blocks) -> Iterator[dict[NodeId, int]]:
    """Everything on the CPUs; pieces of one order on few accelerators, and on all of them.

    The rules are not checked.
    """
    yield {op.node_id: 0 for op in problem.operators}
    if not problem.num_accelerators:
        return
    graph: nx.DiGraph[int] = nx.DiGraph()
    graph.add_nodes_from(range(blocks.num_blocks))
    graph.add_edges_from(blocks.edges)
    order = list(nx.topological_sort(graph))
    work = np.where(np.isfinite(blocks.accelerator), blocks.accelerator, 0.0)
    for share in (float("inf"), float(work.sum()) / problem.num_accelerators):
        devices, device, held, done = [0] * blocks.num_blocks, 1, 0.0, 0.0
        for b in order:
            if not np.isfinite(blocks.accelerator[b]):
                continue
            full = held + blocks.size[b] > problem.memory_limit or done >= share
            if full and device < problem.num_accelerators:
                device, held, done = device + 1, 0.0, 0.0
            devices[b] = device
            held += float(blocks.size[b])
            done += float(work[b])
        yield {
            problem.operators[v].node_id: devices[b]
            for b, members in enumerate(blocks.operators)
            for v in members
        }
