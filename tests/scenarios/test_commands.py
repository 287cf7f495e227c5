"""`graphpar what-if` and `graphpar estimate` on the command line."""

import json
from pathlib import Path

import pytest

from graphpar.cli import Settings, run
from graphpar.errors import CaptureError

CLUSTER = """
nodes:
  - {name: a, devices: {kind: a100-sxm-80gb, count: 2}}
  - {name: b, devices: {kind: t4, count: 1}}
network: {bytes_per_s: 1e9, latency_s: 1e-5}
"""
TINY = "scenarios.tiny_model:make"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def cluster(tmp_path: Path) -> str:
    path = tmp_path / "cluster.yaml"
    path.write_text(CLUSTER)
    return str(path)


def test_what_if_answers_in_json_and_writes_the_table(
    cluster: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "table.csv"
    options = ["--set", "network.bytes_per_s=25e9", "--replace", "b=l4", "--config", "pp=2"]
    options += [
        "--scenario",
        "small: drop b; set batch=4",
        "--csv",
        str(table),
        "--processes",
        "1",
        "--time-limit",
        "1",
    ]
    code = run(["what-if", TINY, "--cluster", cluster, "--train", *options, "--json"], Settings())
    out = capsys.readouterr().out
    assert code == 0
    data = json.loads(out)
    titles = [s["title"] for s in data["scenarios"]]
    assert titles == ["small", "set network.bytes_per_s=25e9", "replace b with l4", "pp=2"]
    assert all(s["status"] == "ok" for s in data["scenarios"])
    assert len(table.read_text().splitlines()) == 1 + 1 + len(titles)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (["--drop", "nope"], "nearest"),
        (["--sweep", "bacth=1,2"], "2 of 2 scenarios"),
        (["--scenario", "x: set batch=4; set batch=8"], "contradict"),
        (["--scenario", "x: pp=2 m=2; set microbatches=3"], "contradict"),
        (["--scenario", "x: drop a; drop a/0"], "after drop a"),
        (["--scenario", ""], "changes nothing"),
        (["--scenario", "x: drop a", "--scenario", "x: drop b"], "rename one"),
        (["--set", "batch=4", "--set", "batch=4"], "asked twice"),
        (["--sweep", "batch=4,4"], "has 4 twice"),
        (["--set", "network.latency_s=-1"], "zero, or positive"),
        (["--set", "a.count=1e9"], "at most"),
        (["--add", "999999 h100"], "devices"),
        (["--replace", "b"], "NAME=KIND"),
        (["--price", "a=cheap"], "NODE=DOLLARS"),
        (["--price", "z=1"], "no node"),
        (["--price", "a=nan"], "finite"),
        (["--price", "a=-3"], "not negative"),
        (["--price", "a=1", "--price", "a=2"], "two prices"),
        (["--gap", "1"], "0<=x<1"),
        (["--gap", "nan"], "not a number"),
        (["--time-limit", "nan"], "not a number"),
        (["--sweep", "batch"], "PATH=VALUE"),
        (["--sweep", "batch=1", "--sweep", "batch=2"], "both sweeps"),
        (["--budget", "-1"], "budget"),
        (["--instances", "g5.12xlarge"], "--budget"),
        (["--objective", "cost"], "--budget"),
        (["--budget", "9", "--instances", "g5.xlarg"], "g5.xlarge"),
        (["--budget", "0.1", "--instances", "g5.xlarge"], "below the cheapest"),
        (["--plot", "x.gif"], "must end"),
        (["--csv", "{cluster}/x.csv"], "no folder"),
    ],
)
def test_senseless_questions_are_refused_before_the_model_is_even_looked_for(
    cluster: str, wrong: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [word.format(cluster=cluster) for word in wrong]
    assert run(["what-if", "no_such_module:make", "--cluster", cluster, *options], Settings()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert told in err


def test_a_scenario_found_senseless_while_planning_is_told_and_fails(
    cluster: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--set", "precision=float8_e4m3fn", "--processes", "1", "--time-limit", "0.3"]
    assert run(["what-if", TINY, "--cluster", cluster, *options], Settings()) == 2
    out, err = capsys.readouterr()
    assert "baseline" in out and "no device of the cluster" in err


def test_a_full_disk_loses_no_answer(cluster: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--csv", "/dev/full", "--processes", "1", "--time-limit", "0.3"]
    assert run(["what-if", TINY, "--cluster", cluster, *options], Settings()) == 5
    out, err = capsys.readouterr()
    assert "baseline" in out
    assert "error: /dev/full: No space left on device" in err


def test_estimate_gives_memory_by_part_and_device_counts(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["estimate", TINY, "--train", "--kind", "t4", "--json"], Settings()) == 0
    rows = json.loads(capsys.readouterr().out)["estimates"]
    assert len(rows) == 6
    by_key = {(r["format"], r["recompute"]): r for r in rows}
    plain, again = by_key["float32", False], by_key["float32", True]
    assert plain["optimizer_bytes"] == pytest.approx(2 * plain["weights_bytes"], rel=0.01)
    assert again["activations_bytes"] <= plain["activations_bytes"]
    assert by_key["bfloat16", False]["weights_bytes"] == plain["weights_bytes"] / 2
    assert plain["devices"] == {"t4": 1}


def test_estimate_says_why_it_leaves_bfloat16_out(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*given: object) -> None:
        raise CaptureError("no such kernel")

    monkeypatch.setattr("graphpar.scenarios.estimate.in_bfloat16", fails)
    assert run(["estimate", TINY, "--train", "--kind", "t4", "--json"], Settings()) == 0
    shown = json.loads(capsys.readouterr().out)
    assert {row["format"] for row in shown["estimates"]} == {"float32", "bfloat16 mixed"}
    assert "no such kernel" in shown["notes"][0]


def test_estimate_of_an_unknown_kind_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["estimate", TINY, "--kind", "h1000"], Settings()) == 2
    assert "nearest" in capsys.readouterr().err


def test_estimate_marks_devices_without_the_format(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["estimate", TINY, "--kind", "t4", "--kind", "l4"], Settings()) == 0
    shown = capsys.readouterr().out
    assert "t4*" in shown and "l4*" not in shown and "no rate of bfloat16" in shown
