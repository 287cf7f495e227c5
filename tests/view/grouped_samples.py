"""A plan with a tensor group: two devices that share every microbatch of a stage, three to two."""

from functools import cache

import torch

from graphpar.cluster import Cluster
from graphpar.compiler import plan_of, prepare, price
from graphpar.examples.gpt import GPT, example_inputs
from graphpar.partition.handmade import evaluate
from graphpar.partition.types import PipelineChoice, Replica, StageChoice
from graphpar.plans import Plan
from graphpar.tensor_groups import with_group_modes
from graphpar.training import Training


@cache
def grouped_plan() -> Plan:
    """A small GPT: its first half on one device, its second on a group of two."""
    cluster = Cluster.from_dict({"devices": [{"kind": "cpu", "count": 3}]})
    training = Training(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    prepared = prepare(GPT(width=20, layers=2, heads=5, length=8), example_inputs(4, 8), {}, training)
    table = price(prepared, cluster, train=training, precision="float32", calibration=None)
    names, units = table.device_classes[0].devices, len(prepared.chain.units)
    group = Replica(names[1], 4, others=(names[2],), shares=(0.6, 0.4))
    stages = (
        StageChoice(0, units // 2, (Replica(names[0], 4),)),
        StageChoice(units // 2, units, (group,)),
    )
    table = with_group_modes(table, prepared.graph, cluster, [group], None)
    found = evaluate(table, [PipelineChoice(4, 4, stages)])
    return plan_of(prepared, cluster, table, found)
