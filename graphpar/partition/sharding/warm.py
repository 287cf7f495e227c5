"""Compiling the sharding search while other work goes on, without ever passing the time limit.

The first run of an installation compiles for some ten seconds of CPU time, later ones load what lies on
disk. The compiler works in a thread of its own and in the order in which a run needs things. Reductions,
a first answer and a first bound come from array operations until it is done with their loops. Most of
a compilation holds the interpreter's lock, so what comes after the first answer waits to be called for.
"""

import enum
import threading
from collections.abc import Callable
from queue import SimpleQueue

import numpy as np

from graphpar.errors import GraphparError
from graphpar.partition.compiler_thread import CompilerThread
from graphpar.partition.jit import COMPILED
from graphpar.partition.problems import ShardingProblem
from graphpar.partition.sharding.ahead import better_choice
from graphpar.partition.sharding.first import first_choice
from graphpar.partition.sharding.raw import raw_problem
from graphpar.tracing import TRACING


class Stage(enum.Enum):
    """What a run may need compiled."""

    REDUCE, FIRST, TRIM, BOUND, SEARCH = range(5)


class _Compiler:
    """A thread that compiles what is asked for, what it has made ready, and what stopped it."""

    def __init__(self) -> None:
        self.ready = {stage: threading.Event() for stage in Stage}
        self.asked: set[Stage] = set()
        self.fault: Exception | None = None
        self._lock = threading.Lock()
        self._queue: SimpleQueue[Stage | None] = SimpleQueue()
        self._thread: CompilerThread | None = None
        self._search: Callable[[], None] | None = None
        self._stopping = False

    def ask(self, *stages: Stage) -> None:
        """Have stages compiled, one after the other."""
        with self._lock:
            if self._thread is None:
                self._thread = CompilerThread(self.run, "graphpar-compiler", self._end)
                self._thread.start()
            for stage in stages:
                if stage not in self.asked:
                    self.asked.add(stage)
                    self._queue.put(stage)

    def is_busy(self) -> bool:
        """Whether something asked for is not ready."""
        return any(not self.ready[stage].is_set() for stage in self.asked)

    def _end(self) -> None:
        self._stopping = True
        self._queue.put(None)

    def run(self) -> None:
        """The thread: compile until told to end."""
        while (stage := self._queue.get()) is not None and not self._stopping:
            try:
                with TRACING:
                    self._compile(stage)
            except Exception as fault:
                self.fault = fault
                for event in self.ready.values():
                    event.set()
                return
            self.ready[stage].set()

    def _compile(self, stage: Stage) -> None:
        if stage is Stage.FIRST:
            raw = raw_problem(_sample())
            better_choice(raw, first_choice(raw))
            return
        # Loaded late: a first answer does not wait for the rest of the engine.
        from graphpar.partition.sharding import reduce_loops
        from graphpar.partition.sharding import trim as shard_trim
        from graphpar.partition.sharding.condense import condense

        if stage is Stage.REDUCE:
            reduce_loops.compile_all()
        elif stage is Stage.TRIM:
            raw = raw_problem(_sample())
            condense(raw, shard_trim.trim(raw))
        elif stage is Stage.BOUND:
            self._search = _bounded()
        elif self._search is not None:
            self._search()


def _bounded() -> Callable[[], None]:
    """Have the loops of bounds compiled; what is returned does so with those of searches."""
    from graphpar.partition.sharding.branch import tighten
    from graphpar.partition.sharding.dual import DualAscent
    from graphpar.partition.sharding.local import LocalSearch
    from graphpar.partition.sharding.reduce import reduce_problem

    dual = DualAscent(*reduce_problem(_sample()))
    dual.sweep()
    chosen = dual.round_within_memory()

    def search() -> None:
        LocalSearch(dual, chosen, 0).rehearse()
        tighten(dual.flat, np.ones(len(dual.theta), dtype=np.bool_))

    return search


_COMPILER = _Compiler()


def begin_warming() -> None:
    """Have the compiler begin with what answers to a large problem need, in the order of their need.

    Reductions come last: array operations stand in for their loops.
    """
    if COMPILED:
        _COMPILER.ask(Stage.FIRST, Stage.BOUND, Stage.TRIM, Stage.REDUCE)


def go_on_warming() -> None:
    """Have the compiler go on to what bounds and searches need."""
    if COMPILED:
        _COMPILER.ask(Stage.REDUCE, Stage.BOUND, Stage.SEARCH)


def is_compiling() -> bool:
    """Whether something that was called for is not ready."""
    return _COMPILER.is_busy()


def warm_up(stage: Stage, most_s: float) -> bool:
    """Have a stage compiled; returns whether it was ready in the given time.

    Raises:
        GraphparError: The compiler gave up.
    """
    if not COMPILED:
        return True
    _COMPILER.ask(stage)
    is_ready = _COMPILER.ready[stage].wait(max(0.0, most_s))
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
