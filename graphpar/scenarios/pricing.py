"""Cost tables of settings: the model is captured once per sequence length, priced once per need."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from graphpar.calibration import Calibration
from graphpar.catalogue import families
from graphpar.cost import CostTable, StageOptions
from graphpar.cost_models.extrapolation import WIDER, extrapolations
from graphpar.cost_models.modes import with_modes
from graphpar.cost_models.roofline import Roofline
from graphpar.device import Device
from graphpar.ir.graph import Graph
from graphpar.planner import optimizer_state, price
from graphpar.precision import uniform_formats
from graphpar.preparation import Prepared, prepare
from graphpar.scenarios.layouts import tensor_groups
from graphpar.scenarios.types import OPTIMIZER_STATES, Setting
from graphpar.tensor_groups import with_group_modes
from graphpar.training import Training

Inputs = Callable[[int, int], tuple[Sequence[Any], Mapping[str, Any]]]
"""From a batch size and a sequence length to positional and keyword arguments."""

MEASURED_ERROR, CATALOGUE_ERROR, DESCRIBED_ERROR = 0.10, 0.20, 0.35
"""Half-widths of the interval a step is expected in: this machine's measured processor, a device of the
catalogue (the errors in docs/cost-models.md), a device described in place."""


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
    _prepared: dict[tuple[int | None, int | None], Prepared] = field(default_factory=dict)
    _tables: dict[str, CostTable] = field(default_factory=dict)
    _far: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def baseline(self) -> Prepared:
        """The example batch's capture."""
        return self._capture(None, None)

    def state_bytes(self) -> float:
        """Optimiser state per byte of parameters of the caller's own training; -1 without training."""
        return optimizer_state(self.train) if self.train is not None else -1.0

    def table(self, setting: Setting) -> CostTable:
        """The table of a setting.

        Raises:
            ValueError: The setting needs inputs that nobody can make.
            CaptureError: The model cannot be captured at that sequence length.
        """
        key = priced_by(setting)
        if key not in self._tables:
            prepared = self._prepare(setting)
            units = len(prepared.chain.units)
            self._tables[key] = price(
                prepared,
                setting.cluster,
                train=_training(self.train, setting.optimizer),
                calibration=self.calibration,
                formats=uniform_formats(setting.cluster, setting.precision, units),
            )
        # Links are all that is left: they do not change what a unit costs on a single device.
        topology = Roofline(self.calibration).topology(setting.cluster)
        return self._with_modes(replace(self._tables[key], topology=topology), setting)

    def _with_modes(self, table: CostTable, setting: Setting) -> CostTable:
        """The table with the ways to run units that the setting leaves open, or asks for."""
        formats = uniform_formats(setting.cluster, setting.precision, table.num_units)
        layout = setting.layout
        if layout is not None and layout.tensor > 1:
            if formats.all_float32 and not setting.recompute:
                groups = tensor_groups(table, layout.tensor)
                alike = {tuple(table.class_of[d] for d in g.devices): g for g in groups}
                graph = self._prepare(setting).graph
                train = _training(self.train, setting.optimizer)
                return with_group_modes(
                    table, graph, setting.cluster, alike.values(), self.calibration, train
                )
            options = StageOptions(recompute=bool(setting.recompute), tensor_widths=(layout.tensor,))
            return with_modes(table, options)
        free = setting.recompute is None and layout is None
        if free and setting.training and not table.batch_reason and formats.all_float32:
            return with_modes(table, StageOptions(recompute=True))
        return table

    def extrapolations(self, setting: Setting) -> tuple[str, ...]:
        """What is guessed beyond measurements even for microbatches of one sample."""
        key = priced_by(setting)
        if key not in self._far:
            graph = self._prepare(setting).graph
            self._far[key] = extrapolations(
                graph, setting.cluster, self.calibration, setting.precision, 1
            )
        return self._far[key]

    def _prepare(self, setting: Setting) -> Prepared:
        base = self._capture(setting.seq_len, None)
        if setting.batch == base.graph.batch:
            return base
        if base.batch_reason:
            return self._capture(setting.seq_len, setting.batch)
        graph = Graph(
            base.graph.ops,
            level=base.graph.level,
            name=base.graph.name,
            batch=setting.batch,
            aliases=base.graph.aliases,
        )
        return replace(base, graph=graph)

    def _capture(self, seq_len: int | None, batch: int | None) -> Prepared:
        key = seq_len, batch
        if key not in self._prepared:
            args, kwargs = self.args, self.kwargs
            if key != (None, None):
                args, kwargs = self._inputs(seq_len, batch)
            self._prepared[key] = prepare(self.model, args, kwargs, self.train)
        return self._prepared[key]

    def _inputs(self, seq_len: int | None, batch: int | None) -> tuple[Sequence[Any], Mapping[str, Any]]:
        if self.inputs is None:
            what = "the sequence length" if seq_len is not None else "the batch, which stays whole,"
            raise ValueError(
                f"changing {what} needs other example inputs; give inputs=lambda batch, seq_len: "
                "(args, kwargs)"
            )
        base = self.baseline().graph
        length = seq_len if seq_len is not None else _sequence_length(self.args, self.kwargs)
        return self.inputs(batch or base.batch, length)


def priced_by(setting: Setting) -> str:
    """What a setting's unit costs depend on: its devices, not its links or how it is searched."""
    devices = [(d.name, d.node, sorted(d.to_dict().items(), key=str)) for d in setting.cluster.devices]
    chosen = (setting.batch, setting.seq_len, setting.precision, setting.optimizer, setting.training)
    return repr((devices, chosen))


def _sequence_length(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """The second dimension of the first tensor that has one."""
    tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor) and t.dim() > 1]
    return int(tensors[0].shape[1]) if tensors else 1


def _training(train: Training | None, optimizer: str) -> Training | None:
    if train is None or optimizer == "given":
        return train
    state = OPTIMIZER_STATES[optimizer]
    make: Any = torch.optim.AdamW
    if state < 2:
        momentum = 0.9 if state else 0.0

        def make(parameters: Any, lr: float = 1e-3) -> torch.optim.Optimizer:
            return torch.optim.SGD(parameters, lr=lr, momentum=momentum)

    return replace(train, optimizer=make)


def trust(setting: Setting, book: PriceBook) -> tuple[float, tuple[str, ...]]:
    """How wide the error bar of a setting is, and what is assumed."""
    calibration = book.calibration
    devices = setting.cluster.devices
    error = max(_error(d, calibration) for d in devices)
    remarks: list[str] = []
    if setting.precision != "float32":
        remarks += uniform_formats(setting.cluster, setting.precision, 0).notes
        # Formats other than float32 were checked against fewer measurements.
        error *= 1.25
    if any(d.is_local_cpu for d in devices) and calibration is None:
        error = max(error, DESCRIBED_ERROR)
        remarks.append("this machine's processor is not calibrated; run `graphpar calibrate`")
    far = book.extrapolations(setting)
    if far:
        error *= WIDER
        remarks += far
    return error, tuple(remarks)


def _error(device: Device, calibration: Calibration | None) -> float:
    if device.is_local_cpu:
        return MEASURED_ERROR if calibration is not None else DESCRIBED_ERROR
    if not device.in_catalogue:
        return DESCRIBED_ERROR
    # A curve of few points says less.
    points = len(families()[device.family].matmul_efficiency)
    return CATALOGUE_ERROR if points > 1 else DESCRIBED_ERROR
