"""Which architectures of transformers go through, unmodified: captured, planned, run, compared.

    python benchmarks/coverage.py --json Llama GPT2 T5
    python benchmarks/coverage.py --list well-known

Names are the prefixes of transformers' classes or its model types. Nothing is downloaded: each model is
built tiny from its configuration with random weights. For each architecture the inputs come from the
signature of its forward; it is captured, planned over 2 and over 3 emulated workers of unlike speed
(where the plan uses fewer, it is cut over all of them in proportion to their speed), run, and compared
with one device: outputs, loss, every gradient, and buffers after the step. Evaluation and training
without dropout are compared with the eager model, training with dropout with the captured graph on one
device under the same seed.

Each architecture runs in a process of its own under a time limit.
"""

import argparse
import contextlib
import json
import os
import select
import signal
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
import transformers.modeling_layers
import transformers.modeling_utils
import transformers.models.auto.modeling_auto
from coverage_case import WORKERS, Row, run_case

from graphpar.runtime.fork_server import ForkServer

LISTS = Path(__file__).with_name("coverage_lists.json")
TIME_LIMIT_S = 180.0


def run_all(names: Iterable[str], limit_s: float, workers: Sequence[int]) -> Iterator[Row]:
    """One row for each name, in order."""
    server = ForkServer.get()
    for name in names:
        yield _in_own_process(name, limit_s, workers, server)


def _in_own_process(name: str, limit_s: float, workers: Sequence[int], server: ForkServer) -> Row:
    """Run one architecture in a forked process and read its row; a lost or late one becomes a failure."""
    reading, writing = os.pipe()
    began = time.perf_counter()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        _child(name, workers, server, writing)
    with contextlib.suppress(OSError):  # the child does the same; whoever is first
        os.setpgid(pid, pid)
    os.close(writing)
    text, late = _read(reading, began + limit_s)
    os.close(reading)
    if late:
        os.killpg(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    rows = [json.loads(line) for line in text.splitlines() if line.endswith("}")]
    row = Row(**rows[-1]) if rows else Row(name)
    if late or row.status == "running":
        why = f"no end after {limit_s:.0f} s" if late else _describe(status)
        row.status, row.reason = "fail", why
        row.seconds = round(time.perf_counter() - began, 2)
    return row


def _child(name: str, workers: Sequence[int], server: ForkServer, writing: int) -> None:
    """What the forked process does; it never returns."""
    os.setpgid(0, 0)
    # One process at a time uses the parent's server of workers, which spares each an import of torch.
    server.owner = os.getpid()
    os.dup2(2, 1)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    row = Row(name, status="running")

    def tell() -> None:
        os.write(writing, (json.dumps(asdict(row), default=str) + "\n").encode())

    try:
        run_case(name, row, workers, tell)
        tell()
    finally:
        os._exit(0)


def _read(descriptor: int, until: float) -> tuple[str, bool]:
    """What the child writes until it ends, and whether that took too long."""
    text = b""
    while (rest := until - time.perf_counter()) > 0:
        if not select.select([descriptor], [], [], rest)[0]:
            break
        part = os.read(descriptor, 2**16)
        if not part:
            return text.decode(), False
        text += part
    return text.decode(), True


def _describe(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        return f"the process was killed by {signal.Signals(-code).name}"
    return f"the process ended with exit code {code}"


def _names(options: Any) -> list[str]:
    lists = json.loads(LISTS.read_text(encoding="utf-8"))
    names = list(options.names)
    for key in options.list or ([] if names else ["well-known"]):
        names += [name for group in lists[key].values() for name in group]
    return names


def _counts(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="prefixes such as Llama, GPT2, T5")
    parser.add_argument(
        "--list", action="append", help="a list of coverage_lists.json: well-known, others"
    )
    parser.add_argument("--workers", type=_counts, default=WORKERS, help="how many, such as 2,3")
    parser.add_argument("--time-limit", type=float, default=TIME_LIMIT_S, help="seconds for each")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for row in run_all(_names(options), options.time_limit, options.workers):
        rows.append(row)
        line = f"{row.name:<24}{row.status:<6}{row.stage:<9}{row.seconds:>7.1f} s  {_error(row):<9}"
        print(line, row.reason[:400], file=sys.stderr if options.json else sys.stdout, flush=True)
    if options.json:
        print(json.dumps({"rows": [asdict(row) for row in rows]}, indent=1))
        return
    passed = sum(row.status == "pass" for row in rows)
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    print(f"{passed} of {len(rows)} pass ({versions})")


def _error(row: Row) -> str:
    return "" if row.max_error is None else f"{row.max_error:.1e}"


if __name__ == "__main__":
    main()
