"""The sharding programme of a stage: how a tensor group computes each op, at the least time.

Minimise, over one strategy s_v for every op v, one form f_x for every value x that is read several
times, and one slice w_p for every weight p (on a mesh of two axes each is a pair, one along each axis):

    sum_v  t_v(s_v)                     the op's time at the member that takes longest
  + sum_p  u_p(w_p)                     the optimiser's time for the slice, and what holding it costs
  + sum_e  c_e(layout made, layout wanted)    what is sent where the two do not meet, forward and back

Repeated blocks are folded: equal ops of equal blocks share a variable, so that 32 layers cost what one
does, and the edge from a block to its successor becomes an edge of the block to itself. Everything is
in whole nanoseconds, so that bounds round up and the solver's proof is exact.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from math import prod

import numpy as np
import numpy.typing as npt

from graphpar.cost_models.group_times import ShardingOptions, TensorGroup
from graphpar.cost_models.mesh_times import MeshTimes
from graphpar.cost_models.sharding_structure import Key, Structure, allowed_strategies, places
from graphpar.cost_models.whole_ops import whole_ops
from graphpar.errors import VerifyError
from graphpar.ir.chain import Chain
from graphpar.ir.graph import Graph
from graphpar.ir.mesh import Layouts, Ways
from graphpar.ir.ops import Op
from graphpar.ir.shards import Layout
from graphpar.ir.strategies import Strategy, StrategyTables, value_of
from graphpar.partition.number_rows import NumberRows
from graphpar.partition.problems import IMPOSSIBLE_COST, ShardingProblem
from graphpar.partition.sharding.solve import solve_sharding
from graphpar.partition.types import WholeOp

_SOLVE_LIMITS_S = (20.0, 120.0)
"""Folded blocks take a fraction of a second; on a busy machine the first call may need longer."""
_PROVEN_PAIRS = 10_000
"""Programmes up to this many pairs of alternatives are proven at once: one that is not, in the first
limit, waited for its loops to be compiled, and what it has then is no choice to keep."""


_WORD_GAP = 1e-3
"""What a programme's answer may be above its bound without a word: a tenth of the gap of plans."""


@dataclass(frozen=True)
class Sharding:
    """How a group computes a stage: the arguments of the pass that rewrites it, and the certificate.

    Attributes:
        chosen: For each op its strategy.
        forms: For each value that is read several times the layout it is brought into first.
        weights: For each weight the slice that members hold, or "whole".
        objective_s: Seconds of one microbatch, both directions, its part of the optimiser's, and the
            price of memory.
        bound_s: No choice is faster under the same costs; None where nothing is known.
        whole: What every member computes whole, and why.
        inner: The same along the second axis of a mesh; None for a group of one axis.
    """

    chosen: Mapping[str, Strategy]
    forms: Mapping[str, Layout]
    weights: Mapping[str, Layout]
    objective_s: float = 0.0
    bound_s: float | None = None
    whole: tuple[WholeOp, ...] = ()
    inner: "Sharding | None" = None

    @property
    def axes(self) -> "tuple[Sharding, ...]":
        """What it says along each axis, the outer one first."""
        return (self, *(self.inner.axes if self.inner is not None else ()))

    def ways(self, name: str) -> Ways | None:
        """How an op of the stage is computed."""
        if name not in self.chosen:
            return None
        if name not in self._ways:
            self._ways[name] = Ways(tuple(axis.chosen[name] for axis in self.axes))
        return self._ways[name]

    @cached_property
    def _ways(self) -> dict[str, Ways]:
        return {}

    def held(self, name: str) -> Layouts:
        """How a weight is held."""
        return tuple(axis.weights.get(name, "whole") for axis in self.axes)

    def form(self, name: str, made: Layouts) -> Layouts:
        """The layouts into which a value is brought for all its readers, where it is made in some."""
        axes = zip(self.axes, made, strict=True)
        return tuple(axis.forms.get(name, layout) for axis, layout in axes)


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
    programme = ShardingProgramme.of(graph, stage, chain, group, options)
    found = programme.sharding(programme.solve(options))
    return replace(found, whole=programme.whole_ops(found))


def least_seconds(
    graph: Graph,
    stage: int,
    chain: Chain,
    group: TensorGroup,
    options: ShardingOptions,
    strategies: StrategyTables | None = None,
    times: MeshTimes | None = None,
) -> float:
    """No sharding has a lower objective, whatever it sends: every op and weight alone at its cheapest.

    Args:
        graph: A lowered graph.
        stage: Which stage of it.
        chain: Units of the captured graph; ops of equal kinds take equally long.
        group: Who computes it.
        options: Microbatch size and the like.
        strategies: Those of the graph, where they were asked for before.
        times: What the group takes at that microbatch size, where that was asked for before.
    """
    times = times or MeshTimes(graph, group, options)
    tables = allowed_strategies(strategies or StrategyTables(graph), group, options)
    place, least = places(chain), dict[Key, float]()
    ops = [op for op in graph.ops if op.attr("stage") == stage and op.target != "getitem"]
    read = {name for op in ops for name in op.operands()}
    hold_s = options.hold_factor / group.link.bytes_per_s
    if options.cuts_weights:
        hold_s *= prod(max(group.along(axis).shares) for axis in range(len(group.axes)))
    total = 0.0
    for op in ops:
        rows = [table[op.name] for table in tables]
        key = place.get(op.name, op.name), tuple(map(id, rows))
        if key not in least:
            # Strategies with equal shares take equally long; of samples there are only whole ones.
            unlike = [list({times.alone.shares_of(s): s for s in row}.values()) for row in rows]
            least[key] = min(sum(times.parts(op, Ways(ways))) for ways in product(*unlike))
        total += least[key]
    for op in graph.sources("parameter"):
        if op.name in read:
            total += hold_s * times.alone.weight_bytes(op, 1.0)
    return total


_Floats = npt.NDArray[np.float64]


class ShardingProgramme:
    """The programme of one stage at one microbatch size, which may be solved at several prices of memory.

    Args:
        structure: What is decided.
        times: What that costs.
    """

    def __init__(self, structure: Structure, times: MeshTimes) -> None:
        self.structure, self.times = structure, times

    @classmethod
    def of(
        cls,
        graph: Graph,
        stage: int,
        chain: Chain,
        group: TensorGroup,
        options: ShardingOptions,
        strategies: StrategyTables | None = None,
    ) -> "ShardingProgramme":
        """The programme of a stage of a lowered graph (see `choose_sharding`).

        Options of `solve` may differ in the price and limit of memory alone. Strategies are those of the
        graph, where they were asked for before.
        """
        times = MeshTimes(graph, group, options)
        return cls(Structure(graph, stage, chain, times, strategies or StrategyTables(graph)), times)

    # --- costs ---

    @cached_property
    def _seconds(self) -> _Floats:
        """Of every alternative, one variable's after the other's."""
        found = [np.zeros(size) for size in self.structure.sizes]
        for number, computed in self.structure.computed.items():
            first, alike = computed.kinds
            seconds = np.array([self.times.seconds(computed.op, ways) for ways in first])
            found[number] += computed.count * seconds[alike]
        for number, weights in self.structure.held.items():
            for held in weights:
                steps = [self.times.optimizer_seconds(held.op, layouts) for layouts in held.layouts]
                found[number] += held.count * np.array(steps)
        for (number, conversion, is_own), count in self.structure.alone.items():
            table = self._sending[conversion][self.structure.converted[conversion].numbers]
            found[number] += count * (table.diagonal() if is_own else table[0])
        return np.concatenate(found)

    @cached_property
    def _sending(self) -> list[_Floats]:
        """By conversion the seconds of each way to send, and of none."""
        none = float(IMPOSSIBLE_COST)
        return [
            np.append(self.times.sending_seconds(converted.op, converted.ways), none)
            for converted in self.structure.converted
        ]

    @cached_property
    def _edge_costs(self) -> NumberRows:
        """In whole nanoseconds; they do not depend on prices of memory."""
        every, total = np.concatenate([*self._sending, np.zeros(0)]), np.zeros(0)
        for ends, ways, counts in self.structure.sent_over_edges:
            if not total.size:
                total = np.zeros(len(ends))
            total[ends] += counts * every[ways]
        return NumberRows(self.structure.first_of_edges, _nanoseconds(total))

    def _bytes_of_weights(self, of: Callable[[Op, Layouts], float]) -> _Floats:
        found = [np.zeros(size) for size in self.structure.sizes]
        for number, weights in self.structure.held.items():
            for held in weights:
                found[number] += held.count * np.array([of(held.op, each) for each in held.layouts])
        return np.concatenate(found)

    @cached_property
    def _held(self) -> _Floats:
        """Bytes held of every alternative."""
        return self._bytes_of_weights(self.times.weight_bytes)

    @cached_property
    def _priced(self) -> _Floats:
        """Bytes held as they are priced (see `MeshTimes.priced_bytes`)."""
        return self._bytes_of_weights(self.times.priced_bytes)

    @cached_property
    def _kept(self) -> _Floats:
        """Bytes kept for backward; most programmes are solved without."""
        found = [np.zeros(size) for size in self.structure.sizes]
        for number, computed in self.structure.computed.items():
            own, values = self.times.kept_values(computed.op)
            if own:
                first, alike = computed.kinds
                shares = np.array([self.times.largest_share(ways) for ways in first])
                found[number] += computed.count * own * shares[alike]
            for slot, num_bytes in values:
                found[number] += computed.count * num_bytes * self.structure.largest_parts(number, slot)
        return np.concatenate(found)

    # --- solving ---

    def problem(self, options: ShardingOptions) -> ShardingProblem:
        """The problem in the terms of the solver, in nanoseconds, of alternatives that are possible."""
        hold_s, keep_s = (
            factor / self.structure.group.link.bytes_per_s
            for factor in (options.hold_factor, options.keep_factor)
        )
        keeps = bool(options.keep_factor) or options.memory_bytes is not None
        kept = self._kept if keeps else np.zeros(1)
        possible, sizes = self.structure.possible, self.structure.sizes
        first = np.concatenate([[0], np.cumsum(sizes)])
        taken = np.concatenate([begin + own for begin, own in zip(first, possible, strict=False)])
        start = np.concatenate([[0], np.cumsum([len(own) for own in possible])]).astype(np.int64)
        costs = _nanoseconds(self._seconds + hold_s * self._priced + keep_s * kept)
        usages = np.rint(self._held + kept).astype(np.int64)
        return ShardingProblem(
            name=f"stage {self.structure.stage} of {self.structure.graph.name}",
            intervals=tuple((0, 1) for _ in sizes),
            node_costs=NumberRows(start, costs[taken]),
            usages=NumberRows(start, usages[taken]),
            edge_nodes=tuple(self.structure.joined),
            edge_costs=self._edge_costs,
            usage_limit=options.memory_bytes,
        )

    def solve(self, options: ShardingOptions) -> "Found":
        """The best choice at the prices of some options."""
        if not self.structure.sizes:
            return Found((), 0.0, None)
        problem = self.problem(options)
        enough = {"optimal", "infeasible"} | (
            {"feasible"} if problem.num_pairs > _PROVEN_PAIRS else set()
        )
        for limit_s in _SOLVE_LIMITS_S:
            found = solve_sharding(problem, time_limit_s=limit_s)
            if found.status in enough:
                break
        if found.answer is None or found.objective is None:
            raise VerifyError(
                f"The sharding programme of stage {self.structure.stage} of {self.structure.graph.name} "
                f"has no answer ({found.status}); whole everywhere is one unless memory_bytes forbids "
                "it; on a machine that is busy with other things, try again."
            )
        if found.gap is None or found.gap > _WORD_GAP:
            how = "nothing is proven" if found.gap is None else f"proven within {100 * found.gap:.2g} %"
            warnings.warn(
                f"How a group of {len(self.structure.group.devices)} devices shares stage "
                f"{self.structure.stage} of {self.structure.graph.name} may not be the fastest way: "
                f"{how} after {found.seconds:.0f} s. The plan's gap takes it as given.",
                stacklevel=2,
            )
        bound_s = found.bound * 1e-9 if found.bound is not None else None
        choice = zip(self.structure.possible, found.answer, strict=True)
        return Found(tuple(int(own[i]) for own, i in choice), found.objective * 1e-9, bound_s)

    def sharding(self, found: "Found") -> Sharding:
        """What a choice means for every op, value and weight."""
        made, pick = self.structure, found.choice
        chosen = {name: rows[pick[made.number_of[name]]] for name, rows in made.table.items()}
        forms = {name: rows[pick[made.number_of[f"{name} form"]]] for name, rows in made.forms.items()}
        weights = {name: rows[pick[made.number_of[name]]] for name, rows in made.weights.items()}
        along: Sharding | None = None
        for axis in reversed(range(len(made.whole))):
            along = Sharding(
                {name: ways.along[axis] for name, ways in chosen.items()},
                {name: layouts[axis] for name, layouts in forms.items()},
                {name: layouts[axis] for name, layouts in weights.items()},
                objective_s=found.objective_s if axis == 0 else 0.0,
                bound_s=found.bound_s if axis == 0 else None,
                inner=along,
            )
        assert along is not None
        return along

    def whole_ops(self, sharding: Sharding) -> tuple[WholeOp, ...]:
        """What every member computes whole under a sharding, and why."""
        made = self.structure
        chosen = {name: Ways(tuple(axis.chosen[name] for axis in sharding.axes)) for name in made.table}
        return whole_ops(made.ops, made.graph, made.table, chosen, self.times)


@dataclass(frozen=True)
class Found:
    """A choice of one alternative for each variable, with its objective and bound as in `Sharding`."""

    choice: tuple[int, ...]
    objective_s: float
    bound_s: float | None


def _nanoseconds(seconds: _Floats) -> npt.NDArray[np.int64]:
    whole: npt.NDArray[np.int64] = np.minimum(np.rint(seconds * 1e9), IMPOSSIBLE_COST).astype(np.int64)
    return whole


def conversions_of(sharding: Sharding, graph: Graph, op: Op) -> Iterator[tuple[str, Layouts, Layouts]]:
    """What has to be converted for an op to run: value, layouts it is in, layouts it is wanted in."""
    ways = sharding.ways(op.name)
    assert ways is not None
    for name, wanted in zip(op.operands(), ways.operands, strict=True):
        source, index = value_of(graph, name)
        maker = sharding.ways(source)
        made = maker.results[index] if maker is not None else sharding.held(name)
        yield name, sharding.form(name, made), wanted
