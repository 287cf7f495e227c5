"""Runs the harness of `coverage.py`: one process for each architecture, rows, the command line."""

import argparse
import contextlib
import json
import os
import queue
import re
import select
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import torch
import transformers
import transformers.modeling_layers
import transformers.modeling_utils
import transformers.models.auto.modeling_auto
from coverage_case import WORKERS, Row, Until, run_case

from graphpar.runtime.fork_server import ForkServer

ROOT = Path(__file__).parents[1]
LISTS = Path(__file__).with_name("coverage_lists.json")
TIME_LIMIT_S = 300.0
"""Processor time that one architecture may take."""
IDLE_S = 180.0
"""How long neither its process may use the processor."""
MEMORY_BYTES = 6 * 2**30
"""Memory that its process may hold: a model that is not tiny must not take that of the others."""
LOOK_S = 0.5
_FORKING = threading.Lock()


@dataclass(frozen=True)
class Terms:
    """How each architecture is run.

    Attributes:
        limit_s: Processor time that it may take.
        workers: Over how many workers.
        until: How far.
    """

    limit_s: float
    workers: Sequence[int]
    until: Until


def run_all(names: Sequence[str], terms: Terms, jobs: int = 1) -> Iterator[Row]:
    """One row for each name, in order; `jobs` architectures at a time."""
    servers: queue.SimpleQueue[ForkServer | None] = queue.SimpleQueue()
    for _ in range(jobs):
        servers.put(ForkServer())

    def run(name: str) -> Row:
        server = servers.get() or ForkServer()
        row, killed = _in_own_process(name, terms, server)
        if killed:  # it may have been in the middle of a request to the server
            server.close()
        servers.put(None if killed else server)
        return row

    with ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(run, names)


def _in_own_process(name: str, terms: Terms, server: ForkServer) -> tuple[Row, bool]:
    """Run one architecture in a forked process and read its row; a lost or late one becomes a failure.

    Also tells whether it was killed.
    """
    reading, writing = os.pipe()
    began = time.perf_counter()
    with _FORKING:
        pid = os.fork()
        if pid == 0:
            os.close(reading)
            _child(name, terms, server, writing)
        os.close(writing)
    with contextlib.suppress(OSError):  # the child does the same; whoever is first
        os.setpgid(pid, pid)
    text, late = _read(reading, _Watch(pid, terms.limit_s))
    os.close(reading)
    if late:
        os.killpg(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    rows = [json.loads(line) for line in text.splitlines() if line.endswith("}")]
    row = Row(**rows[-1]) if rows else Row(name)
    if late or row.status == "running":
        row.status, row.reason = "fail", late or _describe(status)
        row.seconds = round(time.perf_counter() - began, 2)
    return row, bool(late)


def _child(name: str, terms: Terms, server: ForkServer, writing: int) -> None:
    """What the forked process does; it never returns."""
    os.setpgid(0, 0)
    # Processes use a server of workers that the parent started, which spares each an import of torch.
    server.adopt()
    os.dup2(2, 1)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    row = Row(name, status="running")

    def tell() -> None:
        text = without_folders(json.dumps(asdict(row), default=str))
        os.write(writing, (text + "\n").encode())

    try:
        run_case(name, row, terms.workers, tell, terms.until)
        tell()
    finally:
        os._exit(0)


def without_folders(text: str) -> str:
    """A text whose paths do not tell where this machine keeps its packages.

    >>> without_folders("/usr/lib/python3.11/site-packages/torch/nn/functional.py:12: no")
    'torch/nn/functional.py:12: no'
    """
    # Packages first: they may be kept in a folder of this checkout.
    return re.sub(r"(?<![\w.])/[^\s\"']*/site-packages/", "", text).replace(f"{ROOT}{os.sep}", "")


class _Watch:
    """Tells when a process has had enough: of processor time, of memory, or of doing nothing.

    A limit of the wall clock would fail a model because the machine has other work.
    """

    def __init__(self, pid: int, limit_s: float) -> None:
        self.pid, self.limit_s = pid, limit_s
        self._used_s = self._idle_s = 0.0
        self._seen = time.perf_counter()

    def verdict(self) -> str:
        """Why the process must end, empty while it may go on."""
        now = time.perf_counter()
        # A long pause between two looks is this process's own: it was stopped, like the other one.
        passed_s, self._seen = min(now - self._seen, 2 * LOOK_S), now
        used_s = _processor_seconds(self.pid)
        if used_s is None:
            used_s = self._used_s + passed_s
        self._idle_s = self._idle_s + passed_s if used_s - self._used_s < 0.01 * passed_s else 0.0
        self._used_s = used_s
        if used_s > self.limit_s:
            return f"no end after {self.limit_s:g} s of processor time"
        if _memory_bytes(self.pid) > MEMORY_BYTES:
            return f"more than {MEMORY_BYTES / 2**30:g} GiB of memory"
        return f"nothing happened for {IDLE_S:g} s" if self._idle_s > IDLE_S else ""


def _processor_seconds(pid: int) -> float | None:
    """User and system time of a running process; None where the system does not tell."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _memory_bytes(pid: int) -> int:
    """Resident memory of a running process; 0 where the system does not tell."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="utf-8").split()[1])
    except (OSError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def _read(descriptor: int, watch: _Watch) -> tuple[str, str]:
    """What the child writes until it ends, and why it was not waited for any longer."""
    text = b""
    while not (why := watch.verdict()):
        if not select.select([descriptor], [], [], LOOK_S)[0]:
            continue
        part = os.read(descriptor, 2**16)
        if not part:
            break
        text += part
    return text.decode(), why


def _describe(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        return f"the process was killed by {signal.Signals(-code).name}"
    return f"the process ended with exit code {code}"


def _lists() -> dict[str, dict[str, list[str]]]:
    found: dict[str, dict[str, list[str]]] = json.loads(LISTS.read_text(encoding="utf-8"))
    return found


def _names(options: Any) -> list[str]:
    lists = _lists()
    names = list(options.names)
    for key in options.list or ([] if names else ["well-known"]):
        names += [name for group in lists[key].values() for name in group]
    return names


def _counts(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def main(description: str | None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="prefixes such as Llama, GPT2, T5")
    parser.add_argument(
        "--list", action="append", choices=list(_lists()), help="a list of coverage_lists.json"
    )
    parser.add_argument("--workers", type=_counts, default=WORKERS, help="how many, such as 2,3")
    parser.add_argument(
        "--time-limit", type=float, default=TIME_LIMIT_S, help="processor seconds for each"
    )
    parser.add_argument(
        "--until", choices=get_args(Until), default="done", help="a survey: stop before the rest"
    )
    parser.add_argument("--jobs", type=int, default=1, help="architectures at a time")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    options = parser.parse_args()
    torch.set_num_threads(1)
    terms = Terms(options.time_limit, options.workers, options.until)
    rows = []
    for row in run_all(_names(options), terms, options.jobs):
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
