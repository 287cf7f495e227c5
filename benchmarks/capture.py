"""How long capturing large models without weights takes, and how much memory, with and without folding.

    python benchmarks/capture.py --json

Each capture runs in a process of its own, so that its peak memory (torch and transformers included) is
its own: training mode with labels, two unlike batch sizes, on torch's meta device. `followed` is the
same model with every block followed one by one; the two graphs are compared by a hash of their text.
"""

import argparse
import hashlib
import json
import logging
import resource
import subprocess
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from typing import Any

import transformers

from graphpar.frontend.capture import capture
from graphpar.frontend.fold import LEAST_BLOCKS
from graphpar.ir.text import format_graph
from graphpar.model_spec import load_model

CASES = {
    "llama-8b": (64, 2048),
    "llama-70b": (64, 2048),
    "llama-405b": (64, 2048),
    "mixtral-8x22b": (64, 2048),
    "deepseek-v3": (64, 2048),
}
"""Model to batch size and tokens per sample."""


@dataclass(frozen=True)
class Row:
    """One capture."""

    name: str
    ops: int
    stamped: int
    build_s: float
    seconds: float
    cpu_s: float
    peak_bytes: int
    text_sha256: str
    unsplittable: str


def run(name: str, fold: int) -> Row:
    """Capture a model in this process."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    logging.basicConfig(stream=sys.stderr)
    logging.getLogger("graphpar.capture").setLevel(logging.INFO)
    batch, length = CASES[name]
    began = time.perf_counter()
    loaded = load_model(f"hf:{name}", batch_size=batch, seq_len=length, train=True, weights=False)
    build_s = time.perf_counter() - began
    began, computed = time.perf_counter(), time.process_time()
    made = capture(loaded.model, loaded.args, loaded.kwargs, loss="returned", training=True, fold=fold)
    seconds, cpu_s = time.perf_counter() - began, time.process_time() - computed
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    digest = hashlib.sha256(format_graph(made.graph).encode()).hexdigest()
    ops = len(made.graph.ops)
    return Row(name, ops, made.stamped, build_s, seconds, cpu_s, peak_bytes, digest, made.unsplittable)


def run_apart(name: str, fold: int) -> Row:
    """Capture a model in a fresh process."""
    command = [sys.executable, __file__, "--alone", name, "--fold", str(fold)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return Row(**json.loads(done.stdout.splitlines()[-1]))


def compare(name: str, followed: bool) -> dict[str, Any]:
    """A model captured with folding, and beside it without where that is asked for."""
    folded = run_apart(name, LEAST_BLOCKS)
    result: dict[str, Any] = asdict(folded)
    if followed:
        whole = run_apart(name, 0)
        result["followed"] = asdict(whole)
        result["equal"] = folded.text_sha256 == whole.text_sha256
        result["cpu_ratio"] = whole.cpu_s / folded.cpu_s
    return result


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--folded-only", action="store_true", help="do not follow every block as well")
    parser.add_argument("--alone", choices=CASES, help="capture this here and print its row as JSON")
    parser.add_argument(
        "--fold", type=int, default=LEAST_BLOCKS, help="with --alone: equal blocks needed"
    )
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    options = parser.parse_args()
    if options.alone:
        print(json.dumps(asdict(run(options.alone, options.fold))))
        return
    rows = [compare(name, not options.folded_only) for name in options.cases]
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    for row in rows:
        print(
            f"{row['name']}: {row['seconds']:.1f} s ({row['cpu_s']:.1f} s of CPU), "
            f"peak {row['peak_bytes'] / 2**30:.2f} GiB, {row['ops']} ops, {row['stamped']} stamped"
        )
        if "followed" in row:
            whole = row["followed"]
            print(
                f"    every block followed: {whole['seconds']:.1f} s ({whole['cpu_s']:.1f} s of CPU), "
                f"peak {whole['peak_bytes'] / 2**30:.2f} GiB, "
                f"graph {'equal' if row['equal'] else 'DIFFERENT'}"
            )


if __name__ == "__main__":
    main()
