"""Small cost tables for tests: by hand, and drawn by hypothesis."""

from collections.abc import Sequence
from dataclasses import replace

from hypothesis import strategies as st

from graphpar.cores import CoreUse, SharedCores
from graphpar.cost import (
    CostTable,
    CutEdge,
    DeviceClass,
    LinkCost,
    Mode,
    ModeCost,
    RepeatedWeights,
    Topology,
    UnitCost,
)

FAST = LinkCost(1e-6, 1e12)


def make_table(
    unit_seconds: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
    speeds: Sequence[float] = (1.0,),
    devices_per_class: Sequence[int] = (2,),
    *,
    batch: int = 4,
    training: bool = True,
    memory_bytes: float = 1e12,
    link: LinkCost = FAST,
    cut_bytes: float = 0.0,
    weight_bytes: float = 1.0,
    saved_bytes: float = 0.0,
    gradient_bytes: float = 0.0,
    optimizer_s: float = 0.0,
) -> CostTable:
    """A table in which times are linear in the microbatch size: `unit_seconds / speed` per sample."""
    sizes = tuple(sorted({1, batch}))
    costs = tuple(
        UnitCost(
            name=f"unit {i}",
            forward_s=tuple(tuple(s * t / v for s in sizes) for v in speeds),
            backward_s=tuple(tuple(2 * s * t / v for s in sizes) for v in speeds),
            optimizer_s=tuple(optimizer_s / v for v in speeds),
            weight_bytes=weight_bytes,
            gradient_bytes=gradient_bytes,
            optimizer_bytes=0.0,
            saved_bytes=tuple(saved_bytes * s for s in sizes),
            working_bytes=tuple(0.0 for _ in sizes),
        )
        for i, t in enumerate(unit_seconds)
    )
    number = len(unit_seconds)
    classes = tuple(
        DeviceClass(f"kind{k}", tuple(f"{k}.{i}" for i in range(n)), memory_bytes)
        for k, n in enumerate(devices_per_class)
    )
    node_of = {d: "node" for c in classes for d in c.devices}
    return CostTable(
        batch=batch,
        training=training,
        sizes=sizes,
        units=tuple(range(number)),
        unit_names=tuple(f"unit {i}" for i in range(number)),
        costs=costs,
        edges=tuple(CutEdge(i, i + 1, cut_bytes, cut_bytes) for i in range(number - 1)),
        device_classes=classes,
        topology=Topology(node_of, {"node": link}, link),
        max_microbatches=batch,
        max_replicas=batch,
    )


_seconds = st.sampled_from([1.0, 0.9, 2.0, 0.5, 1.7, 3.0, 0.1, 0.0])
_bytes = st.sampled_from([5.0, 1.0, 12.0, 20.0, 0.0])


@st.composite
def unit_costs(draw: st.DrawFn, classes: int, sizes: int, training: bool) -> UnitCost:
    """A distinct unit; times and activations grow with the microbatch size."""

    def growing(values: st.SearchStrategy[float]) -> tuple[float, ...]:
        steps = [draw(values) for _ in range(sizes)]
        return tuple(sum(steps[: i + 1]) for i in range(sizes))

    return UnitCost(
        name="unit",
        forward_s=tuple(growing(_seconds) for _ in range(classes)),
        backward_s=tuple(growing(_seconds) for _ in range(classes)),
        optimizer_s=tuple(draw(_seconds) for _ in range(classes)),
        weight_bytes=draw(_bytes),
        gradient_bytes=draw(_bytes) if training else 0.0,
        optimizer_bytes=draw(_bytes) if training else 0.0,
        saved_bytes=growing(_bytes),
        working_bytes=growing(_bytes),
    )


_links = st.builds(LinkCost, st.sampled_from([0.0, 0.1]), st.sampled_from([1e4, 100.0, 20.0]))


@st.composite
def drawn_modes(draw: st.DrawFn, table: CostTable) -> tuple[Mode, ...]:
    """One to three modes: recomputation, ZeRO, and tensor groups of equal or unlike devices."""
    found: dict[object, Mode] = {}
    usual = Mode((0,), ()).key
    for _ in range(draw(st.integers(1, 3))):
        kinds = st.integers(0, len(table.device_classes) - 1)
        members = tuple(draw(st.lists(kinds, min_size=1, max_size=2)))
        mode = Mode(
            members=members,
            costs=tuple(draw(mode_costs(len(members), len(table.sizes))) for _ in table.costs),
            shares=draw(st.sampled_from([(), (0.7, 0.3)])) if len(members) == 2 else (),
            recompute=draw(st.booleans()),
            zero=draw(st.sampled_from([0, 1, 2, 3])) if table.training else 0,
            link=draw(_links) if len(members) == 2 else None,
        )
        plain = len(members) == 1 and mode.key[1:] == usual[1:]
        found.setdefault(mode.key, mode)
        if plain:
            del found[mode.key]
    return tuple(found.values())


@st.composite
def mode_costs(draw: st.DrawFn, members: int, sizes: int) -> ModeCost:
    """A unit in some mode; times and activations grow with the microbatch size."""

    def growing(values: st.SearchStrategy[float]) -> tuple[float, ...]:
        steps = [draw(values) for _ in range(sizes)]
        return tuple(sum(steps[: i + 1]) for i in range(sizes))

    def each(values: st.SearchStrategy[float]) -> tuple[float, ...]:
        return tuple(draw(values) for _ in range(members))

    return ModeCost(
        forward_s=growing(_seconds),
        backward_s=growing(_seconds),
        optimizer_s=draw(_seconds),
        weight_bytes=each(_bytes),
        gradient_bytes=each(_bytes),
        optimizer_bytes=each(_bytes),
        saved_bytes=tuple(growing(_bytes) for _ in range(members)),
        working_bytes=tuple(growing(_bytes) for _ in range(members)),
    )


@st.composite
def small_tables(
    draw: st.DrawFn,
    max_units: int = 4,
    max_devices: int = 3,
    max_batch: int = 3,
    modes: bool = False,
) -> CostTable:
    """Tables whose every plan can be enumerated; memory binds in many of them."""
    training = not draw(st.sampled_from([False, False, True]))
    batch = max_batch - draw(st.sampled_from([0, 0, 1, 2]))
    sizes = tuple(sorted({1, batch}))
    number = max_units - draw(st.sampled_from([0, 0, 1, 2]))
    classes = draw(st.integers(1, 2))
    costs = tuple(
        draw(unit_costs(classes, len(sizes), training)) for _ in range(draw(st.integers(1, number)))
    )
    owner = draw(st.lists(st.integers(0, classes - 1), min_size=max_devices - 1, max_size=max_devices))
    nodes = draw(st.lists(st.sampled_from("ab"), min_size=len(owner), max_size=len(owner)))
    memory = st.sampled_from([1e6, 400.0, 150.0, 60.0])
    device_classes = tuple(
        DeviceClass(
            f"kind{k}",
            tuple(f"d{i}" for i, o in enumerate(owner) if o == k),
            draw(memory),
            draw(st.sampled_from([0.0, 0.05])),
            draw(st.sampled_from([0.0, 1.0, 3.0])),
        )
        for k in range(classes)
    )
    topology = Topology(
        {f"d{i}": node for i, node in enumerate(nodes)},
        {node: draw(_links) for node in "ab"},
        draw(_links),
    )
    edges = tuple(
        CutEdge(i, draw(st.integers(i + 1, number - 1)), *(draw(_bytes) for _ in range(4)))
        for i in range(number - 1)
    )
    mixed = draw(st.booleans()) and draw(st.booleans())
    workers = {f"d{i}": CoreUse() for i in range(len(owner))}
    table = CostTable(
        batch=batch,
        training=training,
        sizes=sizes,
        units=tuple(draw(st.integers(0, len(costs) - 1)) for _ in range(number)),
        unit_names=tuple(f"unit {i}" for i in range(number)),
        costs=costs,
        edges=edges,
        device_classes=device_classes,
        topology=topology,
        max_microbatches=batch,
        max_replicas=batch,
        sum_s_per_byte=draw(st.sampled_from([0.0, 0.02])),
        # Workers of one machine whose messages cost them something beside the link.
        shared=draw(st.sampled_from([None, None, SharedCores(99, (1.0,), workers, 0.0, 0.3, 0.1, 0.05)])),
    )
    if number > 1 and draw(st.sampled_from([False, False, True])):
        first = draw(st.integers(0, number - 2))
        again = draw(st.sets(st.integers(first + 1, number - 1), min_size=1))
        held = [draw(_bytes), *((draw(_bytes), draw(_bytes)) if training else (0.0, 0.0))]
        table = replace(table, repeated=(RepeatedWeights(first, tuple(sorted(again)), *held),))
    if modes:
        table = replace(table, modes=draw(drawn_modes(table)))
    if mixed:
        return replace(table, max_microbatches=1, max_replicas=1, batch_reason="samples mix")
    return table
