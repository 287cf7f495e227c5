"""What compiles loops in the background: it is stopped, says so, and knows what lies on disk."""

import io
import os
import sys
import time
from importlib import import_module
from multiprocessing import current_process
from pathlib import Path
from threading import Event

import pytest

from graphpar.partition import compiler_thread
from graphpar.partition.jit import COMPILED, StoppedError, is_kept, stopped_once


@pytest.mark.skipif(not COMPILED, reason="nothing is compiled")
def test_what_lies_on_disk_compiled_is_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """numba says where it keeps what it compiles, and names files as is expected here."""
    source = tmp_path / "tried.py"
    source.write_text(
        "from graphpar.partition.jit import compiled\n\n@compiled\ndef one():\n    return 1\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    one = import_module("tried").one
    with pytest.raises(StoppedError), stopped_once(lambda: True):
        one()
    assert not is_kept(one)
    with stopped_once(lambda: False):
        assert one() == 1
    assert is_kept(one)
    (index,) = tmp_path.rglob("*.nbi")
    others = index.with_name(f"{index.name.removesuffix('.nbi')}9.nbi")
    index.rename(others)
    assert not is_kept(one)
    others.rename(index)
    assert is_kept(one)
    os.utime(source, (time.time() + 60.0,) * 2)
    assert not is_kept(one)


@pytest.mark.parametrize("patience_s", [0.0, 60.0])
def test_the_end_stops_what_is_compiled_and_says_what_it_waits_for(
    patience_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    woken, done = Event(), Event()
    monkeypatch.setattr(compiler_thread, "_SILENT_S", patience_s)
    monkeypatch.setattr(compiler_thread, "say_once", lambda _: done.set())
    monkeypatch.setattr("atexit.register", lambda _: None)

    def work() -> None:
        woken.wait()
        if not patience_s:
            done.wait()

    thread = compiler_thread.CompilerThread(work, "tried", woken.set)
    thread.start()
    thread._end()
    assert not thread.is_alive()
    assert done.is_set() == (patience_s == 0.0)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return self.readable()


def test_only_the_process_that_was_called_tells_a_terminal_once(monkeypatch: pytest.MonkeyPatch) -> None:
    screen, closed = Terminal(), Terminal()
    closed.close()
    monkeypatch.setattr(sys, "stderr", closed)
    compiler_thread.say_once("to nobody")
    monkeypatch.setattr(sys, "stderr", screen)
    for _ in range(2):
        compiler_thread.say_once("compiling")
    monkeypatch.setattr(compiler_thread, "parent_process", current_process)
    compiler_thread.say_once("compiling in a process of its own")
    assert screen.getvalue() == "graphpar: compiling\n"
