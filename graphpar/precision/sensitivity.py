"""How much error each unit causes in a lower format: measured on the example batch, unit by unit.

The captured graph runs on this machine once in float32 and then with one unit at a time in a lower
format. What is compared is the result (the loss, when training) and all gradients together:
`|y' - y| / |y|` in the Euclidean norm.
"""

import contextlib
import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch
from torch import nn

from graphpar.calibration import cache_path, fingerprint
from graphpar.frontend.capture import Captured
from graphpar.frontend.torch_private import flatten
from graphpar.ir.chain import Chain
from graphpar.ir.formats import ATTENTION, PARTLY, ROUNDOFF, base_format, role_of
from graphpar.ir.graph import Graph
from graphpar.ir.optable import packet
from graphpar.kept_files import read_kept, write_kept
from graphpar.partition.formats import Errors
from graphpar.partition.types import PipelineChoice
from graphpar.runtime.merge import check_inputs
from graphpar.runtime.reference import OneDevice

Source = Literal["measured", "like its kind", "scaled", "estimated"]
"""Where an error comes from: a run of this very unit, one of an equal unit, another format's run scaled
by the formats' rounding, or the format's rounding alone."""

BUDGET_S = 20.0
"""Seconds that measuring may take at most, the first run in float32 not counted."""

_LOSS_SCALES = (2.0**12, 1.0)
"""Factors that gradients in float16 are tried with."""


Placing = tuple[tuple[str, ...], tuple[int, ...]]
"""By unit its format and its stage."""


class Sensitivities(msgspec.Struct, frozen=True):
    """By format and unit the relative errors of output and gradient, and where they come from."""

    errors: dict[str, tuple[Errors, ...]]
    sources: dict[str, tuple[Source, ...]]
    samples: int
    note: str = ""


@dataclass(frozen=True)
class Trial:
    """Runs a captured model on one device, its units in any formats.

    Attributes:
        model: The user's model.
        captured: How calls become inputs.
        graph: The captured graph after the first passes.
        chain: Its units.
        whole_batch_only: Whether the batch must stay whole.
        training: Whether gradients are compared too.
        seed: Seed of the random streams.
        lower: The graph on one device, its units in the given formats and, for what is rounded between
            them, in the given stages; one stage where none are given.
    """

    model: nn.Module
    captured: Captured
    graph: Graph
    chain: Chain
    model_hash: str
    whole_batch_only: bool
    training: bool
    seed: int
    lower: Callable[[tuple[str, ...], tuple[int, ...]], Graph]

    @property
    def num_units(self) -> int:
        """Units in the chain."""
        return len(self.chain.units)


@dataclass
class _Runs:
    """Runs of a trial on some samples of a batch, compared with float32."""

    trial: Trial
    inputs: Mapping[str, torch.Tensor]
    device: OneDevice = field(init=False)
    reference: tuple[list[torch.Tensor], dict[str, torch.Tensor]] = field(init=False)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        trial = self.trial
        wide = trial.lower(("float32",) * trial.num_units, ())
        self.device = OneDevice(trial.model, trial.captured, wide, trial.graph, trial.seed)
        began_s = time.monotonic()
        self.reference = self._run(self.device, 1.0)
        self.seconds = time.monotonic() - began_s

    def _run(self, device: OneDevice, scale: float) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
        for tensor in device.tensors.values():
            tensor.grad = None
        with torch.set_grad_enabled(self.trial.training):
            results = device.run(self.inputs)
        if self.trial.training:
            (loss,) = results
            if loss.requires_grad:
                (loss * scale).backward()  # type: ignore[no-untyped-call]
        gradients = {name: g / scale for name, g in device.gradients().items()}
        return [r.detach() for r in results if r.is_floating_point()], gradients

    def errors(self, formats: tuple[str, ...], stages: tuple[int, ...] = ()) -> Errors:
        """The errors with units in these formats and stages; infinite where something overflows."""
        device = self.device.on(self.trial.lower(formats, stages))
        scales = _LOSS_SCALES if "float16" in formats and self.trial.training else (1.0,)
        worst = math.inf
        output = math.inf
        for scale in scales:
            results, gradients = self._run(device, scale)
            output = distance(results, self.reference[0])
            worst = distance(
                [gradients.get(n, torch.zeros_like(g)) for n, g in self.reference[1].items()],
                list(self.reference[1].values()),
            )
            if math.isfinite(worst):
                break
        return output, worst


def distance(got: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> float:
    """Euclidean distance of tensors taken together, relative to the norm of what is wanted."""
    off = math.fsum(
        float((a.double() - b.double()).square().sum()) for a, b in zip(got, wanted, strict=True)
    )
    size = math.fsum(float(b.double().square().sum()) for b in wanted)
    if not math.isfinite(off):
        return math.inf
    return math.sqrt(off / size) if size > 0 else (0.0 if off == 0 else math.inf)


def measure_sensitivities(
    trial: Trial,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    formats: Sequence[str],
    budget_s: float = BUDGET_S,
) -> Sensitivities:
    """Errors of every unit in every lower format.

    Without weights nothing can be run and errors are estimated from the formats' rounding. What does
    not fit into `budget_s` is taken from equal units, or estimated; `Sensitivities.sources` says which.

    Raises:
        ValueError: The example batch holds NaN, or the model's result on it is not finite.
    """
    if not _has_values(trial.model, args, kwargs):
        return estimated(trial.graph, trial.chain, formats)
    inputs = trial.captured.signature.bind(args, kwargs)
    _refuse_nan(inputs)
    samples = check_inputs(trial.graph, inputs, trial.captured.signature.batched)
    path = _cache_file(trial, inputs, formats)
    kept = _read(path)
    if kept is not None:
        return kept
    runs = _Runs(trial, inputs)
    _refuse_infinite(runs)
    fewer = _fewer(trial, runs, samples, len(formats), budget_s)
    if fewer < samples:
        batched = trial.captured.signature.batched
        runs = _Runs(trial, {n: t[:fewer] if n in batched else t for n, t in inputs.items()})
        _refuse_infinite(runs)
    found, complete = _measured(trial, runs, formats, budget_s, min(fewer, samples))
    if complete:
        _write(path, found)
    return found


def _has_values(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether all tensors of a model and of a batch hold values."""
    leaves = [leaf for leaf in flatten((tuple(args), dict(kwargs)))[0] if isinstance(leaf, torch.Tensor)]
    tensors = [*model.parameters(), *model.buffers(), *leaves]
    return not any(t.device.type == "meta" or type(t).__name__ == "FakeTensor" for t in tensors)


def _fewer(trial: Trial, runs: _Runs, samples: int, formats: int, budget_s: float) -> int:
    """How many samples let every unit be measured in time; the whole batch where it must stay whole."""
    needed_s = runs.seconds * trial.num_units * formats
    if trial.whole_batch_only or needed_s <= budget_s:
        return samples
    return max(1, int(samples * budget_s / needed_s))


def _measured(
    trial: Trial, runs: _Runs, formats: Sequence[str], budget_s: float, samples: int
) -> tuple[Sensitivities, bool]:
    began_s = time.monotonic()
    guess = estimated(trial.graph, trial.chain, formats)
    errors: dict[str, list[Errors]] = {f: list(e) for f, e in guess.errors.items()}
    sources: dict[str, list[Source]] = {f: list(s) for f, s in guess.sources.items()}
    kinds = [unit.kind for unit in trial.chain.units]
    firsts = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
    order = [*firsts, *(u for u in range(trial.num_units) if u not in set(firsts))]
    left = 0
    for unit in order:
        for f in formats:
            if time.monotonic() - began_s > budget_s:
                left += 1
                continue
            if f in PARTLY and not _has_attention(trial, unit):
                base = PARTLY[f]
                errors[f][unit], sources[f][unit] = errors[base][unit], sources[base][unit]
                continue
            marked = ["float32"] * trial.num_units
            marked[unit] = f
            errors[f][unit], sources[f][unit] = runs.errors(tuple(marked)), "measured"
    for f in formats:
        for unit in range(trial.num_units):
            same = [
                errors[f][u] for u in range(trial.num_units)
                if kinds[u] == kinds[unit] and sources[f][u] == "measured"
            ]  # fmt: skip
            if sources[f][unit] != "measured" and same:
                errors[f][unit] = max(e[0] for e in same), max(e[1] for e in same)
                sources[f][unit] = "like its kind"
    note = f"errors measured on {samples} samples"
    if left:
        note += f"; {left} of {trial.num_units * len(formats)} runs did not fit into {budget_s:g} s"
    found = Sensitivities(
        {f: tuple(e) for f, e in errors.items()}, {f: tuple(s) for f, s in sources.items()}, samples, note
    )
    return found, not left


def _has_attention(trial: Trial, unit: int) -> bool:
    return any(packet(trial.graph[name]) in ATTENTION for name in trial.chain.units[unit].ops)


def estimated(graph: Graph, chain: Chain, formats: Sequence[str]) -> Sensitivities:
    """Errors from rounding alone: that of the format, once for each product, as independent errors."""
    counts = []
    for unit in chain.units:
        products = sum(role_of(graph[name]) == "product" for name in unit.ops)
        counts.append(math.sqrt(products))
    guess: Source = "estimated"
    guessed = (guess,) * len(counts)
    return Sensitivities(
        {f: tuple((_roundoff(f) * c, _roundoff(f) * c) for c in counts) for f in formats},
        dict.fromkeys(formats, guessed),
        0,
        "errors estimated from the formats' rounding, since there are no weights to run",
    )


def _roundoff(unit_format: str) -> float:
    return ROUNDOFF[base_format(unit_format)]


class TrueErrors:
    """Errors of whole models in their formats, on the whole example batch.

    Args:
        trial: The model.
        args: Positional arguments of the example batch.
        kwargs: Keyword arguments of it.
    """

    def __init__(self, trial: Trial, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self._trial = trial
        has_values = _has_values(trial.model, args, kwargs)
        self._inputs = trial.captured.signature.bind(args, kwargs) if has_values else None
        self._runs: _Runs | None = None
        self._known: dict[Placing, Errors] = {}

    def of(self, formats: tuple[str, ...], stages: tuple[int, ...] = ()) -> Errors | None:
        """Errors with all units in their formats together, what crosses stages rounded as it will be.

        Args:
            formats: By unit its format.
            stages: By unit its stage; one stage where left out.
        """
        if self._inputs is None:
            return None
        self._runs = self._runs or _Runs(self._trial, self._inputs)
        key = formats, stages
        if key not in self._known:
            self._known[key] = self._runs.errors(formats, stages)
        return self._known[key]

    def of_pipelines(self, pipelines: Sequence[PipelineChoice]) -> Errors | None:
        """The larger of each error over pipelines side by side, each run on all samples."""
        found = [self.of(*_placing(pipeline)) for pipeline in pipelines]
        known = [errors for errors in found if errors is not None]
        return (max(e[0] for e in known), max(e[1] for e in known)) if len(known) == len(found) else None


def _placing(pipeline: PipelineChoice) -> "Placing":
    formats = tuple(f for stage in pipeline.stages for f in stage.formats)
    stages = [n for n, stage in enumerate(pipeline.stages) for _ in range(stage.first, stage.last)]
    return formats, tuple(stages)


def reference_run(
    trial: Trial, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[list[torch.Tensor], float]:
    """Float32 results of one device, and the norm of all its gradients (zero for inference)."""
    results, gradients = _Runs(trial, trial.captured.signature.bind(args, kwargs)).reference
    return results, math.sqrt(math.fsum(float(g.double().square().sum()) for g in gradients.values()))


def _refuse_nan(inputs: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in inputs.items():
        if tensor.is_floating_point() and bool(torch.isnan(tensor).any()):
            count = int(torch.isnan(tensor).sum())
            raise ValueError(
                f"Input {name!r} of the example batch holds {count} NaN; precision='auto' measures "
                "errors on it. Give an example batch of numbers, or name a precision."
            )


def _refuse_infinite(runs: _Runs) -> None:
    results, gradients = runs.reference
    for what, tensors in (("result", results), ("gradient", list(gradients.values()))):
        if not all(bool(torch.isfinite(t).all()) for t in tensors):
            raise ValueError(
                f"The model's {what} on the example batch is not finite in float32, so that "
                "precision='auto' has nothing to measure errors against. Give another example batch, or "
                "name a precision."
            )


def _cache_file(trial: Trial, inputs: Mapping[str, torch.Tensor], formats: Sequence[str]) -> Path:
    """Where the errors of this structure, these weights and this batch are kept."""
    digest = hashlib.sha256()
    about = [trial.model_hash, trial.training, trial.seed, list(formats), fingerprint().key]
    digest.update(json.dumps(about).encode())
    named = [*trial.model.state_dict().items(), *trial.captured.constants.items(), *inputs.items()]
    for name, tensor in named:
        flat = tensor.detach().reshape(-1)
        some = flat[:: max(1, flat.numel() // 512)].to("cpu", torch.float64).contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(some.numpy().tobytes())
        digest.update(str(float(flat.double().sum())).encode() if flat.numel() else b"")
    return cache_path(fingerprint()).with_name(f"sensitivity-{digest.hexdigest()[:24]}.json")


_KIND = r"sensitivity-[0-9a-f]{24}\.json"


def _read(path: Path) -> Sensitivities | None:
    found = read_kept(path)
    try:
        return None if found is None else msgspec.json.decode(found, type=Sensitivities)
    except msgspec.DecodeError:
        return None


def _write(path: Path, found: Sensitivities) -> None:
    """Keep the errors for the next time; a folder that cannot be written to costs only that."""
    finite = all(math.isfinite(x) for es in found.errors.values() for e in es for x in e)
    if not finite:
        return
    with contextlib.suppress(OSError):
        write_kept(path, msgspec.json.encode(found), _KIND)
