"""Compiling the sharding search while other work goes on, without ever passing the time limit.

The first run of an installation compiles for some ten seconds of CPU time, later ones load what lies on
disk. The compiler works in a thread of its own and in the order in which a run needs things. Reductions,
a first answer and a first bound come from array operations until it is done with their loops. Most of
a compilation holds the interpreter's lock, so it goes on after the reductions only when told to.
"""

import enum
import threading

from graphpar.errors import GraphparError
from graphpar.partition.jit import COMPILED
from graphpar.partition.problems import ShardingProblem
from graphpar.partition.reduce import reduce_problem
from graphpar.partition.reduce_loops import compile_all
from graphpar.partition.shard_dual import DualAscent
from graphpar.partition.shard_local import LocalSearch
from graphpar.tracing import TRACING


class Stage(enum.Enum):
    """What a run needs compiled, in the order of its need."""

    REDUCE, BOUND, SEARCH = range(3)


class _Compiler:
    """A thread that compiles, what it has made ready, and what stopped it."""

    def __init__(self) -> None:
        self.ready = {stage: threading.Event() for stage in Stage}
        self.may_go_on = threading.Event()
        self.fault: Exception | None = None
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def wait(self, stage: Stage, most_s: float) -> bool:
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self.run, name="graphpar-compiler", daemon=True)
                self._thread.start()
        return self.ready[stage].wait(max(0.0, most_s))

    def run(self) -> None:
        try:
            self._compile()
        except Exception as fault:
            self.fault = fault
        finally:
            for event in self.ready.values():
                event.set()

    def _compile(self) -> None:
        with TRACING:
            compile_all()
        self.ready[Stage.REDUCE].set()
        self.may_go_on.wait()
        with TRACING:
            graph, rows = reduce_problem(_sample())
            dual = DualAscent(graph, rows)
            dual.sweep()
            chosen = dual.round_within_memory()
        self.ready[Stage.BOUND].set()
        with TRACING:
            LocalSearch(dual, chosen, 0).rehearse()


_COMPILER = _Compiler()


def go_on_warming() -> None:
    """Have the compiler go on after the first stage."""
    _COMPILER.may_go_on.set()


def warm_up(stage: Stage, most_s: float) -> bool:
    """Wait until a stage is compiled; returns whether it was ready in the given time.

    Raises:
        GraphparError: The compiler gave up.
    """
    if not COMPILED:
        return True
    is_ready = _COMPILER.wait(stage, most_s)
    if _COMPILER.fault is not None:
        raise GraphparError(
            f"the search could not be compiled ({_COMPILER.fault}); if a disk is full or a cache folder "
            "damaged, name another folder in NUMBA_CACHE_DIR"
        ) from _COMPILER.fault
    return is_ready


def _sample() -> ShardingProblem:
    """A small problem that reductions do not solve."""
    count, arity = 6, 3
    pairs = tuple((u, v) for u in range(count) for v in range(u + 1, count))
    tables = tuple(
        tuple(
            (7 * u + 5 * v + i * j * (3 + u) + (i + v) % 3 * 4) % 11
            for i in range(arity)
            for j in range(arity)
        )
        for u, v in pairs
    )
    return ShardingProblem(
        "sample",
        tuple((0, 4 + u) for u in range(count)),
        tuple(tuple((3 * u + 4 * i) % 7 for i in range(arity)) for u in range(count)),
        tuple(tuple(3 * (arity - i) for i in range(arity)) for _ in range(count)),
        pairs,
        tables,
        5 * count,
    )
