"""What all tests share: a fixed seed, a single thread and the log as it was, so that runs repeat."""

import logging
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# A suite started in the background of a shell ignores interrupts, and so would the processes that tests
# start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# How long an example takes on a loaded machine says nothing of the code.
settings.register_profile("graphpar", deadline=None)
settings.load_profile("graphpar")

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(autouse=True)
def _repeatable() -> Iterator[None]:
    threads, log = torch.get_num_threads(), logging.getLogger("graphpar")
    level = log.level  # the command line sets it for its process, which here is that of other tests, too
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    log.setLevel(level)


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that takes the place of the system's temporary one."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path
