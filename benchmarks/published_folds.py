"""Ways to leave published runs out of a fit, so that its error on unseen ones can be told.

A fold leaves out one set, all runs on one kind of device, some models with all their runs, the largest
model of every set, the runs on most devices of every set, all but the narrowest models of every set,
models above ten billion weights, runs on more than 64 devices, all mixtures of experts, or all runs in
less than 16 bits. All but the first three ask what matters to a user: does the model hold beyond what it
has seen?
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from zlib import crc32

from graphpar.cost_models.training_exchanges import SCALED
from graphpar.cost_models.training_run import Run

Samples = dict[str, list[tuple[Run, float]]]

MODEL_GROUPS = 5
MANY_DEVICES = 64
LARGE_PARAMETERS = 10e9
ENOUGH = 6
"""Runs that a device must have for a fold of its own."""


@dataclass(frozen=True)
class Fold:
    """Runs that a fit must not see: `left_out(set's name, run)` says which."""

    kind: str
    name: str
    left_out: Callable[[str, Run], bool]

    def split(self, sets: Samples) -> tuple[Samples, Samples]:
        """Seen and left-out runs by set, sets that end up empty dropped."""
        seen = {n: [x for x in rows if not self.left_out(n, x[0])] for n, rows in sets.items()}
        left = {n: [x for x in rows if self.left_out(n, x[0])] for n, rows in sets.items()}
        return {n: r for n, r in seen.items() if r}, {n: r for n, r in left.items() if r}


def folds(sets: Samples) -> list[Fold]:
    """All folds of some sets."""
    runs = [run for rows in sets.values() for run, _ in rows]
    devices = dict.fromkeys(run.device for run in runs)
    known = [d for d in devices if sum(run.device == d for run in runs) >= ENOUGH]
    largest = {n: max(run.shape.parameters for run, _ in rows) for n, rows in sets.items()}
    widest = {n: max(run.devices for run, _ in rows) for n, rows in sets.items()}
    narrowest = {n: min(run.shape.hidden for run, _ in rows) for n, rows in sets.items()}
    several = {n for n, rows in sets.items() if len({run.shape.parameters for run, _ in rows}) > 1}
    spread = {n for n, rows in sets.items() if len({run.devices for run, _ in rows}) > 1}
    of_sets = [Fold("set", name, partial(_is_set, name)) for name in sets]
    of_devices = [Fold("device", device, partial(_is_device, device)) for device in known]
    of_models = [
        Fold("models", f"group {group + 1} of {MODEL_GROUPS}", partial(_is_group, group))
        for group in range(MODEL_GROUPS)
    ]
    return [
        *of_sets,
        *of_devices,
        *of_models,
        Fold("size", "largest model", lambda n, r: n in several and r.shape.parameters == largest[n]),
        Fold("devices", "most devices", lambda n, r: n in spread and r.devices == widest[n]),
        Fold("size", "above 10 billion", lambda _, r: r.shape.parameters > LARGE_PARAMETERS),
        Fold("width", "all but the narrowest", lambda n, r: r.shape.hidden > narrowest[n]),
        Fold("devices", "more than 64", lambda _, r: r.devices > MANY_DEVICES),
        Fold("kind", "mixtures of experts", lambda _, r: r.shape.moe is not None),
        Fold("kind", "8 and 4 bits", lambda _, r: r.dtype in SCALED),
    ]


def _is_set(wanted: str, name: str, _: Run) -> bool:
    return name == wanted


def _is_device(wanted: str, _: str, run: Run) -> bool:
    return run.device == wanted


def _is_group(wanted: int, _: str, run: Run) -> bool:
    return model_group(run) == wanted


def model_group(run: Run) -> int:
    """A group that all runs of a model share, whatever their length of sequence.

    >>> from graphpar.cost_models.communication import Network
    >>> from graphpar.cost_models.transformer import ModelShape
    >>> gpt = ModelShape(24, 2048, 16, 16, 8192, 50257, 1024)
    >>> run = Run(gpt, "a100-sxm-80gb", 8, 8, Network(200e9), batch=64, microbatch=2, data=8)
    >>> 0 <= model_group(run) < MODEL_GROUPS
    True
    """
    shape = run.shape
    return crc32(f"{shape.layers} {shape.hidden} {shape.ffn}".encode()) % MODEL_GROUPS
