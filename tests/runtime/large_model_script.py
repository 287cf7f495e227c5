"""Runs a model that no process may hold whole, and prints what each process took.

    python large_model_script.py files|function FOLDER

Workers forbid themselves, as soon as they make their optimiser or their first tensor, to allocate more
than half of the model beyond what an empty worker has.
"""

import json
import resource
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from helpers import force, straight
from safetensors.torch import save_file
from torch import nn

import graphpar
from graphpar.runtime.tensor_files import find_tensors, read_tensor
from graphpar.runtime.weights import Origin, materialize

WIDTH, LAYERS, RANKS = 2048, 8, 4
MODEL_BYTES = 4 * WIDTH * WIDTH * LAYERS


def peak_bytes() -> int:
    """Largest memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def fill(name: str, tensor: torch.Tensor) -> None:
    """Small weights, under a limit that is set with the first tensor."""
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if hard == resource.RLIM_INFINITY:
        lines = Path("/proc/self/status").read_text().splitlines()
        held = int(next(line for line in lines if line.startswith("VmData")).split()[1])
        limit = held * 1024 + MODEL_BYTES // 2
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    nn.init.normal_(tensor, std=WIDTH**-0.5)


def write(folder: Path) -> None:
    """One file for each layer, one after another."""
    for layer in range(LAYERS):
        torch.manual_seed(layer)
        weight = nn.init.normal_(torch.empty(WIDTH, WIDTH), std=WIDTH**-0.5)
        save_file({f"{layer}.weight": weight}, folder / f"part-{layer}.safetensors")


def by_layers(folder: Path | None, x: torch.Tensor) -> torch.Tensor:
    """The result on one device, with one layer in memory at a time."""
    stored = find_tensors(folder) if folder else {}
    for layer in range(LAYERS):
        name = f"{layer}.weight"
        origin = Origin(name, "float32", (WIDTH, WIDTH))
        weight = read_tensor(stored[name]) if folder else materialize(origin, init_alone)
        x = nn.functional.linear(x, weight)
    return x


def init_alone(name: str, tensor: torch.Tensor) -> None:
    """What `fill` does, without a limit."""
    nn.init.normal_(tensor, std=WIDTH**-0.5)


def measured(model: nn.Module, x: torch.Tensor, weights: Any) -> tuple[torch.Tensor, list[int]]:
    """The result from four stages, and the peak memory of each rank."""
    forced = force(model, (x,), lines=straight(RANKS), train=None)
    with graphpar.compile(model, forced.cluster, args=(x,), plan=forced.plan, weights=weights) as job:
        result = job(x)
        assert job.last_step is not None
        return result, [report.peak_bytes for report in job.last_step.reports]


def run(source: str, folder: Path) -> None:
    """Compile, run, compare, print."""
    torch.set_num_threads(1)
    if source == "files":
        write(folder)
    with graphpar.without_weights():
        model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
        tiny = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(LAYERS)))
    x = torch.randn(2, WIDTH)
    _, empty = measured(tiny, torch.randn(2, 4), init_alone)
    before = peak_bytes()
    weights = folder if source == "files" else fill
    result, ranks = measured(model, x, weights)
    after = peak_bytes()
    wanted = by_layers(folder if source == "files" else None, x)
    seen = {
        "model_bytes": MODEL_BYTES,
        "driver_bytes": after - before,
        "ranks_bytes": [peak - low for peak, low in zip(ranks, empty, strict=True)],
        "equal": torch.allclose(result, wanted, rtol=1e-4, atol=1e-5),
    }
    print(json.dumps(seen))


if __name__ == "__main__":
    run(sys.argv[1], Path(sys.argv[2]))
