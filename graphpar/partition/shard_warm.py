"""Compiling the sharding search before it is needed, without ever passing the time limit.

The first run of an installation compiles for some tens of seconds, later ones load what lies on disk.
"""

import threading

from graphpar.partition.jit import COMPILED
from graphpar.partition.problems import ShardingProblem
from graphpar.partition.reduce import reduce_problem
from graphpar.partition.shard_dual import DualAscent
from graphpar.partition.shard_local import LocalSearch

_WARM = threading.Event()
_LOCK = threading.Lock()
_THREADS: list[threading.Thread] = []


def warm_up(most_s: float) -> bool:
    """Compile everything once per process; returns whether it was ready in the given time."""
    if not COMPILED or _WARM.is_set():
        return True
    with _LOCK:
        if not _THREADS:
            _THREADS.append(threading.Thread(target=_compile, name="graphpar-compiler", daemon=True))
            _THREADS[0].start()
    return _WARM.wait(most_s)


def _compile() -> None:
    graph, rows = reduce_problem(_sample())
    dual = DualAscent(graph, rows)
    dual.sweep()
    search = LocalSearch(dual, dual.round_within_memory(), 0)
    search.rehearse()
    _WARM.set()


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
