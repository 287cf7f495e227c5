"""The two public problem formats, read with every inconsistency named.

*Sharding* files come from the ASPLOS'25 / EuroSys'25 contest on intra-operator parallelism
(https://github.com/google/iopddl): nodes with strategies, each with a cost, a memory use and a life
interval; edges with a cost matrix; a limit on live memory. *Placement* files come from
"Efficient Algorithms for Device Placement of DNN Graph Operators" (NeurIPS 2020,
https://github.com/msr-fiddle/dnn-partitioning): operators with CPU and accelerator latencies, sizes,
colour classes and transfer costs.
"""

import contextlib
import gzip
import io
import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import msgspec
import numpy as np

from graphpar.errors import PlanError
from graphpar.loading import uncollected
from graphpar.partition.clock import OutOfTimeError, ShouldStop, in_time, never
from graphpar.partition.jit import COMPILED
from graphpar.partition.number_rows import (
    FloatArray,
    Int64Array,
    Number,
    Rows,
    at_least,
    flat,
    parse_rows,
    sizes_of,
)

IMPOSSIBLE_COST = 10**18
"""Costs at or above this stand for "this combination cannot be"."""

_LARGE_BYTES = 200_000
"""Text of that length is read by a compiled loop, which takes a moment to load."""

_BYTES_AT_A_TIME = 4_000_000
"""Bytes unpacked between two looks at the clock."""

NodeId: TypeAlias = int | str


class ProblemError(PlanError):
    """A problem file cannot be read; names the file, the place in it and what is wrong there."""


@dataclass(frozen=True, eq=False)
class ShardingProblem:
    """Choose one strategy for each node.

    Attributes:
        name: The instance's own name.
        intervals: For each node the half-open interval of time in which it holds memory.
        node_costs: For each node a cost per strategy, as read.
        usages: For each node the memory in use per strategy.
        edge_nodes: For each edge its nodes, one or two.
        edge_costs: For each edge a cost per combination, row-major over its nodes.
        usage_limit: Memory that may be live at any one time, or None for no limit.
    """

    name: str
    intervals: tuple[tuple[int, int], ...]
    node_costs: Rows = field(repr=False)
    usages: Rows = field(repr=False)
    edge_nodes: tuple[tuple[int, ...], ...] = field(repr=False)
    edge_costs: Rows = field(repr=False)
    usage_limit: Number | None

    @property
    def num_nodes(self) -> int:
        """Number of nodes."""
        return len(self.node_costs)

    @property
    def num_strategies(self) -> int:
        """Number of strategies, all nodes together."""
        return int(sizes_of(self.node_costs).sum())

    @property
    def num_pairs(self) -> int:
        """Number of combinations that edges put a cost on."""
        return int(sizes_of(self.edge_costs).sum())

    @cached_property
    def flat_node_costs(self) -> tuple[Int64Array, FloatArray]:
        """Where each node's costs begin, and all of them; impossible ones are infinite."""
        return _finite(self.node_costs)

    @cached_property
    def flat_edge_costs(self) -> tuple[Int64Array, FloatArray]:
        """Where each edge's costs begin, and all of them; impossible ones are infinite."""
        return _finite(self.edge_costs)


@dataclass(frozen=True)
class Operator:
    """One operator of a placement problem; latencies and sizes in the file's own units."""

    node_id: NodeId
    cpu_latency: float
    accelerator_latency: float
    on_accelerator: bool
    size: float
    colour: str
    backward: bool


@dataclass(frozen=True)
class Transfer:
    """A dependency: `target` needs the output of `source`, which costs `cost` to move once."""

    source: int
    target: int
    cost: float


@dataclass(frozen=True)
class PlacementProblem:
    """Put each operator on the CPUs (device 0) or on one of `num_accelerators` (1 to k).

    `transfers` name operators by their position in `operators`; all transfers out of one operator
    cost the same, because its output moves once per device that wants it.
    """

    name: str
    operators: tuple[Operator, ...] = field(repr=False)
    transfers: tuple[Transfer, ...] = field(repr=False)
    num_accelerators: int
    num_cpus: int
    memory_limit: float


Problem: TypeAlias = ShardingProblem | PlacementProblem

_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What decoding raises: no JSON or none of that form, bad UTF-8, lists too deep in one another."""


def _nothing() -> None:
    """What a caller has to do who has nothing else to do."""


_Row: TypeAlias = tuple[Number, ...]
_ROW = msgspec.json.Decoder(_Row)
_RAW_ROWS = msgspec.json.Decoder(list[msgspec.Raw])


_Moment: TypeAlias = Annotated[int, msgspec.Meta(ge=-(2**62), le=2**62)]
"""What fits arrays of integers."""


class _ShardingNodes(msgspec.Struct):
    intervals: list[tuple[_Moment, _Moment]]
    costs: msgspec.Raw
    usages: msgspec.Raw


class _ShardingEdges(msgspec.Struct):
    nodes: list[list[int]]
    costs: msgspec.Raw
    """Nearly all of a large file; read piece by piece, so that reading can be cut short."""


class _ShardingBody(msgspec.Struct):
    nodes: _ShardingNodes
    edges: _ShardingEdges
    name: str = ""
    usage_limit: Number | None = None


class _ShardingFile(msgspec.Struct):
    problem: _ShardingBody


_Natural: TypeAlias = Annotated[int, msgspec.Meta(ge=0)]


class _PlacementNode(msgspec.Struct, rename="camel"):
    id: NodeId
    cpu_latency: float
    fpga_latency: float
    supported_on_fpga: bool | int = True
    is_backward_node: bool | int = False
    size: float = 0.0
    color_class: Any = None


class _PlacementEdge(msgspec.Struct, rename="camel"):
    source_id: NodeId
    dest_id: NodeId
    cost: float


class _PlacementFile(msgspec.Struct):
    nodes: list[_PlacementNode]
    edges: list[_PlacementEdge]
    num_accelerators: _Natural = msgspec.field(name="maxFPGAs")
    num_cpus: _Natural = msgspec.field(name="maxCPUs")
    memory_limit: float = msgspec.field(name="maxSizePerFPGA")


def read_problem(
    path: str | Path, should_stop: ShouldStop = never, begin: Callable[[], None] = _nothing
) -> Problem:
    """Read a problem file, `.json` or `.json.gz`, and recognise which of the two formats it is.

    `begin` is called as soon as it turns out to be a large sharding problem, most of it still to be read.

    Raises:
        ProblemError: The file is missing, truncated, of neither format, or inconsistent.
        OutOfTimeError: It was time to stop.
    """
    path = Path(path)
    data = _read_bytes(path, should_stop)
    with uncollected():
        return parse_problem(data, path.name, should_stop, begin)


def parse_problem(
    data: bytes,
    name: str = "problem",
    should_stop: ShouldStop = never,
    begin: Callable[[], None] = _nothing,
) -> Problem:
    """The problem held in JSON bytes; `name` stands in error messages.

    Raises:
        ProblemError: The data are truncated, of neither format, or inconsistent.
        OutOfTimeError: It was time to stop.
    """
    with contextlib.suppress(*_UNREADABLE):
        # Going once through a hundred megabytes is as much as there is time for with a limit of seconds.
        body = msgspec.json.decode(data, type=_ShardingFile).problem
        return _sharding(body, name, should_stop, begin)
    try:
        keys = msgspec.json.decode(data, type=dict[str, msgspec.Raw])
    except _UNREADABLE as error:
        raise ProblemError(f"{name}: not a JSON object ({error}); is the file whole?") from error
    try:
        if "problem" in keys:
            body = msgspec.json.decode(data, type=_ShardingFile).problem
            return _sharding(body, name, should_stop, begin)
        if "maxFPGAs" in keys:
            return _placement(msgspec.json.decode(data, type=_PlacementFile), name)
    except _UNREADABLE as error:
        raise ProblemError(f"{name}: {error}") from error
    raise ProblemError(
        f"{name}: neither a sharding problem (key `problem`) nor a placement problem "
        f"(key `maxFPGAs`); its keys are {', '.join(sorted(keys)[:8]) or 'none'}"
    )


def _look_at(should_stop: ShouldStop) -> None:
    if should_stop():
        raise OutOfTimeError


def _read_bytes(path: Path, should_stop: ShouldStop) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ProblemError(f"{path}: cannot be read: {error.strerror}") from error
    if not data.startswith(b"\x1f\x8b"):
        return data
    pieces = []
    try:
        with gzip.open(io.BytesIO(data)) as unpacked:
            while piece := unpacked.read(_BYTES_AT_A_TIME):
                _look_at(should_stop)
                pieces.append(piece)
    except (EOFError, OSError, zlib.error) as error:
        raise ProblemError(f"{path}: damaged gzip data ({error}); is the file whole?") from error
    return b"".join(pieces)


def _sharding(
    body: _ShardingBody, name: str, should_stop: ShouldStop, begin: Callable[[], None]
) -> ShardingProblem:
    nodes, edges = body.nodes, body.edges
    node_costs = _rows(nodes.costs, lambda v: f"{name}: costs of node {v}", should_stop)
    if len(memoryview(edges.costs)) >= _LARGE_BYTES:
        # Not sooner: whoever compiles has the compiler for himself, and reading needed it just now.
        begin()
    usages = _rows(nodes.usages, lambda v: f"{name}: usages of node {v}", should_stop)
    edge_costs = _rows(edges.costs, lambda e: f"{name}: edge {e} costs", should_stop)
    _check_nodes(node_costs, usages, len(nodes.intervals), name)
    for v, (first, last) in enumerate(nodes.intervals):
        if last < first:
            raise ProblemError(
                f"{name}: node {v} has the interval [{first}, {last}], which ends before it begins"
            )
    _check_edges(edges.nodes, edge_costs, sizes_of(node_costs), name)
    if body.usage_limit is not None:
        _require_finite((body.usage_limit,), f"{name}: usage_limit")
        if body.usage_limit < 0:
            raise ProblemError(f"{name}: usage_limit is negative: {body.usage_limit}")
    return ShardingProblem(
        name=body.name or name,
        intervals=tuple(nodes.intervals),
        node_costs=node_costs,
        usages=usages,
        edge_nodes=tuple(map(tuple, edges.nodes)),
        edge_costs=edge_costs,
        usage_limit=body.usage_limit,
    )


def _rows(raw: msgspec.Raw, where: Callable[[int], str], should_stop: ShouldStop) -> Rows:
    """Rows of finite numbers; `where` tells an error where it is, given the number of the row."""
    text = memoryview(raw)
    if COMPILED and len(text) >= _LARGE_BYTES:
        rows = parse_rows(text, should_stop)
        if rows is not None:
            return rows
    rows_read: list[_Row] = []
    for place, row in in_time(enumerate(_RAW_ROWS.decode(raw)), should_stop):
        try:
            numbers = _ROW.decode(row)
        except _UNREADABLE as error:
            raise ProblemError(f"{where(place)}: {error}") from error
        _require_finite(numbers, where(place))
        rows_read.append(numbers)
    return tuple(rows_read)


def _check_nodes(node_costs: Rows, usages: Rows, num_intervals: int, name: str) -> None:
    count = len(node_costs)
    if num_intervals != count or len(usages) != count:
        raise ProblemError(
            f"{name}: nodes.costs has {count} entries, nodes.intervals {num_intervals}, "
            f"nodes.usages {len(usages)}; they must agree"
        )
    arities, widths = sizes_of(node_costs), sizes_of(usages)
    if count and arities.min() == 0:
        raise ProblemError(f"{name}: node {arities.argmin()} has no strategy")
    if (unlike := np.flatnonzero(arities != widths)).size:
        v = unlike[0]
        raise ProblemError(f"{name}: node {v} has {arities[v]} costs but {widths[v]} usages")
    start, amounts = flat(usages)
    if (negative := np.flatnonzero(amounts < 0)).size:
        v = int(np.searchsorted(start, negative[0], side="right")) - 1
        raise ProblemError(f"{name}: node {v} has a negative memory usage {amounts[negative[0]]:g}")


def _check_edges(edge_nodes: list[list[int]], edge_costs: Rows, arities: Int64Array, name: str) -> None:
    if len(edge_nodes) != len(edge_costs):
        raise ProblemError(
            f"{name}: edges.nodes has {len(edge_nodes)} entries, edges.costs {len(edge_costs)}"
        )
    widths, arity, count = sizes_of(edge_costs).tolist(), arities.tolist(), len(arities)
    for edge, (ends, width) in enumerate(zip(edge_nodes, widths, strict=True)):
        if len(ends) not in (1, 2):
            raise ProblemError(
                f"{name}: edge {edge} joins {len(ends)} nodes; only one or two are understood"
            )
        size = 1
        for node in ends:
            if not 0 <= node < count:
                there_are = f"nodes are 0..{count - 1}" if count else "there are none"
                raise ProblemError(f"{name}: edge {edge} names node {node}, but {there_are}")
            size *= arity[node]
        if size != width:
            raise ProblemError(
                f"{name}: edge {edge} has {width} costs, its nodes make {size} combinations"
            )


def _require_finite(numbers: _Row, where: str) -> None:
    # JSON has no NaN, but 1e999 reads as infinity, and whole numbers may have any length.
    try:
        finite = math.isfinite(math.fsum(map(abs, numbers)))
    except OverflowError:
        finite = False
    if not finite:
        raise ProblemError(f"{where}: some number is infinite or too large to be added up")


def _placement(body: _PlacementFile, name: str) -> PlacementProblem:
    position: dict[NodeId, int] = {}
    operators: list[Operator] = []
    for node in body.nodes:
        if node.id in position:
            raise ProblemError(f"{name}: two nodes have the id {node.id!r}")
        position[node.id] = len(operators)
        for label, value in (
            ("cpuLatency", node.cpu_latency),
            ("fpgaLatency", node.fpga_latency),
            ("size", node.size),
        ):
            _require_amount(value, f"{name}: {label} of node {node.id!r}")
        operators.append(
            Operator(
                node_id=node.id,
                cpu_latency=node.cpu_latency,
                accelerator_latency=node.fpga_latency,
                on_accelerator=bool(node.supported_on_fpga),
                size=node.size,
                colour=f"own {node.id!r}" if node.color_class is None else repr(node.color_class),
                backward=bool(node.is_backward_node),
            )
        )
    _require_amount(body.memory_limit, f"{name}: maxSizePerFPGA")
    transfers = _placement_transfers(body.edges, position, name)
    return PlacementProblem(
        name=name,
        operators=tuple(operators),
        transfers=transfers,
        num_accelerators=body.num_accelerators,
        num_cpus=body.num_cpus,
        memory_limit=body.memory_limit,
    )


def _placement_transfers(
    edges: list[_PlacementEdge], position: Mapping[NodeId, int], name: str
) -> tuple[Transfer, ...]:
    transfers: dict[tuple[int, int], Transfer] = {}
    cost_of: dict[int, float] = {}
    for edge in edges:
        for end in (edge.source_id, edge.dest_id):
            if end not in position:
                raise ProblemError(f"{name}: an edge names the unknown node {end!r}")
        _require_amount(edge.cost, f"{name}: cost of edge {edge.source_id!r} -> {edge.dest_id!r}")
        source, target = position[edge.source_id], position[edge.dest_id]
        if source == target:
            raise ProblemError(f"{name}: node {edge.source_id!r} has an edge to itself")
        # The format prices a node's output, not an edge: unequal copies contradict each other.
        if not math.isclose(cost_of.setdefault(source, edge.cost), edge.cost, rel_tol=1e-9):
            raise ProblemError(
                f"{name}: edges out of node {edge.source_id!r} cost {cost_of[source]} and "
                f"{edge.cost}; one output has one transfer cost"
            )
        transfers[source, target] = Transfer(source, target, cost_of[source])
    return tuple(transfers.values())


def _require_amount(value: float, where: str) -> None:
    if not math.isfinite(value) or value < 0:
        raise ProblemError(f"{where} is {value}; it must be finite and not negative")


def _finite(rows: Rows) -> tuple[Int64Array, FloatArray]:
    start, values = flat(rows)
    impossible = values >= IMPOSSIBLE_COST
    # The largest possible whole numbers round to the limit itself.
    if (values == IMPOSSIBLE_COST).any():
        impossible &= at_least(rows, IMPOSSIBLE_COST)
    values[impossible] = np.inf
    return start, values
