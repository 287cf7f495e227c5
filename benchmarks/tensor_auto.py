"""How long it takes to plan a Llama-8B shape with groups of one axis and with those that `auto` tries.

    OMP_NUM_THREADS=1 python benchmarks/tensor_auto.py --count 8 --json

The cluster is one node of equal H100 on NVLink; as many samples of 2048 tokens as devices train in
bfloat16 under AdamW. Needs no weights and no GPU. For each `tensor=` there are seconds of `graphpar.plan`
(processor time; the model is captured each time), the predicted step, the widths of the plan's groups and
what its notes say of groups. Both take turns, `--rounds` times, after a plan that does not count.
"""

import argparse
import json
import time
from functools import partial
from typing import Any

import torch

import graphpar
from graphpar import Training


def main() -> None:
    """Plan and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--count", type=int, default=8, help="devices of the node")
    parser.add_argument("--link", default="nvlink4")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    given = parser.parse_args()
    model, ids = llama(given.layers, given.count)
    node = {
        "name": "a",
        "devices": {"kind": "h100-sxm-80gb", "count": given.count},
        "link": given.link,
    }
    plan = partial(
        graphpar.plan, model, {"nodes": [node]}, (ids,), {"labels": ids},
        train=Training(optimizer=torch.optim.AdamW), precision="bfloat16",
    )  # fmt: skip
    plan(tensor=1)
    found: dict[str, dict[str, Any]] = {}
    for _ in range(given.rounds):
        for tensor in (given.count, "auto"):
            told = measure(plan, tensor)
            found.setdefault(str(tensor), {**told, "cpu_s": []})["cpu_s"].append(told["cpu_s"])
    if given.json:
        print(json.dumps(found))
        return
    for tensor, told in found.items():
        print(f"tensor={tensor}")
        for name, value in told.items():
            print(f"  {name:<8} {value}")


def llama(layers: int, samples: int) -> tuple[torch.nn.Module, torch.Tensor]:
    """The shape of Llama-8B without weights, and token ids."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=2048, use_cache=False,
    )  # fmt: skip
    with torch.device("meta"):
        return LlamaForCausalLM(config), torch.zeros(samples, 2048, dtype=torch.long)


def measure(plan: Any, tensor: int | str) -> dict[str, Any]:
    """Processor seconds of one plan, and what it is."""
    start_s = time.process_time()
    found = plan(tensor=tensor)
    cpu_s = time.process_time() - start_s
    stages = [s for p in found.partition.pipelines for s in p.stages]
    return {
        "cpu_s": cpu_s,
        "step_s": found.partition.objective_s,
        "gap": found.gap,
        "groups": [r.width for s in stages for r in s.replicas],
        "notes": [note for note in found.notes if "tensor" in note],
    }


if __name__ == "__main__":
    main()
