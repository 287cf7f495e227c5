"""Turns at a job: one thread at a time, and a forked child starts afresh."""

import os
import threading

from graphpar.runtime.turns import Turn


def test_one_thread_at_a_time() -> None:
    turn, seen = Turn(), []
    with turn:
        other = threading.Thread(target=lambda: seen.append(_entered(turn)))
        other.start()
        other.join(0.05)
        assert not seen
    other.join()
    assert seen == [True]


def test_a_forked_child_does_not_wait_for_a_thread_it_does_not_have() -> None:
    turn, taken, over = Turn(), threading.Event(), threading.Event()

    def hold() -> None:
        with turn:
            taken.set()
            over.wait()

    holder = threading.Thread(target=hold)
    holder.start()
    taken.wait()
    child = os.fork()
    if child == 0:
        os._exit(0 if _entered(turn) else 1)
    try:
        assert os.waitpid(child, 0)[1] == 0
    finally:
        over.set()
        holder.join()


def _entered(turn: Turn) -> bool:
    with turn:
        return True
