"""What all tests share: a fixed seed, a single thread, the log as it was, a cache of their own."""

import gc
import logging
import os
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Generator, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from simple_plans import watch_plans

from graphpar.neighbours import reference_s

# A suite started in the background of a shell ignores interrupts, and so would the processes that tests
# start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# How long an example takes on a loaded machine says nothing of the code.
settings.register_profile("graphpar", deadline=None)
settings.load_profile("graphpar")

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Nothing that importing torch and the tests makes is garbage, and looking for it takes seconds.

    Tests make garbage that little refers to: looking for it less often costs no memory worth speaking of.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.set_threshold(50_000, 20, 10)
        gc.enable()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, then those of many tests: small files fill up what is left at the end.

    Workers take whole files, and one that takes a long one last keeps the others waiting.
    """
    tests = Counter(item.path for item in items)
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path not in slow, -tests[item.path]))


@pytest.fixture(autouse=True, scope="module")
def _other_work_takes_no_time(request: pytest.FixtureRequest) -> Iterator[None]:
    """Limits of the partitioner are of processor time: other work must not change its answers."""
    with pytest.MonkeyPatch.context() as patch:
        if request.path.parent.name == "partition":
            patch.setattr(time, "monotonic", time.process_time)
        yield


@pytest.fixture(autouse=True)
def _repeatable() -> Iterator[None]:
    threads, log = torch.get_num_threads(), logging.getLogger("graphpar")
    level = log.level  # the command line sets it for its process, which here is that of other tests, too
    # As `torch.manual_seed` does, which keeps its caller's stack for each kind of device never used.
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(0)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    log.setLevel(level)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test sees or changes what this machine keeps: a calibration of it would change every plan."""
    kept = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    with pytest.MonkeyPatch.context() as patch:
        if "MPLCONFIGDIR" not in os.environ:  # its list of fonts takes seconds to make
            patch.setenv("MPLCONFIGDIR", str(Path(kept) / "matplotlib"))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _machine_looked_at_once() -> Iterator[None]:
    """A job whose step was predicted badly, as of most tiny models, asks how fast the machine is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("graphpar.runtime.job.reference_s", cache(reference_s))
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_simple_plan_is_better() -> Iterator[None]:
    """No partition of any test may be worse than what people do without a planner."""
    with pytest.MonkeyPatch.context() as patch:
        watch_plans(patch)
        yield


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that takes the place of the system's temporary one."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path
