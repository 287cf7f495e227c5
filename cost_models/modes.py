"""Further ways to run units, derived from a table's plain rows: recomputation, ZeRO, tensor groups.

*Recomputation* keeps what enters a unit and runs its forward again before its backward: backward takes
backward + forward, and while a unit is at work everything it would have kept is a temporary (Chen et
al., 2016, arXiv:1604.06174).

*ZeRO*: the partitioner divides and adds what is exchanged (`graphpar.partition.pipeline_price`). From
level 2 on whole gradients are temporaries, those of weights that several units read for longer.

*Tensor groups* by a simple rule: `t` equal members each do 1/t of a unit's work and hold 1/t of its
weights and of what it keeps, but for what enters the unit, which all of them hold; what leaves a unit
with weights is summed over the members, forward and backward (one all-reduce each, as in Shoeybi et al.,
2019, arXiv:1909.08053, where a transformer block has two such units).
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from graphpar.cost import CostTable, LinkCost, Mode, ModeCost
from graphpar.cost_options import StageOptions
from graphpar.partition.relaxed_tables import crossing_bytes, divided, recomputed

TENSOR_EFFICIENCY = 0.9
"""Kernels of 1/t of the size run at somewhat less than full speed."""

NEAR = 0.5
"""A network with this share of the bandwidth inside nodes joins groups as well; others stay in nodes."""


def with_modes(table: CostTable, options: StageOptions) -> CostTable:
    """The same table with the modes that the options allow; ZeRO only where there is training.

    They are derived for the plain mode of every class, for every tensor group and for every precision the
    table has; groups of the simple rule only for classes.

    >>> from graphpar.cost_options import StageOptions
    >>> StageOptions(recompute=True, zero=(1,)).zero
    (1,)
    """
    entering, leaving = crossing_bytes(table)
    modes: list[Mode] = []
    known = {mode.key for mode in table.every_mode}
    for plain in [m for m in table.every_mode if not (m.recompute or m.zero)]:
        groups = [plain]
        if len(plain.members) == 1:
            groups += _tensor_groups(table, plain, options.tensor_widths, entering, leaving)
        for group in groups:
            ways = [group, *([recomputed(table, group, entering)] if options.recompute else [])]
            for way in ways if table.training else ways[:1]:
                levels = (0, *options.zero) if table.training else (0,)
                modes += (divided(table, way, level) for level in levels)
    return replace(table, modes=(*table.modes, *(m for m in modes if m.key not in known)))


def _tensor_groups(
    table: CostTable,
    single: Mode,
    widths: Sequence[int],
    entering: Sequence[Sequence[float]],
    leaving: Sequence[Sequence[float]],
) -> Iterator[Mode]:
    """Groups of a class in one of its nodes; larger ones where the network is near the links inside."""
    (index,) = single.members
    inside, room = _inside(table, index)
    for width in widths:
        link = inside if width <= room else _across(table, inside)
        if link is None or width > len(table.device_classes[index].devices):
            continue
        costs = tuple(
            _split(cost, width, link, e, a, table.training)
            for cost, e, a in zip(single.costs, entering, leaving, strict=True)
        )
        yield Mode((index,) * width, costs, precision=single.precision, link=link)


def _inside(table: CostTable, index: int) -> tuple[LinkCost | None, int]:
    """The worst link inside a node with several devices of a class, and the largest such node."""
    topology, rooms = table.topology, dict[str, int]()
    for device in table.device_classes[index].devices:
        rooms[topology.node_of[device]] = rooms.get(topology.node_of[device], 0) + 1
    links = [topology.inside[node] for node, number in rooms.items() if number > 1]
    if not links:
        return None, 1
    worst = LinkCost(max(k.latency_s for k in links), min(k.bytes_per_s for k in links))
    return worst, max(rooms.values())


def _across(table: CostTable, inside: LinkCost | None) -> LinkCost | None:
    """What joins a group beyond a node, None where the links inside are too much faster for that."""
    topology = table.topology
    links = [topology.network, *topology.between.values(), *([inside] if inside is not None else [])]
    worst = LinkCost(max(k.latency_s for k in links), min(k.bytes_per_s for k in links))
    near = inside is None or worst.bytes_per_s >= NEAR * inside.bytes_per_s
    return worst if near else None


def _split(
    cost: ModeCost,
    width: int,
    link: LinkCost,
    entering: Sequence[float],
    leaving: Sequence[float],
    training: bool,
) -> ModeCost:
    """One of `width` equal parts of a unit."""
    speed = width * TENSOR_EFFICIENCY
    weighs = cost.weight_bytes[0] > 0
    sums = [2 * (width - 1) * link.seconds(n / width) if weighs else 0.0 for n in leaving]
    back = [2 * (width - 1) * link.seconds(n / width) if weighs else 0.0 for n in entering]

    def divided(row: Sequence[float], whole: Sequence[float]) -> tuple[float, ...]:
        return tuple(min(n, w) + max(0.0, n - w) / width for n, w in zip(row, whole, strict=True))

    saved = divided(cost.saved_bytes[0], entering)
    working = divided(cost.working_bytes[0], leaving)
    return ModeCost(
        forward_s=tuple(f / speed + s for f, s in zip(cost.forward_s, sums, strict=True)),
        backward_s=tuple(b / speed + s for b, s in zip(cost.backward_s, back, strict=True)),
        optimizer_s=cost.optimizer_s / width,
        weight_bytes=(cost.weight_bytes[0] / width,) * width,
        gradient_bytes=(cost.gradient_bytes[0] / width,) * width,
        optimizer_bytes=(cost.optimizer_bytes[0] / width,) * width,
        saved_bytes=(saved,) * width,
        working_bytes=(working,) * width,
        collective_s=tuple(s + b for s, b in zip(sums, back, strict=True)) if training else tuple(sums),
        collective_again_s=tuple(sums) if training else (),
    )
