"""How long it takes to plan a Llama-8B shape for one tensor group: capture, build and solve, lower.

    python benchmarks/tensor_planning.py --members 32 --json

Needs no weights and no GPU. The group is of equal H100 on NVLink; `lower` rewrites the graph of every
member, collectives included, and `check` compares what they ask of each other. The model's key cache is
off, as one trains; left on (`--cache`), it keeps capture from folding equal blocks. Raw seconds are
printed, processor time too, and what the sharding programme proved.
"""

import argparse
import json
import time

import torch

from graphpar.cluster import Cluster
from graphpar.cost import LinkCost
from graphpar.cost_models.group_times import ShardingOptions, TensorGroup
from graphpar.cost_models.sharding import choose_sharding
from graphpar.groups.sharing import as_one_stage
from graphpar.passes.members import member_stages
from graphpar.passes.shard import Shard
from graphpar.preparation import prepare
from graphpar.runtime.team_calls import check_in_step
from graphpar.training import Training


def main() -> None:
    """Measure once and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--members", type=int, default=32)
    parser.add_argument("--cache", action="store_true", help="leave the model's key cache on")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    given = parser.parse_args()
    found = measure(given.layers, given.members, given.cache)
    if given.json:
        print(json.dumps(found))
    else:
        for name, value in found.items():
            print(f"{name:<14} {value:.4g}")


def measure(layers: int, members: int, cache: bool) -> dict[str, float]:
    """Seconds of each part, ops, and the programme's objective and bound in seconds."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=2048, use_cache=cache,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
        ids = torch.zeros(8, 2048, dtype=torch.long)
    cluster = Cluster.from_dict({"devices": [{"kind": "h100-sxm-80gb", "count": members}]})
    group = TensorGroup(cluster.devices, (1 / members,) * members, LinkCost(3e-6, 400e9))
    start_cpu = time.process_time()
    times = [time.perf_counter()]
    prepared = prepare(model, (ids,), {"labels": ids}, Training(optimizer=torch.optim.SGD))
    times.append(time.perf_counter())
    graph = as_one_stage(prepared.graph, len(prepared.chain.units))
    options = ShardingOptions(samples=2, hold_factor=4.0)
    chosen = choose_sharding(graph, 0, prepared.chain, group, options)
    times.append(time.perf_counter())
    shard = Shard(0, 0, chosen.chosen, chosen.forms, chosen.weights)
    stages = member_stages(lambda member: graph, shard, members, training=True)
    times.append(time.perf_counter())
    check_in_step(stages, 0, training=True)
    times.append(time.perf_counter())
    return {
        "ops": float(len(graph)),
        "capture_s": times[1] - times[0],
        "solve_s": times[2] - times[1],
        "lower_s": times[3] - times[2],
        "check_s": times[4] - times[3],
        "total_s": times[4] - times[0],
        "total_cpu_s": time.process_time() - start_cpu,
        "objective_s": chosen.objective_s,
        "bound_s": chosen.bound_s if chosen.bound_s is not None else float("nan"),
    }


if __name__ == "__main__":
    main()
