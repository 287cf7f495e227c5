"""What is lost by deciding how a tensor group shares its ops before it is decided which stages it runs.

    python benchmarks/joint_loss.py [--seeds N] [--json]

The planner does one after the other: for a group, every op gets the strategy with which the units take
least time; with these prices stages, devices and microbatches are chosen. Here both are also decided at
once, exactly, for six blocks of three ops on four devices drawn at random: every op of every block whole,
split by its outputs or by its inputs, in every stage on its own. Blocks begin and end with whole values,
so only what a block takes and what it holds matters to the stage, and a plan needs no choice that another
one outdoes in both. All others, for all blocks, are given to the partitioner as modes; with a gap of zero
its answer is then the best of all joint decisions.
"""

import argparse
import itertools
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from graphpar.cost import CostTable, CutEdge, DeviceClass, LinkCost, Mode, ModeCost, Topology, UnitCost
from graphpar.errors import InfeasibleError
from graphpar.partition.pipeline import partition

BLOCKS, DEVICES, OPS, BATCH = 6, 4, 3, 4
WHOLE, BY_OUTPUT, BY_INPUT = range(3)


@dataclass(frozen=True)
class Op:
    """Seconds of a sample's forward on one device, bytes of weights, and of what it gives."""

    seconds: float
    weight_bytes: float
    given_bytes: float


@dataclass(frozen=True)
class Way:
    """What a block takes and holds on each of two members: seconds of a sample, weights, kept values."""

    seconds: float
    weight_bytes: float
    saved_bytes: float

    def outdoes(self, other: "Way") -> bool:
        mine, theirs = ((w.seconds, w.weight_bytes, w.saved_bytes) for w in (self, other))
        return all(a <= b for a, b in zip(mine, theirs, strict=True)) and mine != theirs


def way(ops: Sequence[Op], strategies: Sequence[int], bytes_per_s: float) -> Way:
    """A block whose ops are shared like that, with what it costs to make values whole in between."""
    seconds = weights = saved = 0.0
    split, before = False, 0.0
    for op, strategy in zip(ops, strategies, strict=True):
        if split and strategy != BY_INPUT:
            seconds += before / 2 / bytes_per_s
        part = 1.0 if strategy == WHOLE else 0.5
        seconds += op.seconds * part
        weights += op.weight_bytes * part
        if strategy == BY_INPUT:
            seconds += op.given_bytes / bytes_per_s
        split, before = strategy == BY_OUTPUT, op.given_bytes
        saved += op.given_bytes * (0.5 if split else 1.0)
    if split:
        seconds += before / 2 / bytes_per_s
    return Way(seconds, weights, saved)


def needed(ops: Sequence[Op], bytes_per_s: float) -> list[Way]:
    """The ways of a block that no other one outdoes, the fastest first."""
    every = {way(ops, s, bytes_per_s) for s in itertools.product(range(3), repeat=len(ops))}
    kept = [w for w in every if not any(other.outdoes(w) for other in every)]
    return sorted(kept, key=lambda w: (w.seconds, w.weight_bytes, w.saved_bytes))


def drawn(seed: int) -> tuple[CostTable, list[list[Way]]]:
    """A chain and four devices in two nodes without groups, and the ways of each block for a group."""
    draw = random.Random(seed)
    kinds = [
        [Op(draw.uniform(0.3, 2.0), draw.uniform(1, 6), draw.uniform(0.5, 6)) for _ in range(OPS)]
        for _ in range(2)
    ]
    ops = [kinds[i % 2] for i in range(BLOCKS)]
    bytes_per_s = 10 ** draw.uniform(0.3, 1.8)
    inside, network = LinkCost(0.0, bytes_per_s), LinkCost(0.0, bytes_per_s / draw.choice((1, 4)))
    slower = draw.choice((1.0, 1.7))
    held = 4 * sum(op.weight_bytes for own in ops for op in own)
    memory = [held * draw.uniform(0.25, 0.8) for _ in range(2)]
    sizes = (1, BATCH)
    costs = tuple(
        UnitCost(
            name=f"block {i}",
            forward_s=tuple(tuple(n * v * s for s in sizes) for v in (1.0, slower)),
            backward_s=tuple(tuple(2 * n * v * s for s in sizes) for v in (1.0, slower)),
            optimizer_s=(0.0, 0.0),
            weight_bytes=weights,
            gradient_bytes=weights,
            optimizer_bytes=2 * weights,
            saved_bytes=tuple(saved * s for s in sizes),
            working_bytes=tuple(saved * s for s in sizes),
        )
        for i, (n, weights, saved) in enumerate(
            (
                sum(op.seconds for op in own),
                sum(op.weight_bytes for op in own),
                sum(op.given_bytes for op in own),
            )
            for own in ops
        )
    )
    names = [("a0", "a1"), ("b0", "b1")]
    table = CostTable(
        batch=BATCH,
        training=True,
        sizes=sizes,
        units=tuple(range(BLOCKS)),
        unit_names=tuple(c.name for c in costs),
        costs=costs,
        edges=tuple(
            CutEdge(i, i + 1, ops[i][-1].given_bytes, ops[i][-1].given_bytes) for i in range(BLOCKS - 1)
        ),
        device_classes=tuple(
            DeviceClass(f"kind {k}", own, m) for k, (own, m) in enumerate(zip(names, memory, strict=True))
        ),
        topology=Topology({d: d[0] for own in names for d in own}, {"a": inside, "b": inside}, network),
        max_microbatches=BATCH,
        max_replicas=BATCH,
    )
    # Messages take no part in how fast a device computes: the slower kind has its own ways.
    ways = [needed(own, bytes_per_s) for own in ops]
    slow = [needed([replace(o, seconds=o.seconds * slower) for o in own], bytes_per_s) for own in ops]
    return table, [*ways, *slow]


def with_ways(table: CostTable, chosen: Sequence[Sequence[list[Way]]]) -> CostTable:
    """The table with a mode of a group of two for each kind and each choice of a way for every block."""
    modes = []
    for kind, blocks in enumerate(chosen):
        for number, ways in enumerate(itertools.product(*blocks)):
            costs = tuple(
                ModeCost(
                    forward_s=tuple(w.seconds * s for s in table.sizes),
                    backward_s=tuple(2 * w.seconds * s for s in table.sizes),
                    optimizer_s=0.0,
                    weight_bytes=(w.weight_bytes,) * 2,
                    gradient_bytes=(w.weight_bytes,) * 2,
                    optimizer_bytes=(2 * w.weight_bytes,) * 2,
                    saved_bytes=(tuple(w.saved_bytes * s for s in table.sizes),) * 2,
                    working_bytes=(tuple(w.saved_bytes * s for s in table.sizes),) * 2,
                )
                for w in ways
            )
            # Shares only tell modes apart here; they are equal to a hair.
            hair = number * 1e-9
            link = table.topology.inside["ab"[kind]]
            modes.append(Mode((kind, kind), costs, shares=(0.5 - hair, 0.5 + hair), link=link))
    return replace(table, modes=tuple(modes))


def leanest(ways: Sequence[Way]) -> Way:
    """The way that holds least, with gradients and the optimiser's state of twice the weights."""
    return min(ways, key=lambda w: (4 * w.weight_bytes + w.saved_bytes, w.seconds))


def step_s(table: CostTable, *chosen: Sequence[Sequence[list[Way]]]) -> tuple[float, float]:
    """The best step and a bound on it, where groups take one of some choices; infinite if none fits."""
    modes = tuple(m for ways in chosen for m in with_ways(table, ways).modes)
    told_apart = tuple(replace(m, shares=(0.5 - i * 1e-9, 0.5 + i * 1e-9)) for i, m in enumerate(modes))
    try:
        found = partition(replace(table, modes=told_apart), gap=0.0, time_limit_s=600.0)
    except InfeasibleError:
        return float("inf"), float("inf")
    return found.objective_s, found.bound_s


def losses(seed: int) -> tuple[float, float] | None:
    """What is lost with the fastest way of each block, and with the fastest or the leanest in a stage.

    None where nothing fits. Where pipelines side by side leave a gap, the loss is at most what is told.
    """
    table, every = drawn(seed)
    ways = [every[:BLOCKS], every[BLOCKS:]]
    _, joint_s = step_s(table, ways)
    if joint_s == float("inf"):
        return None
    fastest = [[[own[0]] for own in blocks] for blocks in ways]
    lean = [[[leanest(own)] for own in blocks] for blocks in ways]
    return step_s(table, fastest)[0] / joint_s - 1, step_s(table, fastest, lean)[0] / joint_s - 1


def main() -> None:
    """Draw clusters, decide both ways, print what is lost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=20, metavar="N")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    arguments = parser.parse_args()
    rows = {seed: found for seed in range(arguments.seeds) if (found := losses(seed)) is not None}
    if arguments.json:
        print(json.dumps({"losses": rows}, indent=1))
        return
    for seed, (fastest, either) in rows.items():
        print(f"seed {seed:3}  fastest way {fastest:8.2%}  fastest or leanest {either:8.2%}")
    for name, place in (("fastest way", 0), ("fastest or leanest", 1)):
        some = sorted(row[place] for row in rows.values())
        none = sum(loss < 1e-9 for loss in some)
        print(
            f"{name}: {len(some)} clusters, nothing lost in {none}, "
            f"median {some[len(some) // 2]:.2%}, most {some[-1]:.2%}"
        )


if __name__ == "__main__":
    main()
