"""The sharding programme of a stage: how a tensor group computes each op, at the least time.

Minimise, over one strategy s_v for every op v, one form f_x for every value x that is read several
times, and one slice w_p for every weight p:

    sum_v  t_v(s_v)                     the op's time at the member that takes longest
  + sum_p  u_p(w_p)                     the optimiser's time for the slice, and what holding it costs
  + sum_e  c_e(layout made, layout wanted)    what is sent where the two do not meet, forward and back

Repeated blocks are folded: equal ops of equal blocks share a variable, so that 32 layers cost what one
does, and the edge from a block to its successor becomes an edge of the block to itself. Everything is
in whole nanoseconds, so that bounds round up and the solver's proof is exact.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from graphpar.cost import LinkCost
from graphpar.cost_models.layout import find_layout
from graphpar.cost_models.opcost import work_of
from graphpar.cost_models.rates import CatalogueRates, Rates
from graphpar.cost_models.work import Kernel
from graphpar.device import Device
from graphpar.errors import VerifyError
from graphpar.ir.chain import Chain
from graphpar.ir.conversions import CollectiveName, conversion
from graphpar.ir.graph import Graph
from graphpar.ir.ops import SOURCES, Op
from graphpar.ir.shards import Layout, Split
from graphpar.ir.strategies import Strategy, carries_gradient, strategies_of, value_of
from graphpar.partition.problems import IMPOSSIBLE_COST, ShardingProblem
from graphpar.partition.shard import solve_sharding

_SOLVE_LIMITS_S = (20.0, 120.0)
"""Folded blocks take a fraction of a second; on a busy machine the first call may need longer."""

_CPU_CALL_S = 1e-4
"""Processor time of the calling thread in a gloo collective of few bytes, its autograd node included:
75 to 130 microseconds for a sum, twice that for an exchange, on an AMD EPYC, torch 2.13, 2026-11-25."""
_CALLS: dict[CollectiveName, int] = {
    "all_reduce": 1,
    "all_gather": 2,
    "reduce_scatter": 2,
    "all_to_all": 2,
}
_COPIED: dict[CollectiveName, float] = {
    "all_reduce": 0.5, "all_gather": 1.0, "reduce_scatter": 1.0, "all_to_all": 1.0
}  # fmt: skip
"""How much of the value a member copies for itself: to slices and back, or for a sum half of it."""


@dataclass(frozen=True)
class TensorGroup:
    """Who shares a stage.

    Attributes:
        devices: The members.
        shares: Each member's share of what is cut.
        link: The worst link between two of them.
    """

    devices: tuple[Device, ...]
    shares: tuple[float, ...]
    link: LinkCost

    @property
    def size(self) -> int:
        """Members."""
        return len(self.devices)

    def seconds(self, name: CollectiveName | None, num_bytes: float) -> float:
        """Time of a collective over a value of so many bytes: a ring, messages of 1/n of it.

        An all-to-all of slices sends 1/n of each slice to each member.
        """
        if name is None:
            return 0.0
        turns = self.size - 1
        part = num_bytes / self.size / (self.size if name == "all_to_all" else 1)
        return (
            (2 if name == "all_reduce" else 1)
            * turns
            * (self.link.latency_s + part / self.link.bytes_per_s)
        )


@dataclass(frozen=True)
class Sharding:
    """How a group computes a stage: the arguments of the pass that rewrites it, and the certificate.

    Attributes:
        chosen: For each op its strategy.
        forms: For each value that is read several times the layout it is brought into first.
        weights: For each weight the slice that members hold, or "whole".
        objective_s: Seconds of one microbatch, both directions, its part of the optimiser's, and the
            price of memory.
        bound_s: No choice is faster under the same costs; None where the search was cut short.
    """

    chosen: Mapping[str, Strategy]
    forms: Mapping[str, Layout]
    weights: Mapping[str, Layout]
    objective_s: float = 0.0
    bound_s: float | None = None


@dataclass(frozen=True)
class ShardingOptions:
    """What the programme has to know besides graph and group.

    Attributes:
        samples: Samples in a microbatch.
        microbatches: Microbatches between two optimiser steps.
        training: Whether there is a backward.
        state_ratio: Bytes of optimiser state per byte of weights.
        fixed: Slices of weights by label that are given: those an earlier job holds.
        cuts_weights: False keeps every weight whole, for optimisers that must see whole ones.
        memory_bytes: Most bytes that weights, gradients, optimiser state and the activations of one
            microbatch may take at a member; None for no limit.
        hold_factor: Price of memory: a byte of weights, gradients and optimiser state that a member
            holds counts as so many bytes sent. 0 lets time alone decide, which often keeps weights
            whole and cuts the sequence.
    """

    samples: int
    microbatches: int = 4
    training: bool = True
    state_ratio: float = 2.0
    fixed: Mapping[str, Layout] = field(default_factory=dict)
    cuts_weights: bool = True
    memory_bytes: float | None = None
    hold_factor: float = 0.0


def choose_sharding(
    graph: Graph, stage: int, chain: Chain, group: TensorGroup, options: ShardingOptions
) -> Sharding:
    """The fastest way for a group to compute one stage of a lowered graph.

    Args:
        graph: A lowered graph.
        stage: Which stage of it.
        chain: Units of the captured graph; ops of equal kinds are decided together.
        group: Who computes it.
        options: Microbatch size and the like.
    """
    return _Programme(graph, stage, chain, group, options).solve()


Key = Hashable


@dataclass
class _Variable:
    """One decision: its alternatives with their costs in nanoseconds and their bytes."""

    number: int
    costs: list[float]
    usage: list[float]


class _Programme:
    """Builds and reads one problem."""

    def __init__(
        self, graph: Graph, stage: int, chain: Chain, group: TensorGroup, options: ShardingOptions
    ) -> None:
        self.graph, self.stage, self.group, self.options = graph, stage, group, options
        self.ops = [
            op
            for op in graph.ops
            if (op.attr("stage") == stage and op.target != "getitem") or op.target == "output"
        ]
        inside = {op.name for op in self.ops}
        table = strategies_of(graph, group.shares)
        self.table = {name: self._allowed(rows) for name, rows in table.items() if name in inside}
        self.place = {
            name: (unit.kind, index) for unit in chain.units for index, name in enumerate(unit.ops)
        }
        self.times = OpTimes(graph, group, options)
        self.variables: dict[Key, _Variable] = {}
        self.matrices: dict[tuple[int, int], list[list[float]]] = {}
        self.key_of: dict[str, Key] = {}
        self.weights: dict[str, tuple[Layout, ...]] = {}
        self.forms: dict[str, tuple[Layout, ...]] = {}
        self.readers: dict[str, list[tuple[Op, int]]] = defaultdict(list)
        self._build()

    # --- building ---

    def _allowed(self, rows: Sequence[Strategy]) -> tuple[Strategy, ...]:
        if self.options.training:
            return tuple(rows)
        return tuple(s for s in rows if "copied" not in s.results)

    def _build(self) -> None:
        for op in self.ops:
            rows = self.table[op.name]
            self._add(op.name, (self._place(op), rows), [self.times.seconds(op, s) for s in rows],
                      [self.times.kept_bytes(op, s) for s in rows])  # fmt: skip
            for slot, name in enumerate(op.operands()):
                self.readers[name].append((op, slot))
        for op in self.graph.ops:
            readers = self.readers.get(op.name, [])
            if op.target in ("parameter", "buffer") and readers:
                self._add_weight(op, readers)
        for name, readers in self.readers.items():
            self._connect(name, readers)

    def _place(self, op: Op) -> Key:
        return self.place.get(op.name, op.name)

    def _add(self, name: str, key: Key, costs: Sequence[float], usage: Sequence[float]) -> None:
        """Costs of all that share a variable add up; so do their bytes."""
        self.key_of[name] = key
        found = self.variables.get(key)
        if found is None:
            number = len(self.variables)
            found = self.variables[key] = _Variable(number, [0.0] * len(costs), [0.0] * len(costs))
        found.costs = [a + b for a, b in zip(found.costs, costs, strict=True)]
        found.usage = [a + b for a, b in zip(found.usage, usage, strict=True)]

    def _add_weight(self, op: Op, readers: Sequence[tuple[Op, int]]) -> None:
        label = str(op.args[0])
        wanted: list[Layout] = ["whole"]
        if label in self.options.fixed:
            wanted = [self.options.fixed[label]]
        elif self.options.cuts_weights and op.target == "parameter":
            wanted += [
                s.operands[slot]
                for reader, slot in readers
                for s in self.table[reader.name]
                if isinstance(s.operands[slot], Split)
            ]
        layouts = tuple(dict.fromkeys(wanted))
        self.weights[op.name] = layouts
        first, slot = readers[0]
        key = ("weight", self._place(first), slot, layouts)
        costs = [
            self.times.optimizer_seconds(op, layout) + self.times.holding_seconds(op, layout)
            for layout in layouts
        ]
        self._add(op.name, key, costs, [self.times.weight_bytes(op, layout) for layout in layouts])

    def _connect(self, name: str, readers: Sequence[tuple[Op, int]]) -> None:
        source, index = value_of(self.graph, name)
        made = self._layouts(source, index)
        if len(readers) == 1 or self.graph[name].target in SOURCES:
            for reader, slot in readers:
                self._edge(source, made, reader, slot, name)
            return
        wanted = [s.operands[slot] for r, slot in readers for s in self.table[r.name]]
        forms = tuple(dict.fromkeys((*made, *wanted)))
        self.forms[name] = forms
        form = f"{name} form"
        self._add(form, ("form", self.key_of.get(source, source), index, forms), [0.0] * len(forms),
                  [0.0] * len(forms))  # fmt: skip
        self._matrix(source, form, [[self._convert(name, a, b) for b in forms] for a in made])
        for reader, slot in readers:
            self._edge(form, forms, reader, slot, name)

    def _layouts(self, source: str, index: int) -> tuple[Layout, ...]:
        if source in self.table:
            return tuple(s.results[index] for s in self.table[source])
        return self.weights.get(source, ("whole",))

    def _edge(self, source: str, made: Sequence[Layout], reader: Op, slot: int, name: str) -> None:
        rows = self.table[reader.name]
        matrix = [
            [
                self._convert(name, a, s.operands[slot])
                if reader.target != "gp.cast_weight" or _cast_as_held(a, s.operands[slot])
                else float(IMPOSSIBLE_COST)
                for s in rows
            ]
            for a in made
        ]
        self._matrix(source, reader.name, matrix)

    def _convert(self, name: str, made: Layout, wanted: Layout) -> float:
        return self.times.conversion_seconds(self.graph[name], made, wanted)

    def _matrix(self, left: str, right: str, matrix: list[list[float]]) -> None:
        if left not in self.key_of:
            found = self.variables[self.key_of[right]]
            found.costs = [a + b for a, b in zip(found.costs, matrix[0], strict=True)]
            return
        a, b = (self.variables[self.key_of[side]] for side in (left, right))
        if a is b:
            a.costs = [cost + matrix[i][i] for i, cost in enumerate(a.costs)]
            return
        key = (a.number, b.number)
        old = self.matrices.get(key)
        self.matrices[key] = (
            matrix
            if old is None
            else [[x + y for x, y in zip(r, s, strict=True)] for r, s in zip(old, matrix, strict=True)]
        )

    # --- solving ---

    def problem(self) -> ShardingProblem:
        """The problem in the terms of the solver, in nanoseconds."""
        return ShardingProblem(
            name=f"stage {self.stage} of {self.graph.name}",
            intervals=tuple((0, 1) for _ in self.variables),
            node_costs=tuple(tuple(map(_nanoseconds, v.costs)) for v in self.variables.values()),
            usages=tuple(tuple(map(round, v.usage)) for v in self.variables.values()),
            edge_nodes=tuple(self.matrices),
            edge_costs=tuple(
                tuple(_nanoseconds(x) for row in m for x in row) for m in self.matrices.values()
            ),
            usage_limit=self.options.memory_bytes,
        )

    def solve(self) -> Sharding:
        if not self.variables:
            return Sharding({}, {}, {})
        for limit_s in _SOLVE_LIMITS_S:
            found = solve_sharding(self.problem(), time_limit_s=limit_s)
            if found.status != "unknown":
                break
        if found.answer is None or found.objective is None:
            raise VerifyError(
                f"The sharding programme of stage {self.stage} of {self.graph.name} has no answer "
                f"({found.status}); whole everywhere is one unless memory_bytes forbids it; "
                "on a machine that is busy with other things, try again."
            )
        pick = {key: found.answer[v.number] for key, v in self.variables.items()}
        return Sharding(
            {name: rows[pick[self.key_of[name]]] for name, rows in self.table.items()},
            {name: forms[pick[self.key_of[f"{name} form"]]] for name, forms in self.forms.items()},
            {name: rows[pick[self.key_of[name]]] for name, rows in self.weights.items()},
            found.objective * 1e-9,
            found.bound * 1e-9 if found.bound is not None else None,
        )


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9) if seconds < IMPOSSIBLE_COST else IMPOSSIBLE_COST


class OpTimes:
    """Seconds and bytes of ops and conversions for one group.

    Args:
        graph: The lowered graph.
        group: Who computes.
        options: Microbatch size and the like.
        rates: Rates of each member; from the catalogue when left out, so that every rank of a job
            decides the same whatever was measured on its machine.
    """

    def __init__(
        self,
        graph: Graph,
        group: TensorGroup,
        options: ShardingOptions,
        rates: Callable[[Device], Rates] = CatalogueRates,
    ) -> None:
        self.graph, self.group, self.options = graph, group, options
        self.layout = find_layout(graph)
        self.rates = [rates(device) for device in group.devices]
        self.slowdowns = [device.slowdown for device in group.devices]
        self._whole: dict[tuple[str, int], list[tuple[float, float, float, float]]] = {}

    def parts(self, op: Op, strategy: Strategy) -> tuple[float, float]:
        """Forward and backward seconds at the member that takes longest."""
        if op.target in ("gp.send", "gp.recv", "output"):
            return 0.0, 0.0
        shares = strategy.shares or (1.0,) * self.group.size
        times = [
            (floor + (full - floor) * share, floor_b + (full_b - floor_b) * share)
            for (full, floor, full_b, floor_b), share in zip(self._members(op), shares, strict=True)
        ]
        return max(t[0] for t in times), max(t[1] for t in times)

    def seconds(self, op: Op, strategy: Strategy) -> float:
        """Seconds of an op in both directions, collectives inside it included."""
        total = sum(self.parts(op, strategy))
        return total + sum(self.inner_seconds(op, strategy))

    def inner_seconds(self, op: Op, strategy: Strategy) -> tuple[float, float]:
        """Collectives that are part of an op: a loss over cut classes exchanges a few numbers a row."""
        if strategy.special != "classes":
            return 0.0, 0.0
        rows = self.graph[op.operands()[1]].type.bytes(self.options.samples) / 8
        return 2 * self.group.seconds("all_reduce", 8.0 * rows), 0.0

    def _members(self, op: Op) -> list[tuple[float, float, float, float]]:
        """For each member seconds forward, the part no split shortens, and the same backward."""
        key = (op.name, self.options.samples)
        if key not in self._whole:
            work = work_of(op, self.graph, self.layout, self.options.samples)
            back = work.backward if self.options.training else ()
            rows = []
            for rate, slowdown in zip(self.rates, self.slowdowns, strict=True):
                ahead, empty = rate.seconds(work.forward), rate.seconds(_empty(work.forward))
                behind, hollow = (rate.seconds(ks, backward=True) for ks in (back, _empty(back)))
                rows.append(
                    tuple(slowdown * x for x in (ahead, min(empty, ahead), behind, min(hollow, behind)))
                )
            self._whole[key] = [(a, b, c, d) for a, b, c, d in rows]
        return self._whole[key]

    def conversion_parts(self, op: Op, made: Layout, wanted: Layout) -> tuple[float, float] | None:
        """Forward and backward seconds of bringing a value from one layout to another."""
        gradient = self.options.training and carries_gradient(self.graph, op.name)
        how = conversion(made, wanted, gradient, op.target == "parameter")
        if how is None or not all(t is not None for t in op.types):
            return None if how is None or how.target else (0.0, 0.0)
        num_bytes = sum(t.bytes(self.options.samples) for t in op.types if t is not None)
        ahead, behind = (
            self.group.seconds(name, num_bytes) + self._host_seconds(name, num_bytes)
            for name in (how.forward, how.backward)
        )
        if op.target == "parameter" and how.target == "gp.copy_to_group":
            behind /= self.options.microbatches  # summed once, after the last microbatch
        return ahead, behind

    def _host_seconds(self, name: CollectiveName | None, num_bytes: float) -> float:
        """What a collective asks of a CPU itself: calls, and copies to where slices belong."""
        if name is None:
            return 0.0
        copied = Kernel("copy", num_bytes / 4, 2 * num_bytes * _COPIED[name])
        return max(
            (
                slowdown * (_CPU_CALL_S * _CALLS[name] + rate.seconds([copied]))
                for device, rate, slowdown in zip(
                    self.group.devices, self.rates, self.slowdowns, strict=True
                )
                if device.is_cpu
            ),
            default=0.0,
        )

    def conversion_seconds(self, op: Op, made: Layout, wanted: Layout) -> float:
        """Seconds in both directions; endless where there is no way."""
        found = self.conversion_parts(op, made, wanted)
        return float(IMPOSSIBLE_COST) if found is None else sum(found)

    def optimizer_seconds(self, op: Op, layout: Layout) -> float:
        """A microbatch's part of the optimiser's time for a weight."""
        if not self.options.training or not op.attr("grad"):
            return 0.0
        numel = op.type.numel(1)
        times = (
            rate.optimizer_seconds(numel * _share(layout, k), 1, self.options.state_ratio) * slow
            for k, (rate, slow) in enumerate(zip(self.rates, self.slowdowns, strict=True))
        )
        return max(times) / self.options.microbatches

    def holding_seconds(self, op: Op, layout: Layout) -> float:
        """The price of memory, in seconds.

        Any slice counts as the largest share: heads that do not divide are no reason to cut elsewhere.
        """
        cut = max(self.group.shares) if isinstance(layout, Split) else 1.0
        sent = self.options.hold_factor * self.weight_bytes(op, "whole") * cut
        return sent / self.group.link.bytes_per_s

    def weight_bytes(self, op: Op, layout: Layout) -> float:
        """Weight, gradient and optimiser state at the member with most of it."""
        trained = self.options.training and bool(op.attr("grad"))
        times = 2 + self.options.state_ratio if trained else 1.0
        return op.type.bytes(1) * times * max(_share(layout, k) for k in range(self.group.size))

    def kept_bytes(self, op: Op, strategy: Strategy) -> float:
        """Results kept for backward, at the member with most of them."""
        if not self.options.training or not op.attr("grad"):
            return 0.0
        return sum(
            kind.bytes(self.options.samples) * max(_share(layout, k) for k in range(self.group.size))
            for kind, layout in zip(op.types, strategy.results, strict=True)
            if kind is not None
        )


def _cast_as_held(held: Layout, wanted: Layout) -> bool:
    """Whether a weight is cast as it lies, and sent only afterwards, in the lower format.

    A bias that the first member alone reads is read through its cast; the others then take no part in
    whatever collective stood before.
    """
    return held == wanted or (held == "whole" and wanted == "copied")


def _share(layout: Layout, member: int) -> float:
    return layout.share(member) if isinstance(layout, Split) else 1.0


def _empty(kernels: Sequence[Kernel]) -> list[Kernel]:
    """The same launches with nothing to do but start."""
    return [replace(k, elements=1.0, bytes=1.0, flops=0.0, matrix=None, attention=None) for k in kernels]


def conversions_of(sharding: Sharding, graph: Graph, op: Op) -> Iterator[tuple[str, Layout, Layout]]:
    """What has to be converted for an op to run: value, layout it is in, layout it is wanted in."""
    for name, wanted in zip(op.operands(), sharding.chosen[op.name].operands, strict=True):
        source, index = value_of(graph, name)
        made: Layout = sharding.weights.get(name, "whole")
        if source in sharding.chosen:
            made = sharding.chosen[source].results[index]
        yield name, sharding.forms.get(name, made), wanted
