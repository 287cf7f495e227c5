"""What does not count unit by unit: weights that several read or ZeRO may not divide, and results."""

from collections.abc import Sequence

from graphpar.cost import RepeatedWeights
from graphpar.cost_options import PricingOptions
from graphpar.ir.chain import Chain
from graphpar.ir.graph import Graph
from graphpar.ir.rows import rows_in


def passing_gradient_bytes(graph: Graph, chain: Chain, kinds: Sequence[int]) -> tuple[float, ...]:
    """For each kind of unit bytes of gradients that several units add to, while backward is in it.

    Backward makes the first part of such a gradient in the last unit that reads the weight, and the last
    in the first; meanwhile the sum goes along. Empty where no weight is read by several units.
    """
    number = {name: i for i, unit in enumerate(chain.units) for name in unit.ops}
    by_unit = [0.0] * len(kinds)
    for op in graph.sources("parameter"):
        readers = {number[user.name] for user in graph.users(op.name) if user.name in number}
        if op.attr("grad") and len(readers) > 1:
            for unit in range(min(readers) + 1, max(readers) + 1):
                by_unit[unit] += op.type.bytes(1)
    if not any(by_unit):
        return ()
    return tuple(
        max(n for n, k in zip(by_unit, kinds, strict=True) if k == kind) for kind in range(max(kinds) + 1)
    )


def few_row_bytes(
    graph: Graph, chain: Chain, kinds: Sequence[int], most_replicas: int
) -> tuple[float, ...]:
    """For each kind of unit bytes of trained weights that have fewer rows than there may be replicas."""
    number = {name: i for i, unit in enumerate(chain.units) for name in unit.ops}
    found = [0.0] * (max(kinds, default=-1) + 1)
    first_of = {kind: list(kinds).index(kind) for kind in kinds}
    for op in graph.sources("parameter"):
        readers = [number[user.name] for user in graph.users(op.name) if user.name in number]
        shape = [size if isinstance(size, int) else 0 for size in op.type.shape]
        if readers and op.attr("grad") and rows_in(shape)[1] < most_replicas:
            unit = min(readers)
            if first_of[kinds[unit]] == unit:
                found[kinds[unit]] += op.type.bytes(1)
    return tuple(found) if any(found) else ()


def largest_gradient_bytes(graph: Graph, chain: Chain, kinds: Sequence[int]) -> tuple[float, ...]:
    """For each kind of unit the bytes of the largest trained weight that it reads."""
    number = {name: i for i, unit in enumerate(chain.units) for name in unit.ops}
    found = [0.0] * (max(kinds, default=-1) + 1)
    for op in graph.sources("parameter"):
        for unit in {number[user.name] for user in graph.users(op.name) if user.name in number}:
            if op.attr("grad"):
                found[kinds[unit]] = max(found[kinds[unit]], float(op.type.bytes(1)))
    return tuple(found)


def result_bytes(graph: Graph, chain: Chain, batch: int) -> tuple[float, ...]:
    """By unit what the results of the graph that it makes take for a sample of a batch of so many."""
    results = set(graph.output.operands())
    return tuple(
        sum(
            kind.bytes(batch) / batch
            for name in results & set(unit.ops)
            for kind in graph[name].types
            if kind
        )
        for unit in chain.units
    )


def repeated_weights(
    graph: Graph, chain: Chain, kinds: Sequence[int], options: PricingOptions
) -> tuple[RepeatedWeights, ...]:
    """Weights and buffers that units of several kinds read; the first reader's cost counts them.

    Units of its kind count them, too, for they have its cost.
    """
    number = {name: i for i, unit in enumerate(chain.units) for name in unit.ops}
    held: dict[tuple[int, tuple[int, ...]], list[float]] = {}
    for op in (*graph.sources("parameter"), *graph.sources("buffer")):
        readers = sorted({number[user.name] for user in graph.users(op.name) if user.name in number})
        again = tuple(unit for unit in readers if kinds[unit] != kinds[readers[0]])
        if again:
            total = held.setdefault((readers[0], again), [0.0, 0.0])
            total[0] += op.type.bytes(1)
            if options.training and op.target == "parameter" and op.attr("grad"):
                total[1] += op.type.bytes(1)
    state = options.optimizer_state_bytes_per_parameter_byte
    return tuple(
        RepeatedWeights(first, again, weights, trained, trained * state)
        for (first, again), (weights, trained) in held.items()
    )
