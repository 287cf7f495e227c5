"""Compiling the loops of the chain search in the background, as `sharding.warm` does for sharding.

The first run of an installation compiles for some seconds, later ones load what lies on disk. A small
search does not need the loops, and one that must end before they are compiled goes without; the next one
goes on compiling.
"""

import math
import threading
import time

from graphpar.partition.compiler_thread import CompilerThread, say_once
from graphpar.partition.jit import COMPILED, is_kept
from graphpar.tracing import TRACING

LOOPS_PAY = 1_000
"""Columns times sets of devices from which on loaded loops are faster than array operations, ..."""

_LOADING_PAYS, _COMPILING_PAYS = 20, 1_000
"""... so many times as many from which on loops are worth being loaded from disk, and being compiled,
which takes some 12 s."""

_LEAST_S = 3.0
"""With less time left nobody has them compiled, unless others had so little before that it adds up to
this: then beside the search."""

_SHARE_COMPILING, _SHARE_LOADING = 0.7, 0.3
"""Share of the time left that is waited for the compiler, as without loops all of it would hardly do.
Then it stops, for beside it a search would take twice as long. And for what lies on disk."""

_LOADING_S, _MOST_LOADING_S = 0.6, 2.0
"""What loading takes in seconds, and on slow machines."""


class _Compiler:
    """A thread that compiles by running everything once on a small example."""

    def __init__(self) -> None:
        self.ready = threading.Event()
        self.fault: Exception | None = None
        self.lacking_s = 0.0
        """What short searches that went without it had left."""
        self._lock = threading.Lock()
        self._thread: CompilerThread | None = None

    def start(self) -> None:
        """Begin, or go on after a stop."""
        with self._lock:
            if self._thread is None and not self.ready.is_set():
                self._thread = CompilerThread(self._run, "graphpar-chain")
                self._thread.start()

    def stop(self) -> None:
        """Leave the rest for later."""
        with self._lock:
            if self._thread is not None and not self.ready.is_set():
                self._thread.stop()
                self._thread = None

    def _run(self) -> None:
        from graphpar.partition.chains.example import run_example

        try:
            with TRACING:
                run_example()
        except Exception as fault:
            self.fault = fault
        self.ready.set()


_COMPILER = _Compiler()


NOT_COMPILED = "numba cannot be imported"
NOT_READY = "its loops were not compiled when they were needed, as in the first run of an installation"


def why_without_loops() -> str:
    """What kept a search from the compiled loops."""
    if not COMPILED:
        return NOT_COMPILED
    fault = _COMPILER.fault
    return NOT_READY if fault is None else f"its loops could not be compiled ({fault})"


def loops_pay(deadline_s: float, steps: float) -> bool:
    """Whether a search of so many steps is long enough for compiled loops.

    A shorter one takes them where they lie on disk and there is time to load them, a still shorter one
    where they are loaded.
    """
    least = _COMPILING_PAYS
    if _COMPILER.ready.is_set():
        least = 1
    elif _SHARE_LOADING * _left_s(deadline_s) >= _LOADING_S and _are_kept():
        least = _LOADING_PAYS
    return steps >= least * LOOPS_PAY


def _are_kept() -> bool:
    from graphpar.partition.chains.labels import sweep

    return is_kept(sweep)  # which is compiled last


def _left_s(deadline_s: float) -> float:
    return max(0.0, min(deadline_s - time.monotonic(), 3600.0))


def loops_are_ready(deadline_s: float, steps: float = math.inf) -> bool:
    """Whether the compiled loops can be used; waits for them, for a share of the time until a deadline.

    For few steps it waits no longer than loading takes.

    False where numba is missing, the time is too short, or the compiler failed: array operations then
    do the same work, slower.
    """
    if not COMPILED:
        return False
    left_s = _left_s(deadline_s)
    if _COMPILER.ready.is_set() or _are_kept():
        wait_s = _SHARE_LOADING * left_s
        if steps < _COMPILING_PAYS * LOOPS_PAY:
            wait_s = min(wait_s, _MOST_LOADING_S)
        _COMPILER.start()
        _COMPILER.ready.wait(wait_s)
    elif left_s < _LEAST_S:
        _COMPILER.lacking_s += left_s
        if _COMPILER.lacking_s >= _LEAST_S:
            _COMPILER.start()
    else:
        say_once("compiling loops of the search, once for all runs of this installation")
        _COMPILER.start()
        if not _COMPILER.ready.wait(_SHARE_COMPILING * left_s):
            _COMPILER.stop()
    return _COMPILER.ready.is_set() and _COMPILER.fault is None
