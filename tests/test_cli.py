"""The command line: texts, exit codes, and what each command may load."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest
from plan_samples import sample_plan

from graphpar import cli
from graphpar.commands.output import print_json, stdout_kept_clean
from graphpar.errors import (
    CaptureError,
    ClusterError,
    GraphparError,
    InfeasibleError,
    NumbersDifferError,
    PlanError,
    RunError,
    VerifyError,
)
from graphpar.plans.plan import plan_schema

HELP = """\
Usage: graphpar [OPTIONS] COMMAND [ARGS]...

  Turn a PyTorch model and a description of unlike devices into a parallel
  job.

Options:
  --debug        Show tracebacks and detailed logs.
  -v, --verbose  Show what is being done.
  --version      Show the version and exit.
  -h, --help     Show this message and exit.

Commands:
  demo       Train a small GPT on unlike local workers.
  doctor     Check that this machine has what graphpar needs.
  plan       Plan a model on a cluster.
  show       Print a plan.
  view       Draw a plan into one file.
  rehearse   Play a plan's steps here, without computing.
  explain    Tell why a plan is as it is.
  diff       Tell what differs between two plans.
  what-if    Ask what other devices or settings would change.
  estimate   Tell what memory a model needs, and on what it fits.
  run        Run a model on a cluster for some steps.
  verify     Compare a parallel run with one device.
  calibrate  Measure this machine for better predictions.
  solve      Solve a partition problem given as a file.
"""


def run(*arguments: str) -> int:
    return cli.run(arguments, cli.Settings())


@pytest.fixture
def plan_file(tmp_path: Path) -> str:
    return str(sample_plan().save(tmp_path / "plan.json"))


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    assert capsys.readouterr().out == HELP


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_the_help_repeats_what_the_command_says(name: str) -> None:
    command = cli.graphpar.get_command(click.Context(cli.graphpar), name)
    assert command is not None and command.name == name
    assert command.get_short_help_str(limit=100).rstrip(".") == cli.COMMANDS[name].rstrip(".")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out.startswith("graphpar ")


def test_show_prints_the_page(plan_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("show", plan_file) == 0
    assert capsys.readouterr().out == str(sample_plan()) + "\n"


def test_show_json_prints_the_plan(plan_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("show", plan_file, "--json") == 0
    assert json.loads(capsys.readouterr().out) == json.loads(Path(plan_file).read_text())


def test_show_prints_the_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("show", "--schema") == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(plan_schema()))


def test_diff(plan_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = str(sample_plan(4).save(tmp_path / "other.json"))
    assert run("diff", plan_file, other) == 0
    assert "moved unit 4 (h.3): p0s1/0, p0s1/1 -> p0s2/0" in capsys.readouterr().out
    assert run("diff", plan_file, other, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [m["names"] for m in found["moves"]] == ["h.3"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["shwo"], "there is no command 'shwo'; the commands are demo, doctor"),
        (["show"], "Missing argument 'PLAN'"),
        (["show", "a", "--nope"], "No such option"),
        (["--nope"], "No such option"),
        (["show", "nothing.json"], "plan file nothing.json: cannot be read"),
        (
            ["plan", "hf:gpt2", "--cluster", "c", "--tensor", "wide"],
            "'wide' is neither a number nor auto",
        ),
        (["plan", "hf:gpt2", "--cluster", "c", "--tensor", "0"], "0 is not in the range x>=1"),
    ],
)
def test_wrong_usage_exits_with_2(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert told in captured.err
    assert captured.out == ""
    assert "Traceback" not in captured.err


def raise_in_show(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    @click.command(name="show")
    def failing() -> None:
        raise error

    monkeypatch.setattr("graphpar.commands.show.command", failing)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("x"), 2),
        (ClusterError("x"), 2),
        (PlanError("x"), 2),
        (InfeasibleError("x"), 3),
        (CaptureError("x"), 4),
        (RunError("x"), 5),
        (VerifyError("x"), 5),
        (GraphparError("x"), 5),
        (KeyError("x"), 5),
        (NumbersDifferError("x"), 6),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_codes(
    error: BaseException,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    raise_in_show(monkeypatch, error)
    assert run("show") == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    assert ("interrupted" if code == 130 else "x") in captured.err


def test_debug_shows_the_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raise_in_show(monkeypatch, RunError("it broke", rank=3))
    assert run("--debug", "show") == 5
    assert "Traceback" in capsys.readouterr().err


def test_doctor_finds_this_machine_sound(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("doctor", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"]
    states = {check["name"]: check["state"] for check in report["checks"]}
    assert states["solver HiGHS"] == states["solver CBC"] == states["gloo"] == "ok"
    assert run("doctor") == 0
    assert "FAIL" not in capsys.readouterr().out


def test_doctor_tells_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> None:
        raise OSError("no sockets here")

    monkeypatch.setattr("graphpar.doctor.socket.socket", broken)
    assert run("doctor") == 2
    assert re.search("FAIL loopback +OSError: no sockets here", capsys.readouterr().out)


LIGHT = """
import json, sys
import graphpar.__main__
assert "torch" not in sys.modules, "import graphpar"
from graphpar.cli import Settings, run
for command in json.loads(sys.argv[1]):
    assert run(command, Settings()) == 0, command
    assert "torch" not in sys.modules, command
"""


def test_light_commands_never_load_torch(plan_file: str) -> None:
    """One after another in one process; the first that loads torch is named."""
    show, diff = ["show", plan_file], ["diff", plan_file, plan_file]
    commands = [["--help"], show, diff, *([name, "--help"] for name in cli.COMMANDS)]
    done = subprocess.run(
        [sys.executable, "-c", LIGHT, json.dumps(commands)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_the_package_runs_as_a_module(plan_file: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "graphpar", "show", plan_file + "x"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert "cannot be read" in done.stderr


def test_a_reader_that_goes_away_is_answered_with_silence(plan_file: str) -> None:
    """`graphpar show PLAN | true`."""
    done = subprocess.Popen(
        [sys.executable, "-m", "graphpar", "show", plan_file],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert done.stdout is not None
    assert done.stderr is not None
    done.stdout.close()
    assert done.stderr.read() == b""
    assert done.wait() == 1
    done.stderr.close()


SLEEPER = """
import time
import click
from graphpar import cli
from graphpar.commands import show

@click.command(name="show")
def sleep():
    click.echo("ready")
    time.sleep(60)

show.command = sleep
cli.main(["show"])
"""


def test_ctrl_c_ends_a_command_cleanly() -> None:
    done = subprocess.Popen(
        [sys.executable, "-c", SLEEPER], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert done.stdout is not None
    assert done.stdout.readline() == "ready\n"
    done.send_signal(signal.SIGINT)
    _, told = done.communicate(timeout=30)
    assert done.returncode == 130
    assert told.strip() == "interrupted"


CHATTER = """
import os
from graphpar.commands.output import print_json, stdout_kept_clean
with stdout_kept_clean():
    print("from Python")
    os.write(1, b"from C\\n")
print_json({"answer": 42})
"""


def test_json_stays_alone_on_stdout() -> None:
    done = subprocess.run([sys.executable, "-c", CHATTER], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {"answer": 42}
    assert "from Python" in done.stderr
    assert "from C" in done.stderr


def test_calibrate_measures_nothing_that_it_cannot_keep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("graphpar.local.measure.measure", None)
    assert run("calibrate") == 2
    assert re.search("cannot be written: .*file is no folder; .*XDG_CACHE_HOME", capsys.readouterr().err)
    assert run("calibrate", "-o", str(tmp_path / "file" / "x.json")) == 2
    assert "XDG_CACHE_HOME" not in capsys.readouterr().err


def test_stdout_is_left_alone_when_it_need_not_be_clean(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with stdout_kept_clean(False):
        print("a page")
    assert capsys.readouterr().out == "a page\n"


def test_numbers_that_json_has_not_become_null(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"loss": float("nan"), "difference": float("inf"), "step": 1})
    told = json.loads(capsys.readouterr().out)
    assert told == {"loss": None, "difference": None, "step": 1}
