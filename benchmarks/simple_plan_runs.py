"""Simple plans to compare an answer with, each in another process that ends with its limit.

Building the textbook programme of a large cluster alone takes longer than one waits for it, and solvers
look at the clock when they like. So a process of its own makes these plans, one after another; one that
has used up the processor time of a plan is ended by the system, and a new one makes the rest.
"""

import multiprocessing
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess

from slot_programme import slot_programme
from uniform_plans import uniform_plan

from graphpar.cost import CostTable
from graphpar.errors import InfeasibleError
from graphpar.partition.baselines import best_like_subset, data_parallel, even_split, greedy_split
from graphpar.partition.types import Partition

_SLACK = 2.0
"""A plan has this multiple of its limit before its process is ended: some price an answer at the end."""

_PATIENCE = 20.0
"""A process is given up after this many times the limit by the clock on the wall: machines are busy."""


@dataclass(frozen=True)
class Simple:
    """The step of a simple plan, or why there is none."""

    step_s: float | None
    why_none: str = ""


Way = Callable[[CostTable, Partition, float], Partition]
"""Makes a plan of a table, the plan it is compared with, and a limit in seconds."""

_WAYS: dict[str, Way] = {
    "even split": lambda table, found, limit_s: even_split(table),
    "in proportion to speed": lambda table, found, limit_s: greedy_split(table),
    "data parallel": lambda table, found, limit_s: data_parallel(table),
    "devices of one kind": lambda table, found, limit_s: best_like_subset(table, time_limit_s=limit_s),
    "stage-slot programme": slot_programme,
}
_WITH_OPTIONS: dict[str, Way] = {
    "equal stages": lambda table, found, limit_s: uniform_plan(
        table, by_speed=False, time_limit_s=limit_s
    ),
    "equal stages by speed": lambda table, found, limit_s: uniform_plan(
        table, by_speed=True, time_limit_s=limit_s
    ),
}


class SimplePlans:
    """Makes simple plans in another process, which is begun when it is needed and after every end."""

    def __init__(self) -> None:
        self._process: SpawnProcess | None = None
        self._pipe: Connection | None = None

    def steps(self, table: CostTable, found: Partition, limit_s: float) -> dict[str, Simple]:
        """Every simple plan of a table by name; `limit_s` is processor time for each."""
        names = [*_WAYS, *(_WITH_OPTIONS if table.modes else ())]
        return {name: self._step(name, table, found, limit_s) for name in names}

    def _step(self, name: str, table: CostTable, found: Partition, limit_s: float) -> Simple:
        pipe = self._ready()
        none = Simple(None, f"no answer in {_SLACK * limit_s:.0f} s")
        try:
            pipe.send((name, table, found, limit_s))
            if pipe.poll(_PATIENCE * limit_s):
                answer = pipe.recv()
                assert isinstance(answer, Simple)
                return answer
        except (EOFError, ConnectionError):
            pass
        self.close()
        return none

    def _ready(self) -> Connection:
        if self._pipe is None or self._process is None or not self._process.is_alive():
            context = multiprocessing.get_context("spawn")
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
            self._process.start()
            theirs.close()
        return self._pipe

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
        self._process = self._pipe = None


def _serve(pipe: Connection) -> None:
    """Make plans until the other side is gone."""
    time.monotonic = time.process_time
    while True:
        try:
            name, table, found, limit_s = pipe.recv()
        except EOFError:
            return
        used = resource.getrusage(resource.RUSAGE_SELF)
        until_s = int(used.ru_utime + used.ru_stime + _SLACK * limit_s) + 1
        _, most = resource.getrlimit(resource.RLIMIT_CPU)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        # The system ends a process at the lower of the two limits; it may be raised again.
        resource.setrlimit(resource.RLIMIT_CPU, (until_s, most))
        pipe.send(_made((_WAYS | _WITH_OPTIONS)[name], table, found, limit_s))


def _made(way: Way, table: CostTable, found: Partition, limit_s: float) -> Simple:
    try:
        return Simple(way(table, found, limit_s).objective_s)
    except InfeasibleError as error:
        late = error.limit == "time"
        return Simple(None, f"no answer in {limit_s:.0f} s" if late else "does not fit")
