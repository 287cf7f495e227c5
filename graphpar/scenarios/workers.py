"""Processes that solve scenarios: fresh interpreters that end with the one that asked."""

import gc
import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import TypeVar

from graphpar.cluster_build import num_cores
from graphpar.errors import RunError
from graphpar.scenarios.solve import solve_together
from graphpar.scenarios.task import Task
from graphpar.scenarios.types import Answer

Submit = Callable[[list[Task]], "Future[list[Answer]]"]

_In = TypeVar("_In")
_Out = TypeVar("_Out")

LEAST_AHEAD = 12
"""Of so many scenarios a few are solved by the time that processes take to start."""

_AHEAD: ContextVar["_Pool | None"] = ContextVar("ahead", default=None)
"""The processes that were started ahead."""

_LOOK_S = 0.5
"""How often a process looks whether the one that started it is still there."""


@contextmanager
def solving(processes: int | None, tasks: int) -> Iterator[Submit]:
    """Submits to other processes, or runs at once where one process is enough.

    Raises:
        RunError: One of the processes was killed.
    """
    count = min(processes if processes is not None else num_cores(), tasks)
    if count <= 1 or (tasks <= 2 and processes is None):
        yield _at_once
        return
    with started(count) as pool:
        yield lambda tasks: submitted(pool, solve_together, tasks)


@contextmanager
def ahead(processes: int | None, tasks: int) -> Iterator[None]:
    """Start processes while this one prepares their work; `started` hands them out as long as this lasts.

    For few tasks they are started when they are wanted.
    """
    count = min(processes if processes is not None else num_cores(), tasks)
    if count <= 1 or tasks < LEAST_AHEAD:
        yield
        return
    with _Pool(count) as pool, _ended_early(pool):
        for _ in range(count):
            submitted(pool, _made_ready, [])
        before = _AHEAD.set(pool)
        try:
            yield
        finally:
            _AHEAD.reset(before)
            pool.end()


@contextmanager
def started(count: int) -> Iterator[ProcessPoolExecutor]:
    """So many processes, each started when it is wanted, or those that were started ahead.

    Raises:
        RunError: One of them was killed.
    """
    pool = _AHEAD.get()
    if pool is None:
        with _Pool(count) as pool, _ended_early(pool):
            yield pool
        return
    try:
        with _ended_early(pool):
            yield pool
    except BaseException:
        _AHEAD.set(None)
        raise


class _Pool(ProcessPoolExecutor):
    """Fresh interpreters: this one may have threads that a fork would not survive."""

    def __init__(self, count: int) -> None:
        context = multiprocessing.get_context("spawn")
        super().__init__(count, mp_context=context, initializer=_end_with, initargs=(os.getpid(),))

    def end(self) -> None:
        """End its processes in the middle of their work, and no others that were started meanwhile."""
        own = list((self._processes or {}).values())
        self.shutdown(wait=False, cancel_futures=True)
        for process in own:
            process.terminate()


@contextmanager
def _ended_early(pool: _Pool) -> Iterator[_Pool]:
    """The pool, whose work nobody waits for after an error."""
    try:
        yield pool
    except BrokenProcessPool as error:
        raise RunError("a process that was planning was killed, most often for want of memory") from error
    except BaseException:
        pool.end()
        raise


def starting_again(why: RunError) -> None:
    """Warn that new processes do the rest."""
    warnings.warn(f"{why}; new ones are started, once, for what is left.", stacklevel=2)


def going_alone(why: RunError) -> None:
    """Warn that this process does the rest, which needs less memory."""
    warnings.warn(
        f"{why}; what is left is done by this process alone, which takes longer. processes=1 "
        "(--processes 1) does so from the start.",
        stacklevel=2,
    )


def submitted(
    pool: ProcessPoolExecutor, work: Callable[[list[_In]], list[_Out]], tasks: list[_In]
) -> "Future[list[_Out]]":
    """Hand over tasks, and start a process where one is wanted.

    A process would run the script that asks once more from its top, to find what it defines; tasks are
    made of nothing in it. It never hears Ctrl-C, not even before it has come to `_end_with`.
    """
    script = sys.modules["__main__"]
    with _interrupted_later():
        sys.modules["__main__"] = ModuleType("__main__")
        try:
            return pool.submit(work, tasks)
        finally:
            sys.modules["__main__"] = script


@contextmanager
def _interrupted_later() -> Iterator[None]:
    """Put Ctrl-C off for a moment, where that can be; what is started meanwhile puts it off for ever."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _at_once(tasks: list[Task]) -> "Future[list[Answer]]":
    future: Future[list[Answer]] = Future()
    future.set_result(solve_together(tasks))
    return future


def _made_ready(_: list[None]) -> list[None]:
    """Load what prices and searches need."""
    import graphpar.groups.modes
    import graphpar.partition.sharding.whole  # noqa: F401
    from graphpar.partition.sharding.warm import go_on_warming

    go_on_warming()
    gc.freeze()  # what was loaded stays
    return []


def _end_with(parent: int) -> None:
    """Let this process end as soon as its parent has, in the middle of a search too.

    Ctrl-C at a terminal reaches all processes: the parent says so once, and ends the others.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
