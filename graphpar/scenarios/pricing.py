"""Cost tables of settings: the model is captured once per sequence length, priced once per need."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import combinations
from typing import Any

import torch
from torch import nn

from graphpar.calibration import Calibration
from graphpar.cluster import Cluster
from graphpar.cost import CostTable, LinkCost, Mode
from graphpar.cost_models.classes import device_classes
from graphpar.cost_models.divisible import few_row_bytes
from graphpar.cost_models.extrapolation import extrapolations
from graphpar.cost_models.modes import with_modes
from graphpar.cost_models.roofline import Rewritten, Roofline
from graphpar.cost_models.unit_costs import UnitPricer
from graphpar.cost_options import StageOptions
from graphpar.device import Link
from graphpar.errors import GraphparError
from graphpar.groups.candidates import LEAST_GAIN, candidate_groups, meshes_of, widest_group
from graphpar.groups.modes import KnownGroups
from graphpar.loading import uncollected
from graphpar.optimizer_memory import Tried, UpdateMemory, tried_optimizer, update_memory
from graphpar.optimizer_probe import OptimizerTraits, optimizer_state, optimizer_traits
from graphpar.partition.types import Replica
from graphpar.planner import price
from graphpar.precision.formats import Formats, rewrite, settled, uniform_formats
from graphpar.preparation import Prepared
from graphpar.scenarios.captures import Captures, Inputs
from graphpar.scenarios.full_speed import at_full_speed, for_devices, rows_of, with_rows
from graphpar.scenarios.group_prices import GroupTask, Priced
from graphpar.scenarios.layouts import tensor_groups
from graphpar.scenarios.types import OPTIMIZER_STATES, Setting
from graphpar.training import Training
from graphpar.wishes import may_repeat, zero_levels

_Kinds = list[tuple[str, int]]
"""For each class of devices what tells it from others, and the number of the graph that it runs."""


@dataclass
class PriceBook:
    """A model with its captures and cost tables.

    Args:
        model: The model; on the meta device is enough.
        args: Positional arguments of the example batch.
        kwargs: Keyword arguments of the example batch.
        train: How to train; None for inference.
        calibration: Measured curves of this machine's processor.
        inputs: Makes example inputs of other sizes, for scenarios that change the sequence length, or
            the batch of a model whose batch cannot be split.
    """

    model: nn.Module
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    train: Training | None
    calibration: Calibration | None = None
    inputs: Inputs | None = None
    _at_batch: dict[tuple[int | None, int], Prepared] = field(default_factory=dict)
    _tables: dict[str, CostTable] = field(default_factory=dict)
    _by_kinds: dict[object, list[tuple[_Kinds, CostTable]]] = field(default_factory=dict)
    _modes: dict[str, tuple[Mode, ...]] = field(default_factory=dict)
    _tried: dict[str, Tried] = field(default_factory=dict)
    _trainings: dict[str, Training | None] = field(default_factory=dict)
    _rewritten: dict[object, Rewritten] = field(default_factory=dict)
    _groups: dict[str, tuple[tuple[int, ...], tuple[Mode, ...]]] = field(default_factory=dict)
    _known_groups: KnownGroups = field(default_factory=KnownGroups)
    _pricers: dict[str, dict[int, UnitPricer]] = field(default_factory=dict)
    _formats: dict[str, Formats] = field(default_factory=dict)
    _traits: dict[str, OptimizerTraits] = field(default_factory=dict)
    _far: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def baseline(self) -> Prepared:
        """The example batch's capture."""
        return self.captures.baseline()

    @cached_property
    def captures(self) -> Captures:
        """The model at all lengths and batches."""
        return Captures(self.model, self.args, self.kwargs, self.train, self.inputs)

    @cached_property
    def state_bytes(self) -> float:
        """Optimiser state per byte of parameters of the caller's own training; -1 without training."""
        return optimizer_state(self.train) if self.train is not None else -1.0

    @cached_property
    def updates(self) -> tuple[UpdateMemory, ...]:
        """What the update of the caller's own training takes on a GPU and on a processor."""
        made = self.train.optimizer if self.train is not None else None
        return tuple(update_memory(made, on_gpu=gpu) if made else UpdateMemory() for gpu in (True, False))

    def table(self, setting: Setting) -> CostTable:
        """The table of a setting.

        Raises:
            ValueError: The setting needs inputs that nobody can make.
            CaptureError: The model cannot be captured at that sequence length.
        """
        return self._with_modes(self._plain(setting), setting)

    def _plain(self, setting: Setting) -> CostTable:
        """The table without further ways to run units."""
        key, alone = self._costs_by(setting), not _is_local(setting.cluster)
        if key not in self._tables:
            self._tables[key] = (
                self._of_some(setting) if alone else self._priced(setting, setting.cluster)
            )
        # Links and how many devices of a class there are: they do not change what a unit costs on one.
        table = self._tables[key]
        table = for_devices(table, setting.cluster) if alone else table
        return self._placed(table, setting)

    def _of_some(self, setting: Setting) -> CostTable:
        """The table of devices at full speed, out of one of more kinds of devices if there is any."""
        cluster, runs = at_full_speed(setting.cluster), self._runs(setting)
        firsts = [cluster.device(c.devices[0]) for c in device_classes(cluster)]
        kinds = [(str(sorted(d.to_dict().items(), key=str)), id(runs[d.name][0])) for d in firsts]
        graphs, on_cpu = {graph for _, graph in kinds}, all(d.is_cpu for d in firsts)
        known = self._by_kinds.setdefault((*_chosen(setting), on_cpu), [])
        for others, table in known:
            # What stages send each other is in the format that needs most bytes.
            if graphs == {graph for _, graph in others} and {*kinds} <= {*others}:
                return with_rows(table, [(others.index(kind), 1.0) for kind in kinds])
        known.append((kinds, self._priced(setting, cluster)))
        return known[-1][1]

    def _priced(self, setting: Setting, cluster: Cluster) -> CostTable:
        """A table from nothing."""
        train, prepared = self._training(setting), self.prepared(setting)
        how = f"{setting.optimizer} {sorted({device.is_cpu for device in cluster.devices})}"
        if how not in self._tried:
            self._tried[how] = tried_optimizer(train, cluster)
        # What works on the whole batch has other kernels for another one.
        shared = not prepared.batch_reason and not prepared.tail_reason
        known = self._pricers.setdefault(f"{setting.optimizer} {setting.seq_len}", {})
        return price(
            prepared,
            cluster,
            train=train,
            calibration=self.calibration,
            formats=self.formats(setting),
            tried=self._tried[how],
            rewritten=self._runs(setting),
            known=known if shared else None,
        )

    def _training(self, setting: Setting) -> Training | None:
        """How a setting trains, the same for all that name the same optimiser."""
        return self._trained_with(setting.optimizer)

    def _trained_with(self, optimizer: str) -> Training | None:
        if optimizer not in self._trainings:
            self._trainings[optimizer] = training_of(self.train, optimizer)
        return self._trainings[optimizer]

    def _runs(self, setting: Setting) -> dict[str, Rewritten]:
        """What each device runs: one graph for each format, made once for all batches."""
        base = prepared = self.prepared(setting)
        if not prepared.batch_reason and not prepared.tail_reason:
            base = self.captures.at(setting.seq_len, None)
        by_device = self.formats(setting).by_device
        found = {}
        for device in setting.cluster.devices:
            units = by_device.get(device.name, ())
            key = setting.seq_len, base.graph.batch, units if any(f != "float32" for f in units) else ()
            if key not in self._rewritten:
                plain = base.graph, base.chain
                self._rewritten[key] = rewrite(*plain, units) if key[2] else plain
            found[device.name] = self._rewritten[key]
        return found

    def with_links_as_priced(self, setting: Setting) -> Setting:
        """The setting with the measured loopback where this machine talks to itself."""
        cluster = setting.cluster
        if self.calibration is None or not any(device.is_local_cpu for device in cluster.devices):
            return setting
        topology = Roofline(self.calibration).topology(cluster)
        nodes = tuple(replace(n, link=_priced_at(n.link, topology.inside[n.name])) for n in cluster.nodes)
        network = _priced_at(cluster.network, topology.network)
        return replace(setting, cluster=replace(cluster, nodes=nodes, network=network))

    def _placed(self, table: CostTable, setting: Setting) -> CostTable:
        """The table of the same classes of devices, for the setting's cluster."""
        cluster, roofline = setting.cluster, Roofline(self.calibration)
        classes = zip(table.device_classes, device_classes(cluster), strict=True)
        few_row, prepared = table.few_row_bytes, self.prepared(setting)
        if table.training:
            most = min(table.max_replicas, len(cluster.devices))
            few_row = few_row_bytes(prepared.graph, prepared.chain, table.units, most)
        return replace(
            table,
            device_classes=tuple(replace(known, devices=own.devices) for known, own in classes),
            topology=roofline.topology(cluster),
            reserved_bytes=roofline.reserved_bytes(
                cluster, prepared.graph, table.training, self._runs(setting)
            ),
            sum_s_per_byte=roofline.sum_s_per_byte(cluster),
            shared=roofline.shared_cores(cluster),
            few_row_bytes=few_row,
        )

    def _with_modes(self, table: CostTable, setting: Setting) -> CostTable:
        """The table with the ways to run units that the setting leaves open, or asks for."""
        wish = (setting.recompute, setting.layout and setting.layout.tensor, setting.tensor)
        levels = self._zero_levels(setting)
        key = (
            f"{self._costs_by(setting)} {rows_of(setting.cluster)} {wish} {levels} {table.few_row_bytes}"
        )
        if wish[1:] not in ((None, 1), (1, 1)):
            # What groups take depends on which devices share a node, and over which links.
            inside = [(node.name, str(node.link.cost)) for node in setting.cluster.nodes]
            key = f"{priced_by(setting)} {self._settled(setting)} {wish} {levels} {inside}"
        if key not in self._modes:
            self._modes[key] = self._all_modes(table, setting).modes
        return replace(table, modes=self._modes[key])

    def _all_modes(self, table: CostTable, setting: Setting) -> CostTable:
        """The ways that the planner weighs; or those of the configuration asked for."""
        layout = setting.layout
        groups: Sequence[Replica] = self._candidates(table, setting)
        if layout is not None:
            own = tensor_groups(table, layout.tensor) if layout.tensor > 1 else []
            groups = list({tuple(table.class_of[d] for d in g.devices): g for g in own}.values())
        table = self._with_groups(table, setting, groups)
        if not may_repeat(table):
            return table
        levels = self._zero_levels(setting) if layout is None else ()
        again = setting.recompute is not False if layout is None else bool(setting.recompute)
        return with_modes(table, StageOptions(recompute=again, zero=levels))

    def _with_groups(self, table: CostTable, setting: Setting, groups: Sequence[Replica]) -> CostTable:
        """The table with prices of tensor groups, found once for equal devices over equal links."""
        modes = {mode.key: mode for mode in table.modes}
        for key, own in self._group_keys(table, setting, groups):
            classes = tuple(table.class_of[name] for name in own[0].devices)
            if key not in self._groups:
                self._groups[key] = (
                    classes, self._group_task(table, setting, own).priced(self._known_groups)
                )  # fmt: skip
            then, priced = self._groups[key]
            now = dict(zip(then, classes, strict=True))
            for mode in priced:
                mode = replace(mode, members=tuple(now[k] for k in mode.members))
                modes.setdefault(mode.key, mode)
        return replace(table, modes=tuple(modes.values()))

    def _group_keys(
        self, table: CostTable, setting: Setting, groups: Sequence[Replica]
    ) -> Iterator[tuple[str, list[Replica]]]:
        """The groups of the same devices, and what their prices depend on."""
        alike: dict[tuple[str, ...], list[Replica]] = {}
        for group in groups:
            alike.setdefault(group.devices, []).append(group)
        runs = self._runs(setting) if groups else {}
        common = (*_chosen(setting), table.units, setting.layout is None, setting.tensor == "auto")
        for devices, own in alike.items():
            links = [str(table.topology.link(*pair)) for pair in combinations(devices, 2)]
            shapes = [(group.shares, group.mesh, group.lean) for group in own]
            kinds = [(setting.cluster.device(d).to_dict(), id(runs[d][0])) for d in devices]
            key = f"{common} {table.reserved_bytes} {kinds} {links} {shapes}"
            if _is_local(setting.cluster):
                key += priced_by(setting) + self._settled(setting)
            yield key, own

    def _group_task(self, table: CostTable, setting: Setting, groups: Sequence[Replica]) -> GroupTask:
        train, prepared = self._training(setting), self.prepared(setting)
        return GroupTask(
            table,
            prepared.graph,
            setting.cluster,
            tuple(groups),
            self._runs(setting),
            self._known_groups.options(prepared.graph, table.training, train, 0),
            self.calibration,
            least_gain=LEAST_GAIN if setting.tensor == "auto" else 0.0,
            leaner=setting.layout is None,
            alike=not prepared.tail_reason,
        )

    def unpriced_groups(self, settings: Sequence[Setting]) -> dict[str, GroupTask]:
        """What is left to price of the tensor groups that settings leave open, by a name."""
        found: dict[str, GroupTask] = {}
        for setting in settings:
            if setting.layout is not None or setting.tensor == 1 or _is_local(setting.cluster):
                continue
            # What cannot be planned is told when it is its turn.
            with suppress(ValueError, GraphparError), uncollected():
                table = self._plain(setting)
                for key, own in self._group_keys(table, setting, self._candidates(table, setting)):
                    if key not in self._groups and key not in found:
                        found[key] = self._group_task(table, setting, own)
        return found

    def learn_groups(self, priced: Iterable[Priced]) -> None:
        """Take prices found elsewhere."""
        for key, task, modes in priced:
            classes = task.table.class_of
            self._groups[key] = tuple(classes[d] for d in task.groups[0].devices), modes

    def _candidates(self, table: CostTable, setting: Setting) -> Sequence[Replica]:
        widest = widest_group(setting.cluster, setting.tensor)
        if widest < 2 or table.in_step_reason or self.joins(setting):
            return ()
        return candidate_groups(setting.cluster, widest, meshes_of(setting.tensor, widest))

    def formats(self, setting: Setting) -> Formats:
        """The format of each device: the one asked for where there is one that all agreed on."""
        known = self._formats.get(priced_by(setting))
        if known is not None:
            return known
        units = len(self.prepared(setting).chain.units)
        return uniform_formats(setting.cluster, setting.precision, units)

    def settle(self, setting: Setting, quarrels: Sequence[Sequence[str]]) -> None:
        """Leave in float32 the kinds of devices that would share a stage but no format."""
        agreed = settled(self.formats(setting), quarrels, setting.cluster)
        self._formats[priced_by(setting)] = agreed

    def _settled(self, setting: Setting) -> str:
        """Which kinds compute in a lower format, where that is not as the setting has it."""
        known = self._formats.get(priced_by(setting))
        if known is None:
            return ""
        return repr(sorted({setting.cluster.device(name).kind for name in known.by_device}))

    def _costs_by(self, setting: Setting) -> str:
        return costs_by(setting) + self._settled(setting)

    def traits(self, optimizer: str) -> OptimizerTraits | None:
        """What an optimiser of that name is like, tried once; None without training."""
        train = self._trained_with(optimizer)
        if train is not None and optimizer not in self._traits:
            self._traits[optimizer] = optimizer_traits(train.optimizer)
        return self._traits.get(optimizer)

    def joins(self, setting: Setting) -> str:
        """The optimiser whose step on one parameter depends on all others; empty for any other."""
        traits = self.traits(setting.optimizer)
        return traits.name if traits is not None and not traits.separable else ""

    def _zero_levels(self, setting: Setting) -> tuple[int, ...]:
        if self.train is None or not self.train.zero:
            return ()
        traits = self.traits(setting.optimizer)
        return zero_levels(self.train, traits is not None and traits.by_slices, setting.schedule)

    def extrapolations(self, setting: Setting, used: Collection[str]) -> tuple[str, ...]:
        """What is guessed of the devices used, even for microbatches of one sample."""
        told: dict[str, None] = {}
        base = self.captures.at(setting.seq_len, None)
        prepared = self.prepared(setting) if base.batch_reason else base
        for precision, devices in self.by_format(setting, used).items():
            part = only(setting.cluster, devices)
            one_each = {device.kind: device.name for device in part.devices}
            key = f"{setting.seq_len} {prepared.graph.batch} {precision} {sorted(one_each)}"
            if key not in self._far:
                part = only(part, one_each.values())
                far = extrapolations(prepared.graph, part, self.calibration, precision, 1)
                self._far[key] = far
            told |= dict.fromkeys(self._far[key])
        return tuple(told)

    def by_format(self, setting: Setting, used: Collection[str]) -> dict[str, set[str]]:
        """The used devices by the format they compute in: the one asked for, or float32 without it."""
        lower, found = self.formats(setting).by_device, dict[str, set[str]]()
        for name in used:
            found.setdefault(setting.precision if name in lower else "float32", set()).add(name)
        return found

    def prepared(self, setting: Setting) -> Prepared:
        """The capture at the setting's batch and sequence length."""
        base = self.captures.at(setting.seq_len, None)
        if setting.batch == base.graph.batch:
            return base
        if base.batch_reason:
            return self.captures.at(setting.seq_len, setting.batch)
        key = setting.seq_len, setting.batch
        if key not in self._at_batch:
            self._at_batch[key] = replace(base, graph=base.graph.with_batch(setting.batch))
        return self._at_batch[key]


def _priced_at(link: Link, cost: LinkCost) -> Link:
    if link.cost == cost:
        return link
    return replace(link, bytes_per_s=cost.bytes_per_s, latency_s=cost.latency_s, kind="")


def priced_by(setting: Setting) -> str:
    """What a setting is priced on: its devices and sizes, not its links or how it is searched."""
    devices = [(d.name, d.node, sorted(d.to_dict().items(), key=str)) for d in setting.cluster.devices]
    return repr((devices, _chosen(setting)))


def costs_by(setting: Setting) -> str:
    """What units cost by: one device of each class, or all where some share this machine's cores."""
    if _is_local(setting.cluster):
        return priced_by(setting)
    plain = at_full_speed(setting.cluster)
    examples = [plain.device(c.devices[0]) for c in device_classes(plain)]
    return repr(([sorted(d.to_dict().items(), key=str) for d in examples], _chosen(setting)))


def _is_local(cluster: Cluster) -> bool:
    """Whether some devices share this machine's cores."""
    return any(device.is_local_cpu for device in cluster.devices)


def _chosen(setting: Setting) -> tuple[object, ...]:
    return (setting.batch, setting.seq_len, setting.precision, setting.optimizer, setting.training)


def training_of(train: Training | None, optimizer: str) -> Training | None:
    """How a setting trains: as the caller does, or with another optimiser."""
    if train is None or optimizer == "given":
        return train
    state = OPTIMIZER_STATES[optimizer]
    make: Any = torch.optim.AdamW
    if state < 2:
        momentum = 0.9 if state else 0.0

        def make(parameters: Any, lr: float = 1e-3) -> torch.optim.Optimizer:
            return torch.optim.SGD(parameters, lr=lr, momentum=momentum)

    return replace(train, optimizer=make)


def only(cluster: Cluster, names: Collection[str]) -> Cluster:
    """The cluster without all other devices."""
    kept = (replace(n, devices=tuple(d for d in n.devices if d.name in names)) for n in cluster.nodes)
    nodes = tuple(node for node in kept if node.devices)
    left = {node.name for node in nodes}
    return Cluster(nodes, cluster.network, tuple(p for p in cluster.pairs if set(p[0]) <= left))
