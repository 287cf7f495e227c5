"""The price of units shared by a tensor group, from the strategies that its sharding programme chose.

Strategies are chosen once, for the whole model as one stage and a typical microbatch, and then priced
at every size of the table. A stage of the plan is solved again with its true borders when it is
lowered; there a value that leaves the stage must be whole, which the price of a cut inside a run of
slices does not hold.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

from graphpar.calibration import Calibration
from graphpar.cost import CostTable, Mode, ModeCost
from graphpar.cost_models.again import kept_last
from graphpar.cost_models.group_times import KnownWork, Numbers, ShardingOptions, TensorGroup
from graphpar.cost_models.kept import Kept, kept_of
from graphpar.cost_models.memory import ALLOCATOR_SLACK, lower_copy_bytes
from graphpar.cost_models.mesh_times import MeshTimes, shares_held
from graphpar.cost_models.rates import rates_of
from graphpar.cost_models.sending import Sent
from graphpar.cost_models.sharding import Sharding, conversions_of
from graphpar.ir.chain import Chain
from graphpar.ir.graph import Graph
from graphpar.ir.mesh import Layouts, Ways
from graphpar.ir.ops import SOURCES, Op
from graphpar.ir.strategies import value_of


class TimesBySize:
    """What ops cost a group at every microbatch size; whatever memory is worth.

    Args:
        graph: The captured graph, lowered as one stage.
        group: Who shares.
        options: What shardings are solved for.
        calibration: Measured rates of this machine's processor.
        known: What was worked out of the graph, to be used and added to.
    """

    def __init__(
        self,
        graph: Graph,
        group: TensorGroup,
        options: ShardingOptions,
        calibration: Calibration | None = None,
        known: KnownWork | None = None,
    ) -> None:
        self.group = group
        self._any = MeshTimes(graph, group, options, lambda device: rates_of(device, calibration), known)
        self._at: dict[int, MeshTimes] = {}

    def at(self, samples: int) -> MeshTimes:
        """Those for microbatches of so many samples."""
        if samples not in self._at:
            self._at[samples] = self._any.at(samples)
        return self._at[samples]


class SharedUnits:
    """Units shared by a group in one way: what they cost, found once for every unit and size.

    Args:
        graph: The captured graph, lowered as one stage; of any batch.
        chain: Its units.
        sharding: How they are shared, as solved for this graph.
        times: Prices of the group at any microbatch size.
    """

    def __init__(self, graph: Graph, chain: Chain, sharding: Sharding, times: TimesBySize) -> None:
        self.graph, self.chain, self.sharding, self.times = graph, chain, sharding, times
        self._steps: dict[int, _Steps] = {}
        self._seconds: dict[tuple[int, int], _Seconds] = {}
        self._parts: dict[tuple[int, int], _Parts] = {}

    def mode(
        self, table: CostTable, members: tuple[int, ...], shares: tuple[float, ...] = (), lean: int = 0
    ) -> Mode:
        """One more mode of a table: its units shared by the group.

        Args:
            table: The table with the plain prices.
            members: The device class of each member.
            shares: The shares as the partition will name them; empty for equal ones.
            lean: The price of memory that the sharding was chosen at, as the partition will name it.
        """
        first = {kind: unit for unit, kind in reversed(list(enumerate(table.units)))}
        costs = tuple(
            self._unit(table, table.every_mode[members[0]].costs[kind], first[kind])
            for kind in range(len(table.costs))
        )
        group = self.times.group
        return Mode(members, costs, shares=shares, link=group.link, mesh=group.mesh, lean=lean)

    def _unit(self, table: CostTable, plain: ModeCost, number: int) -> ModeCost:
        at_sizes = [self._seconds_of(number, size) for size in table.sizes]
        parts = self._parts_of(number, table.sizes[0])
        gradients = plain.gradient_bytes[0]
        state = plain.optimizer_bytes[0] / gradients if gradients else 0.0
        trains, none = table.training, 0.0
        return ModeCost(
            forward_s=tuple(at.forward_s for at in at_sizes),
            backward_s=tuple(at.backward_s if trains else none for at in at_sizes),
            optimizer_s=parts.optimizer_s,
            weight_bytes=parts.weight_bytes,
            gradient_bytes=tuple(g if trains else none for g in parts.gradient_bytes),
            optimizer_bytes=tuple(g * state if trains else none for g in parts.gradient_bytes),
            saved_bytes=tuple(
                tuple(x * own.share + own.weight_bytes * ALLOCATOR_SLACK for x in plain.saved_bytes[0])
                if trains
                else (none,) * len(table.sizes)
                for own in parts.kept
            ),
            working_bytes=tuple(
                tuple(x * share for x in plain.working_bytes[0]) for share in parts.results
            ),
            again_s=tuple(at.again_s if trains else none for at in at_sizes),
            collective_s=tuple(at.sent_s + (at.sent_back_s if trains else none) for at in at_sizes),
            collective_again_s=tuple(at.sent_again_s if trains else none for at in at_sizes),
        )

    def _ops(self, number: int) -> list[Op]:
        unit = self.chain.units[number]
        return [self.graph[name] for name in unit.ops if self.graph[name].target != "getitem"]

    def _seconds_of(self, number: int, size: int) -> "_Seconds":
        """What a unit takes at a microbatch size."""
        if (number, size) not in self._seconds:
            times = self.times.at(size)
            if number not in self._steps:
                self._steps[number] = _steps(self.graph, self._ops(number), self.sharding, times)
            self._seconds[number, size] = self._steps[number].seconds(times)
        return self._seconds[number, size]

    def _parts_of(self, number: int, size: int) -> "_Parts":
        """What members hold and keep of a unit, shares of it being those at a microbatch size."""
        if (number, size) not in self._parts:
            graph, sharding, times = self.graph, self.sharding, self.times.at(size)
            ops, axes = self._ops(number), times.group.axes
            weights = _own_weights(graph, self.chain, number)
            trained = [op for op in weights if op.target == "parameter" and op.attr("grad")]
            steps = (times.optimizer_seconds(op, sharding.held(op.name)) for op in trained)
            earlier = {name for unit in self.chain.units[:number] for name in unit.ops}
            own, gradients = (
                _summed(((op.type.bytes(1), sharding.held(op.name)) for op in some), axes)
                for some in (weights, trained)
            )
            copies = _summed(_lower_copies(graph, ops, sharding), axes)
            self._parts[number, size] = _Parts(
                optimizer_s=sum(steps) * times.options.microbatches,
                weight_bytes=tuple(a + b for a, b in zip(own, copies, strict=True)),
                gradient_bytes=gradients,
                results=_parts_held(ops, sharding, axes, size),
                kept=kept_of(graph, sharding, times, ops, earlier),
            )
        return self._parts[number, size]


@dataclass(frozen=True)
class _Seconds:
    """Of a unit at one microbatch size, and what of it is collectives; the same for doing it again."""

    forward_s: float
    backward_s: float
    sent_s: float
    sent_back_s: float
    again_s: float
    sent_again_s: float


@dataclass(frozen=True)
class _Parts:
    """Of a unit the optimiser's seconds, and by member bytes and parts of what one device holds."""

    optimizer_s: float
    weight_bytes: tuple[float, ...]
    gradient_bytes: tuple[float, ...]
    results: tuple[float, ...]
    kept: tuple[Kept, ...]


def computed_again(graph: Graph, ops: Sequence[Op], times: MeshTimes) -> Sequence[Op]:
    """The ops of a unit up to the last one that keeps something for its backward.

    There torch stops: a sum over the members behind a unit's last product is not made again.
    """
    works = {op.name: times.alone.work(op) for op in ops}
    return ops[: kept_last(graph, works)]


def sent_again(
    sharding: Sharding, graph: Graph, ops: Sequence[Op], again: Sequence[Op]
) -> Iterator[tuple[str, Layouts, Layouts]]:
    """Conversions that are made again: of the unit's own values, and of weights that only it reads.

    What another unit made was sent before the unit and is kept as it arrived.
    """
    own = {op.name for op in ops}
    done: set[tuple[str, Layouts]] = set()
    for number, op in enumerate(again, 1):
        formed = _forming(sharding, graph, op) if number < len(again) else ()
        for name, made, wanted in (*conversions_of(sharding, graph, op), *formed):
            source, _ = value_of(graph, name)
            of_weight = graph[source].target in SOURCES and graph[source].target != "input"
            inside = all(user.name in own for user in graph.users(source)) if of_weight else source in own
            if inside and (name, wanted) not in done:
                done.add((name, wanted))
                yield name, made, wanted


@dataclass(frozen=True)
class _Steps:
    """What a unit does at any microbatch size: ops in their ways, and values with what is sent of each.

    Of the ops the first `ops_again` are computed again for the backward, where that is asked for.
    """

    ops: tuple[tuple[Op, Ways], ...]
    sends: tuple[tuple[Op, Sent], ...]
    ops_again: int
    sends_again: tuple[tuple[Op, Sent], ...]

    @cached_property
    def _kinds(self) -> tuple[list[Ways], Numbers]:
        return MeshTimes.alike([ways for _, ways in self.ops])

    def seconds(self, times: MeshTimes) -> "_Seconds":
        """What that takes at one size."""
        computing, computing_back = times.several([op for op, _ in self.ops], *self._kinds)
        inner = [times.inner_seconds(*own) if own[1].special else (0.0, 0.0) for own in self.ops]
        sending = [times.sent_seconds(op, sent) for op, sent in self.sends]
        sent_s, sent_back_s = (sum(ends[k] for ends in (*inner, *sending)) for k in range(2))
        sent_again_s = sum(ends[0] for ends in inner[: self.ops_again]) + sum(
            times.sent_seconds(op, sent)[0] for op, sent in self.sends_again
        )
        return _Seconds(
            forward_s=sum(computing) + sent_s,
            backward_s=sum(computing_back) + sent_back_s,
            sent_s=sent_s,
            sent_back_s=sent_back_s,
            again_s=sum(computing[: self.ops_again]) + sent_again_s,
            sent_again_s=sent_again_s,
        )


def _steps(graph: Graph, ops: Sequence[Op], sharding: Sharding, times: MeshTimes) -> _Steps:
    """A unit's ops with the conversions they need, each conversion once."""
    known = [op for op in ops if op.name in sharding.chosen]
    done: dict[tuple[str, Layouts], tuple[Op, Sent]] = {}
    for op in known:
        for name, made, wanted in (*conversions_of(sharding, graph, op), *_forming(sharding, graph, op)):
            sent = times.sent(graph[name], made, wanted)
            if sent is not None:
                done.setdefault((name, wanted), (graph[name], sent))
    again = computed_again(graph, known, times) if times.options.training else ()
    anew = sent_again(sharding, graph, known, again)
    return _Steps(
        ops=tuple((op, ways) for op in known if (ways := sharding.ways(op.name)) is not None),
        sends=tuple((op, sent) for op, sent in done.values() if sent),
        ops_again=len(again),
        sends_again=tuple(
            (graph[name], sent)
            for name, made, wanted in anew
            if (sent := times.sent(graph[name], made, wanted))
        ),
    )


def _forming(sharding: Sharding, graph: Graph, op: Op) -> list[tuple[str, Layouts, Layouts]]:
    """Results that are brought into a form for all their readers."""
    found = []
    ways = sharding.ways(op.name)
    assert ways is not None
    for index, name in enumerate(_names(graph, op)):
        if name in sharding.forms:
            made = ways.results[min(index, len(ways.results) - 1)]
            found.append((name, made, sharding.form(name, made)))
    return found


def _names(graph: Graph, op: Op) -> list[str]:
    """The op, or where it makes a tuple what takes it apart."""
    taken = [user.name for user in graph.users(op.name) if user.target == "getitem"]
    return taken or [op.name]


def _own_weights(graph: Graph, chain: Chain, number: int) -> list[Op]:
    """Parameters and buffers whose first reader is the unit."""
    earlier = {name for unit in chain.units[:number] for name in unit.ops}
    mine = set(chain.units[number].ops)
    return [
        op
        for op in (*graph.sources("parameter"), *graph.sources("buffer"))
        if any(u.name in mine for u in graph.users(op.name))
        and not any(u.name in earlier for u in graph.users(op.name))
    ]


def _summed(values: Iterable[tuple[float, Layouts]], axes: tuple[int, ...]) -> tuple[float, ...]:
    """Bytes that each member has of values, given each one's bytes and layouts."""
    total = [0.0] * prod(axes)
    for num_bytes, layouts in values:
        for member, share in enumerate(shares_held(layouts, axes)):
            total[member] += num_bytes * share
    return tuple(total)


def _lower_copies(graph: Graph, ops: Sequence[Op], sharding: Sharding) -> Iterator[tuple[float, Layouts]]:
    """Copies of weights in lower formats, their bytes and layouts."""
    for op in ops:
        ways = sharding.ways(op.name) if op.target == "gp.cast_weight" else None
        if ways is not None:
            yield lower_copy_bytes(graph, op), ways.results[0]


def _parts_held(
    ops: Sequence[Op], sharding: Sharding, axes: tuple[int, ...], samples: int
) -> tuple[float, ...]:
    """The part of a unit's results that each member holds."""
    made = [
        (float(kind.bytes(samples)), layouts)
        for op in ops
        if op.target not in SOURCES and (ways := sharding.ways(op.name)) is not None
        for kind, layouts in zip(op.types, ways.results, strict=True)
        if kind is not None
    ]
    whole = sum(num_bytes for num_bytes, _ in made)
    return tuple(own / whole if whole else 1.0 for own in _summed(made, axes))
