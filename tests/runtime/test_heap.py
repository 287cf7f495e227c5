"""Places of freed tensors are taken by others of their size, in a process that has a worker's heap."""

import os
import socket
import subprocess
import sys
import threading
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from graphpar.runtime import heap, messages, worker
from graphpar.runtime.fork_server import _KEEPS_MEMORY
from graphpar.runtime.messages import Message
from graphpar.runtime.weights import Weights

WORK = """
import ctypes, importlib.util, sys
spec = importlib.util.spec_from_file_location("heap", sys.argv[1])
heap = importlib.util.module_from_spec(spec)
spec.loader.exec_module(heap)
libc = heap._glibc()
def tensor():
    place = ctypes.c_void_p()
    libc.posix_memalign(ctypes.byref(place), ctypes.c_size_t(64), ctypes.c_size_t(2**20))
    return place.value
heap.keep_small_apart()
for size in (2**16, 2**12, 2**10, 2**8):
    [libc.malloc(size) for _ in range(2000)]  # as in a worker, nothing larger than these is free
libc.malloc(2**20 + int(sys.argv[2]))  # what else is there, of any size
heap.go_on_behind_a_line()
first = []
for _ in range(16):
    first.append(tensor())
    [libc.malloc(size) for size in (24, 40, 56, 72, 88, 200, 1000, 5000)]
for gone in first[1:-1:2]:
    libc.free(gone)
    [libc.malloc(size) for size in (24, 40, 56, 72, 88)]
found = {tensor() for _ in first[1:-1:2]}
print(len(found & set(first)))
"""


def taken_again(before: int) -> int:
    """How many of seven freed places seven tensors of that size take."""
    run = [sys.executable, "-c", WORK, heap.__file__, str(before)]
    environment = {**os.environ, **_KEEPS_MEMORY}
    done = subprocess.run(run, env=environment, capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(heap._glibc() is None, reason="workers' heaps are prepared with glibc 2.33 to 2.37")
@pytest.mark.parametrize("before", [0, 48])
def test_tensors_find_the_places_of_their_size(before: int) -> None:
    assert taken_again(before) == 7


@pytest.mark.parametrize("count", [1, 64, 4097])
def test_what_is_received_takes_a_place_like_a_tensors(count: int) -> None:
    """Whole lines, aligned: anything else at the heap's end would shift all that comes behind it."""
    here, there = socket.socketpair()
    with here, there:
        here.sendall(bytes(count))
        with torch.device("meta"):  # or a GPU, by `torch.set_default_device`
            received = messages._read(there, count)
    held = np.asarray(received.obj)
    assert received.nbytes == count
    assert held.ctypes.data % 64 == 0 and held.nbytes % 64 == 0


def test_what_is_received_lies_apart_and_is_not_copied_to_be_kept() -> None:
    """A worker would hold its weights twice, and keep a place of the size of all together."""
    here, there = socket.socketpair()
    sent = {"a": torch.arange(6.0).reshape(2, 3), "none": torch.empty(0), "b": torch.tensor(True)}
    with here, there:
        messages.send(here, Message("setup", tensors=sent))
        received = messages.receive(there).tensors
    weights = Weights(dict(received), received=True)
    for label, tensor in sent.items():
        own = weights.own(label, torch.device("cpu"))
        assert torch.equal(own, tensor)
        assert own.data_ptr() == received[label].data_ptr()
    assert len({tensor.untyped_storage().data_ptr() for tensor in received.values()}) == 3
    assert Weights(sent).own("a", torch.device("cpu")).data_ptr() != sent["a"].data_ptr()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # how threads leave
def test_what_a_step_took_and_gave_back_is_gone_before_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[weakref.ref[torch.Tensor]] = []
    still_there: list[bool] = []

    def answer(_: object, command: Message) -> Message:
        still_there.extend(last() is not None for last in given)
        found = torch.ones(3)
        given[:] = weakref.ref(found), weakref.ref(command.tensors["x"])
        return Message("result", tensors={"y": found})

    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(worker, "_set_up", lambda command: object())
    monkeypatch.setattr(worker, "_answer", answer)
    monkeypatch.setattr(os, "_exit", leave)
    here, there = socket.socketpair()
    with here, there:
        serving = threading.Thread(target=worker.serve, args=(there,), daemon=True)
        serving.start()
        for command in ("setup", "step", "step"):
            messages.send(here, Message(command, tensors={"x": torch.zeros(2)}))
            messages.receive(here)
        messages.send(here, Message("close"))
        serving.join()
        (listening,) = (t for t in threading.enumerate() if t.name == "graphpar-commands")
        here.close()
        listening.join()  # it leaves, too, which must not be while that ends this process
    assert still_there == [False, False]


def test_what_steps_have_freed_is_not_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    skipped: list[bool] = []
    monkeypatch.setattr(worker, "go_on_behind_a_line", lambda: skipped.append(True))
    monkeypatch.setattr("msgspec.convert", lambda program, _: program)
    executors: dict[str, str] = {}
    held = SimpleNamespace(executors=executors, install=executors.__setitem__)
    for batch in ("16", "15", "14"):
        asked = Message("install", {"name": batch, "program": batch})
        assert worker._answer(held, asked).kind == "ready"  # type: ignore[arg-type]
    assert list(executors) == ["16", "15", "14"] and skipped == [True]
