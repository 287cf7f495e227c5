"""Plain torch models as papers' code writes them, cut over unlike workers, compared with one device.

    OMP_NUM_THREADS=1 python benchmarks/zoo_run.py [--json] [--sizes] [NAMES...]

Each model of `benchmarks/zoo/` runs in eval and in training, without dropout against the eager model and
with it against the captured graph under the same seed, over 2 and 3 workers in a line and, where its
batch can be split, over two unlike pipelines side by side. Compared are results, loss, every gradient,
and buffers. With `--sizes` a job compiled for one number of samples takes others as well.
"""

import argparse
import json
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
import zoo  # noqa: F401  (fills the collection)
from coverage_case import FLOAT64_ROUNDING, Numbers, double, given, numbers_of, one_device_numbers
from coverage_layouts import in_line, side_by_side
from torch import nn
from zoo.case import CASES, Case, build

from graphpar.cluster import Cluster
from graphpar.compiler import subject_of
from graphpar.frontend.torch_private import flatten, unflatten
from graphpar.plans.plan import Plan
from graphpar.preparation import Prepared, prepare
from graphpar.runtime.hold import HoldStill
from graphpar.runtime.job import CompiledModel
from graphpar.runtime.numbers import FLOAT32_ROUNDING, relative_difference
from graphpar.runtime.reference import draws_at_random
from graphpar.runtime.subject import Subject
from graphpar.training import Training

SAMPLES = 6
OTHER_SAMPLES = (4, 7)
SEED = 7
STATE_FLOOR = 1e-3
"""Buffers are compared with this at least: a running mean of what is normalised already is rounding."""


@dataclass
class Row:
    """What came out for one model: its modes with the largest relative difference, or what failed."""

    name: str
    modes: dict[str, float] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    batch: str = "split"
    reason: str = ""
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0


def run(name: str, sizes: bool) -> Row:
    """Every mode of a model; a failure of one does not stop the others."""
    row, began = Row(name), time.perf_counter()
    for mode in ("eval", "train", "dropout"):
        if mode != "eval" and not build(name).trains:
            continue
        try:
            _mode(row, mode, sizes)
        except Exception as error:
            row.failures[mode] = f"{type(error).__name__}: {' '.join(str(error).split())}"
    row.seconds = round(time.perf_counter() - began, 1)
    return row


def _mode(row: Row, mode: str, sizes: bool) -> None:
    for wide in (False, True):
        made = build(row.name)
        if not set_dropout(made.model, 0.3 if mode == "dropout" else 0.0) and mode == "dropout":
            return
        made.model.train(mode != "eval")
        if wide:
            made.model.double()
        try:
            largest, where = _compared(row, mode, made, wide, sizes)
        except AssertionError as error:
            if wide or not _only_float32(made.model):
                raise
            row.notes.append(f"{mode}: float32 {error}")
            continue
        if where:
            row.modes[mode] = largest
        return


def _only_float32(model: nn.Module) -> bool:
    return all(p.dtype == torch.float32 for p in model.parameters())


def set_dropout(model: nn.Module, rate: float) -> bool:
    """Set every rate of dropout; whether there is any."""
    found = False
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p, found = rate, True
        for key in ("dropout", "drop_rate", "drop_path"):
            if isinstance(getattr(module, key, None), float):
                setattr(module, key, rate)
                found = True
    return found


def _arguments(made: Case, mode: str, samples: int, wide: bool) -> tuple[Any, Any]:
    args, kwargs = made.batch(samples), made.kwargs(samples)
    if made.loss is not None and mode == "eval":
        args = args[:-1]
    if not wide:
        return args, kwargs
    leaves, spec = flatten((args, kwargs))
    made_wide: tuple[Any, Any] = unflatten([double(leaf) for leaf in leaves], spec)
    return made_wide


def _compared(row: Row, mode: str, made: Case, wide: bool, sizes: bool) -> tuple[float, str]:
    args, kwargs = _arguments(made, mode, SAMPLES, wide)
    train = None if mode == "eval" else Training(optimizer=HoldStill, loss=made.loss, seed=SEED)
    prepared = prepare(made.model, args, kwargs, train)
    if mode == "dropout" and not draws_at_random(prepared.graph):
        return 0.0, ""
    if mode == "train":
        row.batch = _told_batch(prepared)
        row.reason = prepared.batch_reason or prepared.in_step_reason or prepared.tail_reason
    rounding = FLOAT64_ROUNDING if wide else FLOAT32_ROUNDING
    worst, at = 0.0, ""
    wanted = one_device_numbers(made.model, prepared, train, args, kwargs)
    for layout, (cluster, plan) in _layouts(mode, prepared, train):
        subject = subject_of(made.model, prepared, cluster, train)
        with CompiledModel.start(subject, partial(given, plan)) as job:
            numbers = [(layout, numbers_of(job, train, args, kwargs), wanted)]
        if sizes:
            numbers += _others(subject, plan, mode, made, wide)
        for where, got, right in numbers:
            for what, name, error in differences(got, right):
                assert error <= rounding, f"{what} {name} differs by {error:.2g} ({where})"
                if error >= worst:
                    worst, at = error, f"{what} {name} ({where})"
    return worst, at


def differences(got: Numbers, wanted: Numbers) -> Iterator[tuple[str, str, float]]:
    """Differences of results, gradients and state; one of rounding alone in a statistic is none."""
    for what, name, error in got.differences(wanted):
        if what == "state":
            error = relative_difference(got.state[name], wanted.state[name], STATE_FLOOR)
        yield what, name, error


def _others(
    subject: Subject, plan: Plan, mode: str, made: Case, wide: bool
) -> Iterator[tuple[str, Numbers, Numbers]]:
    """Results for other numbers of samples, beside those of one device; a job of its own for each."""
    for samples in OTHER_SAMPLES:
        args, kwargs = _arguments(made, mode, samples, wide)
        prepared = prepare(made.model, args, kwargs, subject.training)
        wanted = one_device_numbers(made.model, prepared, subject.training, args, kwargs)
        with CompiledModel.start(subject, partial(given, plan)) as job:
            yield f"{samples} samples", numbers_of(job, subject.training, args, kwargs), wanted


def _layouts(
    mode: str, prepared: Prepared, train: Training | None
) -> Iterator[tuple[str, tuple[Cluster, Plan]]]:
    workers = {"eval": (2,), "train": (2, 3), "dropout": (3,)}[mode]
    for count in workers:
        try:
            yield f"{count} workers", in_line(prepared, count, train)
        except ValueError:
            if count == workers[0]:
                yield "1 worker", in_line(prepared, 1, train)
    if train is not None and not prepared.batch_reason:
        yield "side by side", side_by_side(prepared, train)


def _told_batch(prepared: Prepared) -> str:
    if prepared.batch_reason:
        return "whole"
    if prepared.in_step_reason:
        return "in step"
    return "tail" if prepared.tail_reason else "split"


def main() -> None:
    """Run the models that are named, or all, and print a line or a row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAMES")
    parser.add_argument("--sizes", action="store_true", help="other numbers of samples as well")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = []
    for name in options.names or CASES:
        rows.append(row := run(name, options.sizes))
        out = sys.stderr if options.json else sys.stdout
        told = " ".join(f"{mode} {error:.1e}" for mode, error in row.modes.items())
        print(f"{name:<24}{row.batch:<8}{row.seconds:>6.1f} s  {told}  {row.reason[:230]}", file=out)
        for mode, why in row.failures.items():
            print(f"    FAIL {mode}: {why[:700]}", file=out)
        for note in row.notes:
            print(f"    note {note[:300]}", file=out)
        out.flush()
    if options.json:
        print(json.dumps({"rows": [asdict(row) for row in rows]}, indent=1))


if __name__ == "__main__":
    main()
