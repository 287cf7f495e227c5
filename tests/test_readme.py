"""What README and the guides show is run: Python blocks as scripts, `$` lines as commands."""

import re
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest

from graphpar import cli

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "docs/getting-started.md", "docs/extending.md")


def blocks(page: str, language: str) -> list[str]:
    """Fenced blocks of a language in a page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


PYTHON = [(page, i, code) for page in PAGES for i, code in enumerate(blocks(page, "python"))]


@pytest.mark.parametrize(
    ("page", "number", "code"), PYTHON, ids=[f"{page}-{number}" for page, number, _ in PYTHON]
)
def test_python_blocks_run(
    page: str, number: int, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As scripts, but in this process, which has imported torch."""
    script = tmp_path / "shown.py"
    script.write_text(code, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(script), run_name="__main__")


@pytest.mark.slow
def test_readme_commands_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The `$ graphpar` lines of the README, with its cluster file; in one process, which saves time."""
    pytest.importorskip("transformers", reason="the README plans a transformers model")
    (tmp_path / "cluster.yaml").write_text(blocks("README.md", "yaml")[0], encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    commands = [
        line.removeprefix("$ graphpar ").split()
        for block in blocks("README.md", "console")
        for line in block.splitlines()
        if line.startswith("$ graphpar ")
    ]
    assert commands
    for command in commands:
        assert cli.run(command, cli.Settings()) == 0, capsys.readouterr().err
    assert (tmp_path / "plan.json").exists()


def test_make_targets_exist() -> None:
    """The README's first commands are targets of the Makefile."""
    make = shutil.which("make")
    if make is None:
        pytest.skip("make is not installed")
    for target in re.findall(
        r"^make (\w+)", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE
    ):
        done = subprocess.run([make, "-n", target], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
