"""One architecture from capture to compared numbers, over two and three unlike workers."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from coverage_layouts import in_line, side_by_side
from coverage_model import BATCH, Built, build_tiny, mean_loss, settled
from torch import nn

from graphpar.compiler import subject_of
from graphpar.frontend.objects import opened
from graphpar.frontend.torch_private import flatten
from graphpar.plans.plan import Plan
from graphpar.preparation import Prepared, prepare
from graphpar.runtime.hold import HoldStill
from graphpar.runtime.job import CompiledModel
from graphpar.runtime.numbers import FLOAT32_ROUNDING, compare_gradients, relative_difference
from graphpar.runtime.reference import EagerModel, draws_at_random
from graphpar.runtime.subject import Subject
from graphpar.training import Training
from graphpar.verify import reference_for

WORKERS = (2, 3)
SEED = 7
FLOAT64_ROUNDING = 1e-6
"""Largest relative difference that counts as rounding in float64, where models cast parts to float32."""
Until = Literal["model", "capture", "done"]
"""How far to go: until a tiny model runs, until it is captured, or to the end."""


class NumbersError(Exception):
    """A result differs from that of one device by more than rounding."""


@dataclass
class Row:
    """What came out for one architecture.

    Attributes:
        name: The architecture's prefix.
        status: "pass" or "fail".
        stage: How far it came: model, capture, plan, run, compare, or done.
        reason: Why it failed, or what a reader should know about a pass.
        max_error: Largest relative difference from one device among all that was compared.
        seconds: From the first import to the last comparison.
        head: The class that ran.
        inputs: Names of its inputs.
        modes: What was compared: eval, train, dropout.
        stages: Stages of every plan that ran.
        split: Whether the batch was split into microbatches in training.
        side_by_side: Whether unlike pipelines side by side were compared as well.
    """

    name: str
    status: str = "fail"
    stage: str = "model"
    reason: str = ""
    max_error: float | None = None
    seconds: float = 0.0
    head: str = ""
    inputs: tuple[str, ...] = ()
    modes: tuple[str, ...] = ()
    stages: tuple[int, ...] = ()
    split: bool = False
    side_by_side: bool = False
    worst: str = ""
    notes: list[str] = field(default_factory=list)


def run_case(
    name: str,
    row: Row,
    workers: Sequence[int] = WORKERS,
    tell: Callable[[], None] = lambda: None,
    until: Until = "done",
) -> None:
    """Fill in a row; `tell` is called whenever there is news in it."""
    began = time.perf_counter()
    try:
        _Case(row, workers, tell, until).run(name)
        row.status, row.stage = "pass", until
    except NumbersError as error:
        row.status, row.stage, row.reason = "fail", "compare", str(error)
    except Exception as error:
        row.status = "fail"
        row.reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
    row.seconds = round(time.perf_counter() - began, 2)


@dataclass
class _Case:
    row: Row
    workers: Sequence[int]
    tell: Callable[[], None]
    until: Until

    def _at(self, stage: str) -> None:
        self.row.stage = stage
        self.tell()

    def run(self, name: str) -> None:
        """Build, then every mode over every number of workers."""
        built = build_tiny(name)
        self.row.name, self.row.head = built.name, type(built.model).__name__
        self.row.inputs = tuple(built.kwargs)
        if self.until == "model":
            return
        self._mode("eval", built, settled(built.model.eval(), built.kwargs), None)
        train = self._training(built)
        self._mode("train", built, settled(built.model.train(), built.kwargs), train)
        noisy = built.with_dropout()
        self._mode("dropout", built, noisy, train)

    def _training(self, built: Built) -> Training:
        loss = None if built.loss else mean_loss
        return Training(optimizer=HoldStill, loss=loss, seed=SEED)

    def _mode(self, mode: str, built: Built, model: nn.Module, train: Training | None) -> None:
        """Compare in float32; where that differs by more than rounding mostly does, in float64 as well.

        Gradients that cancel out but for rounding (of a bias in front of a normalisation) differ by any
        part of themselves in float32; in float64 a mistake stays as large as it was.
        """
        try:
            self._compared(mode, model, built.kwargs, train, built.loss, FLOAT32_ROUNDING)
        except NumbersError as error:
            if not all(p.dtype in (torch.float32, torch.float64) for p in model.parameters()):
                raise
            kwargs = {k: double(v) for k, v in built.kwargs.items()}
            try:
                self._compared(mode, model.double(), kwargs, train, built.loss, FLOAT64_ROUNDING)
            except Exception as again:
                raise NumbersError(f"{error}; in float64: {again}") from again
            finally:
                model.float()
            self.row.notes.append(f"{mode}: compared in float64, for in float32 {error}")

    def _compared(
        self,
        mode: str,
        model: nn.Module,
        kwargs: dict[str, Any],
        train: Training | None,
        loss: bool,
        rounding: float,
    ) -> None:
        args = () if loss or train is None else (torch.zeros(BATCH),)
        self._at("capture")
        prepared = prepare(model, args, kwargs, train)
        if mode == "dropout" and not draws_at_random(prepared.graph):
            return
        if mode not in self.row.modes:
            self.row.modes += (mode,)
        if self.until == "capture":
            return
        wanted = one_device_numbers(model, prepared, train, args, kwargs)
        if prepared.batch_reason:
            self.row.notes.append(f"{mode}: batch whole, {prepared.batch_reason}")
        elif train is not None:
            self.row.split = True
        for count in self.workers:
            self._at("plan")
            cluster, plan = in_line(prepared, count, train)
            self.row.stages += (len(plan.partition.pipelines[0].stages),)
            got = self._ran(subject_of(model, prepared, cluster, train), plan, train, args, kwargs)
            self._compare(f"{mode}, {count} workers", got, wanted, rounding)
        if mode == "train" and train is not None and max(self.workers) > 2 and not prepared.batch_reason:
            self._at("plan")
            cluster, plan = side_by_side(prepared, train)
            got = self._ran(subject_of(model, prepared, cluster, train), plan, train, args, kwargs)
            self._compare(f"{mode}, side by side", got, wanted, rounding)
            self.row.side_by_side = True

    def _ran(
        self, subject: Subject, plan: Plan, train: Training | None, args: Any, kwargs: Any
    ) -> "Numbers":
        self._at("run")
        with CompiledModel.start(subject, partial(given, plan)) as job:
            return numbers_of(job, train, args, kwargs)

    def _compare(self, where: str, got: "Numbers", wanted: "Numbers", rounding: float) -> None:
        worst, largest = "", 0.0
        for what, name, error in got.differences(wanted):
            if not error <= largest:
                worst, largest = f"{what} {name} ({where})".strip(), error
        if not largest <= rounding:
            raise NumbersError(f"{worst} differs by {largest:.2g} (relative)")
        if self.row.max_error is None or largest > self.row.max_error:
            self.row.max_error, self.row.worst = largest, worst


@dataclass(frozen=True)
class Numbers:
    """What a run gave: results, gradients, and tensors of the model afterwards."""

    results: list[torch.Tensor]
    gradients: Mapping[str, torch.Tensor]
    state: Mapping[str, torch.Tensor]

    def differences(self, wanted: "Numbers") -> Iterator[tuple[str, str, float]]:
        """Kind, name and relative difference of everything compared."""
        if len(self.results) != len(wanted.results):
            yield "number of results", "", float("inf")
        for place, (a, b) in enumerate(zip(self.results, wanted.results, strict=False)):
            yield "result", str(place), relative_difference(a, b)
        name, error = compare_gradients(self.gradients, wanted.gradients)
        yield "gradient", name, error
        for name, b in wanted.state.items():
            if name in self.state:
                yield "state", name, relative_difference(self.state[name], b)


def double(value: Any) -> Any:
    floating = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.double() if floating else value


def given(plan: Plan) -> Plan:
    return plan


def one_device_numbers(
    model: nn.Module, prepared: Prepared, train: Training | None, args: Any, kwargs: Any
) -> Numbers:
    """The numbers of one device: of the eager model, with dropout of the captured graph."""
    reference = reference_for(model, prepared, train)
    with torch.set_grad_enabled(train is not None):
        results = reference.forward(args, kwargs)
    if train is not None:
        results[0].backward()  # type: ignore[no-untyped-call]
    state = reference.model.state_dict() if isinstance(reference, EagerModel) else reference.tensors
    return Numbers([r.detach() for r in results], dict(reference.gradients()), dict(state))


def numbers_of(job: CompiledModel, train: Training | None, args: Any, kwargs: Any) -> Numbers:
    if train is None:
        leaves, _ = flatten(opened(job(*args, **kwargs)))  # a decoder's cache, say
        return Numbers([t for t in leaves if isinstance(t, torch.Tensor)], {}, {})
    loss = job.step(*args, **kwargs)
    return Numbers([loss], job.gradients(), job.state_dict())
