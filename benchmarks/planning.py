"""How long planning takes and how much memory it needs, for models that are never given weights.

    python benchmarks/planning.py --json

Each model is planned in a process of its own, so that its peak memory is its own: built on torch's
meta device, captured, passed through the first passes, cut into units, priced, partitioned, and
predicted. The phase `imports` is torch and transformers.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

_STARTED = time.perf_counter()

import torch  # noqa: E402 - importing it is what is timed
import transformers  # noqa: E402, F401

from graphpar.cluster import Cluster  # noqa: E402
from graphpar.errors import InfeasibleError  # noqa: E402
from graphpar.frontend.capture import capture  # noqa: E402
from graphpar.ir.chain import build_chain  # noqa: E402
from graphpar.model_spec import load_model  # noqa: E402
from graphpar.partition.pipeline import partition  # noqa: E402
from graphpar.passes.batch import mixing_reason  # noqa: E402
from graphpar.planner import plan_of, price  # noqa: E402
from graphpar.preparation import CAPTURE_PASSES, Prepared  # noqa: E402
from graphpar.training import Training  # noqa: E402

_IMPORTS_S, _IMPORTS_CPU_S = time.perf_counter() - _STARTED, time.process_time()


@dataclass(frozen=True)
class Case:
    """A model, its batch, and the machines it is planned for; training with AdamW unless said."""

    model: str
    batch: int
    length: int
    nodes: tuple[dict[str, Any], ...]
    train: bool = True


def node(name: str, kind: str, count: int) -> dict[str, Any]:
    """One machine of equal devices."""
    return {"name": name, "devices": {"kind": kind, "count": count}}


H100_AND_V100 = (node("h", "h100-sxm-80gb", 2), node("v", "v100-sxm2-32gb", 4))
LARGE_AND_MIXED = (
    *(node(f"h{i}", "h100-sxm-80gb", 8) for i in range(4)),
    *(node(f"a{i}", "a100-sxm-80gb", 8) for i in range(4)),
    *(node(f"v{i}", "v100-sxm2-32gb", 8) for i in range(4)),
)
CASES = {
    "gpt2": Case("gpt2", 64, 1024, H100_AND_V100),
    "llama-8b": Case("llama-8b", 64, 2048, H100_AND_V100),
    "llama-8b-inference": Case("llama-8b", 64, 2048, H100_AND_V100, train=False),
    "llama-70b": Case("llama-70b", 256, 2048, LARGE_AND_MIXED),
    "llama-405b": Case("llama-405b", 256, 2048, LARGE_AND_MIXED),
    "mixtral-8x22b": Case("mixtral-8x22b", 256, 2048, LARGE_AND_MIXED),
    "deepseek-v3": Case("deepseek-v3", 256, 2048, LARGE_AND_MIXED),
}


@dataclass
class Laps:
    """Seconds and processor seconds of named phases."""

    seconds: dict[str, float] = field(default_factory=dict)
    cpu_s: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time the body under a name, also when it fails."""
        began, computed = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            self.seconds[name] = time.perf_counter() - began
            self.cpu_s[name] = time.process_time() - computed


@dataclass(frozen=True)
class Row:
    """What planning one case took; `status` is the plan's, or why there is none."""

    name: str
    ops: int
    units: int
    devices: int
    seconds: dict[str, float]
    cpu_s: dict[str, float]
    peak_bytes: int
    status: str
    gap: float | None
    predicted_step_s: float | None

    @property
    def total_s(self) -> float:
        """All phases together."""
        return sum(self.seconds.values())


def run(name: str, time_limit_s: float) -> Row:
    """Plan one case in this process."""
    warnings.simplefilter("ignore")
    case = CASES[name]
    laps = Laps({"imports": _IMPORTS_S}, {"imports": _IMPORTS_CPU_S})
    training = Training(optimizer=lambda p: torch.optim.AdamW(p, lr=3e-4)) if case.train else None
    cluster = Cluster.from_dict({"nodes": list(case.nodes), "network": "infiniband-hdr"})
    with laps.phase("build"):
        loaded = load_model(
            f"hf:{case.model}",
            batch_size=case.batch,
            seq_len=case.length,
            train=case.train,
            weights=False,
        )
    with laps.phase("capture"):
        loss = "returned" if case.train else None
        captured = capture(loaded.model, loaded.args, loaded.kwargs, loss=loss, training=case.train)
    with laps.phase("passes"):
        graph, _ = CAPTURE_PASSES.run(captured.graph)
        reason = captured.unsplittable or mixing_reason(graph)
    with laps.phase("chain"):
        prepared = Prepared(captured, graph, build_chain(graph), reason)
    with laps.phase("price"):
        table = price(prepared, cluster, train=training, precision="float32", calibration=None)
    status, gap, predicted_s = "", None, None
    try:
        with laps.phase("partition"):
            found = partition(
                table, gap=0.01, time_limit_s=time_limit_s, schedule="auto", microbatches="auto"
            )
        with laps.phase("plan"):
            plan = plan_of(prepared, cluster, table, found)
        status, gap, predicted_s = plan.status, plan.gap, plan.predicted_step_s
    except InfeasibleError as error:
        status = f"no plan: {error}"
    return Row(
        name=name,
        ops=len(graph.ops),
        units=len(prepared.chain.units),
        devices=len(cluster.devices),
        seconds=laps.seconds,
        cpu_s=laps.cpu_s,
        peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        status=status,
        gap=gap,
        predicted_step_s=predicted_s,
    )


def run_apart(name: str, time_limit_s: float) -> Row:
    """Plan one case in a fresh process."""
    command = [sys.executable, __file__, "--alone", name, "--time-limit", str(time_limit_s)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return Row(**json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--time-limit", type=float, default=60.0, help="seconds for the partitioner")
    parser.add_argument("--alone", choices=CASES, help="plan this case here and print its row as JSON")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    options = parser.parse_args()
    if options.alone:
        print(json.dumps(asdict(run(options.alone, options.time_limit))))
        return
    rows = [run_apart(name, options.time_limit) for name in options.cases]
    if options.json:
        print(json.dumps([asdict(row) | {"total_s": row.total_s} for row in rows], indent=2))
        return
    for row in rows:
        phases = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in row.seconds.items())
        print(
            f"{row.name}: {row.total_s:.1f} s ({phases}), peak {row.peak_bytes / 2**30:.2f} GiB, "
            f"{row.ops} ops, {row.units} units, {row.devices} devices: {row.status}"
        )


if __name__ == "__main__":
    main()
