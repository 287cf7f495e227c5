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


_READY = {stage: threading.Event() for stage in Stage}
_GO_ON = threading.Event()
_LOCK = threading.Lock()
_THREADS: list[threading.Thread] = []
_FAULTS: list[Exception] = []


def go_on_warming() -> None:
    """Have the compiler go on after the first stage."""
    _GO_ON.set()


def warm_up(stage: Stage, most_s: float) -> bool:
    """Wait until a stage is compiled; returns whether it was ready in the given time.

    Raises:
        GraphparError: The compiler gave up.
    """
    if not COMPILED:
        return True
    with _LOCK:
        if not _THREADS:
            _THREADS.append(threading.Thread(target=_compile, name="graphpar-compiler", daemon=True))
            _THREADS[0].start()
    is_ready = _READY[stage].wait(max(0.0, most_s))
    if _FAULTS:
        raise GraphparError(
            f"the search could not be compiled ({_FAULTS[0]}); if a disk is full or a cache folder "
            "damaged, name another folder in NUMBA_CACHE_DIR"
        ) from _FAULTS[0]
    return is_ready


def _compile() -> None:
    try:
        with TRACING:
            compile_all()
        _READY[Stage.REDUCE].set()
        _GO_ON.wait()
        with TRACING:
            graph, rows = reduce_problem(_sample())
            dual = DualAscent(graph, rows)
            dual.sweep()
            chosen = dual.round_within_memory()
        _READY[Stage.BOUND].set()
        with TRACING:
            LocalSearch(dual, chosen, 0).rehearse()
    except Exception as fault:
        _FAULTS.append(fault)
    finally:
        for event in _READY.values():
            event.set()


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
