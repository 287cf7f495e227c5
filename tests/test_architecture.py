"""Who may import whom: the tree is the pipeline, and imports point one way."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROWS = (
    "errors units files kept_files tracing loading",
    "ir cores cost cost_options catalogue device cluster cluster_build cluster_spec",
    "rewrite calibration arguments",
    "partition",
    "schedule choice plans explanation training solve_command solve_output",
    "frontend runtime passes cost_models view optimizer_probe optimizer_memory neighbours",
    "scenarios compiler planner wishes preparation precision groups local hf "
    "verify demo doctor model_spec commands cli examples",
    "__init__ __main__",
)
"""Top-level modules and packages by row; a module imports from its own row and those above."""
ROW = {name: row for row, names in enumerate(ROWS) for name in names.split()}
CATALOGUES = {"passes", "cost_models"}
DRIVERS = set(
    "compiler planner preparation scenarios precision groups local verify demo commands cli".split()
)


def sources() -> Iterator[tuple[str, Path]]:
    """Every source file with its top-level module or package."""
    for folder in (ROOT / "graphpar", *(ROOT / name for name in CATALOGUES)):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            if folder.name in CATALOGUES:
                yield folder.name, path
            elif parts[0] not in {*CATALOGUES, "examples"}:
                yield parts[0], path


def test_files_are_short_enough_to_read() -> None:
    folders = ("graphpar", "passes", "cost_models", "examples", "tests", "benchmarks")
    paths = {p.resolve() for folder in folders for p in (ROOT / folder).rglob("*.py")}
    long = [
        str(p.relative_to(ROOT)) for p in paths if len(p.read_text(encoding="utf-8").splitlines()) > 500
    ]
    assert not long, "split these along what they are about"


@cache
def imports(path: Path) -> tuple[tuple[str, int], ...]:
    """Dotted names that a file imports and their lines, those for type checkers alone left out."""
    return tuple(_imports(path))


def _imports(path: Path) -> Iterator[tuple[str, int]]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            whole = node.module == "graphpar"
            names = (f"graphpar.{a.name}" if whole else str(node.module) for a in node.names)
            yield from ((name, node.lineno) for name in names)


def test_every_module_has_a_row() -> None:
    assert {top for top, _ in sources()} | {"examples"} == set(ROW), "sort the module into ROWS"


def test_imports_point_to_earlier_rows() -> None:
    wrong = []
    for top, path in sources():
        for name, line in imports(path):
            if name.partition(".")[0] != "graphpar" or top == "__init__":
                continue
            target = name.split(".")[1] if "." in name else "__init__"
            crosses = target in CATALOGUES and target != top and top not in DRIVERS
            if target not in ROW or ROW[target] > ROW[top] or crosses:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert not wrong


def test_planning_knows_no_torch() -> None:
    assert not [
        f"{path.relative_to(ROOT)}:{line}"
        for top, path in sources()
        for name, line in imports(path)
        if name.partition(".")[0] == "torch" and ROW[top] in (0, 3, 4)
    ]


def test_one_file_names_pulp() -> None:
    named = {
        str(path.relative_to(ROOT)) for _, path in sources() if "pulp" in {n for n, _ in imports(path)}
    }
    assert named == {"graphpar/partition/solver.py"}
