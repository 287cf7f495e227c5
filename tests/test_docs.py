"""What the pages name exists: links with their headings, names, files, commands and their options."""

import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from test_architecture import ROW, ROWS

import graphpar
from graphpar.cli import COMMANDS
from graphpar.cli import graphpar as command_line

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = ("graphpar", "passes", "cost_models", "examples", "benchmarks", "docs", "tests")
FILES = {
    "/".join(path.relative_to(ROOT).parts[start:])
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*.*")
    for start in range(len(path.relative_to(ROOT).parts))
}
"""Every file by its name, and by its name after one folder or more."""
GIVEN = {"best.json", "collectives.yaml", "training_tables.yaml"}
"""Files that readers bring."""
OPERATORS = {"graphpar.expected", "graphpar.ctc_loss"}
"""Names of torch operators that look like names of ours."""

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def headings(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    found = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if not re.match(r"https?:", link):
            path, _, heading = link.partition("#")
            target = page.parent / path if path else page
            assert target.exists(), link
            assert not heading or heading in headings(target), link


def exists(name: str) -> bool:
    """Whether a dotted name is a module, or something in one."""
    thing: object = graphpar
    so_far = "graphpar"
    for part in name.split(".")[1:]:
        so_far = f"{so_far}.{part}"
        try:
            thing = getattr(thing, part)
        except AttributeError:
            try:
                thing = importlib.import_module(so_far)
            except ImportError:
                return False
    return True


@every_page
def test_names_and_files_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    names = set(re.findall(r"\bgraphpar(?:\.\w+)+", text)) - OPERATORS
    assert {name for name in names if not exists(name)} == set()
    files = set(re.findall(r"`([\w./-]+\.(?:py|toml|json|js|css))`", text))
    assert files - FILES - GIVEN == set()


def commands(page: Path) -> Iterator[tuple[str, list[str]]]:
    """Programs that a page shows being called, and their options."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    for line in re.findall(
        r"(?:^ {4}|^\$ |^|`)((?:graphpar|python [\w/]+\.py|python -m [\w.]+)(?: [^`\n]*)?)(?:`|$)",
        text,
        re.MULTILINE,
    ):
        program = re.match(r"graphpar(?: --debug)? ?[a-z-]*|python (?:-m )?[\w./]+", line)
        assert program is not None
        shown = line.partition("  #")[0]
        yield program[0].replace(" --debug", ""), re.findall(r"(?<![\w-])(--?[a-z][\w-]*)", shown)


def options_of_command(name: str) -> set[str]:
    """What a subcommand of ours may be given."""
    context = click.Context(command_line)
    command = command_line.get_command(context, name)
    assert command is not None
    return {option for each in (command, command_line) for p in each.params for option in p.opts}


def options_of_script(path: Path) -> set[str]:
    """Words with dashes that stand in quotes in a script, or in a neighbour that it imports."""
    text = path.read_text(encoding="utf-8")
    near = [
        path.with_name(f"{name}.py") for name in re.findall(r"^from (\w+) import", text, re.MULTILINE)
    ]
    texts = [text, *(other.read_text(encoding="utf-8") for other in near if other.exists())]
    return {option for each in texts for option in re.findall(r"\"(--?[a-z][\w-]*)\"", each)}


@every_page
def test_commands_and_options_exist(page: Path) -> None:
    for program, options in commands(page):
        kind, *rest = program.split()
        if kind == "graphpar" and rest:
            assert rest[0] in COMMANDS, program
            unknown = set(options) - options_of_command(rest[0]) - {"--debug"}
        elif kind == "python" and rest[0] == "-m":
            assert exists(rest[1]), program
            continue
        else:
            unknown = set(options) - options_of_script(ROOT / rest[0]) if rest else set()
        assert not unknown, f"{program} knows no {unknown}"


def test_commands_are_found() -> None:
    found = {program for page in PAGES for program, _ in commands(page)}
    assert {"graphpar plan", "graphpar what-if", "python benchmarks/solve.py"} <= found


def test_packages_of_design_are_those_that_there_are() -> None:
    text = (ROOT / "docs/design.md").read_text(encoding="utf-8")
    told = dict(re.findall(r"^\| `([\w.]+)` \| .* \| `([\w.]+)` \|$", text, re.MULTILINE))
    tops = {"passes", "cost_models", "examples"}
    inits = [path for folder in (*tops, "graphpar") for path in (ROOT / folder).rglob("__init__.py")]
    folders = {".".join(path.relative_to(ROOT).parts[:-1]).removeprefix("graphpar.") for path in inits}
    assert set(told) == folders - {"graphpar"}
    for package, first in told.items():
        top = ROOT if package in tops else ROOT / "graphpar"
        assert (top / package.replace(".", "/") / first).exists(), f"{package}: {first}"


def test_layers_are_those_that_are_enforced() -> None:
    """Every name in design's table of layers stands in the row in which the imports' test has it."""
    text = (ROOT / "docs/design.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d) \| (.*) \|$", text, re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(len(ROWS)))
    for number, told in rows:
        names = {name.rstrip("/") for name in re.findall(r"`([\w/]+)`", told)}
        assert names and {name for name in names if ROW.get(name) != int(number)} == set()
