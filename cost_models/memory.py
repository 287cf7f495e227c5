"""Memory of one unit: weights, gradients, optimiser state, what autograd keeps, and temporaries."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from graphpar.cost_models.layout import Layout
from graphpar.cost_models.unit_heap import LOSSES, unit_bytes
from graphpar.cost_models.work import Call, OpWork
from graphpar.ir.formats import multiplies_8_bits, role_of
from graphpar.ir.graph import Graph
from graphpar.ir.ops import SOURCES, Op, Ref
from graphpar.ir.optable import packet

ALLOCATOR_SLACK = 1.03
"""Allocators round sizes up and cannot use every hole; a few percent of what is asked for."""

GPU_CONTEXT_BYTES = 0.8e9
"""CUDA context, loaded kernels and cuBLAS workspaces of one process: what nvidia-smi showed on an H200
beyond what torch's allocator held, of steps of 7 to 23 GB."""

GPU_MESSAGE_BYTES = 0.4e9
"""NCCL's buffers and channels besides, where there is another device to talk to."""

CPU_RESERVED_BYTES = 0.29e9
"""A worker that has run its first ops and holds nothing: resident memory, torch 2.13 for processors on
Linux (`benchmarks/prediction.py` compares what workers really held)."""

ONEDNN_BYTES = 6.5e6
"""What the first convolutions or recurrent layers add to a worker on a processor: pages of oneDNN's code
and what it compiles. 4 MB for plain convolutions, 7 for an LSTM, 9 where there are many sorts; the middle
of that (torch 2.13, 27 November 2026)."""

HALF_CODE_BYTES = 6e6
"""What products in 16 bits add in each direction: kernels of oneDNN's for them, and torch's own for
attention. Workers with tensors of 1 MB held 6 MB more for forwards, 12 to 13 with backwards (torch 2.13
on a processor with AMX, 27 November 2026); on one that has no fast products in 16 bits it may be less."""

ONEDNN_PACKETS = frozenset(
    {"_convolution", "convolution", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d"}
    | {"conv_transpose3d", "gru", "lstm", "rnn_relu", "rnn_tanh"}
)

_MASK = 3
"""The place of the mask among attention's operands."""

_HALVES = ("bfloat16", "float16")

HELD = SOURCES | {"gp.cast_weight"}
"""Targets of ops whose values are there whatever the microbatch."""


@dataclass(frozen=True)
class UnitMemory:
    """Bytes of one unit for one microbatch size.

    `growing_bytes` hold gradients of weights, too, as they come in a backward before which there are
    none; 0 where that is not known.
    """

    saved_bytes: float
    working_bytes: float
    growing_bytes: float = 0.0


def code_bytes(graph: Graph, training: bool) -> float:
    """What a worker on a processor takes for code that float32's products do without.

    Args:
        graph: The graph that it runs.
        training: Whether backward follows.
    """
    onednn = any(packet(op) in ONEDNN_PACKETS for op in graph.ops)
    half = any(
        kind.dtype in _HALVES for op in graph.ops if role_of(op) == "product" for kind in op.types if kind
    )
    return ONEDNN_BYTES * onednn + HALF_CODE_BYTES * half * (2 if training else 1)


def parameter_bytes(graph: Graph, names: Sequence[str]) -> tuple[float, float, float, int]:
    """Bytes of all parameters and buffers, bytes and elements of the trained ones, and their number."""
    total = trained = numel = 0.0
    tensors = 0
    for name in names:
        op = graph[name]
        total += op.type.bytes(1)
        if op.target == "parameter" and op.attr("grad"):
            trained += op.type.bytes(1)
            numel += op.type.numel(1)
            tensors += 1
    return total, trained, numel, tensors


def lower_copy_bytes(graph: Graph, op: Op) -> float:
    """Bytes of a weight's copy in a lower format, which a device holds beside the weight.

    Args:
        graph: The graph.
        op: The `gp.cast_weight` that makes it.
    """
    held = float(op.type.bytes(1))
    if is_scaled(graph, op):
        held += 2.0 * op.type.numel(1)
    return held


def is_scaled(graph: Graph, op: Op) -> bool:
    """Whether a copy is multiplied in eight bits: scaled, and held turned for the backward as well."""
    return len(op.type.shape) == 2 and any(map(multiplies_8_bits, graph.users(op.name)))


def unit_memory(
    graph: Graph,
    layout: Layout,
    works: Mapping[str, OpWork],
    owned: frozenset[str],
    batch: int,
    precision: str,
    training: bool,
    on_cpu: bool = False,
    again: bool = False,
) -> UnitMemory:
    """What one unit keeps and needs for one microbatch.

    Args:
        graph: The graph the unit is part of.
        layout: Which values share storage.
        works: The unit's ops with their work at this batch.
        owned: Storage roots that count to this unit if something in it saves them.
        batch: Samples in the microbatch.
        precision: Format float32 values are held in.
        training: Whether backward follows.
        on_cpu: Whether that is on a processor.
        again: Whether a device may have another microbatch in the same step.
    """
    ops = [graph[name] for name in works]
    kept = saved_roots(graph, layout, works) if training else frozenset()
    sizes = {op.name: _bytes(graph, op, batch, precision) for op in ops}
    saved = sum(_bytes(graph, graph[root], batch, precision) for root in kept & owned)
    if training:
        saved += sum(work.saved_bytes for work in works.values())
        if on_cpu:
            saved += sum(_unfused_bytes(graph, op, batch, precision) for op in ops)
    if training and on_cpu:
        read = {name for op in ops for name in op.operands()} - sizes.keys()
        known = {**sizes, **{name: _bytes(graph, graph[name], batch, precision) for name in read}}
        working, growing = unit_bytes(graph, layout, works, known, kept, again=again)
    else:
        results = () if training else graph.output.operands()
        working = _peak_temporaries(layout, ops, sizes, kept, results)
        if training:
            working = max(working, _peak_gradients(graph, ops, batch, precision))
        growing = 0.0
    return UnitMemory(*(ALLOCATOR_SLACK * n for n in (saved, working, growing)))


def saved_roots(graph: Graph, layout: Layout, works: Mapping[str, OpWork]) -> frozenset[str]:
    """Storage that the ops keep for backward; weights and inputs are there anyway."""
    return frozenset(
        layout.root[name]
        for op_name, work in works.items()
        if work.backward
        for name in work.saved
        if graph[layout.root[name]].target not in HELD
    )


def _unfused_bytes(graph: Graph, op: Op, batch: int, precision: str) -> float:
    """Weights (queries by keys) that attention keeps on a processor if its mask wants a gradient.

    It is not fused there. Scaled copies of queries and keys take their place (torch 2.11 and 2.13).
    """
    operands = [a for a in op.args if isinstance(a, Ref)]
    if packet(op) != "scaled_dot_product_attention" or len(operands) <= _MASK:
        return 0.0
    queries, keys, mask = (graph[operands[i].name] for i in (0, 1, _MASK))
    if not op.attr("grad") or not mask.attr("grad"):
        return 0.0
    sizes = Call(op, graph, batch, precision).sizes
    return _bytes(graph, queries, batch, precision) / sizes(queries)[-1] * sizes(keys)[-2]


def _bytes(graph: Graph, op: Op, batch: int, precision: str) -> float:
    # The tail runs once on the whole batch: a microbatch counts for its part of that.
    size, share = (graph.batch, batch / graph.batch) if op.attr("tail") else (batch, 1.0)
    call = Call(op, graph, size, precision)
    return share * sum(call.bytes(kind) for kind in op.types if kind is not None)


def _peak_temporaries(
    layout: Layout,
    ops: Sequence[Op],
    sizes: Mapping[str, float],
    kept: frozenset[str],
    results: Sequence[str],
) -> float:
    """The largest sum of live values that nobody keeps, walking forward through the unit.

    In inference results stay, and a loss makes log-probabilities that no backward keeps.
    """
    last_use = {layout.root[o]: i for i, op in enumerate(ops) for o in op.operands()}
    last_use |= {layout.root[name]: len(ops) for name in results if name in sizes}
    live: dict[str, float] = {}
    peak = 0.0
    for i, op in enumerate(ops):
        made = op.target not in ("getitem", *HELD)
        if layout.root[op.name] == op.name and op.name not in kept and made:
            live[op.name] = sizes[op.name]
        inside = sizes.get(op.operands()[0], 0.0) if results and packet(op) in LOSSES else 0.0
        peak = max(peak, sum(live.values()) + inside)
        for name in [n for n in live if last_use.get(n, i) <= i]:
            del live[name]
    return peak


def _peak_gradients(graph: Graph, ops: Sequence[Op], batch: int, precision: str) -> float:
    """The most that gradients in flight take: those of an op's results and operands together."""
    peak = 0.0
    for op in ops:
        if not op.attr("grad"):
            continue
        call = Call(op, graph, batch, precision)
        flowing = [o for o in dict.fromkeys(call.operands()) if o.attr("grad")]
        inside = sum(_bytes(graph, o, batch, precision) for o in flowing)
        peak = max(peak, inside + _bytes(graph, op, batch, precision))
    # A residual branch holds one more gradient of the unit's own width while the other is computed.
    return peak + max((_bytes(graph, op, batch, precision) for op in ops[-1:]), default=0.0)
