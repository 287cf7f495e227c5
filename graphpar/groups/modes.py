"""Prices of tensor groups: how each would share the whole model, and what units take it then."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from math import inf

from graphpar.calibration import Calibration
from graphpar.cluster import Cluster
from graphpar.cost import CostTable, Mode, ModeCost
from graphpar.cost_models.group_times import KnownWork, ShardingOptions, TensorGroup
from graphpar.cost_models.mesh_times import MeshTimes
from graphpar.cost_models.sharding import Found, ShardingProgramme, least_seconds
from graphpar.cost_models.sharding_structure import Structure, cut_batches
from graphpar.cost_models.tensor_modes import SharedUnits, TimesBySize
from graphpar.groups.settings import group_options, options_at, placed_whole, tensor_group, worst_link
from graphpar.ir.chain import Chain, build_chain
from graphpar.ir.graph import Graph
from graphpar.ir.strategies import StrategyTables
from graphpar.partition.types import MOST_LEAN, Replica
from graphpar.training import Training

_LEANER = 0.01
"""A sharding that saves a smaller part of a unit's memory is not considered beside a faster one."""

_MOST_CHOICES = 12
"""Ways to share that a group's prices are kept of."""


class KnownGroups:
    """What was worked out of chains of units and of groups that share them.

    It holds for any batch, as long as no op works on the whole batch.
    """

    def __init__(self) -> None:
        self._wholes: dict[int, _Whole] = {}
        self._options: dict[tuple[int, bool], tuple[Training | None, ShardingOptions]] = {}

    def options(self, graph: Graph, training: bool, train: Training | None, lean: int) -> ShardingOptions:
        """`group_options`, an optimiser being tried once."""
        key = id(train), training
        if key not in self._options:
            self._options[key] = train, group_options(graph, training, train)
        return options_at(self._options[key][1], graph, lean)

    def whole(self, graph: Graph, chain: Chain) -> "_Whole":
        """A chain of units as one stage."""
        if id(chain) not in self._wholes:
            self._wholes[id(chain)] = _Whole(graph, chain)
        return self._wholes[id(chain)]


def with_group_modes(
    table: CostTable,
    graph: Graph,
    cluster: Cluster,
    replicas: Iterable[Replica],
    calibration: Calibration | None = None,
    train: Training | None = None,
    rewritten: Mapping[str, tuple[Graph, Chain]] | None = None,
    least_gain: float = 0.0,
    leaner: bool = False,
    known: KnownGroups | None = None,
    usual: ShardingOptions | None = None,
) -> CostTable:
    """The table with a price for each of these tensor groups that it does not price yet.

    Args:
        table: Plain prices.
        graph: The captured graph.
        cluster: The devices.
        replicas: Tensor groups; single devices are passed over, and so are groups whose members
            compute in unlike formats.
        calibration: Measured rates of this machine's processor.
        train: How the job trains.
        rewritten: By device what runs in place of the graph where that is in a lower format.
        least_gain: A group of two axes that provably saves no larger part of a microbatch and the price
            of its memory over the group of one axis of the same devices, earlier among the replicas,
            gets no price.
        leaner: Whether a group that cannot hold the whole model is also priced with shardings that hold
            less and take longer.
        known: What was worked out for other batches, to be used and added to.
        usual: What strategies are chosen for, where that is known; then `train` is not asked.
    """
    modes = {mode.key: mode for mode in table.modes}
    lower = rewritten or {}
    everywhere = all(device.name in lower for device in cluster.devices)
    plain = graph, Chain((), frozenset()) if everywhere else build_chain(graph)
    known = KnownGroups() if known is None else known
    options = partial(known.options, graph, table.training, train)
    if usual is not None:
        options = partial(options_at, usual, graph)
    one_axis_s: dict[tuple[str, ...], float] = {}
    for replica in replicas:
        members = tuple(table.class_of[name] for name in replica.devices)
        key = (members, replica.shares, "float32", False, 0, replica.mesh, replica.lean)
        first, *others = [lower.get(name, plain) for name in replica.devices]
        unlike = any(other[0] is not first[0] for other in others)
        if not replica.others or unlike or key in modes or key in table.mode_of_key:
            continue
        asked, group = options(replica.lean), tensor_group(cluster, replica)
        prices = known.whole(*first).prices(group, asked, calibration)
        if replica.mesh and least_gain > 0:
            could_s = (1 - least_gain) * one_axis_s.get(replica.devices, inf)
            if prices.least_seconds(asked) >= could_s:
                continue
        # The table's links may be measured ones: what the group needs is told in their terms.
        link = worst_link(replica, table.topology.link)

        def mode(lean: int) -> tuple[Mode, float]:
            units, objective_s = prices.shared(options(lean))  # noqa: B023 (called in this turn)
            made = units.mode(table, members, replica.shares, lean)  # noqa: B023
            return replace(made, link=link), objective_s  # noqa: B023

        modes[key], objective_s = mode(replica.lean)
        if not replica.mesh:
            one_axis_s.setdefault(replica.devices, objective_s)
        if leaner and _may_lack_memory(table, modes[key]):
            for lean in _pareto(modes[key], (mode(lean)[0] for lean in range(1, MOST_LEAN + 1))):
                modes[lean.key] = lean
    return replace(table, modes=tuple(modes.values()))


_Asked = tuple[int, float, float]
"""Samples of a microbatch, and prices of a byte held and of one kept."""


def _asked(options: ShardingOptions) -> _Asked:
    return options.samples, options.hold_factor, options.keep_factor


class _Whole:
    """A chain of units as one stage, and the groups that may share it."""

    def __init__(self, graph: Graph, chain: Chain) -> None:
        # The chain is kept so that no other one gets its place in memory.
        self.chain, self.graph = chain, placed_whole(graph, chain)
        self.strategies, self.work = StrategyTables(self.graph), KnownWork(self.graph)
        self._prices: dict[object, _GroupPrices] = {}

    def prices(
        self, group: TensorGroup, options: ShardingOptions, calibration: Calibration | None
    ) -> "_GroupPrices":
        """Of a group, whatever its devices are called and hold, for microbatches of any size."""
        devices = tuple(replace(d, name="", node="", memory_bytes=0) for d in group.devices)
        key = (
            replace(group, devices=devices), options.training, options.cuts_weights, id(calibration)
        )  # fmt: skip
        if key not in self._prices:
            self._prices[key] = _GroupPrices(self, group, options, calibration)
        return self._prices[key]


class _GroupPrices:
    """What a group takes to share the whole model, at any microbatch size and price of memory."""

    def __init__(
        self,
        whole: _Whole,
        group: TensorGroup,
        options: ShardingOptions,
        calibration: Calibration | None,
    ) -> None:
        self.whole, self.group = whole, group
        self._times = MeshTimes(whole.graph, group, options, known=whole.work)
        self._by_size = TimesBySize(whole.graph, group, options, calibration, whole.work)
        self._structures: dict[tuple[bool, ...], Structure] = {}
        self._programmes: dict[int, ShardingProgramme] = {}
        self._units: dict[object, SharedUnits] = {}
        self._found: dict[_Asked, Found] = {}
        self._least_s: dict[_Asked, float] = {}
        self._calibration = calibration  # kept so that no other one gets its place in memory

    def least_seconds(self, options: ShardingOptions) -> float:
        """No sharding of the whole model takes less, the price of memory included."""
        whole, asked = self.whole, _asked(options)
        if asked not in self._least_s:
            self._least_s[asked] = least_seconds(
                whole.graph, 0, whole.chain, self.group, options, whole.strategies, self._at(options)
            )
        return self._least_s[asked]

    def shared(self, options: ShardingOptions) -> tuple[SharedUnits, float]:
        """The units as they are shared best at a microbatch size and price of memory; the objective."""
        asked = _asked(options)
        if asked not in self._found:
            self._found[asked] = self._programme(options).solve(options)
        found = self._found[asked]
        key = cut_batches(self.group, options), found.choice
        units = self._units.pop(key, None)
        if units is None:
            sharding = self._programme(options).sharding(found)
            units = SharedUnits(self.whole.graph, self.whole.chain, sharding, self._by_size)
        self._units[key] = units
        if len(self._units) > _MOST_CHOICES:
            del self._units[next(iter(self._units))]
        return units, found.objective_s

    def _at(self, options: ShardingOptions) -> MeshTimes:
        return (
            self._programme(options).times
            if options.samples in self._programmes
            else (self._times.at(options.samples))
        )

    def _programme(self, options: ShardingOptions) -> ShardingProgramme:
        """Of the structure that all sizes share which let the same samples be cut."""
        if options.samples not in self._programmes:
            times = self._times.at(options.samples)
            cuts = cut_batches(self.group, options)
            if cuts not in self._structures:
                whole = self.whole
                self._structures[cuts] = Structure(whole.graph, 0, whole.chain, times, whole.strategies)
            # Of other sizes there is no more to be asked.
            self._programmes = {options.samples: ShardingProgramme(self._structures[cuts], times)}
        return self._programmes[options.samples]


def _may_lack_memory(table: CostTable, mode: Mode) -> bool:
    """Whether some member could not hold the whole model, the whole batch at once or the update."""
    costs = [mode.costs[kind] for kind in table.units]
    for member, number in enumerate(mode.members):
        device_class = table.device_classes[number]
        held = sum(_held(cost, member) for cost in costs)
        saved = sum(cost.saved_bytes[member][-1] for cost in costs)
        working = max(cost.working_bytes[member][-1] for cost in costs)
        update = device_class.update_share * sum(cost.gradient_bytes[member] for cost in costs)
        if held + max(saved + working, update) > device_class.memory_bytes - table.reserved_bytes:
            return True
    return False


def _held(cost: ModeCost, member: int) -> float:
    return cost.weight_bytes[member] + cost.gradient_bytes[member] + cost.optimizer_bytes[member]


def _pareto(usual: Mode, leaner: Iterable[Mode]) -> Iterator[Mode]:
    """Those modes that need less of some memory than each one before, where memory was less dear."""
    known = [usual]
    for mode in leaner:
        if all(_saves(mode, other) for other in known):
            known.append(mode)
            yield mode


def _saves(mode: Mode, other: Mode) -> bool:
    """Whether some member needs less of a unit's memory, of any kind, than in another mode."""
    for own, its in zip(mode.costs, other.costs, strict=True):
        for member in range(len(mode.members)):
            pairs = (
                (_held(own, member), _held(its, member)),
                (own.saved_bytes[member][-1], its.saved_bytes[member][-1]),
                (own.working_bytes[member][-1], its.working_bytes[member][-1]),
            )
            if any(a < (1 - _LEANER) * b for a, b in pairs):
                return True
    return False
