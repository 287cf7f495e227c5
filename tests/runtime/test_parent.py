"""A process ends with the one that started it, also where it will not."""

import subprocess
import sys

import pytest

CHILD = """
import signal, time
from graphpar.runtime.parent import end_with_parent
signal.signal(signal.SIGTERM, signal.SIG_IGN)
end_with_parent(grace_s=0.1)
print("ready", flush=True)
time.sleep(60)
"""
PARENT = f"""
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", {CHILD!r}])
time.sleep(60)
"""


@pytest.mark.distributed
def test_a_process_that_ignores_being_told_ends_with_its_killed_parent() -> None:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    parent = subprocess.Popen([sys.executable, "-c", PARENT], text=True, **pipes)  # type: ignore[call-overload]
    assert parent.stdout.readline() == "ready\n"
    parent.kill()
    _, told = parent.communicate(timeout=10)  # the child has its pipes until it is gone
    assert f"Process {parent.pid}, which started this one, is gone" in told
