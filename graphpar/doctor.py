"""Checks of the machine and the installation, each with what to try when it fails."""

import importlib
import importlib.util
import os
import platform
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import msgspec

from graphpar import catalogue
from graphpar.calibration import Calibration
from graphpar.cluster_build import num_cores
from graphpar.partition.solver import Backend, Program
from graphpar.units import format_bytes

State = Literal["ok", "warning", "missing"]

_OLDEST_PYTHON = (3, 11)
_TORCH_RANGE = ((2, 11), (2, 14))
_SMALLEST_MEMORY_BYTES = 2 * 2**30
_SMALLEST_SHARED_BYTES = 64 * 2**20


class Finding(msgspec.Struct, frozen=True):
    """What one check found; `remedy` is empty when there is nothing to do."""

    name: str
    state: State
    text: str
    remedy: str = ""


def examine() -> tuple[Finding, ...]:
    """Run all checks; a check that itself fails is a finding, not an error."""
    return tuple(_guarded(name, check) for name, check in _CHECKS)


def _guarded(name: str, check: Callable[[str], Finding]) -> Finding:
    try:
        return check(name)
    except Exception as error:
        return Finding(name, "missing", f"{type(error).__name__}: {error}")


def _python(name: str) -> Finding:
    text = f"{platform.python_version()} on {platform.platform(terse=True)}"
    if sys.version_info[:2] >= _OLDEST_PYTHON:
        return Finding(name, "ok", text)
    oldest = ".".join(map(str, _OLDEST_PYTHON))
    return Finding(name, "missing", text, f"a Python of version {oldest} or newer")


def _torch(name: str) -> Finding:
    torch = _import_torch()
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    text = f"{torch.__version__}, {build}"
    low, high = _TORCH_RANGE
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if low <= version < high:
        return Finding(name, "ok", text)
    wanted = f"torch>={low[0]}.{low[1]},<{high[0]}.{high[1]}"
    return Finding(name, "warning", f"{text}, which was not tested", f"pip install '{wanted}'")


def _import_torch() -> Any:
    return importlib.import_module("torch")


def _gloo(name: str) -> Finding:
    distributed = _import_torch().distributed
    if distributed.is_available() and distributed.is_gloo_available():
        return Finding(name, "ok", "available for CPU workers")
    return Finding(name, "missing", "not in this torch", "a torch build with distributed and gloo")


def _accelerators(name: str) -> Finding:
    torch = _import_torch()
    if not torch.cuda.is_available():
        return Finding(name, "ok", "none; CPU workers are used")
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    text = f"{len(names)}: {', '.join(sorted(set(names)))}"
    if torch.distributed.is_available() and torch.distributed.is_nccl_available():
        return Finding(name, "ok", f"{text}; NCCL available")
    return Finding(name, "warning", f"{text}; no NCCL", "a torch build with NCCL")


def _loopback(name: str) -> Finding:
    with socket.socket() as server, socket.socket() as client:
        server.bind(("127.0.0.1", 0))
        server.listen(1)
        client.settimeout(5)
        client.connect(server.getsockname())
    return Finding(name, "ok", "a port on 127.0.0.1 can be opened and reached")


def _solver(backend: Backend, module: str) -> Callable[[str], Finding]:
    def check(name: str) -> Finding:
        if importlib.util.find_spec(module) is None:
            return Finding(name, "missing", "not installed", f"pip install {module}")
        program = Program("doctor")
        x = program.integer("x", 0, 10)
        program.constrain([(2, x)], ">=", 7, "at_least")
        program.minimize([(1, x)])
        outcome = program.solve(time_limit_s=30, backend=backend)
        if outcome.has_point and outcome.value(x) == 4:
            return Finding(name, "ok", "solves a small integer programme")
        return Finding(name, "missing", f"gave {outcome}", f"pip install --force-reinstall {module}")

    return check


def _cores(name: str) -> Finding:
    cores = num_cores()
    if cores > 1:
        return Finding(name, "ok", f"{cores} cores may be used")
    return Finding(name, "warning", "1 core: local workers take turns, which hides any speed-up")


def _memory(name: str) -> Finding:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    text = f"{format_bytes(total)} of main memory"
    if total >= _SMALLEST_MEMORY_BYTES:
        return Finding(name, "ok", text)
    return Finding(name, "warning", text, f"at least {format_bytes(_SMALLEST_MEMORY_BYTES)}")


def _shared_memory(name: str) -> Finding:
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return Finding(name, "ok", "not used on this system")
    free = shutil.disk_usage(folder).free
    text = f"{format_bytes(free)} free in {folder}"
    if free >= _SMALLEST_SHARED_BYTES:
        return Finding(name, "ok", text)
    return Finding(name, "warning", text, "a larger shared memory (docker run --shm-size=1g)")


def _calibration(name: str) -> Finding:
    found, why_not = Calibration.look()
    if found is None:
        return Finding(
            name,
            "warning",
            why_not or "this machine was not measured; predictions use catalogue numbers",
            "graphpar calibrate",
        )
    return Finding(name, "ok", f"measured: {found.fingerprint.processor}")


def _catalogue(name: str) -> Finding:
    counts = (len(catalogue.devices()), len(catalogue.links()), len(catalogue.instances()))
    return Finding(name, "ok", "{} devices, {} links, {} instance types".format(*counts))


def _transformers(name: str) -> Finding:
    if importlib.util.find_spec("transformers") is None:
        return Finding(name, "warning", "no hf: models", "pip install 'graphpar[hf]'")
    return Finding(name, "ok", "installed, hf: models can be used")


_CHECKS: tuple[tuple[str, Callable[[str], Finding]], ...] = (
    ("python", _python),
    ("torch", _torch),
    ("gloo", _gloo),
    ("accelerators", _accelerators),
    ("loopback", _loopback),
    ("solver HiGHS", _solver("highs", "highspy")),
    ("solver CBC", _solver("cbc", "pulp")),
    ("cores", _cores),
    ("memory", _memory),
    ("shared memory", _shared_memory),
    ("calibration", _calibration),
    ("catalogue", _catalogue),
    ("transformers", _transformers),
)
