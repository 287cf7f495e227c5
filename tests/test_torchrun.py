"""The same script under torchrun: same losses, clear errors, a clean end."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from amounts import exhaustive
from helpers import Line, force
from torchrun_script import Net

from graphpar.cluster import Cluster
from graphpar.cost_models.group_times import OpTimes, TensorGroup
from graphpar.errors import ClusterError
from graphpar.runtime.torchrun import match_devices
from graphpar.training import Training

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(240)]

SCRIPT = str(Path(__file__).parent / "torchrun_script.py")
WAIT_S = 200
ENDS_S = 15
TWO = {"devices": [{"kind": "cpu", "count": 2, "threads": 1}]}
THREE = {
    "nodes": [
        {"name": "a", "devices": {"kind": "cpu", "count": 1, "threads": 1}},
        {"name": "b", "devices": {"kind": "cpu", "count": 2, "threads": 1}},
    ],
    "network": {"bytes_per_s": 1e9, "latency_s": 1e-5},
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def torchrun(*options: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", *options]


def begin(command: Sequence[str], folder: Path, cluster: Mapping[str, Any], *mode: str) -> Any:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, SCRIPT, str(folder), json.dumps(cluster), *mode],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def finish(process: Any) -> str:
    _, errors = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0, errors
    return str(errors)


def run(folder: Path, cluster: Mapping[str, Any], *mode: str, processes: int = 2) -> list[dict[str, Any]]:
    """What each rank wrote, after a clean end."""
    command = torchrun("--standalone", "--nproc-per-node", str(processes))
    assert_nothing_is_said(finish(begin(command, folder, cluster, *mode)))
    return written(folder, processes)


def assert_nothing_is_said(errors: str) -> None:
    for sign in ("Traceback", "destroy_process_group", "terminate called", "Warning"):
        assert sign not in errors, errors


def await_files(paths: Sequence[Path]) -> None:
    until = time.monotonic() + WAIT_S
    while not all(path.exists() and path.read_text() for path in paths):
        assert time.monotonic() < until, "the ranks have not come so far"
        time.sleep(0.1)


def written(folder: Path, count: int) -> list[dict[str, Any]]:
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(count)]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the script writes under plain python."""
    folder = tmp_path_factory.mktemp("plain")
    finish(begin([sys.executable], folder, TWO))
    (seen,) = written(folder, 1)
    assert "errors" not in seen
    return seen


def assert_same(seen: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    assert seen["losses"] == pytest.approx(wanted["losses"], rel=1e-5)
    assert seen["inference"] == pytest.approx(wanted["inference"], rel=1e-5)
    assert seen["again"] == pytest.approx(0.0, abs=1e-6), "a loaded checkpoint repeats a step"
    assert seen["sums"] == pytest.approx(wanted["sums"], rel=1e-4, abs=1e-4)


def test_every_rank_tells_what_does_not_match_and_ends_with_a_torchrun_that_is_killed(
    tmp_path: Path,
) -> None:
    command = torchrun("--standalone", "--nproc-per-node", "2")
    agent = begin(command, tmp_path, TWO, "misfits", "lingers")
    try:
        await_files([tmp_path / f"{rank}.json" for rank in range(2)])
    finally:
        agent.kill()
    agent.communicate(timeout=ENDS_S)  # until the ranks, which have its pipes, are gone as well
    for seen in written(tmp_path, 2):
        (cluster_error, told), (model_error, said) = seen["errors"]
        assert cluster_error == "ClusterError" and "--nproc-per-node" in told
        assert model_error == "RunError" and "Rank 1" in said


def test_same_as_plain_python_on_unequal_nodes_whatever_weights_other_ranks_begin_with(
    tmp_path: Path, plain: dict[str, Any]
) -> None:
    port = str(free_port())
    common = ("--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", port)
    commands = [torchrun(*common, "--node-rank", str(n), "--nproc-per-node", str(n + 1)) for n in (0, 1)]
    # By rank: the second agent may say that the first, which holds their store, has ended before it.
    logs = [("--log-dir", str(tmp_path / f"logs{n}"), "--redirects", "3") for n in (0, 1)]
    agents = [
        begin([*command, *log], tmp_path, THREE, "unlike")
        for command, log in zip(commands, logs, strict=True)
    ]
    for agent in agents:
        finish(agent)
    said = [path.read_text() for path in tmp_path.glob("logs*/**/stderr.log")]
    assert len(said) == 3
    for errors in said:
        assert_nothing_is_said(errors)
    seen = written(tmp_path, 3)
    assert_same(seen[0], plain)
    assert seen[0] == seen[1] == seen[2], "weights that no rank trains are the same too"


EVEN, UNEVEN, OF_FOUR = (0.5, 0.5), (0.6, 0.4), (0.35, 0.35, 0.15, 0.15)
GROUPS: dict[str, tuple[Line, dict[str, Any]]] = {
    "width 2, then one device": (Line((1, 1), 4, cuts=(1,), groups=(UNEVEN, ())), {}),
    "two stages by turns": (
        Line((1,), 4, groups=(UNEVEN,), chunks=2),
        {"schedule": "interleaved", "recompute": True},
    ),
    "two axes": (Line((1,), 4, groups=(OF_FOUR,), meshes=((2, 2),)), {}),
    "zero-bubble on 4": (
        Line((1, 1), 4, cuts=(1,), groups=(UNEVEN, EVEN)),
        {"schedule": "zero-bubble"},
    ),
    "two axes, then tensor x data on 4, state and gradients divided": (
        Line((1, 2), 4, cuts=(1,), groups=(OF_FOUR, EVEN), meshes=((2, 2), ())),
        {"zero": 2},
    ),
    "tensor x pipeline x data on 8, state and gradients divided": (
        Line((2, 2), 4, cuts=(1,), groups=(UNEVEN, EVEN)),
        {"zero": 2},
    ),
}


ALWAYS = "two axes, then tensor x data on 4, state and gradients divided"
"""Has every sort of group of processes; the others differ in what each rank does in turn."""


@pytest.mark.parametrize(
    ("line", "how"),
    [(pytest.param if name == ALWAYS else exhaustive)(*case, id=name) for name, case in GROUPS.items()],
)
def test_tensor_groups_share_as_the_plan_says(
    tmp_path: Path,
    plain: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    line: Line,
    how: dict[str, Any],
) -> None:
    monkeypatch.setattr(TensorGroup, "seconds", lambda self, name, num_bytes: 0.0)
    monkeypatch.setattr(OpTimes, "host_seconds", lambda self, name, num_bytes: 0.0)
    torch.manual_seed(0)
    data = torch.randint(0, 20, (8, 5)), torch.randint(0, 20, (8, 5))
    training = Training(optimizer=torch.optim.AdamW, max_grad_norm=1.0, microbatches=4)
    plan = force(Net(16), data, lines=(line,), train=training, **how).plan
    assert any(layout.startswith("dim") for layout in plan.partition.shardings[0].weights.values())
    plan.save(tmp_path / "plan.json")
    count = len(plan.partition.used_devices)
    alike = {"devices": [{"kind": "cpu", "count": count, "threads": 1}]}
    seen = run(tmp_path, alike, "planned", processes=count)
    assert_same(seen[0], plain)
    assert all(other == seen[0] for other in seen)


def test_port_in_use(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        environment = {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(taken.getsockname()[1]),
        }
        done = subprocess.run(
            [sys.executable, SCRIPT, str(tmp_path), json.dumps(TWO)],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=WAIT_S,
        )
    assert done.returncode == 0, done.stderr
    ((kind, text),) = written(tmp_path, 1)[0]["errors"]
    assert kind == "RunError"
    assert "--master-port" in text and environment["MASTER_PORT"] in text


def test_nodes_are_matched_by_host_then_by_size() -> None:
    hosts = [(0, "one", 0), (1, "two", 1), (1, "two", 0), (2, "three", 0)]
    cluster = Cluster.from_dict(
        {
            "nodes": [
                {"name": "x", "devices": {"kind": "cpu", "count": 2}},
                {"name": "y", "devices": {"kind": "cpu", "count": 1}, "host": "three"},
            ],
            "network": {"bytes_per_s": 1e9, "latency_s": 1e-5},
        }
    )
    assert match_devices(cluster, hosts) == {"x/0": 2, "x/1": 1, "y/0": 3}
    with pytest.raises(ClusterError, match="'y'"):
        match_devices(cluster, hosts[:3])
