"""What a second axis inside tensor groups would buy, by graphpar's own prices.

    OMP_NUM_THREADS=1 python benchmarks/two_axes.py --members 4 --json

Meshes of two axes (`mesh_programme.py`) are compared at equal memory with what is planned today: groups
of one axis over all members, and replicas of narrower groups, which sum gradients once a step, under ZeRO
level 0, 1 or 2. Weights and gradients in bfloat16, Adam's state and the master weight in float32 count as
memory, in equal shares of the whole model's.

With `--planned` it is instead what the planner's own programme chooses, with its price for memory: a
group of one axis beside every mesh of as many members.

Printed are milliseconds of a microbatch, the best shape of each kind, and by how many percent the mesh is
faster than the best that is planned without ZeRO, and with it (negative: slower).
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import inf
from time import process_time

import torch
from mesh_programme import STATE_RATIO, Mesh, MeshProgramme, gpus
from torch import nn

from graphpar.cost import LinkCost
from graphpar.cost_models.group_times import ShardingOptions
from graphpar.cost_models.mesh_times import MeshTimes
from graphpar.cost_models.sharding import choose_sharding
from graphpar.groups.settings import group_options
from graphpar.groups.sharing import as_one_stage
from graphpar.ir.mesh import whole_along
from graphpar.preparation import Prepared, prepare
from graphpar.training import Training

LEVELS = (0, 1, 2)
"""ZeRO levels of replicas that jobs run."""
MODELS = ("gpt", "llama", "mixtral", "deepseek")
LINKS = {"nvlink": LinkCost(3e-6, 400e9), "pcie": LinkCost(10e-6, 12e9)}


def model(name: str, length: int, layers: int) -> nn.Module:
    """Blocks of well-known shapes, without weights, in bfloat16; a vocabulary of 32,000."""
    import transformers as hf

    common = {"vocab_size": 32000, "num_hidden_layers": layers, "max_position_embeddings": length,
              "use_cache": False}  # fmt: skip
    grouped = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8}
    made: nn.Module
    if name == "gpt":
        off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "use_cache": False}
        sizes = {"n_embd": 4096, "n_head": 32, "n_layer": layers, "n_positions": length}
        made = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=32000, **sizes, **off))
    elif name == "llama":
        made = hf.LlamaForCausalLM(hf.LlamaConfig(intermediate_size=14336, **grouped, **common))
    else:
        experts = {"experts_implementation": "grouped_mm", "sliding_window": None}
        many = {"hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 16}
        few = {"intermediate_size": 14336, "num_local_experts": 8, "num_experts_per_tok": 2, **grouped}
        fine = {"intermediate_size": 1408, "num_local_experts": 64, "num_experts_per_tok": 6, **many}
        shape = few if name == "mixtral" else fine
        made = hf.MixtralForCausalLM(hf.MixtralConfig(**shape, **common, **experts))
    return made.to(torch.bfloat16)


def captured(name: str, batch: int, length: int, layers: int) -> Prepared:
    """A model on the meta device, ready to be priced."""
    with torch.device("meta"):
        ids = torch.zeros(batch, length, dtype=torch.long)
        built = model(name, length, layers)
    return prepare(built, (ids,), {"labels": ids}, Training(optimizer=torch.optim.SGD))


def shapes(members: int, divides: bool) -> list[Mesh]:
    """One axis, replicas of one axis with and without ZeRO, and two axes."""
    halves = [(a, members // a) for a in range(2, members // 2 + 1) if members % a == 0]
    beside = [Mesh((b,), a, zero) for a, b in halves for zero in LEVELS]
    groups = (Mesh(axes, divides=divides) for axes in ((members,), *halves))
    return [*groups, *beside]


@dataclass(frozen=True)
class Row:
    """One comparison, in milliseconds of a microbatch; endless where nothing of the kind fits."""

    model: str
    link: str
    members: int
    memory: float
    one_axis_ms: float
    replicas_ms: float
    replicas_zero1_ms: float
    replicas_zero2_ms: float
    mesh_ms: float
    mesh_bound_ms: float
    mesh: str
    gain_percent: float
    gain_over_zero_percent: float


def compare(
    name: str, link: str, members: int, prepared: Prepared, memories: Sequence[float], divides: bool
) -> Iterator[Row]:
    """A row for each limit of memory, in equal shares of the whole model."""
    programmes, samples = [], prepared.graph.batch
    for mesh in shapes(members, divides):
        options = ShardingOptions(samples=samples // mesh.replicas, state_ratio=STATE_RATIO)
        programmes.append(MeshProgramme(prepared, mesh, LINKS[link], options))
    whole = programmes[0].weight_bytes()
    for memory in memories:
        found = {p.mesh: p.solve(memory * whole / members) for p in programmes}
        alone = found[Mesh((members,), divides=divides)][0]
        beside = [
            min((s for m, (s, _) in found.items() if m.replicas > 1 and m.zero == zero), default=inf)
            for zero in LEVELS
        ]
        best = min((m for m in found if len(m.axes) > 1), key=lambda m: found[m][0])
        seconds = found[best][0]
        without = min(alone, beside[0])
        yield Row(
            name, link, members, memory, 1e3 * alone, 1e3 * beside[0], 1e3 * beside[1], 1e3 * beside[2],
            1e3 * seconds, 1e3 * min(found[m][1] for m in found if len(m.axes) > 1), str(best),
            100 * (without / seconds - 1), 100 * (min(alone, *beside) / seconds - 1),
        )  # fmt: skip


@dataclass(frozen=True)
class Planned:
    """What the programme of groups chooses: a microbatch without the price of memory, and that memory."""

    model: str
    link: str
    mesh: str
    microbatch_ms: float
    memory_shares: float
    objective_ms: float
    bound_ms: float
    weights_cut_along_both: int
    processor_s: float


def planned(name: str, link: str, members: int, prepared: Prepared) -> Iterator[Planned]:
    """A row for one axis and for every mesh."""
    graph = as_one_stage(prepared.graph, len(prepared.chain.units))
    options = replace(group_options(prepared.graph, training=True), samples=prepared.graph.batch)
    for shape in ((), *((a, members // a) for a in range(2, members // 2 + 1) if members % a == 0)):
        group = replace(gpus(members, LINKS[link]), mesh=shape)
        began = process_time()
        found = choose_sharding(graph, 0, prepared.chain, group, options)
        spent = process_time() - began
        times = MeshTimes(graph, group, options)
        held = [(op, found.held(op.name)) for op in graph.sources("parameter")]
        price = sum(times.holding_seconds(op, layouts) for op, layouts in held)
        whole = sum(times.weight_bytes(op, whole_along(len(group.axes))) for op, _ in held)
        own = sum(times.weight_bytes(op, layouts) for op, layouts in held)
        both = sum(len(layouts) > 1 and "whole" not in layouts for _, layouts in held)
        yield Planned(
            name, link, "x".join(map(str, shape)) or "one axis", 1e3 * (found.objective_s - price),
            members * own / whole, 1e3 * found.objective_s, 1e3 * (found.bound_s or 0.0), both, spent,
        )  # fmt: skip


def main() -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--links", nargs="+", default=list(LINKS), choices=list(LINKS))
    parser.add_argument("--members", type=int, default=4)
    parser.add_argument("--samples", type=int, default=0, help="in a microbatch; as many as members")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--memory", nargs="+", type=float, default=[1.05, 1.15, 1.5, 2.1],
                        help="bytes of a member over its equal share of the model's")  # fmt: skip
    parser.add_argument("--divides", action="store_true",
                        help="let members divide the state of weights that they hold alike")  # fmt: skip
    parser.add_argument("--planned", action="store_true", help="what the planner's programme chooses")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    given = parser.parse_args()
    samples = given.samples or given.members
    rows: list[Row | Planned] = []
    for name in given.models:
        prepared = captured(name, samples, given.length, given.layers)
        for link in given.links:
            found: Iterator[Row | Planned] = (
                planned(name, link, given.members, prepared)
                if given.planned
                else compare(name, link, given.members, prepared, given.memory, given.divides)
            )
            for row in found:
                rows.append(row)
                if not given.json:
                    print(row, flush=True)
    if given.json:
        finite = ({k: None if v == inf else v for k, v in vars(row).items()} for row in rows)
        print(json.dumps(list(finite)))


if __name__ == "__main__":
    main()
